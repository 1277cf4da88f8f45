import functools
import json
import sys

import jax
import pytest

from sparsek.command_line.main import parse
from sparsek.errors import UsageError
from sparsek.experiments import benchmark
from sparsek.experiments.bench import suites, training_step
from tests.helpers import run_command

TINY = [
  "--lengths=32,16",
  "--heads=2",
  "--kv_heads=1",
  "--head_dim=8",
  "--k=4",
  "--window=4",
  "--rounds=2",
]

run = functools.partial(run_command, benchmark.main, suites.FLAGS)


def test_record_picture_and_what_is_printed(tmp_path, capsys):
  path = tmp_path / "record.json"
  assert (
    run(
      *TINY,
      "--scores=normal,rising",
      "--baselines=sparsek,dense",
      "--errors_at=16",
      f"--record={path}",
    )
    == 0
  )
  printed = capsys.readouterr().out
  record = json.loads(path.read_text())
  assert [(row["n"], row["scores"], row["k"]) for row in record["rows"]] == [
    (16, "normal", 4),
    (32, "normal", 4),
    (16, "rising", 4),
    (32, "rising", 4),
  ]
  for row in record["rows"]:
    assert list(row["rivals"]) == ["sparsek", "dense"]
    assert all(
      figure["ms"] > 0 and figure["rounds"] == 2
      for directions in row["rivals"].values()
      for figure in directions.values()
    )
  assert (
    record["device"] == jax.devices()[0].device_kind
    and record["versions"]["packages"]["jax"] == jax.__version__
  )
  assert "--heads=2" in record["flags"] and record["rounds"] == 2
  assert "time with rising scores over time with normal ones at 32" in [
    line["what"] for line in record["summary"]
  ]
  assert record["errors"]["relative"]["sparsek"]["out"] < 1e-5
  assert (tmp_path / "record.png").read_bytes().startswith(b"\x89PNG") and sorted(
    x.name for x in tmp_path.iterdir()
  ) == ["record.json", "record.png"]
  assert (
    "speed over dense at 32" in printed and "XLA dense ms" in printed and "round 2 of 2" in printed
  )

  (tmp_path / "record.png").unlink()
  assert run(f"--show={path}") == 0
  assert (
    capsys.readouterr().out == printed[printed.index(record["device"] + ", JAX") :]
    and (tmp_path / "record.png").exists()
  )


def test_what_cannot_run_is_a_cell_and_then_an_error(capsys):
  arguments = [*TINY, "--lengths=16", "--baselines=sparsek", "--implementation=mosaic_tpu"]
  assert run(*arguments) == 1
  told = capsys.readouterr()
  assert (
    "failed" in told.out
    and (
      "sparsek, mosaic_tpu, forward, H=2 G=1 D=8, normal scores, n=16: "
      "NotImplementedError: implementation='mosaic_tpu'"
    )
    in told.err
  )


def test_problems_of_the_suites():
  def chosen(*arguments):
    for name in suites.FLAGS:
      suites.FLAGS[name].unparse()
    parse(["benchmark", *arguments], suites.FLAGS)
    return suites.problems()

  assert [(p.n, p.heads, p.kv_heads, p.head_dim, p.k, p.window) for p in chosen("--k=7")] == [
    (4096, 2, 1, 64, 7, 128),
    (16384, 2, 1, 64, 7, 128),
  ]
  headline = chosen("--suite=headline")
  assert (
    len(headline) == 15
    and {(p.k, p.dtype) for p in headline} == {(512, "bfloat16")}
    and max(p.n for p in headline) == 131072
  )
  small = chosen("--suite=headline", "--lengths=64,16", "--k=3", "--scores=normal,rising")
  assert [(p.n, p.k, p.heads, p.scores) for p in small] == [
    (16, 3, 16, "normal"),
    (64, 3, 16, "normal"),
    (16, 3, 16, "rising"),
    (16, 3, 32, "normal"),
    (16, 3, 16, "normal"),
    (16, 3, 8, "normal"),
  ]


def test_longest_lengths_of_what_is_slow(monkeypatch, capsys):
  for name in suites.FLAGS:
    suites.FLAGS[name].unparse()
  words = ["--lengths=16,32", "--implementation=reference", "--max_dense=16", "--max_xla=16"]
  parse(["benchmark", *words], suites.FLAGS)
  short, long = (set(problem.baselines) for problem in suites.problems())
  assert short - long == {"dense", "xla"}
  asked = []

  def time_transformers(jobs, kinds, longest, rounds, say):
    asked.append(longest)
    raise UsageError("enough")

  monkeypatch.setattr(training_step, "time_transformers", time_transformers)
  for words, longest in (([], 32768), (["--max_transformers=16"], 16)):
    assert run("--suite=train", "--preset=tiny", "--lengths=16", *words) == 2
    assert asked.pop() == longest and "enough" in capsys.readouterr().err


