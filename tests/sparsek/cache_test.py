import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.cache import decode_step, init_cache, prefill
from sparsek.config import GATES, SCORERS, TransformerConfig
from sparsek.model import Transformer, init_params
from tests.sparsek.helpers import quick_jit

BATCH, LENGTH, CHUNK = 2, 150, 30          # 150 tokens are more than 10 (k + window) in every case
BASE = TransformerConfig(vocab_size=31, num_layers=1, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=16, k=5, window=6,
                         scorer_init_scale=1.5, implementation="reference")
CASES = {
    "straight_through, linear": dict(),
    "value, conv, scanned hybrid": dict(gate="value", scorer="conv", num_layers=2, scan_layers=True, attention="sliding_window,sparsek",
                                        qk_norm=True, use_bias=True),
    "full, every variant": dict(attention="full", norm="layer_norm", mlp="gelu", parallel_residual=True, rope_fraction=0.5,
                                rope_scaling="llama3:8:1:4:32", use_bias=True, out_bias=True, mlp_bias=True),
    "sliding window, learned positions": dict(attention="sliding_window", positions="learned", max_positions=LENGTH, norm="layer_norm", mlp="gelu_tanh"),
    "key_value, conv, lookahead == window": dict(gate="key_value", scorer="conv", scorer_lookahead=6, scorer_normalize=False),
    "value, random, window 0": dict(gate="value", scorer="random", k=8, window=0),
    "straight_through, conv": dict(scorer="conv"),
    "straight_through_softmax, random": dict(gate="straight_through_softmax", scorer="random"),
    "softmax, conv, shared scores": dict(gate="softmax", scorer="conv", scorer_shared=True, scorer_init_noise=1.),
    "key_value, linear": dict(gate="key_value"),
    "key_value, random": dict(gate="key_value", scorer="random"),
    "value, hybrid, k 1, window 1": dict(gate="value", attention="sparsek,full", num_layers=2, k=1, window=1, tie_embeddings=False),
}
# How a row is fed: sizes of prefills (1: a decode_step), then single steps to its end. 90 tokens are 3 chunks, 40 are a chunk and a rest.
SPLITS = {"straight_through, linear": [(40, *[1] * 15, 90), ()]}
TOKENS = jax.random.randint(jax.random.key(5), (BATCH, LENGTH), 0, 31)


def config_of(name):
  return dataclasses.replace(BASE, **CASES[name])


@functools.cache
def params_of(config):
  params = quick_jit(functools.partial(init_params, config))(jax.random.key(0))
  # Logits that move with every change of the hidden state, and biases that are not 0.
  params = jax.tree_util.tree_map_with_path(lambda path, x: x + 0.1 if path[-1].key == "bias" else x, params)
  return {name: jax.tree.map(lambda x: 30 * x, leaf) if name in ("embed", "positions", "lm_head") else leaf for name, leaf in params.items()}


@functools.cache
def compiled(config):
  """Jitted Transformer, prefill and decode_step of a configuration."""
  feed = functools.partial(prefill, config, chunk_size=CHUNK)
  return quick_jit(Transformer(config).apply), quick_jit(feed), quick_jit(functools.partial(decode_step, config))


def feed_row(config, split, tokens=TOKENS, params=None, **sizes):
  _, feed, step = compiled(config)
  params = params_of(config) if params is None else params
  cache, seen, parts = init_cache(config, tokens.shape[0], max_length=LENGTH, **sizes), 0, []
  for size in [*split, *[1] * (LENGTH - sum(split))]:
    tokens_now = tokens[:, seen:seen + size]
    logits, cache = feed(params, cache, tokens_now) if size > 1 else step(params, cache, tokens_now[:, 0])
    parts.append(logits.reshape(tokens.shape[0], size, -1))
    seen += size
  return np.concatenate(parts, axis=1), cache


@functools.cache
def parallel(config):
  return np.asarray(compiled(config)[0]({"params": params_of(config)}, TOKENS))


def test_the_cases_are_every_gate_and_scorer():
  configs = [config_of(name) for name in CASES]
  assert {config.gate for config in configs} == set(GATES) and {config.scorer for config in configs} == set(SCORERS)


@pytest.mark.parametrize("name", CASES)
def test_prefill_and_decode_equal_the_parallel_forward(name):
  config = config_of(name)
  want = parallel(config)
  for split in SPLITS.get(name, [(90,)]):
    got, cache = feed_row(config, split)
    error = np.abs(got - want).max()
    print(f"{name}, fed as {split}: largest difference {error:.1e}, spread of logits {want.std():.1f}")
    assert error < 1e-4
    assert int(cache.seen) == LENGTH


def test_selection_matters_in_these_tests():
  """The comparison above can fail: forgetting the support beyond the slots moves thresholds, gates and logits by far more than 1e-4."""
  config = config_of("value, random, window 0")
  assert np.abs(feed_row(config, (), support_size=0)[0] - parallel(config)).max() > 1e-2


def test_rows_do_not_influence_each_other():
  config = config_of("straight_through, linear")
  other = TOKENS.at[1].set(TOKENS[1, ::-1])
  np.testing.assert_array_equal(feed_row(config, (90,))[0][0], feed_row(config, (90,), other)[0][0])


