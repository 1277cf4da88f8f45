"""The tables of the sections of docs/results.md: pure functions of records."""

import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence

from sparsek.evaluation.statistics import paired_t
from sparsek.experiments.bench.attention import BOTH, FORWARD
from sparsek.experiments.bench.attention_report import figure, number, quotient
from sparsek.experiments.reports import baselines_report, plots
from sparsek.experiments.reports import results_tables as tables
from sparsek.experiments.reports.grid import DOCUMENTS, over_documents
from sparsek.experiments.reports.results_tables import markdown, nats, percent, with_interval
from sparsek.training import trace

GRID_CELL = re.compile(r"(?P<kind>[a-z_]+)(-k(?P<k>\d+))?(-w(?P<window>\d+))?.*-s(?P<seed>\d+)")

NO_DOCUMENTS = "The record holds no loss of a document, so no interval is over documents."
NO_PROMPTS = "The record does not tell prompts apart, so shares of right answers have no interval."


def wrapped(text: str) -> list[str]:
  """Returns the lines of a paragraph."""
  return textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)


def attention(record: Mapping) -> list[str]:
  """Returns the tables of attention: the headline, then all shapes and scores."""
  rows = record["rows"]
  at = rows[len(tables.headline_rows(record)) :]
  lines = []
  for row in [*tables.headline_rows(record).values(), *at]:
    ours, window, dense = (figure(row, name) for name in ("sparsek", "sliding_window", "dense"))
    lines.append(
      [
        f"{row['heads']} heads, {row['kv_heads']} of keys, width {row['head_dim']}",
        row["scores"],
        str(row["n"]),
        number(ours),
        number(window),
        number(quotient(ours, window)),
        number(quotient(dense, ours)),
        number(
          quotient(figure(row, "sparsek", what="mib"), figure(row, "sliding_window", what="mib"))
        ),
      ]
    )
  head = ["shape", "scores", "tokens", "sparsek, ms", "window, ms", "time / window"]
  head += ["speed / dense", "memory / window"]
  return [*tables.attention_speed(record), "", *markdown(head, lines)]


def training(record: Mapping, packed: Mapping, scorer_loss: Mapping) -> list[str]:
  """Returns the tables of training steps, and what packing and the scorers' loss cost."""
  speeds = tables.training_speed(record, scorer_loss)
  rows = [
    [
      str(row["n"]),
      *(
        "" if (share := row["rivals"].get(kind, {}).get("mfu")) is None else percent(share, 1)
        for kind in tables.TRAINING_LABELS
      ),
    ]
    for row in record["rows"]
  ]
  speed = lambda row: row["rivals"]["sparsek"]["tokens_per_second"]
  one, eight = packed["rows"]
  return [
    *speeds,
    "",
    "Model FLOPs utilization, of the attention that is computed:",
    "",
    *markdown(["tokens a row", *tables.TRAINING_LABELS.values()], rows),
    "",
    f"With {eight['documents']} documents in a row of {eight['n']} tokens a step takes "
    f"{speed(one) / speed(eight):.3f} times as long as with one.",
  ]


def one_card(
  train: Mapping, large: Mapping, attention_times: Mapping, decode: Mapping
) -> list[str]:
  """Returns the table of SPARSEK beside the strongest rival of each task, of newer records, and one
  of model FLOPs utilization.
  """
  lines = []

  def add(what, ours, theirs, rival, ratio):
    lines.append([what, ours, theirs, rival, number(ratio)])

  for row in (*train["rows"], *large["rows"]):
    loss = "by default" if row["scorer_loss"] else "without the scorers' loss"
    model, _ = row["model"].split(" parameters")
    speeds = {kind: cell["tokens_per_second"] for kind, cell in row["rivals"].items()}
    for kind, rival in (("sliding_window", "our window"), ("pytorch_window", "FlexAttention")):
      if kind in speeds:
        ours, theirs = (f"{speeds[name]:,.0f}" for name in ("sparsek", kind))
        what = f"training step {loss}, {model}, {row['n']} tokens: tokens/s"
        add(what, ours, theirs, rival, speeds["sparsek"] / speeds[kind])
  for row in attention_times["rows"]:
    for direction in (FORWARD, BOTH):
      ms, window = (figure(row, name, direction) for name in ("sparsek", "sliding_window"))
      shape = f"{row['heads']}/{row['kv_heads']} heads of {row['head_dim']}, {row['n']} tokens"
      what = f"attention, {direction.replace('+', ' + ')}, {shape}: ms"
      add(what, number(ms), number(window), "cuDNN's window", quotient(ms, window))
  for row in decode["rows"]:
    ms, full = (row["rivals"][kind]["ms"] for kind in ("sparsek", "full"))
    what = f"generation of {row['batch_size']} texts after {row['n']} tokens: ms a token"
    add(what, number(ms), number(full), "our full attention", quotient(ms, full))
  utilization = [
    [
      row["model"].split(" parameters")[0],
      row["remat"],
      "yes" if row["scorer_loss"] else "no",
      *(
        percent(row["rivals"][kind]["mfu"], 1) if kind in row["rivals"] else ""
        for kind in ("sparsek", "sliding_window", "pytorch_window")
      ),
    ]
    for row in (*train["rows"], *large["rows"])
  ]
  names = ["SPARSEK", "our window", "FlexAttention"]
  return [
    *markdown(["what", "SPARSEK", "rival", "which", "SPARSEK / rival"], lines),
    "",
    "Model FLOPs utilization of these steps, of the attention that is computed:",
    "",
    *markdown(["parameters", "`--remat`", "scorers' loss", *names], utilization),
  ]


