"""The training benchmark: what is trained, and what is said of it."""

import sys

import numpy as np
import pytest

from sparsek.config import TransformerConfig
from sparsek.errors import UsageError
from sparsek.experiments.bench import pytorch_window, training_step_report, transformers_llama
from sparsek.experiments.bench import training_step as training_step_bench

CONFIG = TransformerConfig(
  vocab_size=17,
  num_layers=1,
  embed_dim=8,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=8,
  k=3,
  window=5,
  implementation="reference",
)


def row(n, **speeds):
  result = lambda speed: (
    {"failed": speed}
    if isinstance(speed, str)
    else {
      "tokens_per_second": speed,
      "ms": 1e3 * n / speed,
      "mib": 3.5,
      "mfu": 0.25,
      "step_tflop": 2.0,
      "compile_seconds": 7.0,
    }
  )
  return {
    "n": n,
    "batch_size": 1,
    "documents": 1,
    "model": "1M parameters, float32",
    "k": 3,
    "window": 5,
    "remat": "none",
    "rivals": {kind: result(speed) for kind, speed in speeds.items()},
  }


ROWS = [
  row(16, sparsek=100.0, sliding_window=125.0, full=50.0),
  row(64, sparsek=90.0, sliding_window=120.0, full="out of memory"),
]


def test_summary():
  assert {
    line["what"]: pytest.approx(line["value"]) for line in training_step_report.summary(ROWS)
  } == {
    "tokens/s over those of sliding window 8 at 16": 0.8,
    "tokens/s over those of full attention at 16": 2.0,
    "tokens/s over those of sliding window 8 at 64": 0.75,
    "tokens/s at 64 over tokens/s at 16": 0.9,
  }


def test_rows_with_the_loss_of_scorers_are_told_apart():
  rows = [*ROWS, {**row(64, sparsek=45.0, sliding_window=1.0), "scorer_loss": 1.0}]
  result = {line["what"]: line["value"] for line in training_step_report.summary(rows)}
  assert (
    result["tokens/s with the scorers' loss over those without at 64"] == 0.5
    and result["tokens/s over those of sliding window 8 at 64"] == 0.75
  )
  assert sum("sparsek, scorers' loss" in line for line in training_step_report.table(rows)) == 1
  both = [{**row(64, sparsek=45.0, full=9.0), "scorer_loss": 1.0}]
  assert training_step_report.summary(both) == [
    {"what": "tokens/s over those of full attention at 64", "value": 5.0}
  ]


def test_table_and_failures():
  head, *lines = training_step_report.table(ROWS)
  assert len(lines) == 6 and len({len(line) for line in [head, *lines]}) == 1
  assert "sliding window 8" in lines[1] and "25.0%" in lines[1] and "out of memory" in lines[5]
  assert training_step_report.failures({"rows": ROWS}) == []
  assert training_step_report.failures({"rows": [row(4, full="RuntimeError: no")]}) == [
    "full attention, n=4: RuntimeError: no"
  ]


def test_traced_kinds_of_kernels():
  assert training_step_report.kinds_of_kernels(ROWS) == []
  traced = row(16, sparsek=1.0, full=1.0)
  traced["rivals"]["sparsek"]["kinds_ms"] = {"matrix products": 2.5, "attention": 1.0}
  _, head, line = training_step_report.kinds_of_kernels([*ROWS, traced])
  assert line.split() == ["16", "none", "sparsek", "1.00", "2.50"]
  assert head.index("matrix products") < line.index("2.50") and "all else, by XLA" in head


def test_extending_a_record():
  def record(rows, **versions):
    return {
      "suite": "train",
      "device": "d",
      "versions": {"commit": "c", "packages": {}, **versions},
      "rows": rows,
    }

  rows = [row(16, sparsek=1.0), {**row(16, sparsek=2.0), "documents": 4}, row(64, sparsek=3.0)]
  assert training_step_report.rows_to_keep(record(rows), record([])) == rows
  with pytest.raises(UsageError, match="the record's commit is c, here it is e"):
    training_step_report.rows_to_keep(record(rows), record([], commit="e"))
  merged = training_step_report.merge(rows, [row(32, sparsek=5.0), row(16, sparsek=4.0)])
  assert [
    (x["n"], x["documents"], x["rivals"]["sparsek"]["tokens_per_second"]) for x in merged
  ] == [(16, 1, 4.0), (32, 1, 5.0), (64, 1, 3.0), (16, 4, 2.0)]
  assert {line["what"]: line["value"] for line in training_step_report.summary(merged)}[
    "tokens/s with 4 documents a row over 1 at 16"
  ] == 0.5


