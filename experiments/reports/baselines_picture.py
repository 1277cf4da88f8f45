"""Picture of a record of experiments/recipes/baselines.py, at 512 keys per query."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sparsek.evaluation.statistics import t_interval
from sparsek.experiments.reports import plots
from sparsek.experiments.reports.baselines_report import Runs, accuracies, difference, minus

RETRIEVAL = ("passkey", "needle", "recall")
LAST = "most keys in the last layer"
# Run -> its name in the picture. Others, such as variants of a scorer, are in the tables only.
NAMES = {
  "full": "full attention",
  "hybrid_512": "SPARSEK, full attention in the last layer",
  "full_last": "windows, full attention in the last layer",
  "full_local": "windows, full attention in the last layer",
  "sparsek_512_last": f"SPARSEK, {LAST}",
  "window_512_last": f"sliding window, {LAST}",
  "random_512_last": f"random keys, {LAST}",
  "sparsek_512_local": f"SPARSEK, {LAST}",
  "window_512_local": f"sliding window, {LAST}",
  "random_512_local": f"random keys, {LAST}",
  "sparsek_512": "SPARSEK",
  "block_topk_512": "best blocks",
  "linear_512": "linear attention",
  "sinks_512": "window with sinks",
  "window_512": "sliding window",
  "random_512": "random keys",
  "strided_512": "strided keys",
  "lsh_512": "hashed buckets",
}
# The runs that have lines, at most eight in a record; the others have points.
LINES = (
  "full",
  "full_local",
  *(f"{kind}_512{layout}" for layout in ("_last", "_local", "") for kind in ("sparsek", "window")),
  *("random_512_last", "random_512_local", "random_512", "block_topk_512"),
)
COLOURS = {
  "full": "#000000",
  "hybrid": "#777777",
  "window": "#D55E00",
  "sparsek": "#0072B2",
  "random": "#009E73",
  "sinks": "#E69F00",
  "linear": "#CC79A7",
  "block": "#56B4E9",
  "strided": "#8C6D31",
}
SHOWN = 0.2  # losses further above full attention's are written as numbers at the edge
LOSS = "nats per token above full attention"


def draw(runs: Runs, path: str) -> None:
  """Writes a picture of losses and answers.

  It shows the loss of text and of text with answers for each kind, and of text by position, above
  full attention's; and right answers by length.

  Raises:
    UsageError: where matplotlib is missing.
    RunError: where the file cannot be written.
  """
  full = runs["full"]
  names = sorted(
    (name for name in runs if name in NAMES),
    key=lambda name: -difference(runs[name], full, "mixed")[0],
  )
  height = 1 + 0.28 * max(len(names), 8)
  figure = plots.new_figure(figsize=(13, height + 4.4), dpi=110, layout="constrained")
  grid = figure.add_gridspec(2, 2, height_ratios=[height, 3.6])
  text, mix, position, right = (figure.add_subplot(grid[i, j]) for i in (0, 1) for j in (0, 1))
  for axes, length, title in ((text, None, "Text"), (mix, "mixed", "Text with answers")):
    _draw_losses(axes, {name: minus(runs[name], full, length) for name in names})
    axes.set_yticks(range(len(names)), [NAMES[name] for name in names] if axes is text else [])
    axes.set_title(f"{title}: held-out loss, 512 keys per query or all", loc="left", fontsize=11)
  for name in [name for name in LINES if name in runs]:
    _draw_by_position(position, name, runs[name], _by_position(full))
    _draw_answers(right, name, accuracies(runs[name]))
  position.set(xlabel="tokens of the document so far", ylabel=LOSS)
  position.set_title("Text: loss by position", loc="left", fontsize=11)
  right.set(xlabel="tokens of the document", ylabel="%", ylim=(-3, 103))
  right.set_title(f"Right answers: {', '.join(RETRIEVAL)}", loc="left", fontsize=11)
  for axes in (position, right):
    axes.grid(alpha=0.3)
    if axes.lines:
      axes.set_xscale("log", base=2)
      axes.set_xticks(sorted({int(x) for line in axes.lines for x in line.get_xdata()}))
      axes.xaxis.set_major_formatter("{x:,.0f}")
      axes.minorticks_off()
  for axes in figure.axes:
    axes.spines[["top", "right"]].set_visible(False)
  handles, labels = position.get_legend_handles_labels()
  figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=3)
  plots.save(figure, path)


def _style(name: str) -> dict[str, Any]:
  kind, _, rest = name.partition("_")
  return {
    "color": COLOURS.get(kind, "#8172B3"),
    "linestyle": "-" if name == "full" or not rest.endswith(("last", "local")) else "--",
    "marker": "o" if kind == "sparsek" else None,
    "markersize": 4,
    "linewidth": 1.6,
  }


def _by_position(run: Mapping) -> dict[int, float]:
  """Returns {n: loss of the tokens from n / 2 to n of a document, the mean over seeds}."""
  rows = [
    result["loss"][min(result["loss"], key=int)]["buckets"]
    for result in run["seeds"].values()
    if result["loss"]
  ]
  return {
    same[0]["last"] + 1: statistics.fmean(bucket["loss"] for bucket in same)
    for same in zip(*rows)
    if same[0]["num_targets"]
  }


def _draw_losses(axes: Any, above: Mapping[str, Sequence[float]]) -> None:
  """Draws a point for each run, name -> losses above full attention's, with its t interval."""
  means = {name: statistics.fmean(values) if values else math.nan for name, values in above.items()}
  for row, (name, loss) in enumerate(means.items()):
    colour = _style(name)["color"]
    if loss > SHOWN:
      style = {"ha": "right", "va": "center", "color": colour, "fontsize": 9}
      axes.text(SHOWN, row, f"{loss:.2f} >", **style)
    else:
      half = t_interval(above[name]).high - loss if len(above[name]) > 1 else 0
      axes.errorbar(loss, row, xerr=half, fmt="o", color=colour, markersize=5)
  farthest = max(means.values())
  label = f"{LOSS}; bars: 95 % intervals over starts"
  axes.set(xlabel=label, xlim=(None, SHOWN if farthest > SHOWN else None), ylim=(-0.6, None))
  axes.grid(alpha=0.3)


def _draw_by_position(axes: Any, name: str, run: Mapping, baseline: Mapping[int, float]) -> None:
  here = _by_position(run)
  if here:
    above = [loss - baseline[last] for last, loss in here.items()]
    axes.plot(list(here), above, label=NAMES[name], **_style(name))


def _draw_answers(axes: Any, name: str, shares: Mapping[tuple[str, int], float]) -> None:
  lengths = sorted({length for task, length in shares if task in RETRIEVAL})
  means = [
    statistics.fmean(shares[task, length] for task in RETRIEVAL if (task, length) in shares)
    for length in lengths
  ]
  if lengths:
    axes.plot(lengths, [100 * mean for mean in means], **_style(name))
