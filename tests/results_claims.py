"""Sentences of the documents and the figures that the records give for them.

In a sentence {} stands for a figure. The functions return the figures, in the unit of the document
and in the order of the sentence.
"""

import functools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from experiments.bench.attention_report import break_even, figure
from experiments.reports import baselines_report, records
from experiments.reports import results_sections as sections
from experiments.reports import results_tables as tables
from experiments.reports.baselines_report import accuracies, difference, losses, mean_and_error

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


def both_ahead(of: Callable, pairs: Iterable[tuple[str, str]], length: str | None) -> list[float]:
  return [x for name, other in pairs for x in ahead(of(), name, other, length)]


def closed(of: baselines_report.Runs, name: str, length: str | None) -> float:
  """Returns the per cent of the gap between window and full attention that a run closes."""
  window = of[f"window_{baselines_report.budget_of(name) or 512}"]
  gap = difference(of["full"], window, length)[0]
  return 100 * difference(of[name], window, length)[0] / gap


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


def cells(record: str, kind: str, **settings: int) -> list[float]:
  """Returns the mean and the standard error of the cells of a grid."""
  parts = [kind, *(f"{name[0]}{value}" for name, value in settings.items())]
  values = [
    list(cell["heldout_loss"].values())[-1]
    for cell in load(record)["cells"]
    if cell["cell"].startswith("-".join(parts) + "-")
  ]
  return list(mean_and_error(values))


grid = functools.partial(cells, "baselines_grid.json")
letters = functools.partial(cells, "scorer_letters.json")


def best_random() -> list[float]:
  return min(grid("random", k=k, window=512 - k) for k in (128, 256, 384))


def speeds(record: str, kind: str, of: str) -> list[float]:
  """Returns the tokens per second of a kind over those of another one, by row."""
  rows = [row["rivals"] for row in load(record)["rows"]]
  return [
    row[kind]["tokens_per_second"] / row[of]["tokens_per_second"]
    for row in rows
    if kind in row and of in row
  ]


def speed(record: str, index: int = 0) -> float:
  return load(record)["rows"][index]["rivals"]["sparsek"]["tokens_per_second"]


def times(row: dict, over: str, what: str = "ms") -> float:
  return figure(row, "sparsek", what=what) / figure(row, over, what=what)


def attention_row(n: int, **fields: object) -> dict:
  fields = {"scores": "normal", "heads": 16, "head_dim": 128, **fields}
  rows = load("attention_h100.json")["rows"]
  (row,) = [row for row in rows if {**row, **fields, "n": n} == row]
  return row


def attention_ratios() -> list[float]:
  rows = {n: attention_row(n) for n in (32768, 131072)}
  of_rows = [x for row in rows.values() for x in (times(row, "sliding_window"), dense(row))]
  headline = tables.headline_rows(load("attention_h100.json")).items()
  points = [(n, figure(row, "sparsek"), figure(row, "dense")) for n, row in headline]
  ahead_from, _ = break_even(points)
  shapes = ({"heads": 32}, {"head_dim": 64}, {"scores": "rising"})
  other = [times(attention_row(32768, **shape), "sliding_window") for shape in shapes]
  return [*of_rows, times(rows[131072], "sliding_window", "mib"), ahead_from, *other]


def dense(row: dict) -> float:
  return figure(row, "dense") / figure(row, "sparsek")


def mfu() -> list[float]:
  return [100 * row["rivals"]["sparsek"]["mfu"] for row in load("train_h100.json")["rows"]]


def trace(*names: str) -> list[float]:
  """Returns the per cent that parts take of a step in the trace of a real run."""
  with open(f"{records.FOLDER}/train_h100_run.txt", encoding="utf-8") as file:
    text = file.read()
  return [float(re.search(rf"([\d.]+)%  {name}", text)[1]) for name in names]


def last_step() -> dict:
  return load("train_h100_run.jsonl")[-1]


def decode_rows(what: str) -> list[dict]:
  rows = [row for row in load("decode_h100.json")["rows"] if row["what"] == what]
  return [row for row in rows if row["batch_size"] == 1]


def prompts() -> list[float]:
  short, long = ({k: x["ms"] for k, x in r["rivals"].items()} for r in decode_rows("prefill"))
  ratio = long["full"] / long["sparsek"]
  return [long["sparsek"] / 1e3, ratio, short["sparsek"], short["full"]]


