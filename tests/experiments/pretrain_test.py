"""experiments.pretrain as processes: killed at a random moment, stopped by signals, started with
bad flags.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from sparsek.command_line import invocation
from sparsek.config import OptimizerConfig, TrainConfig
from sparsek.data.corpus import Document
from sparsek.data.token_files import write_token_files
from sparsek.data.tokenizer import ByteTokenizer
from sparsek.experiments import pretrain
from sparsek.runs.checkpoint import saved_steps
from sparsek.runs.metrics import Progress
from sparsek.training import loop
from tests.commands import Forked
from tests.helpers import run_command

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TINY = [
  "--num_layers=1",
  "--embed_dim=16",
  "--num_heads=2",
  "--num_kv_heads=1",
  "--head_dim=8",
  "--mlp_dim=16",
  "--k=4",
  "--window=4",
  "--seq_len=32",
  "--batch_size=2",
  "--num_steps=120",
  "--log_every=1",
  "--eval_every=25",
  "--eval_batches=2",
  "--checkpoint_every=5",
  # what is traced and compiled fastest
  "--implementation=reference",
  "--scan_layers=false",
]


def write_documents(folder):
  """Returns `folder`, with token files of 256 documents in it."""
  write_token_files(
    folder,
    [Document(str(i), f"Document {i}: {i**7} {i**11}.\n" * 4, i % 2 == 0) for i in range(256)],
    ByteTokenizer(),
  )
  return folder


def sharing_compiled(folder):
  """Returns variables of processes that share compiled programs, to save most of the time."""
  return {
    "JAX_COMPILATION_CACHE_DIR": folder,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PLATFORMS": "cpu",
  }


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
  return write_documents(str(tmp_path_factory.mktemp("data") / "tokens"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
  return sharing_compiled(str(tmp_path_factory.mktemp("cache")))


def command(workdir, data_folder, *flags):
  """Returns the words of a run, after `python -m`."""
  return ["experiments.pretrain", f"--workdir={workdir}", f"--data={data_folder}", *TINY, *flags]


def start(workdir, data_folder, environment, *flags):
  """Starts a run as a user would."""
  return subprocess.Popen(
    [sys.executable, "-m", *command(workdir, data_folder, *flags)],
    cwd=ROOT,
    env=os.environ | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def fork(environment, words):
  """Starts a command in a process that need not import anything."""
  return Forked(words, pathlib.Path(ROOT), pathlib.Path(tempfile.mkdtemp()), environment)


def finish(process):
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


def wait_for_progress(workdir, process):
  """Returns when a process has added a line to the metrics, which is after all compiling but that
  of the evaluation.
  """
  metrics = os.path.join(workdir, "metrics.jsonl")
  size = lambda: os.path.getsize(metrics) if os.path.exists(metrics) else 0
  smallest = size()
  while process.poll() is None and size() <= smallest:
    smallest = min(smallest, size())
    time.sleep(0.01)


def logged(workdir):
  with open(os.path.join(workdir, "metrics.jsonl")) as file:
    records = [json.loads(line) for line in file]
  return [
    {key: value for key, value in record.items() if key != "tokens_per_second"}
    for record in records
  ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data_folder, environment):
  workdir = str(tmp_path_factory.mktemp("uninterrupted"))
  code, out, err = finish(fork(environment, command(workdir, data_folder)))
  assert code == 0, err
  assert "step 120: loss" in out and workdir in out
  return logged(workdir)


@pytest.mark.slow
def test_killed_and_resumed_logs_bit_equal_losses(
  tmp_path, data_folder, environment, uninterrupted
):
  process = fork(environment, command(tmp_path, data_folder))
  while process.poll() is None and not saved_steps(str(tmp_path)):
    time.sleep(0.01)
  time.sleep(random.uniform(0.0, 0.4))
  process.kill()
  finish(process)
  code, _, err = finish(fork(environment, command(tmp_path, data_folder)))
  assert code == 0, err
  assert logged(tmp_path) == uninterrupted
  assert any(key.startswith("layer_0/") for key in uninterrupted[0])


@pytest.mark.slow
def test_sigterm_saves_and_exits_0_and_the_workdir_is_locked_until_then(
  tmp_path, data_folder, environment, uninterrupted
):
  # Long evaluations make the run last, and the signal arrive in one.
  long = command(tmp_path, data_folder, "--eval_every=1", "--eval_batches=1000")
  process = fork(environment, long)
  wait_for_progress(tmp_path, process)
  code, _, err = finish(fork(environment, command(tmp_path, data_folder)))
  assert (
    code == 2
    and len(err.splitlines()) == 1
    and f"in use by another run (process {process.pid}" in err
  ), err
  process.send_signal(signal.SIGTERM)
  code, out, err = finish(process)
  assert code == 0, err
  step = logged(tmp_path)[-1]["step"]
  assert f"stopped by a signal at step {step} of 120" in out
  assert str(step) in os.listdir(tmp_path / "checkpoints")
  # flags.txt reproduces the run; flags after it win.
  again = ["experiments.pretrain", f"--flagfile={tmp_path / 'flags.txt'}", "--eval_every=0"]
  code, _, err = finish(fork(environment, again))
  assert code == 0 and f"resuming {tmp_path} at step {step}" in err, err
  losses = lambda records: [record["loss"] for record in records if "loss" in record]
  assert losses(logged(tmp_path)) == losses(uninterrupted)


@pytest.mark.slow
def test_bad_flags_exit_with_2_and_one_sentence_in_under_10_seconds(tmp_path, environment):
  """Starts Python anew, with a flag that is refused late; others are in flags_test."""
  started = time.monotonic()
  code, _, err = finish(start(tmp_path / "run", "/nowhere", environment))
  assert code == 2 and "/nowhere" in err, err
  assert len(err.splitlines()) == 1, err
  assert time.monotonic() - started < 10
  assert not os.path.exists(tmp_path / "run")


@pytest.mark.parametrize("is_child, stopped", [(False, False), (True, False), (False, True)])
def test_a_finished_run_says_what_comes_next(is_child, stopped, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv(invocation.STARTED_BY, "sparsek")
  monkeypatch.chdir(tmp_path)
  monkeypatch.delenv(invocation.CHILD, raising=False)
  if is_child:
    monkeypatch.setenv(invocation.CHILD, "1")
  for name in pretrain.FLAGS:  # which another test may have given
    pretrain.FLAGS[name].unparse()
  config = TrainConfig(workdir=str(tmp_path / "my run"))
  pretrain.report(loop.Result(step=3, loss=1.0, stopped=stopped), config, 9)
  advice = "next: sparsek evaluate --workdir='my run'\n      sparsek generate --workdir='my run' "
  assert (advice in capsys.readouterr().out) == (not is_child and not stopped)


def test_the_loss_of_a_warmup_is_called_that_of_the_scorers(tmp_path, capsys):
  optimizer = OptimizerConfig(trainable="scorer")
  config = TrainConfig(workdir=str(tmp_path), scorer_warmup=True, optimizer=optimizer)
  pretrain.report(loop.Result(step=3, loss=2.89, heldout_loss=7.38), config, 9)
  line = "step 3: scorers' loss 2.8900, held-out loss 7.3800 nats per token\n"
  assert line in capsys.readouterr().out
  progress = Progress(0, 9, sys.stderr)
  progress.begin("", config.loss_name)
  progress.log(3, 2.89, 100.0, 1.0)
  assert "step 3/9  scorers' loss 2.8900  100 tokens/s" in capsys.readouterr().err


def test_a_plan_says_that_it_compiles(tmp_path, monkeypatch, capsys):
  said = []
  monkeypatch.setattr(pretrain, "said_if_slow", lambda line: said.append(line) or nullcontext())
  made = SimpleNamespace(lines=["plan"].copy)
  monkeypatch.setattr(pretrain.plan, "make_plan", lambda *_: made)
  write_documents(str(tmp_path / "tokens"))
  assert run_command(pretrain.main, pretrain.FLAGS, "--dry_run", f"--data={tmp_path}/tokens") == 0
  assert said[1:] == ["compiling the step for the plan; a large model takes minutes ..."]
  assert capsys.readouterr().out == "plan\n"


def test_stages_are_planned_and_trained_as_one_run(tmp_path, monkeypatch, capsys):
  """Scanned layers are stacked alike in all stages; what one memory decides, --remat, in each."""
  planned, trained = [], []
  made = SimpleNamespace(lines=["plan"].copy)
  monkeypatch.setattr(pretrain.plan, "make_plan", lambda *args: planned.append(args) or made)
  monkeypatch.setattr(
    pretrain.loop, "train_stages", lambda *args: trained.append(args) or loop.Result(7, 1.0)
  )
  data = [write_documents(str(tmp_path / name)) for name in ("tokens", "others")]
  words = [
    f"--workdir={tmp_path}/run",
    f"--data={data[0]}",
    "--num_layers=2",
    "--layer_pattern=sparsek,full",
    "--scan_layers",
    "--stage=dense: --attention=full --num_steps=3 --remat=full",
    f"--stage=joint: --num_steps=4 --data={data[1]}",
  ]
  assert run_command(pretrain.main, pretrain.FLAGS, *words, "--dry_run") == 0
  expected = "stage dense, steps 1 to 3:\n  plan\nstage joint, steps 4 to 7:\n  plan\n"
  assert capsys.readouterr().out == expected
  assert [args[0].attention for args in planned] == [("full", "full"), ("sparsek", "full")]
  assert all([stage.name for stage in args[3]] == ["dense", "joint"] for args in planned)
  assert run_command(pretrain.main, pretrain.FLAGS, *words) == 0
  assert "step 7: loss 1.0000\n" in capsys.readouterr().out
  ((stages, flagfile),) = trained
  assert [(stage.name, stage.begin, stage.end) for stage in stages] == [
    ("dense", 0, 3),
    ("joint", 3, 7),
  ]
  assert [stage.config.remat for stage in stages] == ["full", "none"]
  assert [stage.dataset.folder for stage in stages] == data and flagfile.count("--stage=") == 2


@pytest.mark.parametrize(
  ("stages", "message"),
  [
    (["a: --num_steps=5 --warmup_steps=9"], "--stage=a: --warmup_steps=9 must be at most"),
    (["a:", "b: --data=/nowhere"], "--stage=b: data '/nowhere': no such folder"),
    (["a: --attention=sparsek", "b: --attention=full"], "--stage=a: attention=sparsek has param"),
    (["a: --distill=0.5"], "--stage=a: --distill=0.5 must go with distill_from"),
  ],
)
def test_bad_stages_end_before_any_long_work(stages, message, tmp_path, capsys):
  words = [f"--workdir={tmp_path}/run", f"--data={write_documents(str(tmp_path / 'tokens'))}"]
  words += [f"--stage={stage}" for stage in stages]
  assert run_command(pretrain.main, pretrain.FLAGS, *words) == 2
  assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
