"""The picture of the demo: answers by distance, kept words, memory and time a token."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsek.experiments.reports import plots

_STYLES = {  # colour, marker, line
  "full": ("#666666", "D", "-"),
  "sparsek": ("#0072B2", "o", "-"),
  "sliding_window": ("#D55E00", "s", "-"),
  "random": ("#009E73", "^", "-"),
}
_COLUMNS = 108  # characters in a line of text
_INK = "#333333"


@dataclasses.dataclass(frozen=True)
class Answers:
  """Right answers by distance.

  Attributes:
    accuracy: kind -> distance -> the share of right answers of each seed.
    budget: keys that a query sees, except with full attention.
    chance: share that guessing gets right.
    reach: words back that a sliding window relays, layer by layer.
  """

  accuracy: Mapping[str, Mapping[int, Sequence[float]]]
  budget: int
  chance: float
  reach: int


def save(
  path: str,
  answers: Answers,
  text: tuple[Sequence[str], np.ndarray],
  spent: Mapping[str, Sequence[Mapping[str, float]]],
) -> None:
  """Writes the picture.

  Args:
    path: of the file.
    answers: the first panel.
    text: the words of a document and their marks, as in `draw_words`.
    spent: kind -> rows of tokens, bytes and seconds.
  Raises:
    UsageError: where matplotlib is missing.
    RunError: where the file cannot be written.
  """
  figure = plots.new_figure(figsize=(10, 7), dpi=110, layout="constrained")
  grid = figure.add_gridspec(2, 4, height_ratios=[4.2, 2.3])
  draw_answers(figure.add_subplot(grid[0, :2]), answers)
  _draw_costs(figure.add_subplot(grid[0, 2]), spent, "bytes", 1e6, "Cache (MB)")
  _draw_costs(figure.add_subplot(grid[0, 3]), spent, "seconds", 1e-3, "Time a token (ms)")
  draw_words(figure.add_subplot(grid[1, :]), *text)
  plots.save(figure, path)


def draw_answers(axes: Any, answers: Answers) -> None:
  """Draws the mean accuracy of the seeds by distance, with the range between them."""
  for kind, (colour, marker, line) in _STYLES.items():
    distances = list(answers.accuracy[kind])
    shares = 100 * np.array([answers.accuracy[kind][d] for d in distances])
    axes.fill_between(distances, shares.min(1), shares.max(1), color=colour, alpha=0.15, lw=0)
    axes.plot(
      distances,
      shares.mean(1),
      line,
      marker=marker,
      color=colour,
      label=plots.NAMES[kind],
      markersize=9 if kind == "full" else 6,
      fillstyle="none" if kind == "full" else "full",
      linewidth=1.8,
    )
  axes.axhline(100 * answers.chance, color="0.4", linestyle=":", label="guessing")
  axes.axvline(answers.reach, color="0.75", linewidth=1)
  axes.text(answers.reach * 1.04, 60, "a window's reach,\nover all layers", color="0.4", fontsize=9)
  axes.set_xscale("log", base=2)
  ticks = [d for d in distances if d & (d - 1) == 0]
  axes.set_xticks(ticks, list(map(str, ticks)))
  axes.minorticks_off()
  axes.set_ylim(-3, 105)
  axes.set_xlabel("words from the fact to the question")
  axes.set_title(f"Right answers (%) with {answers.budget} words in view, or all", loc="left")
  axes.legend(frameon=False, loc="center right", fontsize=9)
  _plain(axes)


def _draw_costs(
  axes: Any, spent: Mapping[str, Sequence[Mapping[str, float]]], key: str, unit: float, title: str
) -> None:
  """Draws a cost by the length of the text, on logarithmic axes."""
  from matplotlib.ticker import LogLocator

  for kind, rows in spent.items():
    colour, marker, _ = _STYLES[kind]
    axes.plot(
      [row["tokens"] for row in rows],
      [row[key] / unit for row in rows],
      marker=marker,
      color=colour,
      label=plots.NAMES[kind],
      linewidth=1.8,
    )
  lengths = [int(row["tokens"]) for row in next(iter(spent.values()))]
  axes.set_xscale("log", base=2)
  axes.set_yscale("log")
  axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
  if key == "seconds":
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.yaxis.set_major_formatter("{x:g}")
  axes.minorticks_off()
  axes.set_xlabel("tokens so far")
  axes.set_title(title, loc="left")
  axes.legend(frameon=False, fontsize=9, loc="upper left")
  _plain(axes)


def draw_words(axes: Any, words: Sequence[str], marks: np.ndarray) -> None:
  """Draws a document with the words marked that its last word still sees.

  Args:
    axes: matplotlib Axes.
    words: of the document.
    marks: for each word -1 in the window, 1 if it is kept, 2 if it is the pass key and kept.
  """
  from matplotlib.patches import Rectangle

  colours = {-1: plots.WINDOW_COLOUR, 1: tuple(plots.LIGHTEST_KEPT), 2: tuple(plots.DARKEST_KEPT)}
  row = column = 0
  for word, mark in zip(words, marks):
    if column + len(word) > _COLUMNS:
      row, column = row + 1, 0
    if mark:
      axes.add_patch(
        Rectangle(
          (column - 0.35, row + 0.06), len(word) + 0.7, 0.88, color=colours[mark], linewidth=0
        )
      )
    for offset, character in enumerate(word):
      axes.text(
        column + offset + 0.5,
        row + 0.52,
        character,
        color="white" if mark == 2 else _INK,
        family="monospace",
        fontsize=9,
        ha="center",
        va="center",
        parse_math=False,
      )
    column += len(word) + 1
  axes.set_xlim(-0.5, _COLUMNS)
  axes.set_ylim(row + 1.2, 0)
  axes.set_axis_off()
  axes.set_title(
    "What SPARSEK still sees at the last word: its window (grey) and the words that it keeps "
    "(blue; dark: the pass key)",
    loc="left",
    fontsize=11,
  )


def _plain(axes):
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