def test_transformers_in_a_process_of_its_own(monkeypatch):
  """PyTorch's part needs a GPU; what it answers is put beside our own rows."""
  job = training_step_bench.Job(CONFIG, 12)
  answer = lambda text: monkeypatch.setattr(
    transformers_llama,
    "COMMAND",
    (sys.executable, "-c", f"import json, sys; job = json.load(sys.stdin); {text}"),
  )
  answer(
    "print('noise'); print(json.dumps({'seconds': [.3, .1, .2], 'inner': 1, 'mib': "
    "job['model']['hidden_size'], 'compile_seconds': 9, "
    "'k': job['compile']}))"
  )
  result = training_step_bench.time_transformers(
    [job, training_step_bench.Job(CONFIG, 99)],
    ("transformers_layers", "full"),
    50,
    3,
    lambda text: None,
  )
  assert result == {
    (0, "transformers_layers"): {
      "ms": 200.0,
      "fastest": 100.0,
      "slowest": 300.0,
      "rounds": 3,
      "inner": 1,
      "mib": 8,
      "compile_seconds": 9,
      "k": "layers",
    }
  }
  ((_, rows),) = training_step_bench.time_jobs(
    [job], ("transformers_layers",), rounds=1, others=result
  )
  assert rows[0]["rivals"]["transformers_layers"]["tokens_per_second"] == pytest.approx(
    12 / 0.2
  ) and list(rows[0]["rivals"]) == ["transformers_layers"]
  monkeypatch.setattr(
    pytorch_window,
    "COMMAND",
    (
      sys.executable,
      "-c",
      "import json, sys; job = json.load(sys.stdin); print(json.dumps({'seconds': [.2], "
      "'inner': 1, 'mib': job['window'], 'compile_seconds': job['n']}))",
    ),
  )
  own = training_step_bench.time_transformers([job], ("pytorch_window",), 50, 3, lambda text: None)
  assert own[0, "pytorch_window"]["mib"] == CONFIG.k + CONFIG.window
  assert own[0, "pytorch_window"]["compile_seconds"] == 12
  answer("sys.exit('no GPU')")
  assert transformers_llama.run("transformers", CONFIG, 12, 1, 2048, 1, 1.0) == {"failed": "no GPU"}


def test_jobs():
  assert training_step_bench.Job(CONFIG, 100, documents=3).lengths() == [50, 25, 25]
  assert training_step_bench.Job(CONFIG, 3, documents=9).lengths() == [2, 1]
  assert training_step_bench.under(
    "sliding_window", CONFIG
  ).window == 8 and training_step_bench.under("full", CONFIG).attention == ("full",)


def test_a_kind_that_cannot_run_leaves_the_others_alone(monkeypatch):
  """And a sample goes on from the state of the one before."""
  losses = []

  def steps(cell):
    for _ in range(3):
      state, batch = cell._args
      state, metrics = cell._function(state, batch)
      cell._args = state, batch
      losses.append(float(metrics["loss"]))
    return 1.0

  monkeypatch.setattr(training_step_bench.StepCell, "time", steps)
  compile_ = training_step_bench.StepCell.compile
  monkeypatch.setattr(
    training_step_bench.StepCell,
    "compile",
    lambda cell: compile_(cell) if cell.job.config.attention == ("full",) else fail(),
  )

  def fail():
    raise RuntimeError("no such kernel")

  ((done, rows),) = training_step_bench.time_jobs(
    [training_step_bench.Job(CONFIG, 12, documents=2)], ("sparsek", "full"), rounds=1
  )
  assert (
    done == 1
    and rows[0]["rivals"]["sparsek"]["failed"] == "RuntimeError: no such kernel"
    and rows[0]["rivals"]["full"]["ms"] > 0
  )
  assert len(losses) >= 6 and np.all(np.diff(losses) < 0)
