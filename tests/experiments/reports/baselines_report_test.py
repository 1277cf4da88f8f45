"""The table and the picture of baselines, against numbers worked out by hand."""

import math

import pytest

from sparsek.evaluation.statistics import score_interval, t_interval
from sparsek.experiments.reports import baselines_picture, baselines_report, plots, records


def result(text, mixed, right=None):
  buckets = [
    {"last": 63, "loss": text + 1, "num_targets": 5},
    {"last": 127, "loss": text, "num_targets": 9},
    {"last": 255, "loss": None, "num_targets": 0},
  ]
  asked = (
    [] if right is None else [{"task": "passkey", "length": 2048, "right": right, "total": 10}]
  )
  results = {
    "256": {"loss": text, "buckets": buckets},
    "1024": {"loss": text + 2, "buckets": buckets},
  }
  return {"loss": results, "mixed_loss": {"5": 9.0, "10": mixed}, "tasks": asked}


RUNS = {
  "sparsek_512": {"seeds": {"0": result(2.5, 1.5, 9), "1": result(2.8, 1.7, 10)}},
  "full": {"seeds": {"0": result(2.0, 1.0, 10), "1": result(2.2, 1.2)}},
  "window_512": {"seeds": {"0": result(3.0, 2.0, 0), "1": result(3.4, 2.4), "2": result(9.0, 9.0)}},
  "hybrid_512": {"seeds": {"1": result(2.4, 1.5)}},
  "random_1024_last_k512": {"seeds": {"0": result(2.9, 2.0)}},
}


def test_differences_are_of_the_seeds_that_both_have():
  assert baselines_report.difference(RUNS["sparsek_512"], RUNS["window_512"]) == (
    pytest.approx(-0.55),
    pytest.approx(0.05),
  )
  assert baselines_report.difference(RUNS["sparsek_512"], RUNS["window_512"], "mixed") == (
    pytest.approx(-0.6),
    pytest.approx(0.1),
  )
  assert baselines_report.losses(RUNS["full"], "1024") == {"0": 4.0, "1": 4.2}
  mean, error = baselines_report.difference(RUNS["hybrid_512"], RUNS["full"])
  assert mean == pytest.approx(0.2) and math.isnan(error)
  assert baselines_report.accuracies(RUNS["sparsek_512"]) == {("passkey", 2048): 0.95}


def test_rounds_are_pooled_and_compared_start_by_start():
  runs = baselines_report.pool([RUNS, {name: RUNS[name] for name in ("sparsek_512", "window_512")}])
  assert list(runs["sparsek_512"]["seeds"]) == ["0.0", "0.1", "1.0", "1.1"] and list(
    runs["full"]["seeds"]
  ) == ["0.0", "0.1"]
  _, _, *lines = baselines_report.differences(runs, ["sparsek_512"])
  about = " ".join(lines[4:])
  exact = "+0.5000 (+0.5000 to +0.5000), p < 0.001"
  assert lines[:4] == [
    f"| full | +0.5500 (-0.0853 to +1.1853), p 0.058 | 2 | {exact} | 2 |",
    "| window_512 | -0.5500 (-0.6419 to -0.4581), p < 0.001 | 4 | "
    "-0.6000 (-0.7837 to -0.4163), p 0.004 | 4 |",
    "| hybrid_512 | +0.4000 | 1 | +0.2000 | 1 |",
    "",
  ]
  assert "corrected (Holm) for these 4 comparisons." in about
  assert "The records hold no loss of a document" in about
  runs = {name: runs[name] for name in ("full", "sparsek_512", "window_512")}
  assert baselines_report.by_start(runs).splitlines()[2:] == [
    "| full | 100% | 100% |  |  |  |  |",
    "| sparsek_512 | 50% | 58% |  |  |  |  |",
    "| window_512 | 0% | 0% |  |  |  |  |",
  ]


