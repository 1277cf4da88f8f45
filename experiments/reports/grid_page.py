"""Report of a grid: pictures with alt texts, and the page report.html around them."""

import base64
import dataclasses
import functools
import html
import io
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sparsek.experiments.reports import plots

MOST_LINES = len(plots.LINE_COLOURS)  # in a picture; a page has as many heatmaps at most
TITLE = "Ablation of attention"
PANEL = (4.8, 3.6)  # inches
_STYLE = """
body { font-family: system-ui, sans-serif; line-height: 1.4; max-width: 1340px; margin: 0 auto;
  padding: 0 1rem 2rem }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr));
  gap: 1rem }
img { display: block; width: 100%; max-width: 100%; height: auto }
.scroll { overflow-x: auto }
table { border-collapse: collapse }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left;
  white-space: nowrap }
th { white-space: normal; vertical-align: bottom }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 8rem }
:is(th, td):is(:nth-child(2), :nth-child(3), :nth-child(n+6)) { text-align: right;
  font-variant-numeric: tabular-nums }
"""


@dataclasses.dataclass(frozen=True)
class Picture:
  """A panel of the report.

  Attributes:
    alt: what is seen, in words.
    draw: draws it on matplotlib Axes.
    legend: inches that a legend below the panel takes.
  """

  alt: str
  draw: Callable[[Any], None]
  legend: float = 0


def name_of(attention: str) -> str:
  """Returns a kind or pattern of attention as readers know it.

  >>> name_of("sliding_window:w256*5+sparsek")
  '5 x sliding window (w256) + SPARSEK'
  """
  names = []
  for term in attention.split("+"):
    kind, _, times = term.partition("*")
    kind, *sizes = kind.split(":")
    name = plots.NAMES.get(kind, kind.replace("_", " "))
    names.append(f"{times} x " * bool(times) + name + f" ({' '.join(sizes)})" * bool(sizes))
  return " + ".join(names)


def labels_of(summary: Sequence[Mapping]) -> list[str]:
  """Returns the name of each row's line: its attention, with what else differs within one."""
  values: dict[tuple[str, str], set] = {}
  for row in summary:
    for name in ("gate", "scorer"):
      values.setdefault((row["attention"], name), set()).add(row[name])
  return [
    ", ".join(
      [
        name_of(row["attention"]),
        *(
          f"{str(row[name]).replace('_', '-')} {name}"
          for name in ("gate", "scorer")
          if len(values[row["attention"], name]) > 1
        ),
      ]
    )
    for row in summary
  ]


