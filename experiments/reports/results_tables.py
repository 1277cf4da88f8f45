"""The tables of README.md and docs/, in Markdown: pure functions of records.

Losses are in nats and written without the zero before the point, ".044 (.017 to .071)"; in brackets
is a 95 % interval, of a loss over starts, of answers over distinct prompts.
"""

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence

from sparsek.experiments.bench.attention_report import figure, number
from sparsek.experiments.reports import baselines_report, conversion_report
from sparsek.experiments.reports.baselines_report import (
  accuracies,
  accuracy,
  difference,
  groups,
  mean_and_error,
  minus,
)

ANSWERS = tuple((task, 4096) for task in ("passkey", "needle", "recall", "copy"))
_TASKS = tuple(task for task, _ in ANSWERS)
SPEED_LABELS = {
  "sparsek": "sparsek (Pallas Mosaic kernels)",
  "sliding_window": "cuDNN sliding window of 1024",
  "dense": "cuDNN dense",
  "xla": "sparsek in plain XLA",
}
TRAINING_LABELS = {
  "sparsek": "sparsek without the scorers' loss",
  "sliding_window": "sliding window of 1024",
  "full": "full attention",
  "transformers": "transformers' Llama (sdpa, compiled, checkpointed)",
  "transformers_layers": "the same, compiled layer by layer",
}
DECODING_LABELS = {"sparsek": "SPARSEK", "full": "full attention", "transformers": "transformers"}
BASELINES = (  # label, keys a query, run
  ("SPARSEK, most keys in the last of six layers", "512", "sparsek_512_last"),
  ("sliding window, laid out alike", "512", "window_512_last"),
  ("random keys and a window, laid out alike", "512", "random_512_last"),
  ("SPARSEK, every layer alike", "512", "sparsek_512"),
  ("SPARSEK in five layers of six, full attention in the last (keeps its keys)", "", "hybrid_512"),
  ("blocks chosen for each query, and a window (keeps all keys)", "512", "block_topk_512"),
  ("gated linear attention and a window", "512", "linear_512"),
  ("first 4 tokens and a window", "512", "sinks_512"),
  ("sliding window", "512", "window_512"),
  ("random keys and a window", "512", "random_512"),
  ("every n-th token and a window", "512", "strided_512"),
  ("hashed buckets (keeps all keys)", "512", "lsh_512"),
  ("SPARSEK, most keys in the last layer", "1024", "sparsek_1024_last"),
  ("sliding window, laid out alike", "1024", "window_1024_last"),
  ("random keys and a window, laid out alike", "1024", "random_1024_last"),
  ("SPARSEK, every layer alike", "1024", "sparsek_1024"),
  ("blocks chosen for each query, and a window", "1024", "block_topk_1024"),
  ("gated linear attention and a window", "1024", "linear_1024"),
  ("sliding window", "1024", "window_1024"),
  ("random keys and a window", "1024", "random_1024"),
)
BASELINES_SHORT = (  # label, run: of docs/attention-map.md; some of them of README.md
  (
    "SPARSEK: windows of 256, in the last layer 512 chosen and a window of 1280",
    "sparsek_512_last",
  ),
  ("windows of 256, in the last layer of 1792", "window_512_last"),
  ("SPARSEK, 256 chosen and a window of 256 in each", "sparsek_512"),
  ("256 keys in blocks chosen for each query, and a window of 256", "block_topk_512"),
  ("gated linear attention and a window of 512", "linear_512"),
  ("window of 508 and the first 4 tokens", "sinks_512"),
  ("sliding window of 512", "window_512"),
  ("256 random tokens and a window of 256", "random_512"),
  ("every n-th token, 256 of them, and a window of 256", "strided_512"),
  ("hashed buckets", "lsh_512"),
)
IN_README = (
  "sparsek_512_last",
  "window_512_last",
  "sparsek_512",
  "block_topk_512",
  "window_512",
  "random_512",
)
BASELINES_README = tuple(row for row in BASELINES_SHORT if row[1] in IN_README)
GATES = (  # label, run
  ("gate straight_through (the default)", "sparsek_512"),
  ("gate value", "sparsek_512_value"),
  ("gate key_value", "sparsek_512_key_value"),
  ("scorer conv", "sparsek_512_conv"),
  ("no loss of the scorers", "sparsek_512_no_loss"),
)
LAYOUTS = (  # label, keys a query, run
  ("full attention", "", "full_local"),
  ("SPARSEK, 512 chosen and a window of 1280", "512", "sparsek_512_local"),
  ("window of 1792", "512", "window_512_local"),
  ("512 random tokens and a window of 1280", "512", "random_512_local"),
  ("SPARSEK, 1024 chosen and a window of 2560 (512 in the others)", "1024", "sparsek_1024_local"),
  ("window of 3584 (512 in the others)", "1024", "window_1024_local"),
  ("1024 random tokens and a window of 2560 (512 in the others)", "1024", "random_1024_local"),
)
LAYOUTS_SHORT = (  # label, run: of docs/attention-map.md
  ("windows of 256, in the last layer full attention (keeps its keys)", "full_local"),
  (
    "SPARSEK: windows of 256, in the last layer 512 chosen and a window of 1280",
    "sparsek_512_local",
  ),
  ("windows of 256, in the last layer of 1792", "window_512_local"),
  ("windows of 256, in the last layer 512 random tokens and a window of 1280", "random_512_local"),
)
CONVERSION = (  # label, kind
  ("full", "dense"),
  ("SPARSEK, scorers warmed up for 2.0 million tokens", "sparsek"),
  ("window and the first 4 tokens (StreamingLLM)", "sinks"),
  ("window of 768 and 256 random tokens", "random"),
  ("sliding window", "window"),
  ("window of 768 and every n-th token before it", "strided"),
)
CONVERSION_SHORT = (  # label, kind: of docs/attention-map.md
  ("full attention", "dense"),
  ("SPARSEK in five of six layers, full attention in the sixth", "hybrid"),
  ("SPARSEK, 256 chosen and a window of 768", "sparsek"),
  ("window of 1020 and the first 4 tokens", "sinks"),
  ("256 random tokens and a window of 768", "random"),
  ("sliding window of 1024", "window"),
  ("every n-th token, 256 of them, and a window of 768", "strided"),
)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """Returns the lines of a table."""
  lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
  lines.insert(1, "|" + "---|" * len(head))
  return [line.replace("|  |", "| |").replace("|  |", "| |") for line in lines]


