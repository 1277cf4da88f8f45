"""Several processes of one run: they agree, stop, fail and die together.

Two processes of one device each are compared with one process of two devices. All are forked, and
share compiled programs.
"""

import itertools
import os
import signal
import socket
import time

import numpy as np
import pytest

from sparsek.data.corpus import Document
from sparsek.data.token_files import write_token_files
from sparsek.data.tokenizer import ByteTokenizer
from sparsek.errors import UsageError
from sparsek.parallel import clusters, processes
from sparsek.parallel.process_watch import SILENCE, Beat, Judge
from sparsek.runs import checkpoint
from sparsek.runs.metrics import read_metrics
from tests.commands import FORKS, become, simulated

TIMEOUT = 20.0
FLAGS = (
  "--num_layers=1 --embed_dim=8 --num_heads=2 --num_kv_heads=1 --head_dim=4 --mlp_dim=8 --k=4 "
  "--window=4 --attention=full --seq_len=16 --batch_size=4 --num_steps=150 --log_every=1 "
  f"--eval_every=75 --eval_batches=2 --checkpoint_every=100 --process_timeout={TIMEOUT}"
).split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """Returns a folder with token files, for runs and a compilation cache."""
  folder = tmp_path_factory.mktemp("processes")
  rng = np.random.default_rng(0)
  texts = ["".join(rng.choice(list("abcd "), 60)) for _ in range(20)]
  documents = [Document(str(i), text, i >= 16) for i, text in enumerate(texts)]
  write_token_files(str(folder / "tokens"), documents, ByteTokenizer())
  return folder


