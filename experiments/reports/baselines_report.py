"""Tables of a record of experiments/recipes/baselines.py.

They compare kinds of attention at the same budget of keys per query.
"""

import math
import os
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence

from sparsek.evaluation.statistics import (
  Comparison,
  Interval,
  holm,
  p_words,
  paired_bootstrap,
  paired_t,
  score_interval,
  t_interval,
)
from sparsek.runs.metrics import read_metrics

# What a record keeps of an evaluation and of a task; those of version 0.1 hold less.
FIGURES = ("loss", "num_targets", "buckets", "documents", "far_repeats")
ANSWERS = ("task", "length", "right", "total", "prompts")
Write = Callable[[float, str], str]
Runs = Mapping[str, Mapping]  # name -> {"flags": [...], "seeds": {seed: what `describe` returns}}


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
      length: {key: line[key] for key in FIGURES if key in line}
      for length, line in evaluated.items()
    },
    "tasks": [{key: row[key] for key in ANSWERS if key in row} for row in asked[-1]["results"]]
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


def groups(runs: Mapping[str, Mapping]) -> dict[str, list[Mapping]]:
  """Groups runs that differ in the seed alone, by the name without it."""
  result: dict[str, list[Mapping]] = {}
  for name, run in runs.items():
    result.setdefault(re.sub(r"_s\d+$", "", name), []).append(run)
  return result


def pairs(
  run: Mapping, other: Mapping, length: str | None = None
) -> tuple[list[float], list[float]]:
  """Returns the losses of both in the seeds that both have, in the same order.

  Runs of a seed share their start and the order of their data.
  """
  here, there = losses(run, length), losses(other, length)
  shared = sorted(set(here) & set(there))
  return [here[seed] for seed in shared], [there[seed] for seed in shared]


def minus(run: Mapping, other: Mapping, length: str | None = None) -> list[float]:
  """Returns loss(run) - loss(other) in each of the seeds that both have."""
  return [here - there for here, there in zip(*pairs(run, other, length))]


def difference(run: Mapping, other: Mapping, length: str | None = None) -> tuple[float, float]:
  """Returns the mean of `minus` and its standard error."""
  return mean_and_error(minus(run, other, length))


def documents(run: Mapping) -> tuple[dict[int, float], dict[int, int]] | None:
  """Returns the loss of text summed by document, the mean over seeds, and numbers of targets.

  The rows are the shortest. It is None where a seed has no such figures.
  """
  results = [result["loss"] for result in run["seeds"].values() if result["loss"]]
  found = [loss[min(loss, key=int)].get("documents") for loss in results]
  if not found or None in found:
    return None
  counts = dict(zip(found[0]["index"], found[0]["num_targets"]))
  sums = dict.fromkeys(counts, 0.0)
  for of in found:
    if dict(zip(of["index"], of["num_targets"])) != counts:
      return None
    for i, loss in zip(of["index"], of["loss_sum"]):
      sums[i] += loss / len(found)
  return sums, counts


def over_documents(run: Mapping, other: Mapping) -> Comparison | None:
  """Returns the loss of text of one run minus another's, over the same documents; None: unknown."""
  here, there = documents(run), documents(other)
  if here is None or there is None or here[1] != there[1] or len(here[1]) < 2:
    return None
  (sums, counts), (others, _) = here, there
  return paired_bootstrap(list(sums.values()), [others[i] for i in sums], list(counts.values()))


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


def differences(runs: Runs, names: Sequence[str]) -> list[str]:
  """Returns tables in Markdown: the loss of each kind minus that of each other one of its budget.

  It is of text and of the mix, over the seeds that both have, with a 95 % t interval and a p value
  that is corrected for all comparisons here; of text over documents, too, where records hold them.
  """
  rivals = {
    name: [x for x in runs if x != name and budget_of(x) in (budget_of(name), None)]
    for name in names
  }
  keys = [(name, x, length) for name in names for x in rivals[name] for length in (None, "mixed")]
  shared = {key: pairs(runs[key[0]], runs[key[1]], key[2]) for key in keys}
  # Two of the names are compared once, though two tables show it.
  compared = {
    _unordered(key): paired_t(*pair).p_value for key, pair in shared.items() if len(pair[0]) > 1
  }
  corrected = dict(zip(compared, holm([*compared.values()])))
  of_text = {key: over_documents(runs[key[0]], runs[key[1]]) for key in keys if key[2] is None}
  known = any(of_text.values())
  lines: list[str] = []
  for name in names:
    head = f"| {name} minus | text | starts | mix | starts |" + " text, over documents |" * known
    lines += [head, "|" + "---|" * (5 + known)]
    for other in rivals[name]:
      cells = [other]
      for length in (None, "mixed"):
        key = name, other, length
        text = with_interval([a - b for a, b in zip(*shared[key])], "+.4f")
        p_value = corrected.get(_unordered(key))
        text += "" if p_value is None else f", {p_words(p_value)}"
        cells += [text, str(len(shared[key][0]))]
      over = of_text[name, other, None]
      words = f"{over.low:+.4f} to {over.high:+.4f}" if over else "-"
      lines.append("| " + " | ".join(cells + [words] * known) + " |")
    lines.append("")
  return [*lines, *textwrap.wrap(_about(len(compared), known, of_text.values()), 100)]


