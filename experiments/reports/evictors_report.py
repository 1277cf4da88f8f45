"""Tables of a record of experiments/recipes/qwen_convert.py, and what of its goals is reached."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from sparsek.errors import UsageError
from sparsek.evaluation.statistics import (
  Comparison,
  holm,
  p_words,
  paired_bootstrap,
  score_interval,
)
from sparsek.experiments.reports import conversion_report
from sparsek.experiments.reports.conversion_report import kind_and_stage
from sparsek.experiments.reports.results_tables import markdown

SCORED = ("sparsek", "kvzap")  # kinds whose scorers are warmed up
NEEDLES = ("niah_single_1", "niah_single_2", "niah_single_3")
OURS, DENSE = "sparsek", "dense"
Runs = Mapping[str, Mapping]
Scores = dict[tuple[str, str], float]  # (task, hash of the prompt) -> mean score over seeds


class Goal(NamedTuple):
  """A figure that the protocol judges.

  Attributes:
    what: it is.
    value: None where the record lacks it.
    must, aim: bounds.
    at_least: whether they are lower bounds.
    also: whether a further condition holds.
    note: on the figure.
  """

  what: str
  value: float | None
  must: float
  aim: float
  at_least: bool = False
  also: bool = True
  note: str = ""

  @property
  def verdict(self) -> str:
    """Returns "missing", "failed", "reached", or "reached, and the aim too"."""
    if self.value is None:
      return "missing"
    holds = lambda bound: self.value >= bound if self.at_least else self.value <= bound
    if not (holds(self.must) and self.also):
      return "failed"
    return "reached, and the aim too" if holds(self.aim) else "reached"


def untrained(kind: str) -> str:
  """Returns the name of a kind's run whose model learned nothing."""
  return f"{kind}_warm" if kind in SCORED else kind


def is_shown(name: str) -> bool:
  """Returns whether a run is one that tables show: those tuned, and one before for each kind."""
  kind, stage = kind_and_stage(name)
  return stage == "tuned" or name == untrained(kind)


def seeds_of(runs: Runs, kind: str, tuned: bool) -> list[Mapping]:
  """Returns the runs of a kind, one of each seed."""
  first = f"{kind}_tuned" if tuned else untrained(kind)
  return [run for name, run in runs.items() if name == first or name.startswith(f"{first}_s")]


def kinds_of(runs: Runs) -> list[str]:
  """Returns the kinds, dense and SPARSEK first."""
  found = dict.fromkeys(kind_and_stage(name)[0] for name in runs)
  return sorted(found, key=lambda kind: (kind != DENSE, kind != OURS))


def scores(group: Sequence[Mapping], tasks: Sequence[str] = ()) -> Scores:
  """Returns the score of each prompt in percent, the mean over the runs that were asked.

  Args:
    group: runs of a kind.
    tasks: those that count; none for all.
  Raises:
    UsageError: where runs were asked different prompts.
  """
  asked = [
    {
      (row["task"], row["sha256"]): row["score"]
      for row in run["answers"]
      if not tasks or row["task"] in tasks
    }
    for run in group
    if "answers" in run
  ]
  if any(set(one) != set(asked[0]) for one in asked):
    raise UsageError("the record holds runs that were asked different prompts")
  return {key: statistics.fmean(one[key] for one in asked) for key in (asked[0] if asked else ())}


def by_task(of: Scores) -> dict[str, float]:
  """Returns the mean score of each task."""
  tasks = dict.fromkeys(task for task, _ in of)
  return {
    task: statistics.fmean(score for (name, _), score in of.items() if name == task)
    for task in tasks
  }


def mean_of_tasks(of: Scores) -> float | None:
  """Returns the mean of the tasks' means; None where nothing was asked."""
  return statistics.fmean(by_task(of).values()) if of else None


def passed(group: Sequence[Mapping]) -> dict[str, float]:
  """Returns the share of runs that solved each problem of HumanEval, in percent."""
  asked = [
    {row["problem"]: 100.0 * row["passed"] for row in run["humaneval"]["answers"]}
    for run in group
    if "humaneval" in run
  ]
  return {key: statistics.fmean(one[key] for one in asked) for key in (asked[0] if asked else ())}


def compare(first: Mapping, second: Mapping) -> Comparison | None:
  """Returns the mean of scores of some prompts minus another's; None where one has none.

  Raises:
    UsageError: where these are of different prompts.
  """
  if not first or not second:
    return None
  if set(first) != set(second):
    raise UsageError("the record holds runs that were asked different prompts")
  return paired_bootstrap([*first.values()], [second[key] for key in first], [1] * len(first))