def test_a_file_that_is_no_record(tmp_path, capsys):
  (tmp_path / "other.json").write_text("{}")
  assert run(f"--show={tmp_path}/other.json") == 2
  assert "no record of this benchmark" in capsys.readouterr().err


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--lengths=16,x"], "--lengths=16,x: must be numbers"),
    (["--lengths=0"], "--lengths=0: must be numbers"),
    (["--heads=3", "--kv_heads=2"], "--heads=3 must be a multiple of --kv_heads=2"),
    (["--suite=headline", "--heads=9"], "--heads=9 must be a multiple of --kv_heads=16"),
    (["--suite=everything"], "--suite=everything"),
    (
      ["--scores=normal,sideways"],
      "--scores=normal,sideways: 'sideways' must be one of normal, rising",
    ),
    (["--baselines=dens"], "'dens' must be one of sparsek, sliding_window, dense"),
    (
      ["--record=/nowhere/at/all.json"],
      "--record=/nowhere/at/all.json: must be a .json file in a folder that exists",
    ),
    (["--record=x.png"], "/x.png: must be a .json file"),
    (["--show=nowhere.json"], "nowhere.json cannot be read"),
    (["--rounds=0"], "--rounds=0"),
    (["--extend", "--record=x.json"], "--extend: needs --suite=train or decode, and --record"),
    (["--workdir=x"], "x needs --suite=decode, got --suite=attention"),
    (["--workdir=x", "--suite=decode"], "x: there is no such folder"),
    (["--workdir=x", "--suite=decode", "--preset=tiny"], "x and --preset=tiny exclude each other"),
  ],
)
def test_bad_flags(arguments, message, capsys):
  assert run(*arguments) == 2
  assert message in capsys.readouterr().err


def test_training(tmp_path, capsys):
  path = tmp_path / "record.json"
  arguments = [
    "--suite=train",
    "--preset=tiny",
    "--lengths=16",
    "--vocab_size=50",
    "--k=2",
    "--window=2",
    "--rounds=1",
  ]
  assert (
    run(*arguments, "--documents=2", "--baselines=full", "--errors_at=16", f"--record={path}") == 0
  )
  printed = capsys.readouterr().out
  record = json.loads(path.read_text())
  (row,) = record["rows"]
  assert (row["n"], row["documents"], row["k"], list(row["rivals"])) == (16, 2, 2, ["full"])
  assert (
    row["rivals"]["full"]["tokens_per_second"]
    == pytest.approx(16 / row["rivals"]["full"]["ms"] * 1e3)
    and row["rivals"]["full"]["compile_seconds"] > 0
  )
  assert "full attention" in printed and (tmp_path / "record.png").exists()
  assert run(f"--show={path}") == 0
  assert capsys.readouterr().out == printed[printed.index(record["device"] + ", 1M") :]
  assert (
    run(
      *arguments, "--documents=2", "--baselines=full", "--lengths=8", "--extend", f"--record={path}"
    )
    == 0
  )
  extended = json.loads(path.read_text())["rows"]
  assert [row["n"] for row in extended] == [8, 16] and extended[1] == row
  before = path.read_text()
  assert (
    run(
      *arguments,
      "--baselines=full",
      "--vocab_size=60",
      "--gate=value",
      "--extend",
      f"--record={path}",
    )
    == 2
  )
  told = capsys.readouterr().err
  changes = "--vocab_size: 50 -> 60, --gate: straight_through -> value"
  assert f"another model (old -> new): {changes}" in told
  assert path.read_text() == before and "--record" not in before
  assert (
    run("--suite=train", "--baselines=dense") == 2
    and "'dense' must be one of sparsek, sliding_window, full, pytorch_window, transformers"
    in capsys.readouterr().err
  )


@pytest.mark.parametrize("content", ("[1, 2]", '{"mine": 1}'))
def test_a_file_that_is_no_record_stays(content, tmp_path, capsys):
  path = tmp_path / "notes.json"
  path.write_text(content)
  assert run(*TINY, f"--record={path}") == 2
  assert "notes.json exists and is no record of" in capsys.readouterr().err
  assert path.read_text() == content


def test_without_matplotlib_the_figures_are_printed_and_recorded(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  path = tmp_path / "record.json"
  arguments = (*TINY, "--lengths=16", "--rounds=1", "--baselines=sparsek")
  assert run(*arguments, f"--record={path}") == 0
  told = capsys.readouterr()
  assert "pip install matplotlib; the figures are printed and recorded without them" in told.err
  assert told.out.endswith(f"{path}\n") and json.loads(path.read_text())["rows"]
  assert run(f"--show={path}") == 0 and not (tmp_path / "record.png").exists()
