"""Sentences of the documents and the figures that the records give for them.

In a sentence {} stands for a figure. The functions return the figures, in the unit of the document
and in the order of the sentence.
"""

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sparsek.experiments.bench.attention_report import figure
from sparsek.experiments.reports import baselines_report, records, results_sections
from sparsek.experiments.reports import results_tables as tables
from sparsek.experiments.reports.baselines_report import (
  accuracies,
  difference,
  losses,
  mean_and_error,
)

README, MAP, RECIPES = "README.md", "docs/attention-map.md", "experiments/recipes/"
load = functools.cache(records.load)


class Claim(NamedTuple):
  """A sentence of a document, and the function that returns its figures."""

  document: str
  sentence: str
  figures: Callable[[], Sequence[float]]


class Table(NamedTuple):
  """A table of a document, and the function that returns its lines."""

  document: str
  name: str
  lines: Callable[[], Sequence[str]]


def runs(name: str) -> baselines_report.Runs:
  return load(name)["runs"]


def pooled() -> baselines_report.Runs:
  return baselines_report.pool([runs("baselines.json"), runs("baselines_first.json")])


def above_full(record: str, name: str, length: str | None = None) -> float:
  return difference(runs(record)[name], runs(record)["full"], length)[0]


def ahead(of: baselines_report.Runs, name: str, other: str, length: str | None) -> list[float]:
  """Returns how far a run is ahead of another one, and the standard error."""
  mean, error = difference(of[other], of[name], length)
  return [mean, error]


def closed_by_start(name: str) -> list[float]:
  """Returns the per cent of the gap, with answers, that a run closes in each start, sorted."""
  of = pooled()
  window = of[f"window_{baselines_report.budget_of(name) or 512}"]
  here, there, full = (losses(run, "mixed") for run in (of[name], window, of["full"]))
  return sorted(100 * (there[s] - here[s]) / (there[s] - full[s]) for s in here if s in there)


def mean(run: dict, length: str | None) -> float:
  return mean_and_error(losses(run, length).values())[0]


def right(record: str, name: str, task: str, length: int) -> float:
  return 100 * accuracies(runs(record)[name])[task, length]


def speed(record: str, index: int = 0, kind: str = "sparsek") -> float:
  return load(record)["rows"][index]["rivals"][kind]["tokens_per_second"]


def many_devices(case: str, figure: str = "tokens_per_second") -> list[float]:
  """Returns a figure under the second mesh of a case over that under the first, of each kind."""
  rows = load("many_devices_h200.json")["rows"]
  ratios = []
  for kind in ("sparsek", "sliding_window", "full"):
    one, two = (row[figure] for row in rows if (row["case"], row["kind"]) == (case, kind))
    ratios.append(two / one)
  return ratios


def longest_row(mesh: str) -> int:
  """Returns the tokens of the longest row that fitted."""
  rows = load("longest_row_h200.json")["rows"]
  return max(row["n"] for row in rows if row["mesh"] == mesh and "failed" not in row)


def million() -> list[float]:
  """Returns the seconds of a step with a row of a million tokens, and its GiB a device."""
  (row,) = (row for row in load("many_devices_h200.json")["rows"] if row["case"] == "million")
  return [row["ms"] / 1e3, row["mib"] / 1024]


def attention_times(n: int, record: str) -> list[float]:
  """Returns the milliseconds of SPARSEK, of the sliding window and of dense attention."""
  row = tables.headline_rows(load(record))[n]
  return [figure(row, kind) for kind in ("sparsek", "sliding_window", "dense")]


def last_step() -> dict:
  return load("train_h100_run.jsonl")[-1]


def decoding() -> list[float]:
  """Returns ms a token after 8192 and 1048576 tokens, MiB of cache, ms of full attention."""
  rows = {
    row["n"]: row["rivals"]
    for row in load("decode_h100.json")["rows"]
    if row["what"] == "decode" and row["batch_size"] == 1
  }
  short, long = rows[8192], rows[1048576]
  cache = long["sparsek"]["cache_bytes"] / 2**20
  return [short["sparsek"]["ms"], long["sparsek"]["ms"], cache, short["full"]["ms"]]


