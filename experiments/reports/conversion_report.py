"""Differences between the stages of a record of experiments/recipes/smollm2_convert.py."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sparsek.evaluation.statistics import Comparison, holm, p_words, paired_t
from sparsek.experiments.reports.baselines_report import (
  losses,
  over_documents,
  pairs,
  with_interval,
)

NAME = re.compile(r"(?P<kind>.+?)(_(?P<stage>warm|tuned|distilled|recall))?(_s(?P<seed>\d+))?")
Pair = tuple[str, str]  # names of stages, without a seed


class Difference(NamedTuple):
  """A loss minus another.

  Attributes:
    values: in each seed that both have.
    p_value: of a paired t test, corrected for all comparisons; None for fewer than two seeds.
    over_documents: of the means over these seeds; None where documents are not recorded.
  """

  values: list[float]
  p_value: float | None
  over_documents: Comparison | None

  def __str__(self) -> str:
    text = with_interval(self.values, "+.4f")
    text += "" if self.p_value is None else f", {p_words(self.p_value)}"
    over = self.over_documents
    return text + (f"; over documents {over.low:+.4f} to {over.high:+.4f}" if over else "")


def kind_and_stage(name: str) -> tuple[str, str]:
  """Returns the parts of a name: its kind of attention, and its stage, "" before any training."""
  match = NAME.fullmatch(name)
  assert match, name
  return match["kind"], match["stage"] or ""


def dense_of(name: str) -> str:
  """Returns the name of the dense model of the same stage; warm-ups are before any training."""
  stage = {"warm": "", "distilled": "tuned"}.get(kind_and_stage(name)[1], kind_and_stage(name)[1])
  return f"dense_{stage}" if stage else "dense"


def by_seed(runs: Mapping[str, Mapping]) -> dict[str, dict]:
  """Returns {name without the seed: the runs of all seeds as one of `baselines_report.Runs`}."""
  found: dict[str, dict] = {}
  for name, run in runs.items():
    match = NAME.fullmatch(name)
    assert match, name
    seeds = found.setdefault(re.sub(r"_s\d+$", "", name), {"seeds": {}})["seeds"]
    seeds[match["seed"] or "0"] = {"loss": {"0": run}, "tasks": run["tasks"]}
  return found


def differences(runs: Mapping[str, Mapping], asked: Sequence[Pair]) -> dict[Pair, Difference]:
  """Returns the loss of the first minus that of the second of each pair, seed by seed.

  A model before any training is the same for all seeds.

  Args:
    runs: of a record.
    asked: all comparisons that are made together; pairs without a common seed are left out.
  """
  of = by_seed(runs)

  def both(first: str, second: str) -> tuple[Mapping, Mapping]:
    here, there = of.get(first, {"seeds": {}}), of.get(second, {"seeds": {}})
    if not kind_and_stage(second)[1] and there["seeds"]:
      there = {"seeds": dict.fromkeys(here["seeds"], there["seeds"]["0"])}
    shared = {*losses(here)} & {*losses(there)}
    cut = lambda run: {"seeds": {seed: run["seeds"][seed] for seed in sorted(shared)}}
    return cut(here), cut(there)

  joined = {pair: both(*pair) for pair in asked}
  joined = {pair: runs for pair, runs in joined.items() if runs[0]["seeds"]}
  tested = {
    pair: paired_t(*pairs(*runs)).p_value
    for pair, runs in joined.items()
    if len(runs[0]["seeds"]) > 1
  }
  corrected = dict(zip(tested, holm([*tested.values()])))
  return {
    pair: Difference(
      [here - there for here, there in zip(*pairs(*runs))],
      corrected.get(pair),
      over_documents(*runs),
    )
    for pair, runs in joined.items()
  }


def about(made: Mapping[Pair, Difference]) -> str:
  """Returns what intervals and p values of `differences` are, and what the record lacks."""
  tests = sum(pair.p_value is not None for pair in made.values())
  text = (
    "In brackets 95 % t intervals over seeds; p of paired t tests, corrected (Holm) for these "
    f"{tests} comparisons."
  )
  numbers = sorted({pair.over_documents.number for pair in made.values() if pair.over_documents})
  if numbers:
    text += (
      f" Over documents: 95 %, by the bootstrap over {' or '.join(map(str, numbers))} of them."
    )
  if not all(pair.over_documents for pair in made.values()):
    text += " Where no interval is over documents, the record holds no loss of a document."
  return text