def start(home, workdir, devices, *words):
  """Starts pretraining in a process with some simulated devices; returns (process, its output)."""
  outputs = home / f"output{next(start.numbers)}"
  outputs.mkdir()
  environment = {
    **simulated(devices),
    "JAX_COMPILATION_CACHE_DIR": str(home / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  command = ["experiments.pretrain", *FLAGS, f"--data={home}/tokens", f"--workdir={workdir}"]
  arguments = ([*command, *words], str(home), str(outputs), environment)
  process = FORKS.Process(target=become, args=arguments)
  process.start()
  return process, outputs


start.numbers = itertools.count()


def start_two(home, workdir, *words):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  flags = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2", *words]
  return [start(home, workdir, 1, *flags, f"--process_id={i}") for i in range(2)]


def end(process, outputs):
  """Returns the exit code of a process and what it printed, without the lines of gloo."""
  process.join(90)
  assert process.exitcode is not None, (outputs / "stderr").read_text()
  lines = (outputs / "stderr").read_text().splitlines()
  return process.exitcode, [line for line in lines if "[Gloo]" not in line]


def wait_for_step(workdir, step):
  deadline = time.monotonic() + 90
  while not any(r["step"] >= step for r in read_metrics(str(workdir / "metrics.jsonl"))):
    assert time.monotonic() < deadline
    time.sleep(0.05)


def metrics_of(workdir):
  speed = {"tokens_per_second"}
  records = read_metrics(str(workdir / "metrics.jsonl"))
  return [{name: r[name] for name in r.keys() - speed} for r in records]


@pytest.mark.slow
def test_two_processes_are_one_run(home):
  """Compares metrics, and stops, kills and resumes on the way."""
  alone = start(home, home / "alone", 2)
  pair = start_two(home, home / "pair")
  wait_for_step(home / "pair", 3)
  os.kill(pair[1][0].pid, signal.SIGTERM)
  (code, first), (other_code, second) = (end(*process) for process in pair)
  assert (code, other_code) == (0, 0), first + second
  assert second == []  # process 0 speaks for both
  (stopped,) = checkpoint.saved_steps(str(home / "pair"))
  assert 3 <= stopped < 100
  assert "process_id" not in (home / "pair" / "flags.txt").read_text()
  pair = start_two(home, home / "pair")
  wait_for_step(home / "pair", stopped + 3)
  os.kill(pair[1][0].pid, signal.SIGKILL)
  killed = time.monotonic()
  code, lines = end(*pair[0])
  assert time.monotonic() - killed < TIMEOUT
  assert code == 1
  assert lines[-1].startswith("error: process 1 on ")
  assert lines[-1].endswith("died or hangs: no sign of life (--process_timeout=20)")
  assert not any("Traceback" in line for line in lines)
  pair = start_two(home, home / "pair")
  assert [end(*process)[0] for process in (*pair, alone)] == [0, 0, 0]
  expected, metrics = metrics_of(home / "alone"), metrics_of(home / "pair")
  assert len(expected) == 152 and metrics == expected


@pytest.mark.slow
def test_an_error_of_process_0_ends_both(home):
  (home / "bad").mkdir()
  (home / "bad" / "metrics.jsonl").mkdir()
  outcomes = [end(*process) for process in start_two(home, home / "bad")]
  assert [code for code, _ in outcomes] == [2, 2]
  assert outcomes[0][1][-1] == outcomes[1][1][-1]
  assert "metrics.jsonl" in outcomes[0][1][-1]


@pytest.mark.slow
def test_processes_with_other_flags_are_refused(home):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  common = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
  rates = [["--learning_rate=0.001"], ["--learning_rate=0.002"]]
  pair = [start(home, home / "x", 1, *common, *rates[i], f"--process_id={i}") for i in range(2)]
  for code, lines in (end(*process) for process in pair):
    assert code == 2
    assert lines[-1] == (
      "error: --learning_rate=0.002 in process 1, --learning_rate=0.001 in process 0: all "
      "processes of a run need the same flags"
    )


@pytest.mark.slow
def test_a_process_whose_others_do_not_come_says_so(home):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  flags = [f"--coordinator_address={address}", "--num_processes=2", "--process_id=0"]
  code, lines = end(*start(home, home / "alone_of_two", 1, *flags, "--process_timeout=5"))
  assert code == 2
  assert lines[-1].startswith(
    f"error: the processes of this run did not meet at {address} within 5"
  )


TASK = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "node[1-2]",
  "SLURM_NTASKS": "4",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "1",
  "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_slurm_counts_where_this_is_one_of_several_tasks(monkeypatch):
  monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: None)

  def detected(**changes):
    changed = {name: value for name, value in {**TASK, **changes}.items() if value is not None}
    cluster = clusters.detect(changed)
    return cluster and cluster.arguments

  assert detected() == {"num_processes": 4, "local_device_ids": None}
  assert detected(SLURM_STEP_NUM_TASKS="2")["num_processes"] == 2
  assert detected(SLURM_STEP_NUM_TASKS="1") is None  # an interactive shell of a larger job
  assert detected(SLURM_PROCID="0", SLURM_STEP_NODELIST=None) is None  # a batch script
  assert detected(SLURM_PROCID=None) is None
  assert detected(SLURM_JOB_ID=None) is None
  assert detected(SLURM_STEP_TASKS_PER_NODE="1(x4)")["local_device_ids"] == []
  assert detected(CUDA_VISIBLE_DEVICES="0,1,2,3")["local_device_ids"] == [2, 3]
  assert detected(CUDA_VISIBLE_DEVICES="0")["local_device_ids"] == []
  with pytest.raises(UsageError, match="task 1 of SLURM job 7, and SLURM_NTASKS is not set"):
    detected(SLURM_NTASKS=None)
  with pytest.raises(UsageError, match="task 0 of SLURM job 7, and SLURM_LOCALID is not set"):
    detected(SLURM_PROCID="0", SLURM_LOCALID=None, SLURM_STEP_NUM_TASKS="4")
  with pytest.raises(UsageError, match="SLURM_NTASKS='x' must be a number"):
    detected(SLURM_NTASKS="x")


def test_other_clusters_count_where_there_are_several_processes(monkeypatch):
  monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: None)
  pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
  assert clusters.detect(pod) is None
  with pytest.raises(UsageError, match="this is pod 3 of an indexed job"):
    clusters.detect({**pod, "JOB_COMPLETION_INDEX": "3"})
  assert clusters.detect({"OMPI_COMM_WORLD_SIZE": "1"}) is None
  with pytest.raises(UsageError, match="one of 2 processes of Open MPI"):
    clusters.detect({"OMPI_COMM_WORLD_SIZE": "2"})
  monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: "a module")
  assert clusters.detect({**pod, "JOB_COMPLETION_INDEX": "3", "JAX_PLATFORMS": "cpu"}) is not None
  assert clusters.detect({"TPU_WORKER_HOSTNAMES": "a"}) is None
  assert clusters.detect({"TPU_WORKER_HOSTNAMES": "a,b"}).certain
  with pytest.raises(UsageError, match="experiments.generate is one process, and a TPU pod has"):
    clusters.check_alone("experiments.generate", True, {"TPU_WORKER_HOSTNAMES": "a,b"})
  clusters.check_alone("experiments.generate", False, {"TPU_WORKER_HOSTNAMES": "a,b"})


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(num_processes=2), "--coordinator_address and --process_id are missing"),
    (dict(num_processes=2, process_id=0), "--coordinator_address is missing"),
    (dict(num_processes=1, process_id=4), "--process_id=4 must be below --num_processes=1"),
    (dict(distributed=False, process_id=0), "--nodistributed and --process_id exclude"),
    (
      dict(coordinator_address="a:1", num_processes=2, process_id=2),
      "--process_id=2 must be below --num_processes=2",
    ),
    (
      dict(coordinator_address="host", num_processes=2, process_id=0),
      "--coordinator_address=host must be HOST:PORT",
    ),
  ],
)
def test_flags_that_do_not_go_together_are_refused(options, message, monkeypatch):
  monkeypatch.setattr(clusters, "detect", lambda environ: None)
  with pytest.raises(UsageError, match=message), processes.running(processes.Options(**options)):
    pass


def test_a_process_alone_needs_no_other():
  with processes.running(processes.Options(num_processes=1)):
    assert processes.is_first() and processes.count() == 1
    assert processes.on_first(lambda: (1, 2)) == processes.together(lambda: (1, 2)) == (1, 2)


def test_the_judge_names_who_is_silent_or_behind():
  now = [0.0]
  judge = Judge(8.0, 2, lambda: now[0])
  number = itertools.count()

  def judged(seconds, positions, running=(True, True), silent=()):
    now[0] += seconds
    return judge.judge(
      {i: Beat(next(number), positions[i], running[i], f"h{i}") for i in {0, 1} - set(silent)}
    )

  assert judged(1, (0, 0)) is None
  for _ in range(9):  # process 1 compiles, and process 0 may wait for it
    assert judged(1, (1, 0), running=(True, False)) is None
  for _ in range(9):
    assert judged(1, (2, 1)) is None
  assert judged(1, (2, 1)) == (
    "a step did not end within 8 seconds (--process_timeout=8); process 1 on h1 is behind"
  )
  assert judged(1, (3, 3)) is None
  assert judged(SILENCE * 8, (4, 3), silent={1}) is None
  assert judged(1, (4, 4), silent={1}) == (
    "process 1 on h1 died or hangs: no sign of life (--process_timeout=8)"
  )