def nats(value: float, digits: int = 3) -> str:
  """Formats a loss without the zero before the point."""
  return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"


def with_interval(values: Sequence[float], digits: int = 3) -> str:
  """Formats the mean of a loss over starts, and its t interval where there are two or more."""
  return baselines_report.with_interval(values, "", lambda value, _: nats(value, digits))


def answers(run: Mapping, key: tuple[str, int]) -> str:
  """Formats the share of right answers to a task, with its interval where prompts are recorded."""
  known = accuracy(run, *key)
  if known is None:
    return percent(accuracies(run)[key])
  return f"{percent(known.value)} ({percent(known.low)} to {percent(known.high)})"


def percent(share: float, digits: int = 0) -> str:
  """Formats a share."""
  return f"{100 * share:.{digits}f} %"


def headline_rows(record: Mapping) -> dict[int, dict]:
  """Returns the rows of the main shape with normal scores, by length."""
  shape = ("heads", "kv_heads", "head_dim", "scores")
  rows = record["rows"]
  first = [rows[0][name] for name in shape]
  return {row["n"]: row for row in rows if [row[name] for name in shape] == first}


def attention_speed(record: Mapping) -> list[str]:
  """Returns milliseconds of forward + backward, a row for each implementation."""
  rows = headline_rows(record)
  return markdown(
    ["tokens", *map(str, rows)],
    [
      [label, *(number(figure(row, name)) for row in rows.values())]
      for name, label in SPEED_LABELS.items()
    ],
  )


def attention_speed_by_length(record: Mapping, lengths: Sequence[int]) -> list[str]:
  """Returns milliseconds of forward + backward, a row for each length."""
  rows = headline_rows(record)
  return markdown(
    ["tokens", "sparsek", "sliding window of 1024 (cuDNN)", "full (cuDNN)"],
    [
      [str(n), *(number(figure(rows[n], name)) for name in ("sparsek", "sliding_window", "dense"))]
      for n in lengths
    ],
  )


