"""Tests of a step of generation by the decode kernels, run lane by lane in NumPy and on a GPU,
compared with XLA; compile_test.py compiles them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.config import TransformerConfig
from sparsek.generation import cache as cache_module
from sparsek.generation import cached_kernels
from sparsek.generation.cache import decode_step, init_cache, prefill
from sparsek.generation.inference import inference_params
from sparsek.kernels import devices
from sparsek.kernels.hopper import (
  decode_attention,
  decode_attention_program,
  fused_decode_layer,
  small_batch_matmul,
)
from sparsek.model.transformer import init_params
from tests.helpers import quick_jit
from tests.kernels.hopper.small_batch_matmul_test import emulate
from tests.kernels.hopper.thread_ops_test import Ref

BASE = dict(
  vocab_size=48,
  embed_dim=128,
  num_heads=4,
  num_kv_heads=2,
  head_dim=64,
  mlp_dim=128,
  k=96,
  window=160,
  dtype="bfloat16",
  implementation="xla",
  scorer_init_scale=4.0,
  scorer_init_slope=1.0,
)
# Fields of the configuration, and multiprocessors: the fewer, the more a program does. Rows of the
# batch for which attention is joined in the kernel ("whole") are fewer here than in truth.
CASES = {
  "sink, in parts": (dict(num_layers=1, scorer_init_sink=1.0), 132),
  "sink, teams of one, whole": (dict(num_layers=1, scorer_init_sink=1.0), 1),
  "teams of two, parallel": (dict(num_layers=1, parallel_residual=True), 4),
  "layers of their own k and window": (
    dict(num_layers=2, attention="sparsek,sparsek:k160:w224"),
    132,
  ),
  "one layer in parts": (dict(num_layers=2, attention="sparsek,sparsek:k160:w224"), 12),
  "sliding window": (dict(num_layers=2, attention="sliding_window:w128,sparsek"), 132),
  "sliding window, teams": (dict(num_layers=2, attention="sliding_window:w256,sparsek"), 1),
  "full": (dict(num_layers=1, attention="full"), 132),
  "full, teams, whole": (dict(num_layers=1, attention="full"), 1),
  "a query head a key head": (dict(num_layers=1, num_kv_heads=4), 1),
  "wide heads": (dict(num_layers=1, head_dim=128, num_kv_heads=4), 132),
  "wide heads, teams, whole": (dict(num_layers=1, head_dim=128, num_kv_heads=4), 4),
}


@functools.cache
def start(case):
  """Returns the configuration, parameters and a cache. Of its rows one has seen nothing, one as
  much as a window, one more than the cache holds, if it can.
  """
  config = TransformerConfig(**(BASE | CASES[case][0]))
  params = inference_params(
    config, quick_jit(functools.partial(init_params, config))(jax.random.key(0))
  )
  tokens = jax.random.randint(jax.random.key(1), (4, 300), 0, config.vocab_size)
  lengths = np.array([0, 160, 256 if case.startswith("full") else 300, 200])
  _, cache = prefill(
    config, params, init_cache(config, 4, max_length=256), tokens, lengths, last_only=True
  )
  ties = lambda layer: (
    layer._replace(score=jnp.round(layer.score), pending=jnp.round(layer.pending))
    if hasattr(layer, "score")
    else layer
  )
  return config, params, cache._replace(layers=tuple(map(ties, cache.layers)))


def divide(case, monkeypatch):
  """Divides the work as the case says."""
  monkeypatch.setattr(decode_attention, "MULTIPROCESSORS", CASES[case][1])
  if case.endswith("whole"):
    monkeypatch.setattr(decode_attention_program, "ROWS", 3)


ACTIVE = jnp.array([True, True, True, False])


def check_close(result, expected, error):
  """Checks that numbers are equal up to an error relative to each or to their spread, and that
  integers are equal.
  """
  result, expected = (
    np.asarray(x if jnp.issubdtype(x.dtype, jnp.integer) else x.astype(jnp.float32))
    for x in (result, expected)
  )
  np.testing.assert_array_equal(np.isfinite(result), np.isfinite(expected))
  there = np.isfinite(expected)
  error = 0 if expected.dtype == np.int32 or not there.any() else error
  np.testing.assert_allclose(
    result[there],
    expected[there],
    rtol=error,
    atol=error and 2 * error * np.std(expected[there]) + 1e-4,
  )


def check(x, layers, expected_x, expected_layers, exact):
  """Checks a step's results, which differ by roundings to 16 bits; with `exact`, the float32 state
  of the first layer depends on none of them.
  """
  check_close(x[:3], expected_x[:3], 2e-2)  # the last row is not active
  for i, pair in enumerate(zip(layers, expected_layers)):
    for a, b in zip(*map(jax.tree.leaves, pair)):
      check_close(a, b, 1e-4 if exact and i == 0 and b.dtype == jnp.float32 else 2e-2)


@pytest.mark.parametrize(
  "case, fused", [*((case, False) for case in CASES), ("sliding window", True)]
)
def test_step_lane_by_lane(case, fused, monkeypatch):
  config, params, cache = start(case)
  plain = jax.jit(functools.partial(cache_module._forward, config), static_argnums=4)
  first, expected = cache, []
  # A second step reads what the first one wrote.
  steps = 2 if fused or config.num_layers == 1 and "whole" in case else 1
  for i in range(steps):
    x, cache = plain(params, cache, (jnp.arange(4) + i)[:, None], ACTIVE.astype(jnp.int32), None)
    expected.append((x[:, 0], cache))
  cache = first
  emulate(monkeypatch)
  divide(case, monkeypatch)
  monkeypatch.setattr(fused_decode_layer, "programs_at_once", lambda: 3)
  monkeypatch.setattr(fused_decode_layer, "can_run", lambda: fused)
  fused_layer, calls = fused_decode_layer.fused_layer, []
  monkeypatch.setattr(
    fused_decode_layer, "fused_layer", lambda *args: calls.append(args) or fused_layer(*args)
  )
  monkeypatch.setattr(jax, "new_ref", lambda x: Ref(np.array(x)))
  typeof = jax.typeof
  monkeypatch.setattr(jax, "typeof", lambda x: None if isinstance(x, Ref) else typeof(x))
  for i in range(steps):
    x, layers = cached_kernels.step(
      config, params, cache.layers, cache.seen, jnp.arange(4) + i, ACTIVE
    )
    check(x, layers, expected[i][0], expected[i][1].layers, exact=True)
    cache = cache._replace(seen=cache.seen + ACTIVE, layers=layers)
  assert len(calls) == (2 * config.num_layers if fused else 0)


@pytest.mark.parametrize(
  "keys, division",
  [
    ((64, 8, 1024, 64), (1, 1, 4)),
    ((32, 8, 1024, 64), (1, 2, 2)),
    ((8, 8, 1024, 64), (2, 4, 1)),
    ((8, 8, 1152, 64), (3, 3, 1)),
    ((1, 8, 1024, 64), (8, 1, 1)),
    ((64, 12, 1024, 64), (1, 1, 4)),
    ((64, 8, 2048, 128), (1, 1, 2)),
    ((3, 7, 4096, 64), (4, 4, 1)),
    ((1, 8, 1000, 64), None),
    ((1, 8, 1408, 64), None),
    ((1, 8, 8192, 64), None),
  ],
)
def test_split(keys, division):
  """Checks (parts, warpgroups, teams) of 132 multiprocessors: all are busy, each is filled."""
  assert decode_attention.split(jax.ShapeDtypeStruct(keys, jnp.bfloat16)) == division


def test_heads_of_their_own_k_and_window_are_left_to_xla(monkeypatch):
  monkeypatch.setattr(decode_attention, "supports", lambda *_: True)
  case = "layers of their own k and window"
  config, params, cache = start(case)
  assert cached_kernels.supports(config, params, cache.layers)
  heads = TransformerConfig(**(BASE | CASES[case][0] | {"attention": "sparsek,sparsek:h0:k160"}))
  assert not cached_kernels.supports(heads, params, init_cache(heads, 4).layers)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_steps(case, monkeypatch):
  """Takes two steps on a GPU with the kernels and without."""
  if not devices.can_run_portable():
    pytest.skip("needs an NVIDIA GPU since Ampere")
  divide(case, monkeypatch)
  config, params, first = start(case)
  results = []
  for on in (True, False):
    for module in (decode_attention, small_batch_matmul, fused_decode_layer):
      monkeypatch.setattr(module, "ENABLED", on)
    jax.clear_caches()
    assert cached_kernels.supports(config, params, first.layers) == on
    logits, cache = decode_step(config, params, first, jnp.arange(4), ACTIVE)
    logits, cache = decode_step(config, params, cache, jnp.arange(4) + 1, ACTIVE)
    results.append((logits, cache))
  (logits, cache), (expected, expected_cache) = results
  check(logits, cache.layers, expected, expected_cache.layers, exact=False)