def pictures(summary: Sequence[Mapping]) -> list[Picture]:
  """Returns a heatmap over k and window for each kind of attention, then loss against keys.

  A kind with a single k and window has no heatmap. Of more than `MOST_LINES` lines full attention
  and the best are drawn.

  Args:
    summary: rows as `grid.summarize` returns them, best first.
  """
  maps: dict[str, dict[tuple[int, int], float]] = {}
  for row in summary:
    if row["k"] is not None and row["window"] is not None:
      # The best gate and scorer of each k and window comes first.
      values = maps.setdefault(name_of(row["attention"]), {})
      values.setdefault((row["k"], row["window"]), row["heldout_loss"])
  maps = {name: values for name, values in maps.items() if len(values) > 1}
  maps = dict(list(maps.items())[:MOST_LINES])
  losses = [loss for values in maps.values() for loss in values.values()]
  shown: dict[str, list[Mapping]] = {label: [] for label in _order(summary)[:MOST_LINES]}
  for label, row in zip(labels_of(summary), summary):
    if label in shown:
      shown[label].append(row)
  made = [
    Picture(
      _heatmap_alt(name, values),
      functools.partial(_draw_heatmap, name=name, values=values, low=min(losses), high=max(losses)),
    )
    for name, values in maps.items()
  ]
  alt = "Held-out loss against keys per query. " + " ".join(map(_line_alt, shown, shown.values()))
  legend = 0.0 if len(shown) <= 3 else 0.2 * -(-len(shown) // _legend_columns(shown))
  return [*made, Picture(alt, functools.partial(_draw_lines, lines=shown), legend)]


def not_drawn(summary: Sequence[Mapping]) -> list[str]:
  """Returns the lines that `pictures` leaves out."""
  return _order(summary)[MOST_LINES:]


def _order(summary: Sequence[Mapping]) -> list[str]:
  """Returns the names of the lines: full attention, then the others, best first."""
  names = dict.fromkeys(labels_of(summary))
  return sorted(names, key=lambda name: name != plots.NAMES["full"])


def _legend_columns(names: Iterable[str]) -> int:
  return 1 if max(map(len, names)) > 30 else 2


def _heatmap_alt(name: str, values: Mapping[tuple[int, int], float]) -> str:
  (k, window), low = min(values.items(), key=lambda item: item[1])
  ks, windows = (sorted({key[axis] for key in values}) for axis in (0, 1))
  return (
    f"Held-out loss of {name} by k ({', '.join(map(str, ks))}) and window "
    f"({', '.join(map(str, windows))}): from {max(values.values()):.4f} down to {low:.4f} at "
    f"k {k}, window {window}."
  )


def _line_alt(label: str, rows: Sequence[Mapping]) -> str:
  best = {row["budget"]: row["heldout_loss"] for row in reversed(rows)}
  ends = sorted(best, key=lambda keys: (keys is None, keys))
  keys = [f"{best[end]:.4f} at {'all' if end is None else end} keys" for end in ends]
  return f"{label}: {' to '.join(dict.fromkeys((keys[0], keys[-1])))}."


def _draw_heatmap(
  axes: Any, name: str, values: Mapping[tuple[int, int], float], low: float, high: float
) -> None:
  """Draws losses by k and window, darker where lower."""
  across, down = (sorted({key[axis] for key in values}) for axis in (1, 0))
  grid = np.array([[values.get((row, column), np.nan) for column in across] for row in down])
  axes.imshow(grid, cmap="Blues_r", aspect="auto", vmin=low, vmax=max(high, low + 1e-6))
  for (row, column), value in np.ndenumerate(grid):
    if np.isfinite(value):
      colour = "white" if value < (low + high) / 2 else "black"
      axes.text(column, row, f"{value:.4f}", ha="center", va="center", color=colour)
  axes.set(
    xticks=range(len(across)),
    xticklabels=across,
    yticks=range(len(down)),
    yticklabels=down,
    xlabel="window",
    ylabel="k",
  )
  axes.set_title(f"{name}: held-out loss", loc="left", fontsize=11)


def _draw_lines(axes: Any, lines: Mapping[str, Sequence[Mapping]]) -> None:
  """Draws loss against keys: a point with its t interval for each row, a line of the best."""
  for colour, marker, (label, rows) in zip(plots.LINE_COLOURS, plots.MARKERS, lines.items()):
    known = [row for row in rows if row["budget"] is not None]
    for row in rows:
      if row["budget"] is None:
        loss, half = row["heldout_loss"], _half(row)
        axes.axhline(loss, color=colour, linestyle="--", label=label if row is rows[0] else None)
        axes.axhspan(loss - half, loss + half, color=colour, alpha=0.15, linewidth=0)
    if known:
      best = {row["budget"]: row["heldout_loss"] for row in reversed(known)}
      axes.plot(*zip(*sorted(best.items())), color=colour, linewidth=1.4)
      axes.errorbar(
        [row["budget"] for row in known],
        [row["heldout_loss"] for row in known],
        [_half(row) for row in known],
        fmt=marker,
        color=colour,
        fillstyle="none",
        capsize=3,
        label=label if known[0] is rows[0] else None,
      )
  ends = sorted({row["budget"] for rows in lines.values() for row in rows if row["budget"]})
  if ends:
    axes.set_xscale("log", base=2)
    ends = [end for end in ends if end & (end - 1) == 0] if len(ends) > 4 else ends
    axes.set_xticks(ends, [f"{end:,}" for end in ends])
  else:
    axes.set_xticks([])
  axes.minorticks_off()
  has_all = any(rows[0]["budget"] is None for rows in lines.values())
  axes.set_xlabel("keys per query (k + window)" + "; dashed: all" * has_all)
  axes.set_ylabel("nats per token")
  axes.set_title("Held-out loss against keys per query", loc="left", fontsize=11)
  if any(map(_half, itertools.chain(*lines.values()))):
    note = "bars, bands: 95 % intervals over seeds"
    axes.text(0.99, 0.99, note, transform=axes.transAxes, ha="right", va="top", fontsize=8)
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
  if len(lines) <= 3:
    axes.legend(frameon=False, fontsize=9)
  else:
    below = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.2)}
    axes.legend(frameon=False, fontsize=9, ncols=_legend_columns(lines), **below)