def rises(runs: Runs) -> dict[conversion_report.Pair, conversion_report.Difference]:
  """Returns the loss of each kind and stage above the dense model's."""
  asked = {name: {**run, "tasks": []} for name, run in runs.items()}
  names = [of for kind in kinds_of(runs) if kind != DENSE for of in (untrained(kind), _tuned(kind))]
  return conversion_report.differences(
    asked, [(name, conversion_report.dense_of(name)) for name in names]
  )


def _tuned(kind: str) -> str:
  return f"{kind}_tuned"


def best_evictor(runs: Runs) -> str | None:
  """Returns the kind, neither dense nor SPARSEK, with the highest mean of tasks after tuning."""
  means = {
    kind: mean
    for kind in kinds_of(runs)
    if kind not in (DENSE, OURS)
    and (mean := mean_of_tasks(scores(seeds_of(runs, kind, True)))) is not None
  }
  return max(means, key=means.__getitem__) if means else None


def speed(record: Mapping) -> dict[str, float]:
  """Returns the milliseconds of a token by kind."""
  timed = {"sparsek": OURS, "full": DENSE}
  return {
    timed[name]: result["ms"]
    for row in record["speed"]
    for name, result in row["rivals"].items()
    if name in timed and "ms" in result
  }


def _both(
  figures: Mapping[str, float | None], made: Callable[[float, float], float | None]
) -> float | None:
  """Returns what is made of SPARSEK's figure and the dense model's; None where one is missing."""
  ours, dense = figures.get(OURS), figures.get(DENSE)
  return None if ours is None or dense is None else made(ours, dense)


def goals(record: Mapping) -> list[Goal]:
  """Returns what the protocol judges, in its order."""
  runs = record["runs"]
  of = {kind: seeds_of(runs, kind, True) for kind in (OURS, DENSE)}
  ours, dense = of.values()
  rise = rises(runs).get((_tuned(OURS), _tuned(DENSE)))
  needles = {kind: mean_of_tasks(scores(of[kind], NEEDLES)) for kind in of}
  means = {kind: mean_of_tasks(scores(of[kind])) for kind in of}
  best = best_evictor(runs)
  ahead = compare(scores(ours), scores(seeds_of(runs, best, True))) if best else None
  code = compare(passed(dense), passed(ours))
  minus, over = lambda x, y: y - x, lambda x, y: x / y if y else None
  sizes = {kind: group[0]["cache_bytes"] for kind, group in of.items() if group}
  ratio = lambda key: _both({kind: size[key] for kind, size in sizes.items()}, over)
  extra = ratio("all")
  return [
    Goal(
      "perplexity over dense's",
      math.exp(statistics.fmean(rise.values)) if rise else None,
      *(1.015, 1.007),
    ),
    Goal("single needles over dense's", _both(needles, over), 0.95, 1.0, at_least=True),
    Goal("mean of tasks, points below dense", _both(means, minus), 20.0, 8.0),
    Goal(
      "... points above the best evictor",
      ahead.difference if ahead else None,
      *(3.0, 10.0, True),
      also=ahead is not None and ahead.low > 0,
      note=f"{best}: {ahead.low:+.1f} to {ahead.high:+.1f}" if ahead else "",
    ),
    Goal("HumanEval, points below dense", code.difference if code else None, 2.0, 0.0),
    Goal(
      "bytes of keys and values over dense's",
      ratio("keys_and_values"),
      *(1 / 16, 1 / 16),
      note=f"with scores and positions {extra:.4f}" if extra else "",
    ),
    Goal("milliseconds a token over dense's", _both(speed(record), over), *(0.7, 0.5)),
  ]


def _number(value: float | None, form: str) -> str:
  return "-" if value is None else format(value, form)


def _with_interval(of: Mapping, form: str = ".1f") -> str:
  """Returns a share of HumanEval with its interval over problems, "-" where none was asked."""
  if not of:
    return "-"
  mean = statistics.fmean(of.values())
  _, low, high, _ = score_interval(mean / 100, len(of))
  return f"{mean:{form}} ({100 * low:.0f} to {100 * high:.0f})"


