"""Pictures of any runs side by side: losses, statistics of selection, and the tokens they keep."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sparsek.attention.diagnostics import OLD
from sparsek.errors import UsageError
from sparsek.experiments.reports import plots
from sparsek.runs.metrics import read_metrics

EVALUATION = "evaluation.jsonl"  # in the folder of a run, by experiments.evaluate
LOSS = "nats per token"
# Of each layer in metrics.jsonl (`sparsek.attention.diagnostics`): title and y axis of the panel.
STATISTICS = {
  "gate_mass": ("Gate mass on the k selected keys", "share"),
  "support_size": ("Support", "keys with a gate above 0, per query"),
  "mean_age": ("Age of the selected keys", "tokens before the query"),
  "share_older_than_1k": (f"Selected keys older than {OLD:,} tokens", "share"),
  "score_std": ("Spread of the scores", "standard deviation over a row"),
}
ACROSS = 3  # panels side by side
MOST_LINES = len(plots.LINE_COLOURS)
TEXT_LINE = 0.17  # inches
Points = Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Run:
  """The records of a run.

  Attributes:
    label: its name in the picture.
    folder: its folder.
    metrics: records of metrics.jsonl.
    evaluations: records of evaluation.jsonl.
  """

  label: str
  folder: str
  metrics: Sequence[dict]
  evaluations: Sequence[dict]

  def points(self, name: str) -> list[tuple[float, float]]:
    """Returns (step, value) of each record that has a metric.

    A stage that warms up scorers has their loss as its own, which is no point of the "loss".
    """
    values = [
      (record["step"], record.get(name))
      for record in self.metrics
      if not (
        name == "loss" and "stage" in record and record.get("scorer_loss") == record.get(name)
      )
    ]
    return [(step, value) for step, value in values if isinstance(value, (int, float))]

  def layers(self, statistic: str) -> list[int]:
    """Returns the layers that have a statistic."""
    names = {name for record in self.metrics for name in record}
    matches = [re.fullmatch(rf"layer_(\d+)/{statistic}", name) for name in names]
    return sorted(int(match[1]) for match in matches if match)


@dataclasses.dataclass(frozen=True)
class Panel:
  """One panel of a picture.

  Attributes:
    title, x, y: its texts.
    lines: label -> points.
    bands: label -> (x, low, high) of an area around a line.
    has_log_x: the x axis is logarithmic, with a tick at each point.
  """

  title: str
  x: str
  y: str
  lines: Mapping[str, Points]
  bands: Mapping[str, Sequence[tuple[float, float, float]]] = dataclasses.field(
    default_factory=dict
  )
  has_log_x: bool = False


@dataclasses.dataclass(frozen=True)
class KeptText:
  """A text and the tokens of it that the layers of a run keep.

  Attributes:
    label: of the run.
    pieces: text of each token.
    layers: as `plots.kept_tokens` returns them.
  """

  label: str
  pieces: Sequence[str]
  layers: Sequence[plots.Kept]


def read_run(folder: str, label: str) -> Run:
  """Returns the records of a run, of which only the .jsonl files are needed.

  Raises:
    UsageError: where there are none.
  """
  metrics = read_metrics(os.path.join(folder, "metrics.jsonl"))
  evaluations = read_metrics(os.path.join(folder, EVALUATION))
  if not (metrics or evaluations):
    cells = os.path.join(folder, "cells")
    grid = f"; it is a grid, give folders in {cells}" if os.path.isdir(cells) else ""
    raise UsageError(f"--workdir={folder} is no run: no metrics.jsonl, no {EVALUATION}{grid}")
  return Run(label, folder, metrics, evaluations)


def panels(runs: Sequence[Run], say: Callable[[str], object]) -> list[Panel]:
  """Returns the panels for which there are records.

  Args:
    runs: at most `MOST_LINES`.
    say: takes a line about what is left out, and about records that differ.
  """
  trained, heldout, scorers = (
    {run.label: run.points(name) for run in runs}
    for name in ("loss", "heldout_loss", "scorer_loss")
  )
  smoothed = {label: _smooth(points) for label, points in trained.items()}
  made = [
    Panel("Training loss, smoothed", "step", LOSS, smoothed),
    Panel("Held-out loss", "step", LOSS, heldout),
    _by_position(runs, say),
    *(_statistic(runs, name, say) for name in STATISTICS),
    Panel("The scorers' loss", "step", "mean over layers", scorers),
  ]
  _report_missing(made, say)
  return [panel for panel in map(_present, made) if panel]


def _smooth(points: Points) -> Points:
  values = plots.smooth([value for _, value in points])
  return [(step, float(value)) for (step, _), value in zip(points, values)]


def _is_zero(panel: Panel) -> bool:
  """Returns whether a panel would show that a share is 0 at all steps."""
  values = [value for points in panel.lines.values() for _, value in points]
  return panel.y == "share" and bool(values) and not any(values)


def _present(panel: Panel) -> Panel | None:
  """Returns a panel without its empty lines; None if no line is left to look at."""
  lines = {label: points for label, points in panel.lines.items() if points}
  return dataclasses.replace(panel, lines=lines) if lines and not _is_zero(panel) else None


def _report_missing(made: Sequence[Panel], say: Callable[[str], object]) -> None:
  """Says which panels are left out, and which have not all runs."""
  titles: dict[tuple[str, ...], list[str]] = {}  # by the runs that they lack
  for panel in made:
    if _is_zero(panel):
      say(f"left out: {panel.title} (0 at all steps)")
    elif not any(panel.lines.values()):
      titles.setdefault((), []).append(panel.title)
    elif lacking := tuple(label for label, points in panel.lines.items() if not points):
      titles.setdefault(lacking, []).append(panel.title)
  for lacking, names in titles.items():
    runs = f" by {', '.join(lacking)}" * bool(lacking)
    say(f"not recorded{runs}: {'; '.join(names)}")


def _positions(buckets: Any) -> list[tuple[float, float]]:
  """Returns (end, loss) of the buckets of an evaluation that have both."""
  points = []
  for bucket in buckets if isinstance(buckets, list) else ():
    if isinstance(bucket, dict):
      last, loss = bucket.get("last"), bucket.get("loss")
      if isinstance(last, int) and isinstance(loss, float):
        points.append((last + 1.0, loss))
  return points


def _by_position(runs: Sequence[Run], say: Callable[[str], object]) -> Panel:
  """Returns the panel of each run's last evaluation."""
  lines: dict[str, Points] = {}
  rows = {}
  for run in runs:
    last = run.evaluations[-1] if run.evaluations else {}
    lines[run.label] = _positions(last.get("buckets"))
    if lines[run.label]:
      rows[run.label] = (last.get("data"), last.get("num_targets"))
  if any(row != next(iter(rows.values())) for row in rows.values()):
    targets = ", ".join(f"{label}: {number} tokens" for label, (_, number) in rows.items())
    say(f"warning: the held-out losses by position are those of different rows ({targets})")
  if len(rows) < len(runs):
    say(f"`python -m experiments.evaluate` records held-out loss by position in {EVALUATION}")
  x = "position in the row, up to"
  return Panel("Held-out loss by position", x, LOSS, lines, has_log_x=True)


