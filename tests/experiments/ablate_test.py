"""The grid and its report; one small grid of real runs, stopped and continued."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from sparsek.command_line import flagfiles
from sparsek.command_line.definer import into_string
from sparsek.command_line.main import parse
from sparsek.data.corpus import Document
from sparsek.data.token_files import write_token_files
from sparsek.data.tokenizer import ByteTokenizer
from sparsek.errors import UsageError
from sparsek.evaluation.statistics import t_interval
from sparsek.experiments import ablate
from sparsek.experiments.reports import grid, grid_page
from sparsek.experiments.reports.grid import Cell
from sparsek.runs import run_directory, settings
from tests.experiments.pretrain_test import ROOT, sharing_compiled, write_documents
from tests.helpers import run_command

SETTINGS = (
  "--num_layers=1 --embed_dim=16 --num_heads=2 --num_kv_heads=1 --head_dim=8 --mlp_dim=16 "
  "--seq_len=32 --batch_size=2 --num_steps=6 --eval_every=3 "
  "--eval_batches=1 --log_every=2 --implementation=reference --noscan_layers"
)


def test_a_grid_has_no_two_cells_that_mean_the_same():
  cells = grid.grid(
    ["sparsek", "random", "sliding_window", "full"],
    [1, 2],
    [3, 4],
    ["value", "straight_through"],
    ["linear"],
    2,
  )
  assert len(cells) == len(set(cells)) == 2 * (8 + 4 + 2 + 1) and [
    cell.seed for cell in cells
  ] == sorted(cell.seed for cell in cells)
  assert {cell.name for cell in cells if cell.seed == 0 and cell.attention != "sparsek"} == {
    "random-k1-w3-s0",
    "random-k1-w4-s0",
    "random-k2-w3-s0",
    "random-k2-w4-s0",
    "sliding_window-w3-s0",
    "sliding_window-w4-s0",
    "full-s0",
  }
  cell = Cell("sparsek", 1, 0, "value", "conv", 7)
  assert cell.name == "sparsek-k1-w0-value-conv-s7" and cell.budget() == 1
  assert cell.flags() == [
    "--attention=sparsek",
    "--k=1",
    "--window=0",
    "--gate=value",
    "--scorer=conv",
    "--seed=7",
  ]
  hybrids = grid.grid(
    ["sparsek*5+full", "sliding_window+linear"], [1, 2], [3], ["value"], ["conv"], 1
  )
  assert [(cell.name, cell.budget()) for cell in hybrids] == [
    ("sparsekx5+full-k1-w3-value-conv-s0", None),
    ("sparsekx5+full-k2-w3-value-conv-s0", None),
    ("sliding_window+linear-w3-s0", 3),
  ]
  assert hybrids[0].flags() == [
    "--k=1",
    "--window=3",
    "--gate=value",
    "--scorer=conv",
    "--seed=0",
    "--layer_pattern=sparsek*5,full",
  ]
  uneven, half = grid.grid(
    ["sliding_window:w256*5+sparsek:k1280:w512", "linear:w8+sparsek:k4"],
    [1, 2],
    [3],
    ["value"],
    ["conv"],
    1,
  )
  assert (uneven.name, uneven.budget()) == (
    "sliding_window_w256x5+sparsek_k1280_w512-value-conv-s0",
    512,
  )
  assert (half.name, half.budget()) == (
    "linear_w8+sparsek_k4-w3-value-conv-s0",
    round((8 + 4 + 3) / 2),
  )
  assert "--layer_pattern=sliding_window:w256*5,sparsek:k1280:w512" in uneven.flags()
  (heads,) = grid.grid(["sparsek:w8:h0.2:k0:w24+sparsek:k4:w8"], [8], [9], ["value"], ["conv"], 1)
  assert heads.name == "sparsek_w8_h0.2_k0_w24+sparsek_k4_w8-k8-value-conv-s0"
  assert heads.budget(3) == round(((16 + 24 + 24) / 3 + 12) / 2)
  with pytest.raises(
    UsageError, match=r"'sparsek\*0\+full' must be one of sparsek, .*, or of these a pattern"
  ):
    grid.patterns("full,sparsek*0+full")
  assert sorted(sum((grid.share(cells, f"{i}/4") for i in range(4)), []), key=cells.index) == cells
  with pytest.raises(UsageError, match="--job=4/4: must be i/N"):
    grid.share(cells, "4/4")


def test_report(tmp_path):
  row = lambda kind, k, window, seed, loss: {
    "attention": kind,
    "k": k,
    "window": window,
    "gate": None,
    "scorer": None,
    "seed": seed,
    "budget": window and window + (k or 0),
    "heldout_loss": loss,
    "step": 9,
    "tokens_per_second": 1000.0,
    "heldout_documents": documents if kind == "random" else None,
  }
  documents = {"index": [0, 4], "loss_sum": [4.0, 18.0], "num_targets": [2, 6]}
  rows = [
    row("random", 2, 4, 0, 3.0),
    row("random", 2, 4, 1, 4.0),
    row("random", 8, 4, 0, 2.5),
    row("full", None, None, 0, 2.0),
    row("full", None, None, 1, 2.5),
  ]
  summary = grid.summarize(rows)
  assert [
    (x["attention"], x["k"], x["seeds"], x["heldout_loss"], x["interval"]) for x in summary
  ] == [
    ("full", None, 2, 2.25, t_interval([2.0, 2.5])),
    ("random", 8, 1, 2.5, None),
    ("random", 2, 2, 3.5, t_interval([3.0, 4.0])),
  ]
  assert [x["minus_best"] and x["minus_best"].difference for x in summary] == [None, None, 1.25]
  grid.write_report(str(tmp_path), rows, "--a=<1>")
  line = "| random | 2 | 4 |  |  | 6 | 2 | 3.5000 (-2.8531 to 9.8531) | 2.0000 to 3.0000 | "
  assert f"{line}+1.2500, p 0.126 | 1,000 |" in (tmp_path / "table.md").read_text()
  about = "corrected (Holm) for 1 comparison. - in that column: fewer than two seeds. - over doc"
  assert about in (tmp_path / "table.md").read_text()
  assert (tmp_path / "table.csv").read_text().splitlines()[1] == "random,2,4,,,0,6,3.0,9,1000.0"
  assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
  page = (tmp_path / "report.html").read_text()
  assert (
    page.count("data:image/png;base64,iVBOR") == 2
    and "--a=&lt;1&gt;" in page
    and "http" not in page
    and "<td>3.5000 (-2.8531 to 9.8531)</td>" in page
    and about in page
    and "The lowest held-out loss is 2.2500 nats per token: full attention." in page
  )


def command(tmp_path, *arguments):
  return [
    sys.executable,
    "-m",
    "experiments.ablate",
    f"--workdir={tmp_path}/grid",
    f"--base={tmp_path}/base.flags",
    f"--more={SETTINGS} --data={tmp_path}/tokens",
    "--k=4",
    "--window=4",
    "--attention=sliding_window,sparsek",
    *arguments,
  ]


@pytest.mark.slow
def test_a_grid_is_stopped_continued_and_not_done_twice(tmp_path):
  write_documents(str(tmp_path / "tokens"))
  (tmp_path / "base.flags").write_text("--k=3\n--num_steps=9\n--gate=value")
  environment = os.environ | sharing_compiled(str(tmp_path / "cache"))
  with (
    open(tmp_path / "stderr", "w+") as stderr,
    subprocess.Popen(
      command(tmp_path), env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=stderr
    ) as process,
  ):
    result = tmp_path / "grid" / "cells" / "sliding_window-w4-s0" / grid.RESULT
    while not result.exists():
      assert process.poll() is None
      time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
  first = result.stat().st_mtime_ns
  done = subprocess.run(
    command(tmp_path), env=environment, cwd=ROOT, text=True, capture_output=True, check=False
  )
  assert done.returncode == 0, done.stderr
  for told in ((tmp_path / "stderr").read_text(), done.stderr):  # once a grid, not once a cell
    assert told.count("gives way to") == 3 and "--k=3 in" in told and "warning" not in told, told
  assert (
    "cell 1 of 2: sliding_window-w4-s0, finished before" in done.stdout
    and "2 of 2 cells" in done.stdout
    and result.stat().st_mtime_ns == first
  )
  assert (
    "| sparsek | 4 | 4 | straight_through | linear | 8 | 1 |"
    in (tmp_path / "grid" / "table.md").read_text()
  )
  assert sorted(os.listdir(tmp_path / "grid")) == [  # compiled programs are kept elsewhere
    "cells",
    "report.html",
    "report.png",
    "table.csv",
    "table.md",
  ]


class Trainer:
  """A stand-in for experiments.child that leaves what a finished run leaves."""

  def __init__(self):
    self.begun, self.code, self.stopped, self.options = [], 0, False, {}

  @contextlib.contextmanager
  def running(self, module, arguments, **options):
    values, self.options = settings.parse(arguments), options
    folder, last = values["workdir"].value, values["num_steps"].value
    os.makedirs(folder, exist_ok=True)
    self.begun.append(os.path.basename(folder))
    run_directory.write_record(folder, "flags.txt", into_string(values))
    records = [
      {"step": last, "loss": 3.0, "tokens_per_second": 9.0},
      {"step": last, "heldout_loss": 2.0},
    ]
    if self.stopped:
      records = [{"step": 1, "loss": 3.0, "tokens_per_second": 9.0}]
    pathlib.Path(folder, "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    yield types.SimpleNamespace(wait=lambda: self.code)


@pytest.fixture
def run_grid(tmp_path, monkeypatch):
  """Runs experiments.ablate in this process on a grid of two cells; returns the exit code."""
  trainer = Trainer()
  monkeypatch.setattr(ablate.child, "running", trainer.running)
  monkeypatch.setattr(grid_page, "png", lambda *_: b"")
  write_documents(str(tmp_path / "tokens"))

  def run(extra="", *arguments):
    trainer.begun.clear()
    shared = f"--more={SETTINGS} --data={tmp_path}/tokens {extra}"
    return run_command(
      ablate.main,
      ablate.FLAGS,
      f"--workdir={tmp_path}/grid",
      shared,
      "--window=4",
      "--attention=full,sliding_window",
      *arguments,
    )

  run.begun, run.trainer, run.cells = trainer.begun, trainer, tmp_path / "grid" / "cells"
  return run


def test_done_means_done_with_these_flags(run_grid, tmp_path, capsys):
  assert run_grid() == 0 and run_grid.begun == ["full-s0", "sliding_window-w4-s0"]
  assert not run_grid.trainer.options  # such as a cache of compiled programs of their own
  page = (tmp_path / "grid" / "report.html").read_text()
  assert "--num_layers=1\n" in page and f"--data={tmp_path}/tokens\n" in page
  assert "--workdir" not in page and "--k=" not in page
  result = json.loads((run_grid.cells / "full-s0" / "result.json").read_text())
  assert (result["heldout_loss"], result["step"]) == (2.0, 6) and len(result["dataset"]) == 64
  assert run_grid("--preset=tiny --keep_checkpoints=9") == 0 and run_grid.begun == []
  capsys.readouterr()
  assert run_grid("--num_steps=7 --batch_size=3") == 2 and run_grid.begun == []
  told = capsys.readouterr().err
  assert "full-s0 (--" in told and "--batch_size: 2 -> 3" in told and "--num_steps: 6 -> 7" in told
  assert "--retrain" in told
  assert run_grid("--num_steps=7 --batch_size=3", "--retrain") == 0 and len(run_grid.begun) == 2
  old = json.loads((run_grid.cells / "replaced" / "full-s0" / "result.json").read_text())
  new = json.loads((run_grid.cells / "full-s0" / "result.json").read_text())
  assert (old["step"], new["step"]) == (6, 7)


def test_the_tokens_count_and_not_where_they_lie(run_grid, tmp_path, capsys):
  assert run_grid() == 0
  (tmp_path / "tokens").rename(tmp_path / "moved")
  assert run_grid(f"--data={tmp_path}/moved") == 0 and run_grid.begun == []
  other = [Document(str(i), f"Other {i}.\n" * 9, i % 2 == 0) for i in range(99)]
  write_token_files(str(tmp_path / "tokens"), other, ByteTokenizer())
  assert run_grid() == 2 and "the tokens of --data: " in capsys.readouterr().err


def test_cells_of_earlier_versions_are_compared_by_their_flags(run_grid, tmp_path, capsys):
  assert run_grid() == 0
  for cell in run_grid.cells.iterdir():
    result = json.loads((cell / "result.json").read_text())
    del result["dataset"]
    (cell / "result.json").write_text(json.dumps(result))
  assert run_grid() == 0 and run_grid.begun == []
  (tmp_path / "tokens").rename(tmp_path / "moved")
  assert run_grid(f"--data={tmp_path}/moved") == 2
  assert f"--data: {tmp_path}/tokens -> {tmp_path}/moved" in capsys.readouterr().err
  (run_grid.cells / "full-s0" / "flags.txt").unlink()
  (tmp_path / "moved").rename(tmp_path / "tokens")
  assert run_grid() == 2 and "full-s0 (it has no flags.txt" in capsys.readouterr().err
  (run_grid.cells / "full-s0" / "result.json").write_text("[1")
  assert (
    run_grid() == 2 and "result.json: no JSON that can be understood" in capsys.readouterr().err
  )


def test_an_interrupted_cell_goes_on_only_under_its_flags(run_grid, tmp_path, capsys):
  assert run_grid() == 0
  (run_grid.cells / "full-s0" / "result.json").unlink()
  assert run_grid("--learning_rate=1") == 2 and run_grid.begun == []
  assert "full-s0 (--learning_rate: 0.001 -> 1.0)" in capsys.readouterr().err
  assert run_grid() == 0 and run_grid.begun == ["full-s0"]


def test_a_cell_that_another_job_trains_is_left_to_it(run_grid, capsys):
  run_grid.trainer.code = 2
  os.makedirs(run_grid.cells / "full-s0")
  with run_directory.lock(str(run_grid.cells / "full-s0")):
    assert run_grid("", "--job=0/2") == 0
  told = capsys.readouterr()
  assert "left to another job, which trains them: full-s0" in told.err
  assert run_grid("", "--job=0/2") == 1 and "1 cell(s) did not finish" in capsys.readouterr().err


def test_a_cell_that_a_signal_stopped_is_no_finished_one(run_grid, capsys):
  run_grid.trainer.stopped = True
  assert run_grid() == 1 and "2 cell(s) did not finish, which repeating" in capsys.readouterr().err
  run_grid.trainer.stopped = False
  assert run_grid() == 0 and len(run_grid.begun) == 2


def test_a_cell_that_another_job_has_moved_and_made_stays(run_grid, monkeypatch):
  assert run_grid() == 0
  before, calls = grid.stale, []
  # The first look finds other flags, the second what another job has made since.
  monkeypatch.setattr(
    grid,
    "stale",
    lambda *a: calls.append(a) or before(*a) or (["--k: 1 -> 2"] if len(calls) <= 2 else []),
  )
  assert run_grid("", "--retrain") == 0 and run_grid.begun == []
  assert not (run_grid.cells / "replaced").exists()


def test_devices_are_those_of_all_runs_and_change_none(run_grid, tmp_path):
  assert run_grid("--fsdp=4", "--fsdp=2", "--context=3") == 0 and len(run_grid.begun) == 2
  page = (tmp_path / "grid" / "report.html").read_text()
  assert "--fsdp=2\n" in page and "--context=3\n" in page
  assert run_grid() == 0 and run_grid.begun == []


@pytest.mark.parametrize(
  "argument, words",
  [
    ("--attention=sparse", "--attention=sparse: 'sparse' must be one of sparsek"),
    ("--k=0", "--k=0: must be numbers of at least 1"),
    ("--more=--eval_every=0", "--eval_every=0 in --base or --more: must be above 0"),
    ("--more=--dry_run", "--dry_run in --base or --more"),
    ("--more=--stop_at=2", "--stop_at in --base or --more: runs that stop before --num_steps"),
    ("--more=--topology=h100:8", "--topology in --base or --more"),
    ("--more=--k=2", "--k in --more: the grid sets it, by --k"),
    ("--more=--model=window=2", "--window in --more: the grid sets it, by --window"),
    ("--more=--layer_pattern=full", "--layer_pattern in --more: the grid sets it, by --attention"),
    ("--more=--seed=1", "--seed in --more: the grid sets it, by --seeds"),
    ("--more=--workdir=x", "--workdir in --more: the grid sets it"),
    (f"--k={'9' * 5000}", "must be numbers of at least 1"),
    (f"--job=0/{'9' * 5000}", "must be i/N"),
    (f"--attention=full*{'9' * 5000}", "must be one of sparsek"),
    (f"--attention=sparsek:k{'9' * 5000}", "must be one of sparsek"),
    ("--base=no_such_recipe", "/no_such_recipe: there is no such file, and no recipe of"),
    ("--more=--data='x", "--more=--data='x: No closing quotation"),
    ("--more=--kk=2", "in --more=--kk=2: unknown flag --kk"),
    ("--more=a novel", "in --more=a novel: unexpected argument 'a'"),
    ("--more=--data=/nowhere", "/nowhere"),
    ("--base=/nowhere", "--base=/nowhere: there is no such file"),
    ("--base=s3://x/y", "--base=s3://x/y: s3: URLs are not supported"),
  ],
)
def test_bad_grids_are_refused_before_any_run(argument, words, run_grid, capsys):
  assert run_grid("", argument) == 2 and run_grid.begun == []
  assert words in capsys.readouterr().err and not run_grid.cells.exists()


def test_jobs_that_share_a_grid_write_its_report_at_the_same_time(tmp_path, monkeypatch):
  monkeypatch.setattr(grid_page, "png", lambda *_: b"")
  row = {
    "attention": "full",
    "k": None,
    "window": None,
    "gate": None,
    "scorer": None,
    "seed": 0,
    "budget": None,
    "heldout_loss": 3.0,
    "step": 9,
    "tokens_per_second": 1.0,
  }
  failed = []

  def write():
    try:
      for _ in range(50):
        grid.write_report(str(tmp_path), [row], "")
    except Exception as error:
      failed.append(error)

  jobs = [threading.Thread(target=write) for _ in range(4)]
  for job in jobs:
    job.start()
  for job in jobs:
    job.join()
  assert not failed
  assert sorted(os.listdir(tmp_path)) == ["report.html", "report.png", "table.csv", "table.md"]


@pytest.mark.parametrize("name", ("tiny_stdlib", "experiments/recipes/tiny_stdlib.flags"))
def test_base_may_be_a_recipe_and_gives_way_to_the_grid(
  name, run_grid, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  words = (f"--base={name}", "--attention=full,sparsek", "--k=4")
  assert run_grid("", *words) == 0 and len(run_grid.begun) == 2
  told = capsys.readouterr().err.splitlines()
  recipe = flagfiles.recipe_file("tiny_stdlib")
  assert f"--k=64 in {recipe} gives way to --k=4 of the grid" in told
  assert f"--window=64 in {recipe} gives way to --window=4 of the grid" in told
  assert f"--num_steps=400 in {recipe} gives way to --num_steps=6 of --more" in told
  page = (tmp_path / "grid" / "report.html").read_text()
  assert "--learning_rate=0.002" in page and "--num_steps=6" in page and "--k=" not in page


def test_all_that_the_grid_sets_replaces_what_base_says(run_grid, tmp_path, capsys):
  base = tmp_path / "base.flags"
  flags = {
    "layer_pattern=sparsek,full": "attention=full,sparsek",
    "k=9": "k=4",
    "window=8": "window=4",
    "gate=value": "gate=straight_through",
    "scorer=conv": "scorer=linear",
    "seed=7": "seed=0,1",
    f"workdir={tmp_path}/other": f"workdir={tmp_path}/grid",
    "fsdp=4": "fsdp=2",
  }
  base.write_text("".join(f"--{flag}\n" for flag in flags))
  words = (f"--base={base}", "--seeds=2", "--fsdp=2", "--attention=full,sparsek", "--k=4")
  assert run_grid("", *words) == 0 and len(run_grid.begun) == 4
  told = capsys.readouterr().err.splitlines()
  ways = {f"--{old} in {base} gives way to --{new} of the grid" for old, new in flags.items()}
  assert set(told) == ways and len(told) == len(ways)
  page = (tmp_path / "grid" / "report.html").read_text()
  assert "--fsdp=2" in page and not any(f"--{name}=" in page for name in ablate.SET_BY_GRID)


def test_flags_that_change_no_cell_are_warned_of_once(run_grid, capsys):
  assert run_grid("--scorer_loss=0.5 --scorer_noise=0.1") == 0
  told = capsys.readouterr().err.splitlines()
  assert [line.split(": ")[1] for line in told] == [
    "--scorer_noise=0.1 has no effect",
    "--scorer_loss=0.5 has no effect",
  ]
  words = "--attention=full,sliding_window,sparsek"
  assert run_grid("--scorer_loss=0.5 --scorer_noise=0.1", words) == 0
  assert capsys.readouterr().err == ""


GRID_FLAGS = {"k": "8,16", "window": "8,4", "gate": "value,key_value", "scorer": "conv,linear"}


@pytest.mark.parametrize(
  "attention, unused",
  [
    ("full", "k window gate scorer"),
    ("sliding_window,full,linear", "k gate scorer"),
    ("random", "gate scorer"),
    ("sparsek:k4:w4", "k window"),
    ("full,sliding_window+sparsek", ""),
  ],
)
def test_flags_of_the_grid_that_no_cell_has_are_named_once(
  attention, unused, run_grid, tmp_path, capsys
):
  base = tmp_path / "base.flags"
  base.write_text("--k=3\n--window=3\n--gate=straight_through\n--scorer=random\n")
  words = [f"--{name}={value}" for name, value in GRID_FLAGS.items()]
  assert run_grid("--num_layers=2", f"--attention={attention}", f"--base={base}", *words) == 0
  told = capsys.readouterr().err.splitlines()
  no_effect = {
    f"warning: --{name}={GRID_FLAGS[name]} has no effect: no kind of --attention={attention} "
    "uses it"
    for name in unused.split()
  }
  ways = {line.partition("=")[0][2:] for line in told if f"in {base} gives way to" in line}
  assert {line for line in told if "has no effect" in line} == no_effect
  assert ways == set(GRID_FLAGS) - set(unused.split()) and len(told) == len(GRID_FLAGS)


def test_defaults_that_no_cell_has_are_not_named(run_grid, capsys):
  assert run_grid("", "--attention=sliding_window") == 0 and capsys.readouterr().err == ""


def test_finished_cells_of_other_grids_that_the_table_leaves_out_are_named(run_grid, capsys):
  assert run_grid("", "--window=2,4,8") == 0 and "not in this table" not in capsys.readouterr().err
  (run_grid.cells / "unfinished").mkdir()
  assert run_grid("", "--attention=sliding_window", "--window=4") == 0 and not run_grid.begun
  names = "full-s0, sliding_window-w2-s0, sliding_window-w8-s0"
  assert capsys.readouterr().err == f"in {run_grid.cells}, but not in this table: {names}\n"
  assert run_grid("", "--window=2,4,8") == 0 and not run_grid.begun
  assert "not in this table" not in capsys.readouterr().err


@pytest.mark.parametrize(
  "text, words",
  [
    ("my novel\n", "unexpected argument 'my novel'"),
    ("--sources=a\n", "unknown flag --sources"),
    ("--num_steps=many\n", "--num_steps=many: must be"),
    (b"--data=\xff\n", "line 1: byte 0xff"),
    ("--flagfile=nowhere\n", "there is no file"),
  ],
)
def test_what_cannot_be_read_in_base_is_said_with_its_name(text, words, run_grid, tmp_path, capsys):
  base = tmp_path / "base.flags"
  base.write_bytes(text if isinstance(text, bytes) else text.encode())
  assert run_grid("", f"--base={base}") == 2 and run_grid.begun == []
  told = capsys.readouterr().err
  assert told.startswith(f"error: in --base={base}: ") and words in told


@pytest.mark.parametrize(
  "words, advice",
  [
    (["--num_steps=3"], 'write it as --more="--num_steps=3"'),
    (["--num_steps", "3"], 'write it as --more="--num_steps=VALUE"'),
    (["--noscan_layers"], 'write it as --more="--noscan_layers"'),
    (["--qk_norm=true"], 'write it as --more="--qk_norm=true"'),
    (["--seed=3"], "the grid sets it, by --seeds"),
    (["--dry_run"], "trains nothing that could be compared"),
    (["--atention=full"], "did you mean --attention?"),
  ],
)
def test_flags_of_a_run_are_said_to_belong_in_more(words, advice):
  with pytest.raises(UsageError) as error:
    parse(["ablate", *words], ablate.FLAGS, advise=ablate.advise)
  assert str(error.value) == f"unknown flag {words[0].partition('=')[0]}; {advice}"


def test_the_command_gives_this_advice(tmp_path):
  words = [sys.executable, "-m", "experiments.ablate", f"--workdir={tmp_path}", "--num_steps=3"]
  done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, check=False)
  assert done.returncode == 2 and '; write it as --more="--num_steps=3"' in done.stderr


@pytest.mark.parametrize("name", grid.REPORT)
def test_files_that_are_no_report_are_refused_before_any_run(name, run_grid, tmp_path, capsys):
  run_grid.cells.mkdir(parents=True)
  (tmp_path / "grid" / name).write_text("mine")
  assert run_grid() == 2 and run_grid.begun == []
  assert f"grid: its file {name} exists and is no " in capsys.readouterr().err
  assert (tmp_path / "grid" / name).read_text() == "mine"


def test_reports_of_earlier_versions_are_known():
  folder = pathlib.Path(ROOT, "tests", "fixtures", "version_0_1", "ablation")
  known = [name for name in grid.REPORT if (folder / name).exists()]
  assert known and all(grid.REPORT[name].matches(str(folder / name)) for name in known)


def test_without_matplotlib_there_are_tables_and_a_page(run_grid, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(grid_page, "png", None)
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  assert run_grid() == 0 and len(run_grid.begun) == 2
  told = capsys.readouterr()
  assert told.err.count("pip install matplotlib") == 1 and "2 of 2 cells" in told.out
  assert sorted(os.listdir(tmp_path / "grid")) == ["cells", "report.html", "table.csv", "table.md"]
  page = (tmp_path / "grid" / "report.html").read_text()
  assert "<img" not in page and "2.0000" in page


def test_a_result_that_is_no_number_is_refused(run_grid, capsys):
  assert run_grid() == 0
  path = run_grid.cells / "full-s0" / "result.json"
  for number in ("NaN", "-Infinity", "1e999", "9" * 400, "true", '"2"'):
    path.write_text(f'{{"heldout_loss": {number}, "step": 6, "tokens_per_second": 9.0}}')
    assert run_grid() == 2
    assert "result.json has no number 'heldout_loss'" in capsys.readouterr().err
  path.write_text('{"heldout_loss": 2.0, "step": 6}')
  assert run_grid() == 2
  assert "result.json has no number 'tokens_per_second'" in capsys.readouterr().err


def test_the_speed_of_a_cell_is_that_after_compiling(tmp_path):
  records = [{"step": i, "loss": 3.0, "tokens_per_second": float(i)} for i in (1, 2, 4)]
  (tmp_path / "metrics.jsonl").write_text(
    "\n".join(map(json.dumps, [*records, {"step": 4, "heldout_loss": 2.0}]))
  )
  assert grid.result_of(str(tmp_path))["tokens_per_second"] == 3.0


def test_a_cell_of_one_step_has_no_speed(tmp_path):
  records = [{"step": 1, "loss": 3.0}, {"step": 1, "heldout_loss": 2.0}]
  (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
  grid.save_result(str(tmp_path), "fingerprint")
  result = grid.read_result(str(tmp_path))
  assert result["tokens_per_second"] is None
  row = {**dict.fromkeys([*grid.COLUMNS, "budget"]), "attention": "full", "seed": 0, **result}
  rows = [row, {**row, "seed": 1}]
  grid.write_report(str(tmp_path), rows, "")
  assert "2.0000 (2.0000 to 2.0000) | - | - |  |" in (tmp_path / "table.md").read_text()
  both = grid.summarize([rows[0], {**rows[0], "tokens_per_second": 5.0}])
  assert [row["tokens_per_second"] for row in both] == [5.0]


@pytest.mark.parametrize(
  "documents",
  [5, {"index": [1]}, {"index": [1, 2], "loss_sum": [3.0], "num_targets": [1, 1]}]
  + [{"index": [1], "loss_sum": [3.0], "num_targets": [count]} for count in (0, None, "2")],
)
def test_documents_of_a_damaged_result_are_refused(tmp_path, documents):
  result = {"heldout_loss": 2.0, "step": 1, "tokens_per_second": None}
  (tmp_path / "result.json").write_text(json.dumps({**result, "heldout_documents": documents}))
  with pytest.raises(UsageError, match="no lists 'heldout_documents': remove it to read the cell"):
    grid.read_result(str(tmp_path))
  (tmp_path / "result.json").write_text(json.dumps(result))  # of version 0.1
  assert grid.read_result(str(tmp_path)) == result


def test_long_patterns_have_names_that_folders_can_have(run_grid):
  pattern = "+".join(["sparsek:k1280:w512"] * 20)
  longer = Cell(f"{pattern}+full", 1, 0, "value", "conv", 7)
  shorter = Cell(pattern, 1, 0, "value", "conv", 7)
  assert len({longer.name, shorter.name}) == 2 and max(map(len, (longer.name, shorter.name))) < 120
  assert longer.name.endswith("-s7") and len(Cell("full", None, None, None, None, 1).name) == 7
  assert run_grid("--num_layers=20", f"--attention={pattern}") == 0 and len(run_grid.begun) == 1