def training_speed(record: Mapping, scorer_loss: Mapping) -> list[str]:
  """Returns tokens per second, and the memory where the backward pass recomputes parts.

  Args:
    record: without the scorers' loss.
    scorer_loss: its last row is with that loss, which is the default.
  """
  rows, default = record["rows"], scorer_loss["rows"][-1]

  def cell(row, kind):
    result = row["rivals"].get(kind)
    if result is None or "failed" in result:
      return ""
    memory = f" ({result['mib'] * 2**20 / 1e9:.0f} GB)" if row["remat"] != "none" else ""
    return f"{round(result['tokens_per_second'], -2):,.0f}{memory}"

  first = [cell(default, "sparsek") if row["n"] == default["n"] else "" for row in rows]
  return markdown(
    ["tokens a row", *(str(row["n"]) for row in rows)],
    [
      ["sparsek as by default, with the scorers' loss", *first],
      *([label, *(cell(row, kind) for row in rows)] for kind, label in TRAINING_LABELS.items()),
    ],
  )


def decoding_speed(record: Mapping) -> list[str]:
  """Returns milliseconds a token, all rows together, and the cache after the shortest context."""
  lines = []
  rows = {(row["batch_size"], row["n"]): row for row in record["rows"] if row["what"] == "decode"}
  contexts = sorted({n for _, n in rows})

  def cell(result):
    if result is None:
      return ""
    return "no memory" if "failed" in result else number(result["ms"])

  for batch in sorted({batch for batch, _ in rows}):
    for kind, label in DECODING_LABELS.items():
      results = [rows[batch, n]["rivals"].get(kind) for n in contexts]
      cache = f"{results[0]['cache_bytes'] / 2**20:.0f} MiB"
      grows = "" if kind == "sparsek" else f" for {contexts[0]} tokens"
      name = f"{label}, {batch} row{'s' * (batch > 1)}"
      lines.append([name, *map(cell, results), cache + grows])
  return markdown(["tokens before", *map(_short, contexts), "cache"], lines)


def _short(n: int) -> str:
  return f"{n // 2**20}M" if n >= 2**20 else f"{n // 2**10}k"


def _quality(runs: Mapping, name: str) -> list[str]:
  """Returns the losses above full attention's, of text and with answers, and right answers."""
  losses = (minus(runs[name], runs["full"], length) for length in (None, "mixed"))
  return [*map(with_interval, losses), *(answers(runs[name], key) for key in ANSWERS)]


def baselines(record: Mapping) -> list[str]:
  """Returns the table of all kinds of attention at the same budget."""
  return markdown(
    ["attention", "keys a query", "text", "text and answers", *_TASKS],
    [[label, keys, *_quality(record["runs"], run)] for label, keys, run in BASELINES],
  )


def gates(record: Mapping) -> list[str]:
  """Returns the table of gates and scorers of SPARSEK, every layer alike, 512 keys a query."""
  return markdown(
    ["SPARSEK with", "text", "text and answers", *_TASKS],
    [[label, *_quality(record["runs"], run)] for label, run in GATES],
  )


def layouts(record: Mapping) -> list[str]:
  """Returns the table of models that have a layout from the start, by their last layer."""
  columns = ["text", "text and answers", *_TASKS]
  return markdown(
    ["in the last layer", "keys a query, the mean", *columns],
    [[label, keys, *_quality(record["runs"], run)] for label, keys, run in LAYOUTS],
  )


def quality_short(
  record: Mapping, rows: Sequence[tuple[str, str]], ahead: bool = False
) -> list[str]:
  """Returns a table of losses above full attention's and needles, without errors.

  Args:
    record: of experiments/recipes/baselines.py.
    rows: label, run.
    ahead: losses are how far each is below full attention's.
  """
  runs, sign = record["runs"], -1 if ahead else 1

  def cells(run):
    losses = (difference(runs[run], runs["full"], length)[0] for length in (None, "mixed"))
    return [*(nats(sign * loss) for loss in losses), percent(accuracies(runs[run])["needle", 4096])]

  head = ["512 keys a query, the mean over six layers", "text", "text and answers", "needles"]
  return markdown(head, [[label, *cells(run)] for label, run in rows])