def _statistic(runs: Sequence[Run], name: str, say: Callable[[str], object]) -> Panel:
  """Returns the panel of a statistic: the layers of one run, or the means over those of several."""
  title, y = STATISTICS[name]
  if len(runs) == 1:
    layers = runs[0].layers(name)
    chosen = np.linspace(0, len(layers) - 1, min(MOST_LINES, len(layers))).round().astype(int)
    if len(layers) > len(chosen) and name == next(iter(STATISTICS)):
      say(f"{len(chosen)} of {len(layers)} layers are drawn")
    names = {f"layer {layers[i]}": f"layer_{layers[i]}/{name}" for i in chosen}
    return Panel(title, "step", y, {label: runs[0].points(one) for label, one in names.items()})
  lines: dict[str, Points] = {}
  bands = {}
  for run in runs:
    values: dict[float, list[float]] = {}
    for layer in run.layers(name):
      for step, value in run.points(f"layer_{layer}/{name}"):
        values.setdefault(step, []).append(value)
    lines[run.label] = [(step, float(np.mean(of_step))) for step, of_step in values.items()]
    bands[run.label] = [(step, min(of_step), max(of_step)) for step, of_step in values.items()]
  return Panel(title, "step", y, lines, bands)


def styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Returns a colour, a marker and a dash for each label, the same in all panels."""
  return {
    label: {"color": colour, "marker": marker, "linestyle": dash}
    for label, colour, marker, dash in zip(
      labels, plots.LINE_COLOURS, plots.MARKERS, ("-", "--", "-.", ":") * 2
    )
  }


def draw_panel(axes: Any, panel: Panel, style_of: Mapping[str, Mapping[str, Any]]) -> None:
  """Draws the lines of a panel, without a legend.

  Args:
    axes: matplotlib Axes.
    panel: what to draw.
    style_of: label -> arguments of the method plot.
  """
  for label, points in panel.lines.items():
    every = max(len(points) // 8, 1)  # markers of all points would hide the line
    axes.plot(
      *zip(*points),
      label=plots.literal(label),
      fillstyle="none",
      linewidth=1.6,
      markevery=every,
      **style_of[label],
    )
    if band := panel.bands.get(label):
      axes.fill_between(*zip(*band), color=style_of[label]["color"], alpha=0.12, linewidth=0)
  if panel.has_log_x:
    ends = sorted({x for points in panel.lines.values() for x, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ends, [f"{int(x):,}" for x in ends])
    axes.minorticks_off()
  axes.set_title(panel.title, loc="left", fontsize=11)
  axes.set_xlabel(panel.x)
  axes.set_ylabel(panel.y)
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)


def save(
  path: str, runs: Sequence[Run], made: Sequence[Panel], kept: Sequence[KeptText] = ()
) -> None:
  """Writes a picture: the panels under one legend, below them the kept tokens of each run.

  Args:
    path: of the file, which ends in .png or .svg.
    runs: of the panels.
    made: the panels.
    kept: texts to show.
  Raises:
    UsageError: where matplotlib is missing.
    RunError: where the file cannot be written.
  """
  down = -(-len(made) // ACROSS)
  heights = [3.0 * down + 0.8] * bool(made) + [_height(text) for text in kept]
  figure = plots.new_figure(figsize=(13, sum(heights)), dpi=110, layout="constrained")
  parts = list(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
  if made:
    _draw_panels(parts.pop(0), runs, made)
  for part, text in zip(parts, kept):
    _draw_kept(part, text)
  plots.save(figure, path)


def _draw_panels(figure: Any, runs: Sequence[Run], made: Sequence[Panel]) -> None:
  """Draws the panels and one legend of all their lines: the runs, or the layers of one run."""
  steps = {run.label: run.metrics[-1]["step"] for run in runs if run.metrics}
  names = {run.label: run.label for run in runs}
  names |= {label: f"{label}, step {step:,}" for label, step in steps.items()}
  style_of, title = styles(list(names)), None
  if any(panel.bands for panel in made):
    title = (
      "Statistics of selection: mean over the layers, in a band from the least to the greatest"
    )
  if len(runs) == 1:
    ((label, title),) = names.items()
    layers = dict.fromkeys(name for panel in made for name in panel.lines if name != label)
    names = {name: name for name in layers}
    style_of = {label: {"color": "0.3", "marker": "o"}, **styles(list(names))}
  down = -(-len(made) // ACROSS)
  handles: dict[str, Any] = {}
  for i, panel in enumerate(made):
    axes = figure.add_subplot(down, min(ACROSS, len(made)), i + 1)
    draw_panel(axes, panel, style_of)
    handles |= dict(zip(panel.lines, axes.lines))
  shown = [label for label in names if label in handles]
  figure.legend(
    [handles[label] for label in shown],
    [plots.literal(names[label]) for label in shown],
    title=title and plots.literal(title),
    title_fontsize=11,
    loc="outside upper left",
    alignment="left",
    ncols=4,
    frameon=False,
  )


def _text_height(text: KeptText) -> float:
  return max(1.0, TEXT_LINE * plots.lines_of(text.pieces))


def _height(text: KeptText) -> float:
  """Returns inches for the layers of a text, two side by side."""
  return -(-len(text.layers) // 2) * (4.2 + _text_height(text)) + 0.4


def _draw_kept(figure: Any, text: KeptText) -> None:
  """Draws a map and the text for each layer of a run."""
  down = -(-len(text.layers) // 2)
  across = min(len(text.layers), 2)
  grid = figure.add_gridspec(2 * down, across, height_ratios=[4.2, _text_height(text)] * down)
  for i, layer in enumerate(text.layers):
    row, column = divmod(i, 2)
    axes = figure.add_subplot(grid[2 * row, column])
    plots.draw_selection(axes, layer, has_legend=i == 0)
    plots.draw_text(figure.add_subplot(grid[2 * row + 1, column]), text.pieces, layer)
  title = f"{plots.literal(text.label)}: the tokens that are kept"
  figure.suptitle(title, fontsize=12, x=0.01, ha="left")
