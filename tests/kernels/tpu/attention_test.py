"""Tests of the Mosaic TPU kernels, interpreted on the CPU: memory starts as NaN, and races are
detected. compile_test.py compiles them with the real compiler.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

import sparsek
from sparsek.kernels import compaction, devices
from sparsek.kernels.specs import SPECS, Spec
from sparsek.kernels.tpu import attention as tpu_attention
from tests.kernels.attention_base import (
  ARGUMENTS,
  AttentionTest,
  output_and_gradients,
  problem,
  relative_error,
)

INTERPRETED = (
  "batch",
  "documents",
  "one_token",
  "window_0",
  "k_beyond_n",
  "window_beyond_n",
  "ties",
  "huge",
  "head_dim_256",
  "bfloat16",
)


@pytest.fixture
def interpreted(monkeypatch):
  """Makes tiles small, so that short rows have several; fails where a kernel races."""
  monkeypatch.setattr(devices, "tpu_refusal", lambda query: None)
  monkeypatch.setattr(tpu_attention, "ROWS", 128)
  monkeypatch.setattr(tpu_attention, "QUERIES", 256)
  monkeypatch.setattr(tpu_attention, "LISTED", 128)
  with pltpu.force_tpu_interpret_mode(
    pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
  ):
    yield
  assert not interpret_pallas_call.races.races_found


@pytest.mark.usefixtures("interpreted")
class TestMosaicTpu(AttentionTest):
  implementation = "mosaic_tpu"
  specs = INTERPRETED
  gates = ("key_value",)  # goes through everything
  tolerance_16 = 1e-2  # softmax weights are rounded too
  tolerance_from_16 = 2e-3

  batch = Spec("batch", n=80, batch=2, heads=4, groups=2, k=8, window=8)
  # The interpreter's callbacks cannot be computed again; compile_test.py compiles a training step
  # with remat.
  remat = False

  @pytest.mark.skip(reason="test_long_rows_match_xla compares the gradients of both gates")
  def test_scores_gradient_of_straight_through_is_that_of_value(self):
    pass

  @pytest.mark.skip(reason="documents match the truth, which does not mix them")
  def test_documents_do_not_mix(self):
    pass

  @pytest.mark.parametrize(
    "spec, gating",
    [
      (Spec("several_blocks", n=760, k=140, window=40, documents=(450, 3, 200)), "value"),
      (Spec("several_windows", n=500, k=30, window=300, scores="rising"), "straight_through"),
    ],
    ids=lambda x: getattr(x, "name", x),
  )
  def test_long_rows_match_xla(self, spec, gating):
    inputs, cotangent, ids = problem(spec)
    attend = lambda implementation: functools.partial(
      sparsek.sparsek_attention,
      k=spec.k,
      window=spec.window,
      gate=gating,
      segment_ids=ids,
      implementation=implementation,
    )
    ours, plain = (
      output_and_gradients(attend(implementation), inputs, cotangent)
      for implementation in ("mosaic_tpu", "xla")
    )
    for name, x, y in zip(("out", *ARGUMENTS), ours, plain):
      assert relative_error(x, y) < 1e-5, name

  def test_sliding_window_matches_xla(self):
    spec = Spec("band", n=300, heads=4, groups=2, window=150, documents=(170, 90))
    (*inputs, _), cotangent, ids = problem(spec)
    ours, plain = (
      output_and_gradients(
        functools.partial(
          sparsek.sliding_window_attention, window=spec.window, segment_ids=ids, implementation=name
        ),
        inputs,
        cotangent,
      )
      for name in ("mosaic_tpu", "xla")
    )
    for name, x, y in zip(("out", *ARGUMENTS), ours, plain):
      assert relative_error(x, y) < 1e-5, name


@pytest.mark.parametrize(
  "kind, dtype, head_dim, words",
  [
    ("cpu", "bfloat16", 64, "needs a TPU"),
    ("cpu", "float16", 64, "float16"),
    ("cpu", "bfloat16", 320, "head_dim 320"),
    ("TPU v4", "bfloat16", 64, "v5e, v5p or v6e.*TPU v4"),
    ("TPU v5 lite", "bfloat16", 64, None),
    ("TPU v6 lite", "float32", 256, None),
  ],
)
def test_says_why_it_cannot_run(kind, dtype, head_dim, words, monkeypatch):
  platform = "cpu" if kind == "cpu" else "tpu"
  seen = types.SimpleNamespace(platform=platform, device_kind=kind)
  monkeypatch.setattr(jax, "devices", lambda: [seen])
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  x = jnp.zeros((1, 8, 1, head_dim), dtype)
  if words is None:
    assert devices.tpu_refusal(x) is None
    return
  with pytest.raises(
    NotImplementedError, match=f"implementation='mosaic_tpu' cannot run here: .*{words}"
  ):
    sparsek.sparsek_attention(
      x, x, x, jnp.zeros((1, 8, 1)), k=2, window=2, implementation="mosaic_tpu"
    )


def test_is_the_default_on_a_tpu(monkeypatch):
  calls = []
  monkeypatch.setattr(devices, "tpu_refusal", lambda query: None)
  monkeypatch.setattr(
    tpu_attention, "attention", lambda query, *_, **options: calls.append(options["k"]) or query
  )
  inputs, _, _ = problem(SPECS[0])
  (
    sparsek.sparsek_attention(*inputs, k=3, window=2),
    sparsek.sliding_window_attention(*inputs[:3], window=2),
  )
  assert calls == [3, 0]


@pytest.mark.parametrize(
  "n, heads, dim",
  [(1, 1, 64), (300, 1, 128), (1536, 1, 128), (5000, 4, 128), (131072, 1, 128), (131072, 32, 256)],
)
def test_tiles_fit_the_row(n, heads, dim):
  queries, rows, keys, listed = tpu_attention.tiling(n, heads, dim, 300)
  assert queries % rows == queries % keys == rows % 128 == 0 and listed == 384
  assert -n % queries < max(128, n / 8 + 128) and (
    queries * heads * dim <= tpu_attention.MOST or queries == 128
  )


@pytest.mark.parametrize("window, chunk", [(0, 8), (3, 8), (20, 16), (100, 8)])
def test_lists_hold_the_tokens_selected_at_the_first_query(window, chunk):
  n, k = 64, 10
  scores = jax.random.normal(jax.random.key(window), (1, n, 1))
  expiry = sparsek.causal_sparsek(scores, k, delay=window).expiry[0, :, 0]
  lists = functools.partial(compaction.live_lists, window=window, chunk=chunk, slots=16)
  live = jax.jit(lists)(scores[0, :, 0], expiry)
  token = np.arange(n)
  for c in range(n // chunk):
    expected = token[(token + window <= c * chunk) & (c * chunk < np.asarray(expiry))]
    np.testing.assert_array_equal(
      live.token[c], np.pad(expected, (0, 16 - len(expected)), constant_values=n)
    )
    np.testing.assert_array_equal(live.score[c][: len(expected)], scores[0, expected, 0])
    np.testing.assert_array_equal(
      live.expiry[c], np.pad(np.asarray(expiry)[expected], (0, 16 - len(expected)))
    )
    assert live.count[c] == len(expected)
