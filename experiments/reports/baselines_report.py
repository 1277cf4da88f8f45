"""Tables of a record of experiments/recipes/baselines.py.

They compare kinds of attention at the same budget of keys per query.
"""

import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence

from sparsek.runs.metrics import read_metrics

Runs = Mapping[str, Mapping]  # name -> {"flags": [...], "seeds": {seed: what `describe` returns}}
# 97.5 % quantiles of Student's t distribution, by degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def describe(folder: str) -> dict:
  """Returns the results of a run.

  They are the held-out loss by step, of the kind of data it was trained on; the loss of text by
  position, in rows of each length; right answers; and statistics of its selection at the end.
  """
  lines = lambda name: read_metrics(os.path.join(folder, name))
  evaluated = {str(line["data"]["seq_len"]): line for line in lines("evaluation.jsonl")}
  asked, steps = lines("tasks.jsonl"), lines("metrics.jsonl")
  return {
    "mixed_loss": {
      str(line["step"]): line["heldout_loss"] for line in steps if "heldout_loss" in line
    },
    "loss": {
      length: {key: line[key] for key in ("loss", "num_targets", "buckets")}
      for length, line in evaluated.items()
    },
    "tasks": [
      {key: row[key] for key in ("task", "length", "right", "total")}
      for row in asked[-1]["results"]
    ]
    if asked
    else [],
    "selection": {
      key: value
      for key, value in [line for line in steps if "loss" in line][-1].items()
      if key.startswith("layer_")
    },
  }


def losses(run: Mapping, length: str | None = None) -> dict[str, float]:
  """Returns seed -> held-out loss of text in rows of `length` tokens; None: of the shortest rows.

  "mixed" gives the loss of held-out data of the training mix, answers among them.
  """
  if length == "mixed":
    return {
      str(seed): list(result["mixed_loss"].values())[-1]
      for seed, result in run["seeds"].items()
      if result["mixed_loss"]
    }
  return {
    str(seed): result["loss"][length or min(result["loss"], key=int)]["loss"]
    for seed, result in run["seeds"].items()
    if result["loss"] and (length is None or length in result["loss"])
  }


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
  """Returns the mean and its standard error; nan where there are too few values."""
  values = list(values)
  error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
  return (statistics.fmean(values) if values else math.nan), error


def interval(mean: float, error: float, count: int) -> tuple[float, float]:
  """Returns the 95 % t interval of a mean of `count` values with this standard error."""
  spread = T_QUANTILES[count - 2] * error if count > 1 else math.nan
  return mean - spread, mean + spread


def groups(runs: Mapping[str, Mapping]) -> dict[str, list[Mapping]]:
  """Groups runs that differ in the seed alone, by the name without it."""
  result: dict[str, list[Mapping]] = {}
  for name, run in runs.items():
    result.setdefault(re.sub(r"_s\d+$", "", name), []).append(run)
  return result


def difference(run: Mapping, other: Mapping, length: str | None = None) -> tuple[float, float]:
  """Returns the mean of loss(run) - loss(other) over the seeds that both have, and its error.

  Runs of a seed share their start and the order of their data.
  """
  here, there = losses(run, length), losses(other, length)
  return mean_and_error([here[seed] - there[seed] for seed in sorted(set(here) & set(there))])


def pool(rounds: Sequence[Runs]) -> Runs:
  """Joins the runs of several records: a seed of each round becomes "round.seed"."""
  names = dict.fromkeys(name for runs in rounds for name in runs)
  return {
    name: {
      "seeds": {
        f"{i}.{seed}": result
        for i, runs in enumerate(rounds)
        for seed, result in runs.get(name, {"seeds": {}})["seeds"].items()
      }
    }
    for name in names
  }


def differences(runs: Runs, name: str) -> str:
  """Returns a table in Markdown: the loss of a kind minus that of each other one of its budget.

  It is of text and of the mix, over the seeds that both have, with a 95 % t interval.
  """
  lines = [f"| {name} minus | text | starts | mix | starts |", "|---|---|---|---|---|"]
  for other in runs:
    if other != name and budget_of(other) in (budget_of(name), None):
      cells = [other]
      for length in (None, "mixed"):
        shared = set(losses(runs[name], length)) & set(losses(runs[other], length))
        mean, error = difference(runs[name], runs[other], length)
        cells += [with_interval(mean, error, len(shared)), str(len(shared))]
      lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def with_interval(mean: float, error: float, count: int) -> str:
  """Formats a mean and its 95 % t interval; empty where there is no value."""
  if math.isnan(mean):
    return ""
  low, high = interval(mean, error, count)
  return f"{mean:+.4f}" + ("" if math.isnan(low) else f" ({low:+.4f} to {high:+.4f})")