def growth() -> list[float]:
  """Returns the time of the longer row over that of the shorter one, on a CPU."""
  short, long = load("linear_cpu.json")["rows"]
  return [figure(long, "sparsek") / figure(short, "sparsek")]


def long_decode(what: str) -> list[float]:
  ways = load("long_decode.json")["difference over standard deviation of logits"].values()
  return [100 * way[what] for way in ways]


def extremes(*columns: str) -> list[float]:
  rows = load("attention_tpu_compiled.json")["rows"]
  return [pick(row[name] for row in rows) for name in columns for pick in (min, max)]


def rise(kind: str, stage: str = "tuned") -> float:
  """Returns the per cent of perplexity above the dense model's of the same stage."""
  record = load("smollm2_convert.json")
  return 100 * math.expm1(tables.conversion_rise(record, kind, stage)[0])


def recalled(task: str, length: int) -> float:
  record = load("smollm2_convert.json")
  return 100 * tables.conversion_answers(record, "sparsek", task, length)


def ruler() -> list[float]:
  """Returns the means of all tasks of RULER at 8192 tokens: SPARSEK's, the dense model's."""
  by_run = load("ruler_smollm2_h200.json")["runs"]
  scores = lambda kind: [
    row["score"]
    for row in by_run[f"runs/smollm2_convert/{kind}_tuned"]["results"]
    if row["length"] == 8192
  ]
  return [statistics.mean(scores(kind)) for kind in ("sparsek", "dense")]


def perplexity_error() -> list[float]:
  record = load("smollm2_convert.json")
  kinds = [kind for _, kind in tables.CONVERSION_SHORT if kind != "dense"]
  rises = [tables.conversion_rise(record, kind, "tuned") for kind in kinds]
  return [max(math.exp(mean) * error for mean, error in rises)]


def reach() -> list[float]:
  record = load("smollm2_reach.json")
  rises = record["rises"]
  most = sorted(range(len(rises)), key=lambda layer: -rises[layer])[:6]
  total = sum(max(x, 0) for x in rises)
  return [*sorted(most), 100 * sum(rises[layer] for layer in most) / total, 128, 2048]


def bytes_from_scratch() -> list[float]:
  def kind(name):
    of_kind = [
      list(cell["heldout_loss"].values())[-1]
      for cell in load("scorer_bytes.json")["cells"]
      if cell["cell"].startswith(name) and cell["grid"] == "plain"
    ]
    return mean_and_error(of_kind)

  random, learned = kind("random"), kind("sparsek")
  return [random[0], learned[0], statistics.fmean([random[1], learned[1]])]


def gap_sentence() -> list[float]:
  """Returns the per cent of the gap closed: least and most without the worst start, the worst."""
  worst, *others = closed_by_start("sparsek_512_last")
  return [others[0], others[-1], worst]


def local() -> baselines_report.Runs:
  return runs("baselines_local.json")


def gaps() -> list[float]:
  """Returns the per cent of the gap that SPARSEK in the last layer closes, then the window."""
  kinds = ("sparsek_512_last", "window_512_last")
  of = runs("baselines.json")
  return [100 * results_sections.gap_closed(of, k, n) for k in kinds for n in (None, "mixed")]


def documents_and_prompts() -> list[float]:
  """Returns the numbers of held-out documents and prompts of the kinds of attention compared."""
  (tasks,) = (result["tasks"] for result in [runs("baselines.json")["full"]["seeds"]["0"]])
  totals = {row["total"] for row in tasks if row["task"] == "needle"}
  return [len(load("baselines_text.json")["heldout"]), *totals]


def converted_documents_and_prompts() -> list[float]:
  """Returns those of the conversion, whose text is that of experiments/recipes/long_documents."""
  tasks = load("smollm2_convert.json")["runs"]["sparsek_recall"]["tasks"]
  return [len(load("long_documents.json")["heldout"]), *{row["total"] for row in tasks}]


def recalled_by(kind: str) -> float:
  """Returns the per cent of needles that a kind finds after the training for recall."""
  return 100 * tables.conversion_answers(load("smollm2_convert.json"), kind, "needle", 8192)