def _half(row: Mapping) -> float:
  """Returns half the width of a row's interval over seeds, 0 for one seed."""
  interval = row["interval"]
  return interval.high - interval.value if interval else 0.0


def png(made: Sequence[Picture]) -> bytes:
  """Returns panels in one PNG, at most three side by side.

  Raises:
    UsageError: where matplotlib is missing.
  """
  across = min(len(made), 3)
  down = -(-len(made) // across)
  height = PANEL[1] + max(picture.legend for picture in made)
  size = (PANEL[0] * across, height * down)
  figure = plots.new_figure(figsize=size, dpi=130, layout="constrained")
  for i, picture in enumerate(made):
    picture.draw(figure.add_subplot(down, across, i + 1))
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  return buffer.getvalue()


def _table(markdown: str) -> str:
  """Returns a table of Markdown as HTML, in a box that scrolls."""
  head, _, *rows = (
    [html.escape(cell.strip()) for cell in line.split("|")[1:-1]]
    for line in markdown.strip().splitlines()
  )
  lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
  titles = "".join(f'<th scope="col">{cell}</th>' for cell in head)
  body = "".join(f"<tr>{line}</tr>\n" for line in lines)
  return (
    f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{titles}</tr></thead>\n'
    f"<tbody>\n{body}</tbody>\n</table></div>\n"
  )


def _image(picture: Picture) -> str:
  content = base64.b64encode(png([picture])).decode()
  return f'<img alt="{html.escape(picture.alt)}" src="data:image/png;base64,{content}">\n'


def page(
  summary: Sequence[Mapping], made: Sequence[Picture], markdown: str, about: str, shared: str
) -> str:
  """Returns report.html, which needs no other file.

  Args:
    summary: rows as `grid.summarize` returns them, best first.
    made: the pictures of these rows, or none.
    markdown: the table of these rows.
    about: what its intervals are.
    shared: the flags that all runs share, one a line.
  """
  best, runs = summary[0], sum(row["seeds"] for row in summary)
  sizes = [f"{name} {best[name]}" for name in ("k", "window") if best[name] is not None]
  words = ", ".join([name_of(best["attention"]), *sizes])
  images = f'<div class="pictures">\n{"".join(map(_image, made))}</div>\n' * bool(made)
  lead = (
    f"{runs} run{'s' * (runs > 1)} of {len(summary)} setting{'s' * (len(summary) > 1)}. The lowest "
    f"held-out loss is {best['heldout_loss']:.4f} nats per token: {words}."
  )
  if made and (missing := not_drawn(summary)):
    lead += f" In the table but not in the pictures: {'; '.join(missing)}."
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{TITLE}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
    f"<h1>{TITLE}</h1>\n<p>{html.escape(lead)}</p>\n"
    f"{images}<h2>All settings</h2>\n{_table(markdown)}<p>{html.escape(about)}</p>\n"
    f'<h2>Flags of all runs</h2>\n<pre class="scroll" tabindex="0">{html.escape(shared)}</pre>\n'
    "</body>\n</html>\n"
  )
