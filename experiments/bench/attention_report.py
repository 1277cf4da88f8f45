"""Reports of the attention suites: the table, the summary and the curves of a record.

They are pure functions of the rows of `experiments.bench.attention`. A record calls the baselines
"rivals".
"""

import math
from collections.abc import Sequence
from typing import Any

from sparsek.experiments.bench.attention import BASELINES, BOTH, FORWARD
from sparsek.experiments.reports import plots
from sparsek.training.trace import SELECTION

SHAPE_FIELDS = ("heads", "kv_heads", "head_dim", "k", "window", "gate", "dtype")
CURVES = ("sparsek", "sliding_window", "dense")
PICTURE_NAMES = {  # of labels in the rows
  "sparsek, mosaic_gpu": "SPARSEK (Mosaic kernels)",
  "sparsek, mosaic_mma": "SPARSEK (Mosaic kernels, mma)",
  "cuDNN window": "sliding window (cuDNN)",
  "cuDNN dense": "full attention (cuDNN)",
}


def figure(row: dict, baseline: str, direction: str = BOTH, what: str = "ms") -> Any:
  """Returns milliseconds or MiB of a baseline; None where it was not run or failed.

  With what="failed" it returns the reason.
  """
  return row["rivals"].get(baseline, {}).get(direction, {}).get(what)


def quotient(a: float | None, b: float | None) -> float | None:
  """Returns a / b; None where one of them is not known."""
  return None if a is None or not b else a / b


def share(row: dict) -> float | None:
  """Returns the share of thresholds and lists in the kernels' time; None where it was not traced.

  Timed alone they take longer: their launches then wait for one another.
  """
  kinds = figure(row, "sparsek", what="kinds_ms") or {}
  return quotient(kinds.get(SELECTION), sum(kinds.values()))


def by_shape(rows: Sequence[dict], scores: str | None = None) -> dict[tuple, list[dict]]:
  """Groups the rows of each shape, shortest first; of all score families, or one."""
  shapes: dict[tuple, list[dict]] = {}
  for row in sorted(rows, key=lambda row: row["n"]):
    if scores in (None, row["scores"]):
      shapes.setdefault(tuple(row[field] for field in SHAPE_FIELDS), []).append(row)
  return shapes


def shape_text(row: dict) -> str:
  """Returns the heads of a row as text."""
  return f"H={row['heads']} G={row['kv_heads']} D={row['head_dim']}"


def budget_text(row: dict) -> str:
  """Returns the budget, the gate and the dtype of a row as text."""
  return f"k={row['k']} window={row['window']} {row['gate']} {row['dtype']}"


def break_even(points: Sequence[tuple[int, float, float]]) -> tuple[int, float | None] | None:
  """Finds the length from which on ours is faster.

  Args:
    points: (n, our time, theirs), by rising n.
  Returns:
    (smallest measured n from which on ours is faster, n of equal times, interpolated between that
    n and the one before it as if both times were powers of n); the latter is None where ours is
    faster at the shortest n already. None instead of both where ours is slower at the longest n.
  """
  first = len(points)
  while first and points[first - 1][1] < points[first - 1][2]:
    first -= 1
  if first == len(points):
    return None
  if first == 0:
    return points[0][0], None
  (n0, ours0, theirs0), (n1, ours1, theirs1) = points[first - 1 : first + 1]
  behind, ahead = math.log(ours0 / theirs0), math.log(theirs1 / ours1)
  return points[first][0], math.exp(
    math.log(n0) + (math.log(n1) - math.log(n0)) * behind / (behind + ahead)
  )


