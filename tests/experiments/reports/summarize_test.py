"""A summary holds what the figures of a sentence need, and its readers take it."""

import pytest

from sparsek.errors import UsageError
from sparsek.experiments.reports import baselines_report, summarize

RESULT = {
  "loss": {"256": {"loss": 2.5, "num_targets": 14, "buckets": [{"last": 63}]}},
  "mixed_loss": {"5": 9.0, "10": 1.5},
  "tasks": [{"task": "passkey", "length": 2048, "right": 9, "total": 10}],
  "selection": {"layer_0/gate_mass": 1.0},
}
RECORD = {
  "runs": {name: {"flags": [], "seeds": {"0": RESULT}} for name in ("full", "window_512")},
  "stages": {"dense_s0": [], "full_s0": [], "window_512_s0": [], "tasks_window_512": []},
  "versions": {},
}


def test_losses_and_answers_stay():
  short = summarize.summary(RECORD, ["window_512"])
  assert list(short["runs"]) == ["window_512"]
  assert list(short["stages"]) == ["dense_s0", "window_512_s0", "tasks_window_512"]
  run = short["runs"]["window_512"]
  assert set(run["seeds"]["0"]) == {"loss", "mixed_loss", "tasks"}
  assert "buckets" not in run["seeds"]["0"]["loss"]["256"]
  for length in (None, "mixed"):
    assert baselines_report.losses(run, length) == baselines_report.losses(
      RECORD["runs"]["window_512"], length
    )
  assert baselines_report.accuracies(run) == {("passkey", 2048): 0.9}
  assert list(summarize.summary(RECORD)["runs"]) == ["full", "window_512"]


def test_grids_lose_what_layers_select():
  cells = [{"cell": "a", "heldout_loss": {"4": 1.0}, "selection": {"layer_0/mean_age": 3.0}}]
  short = summarize.summary({"cells": cells, "note": ""})
  assert short == {"cells": [cells[0] | {"selection": {}}], "note": ""}


def test_unknown_kinds_are_refused():
  with pytest.raises(UsageError, match="the record has no sparsek_512"):
    summarize.summary(RECORD, ["sparsek_512"])