def quality(record: Mapping) -> list[str]:
  """Returns a table of losses, RULER and HumanEval by kind, without training and tuned."""
  runs, rows, above = record["runs"], [], rises(record["runs"])
  for tuned in (False, True):
    for kind in kinds_of(runs):
      group = seeds_of(runs, kind, tuned)
      if not group:
        continue
      name = _tuned(kind) if tuned else untrained(kind)
      rise = above.get((name, conversion_report.dense_of(name)))
      ratio = math.exp(statistics.fmean(rise.values)) if rise else None
      rows.append(
        [
          kind,
          f"tuned, {len(group)} seeds" if tuned else "none",
          _number(statistics.fmean(run["loss"] for run in group), ".4f"),
          "1" if kind == DENSE else _number(ratio, ".4f"),
          _number(mean_of_tasks(scores(group, NEEDLES)), ".1f"),
          _number(mean_of_tasks(scores(group)), ".1f"),
          _with_interval(passed(group)),
        ]
      )
  head = ("attention", "training", "loss", "perplexity over dense's", "single needles")
  return markdown([*head, "mean of tasks", "HumanEval"], rows)


def tasks(record: Mapping) -> list[str]:
  """Returns a table of the tasks of RULER by kind after tuning."""
  runs = record["runs"]
  of = {kind: by_task(scores(seeds_of(runs, kind, True))) for kind in kinds_of(runs)}
  asked = {kind: means for kind, means in of.items() if means}
  names = dict.fromkeys(task for means in asked.values() for task in means)
  rows = [[task, *(f"{means[task]:.1f}" for means in asked.values())] for task in names]
  return markdown(["task", *asked], rows) if asked else []


def differences(record: Mapping) -> list[str]:
  """Returns SPARSEK minus each other kind after tuning: all tasks, needles, HumanEval."""
  runs = record["runs"]
  ours, rows = seeds_of(runs, OURS, True), []
  made: dict[tuple[str, int], Comparison] = {}
  figures: tuple[Callable[[Sequence[Mapping]], Mapping], ...] = (
    scores,
    lambda group: scores(group, NEEDLES),
    passed,
  )
  for kind in kinds_of(runs):
    other = seeds_of(runs, kind, True)
    for column, of in enumerate(figures):
      difference = None if kind == OURS else compare(of(ours), of(other))
      if difference:
        made[kind, column] = difference
  corrected = dict(zip(made, holm([one.p_value for one in made.values()])))
  cell = lambda key: (
    f"{made[key].difference:+.1f} ({made[key].low:+.1f} to {made[key].high:+.1f}), "
    f"{p_words(corrected[key])}"
    if key in made
    else "-"
  )
  for kind in dict.fromkeys(kind for kind, _ in made):
    rows.append([kind, *(cell((kind, column)) for column in range(3))])
  head = ("SPARSEK minus", "mean of tasks", "single needles", "HumanEval")
  return markdown(head, rows) if rows else []


def costs(record: Mapping) -> list[str]:
  """Returns a table of bytes of the cache, and milliseconds of a token where they were timed."""
  runs, context = record["runs"], record["protocol"]["context"]
  sizes = {
    kind: group[0]["cache_bytes"]
    for kind in kinds_of(runs)
    if (group := seeds_of(runs, kind, True) or seeds_of(runs, kind, False))
  }
  milliseconds = speed(record)
  most = sizes.get(DENSE, {}).get("all")
  rows = [
    [
      kind,
      f"{size['all'] / 2**20:.1f}",
      _number(size["all"] / most if most else None, ".4f"),
      _number(milliseconds.get(kind), ".2f"),
    ]
    for kind, size in sizes.items()
  ]
  return markdown([f"after {context} tokens", "cache, MiB", "over dense's", "ms a token"], rows)


def judged(record: Mapping) -> list[str]:
  """Returns a table of the goals."""
  rows = [
    [
      goal.what,
      _number(goal.value, ".4f") + f" ({goal.note})" * bool(goal.note),
      f"at {'least' if goal.at_least else 'most'} {goal.must:g}",
      f"{goal.aim:g}",
      goal.verdict,
    ]
    for goal in goals(record)
  ]
  return markdown(["SPARSEK after tuning", "figure", "must", "aim", ""], rows)


ABOUT = (
  "Brackets: of HumanEval 95 % intervals over problems, of differences 95 % bootstrap intervals",
  "over prompts of the mean over seeds; p values are corrected (Holm) for all of that table.",
)


def lines(record: Mapping) -> list[str]:
  """Returns all tables of a record."""
  page: list[str] = []
  for table in (quality, tasks, differences, costs, judged):
    if made := table(record):
      page += [*made, ""]
  return [*page, *ABOUT]