def weight_shares() -> list[float]:
  """Returns the per cent of a row's step that reading the weights would take, at least and most."""
  shares = [
    100 * row["weights_ms"] / row["rivals"]["sparsek"]["ms"] for row in decode_rows("decode")
  ]
  return [min(shares), max(shares)]


def growth() -> list[float]:
  """Returns the time and the memory of the longer row over those of the shorter one, on a CPU."""
  short, long = load("linear_cpu.json")["rows"]
  return [figure(long, "sparsek", what=x) / figure(short, "sparsek", what=x) for x in ("ms", "mib")]


def spread() -> list[float]:
  results = [row["rivals"].get("transformers", {}) for row in load("decode_h100.json")["rows"]]
  return [max(x["slowest"] / x["fastest"] for x in results if "fastest" in x)]


def long_decode(what: str) -> list[float]:
  ways = load("long_decode.json")["difference over standard deviation of logits"].values()
  return [100 * way[what] for way in ways]


def extremes(*columns: str) -> list[float]:
  rows = load("attention_tpu_compiled.json")["rows"]
  return [pick(row[name] for row in rows) for name in columns for pick in (min, max)]


def converted(kind: str, stage: str = "tuned") -> float:
  return tables.conversion_loss(load("smollm2_convert.json"), kind, stage)[0]


def rise(kind: str, stage: str = "tuned") -> float:
  """Returns the per cent of perplexity above the dense model's of the same stage."""
  record = load("smollm2_convert.json")
  return 100 * math.expm1(tables.conversion_rise(record, kind, stage)[0])


def gap_closed(of: str) -> float:
  start = converted(of)
  return 100 * (start - converted("sparsek")) / (start - converted("dense"))


def recalled(task: str, length: int) -> float:
  record = load("smollm2_convert.json")
  return 100 * tables.conversion_answers(record, "sparsek", task, length)


def conversion() -> list[float]:
  made = load("smollm2_convert.json")
  return [
    gap_closed("window"),
    gap_closed("sinks"),
    recalled("passkey", 8192),
    recalled("passkey", 16384),
    rise("hybrid"),
    made["runs"]["sparsek"]["loss"],
    made["runs"]["sparsek_distilled"]["loss"],
    converted("linear"),
    sum(made["minutes"].values()),
  ]


def conversion_error() -> list[float]:
  record = load("smollm2_convert.json")
  kinds = [kind for _, kind in tables.CONVERSION]
  stages = ("tuned", "recall")
  return [max(tables.conversion_loss(record, k, stage)[1] for k in kinds for stage in stages)]


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


def far(record: str, *names: str) -> list[float]:
  return [sections.loss_beyond(runs(record)[name]) for name in names]


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


def first_round() -> list[float]:
  of = runs("baselines_first.json")
  return [closed(of, "sparsek_512_last", length) for length in (None, "mixed")]


def gap_sentence() -> list[float]:
  name, of = "sparsek_512_last", pooled()
  worst, *others = closed_by_start(name)
  all_starts = [closed(of, name, length) for length in (None, "mixed")]
  last = min(closed_by_start("full_last"))
  return [*first_round(), *all_starts, others[0], others[-1], worst, last]


def gap_sentence_1024() -> list[float]:
  name, of = "sparsek_1024_last", pooled()
  _, *others = closed_by_start(name)
  return [*(closed(of, name, length) for length in (None, "mixed")), others[0], others[-1]]


def pairs(*names: str) -> list[tuple[str, str]]:
  """Returns the pairs of names such as "sparsek_512-window_512"."""
  return [tuple(name.split("-")) for name in names]


def local() -> baselines_report.Runs:
  return runs("baselines_local.json")


def defaults() -> list[float]:
  of, name = pooled(), "sparsek_512"
  ours = [ahead(of, name, f"{name}_{other}", "mixed") for other in ("defaults", "no_loss")]
  others = [ahead(of, f"{name}_{other}", name, "mixed") for other in ("value", "conv")]
  behind = ahead(of, name, f"{name}_key_value", "mixed")
  # Level: which of the two is ahead by less than an error is not told by a sign.
  level = [[abs(mean), error] for mean, error in others]
  gates = runs("baselines_gates.json")
  masks = [
    ahead(gates, name, f"{name}_{gate}", "mixed")[0]
    for gate in ("softmax", "straight_through_softmax")
  ]
  return [*sum(ours, []), *sum(level, []), *behind, *masks]


def far_passkeys() -> list[float]:
  lengths = {"sparsek_512_last": 2048, "sparsek_1024_last": 4096}
  return [right("baselines.json", name, "passkey", n) for name, n in lengths.items()]
