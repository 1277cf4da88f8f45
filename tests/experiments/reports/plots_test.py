import os
import sys

import jax
import numpy as np
import pytest

from sparsek.config import TransformerConfig
from sparsek.errors import RunError, UsageError
from sparsek.experiments.reports import plots
from sparsek.model.transformer import Transformer, init_params, layer_params
from tests.helpers import quick_jit

CONFIG = TransformerConfig(
  vocab_size=13,
  num_layers=3,
  embed_dim=8,
  num_heads=2,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=8,
  k=3,
  window=2,
  attention="sparsek,full,sparsek:k5:w4",
  implementation="reference",
)
RECORDS = [
  {"step": 1, "loss": 5.0},
  {"step": 2, "loss": 4.0},
  {"step": 2, "heldout_loss": 4.5, "loss": None},
]


@pytest.fixture(scope="module")
def params():
  return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
  return np.random.default_rng(0).integers(0, 13, 40)


def test_kept_tokens_are_the_best_candidates_of_every_query(params, tokens):
  kept = plots.kept_tokens(CONFIG, params, tokens)
  assert [layer.layer for layer in kept] == [0, 2]
  apply = quick_jit(
    lambda tokens: Transformer(CONFIG).apply(
      {"params": params}, tokens, method="hidden", mutable=["diagnostics"]
    )
  )
  _, sown = apply(tokens[None])
  for layer in kept:
    scores = np.asarray(
      layer_params(CONFIG, sown["diagnostics"], layer.layer)["attention"]["scores"][0][0]
    )
    own, expected = CONFIG.layer_configs[layer.layer], np.zeros((40, 40), int)
    assert layer.window == own.window == (2 if layer.layer == 0 else 4)
    for i in range(own.window, 40):
      for head in range(2):
        expected[i, np.argsort(-scores[: i - own.window + 1, head], kind="stable")[: own.k]] += 1
    np.testing.assert_array_equal(layer.heads, expected)


def test_kept_tokens_of_heads_with_a_k_and_a_window_of_their_own(tokens):
  """A window that is longer than another head's is kept by the heads that have it."""
  config = TransformerConfig(
    **{**vars(CONFIG), "num_layers": 1, "attention": "sparsek:k3:w2:h1:k0:w5"}
  )
  params = init_params(config, jax.random.key(0))
  (kept,) = plots.kept_tokens(config, params, tokens)
  assert (kept.window, kept.num_heads) == (2, 2)
  apply = quick_jit(
    lambda tokens: Transformer(config).apply(
      {"params": params}, tokens, method="hidden", mutable=["diagnostics"]
    )
  )
  _, sown = apply(tokens[None])
  scores = np.asarray(layer_params(config, sown["diagnostics"], 0)["attention"]["scores"][0][0])
  expected = np.zeros((40, 40), int)
  for i in range(40):
    expected[i, max(i - 4, 0) : max(i - 1, 0)] += 1
    expected[i, np.argsort(-scores[: max(i - 1, 0), 0], kind="stable")[:3]] += 1
  np.testing.assert_array_equal(kept.heads, expected)


def test_a_model_that_selects_nothing_is_refused(params, tokens):
  with pytest.raises(ValueError, match="attention=full: no layer selects"):
    plots.kept_tokens(TransformerConfig(attention="full"), params, tokens)


def test_smoothing_is_an_average_that_starts_at_the_first_value():
  np.testing.assert_allclose(plots.smooth([7.0] * 5), 7.0)
  smoothed = plots.smooth([0.0, 1.0, 1.0, 1.0])
  assert smoothed[0] == 0 and np.all(np.diff(smoothed) > 0) and smoothed[-1] < 1


def test_picture(tmp_path):
  heads = np.zeros((9, 9), int)
  heads[5:, 0], heads[6:, 2] = 1, 2
  kept = [plots.Kept(layer, heads, 2, 2) for layer in range(2)]
  path = tmp_path / "picture.png"
  plots.save_picture(
    str(path),
    {"a": RECORDS, "b $x$": RECORDS},
    kept,
    ["a", "$", "\n", " ", "\x00", "bc", "\n", "d" * 80, "é"],
  )
  assert path.read_bytes().startswith(b"\x89PNG")
  with pytest.raises(RunError, match="nowhere/[a-z]*.png cannot be written"):
    plots.save_picture(str(tmp_path / "nowhere" / "picture.png"), {"a": RECORDS})


def test_times_against_length(tmp_path):
  curves = {"sparsek": [(1000, 0.5), (2048, 1.0)], "dense": [(2048, 3.0)]}
  axes = plots.new_figure().add_subplot()
  plots.draw_times(axes, curves)
  assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
  assert [line.get_label() for line in axes.lines] == list(curves) and [
    label.get_text() for label in axes.get_xticklabels()
  ] == ["1000", "2k"]
  np.testing.assert_array_equal(axes.lines[0].get_xydata(), curves["sparsek"])
  path = tmp_path / "times.png"
  plots.save_times(str(path), {"Forward": curves, "Backward": {}}, "a device")
  assert path.read_bytes().startswith(b"\x89PNG")
  with pytest.raises(RunError, match="nowhere/[a-z]*.png cannot be written"):
    plots.save_times(str(tmp_path / "nowhere" / "times.png"), {"Forward": curves})


def test_a_picture_that_cannot_be_written_stays_what_it_was(tmp_path, monkeypatch):
  path = tmp_path / "times.png"
  path.write_text("old")

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(RunError, match="times.png cannot be written: No space"):
    plots.save_times(str(path), {"Forward": {}}, "a device")
  assert os.listdir(tmp_path) == ["times.png"] and path.read_text() == "old"


def test_marks_of_the_text():
  """Selected tokens have the colour of their number of heads, the window is grey, the rest is not
  marked.
  """
  heads = np.zeros((6, 6), int)
  heads[5, 1], heads[5, 2] = 1, 2
  axes = plots.new_figure().add_subplot()
  plots.draw_text(axes, list("abcdef"), plots.Kept(0, heads, 2, 2))
  light, dark = plots.kept_colours(2)
  marks = {patch.get_x(): patch.get_facecolor()[:3] for patch in axes.patches}
  grey = tuple(int(plots.WINDOW_COLOUR[i : i + 2], 16) / 255 for i in (1, 3, 5))
  assert marks == {
    1: pytest.approx(light),
    2: pytest.approx(dark),
    4: pytest.approx(grey),
    5: pytest.approx(grey),
  }


def test_missing_matplotlib_is_said_with_its_remedy(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
  with pytest.raises(UsageError, match="pip install matplotlib"):
    plots.save_picture(str(tmp_path / "picture.png"), {"a": RECORDS})
