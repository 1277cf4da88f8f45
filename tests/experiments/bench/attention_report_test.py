import math

import pytest

from sparsek.experiments.bench import attention_report as report


def row(
  n, ours=None, window=None, dense=None, thresholds=None, scores="normal", mib=(1, 1), heads=2
):
  """Forward takes half of forward + backward; a string is what failed."""
  rivals = {}
  for name, ms in (
    ("sparsek", ours),
    ("sliding_window", window),
    ("dense", dense),
    ("thresholds", thresholds),
  ):
    if isinstance(ms, str):
      rivals[name] = {
        direction: {"failed": ms, "mib": 1} for direction in (report.FORWARD, report.BOTH)
      }
    elif ms is not None:
      size = {"sparsek": mib[0], "sliding_window": mib[1]}.get(name, 9)
      rivals[name] = {
        report.FORWARD: {"ms": ms / 2, "mib": size / 2},
        report.BOTH: {"ms": ms, "mib": size},
      }
  return {
    "n": n,
    "heads": heads,
    "kv_heads": 1,
    "head_dim": 8,
    "k": 3,
    "window": 5,
    "gate": "value",
    "dtype": "float32",
    "scores": scores,
    "rivals": rivals,
    "labels": {name: name.replace("_", " ") for name in rivals},
  }


ROWS = [
  row(16, 2.0, 1.0, 1.0),
  row(4, 1.0, 0.5, 0.25),
  row(64, 8.0, 2.0, 16.0, mib=(6, 4)),
  row(16, 3.0, 1.0, scores="rising"),
  row(16, 9.0, heads=4),
  row(32, 4.0, 1.5, "JaxRuntimeError: no engine", 1.0),
]


def test_break_even():
  # slower by 2, then faster by 2: half-way in log n
  assert report.break_even([(4, 1, 0.25), (16, 2, 1), (64, 8, 16)]) == (64, pytest.approx(32))
  assert report.break_even([(4, 1, 2), (16, 2, 3)]) == (4, None)
  assert report.break_even([(4, 1, 2), (16, 3, 2)]) is None
  assert report.break_even([]) is None
  first, equal = report.break_even([(4, 1, 2), (8, 3, 2), (16, 3, 4)])  # noise at 4 does not count
  assert first == 16 and equal == pytest.approx(8 * 2 ** (math.log(1.5) / math.log(2)))


def test_summary():
  lines = report.summary(ROWS)
  result = {line["what"]: line["value"] for line in lines if line["shape"].startswith("H=2 ")}
  assert result == {
    "time over a sliding window of 8 at 4": 2,
    "forward alone: time over a sliding window of 8 at 4": 2,
    "speed over dense at 4": 0.25,
    "peak memory over the sliding window's at 4": 1,
    "time over a sliding window of 8 at 16": 2,
    "forward alone: time over a sliding window of 8 at 16": 2,
    "speed over dense at 16": 0.5,
    "peak memory over the sliding window's at 16": 1,
    "time over a sliding window of 8 at 64": 4,
    "forward alone: time over a sliding window of 8 at 64": 4,
    "speed over dense at 64": 2,
    "peak memory over the sliding window's at 64": 1.5,
    "time at 64 over time at 16": 4,
    "peak memory at 64 over peak memory at 16": 6,
    "smallest length measured from which on it is faster than dense": 64,
    "length of equal time with dense, interpolated": pytest.approx(32),
    "rising scores: time over a sliding window of 8 at 16": 3,
    "rising scores: forward alone: time over a sliding window of 8 at 16": 3,
    "time with rising scores over time with normal ones at 16": 1.5,
  }
  assert {line["shape"] for line in lines} == {"H=2 G=1 D=8 k=3 window=5 value float32"}
  alone = [line["value"] for line in report.summary([ROWS[-1]]) if "alone, over" in line["what"]]
  assert alone == [0.25]
  errors = {"problem": ROWS[0], "relative": {"sparsek": {"out": 1e-3}}, "failed": {}}
  assert report.summary([], errors) == [
    {
      "shape": "H=2 G=1 D=8 k=3 window=5 value float32",
      "what": "relative error of out at 16, sparsek",
      "value": 1e-3,
    }
  ]


def test_share_of_thresholds_and_lists():
  """It is of what the kernels took in a trace, where there is one."""
  of = lambda row: [line["value"] for line in report.summary([row]) if "share" in line["what"]]
  traced = row(16, 2.0)
  assert of(traced) == []
  kinds = {"attention": 1.2, report.SELECTION: 0.3, "all else, by XLA": 0.5}
  traced["rivals"]["sparsek"][report.BOTH]["kinds_ms"] = kinds
  assert of(traced) == [pytest.approx(0.15)]


def test_table():
  head, *lines = report.table([*ROWS, row(128, "out of memory", 1.0)])
  assert len({len(line) for line in (head, *lines)}) == 1 and len(lines) == 7
  cut = lambda line: [part.strip() for part in line.split("  ") if part.strip()]
  assert cut(head) == [
    "shape",
    "scores",
    "n",
    "sparsek ms",
    "sliding window ms",
    "dense ms",
    "thresholds ms",
    "time / window",
    "speed / dense",
    "MiB",
    "MiB / window",
  ]
  assert cut(lines[2]) == [
    "H=2 G=1 D=8",
    "normal",
    "64",
    "4.00 / 8.00",
    "1.00 / 2.00",
    "8.00 / 16.0",
    "4.00",
    "2.00",
    "6.00",
    "1.50",
  ]
  assert "failed" in lines[5] and cut(lines[6])[3] == "out of memory"


def test_failures_are_told_but_for_memory():
  errors = {"relative": {}, "failed": {"xla": "NotImplementedError: not here"}}
  failed = report.failures({"rows": [*ROWS, row(128, "out of memory")], "errors": errors})
  assert failed == [
    *(
      f"dense, {direction}, H=2 G=1 D=8, normal scores, n=32: JaxRuntimeError: no engine"
      for direction in (report.FORWARD, report.BOTH)
    ),
    "xla, errors: NotImplementedError: not here",
  ]
  assert report.failures({"rows": ROWS[:2], "errors": None}) == []


def test_curves_are_those_of_the_first_shape_and_family():
  curves = report.curves(ROWS)
  assert list(curves) == ["Forward", "Forward + backward"]
  assert curves["Forward + backward"] == {
    "sparsek": [(4, 1), (16, 2), (32, 4), (64, 8)],
    "sliding window": [(4, 0.5), (16, 1), (32, 1.5), (64, 2)],
    "dense": [(4, 0.25), (16, 1), (64, 16)],
  }


def test_text():
  record = {
    "rows": ROWS,
    "device": "a device",
    "versions": {"packages": {"jax": "1.2"}},
    "rounds": 3,
    "errors": None,
    "summary": report.summary(ROWS),
  }
  text = report.lines(record)
  assert text[0].startswith("a device, JAX 1.2, k=3 window=5 value float32: medians of 3 rounds")
  assert (
    "H=2 G=1 D=8 k=3 window=5 value float32, forward + backward:" in text
    and "  time at 64 over time at 16: 4.00" in text
  )
  assert "  smallest length measured from which on it is faster than dense: 64" in text