def kernel_times(record: Mapping) -> list[str]:
  """Returns the table of the time of each kind of kernels in a training step."""
  labels = {"sparsek": "SPARSEK", "sliding_window": "our window"}
  columns = {
    labels[kind] + ", scorers' loss" * (kind == "sparsek" and bool(row["scorer_loss"])): cell[
      "kinds_ms"
    ]
    for row in record["rows"]
    for kind, cell in row["rivals"].items()
  }
  names = [name for name, _ in trace.KINDS]
  rows = [[name, *(number(ms.get(name)) for ms in columns.values())] for name in names]
  total = ["all", *(number(sum(ms.values())) for ms in columns.values())]
  return markdown(["kernels", *columns], [*rows, total])


def decoding(record: Mapping) -> list[str]:
  """Returns the tables of tokens and of prompts."""
  prompts = [row for row in record["rows"] if row["what"] == "prefill"]
  ms = lambda row, kind: row["rivals"][kind].get("ms")
  lines = [
    [
      str(row["n"]),
      number(ms(row, "sparsek")),
      number(ms(row, "full")),
      number(quotient(ms(row, "full"), ms(row, "sparsek"))),
    ]
    for row in prompts
  ]
  return [
    *tables.decoding_speed(record),
    "",
    f"Reading the weights once would take {number(record['rows'][0]['weights_ms'])} ms. Prompts, "
    "in milliseconds:",
    "",
    *markdown(["tokens", "SPARSEK", "full attention", "speed / full"], lines),
  ]


def linear(record: Mapping) -> list[str]:
  """Returns the table of time and memory on a CPU."""
  kinds = ("sparsek", "sliding_window", "dense")
  return markdown(
    ["tokens", *(f"{kind.replace('_', ' ')}, ms" for kind in kinds), "sparsek, MiB"],
    [
      [
        str(row["n"]),
        *(number(figure(row, kind)) for kind in kinds),
        number(figure(row, "sparsek", what="mib")),
      ]
      for row in record["rows"]
    ],
  )


def tpu(record: Mapping) -> list[str]:
  """Returns the table of bytes and FLOPs beside splash attention."""
  shape = ("chip", "n", "heads", "key_heads", "head_dim")
  return markdown(
    ["chip", "tokens", "heads", "heads of keys", "width", "bytes / splash", "FLOPs / splash"],
    [
      [*(str(row[name]) for name in shape)]
      + [f"{row['bytes_over_splash']:.2f}", f"{row['flops_over_splash']:.2f}"]
      for row in record["rows"]
    ],
  )


def baselines(record: Mapping, first: Mapping) -> list[str]:
  """Returns the tables of all kinds of attention, over both rounds."""
  runs = baselines_report.pool([record["runs"], first["runs"]])
  names = [name for name in runs if re.fullmatch(r"sparsek_\d+(_last)?", name)]
  return [
    f"Full attention: {_loss(record['runs']['full'])}.",
    "",
    *tables.baselines(record),
    *_without_prompts(record["runs"]),
    "",
    *wrapped(_gap_of(record["runs"])),
    "",
    *wrapped(_six_starts(runs)),
    "",
    "Gates and scorers of SPARSEK, every layer alike, 512 keys a query:",
    "",
    *tables.gates(record),
    *_far(record["runs"]),
    "",
    "Over both rounds, the share of the gap between a sliding window and full attention, with",
    "answers, that each kind closes in each start (round.seed):",
    "",
    *baselines_report.by_start(runs).splitlines(),
    "",
    'Over both rounds, differences between runs that share their start ("mix": text and answers):',
    "",
    *baselines_report.differences(runs, sorted(names)),
  ]


def gap_closed(runs: Mapping, name: str, length: str | None) -> float:
  """Returns the share of the gap between a window of 512 and full attention that a kind closes."""
  window, full = runs["window_512"], runs["full"]
  gap = baselines_report.difference(window, full, length)[0]
  return baselines_report.difference(window, runs[name], length)[0] / gap