def test_cache_and_work_do_not_grow():
  config = config_of("value, conv, scanned hybrid")
  start = init_cache(config, BATCH)
  _, cache = feed_row(config, (90,))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), start) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) < 10_000
  # The program of a step depends on shapes only, and has no loop over anything but the bisection: its cost is that of the k + window rows.
  step = functools.partial(decode_step, config)
  flops = lambda cache: quick_jit(step).lower(params_of(config), cache, TOKENS[:, 0]).cost_analysis()["flops"]
  assert flops(start) == flops(cache)


def test_of_equal_scores_the_earlier_token_keeps_its_slot():
  config = config_of("straight_through, linear")
  flat = lambda path, x: 0 * x if "slope" in jax.tree_util.keystr(path) or "linear" in jax.tree_util.keystr(path) else x
  params = jax.tree_util.tree_map_with_path(flat, params_of(config))
  for split in ((90,), ()):
    _, cache = feed_row(config, split, params=params)
    np.testing.assert_array_equal(cache.layers[0].score, np.zeros((BATCH, 2, 5)))
    np.testing.assert_array_equal(np.sort(cache.layers[0].position, -1), np.broadcast_to(np.arange(5), (BATCH, 2, 5)))


def test_bfloat16():
  config = dataclasses.replace(BASE, gate="value", dtype="bfloat16", k=LENGTH)     # dense, so that rounding changes no selection
  _, feed, step = compiled(config)
  cache = init_cache(config, BATCH)
  assert cache.layers[0].slots.key.dtype == jnp.bfloat16
  logits, cache = feed(params_of(config), cache, TOKENS[:, :30])
  last, _ = step(params_of(config), cache, TOKENS[:, 30])
  assert logits.dtype == last.dtype == jnp.float32
  dense = quick_jit(Transformer(dataclasses.replace(BASE, attention="full")).apply)
  want = dense({"params": params_of(config)}, TOKENS[:, :31])
  assert np.abs(np.concatenate([logits, last[:, None]], 1) - want).max() < 0.1 * want.std()


def test_beyond_learned_positions():
  config = config_of("sliding window, learned positions")
  _, cache = feed_row(config, (90,))
  assert np.all(np.isnan(compiled(config)[2](params_of(config), cache, TOKENS[:, 0])[0]))
  with pytest.raises(ValueError, match="tokens has 151 tokens a row, more than max_positions=150"):
    jax.eval_shape(Transformer(config).apply, {"params": params_of(config)}, jnp.zeros((1, LENGTH + 1), jnp.int32))


def test_last_only():
  config = dataclasses.replace(BASE, attention="sliding_window")                   # compiles fast
  feed = functools.partial(prefill, config, params_of(config), init_cache(config, BATCH), chunk_size=CHUNK)
  for tokens in (TOKENS[:, :70], TOKENS[:, :60]):
    last, every = quick_jit(functools.partial(feed, last_only=True))(tokens), quick_jit(feed)(tokens)[0]
    np.testing.assert_allclose(last[0], every[:, -1:], atol=1e-5)


def test_full_layers_need_and_respect_max_length():
  config = dataclasses.replace(BASE, attention="full")
  with pytest.raises(ValueError, match="max_length"):
    init_cache(config, 1)
  cache = init_cache(config, 1, max_length=3)
  for i in range(4):
    logits, cache = compiled(config)[2](params_of(config), cache, TOKENS[:1, i])
    assert np.all(np.isnan(logits)) == (i == 3)


@pytest.mark.parametrize("arguments, message", [
    (dict(tokens=TOKENS[:, :0]), r"tokens has shape \(2, 0\)"),
    (dict(tokens=TOKENS[0]), r"tokens has shape \(150,\)"),
    (dict(tokens=TOKENS[:1, :4]), r"batch=2 \(needed: 1\)"),
    (dict(tokens=TOKENS[:, :4].astype(jnp.float32)), "dtype float32"),
    (dict(config=dataclasses.replace(BASE, k=4)), r"k=5 \(needed: 4\)"),
    (dict(config=dataclasses.replace(BASE, window=4)), r"window=6 \(needed: 4\)"),
    (dict(config=dataclasses.replace(BASE, num_layers=2)), "num_layers=2"),
    (dict(config=dataclasses.replace(BASE, attention="full")), "layer 0 is full"),
    (dict(chunk_size=0), "chunk_size=0"),
])
def test_bad_arguments(arguments, message):
  arguments = dict(config=BASE, params=None, cache=init_cache(BASE, BATCH), tokens=TOKENS[:, :4]) | arguments
  with pytest.raises(ValueError, match=message):
    prefill(**arguments)


def test_bad_sizes():
  with pytest.raises(ValueError, match="batch_size=0"):
    init_cache(BASE, 0)
  with pytest.raises(ValueError, match="support_size=-1"):
    init_cache(BASE, 1, support_size=-1)
  with pytest.raises(ValueError, match=r"token has shape \(2, 3\)"):
    decode_step(BASE, None, init_cache(BASE, BATCH), TOKENS[:, :3])
