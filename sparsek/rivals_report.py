"""The record of experiments/recipes/rivals.py as a table and a picture: kinds of attention at the same budget of keys per query."""

import math
import statistics
from collections.abc import Mapping, Sequence

Runs = Mapping[str, Mapping]                     # name -> {"flags": [...], "seeds": {seed: {"loss": {tokens of a row: {"loss", "buckets"}}, "tasks": [...]}}}


def losses(run: Mapping, length: str | None = None) -> dict[str, float]:
  """Seed -> held-out loss in rows of `length` tokens; None: of the shortest rows."""
  found = {}
  for seed, result in run["seeds"].items():
    by_length = {str(tokens): value for tokens, value in result["loss"].items()}
    if by_length and (length is None or length in by_length):
      found[str(seed)] = by_length[length or min(by_length, key=int)]["loss"]
  return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
  """The mean and its standard error; nan for the error of a single value."""
  values = list(values)
  return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def difference(run: Mapping, other: Mapping, length: str | None = None) -> tuple[float, float]:
  """Mean of loss(run) - loss(other) over the seeds that both have, and its standard error: runs of a seed share their start and the order of their data."""
  here, there = losses(run, length), losses(other, length)
  shared = sorted(set(here) & set(there))
  return mean_and_error([here[seed] - there[seed] for seed in shared]) if shared else (math.nan, math.nan)


def accuracies(run: Mapping) -> dict[tuple[str, int], float]:
  """(task, tokens) -> share of right answers, over all seeds."""
  counts: dict[tuple[str, int], list[int]] = {}
  for result in run["seeds"].values():
    for row in result["tasks"]:
      count = counts.setdefault((row["task"], row["length"]), [0, 0])
      count[0] += row["right"]
      count[1] += row["total"]
  return {key: right / total for key, (right, total) in counts.items()}


def budget_of(name: str) -> int | None:
  """Keys a query, from a run's name; None: all, in all layers or in some."""
  return next((int(part) for part in name.split("_") if part.isdecimal()), None)


def table(runs: Runs) -> str:
  """In Markdown: held-out loss, its difference from the sliding window of the same budget, the share of the gap to full attention that closes, tasks."""
  tasks = list(dict.fromkeys(key for run in runs.values() for key in accuracies(run)))
  lines = ["| attention | runs | loss | minus the window's | gap closed | " + " | ".join(f"{task} {length}" for task, length in tasks) + " |",
           "|" + "---|" * (5 + len(tasks))]
  for name, run in runs.items():
    mean, error = mean_and_error(list(losses(run).values()))
    window = runs.get(f"window_{budget_of(name) or 512}")
    less, less_error = difference(run, window) if window else (math.nan, math.nan)
    gap = difference(runs["full"], window)[0] if window and "full" in runs else math.nan
    right = accuracies(run)
    lines.append(f"| {name} | {len(run['seeds'])} | {mean:.4f} ± {error:.4f} | {less:+.4f} ± {less_error:.4f} | {less / gap if gap else math.nan:.0%} | "
                 + " | ".join(f"{right[key]:.0%}" if key in right else "" for key in tasks) + " |")
  return "\n".join(lines)