def summary(rows: Sequence[dict], errors: dict | None = None) -> list[dict]:
  """Computes the figures for which there are goals, where the rows that they need exist.

  They are of forward + backward unless they say so, at the longest length of a shape, at a quarter
  and at a sixteenth of it.

  Returns:
    [{"shape", "what", "value"}].
  """
  lines = []

  def add(row, what, value):
    if value is not None:
      lines.append({"shape": f"{shape_text(row)} {budget_text(row)}", "what": what, "value": value})

  for of_shape in by_shape(rows).values():
    for scores in dict.fromkeys(row["scores"] for row in of_shape):
      family = {row["n"]: row for row in of_shape if row["scores"] == scores}
      longest = family[max(family)]
      quarter = family.get(longest["n"] // 4)
      of = "" if scores == "normal" else f"{scores} scores: "
      for row in filter(None, (family.get(longest["n"] // 16), quarter, longest)):
        n, ours = row["n"], figure(row, "sparsek")
        window = f"a sliding window of {row['k'] + row['window']} at {n}"
        add(row, f"{of}time over {window}", quotient(ours, figure(row, "sliding_window")))
        forward = [figure(row, name, FORWARD) for name in ("sparsek", "sliding_window")]
        add(row, f"{of}forward alone: time over {window}", quotient(*forward))
        add(row, f"{of}speed over dense at {n}", quotient(figure(row, "dense"), ours))
        add(row, f"{of}speed over xla at {n}", quotient(figure(row, "xla"), ours))
        add(
          row,
          f"{of}thresholds, expiry and compaction timed alone, over the whole, at {n}",
          quotient(figure(row, "thresholds"), ours),
        )
        add(row, f"{of}share of {SELECTION} in the time of all kernels at {n}", share(row))
        if scores == "normal":
          add(
            row,
            f"peak memory over the sliding window's at {n}",
            quotient(figure(row, "sparsek", what="mib"), figure(row, "sliding_window", what="mib")),
          )
        for other in of_shape:
          if scores != "normal" and (other["scores"], other["n"]) == ("normal", n):
            add(
              row,
              f"time with {scores} scores over time with normal ones at {n}",
              quotient(ours, figure(other, "sparsek")),
            )
      if quarter:
        for what, unit in (("time", "ms"), ("peak memory", "mib")):
          ratio = quotient(
            figure(longest, "sparsek", what=unit), figure(quarter, "sparsek", what=unit)
          )
          add(longest, f"{of}{what} at {longest['n']} over {what} at {quarter['n']}", ratio)
      points = [(n, figure(row, "sparsek"), figure(row, "dense")) for n, row in family.items()]
      even = break_even([point for point in points if None not in point])
      if even:
        add(longest, f"{of}smallest length measured from which on it is faster than dense", even[0])
        add(longest, f"{of}length of equal time with dense, interpolated", even[1])
  if errors:
    problem = errors["problem"]
    for name, distances in errors.get("relative", {}).items():
      for what, distance in distances.items():
        add(problem, f"relative error of {what} at {problem['n']}, {name}", distance)
  return lines


def number(value: float | None, unit: str = "") -> str:
  """Formats a number with three digits, or with all those before the point."""
  if value is None:
    return ""
  digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3
  return f"{value:.{digits}f}{unit}"


def _pair(values: Sequence[str]) -> str:
  """Joins the texts of forward and forward + backward; gives one of them where they agree."""
  return values[0] if values[0] == values[1] else " / ".join(value or "-" for value in values)


def _time(row: dict, baseline: str, direction: str) -> str:
  failed = figure(row, baseline, direction, "failed")
  if failed is None:
    return number(figure(row, baseline, direction))
  return "out of memory" if failed == "out of memory" else "failed"


def table(rows: Sequence[dict]) -> list[str]:
  """Returns the lines of a table: one for each shape, score family and length.

  Pairs are forward / forward + backward.
  """
  names = [name for name in BASELINES if any(name in row["rivals"] for row in rows)]
  labels = {name: label for row in rows for name, label in row["labels"].items()}
  lines = []
  for row in rows:
    cells = {"shape": shape_text(row), "scores": row["scores"], "n": str(row["n"])}
    for name in names:
      cells[f"{labels[name]} ms"] = _pair(
        [_time(row, name, direction) for direction in (FORWARD, BOTH)]
      )
    ours, window, dense = (
      [figure(row, name, direction) for direction in (FORWARD, BOTH)]
      for name in ("sparsek", "sliding_window", "dense")
    )
    cells["time / window"] = _pair([number(quotient(x, y)) for x, y in zip(ours, window)])
    cells["speed / dense"] = _pair([number(quotient(y, x)) for x, y in zip(ours, dense)])
    memory = figure(row, "sparsek", what="mib")
    cells["MiB"] = number(memory)
    cells["MiB / window"] = number(quotient(memory, figure(row, "sliding_window", what="mib")))
    lines.append(cells)
  return aligned(lines)


def aligned(lines: Sequence[dict[str, str]]) -> list[str]:
  """Returns the lines of a table: a head and the cells under it, flush right."""
  columns = {name: max(len(name), *(len(line[name]) for line in lines)) for name in lines[0]}
  head = {name: name for name in columns}
  return [
    "  ".join(line[name].rjust(width) for name, width in columns.items()) for line in (head, *lines)
  ]


def failures(record: dict) -> list[str]:
  """Returns a line for each failure, except those for lack of memory."""
  lines = []
  for row in record["rows"]:
    for name in row["rivals"]:
      for direction in (FORWARD, BOTH):
        failed = figure(row, name, direction, "failed")
        if failed not in (None, "out of memory"):
          lines.append(
            f"{row['labels'][name]}, {direction}, {shape_text(row)}, {row['scores']} "
            f"scores, n={row['n']}: {failed}"
          )
  return lines + [
    f"{name}, errors: {failed}"
    for name, failed in ((record["errors"] or {}).get("failed") or {}).items()
  ]


def curves(rows: Sequence[dict]) -> dict[str, dict[str, list[tuple[int, float]]]]:
  """Returns {"Forward" or "Forward + backward": {label: [(n, ms)]}}.

  The rows are those of the first one's shape and family of scores.
  """
  of_shape = next(
    iter(
      by_shape(
        [
          row
          for row in rows
          if all(row[field] == rows[0][field] for field in (*SHAPE_FIELDS, "scores"))
        ]
      ).values()
    )
  )
  panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
  for title, direction in (("Forward", FORWARD), ("Forward + backward", BOTH)):
    panels[title] = {}
    for name in CURVES:
      points = [
        (row["n"], figure(row, name, direction))
        for row in of_shape
        if figure(row, name, direction) is not None
      ]
      if points:
        panels[title][next(row["labels"][name] for row in of_shape if name in row["labels"])] = (
          points
        )
  return panels


def draw(path: str, record: dict) -> None:
  """Writes the picture: time against length."""
  row = record["rows"][0]
  panels = {
    title: {PICTURE_NAMES.get(label, label): points for label, points in lines.items()}
    for title, lines in curves(record["rows"]).items()
  }
  plots.save_times(path, panels, f"{record['device']}, {shape_text(row)} {budget_text(row)}")


def lines(record: dict) -> list[str]:
  """Returns the whole record as text, the summary last."""
  text = [
    f"{record['device']}, JAX {record['versions']['packages']['jax']}, "
    f"{budget_text(record['rows'][0])}: medians of {record['rounds']} rounds, "
    "forward / forward + backward; MiB: arguments, outputs and temporaries, forward + backward",
    *table(record["rows"]),
    "",
  ]
  shape = None
  for line in record["summary"]:
    if line["shape"] != shape:
      shape = line["shape"]
      text.append(f"{shape}, forward + backward:")
    value = line["value"]
    shown = (
      str(value)
      if isinstance(value, int)
      else f"{value:.2e}"
      if "error" in line["what"]
      else number(value)
    )
    text.append(f"  {line['what']}: {shown}")
  return text