def _unordered(key: tuple[str, str, str | None]) -> tuple[frozenset[str], str | None]:
  name, other, length = key
  return frozenset((name, other)), length


def _about(compared: int, known: bool, over: Iterable[Comparison | None]) -> str:
  """Returns what intervals and p values of `differences` are, and which records do not give."""
  text = (
    "In brackets 95 % t intervals over starts; p of paired t tests, corrected (Holm) for these "
    f"{compared} comparisons. A difference of one start has neither."
  )
  if not known:
    return f"{text} The records hold no loss of a document, so no interval is over documents."
  numbers = sorted({pair.number for pair in over if pair})
  text += f" Over documents: 95 %, by the bootstrap over {' or '.join(map(str, numbers))} of them"
  return f"{text}; -: the records hold no loss of a document."


def with_interval(values: Sequence[float], form: str = ".4f", write: Write = format) -> str:
  """Formats the mean over starts and its 95 % t interval; the mean alone of one, "" of none.

  Args:
    values: a figure of each start.
    form: of the numbers.
    write: (number, form) -> text.
  """
  if len(values) < 2:
    return "".join(write(value, form) for value in values)
  mean, low, high, _ = t_interval(values)
  return f"{write(mean, form)} ({write(low, form)} to {write(high, form)})"


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


def accuracy(run: Mapping, task: str, length: int) -> Interval | None:
  """Returns the share of right answers, with Wilson's interval over distinct prompts.

  Seeds that were asked the same prompts add none. It is None where the task was not asked, or a
  record does not tell prompts apart.
  """
  rows = [
    row
    for result in run["seeds"].values()
    for row in result["tasks"]
    if (row["task"], row["length"]) == (task, length)
  ]
  if not rows or any("prompts" not in row for row in rows):
    return None
  prompts = {prompt for row in rows for prompt in row["prompts"]["prompt"]}
  return score_interval(accuracies(run)[task, length], len(prompts))


def answers_by_start(runs: Runs, base: str) -> list[str]:
  """Returns a table in Markdown of right answers to all tasks of all lengths.

  Kinds with the most more answers than `base`, a start in the mean, come first.
  """
  right = {
    name: {
      seed: sum(of["right"] for of in result["tasks"]) for seed, result in run["seeds"].items()
    }
    for name, run in runs.items()
  }
  starts, asked = list(right[base]), runs[base]["seeds"]
  total = sum(of["total"] for of in asked[starts[0]]["tasks"])
  more = {
    name: statistics.fmean(number - right[base][start] for start, number in of.items())
    for name, of in right.items()
  }
  head = [f"right answers of {total}", *(f"start {i}" for i in range(len(starts)))]
  return [
    "| " + " | ".join([*head, f"minus {base}"]) + " |",
    "|" + "---|" * (len(head) + 1),
    *(
      "| "
      + " | ".join([name, *(str(right[name].get(x, "-")) for x in starts), f"{more[name]:+.1f}"])
      + " |"
      for name in sorted(more, key=more.__getitem__, reverse=True)
    ),
  ]


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
  as a share of the gap between these two. In brackets are 95 % t intervals over seeds, not
  corrected for the number of comparisons.
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
      less = minus(run, window, length) if window else []
      gap = difference(runs["full"], window, length)[0] if window else math.nan
      closed = round(mean_and_error(less)[0] / gap, 2) + 0.0  # -0 becomes 0
      cells += [
        with_interval([*losses(run, length).values()]),
        with_interval(minus(run, runs["full"], length), "+.4f") if name != "full" else "",
        with_interval(less, "+.4f"),
        "" if math.isnan(closed) else f"{closed:.0%}",
      ]
    right = accuracies(run)
    lines.append(
      "| "
      + " | ".join(cells + [f"{right[key]:.0%}" if key in right else "" for key in tasks])
      + " |"
    )
  return "\n".join(lines)
