"""Pictures of runs and benchmarks: losses, tokens that layers keep, accuracies, time by length.

They need matplotlib. Colours are Okabe and Ito's and tints of one blue, which colour-blind readers
can tell apart too.
"""

import dataclasses
import io
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsek.attention.operator import causal_sparsek
from sparsek.config import HeadGroup, TransformerConfig
from sparsek.errors import UsageError
from sparsek.model.head_groups import take_heads
from sparsek.model.transformer import Params, Transformer, layer_params
from sparsek.storage import files

# As many as a reader can tell apart in a panel.
LINE_COLOURS = (
  *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
  *("#E69F00", "#56B4E9", "#000000", "#8C6D31"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")  # hollow: runs close together stay apart
NAMES = {  # of kinds of attention, for readers
  "sparsek": "SPARSEK",
  "full": "full attention",
  "random": "random keys",
  "sliding_window": "sliding window",
  "attention_sinks": "window with sinks",
  "strided": "strided keys",
  "lsh": "hashed buckets",
  "block_topk": "best blocks",
  "linear": "linear attention",
  "tova": "TOVA",
  "h2o": "H2O",
  "snapkv": "SnapKV",
  "random_sink": "random keys and the first",
  "kvzap": "KVzap",
}
WINDOW_COLOUR = "#CFCFCF"
LIGHTEST_KEPT, DARKEST_KEPT = np.array([0.62, 0.79, 0.93]), np.array([0.0, 0.27, 0.53])
MAX_LAYERS = 4  # more maps side by side would be too small to read
TEXT_COLUMNS = 72


def literal(text: str) -> str:
  """Returns a text that Matplotlib draws as it is: no formula between dollars, in any legend."""
  shown = text.replace("$", r"\$")
  return "\u200b" * shown.startswith("_") + shown


def can_draw(otherwise: str) -> bool:
  """Returns whether matplotlib is installed; if not, says so on stderr.

  Args:
    otherwise: what a command does without pictures, for the line.
  """
  try:
    new_figure()
  except UsageError as error:
    print(f"{error}; {otherwise}", file=sys.stderr)
    return False
  return True


def new_figure(**kwargs: Any) -> Any:
  """Returns a figure that is drawn to a file only, without pyplot and its backend.

  Raises:
    UsageError: without matplotlib.
  """
  try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
  except ImportError:
    raise UsageError("pictures need matplotlib: pip install matplotlib") from None
  figure = Figure(**kwargs)
  FigureCanvasAgg(figure)
  return figure


def smooth(values: Sequence[float], memory: float = 2.0) -> np.ndarray:
  """Averages over earlier values with weights exp(-distance / memory), normalised at each value."""
  decay, total, weight, averages = np.exp(-1 / memory), 0.0, 0.0, []
  for value in values:
    total, weight = decay * total + value, decay * weight + 1
    averages.append(total / weight)
  return np.array(averages)


def draw_loss_curves(axes: Any, runs: Mapping[str, Sequence[dict]]) -> None:
  """Draws training loss (line, lightly smoothed) and held-out loss (markers) by step.

  Args:
    axes: matplotlib Axes.
    runs: label -> the records of a metrics.jsonl (`sparsek.runs.metrics.read_metrics`).
  """
  for colour, marker, (label, records) in zip(
    LINE_COLOURS * len(runs), MARKERS * len(runs), runs.items()
  ):
    for key in ("loss", "heldout_loss"):
      points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
      if not points:
        continue
      steps, losses = zip(*points)
      if key == "loss":
        axes.plot(steps, smooth(losses), color=colour, linewidth=1.6, label=f"{label}, training")
      else:
        label = f"{label}, held-out: {losses[-1]:.3f} at the end"
        axes.plot(
          steps,
          losses,
          marker,
          color=colour,
          fillstyle="none",
          markeredgewidth=1.6,
          markersize=8,
          label=label,
        )
  axes.set_xlabel("step")
  axes.set_ylabel("loss (nats per token)")
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False)


@dataclasses.dataclass(frozen=True)
class Kept:
  """The tokens that a sparsek layer selects in a text.

  Attributes:
    layer: index of the layer, from 0.
    heads: [queries, keys] int, the number of KV heads in which the query's selection holds the key,
      or a window that is longer than that of other heads; 0 in the window of all.
    num_heads: KV heads.
    window: most recent tokens that each query sees besides in all heads.
  """

  layer: int
  heads: np.ndarray
  num_heads: int
  window: int


def kept_tokens(config: TransformerConfig, params: Params, tokens: Sequence[int]) -> list[Kept]:
  """Returns the tokens that the sparsek layers select in one document.

  At most 4 layers are taken, evenly spaced from the first to the last.

  Raises:
    ValueError: where the model has no sparsek layer.
  """
  layers = [i for i, kind in enumerate(config.layer_kinds) if kind == "sparsek"]
  if not layers:
    raise ValueError(
      f"attention={','.join(config.attention)}: no layer selects tokens; one must be sparsek"
    )
  chosen = np.linspace(0, len(layers) - 1, min(MAX_LAYERS, len(layers))).round().astype(int)
  layers = [layers[i] for i in chosen]

  @jax.jit
  def expiries(params, tokens):
    _, sown = Transformer(config).apply(
      {"params": params}, tokens, method="hidden", mutable=["diagnostics"]
    )
    diagnostics = [layer_params(config, sown["diagnostics"], layer) for layer in layers]
    scores = [of["attention"]["scores"][0] for of in diagnostics]
    return [
      [_expiry(group, u, config.num_kv_heads) for group in config.layer_configs[layer].head_groups]
      for layer, u in zip(layers, scores)
    ]

  row = jnp.asarray(tokens, jnp.int32)[None]
  i, j = np.arange(row.size)[:, None], np.arange(row.size)
  kept = []
  for layer, expiries_of_groups in zip(layers, jax.device_get(expiries(params, row))):
    groups = config.layer_configs[layer].head_groups
    shortest = min(group.config.window for group in groups)
    heads = np.zeros((row.size, row.size), int)
    for group, expiry in zip(groups, expiries_of_groups):
      window = group.config.window
      in_window = (j + window > i) & (j + shortest <= i)
      heads += sum(in_window | ((j + window <= i) & (i < of_head)) for of_head in expiry.T)
    kept.append(Kept(layer, heads, config.num_kv_heads, shortest))
  return kept


def _expiry(group: HeadGroup, scores: jax.Array, num_kv_heads: int) -> jax.Array:
  """Returns when keys drop out of the selection of some heads, [n, heads]; 0 where none is made."""
  scores = take_heads(scores, group.heads, num_kv_heads)
  if group.kind == "sliding_window":
    return jnp.zeros(scores.shape[1:], jnp.int32)
  return causal_sparsek(scores, group.config.k, delay=group.config.window).expiry[0]


def kept_colours(num_heads: int) -> list[Any]:
  """Returns colours for keys kept by 1 to num_heads heads, light to dark."""
  return [
    tuple(LIGHTEST_KEPT + (DARKEST_KEPT - LIGHTEST_KEPT) * share)
    for share in np.linspace(1 if num_heads == 1 else 0, 1, num_heads)
  ]


def _legend_entries(num_heads: int) -> list[tuple[str, Any]]:
  """Returns (label, colour) of the window, then of keys that are kept by 1 to all heads.

  Middle numbers of heads are left out if there are many.
  """
  numbers = range(1, num_heads + 1) if num_heads <= 4 else (1, num_heads // 2, num_heads)
  colours = kept_colours(num_heads)
  words = lambda number: (
    "selected" if num_heads == 1 else f"selected in {number} of {num_heads} KV heads"
  )
  return [("window", WINDOW_COLOUR)] + [(words(number), colours[number - 1]) for number in numbers]


def draw_selection(axes: Any, kept: Kept, has_legend: bool = True) -> None:
  """Draws a map of query (x) against key (y): the window, and the query's selection."""
  from matplotlib.colors import ListedColormap
  from matplotlib.patches import Patch

  n = len(kept.heads)
  i, j = np.arange(n)[:, None], np.arange(n)
  values = np.where(
    (j <= i) & (j > i - kept.window), 1, np.where(kept.heads > 0, kept.heads + 1, 0)
  )
  colours = ["white", WINDOW_COLOUR, *kept_colours(kept.num_heads)]
  axes.imshow(
    values.T,
    origin="lower",
    cmap=ListedColormap(colours),
    vmin=-0.5,
    vmax=len(colours) - 0.5,
    interpolation="nearest",
    extent=(-0.5, n - 0.5, -0.5, n - 0.5),
    aspect="auto",
  )
  if has_legend:
    entries = _legend_entries(kept.num_heads)
    patches = [Patch(color=colour, label=label) for label, colour in entries]
    axes.legend(handles=patches, loc="upper left", frameon=False)
  axes.set_title(f"Layer {kept.layer}: which keys each query sees", loc="left")
  axes.set_xlabel("query (position of the token that looks back)")
  axes.set_ylabel("key (position of the token seen)")


def draw_text(axes: Any, pieces: Sequence[str], kept: Kept) -> None:
  """Draws the text, and marks the tokens that its last one sees: the window and the selected ones.

  Args:
    axes: matplotlib Axes.
    pieces: text of each token.
    kept: of the same tokens.
  """
  from matplotlib.patches import Rectangle

  colours, n = kept_colours(kept.num_heads), len(pieces)
  row = column = 0
  for position, piece in enumerate(pieces):
    number = kept.heads[-1, position]
    colour = (
      WINDOW_COLOUR if position > n - 1 - kept.window else colours[number - 1] if number else None
    )
    ink = "white" if number and number == kept.num_heads else "black"
    for character in piece:
      if column == TEXT_COLUMNS:
        row, column = row + 1, 0
      if colour is not None:
        axes.add_patch(Rectangle((column, row), 1, 1, color=colour, linewidth=0))
      shown = "\u00ac" if character == "\n" else character if character.isprintable() else "\u00b7"
      if shown != " ":
        axes.text(
          column + 0.5,
          row + 0.52,
          shown,
          color="0.6" if character == "\n" and ink == "black" else ink,
          family="monospace",
          fontsize=8,
          ha="center",
          va="center",
          parse_math=False,
        )
      row, column = (row + 1, 0) if character == "\n" else (row, column + 1)
  axes.set_xlim(0, TEXT_COLUMNS)
  axes.set_ylim(row + 1, 0)
  axes.set_axis_off()
  axes.set_title(f"Layer {kept.layer}: what the last of these {n} tokens still sees", loc="left")


def lines_of(pieces: Sequence[str]) -> float:
  """Returns about how many lines `draw_text` needs for a text."""
  return 1 + sum(piece.count("\n") + len(piece) / TEXT_COLUMNS for piece in pieces)


def save_picture(
  path: str,
  runs: Mapping[str, Sequence[dict]],
  kept: Sequence[Kept] = (),
  pieces: Sequence[str] = (),
) -> None:
  """Writes a PNG: loss curves on top, below them for each layer a map and the text.

  The map shows the keys that the layer keeps, the text has the kept tokens marked.

  Args:
    path: of the file.
    runs: as in `draw_loss_curves`.
    kept: what `kept_tokens` returned, for the tokens that read as `pieces`.
    pieces: text of each token.
  Raises:
    UsageError: where matplotlib is missing.
    RunError: where the file cannot be written.
  """
  columns = max(len(kept), 1)
  heights = [3.2, 4.6, max(1.0, 0.155 * lines_of(pieces))] if kept else [3.6]
  figure = new_figure(
    figsize=(max(6.2 * columns, 8), sum(heights) + 1.2), dpi=110, layout="constrained"
  )
  grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
  axes = figure.add_subplot(grid[0, :])
  axes.set_title("Loss", loc="left")
  draw_loss_curves(axes, runs)
  for column, layer in enumerate(kept):
    draw_selection(figure.add_subplot(grid[1, column]), layer)
    draw_text(figure.add_subplot(grid[2, column]), pieces, layer)
  save(figure, path)


def draw_times(axes: Any, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
  """Draws curves against tokens on logarithmic axes.

  Args:
    axes: matplotlib Axes.
    curves: label -> [(tokens, value)].
  """
  from matplotlib.ticker import LogLocator

  lengths = sorted({n for points in curves.values() for n, _ in points})
  for colour, marker, (label, points) in zip(
    LINE_COLOURS * len(curves), MARKERS * len(curves), curves.items()
  ):
    axes.plot(
      *zip(*points),
      marker=marker,
      color=colour,
      fillstyle="none",
      markeredgewidth=1.6,
      markersize=7,
      linewidth=1.6,
      label=label,
    )
  axes.set_xscale("log", base=2)
  axes.set_yscale("log")
  axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
  axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.yaxis.set_major_formatter("{x:,g}")
  axes.minorticks_off()
  axes.set_xlabel("tokens")
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)


def save_times(
  path: str,
  panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
  title: str = "",
  unit: str = "milliseconds",
) -> None:
  """Writes a PNG with a panel for each kind of pass, side by side.

  `panels` maps the title of a panel to the curves of `draw_times`, in `unit`.

  Raises:
    UsageError: where matplotlib is missing.
    RunError: where the file cannot be written.
  """
  figure = new_figure(figsize=(5.4 * len(panels), 4.4), dpi=110, layout="constrained")
  shared = None
  for index, (name, curves) in enumerate(panels.items()):
    shared = axes = figure.add_subplot(1, len(panels), index + 1, sharey=shared)
    axes.set_title(name, loc="left")
    draw_times(axes, curves)
    if index == 0:
      axes.set_ylabel(unit)
      axes.legend(frameon=False)
  figure.suptitle(title, fontsize=9, x=0.01, ha="left")
  save(figure, path)


def save_accuracies(
  path: str,
  panels: Mapping[str, Mapping[str, Sequence[tuple[int, float, float, float]]]],
  chance: Mapping[str, float],
) -> None:
  """Writes a PNG with a panel for each task: accuracy against length, a line for each run.

  Bars are confidence intervals, dots mark chance.

  Args:
    path: of the file.
    panels: task -> label of a run -> [(tokens, accuracy, lower bound, upper bound)], shares.
    chance: task -> share that guessing gets right.
  Raises:
    UsageError: where matplotlib is missing.
    RunError: where the file cannot be written.
  """
  figure = new_figure(figsize=(max(3 * len(panels), 6), 3.6), dpi=110, layout="constrained")
  shared = None
  for index, (task, curves) in enumerate(panels.items()):
    shared = axes = figure.add_subplot(1, len(panels), index + 1, sharey=shared)
    axes.set_title(task, loc="left")
    for colour, marker, (label, points) in zip(
      LINE_COLOURS * len(curves), MARKERS * len(curves), curves.items()
    ):
      lengths, shares, lower, upper = map(np.array, zip(*points))
      axes.errorbar(
        lengths,
        100 * shares,
        100 * np.array([shares - lower, upper - shares]),
        marker=marker,
        color=colour,
        fillstyle="none",
        linewidth=1.4,
        capsize=3,
        label=literal(label),
      )
    axes.axhline(100 * chance[task], color="0.5", linestyle=":", label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    axes.minorticks_off()
    axes.set_ylim(-4, 104)
    axes.set_xlabel("tokens")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if index == 0:
      axes.set_ylabel("answers right (%)")
      axes.legend(frameon=False, fontsize=8)
  save(figure, path)


def save(figure: Any, path: str) -> None:
  """Writes a picture atomically, in the format that its name ends in, or raises RunError."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format=os.path.splitext(path)[1][1:])
  files.save(path, buffer.getvalue())