def by_start(runs: Runs) -> str:
  """Returns a table in Markdown of the share of the gap that each kind closes in each start.

  The gap is that between window and full attention, of the mix. Starts whose window was not run are
  left out.
  """
  full, starts = (
    losses(runs["full"], "mixed"),
    sorted({seed for run in runs.values() for seed in run["seeds"]}),
  )
  lines = ["| gap closed | " + " | ".join(starts) + " |", "|" + "---|" * (1 + len(starts))]
  for name, run in runs.items():
    here, window = (
      losses(run, "mixed"),
      losses(runs.get(f"window_{budget_of(name) or 512}", {"seeds": {}}), "mixed"),
    )
    closed = {
      seed: (window[seed] - here[seed]) / (window[seed] - full[seed])
      for seed in here
      if seed in full and seed in window
    }
    if closed:
      lines.append(
        f"| {name} | "
        + " | ".join(f"{closed[seed]:.0%}" if seed in closed else "" for seed in starts)
        + " |"
      )
  return "\n".join(lines)


def accuracies(run: Mapping) -> dict[tuple[str, int], float]:
  """Returns {(task, tokens): share of right answers, over all seeds}."""
  counts: dict[tuple[str, int], list[int]] = {}
  for result in run["seeds"].values():
    for row in result["tasks"]:
      count = counts.setdefault((row["task"], row["length"]), [0, 0])
      count[0] += row["right"]
      count[1] += row["total"]
  return {key: right / total for key, (right, total) in counts.items()}


def budget_of(name: str) -> int | None:
  """Reads the keys a query, the mean over layers, from a run's name; None: a layer sees all."""
  return (
    None
    if name.startswith(("full", "hybrid"))
    else next(int(part) for part in name.split("_") if part.isdecimal())
  )


def table(runs: Runs) -> str:
  """Returns a table in Markdown: loss of text and of the training mix, and right answers.

  Each loss is also given minus full attention's, minus the sliding window's of the same budget, and
  as a share of the gap between these two.
  """
  tasks = list(dict.fromkeys(key for run in runs.values() for key in accuracies(run)))
  columns = "minus full attention's | minus the window's | gap closed"
  lines = [
    f"| attention | runs | text | {columns} | mix | {columns} | "
    + " | ".join(f"{task} {length}" for task, length in tasks)
    + " |",
    "|" + "---|" * (10 + len(tasks)),
  ]
  for name in sorted(
    runs,
    key=lambda name: (
      budget_of(name) or 0,
      mean_and_error(losses(runs[name], "mixed").values())[0],
    ),
  ):
    run = runs[name]
    cells = [name, str(len(run["seeds"]))]
    window = runs.get(f"window_{budget_of(name) or 512}")
    for length in (None, "mixed"):
      less = difference(run, window, length) if window else (math.nan, math.nan)
      gap = difference(runs["full"], window, length)[0] if window else math.nan
      closed = round(less[0] / gap, 2) + 0.0  # -0 becomes 0
      above = difference(run, runs["full"], length) if name != "full" else (math.nan, math.nan)
      cells += [
        _cell("{:.4f}", *mean_and_error(losses(run, length).values())),
        _cell("{:+.4f}", *above),
        _cell("{:+.4f}", *less),
        _cell("{:.0%}", closed, math.nan),
      ]
    right = accuracies(run)
    lines.append(
      "| "
      + " | ".join(cells + [f"{right[key]:.0%}" if key in right else "" for key in tasks])
      + " |"
    )
  return "\n".join(lines)


def _cell(form: str, mean: float, error: float) -> str:
  """Formats a mean and its error; empty where they are not known."""
  return (
    "" if math.isnan(mean) else form.format(mean) + ("" if math.isnan(error) else f" ± {error:.4f}")
  )