def _gap_of(runs: Mapping) -> str:
  ours, window = (
    [percent(gap_closed(runs, f"{kind}_512_last", length)) for length in (None, "mixed")]
    for kind in ("sparsek", "window")
  )
  return (
    "Of the gap between a sliding window of 512 and full attention SPARSEK with most keys in the "
    f"last layer closes {ours[0]} on text and {ours[1]} with answers. The plain window, laid out "
    f"alike, closes {window[0]} and {window[1]} by itself."
  )


def _six_starts(runs: Mapping) -> str:
  pair = runs["sparsek_512_last"], runs["window_512_last"]
  count = len(baselines_report.losses(pair[0], "mixed"))
  text, mix = (
    baselines_report.with_interval(baselines_report.minus(*pair, length), "+.4f")
    for length in (None, "mixed")
  )
  return (
    f"Over the {count} starts of both rounds SPARSEK minus that window is {text} on text and {mix} "
    "with answers (95 % t intervals): on text alone selection is not yet measurably better than a "
    "longer window."
  )


def _without_prompts(runs: Mapping) -> list[str]:
  """Returns a paragraph that says so where a run's answers have no interval; [] where all have."""
  known = [
    baselines_report.accuracy(run, *key)
    for run in runs.values()
    for key in baselines_report.accuracies(run)
  ]
  return [] if all(known) else ["", NO_PROMPTS]


def _loss(run: Mapping) -> str:
  """Returns the losses of a run as a phrase."""
  text, mix = (
    with_interval([*baselines_report.losses(run, length).values()]) for length in (None, "mixed")
  )
  return f"{text} on text, {mix} with answers"


def loss_beyond(run: Mapping, first: int = 16384, length: str = "32768") -> float | None:
  """Returns the mean loss of the tokens from position `first` on in rows of some length."""
  losses = [
    bucket["loss"]
    for result in run["seeds"].values()
    for bucket in result["loss"].get(length, {"buckets": []})["buckets"]
    if bucket["first"] == first
  ]
  return statistics.fmean(losses) if losses else None


def _far(runs: Mapping) -> list[str]:
  losses = {name: loss_beyond(run) for name, run in runs.items()}
  rows = [[name, nats(loss)] for name, loss in losses.items() if loss is not None]
  text = (
    "Loss of the tokens beyond 16384 in rows of 32768, four times as long as those of training:"
  )
  return ["", text, "", *markdown(["run", "loss"], rows)]


def layouts(record: Mapping) -> list[str]:
  """Returns the tables of models that have the layout from the start."""
  runs = record["runs"]
  names = ("sparsek_512_local", "sparsek_1024_local")
  return [
    f"Full attention in every layer: {_loss(runs['full'])}.",
    "",
    *tables.layouts(record),
    *_without_prompts(runs),
    "",
    *wrapped(_local_starts(runs)),
    "",
    *baselines_report.differences(runs, names),
    *_far(runs),
  ]


def local_p(runs: Mapping) -> list[float]:
  """Returns p of SPARSEK minus the window in the last layer, for both budgets and losses."""
  return [
    paired_t(
      *baselines_report.pairs(
        runs[f"sparsek_{budget}_local"], runs[f"window_{budget}_local"], length
      )
    ).p_value
    for budget in (512, 1024)
    for length in (None, "mixed")
  ]


def _local_starts(runs: Mapping) -> str:
  return (
    "Three starts are few: none of the differences of loss between SPARSEK and the window in the "
    f"last layer is significant (p from {min(local_p(runs)):.2f} to {max(local_p(runs)):.2f}, not "
    "corrected)."
  )


def last_loss(cell: Mapping) -> float:
  """Returns the last held-out loss of a cell."""
  return list(cell["heldout_loss"].values())[-1]


def grid(record: Mapping) -> list[str]:
  """Returns the losses of a grid, a row for each setting, best first."""
  settings: dict[tuple, list[Mapping]] = {}
  for cell in record["cells"]:
    match = GRID_CELL.fullmatch(cell["cell"])
    assert match, cell["cell"]
    key = (match["kind"], match["k"] or "", match["window"] or "", cell["grid"])
    settings.setdefault(key, []).append(cell)
  grids, over = {grid for *_, grid in settings}, {}
  for key, cells in settings.items():
    over[key] = over_documents([cell.get(DOCUMENTS) for cell in cells])
  rows = []
  for (kind, k, window, grid), cells in settings.items():
    name = f"{kind} ({grid})" if len(grids) > 1 else kind
    values, interval = list(map(last_loss, cells)), over[kind, k, window, grid]
    of_documents = f"{nats(interval.low)} to {nats(interval.high)}" if interval else "-"
    cells_of_row = [name, k, window, str(len(values)), with_interval(values), of_documents]
    rows.append((statistics.fmean(values), cells_of_row))
  head = ["attention", "k", "window", "seeds", "loss", "over documents"]
  if not any(over.values()):
    lines = markdown(head[:-1], [row[:-1] for _, row in sorted(rows)])
    return [*lines, "", NO_DOCUMENTS]
  return markdown(head, [row for _, row in sorted(rows)])