def conversion_rise(record: Mapping, kind: str, stage: str) -> tuple[float, float]:
  """Returns the mean and the error of a stage's loss above the dense model's of the same seed."""
  name = _stage_name(kind, stage)
  pair = name, conversion_report.dense_of(name)
  return mean_and_error(conversion_report.differences(record["runs"], [pair])[pair].values)


def conversion_differences(record: Mapping, kinds: Sequence[str]) -> list[str]:
  """Returns the table of losses minus the dense model's, and of SPARSEK's minus the others'."""
  stages = ("", "tuned", "recall")
  rows = [(kind, "dense") for kind in kinds if kind != "dense"]
  rows += [("sparsek", kind) for kind in kinds if kind not in ("dense", "sparsek")]
  names = {
    (row, stage): (_stage_name(row[0], stage), _stage_name(row[1], stage))
    for row in rows
    for stage in stages
  }
  made = conversion_report.differences(record["runs"], [*names.values()])
  cell = lambda row, stage: str(made[pair]) if (pair := names[row, stage]) in made else ""
  return [
    *markdown(
      ["", "before", "trained", "trained for recall"],
      [
        [f"{first} minus {second}", *(cell((first, second), stage) for stage in stages)]
        for first, second in rows
      ],
    ),
    "",
    *textwrap.wrap(conversion_report.about(made), 100),
  ]


def conversion_losses(record: Mapping, kind: str, stage: str) -> list[float]:
  """Returns the loss of a stage in each seed."""
  return [run["loss"] for run in groups(record["runs"])[_stage_name(kind, stage)]]


def _stage_name(kind: str, stage: str) -> str:
  """Returns the name of a stage's runs; before any training SPARSEK's scorers are warmed up."""
  if stage:
    return f"{kind}_{stage}"
  return "sparsek_warm" if kind == "sparsek" else kind


def of_seeds(group: Sequence[Mapping]) -> dict[str, dict]:
  """Returns runs that differ in the seed alone as a run of `baselines_report.Runs`."""
  return {"seeds": dict(enumerate(group))}


def conversion_answers(record: Mapping, kind: str, task: str, length: int) -> float | None:
  """Returns the share of right answers after the training for recall, if it was asked."""
  group = groups(record["runs"]).get(f"{kind}_recall", [])
  return accuracies(of_seeds(group)).get((task, length))


def conversion_answers_text(record: Mapping, kind: str, task: str, length: int) -> str:
  """Formats the share of right answers after the training for recall; "" if it was not asked."""
  run = of_seeds(groups(record["runs"]).get(f"{kind}_recall", []))
  return answers(run, (task, length)) if (task, length) in accuracies(run) else ""


def conversion(record: Mapping) -> list[str]:
  """Returns the table of SmolLM2 under each kind of attention, by stage."""

  def cell(kind, stage):
    loss = f"{statistics.fmean(conversion_losses(record, kind, stage)):.3f}"
    if kind == "dense":
      return loss
    rise = math.expm1(conversion_rise(record, kind, stage)[0])
    return f"{loss} (+{percent(rise, 1)})"

  def needles(kind):
    share = conversion_answers(record, kind, "needle", 8192)
    return "" if share is None else percent(share)

  return markdown(
    ["attention", "before", "trained", "trained for recall", "needles"],
    [
      [label, *(cell(kind, stage) for stage in ("", "tuned", "recall")), needles(kind)]
      for label, kind in CONVERSION
    ],
  )


def conversion_short(record: Mapping) -> list[str]:
  """Returns the table of the trained models' perplexity over the dense one's, and needles."""
  lines = []
  for label, kind in CONVERSION_SHORT:
    ratio = math.exp(conversion_rise(record, kind, "tuned")[0])
    share = conversion_answers(record, kind, "needle", 8192)
    perplexity = "1" if kind == "dense" else f"{ratio:.3f}"
    lines.append([label, perplexity, "" if share is None else percent(share)])
  return markdown(["", "perplexity", "needles"], lines)