def test_table():
  head, _, *lines = baselines_report.table(RUNS).splitlines()
  assert head.endswith("| passkey 2048 |") and [line.split(" | ")[0] for line in lines] == [
    "| full",
    "| hybrid_512",
    "| sparsek_512",
    "| window_512",
    "| random_1024_last_k512",
  ]
  assert lines[2] == (
    "| sparsek_512 | 2 | 2.6500 (0.7441 to 4.5559) | +0.5500 (-0.0853 to +1.1853) | "
    "-0.5500 (-1.1853 to +0.0853) | 50% | 1.6000 (0.3294 to 2.8706) | "
    "+0.5000 (+0.5000 to +0.5000) | -0.6000 (-1.8706 to +0.6706) | 55% | 95% |"
  )
  assert (
    lines[4] == "| random_1024_last_k512 | 1 | 2.9000 | +0.9000 |  |  | 2.0000 | +1.0000 |  |  |  |"
  )


def with_documents(run, offset, prompts):
  """Returns a run whose seeds hold eight documents of two targets, and the given prompts."""
  seeds = {}
  for seed, result in run["seeds"].items():
    sums = [4 + offset + i / 9 for i in range(8)]
    documents = {"index": [*range(8)], "loss_sum": sums, "num_targets": [2] * 8}
    shortest = {**result["loss"]["256"], "documents": documents}
    asked = [{**row, "prompts": {"prompt": prompts}} for row in result["tasks"]]
    seeds[seed] = {**result, "loss": {**result["loss"], "256": shortest}, "tasks": asked}
  return {"seeds": seeds}


def test_records_of_documents_and_prompts_give_intervals_over_them():
  runs = {
    "sparsek_512": with_documents(RUNS["sparsek_512"], 1.0, [*"abcdefghij"]),
    "window_512": with_documents(RUNS["window_512"], 3.0, []),
    "full": RUNS["full"],
  }
  over = baselines_report.over_documents(runs["sparsek_512"], runs["window_512"])
  assert over.difference == pytest.approx(-1) and over.number == 8 and over.p_value == 2 / 2**8
  head, _, window, full, _, *about = baselines_report.differences(runs, ["sparsek_512"])
  assert head.endswith("| text, over documents |") and full.endswith("| - |")
  assert window.endswith("| -1.0000 to -1.0000 |")
  assert "bootstrap over 8 of them; -: the records hold no loss" in " ".join(about)
  # Two seeds were asked the same ten prompts: 19 of 20 answers are right, over ten prompts.
  found = baselines_report.accuracy(runs["sparsek_512"], "passkey", 2048)
  assert found == score_interval(0.95, 10)
  assert baselines_report.accuracy(RUNS["sparsek_512"], "passkey", 2048) is None


def test_two_kinds_are_compared_once_though_two_tables_show_it():
  lines = baselines_report.differences(RUNS, ["sparsek_512", "window_512"])
  p_values = [cell.split(", ")[1] for line in lines for cell in line.split(" | ") if ", p" in cell]
  ours = [line for line in lines if line.startswith("| window_512 | -")]
  theirs = [line for line in lines if line.startswith("| sparsek_512 | +")]
  assert len(ours) == len(theirs) == 1 and len(p_values) == 8
  assert [x.split(", ")[1][:7] for x in ours[0].split(" | ")[1:4:2]] == [
    x.split(", ")[1][:7] for x in theirs[0].split(" | ")[1:4:2]
  ]
  assert "for these 6 comparisons" in " ".join(lines)


def test_picture(tmp_path):
  pytest.importorskip("matplotlib")
  baselines_picture.draw(RUNS, str(tmp_path / "picture.png"))
  assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_bars_are_the_intervals_of_the_tables():
  pytest.importorskip("matplotlib")
  above = {"sparsek_512": [0.05, 0.06, 0.07], "window_512": [0.1], "lsh_512": [0.4, 0.5]}
  axes = plots.new_figure().add_subplot()
  baselines_picture._draw_losses(axes, above)
  ends = [(left[0], right[0]) for bar in axes.collections for left, right in bar.get_segments()]
  interval = t_interval(above["sparsek_512"])
  assert ends == [pytest.approx((interval.low, interval.high)), pytest.approx((0.1, 0.1))]


@pytest.mark.parametrize("name", ("baselines", "baselines_local"))
def test_pictures_of_the_records_have_at_most_eight_lines(name):
  runs = records.load(f"{name}.json")["runs"]
  assert 5 <= len([name for name in baselines_picture.LINES if name in runs]) <= 8
