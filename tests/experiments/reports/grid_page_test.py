"""The report of a grid: what its pictures show and say, and the structure of its page."""

import html.parser

import numpy as np
import pytest

from sparsek.evaluation.statistics import Interval
from sparsek.experiments.reports import grid, grid_page, grid_picture, plots, records


def row(attention, k, window, loss, gate=None):
  return {
    "attention": attention,
    "k": k,
    "window": window,
    "gate": gate,
    "scorer": "linear" if gate else None,
    "budget": None if attention == "full" else (k or 0) + (window or 0),
    "seeds": 2,
    "heldout_loss": loss,
    "interval": Interval(loss, loss - 0.04, loss + 0.04, 2),
    "over_documents": None,
    "minus_best": None,
    "tokens_per_second": 1000.0,
  }


SUMMARY = [
  row("sparsek", 8, 4, 2.0, "value"),
  row("sparsek", 8, 4, 2.1, "straight_through"),
  row("sparsek", 2, 4, 2.2, "value"),
  row("random", 2, 4, 2.3),
  row("sliding_window", None, 4, 2.4),
  row("full", None, None, 2.5),
]


def drawn(picture):
  axes = plots.new_figure().add_subplot()
  picture.draw(axes)
  return axes


def test_bars_and_bands_are_the_intervals_of_the_table():
  *_, lines = grid_page.pictures([*SUMMARY, {**row("random", 16, 4, 2.6), "interval": None}])
  axes = drawn(lines)
  bars = [line for bars in axes.collections for line in getattr(bars, "get_segments", list)()]
  of_row = [(ends[0][1], ends[1][1]) for ends in bars]
  want = [(r["interval"].low, r["interval"].high) for r in SUMMARY[:-1]] + [(2.6, 2.6)]
  assert np.allclose(sorted(of_row), sorted(want))
  (band,) = axes.patches
  low, high = SUMMARY[-1]["interval"][1:3]
  assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((low, high))
  assert "95 % intervals over seeds" in axes.texts[0].get_text()


def test_names_are_those_that_readers_know():
  names = {
    "sliding_window*5+full": "5 x sliding window + full attention",
    "sparsek:k1280:w512": "SPARSEK (k1280 w512)",
    "my_own": "my own",
  }
  assert {kind: grid_page.name_of(kind) for kind in names} == names
  assert grid_page.labels_of(SUMMARY[2:]) == [
    "SPARSEK",
    "random keys",
    "sliding window",
    "full attention",
  ]
  assert grid_page.labels_of(SUMMARY[:2]) == [
    "SPARSEK, value gate",
    "SPARSEK, straight-through gate",
  ]


def test_pictures_say_what_they_show():
  heatmap, lines = grid_page.pictures(SUMMARY)  # random keys have one setting: no heatmap
  assert heatmap.alt == (
    "Held-out loss of SPARSEK by k (2, 8) and window (4): from 2.2000 down to 2.0000 at k 8, "
    "window 4."
  )
  axes = drawn(heatmap)
  assert [text.get_text() for text in axes.texts] == ["2.2000", "2.0000"]
  assert "full attention: 2.5000 at all keys. SPARSEK, value gate: 2.2000 at 6 keys to" in lines.alt
  (legend,) = [drawn(lines).get_legend()]
  assert [text.get_text() for text in legend.get_texts()] == [
    "full attention",
    "SPARSEK, value gate",
    "SPARSEK, straight-through gate",
    "random keys",
    "sliding window",
  ]
  assert lines.legend > 0


def test_a_picture_has_at_most_eight_lines():
  many = [row(f"kind_{i}", None, 4, 1 + i / 10) for i in range(10)] + SUMMARY[-1:]
  (lines,) = grid_page.pictures(many)
  names = [text.get_text() for text in drawn(lines).get_legend().get_texts()]
  assert names == ["full attention", *(f"kind {i}" for i in range(7))]
  assert "kind 6: 1.6000 at 4 keys." in lines.alt and "kind 7" not in lines.alt
  assert grid_page.not_drawn(many) == ["kind 7", "kind 8", "kind 9"]
  page = grid_page.page(many, [lines], grid.markdown(many), "", "")
  assert "In the table but not in the pictures: kind 7; kind 8; kind 9." in page


class Structure(html.parser.HTMLParser):
  """A parser that keeps every tag with its attributes and the tags around it."""

  EMPTY = {"meta", "img", "br"}

  def __init__(self, text):
    super().__init__()
    self.tags, self.open = [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs), list(self.open)))
    if tag not in self.EMPTY:
      self.open.append((tag, dict(attrs).get("class")))

  def handle_endtag(self, tag):
    assert self.open.pop()[0] == tag


def test_the_page_fits_a_phone(monkeypatch):
  monkeypatch.setattr(grid_page, "png", lambda pictures: b"")
  pictures = grid_page.pictures(SUMMARY)
  text = grid_page.page(SUMMARY, pictures, grid.markdown(SUMMARY), "", "--a=<1>")
  page = Structure(text)
  assert page.open == []
  assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in [
    tag[:2] for tag in page.tags
  ]
  images = [attributes for tag, attributes, _ in page.tags if tag == "img"]
  assert [image["alt"] for image in images] == [picture.alt for picture in pictures]
  assert "max-width: 100%" in text and "overflow-x: auto" in text
  ((_, _, around),) = [tag for tag in page.tags if tag[0] == "table"]
  assert around[-1] == ("div", "scroll")
  (pre,) = [attributes for tag, attributes, _ in page.tags if tag == "pre"]
  assert pre["class"] == "scroll"
  assert sum(tag == "th" for tag, *_ in page.tags) == 11
  assert sum(tag == "tr" for tag, *_ in page.tags) == 1 + len(SUMMARY)


@pytest.mark.parametrize("summary", (SUMMARY[-1:], SUMMARY[-2:-1], SUMMARY[:1]))
def test_single_settings_are_drawn(summary):
  assert grid_page.png(grid_page.pictures(summary)).startswith(b"\x89PNG")


def test_the_record_of_a_grid_makes_its_picture():
  made = grid.summarize(grid_picture.rows(records.load("baselines_grid.json")))
  best, sizes = made[0], {(row["attention"], row["k"], row["window"]) for row in made}
  assert (best["attention"], best["k"], best["window"], best["budget"]) == (
    "sparsek",
    384,
    512,
    896,
  )
  assert best["seeds"] == 3 and f"{best['heldout_loss']:.4f}" == "2.6458"
  assert ("sliding_window", None, 128) in sizes and len(sizes) == 28