def runs(record: Mapping) -> list[str]:
  """Returns the table of all runs of a record."""
  return baselines_report.table(record["runs"]).splitlines()


def gates(record: Mapping) -> list[str]:
  """Returns the differences between gates."""
  return baselines_report.differences(record["runs"], ["sparsek_512"])


def taught(*rounds: Mapping) -> list[str]:
  """Returns right answers by start, and differences from the default of the time."""
  runs = baselines_report.pool([record["runs"] for record in rounds])
  return [
    *baselines_report.answers_by_start(runs, "sparsek_512"),
    "",
    *baselines_report.differences(runs, ["sparsek_512", "window_512"]),
  ]


def from_scratch(record: Mapping) -> list[str]:
  """Returns the losses of models that learn from scratch in long rows."""
  return markdown(
    ["run", "text", "text and answers"],
    [
      [name, nats(run["text_loss"]), nats(list(run["heldout_loss"].values())[-1])]
      for name, run in record["runs"].items()
    ],
  )


def conversion(record: Mapping) -> list[str]:
  """Returns the tables of the conversion of SmolLM2."""
  groups = baselines_report.groups(record["runs"])
  kinds = ("dense", "sparsek", "hybrid", "sinks", "random", "window", "strided", "linear")
  stages = (("", "before"), ("tuned", "trained"), ("recall", "trained for recall"))
  losses, answers = [], []
  for kind in kinds:
    losses.append(
      [kind, *(with_interval(tables.conversion_losses(record, kind, s), 4) for s, _ in stages)]
    )
    asked = [(task, length) for task in ("passkey", "needle") for length in (4096, 8192, 16384)]
    answers.append([kind, *(tables.conversion_answers_text(record, kind, *key) for key in asked)])
  head = [f"{task} {length}" for task in ("passkey", "needle") for length in (4096, 8192, 16384)]
  return [
    *tables.conversion(record),
    "",
    "The same losses with their intervals, and of further kinds:",
    "",
    *markdown(["attention", *(name for _, name in stages)], losses),
    "",
    "Differences between losses of the same stage and seed:",
    "",
    *tables.conversion_differences(record, kinds),
    "",
    "Right answers after training for recall:",
    "",
    *markdown(["attention", *head], answers),
    *_without_prompts({name: tables.of_seeds(runs) for name, runs in groups.items()}),
  ]


def reach(record: Mapping) -> list[str]:
  """Returns the layers that need distance most."""
  total = sum(record["rises"])
  return markdown(
    ["layer", "rise of the loss", "share of all rises"],
    [
      [str(layer), nats(rise, 4), percent(rise / total)]
      for rise, layer in sorted(((x, i) for i, x in enumerate(record["rises"])), reverse=True)[:8]
    ],
  )


def parity(*made: Mapping) -> list[str]:
  """Returns how far logits are from those of transformers."""
  columns = [name for name in made[0]["logits"]["prompt"] if name != "same most probable token"]
  return markdown(
    ["model", "text", *columns],
    [
      [record["model"], name, *(f"{values[column]:.3g}" for column in columns)]
      for record in made
      for name, values in record["logits"].items()
    ],
  )


def long_decode(*made: Mapping) -> list[str]:
  """Returns the differences between logits of decoding and of the parallel forward pass."""
  lines = [
    [
      f"{record['options']['length']:,}",
      way,
      percent(values["share within 1e-5"], 2),
      percent(values["largest"], 1),
    ]
    for record in made
    for way, values in record["difference over standard deviation of logits"].items()
  ]
  return markdown(["tokens", "fed", "logits within 1e-5", "largest difference"], lines)


def demo(record: Mapping) -> list[str]:
  """Returns the right answers of the demo by distance, for each random start."""
  distances = list(next(iter(record["accuracy"].values())))
  lines = [
    [plots.NAMES[kind], *(" and ".join(f"{100 * x:.0f}" for x in by[d]) for d in distances)]
    for kind, by in record["accuracy"].items()
  ]
  return markdown(["attention", *map(str, distances)], lines)


def demo_text(lines: Sequence[Mapping]) -> list[str]:
  """Returns the losses of the demo on text."""
  return markdown(
    ["attention", "loss", "bits per byte"],
    [
      [", ".join(line["model"]["attention"]), nats(line["loss"]), f"{line['bits_per_byte']:.2f}"]
      for line in lines
    ],
  )
