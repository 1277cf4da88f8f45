import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.config import GATES, SCORERS, TransformerConfig
from sparsek.generation import cache as cache_module
from sparsek.generation import cached_attention, cached_chunk
from sparsek.generation.cache import cache_bytes, decode_step, init_cache, lost_scores, prefill
from sparsek.generation.inference import inference_params
from sparsek.model.transformer import Transformer, init_params
from tests.helpers import quick_jit

BATCH, LENGTH, CHUNK = 3, 150, 32  # 150 tokens are more than 10 (k + window) in every case
BASE = TransformerConfig(
  vocab_size=31,
  num_layers=1,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=16,
  k=5,
  window=6,
  scorer_init_scale=1.5,
  scorer_init_slope=1.0,
  implementation="reference",
)
CASES = {
  "straight_through, linear": dict(),
  "value, conv, scanned hybrid": dict(
    gate="value",
    scorer="conv",
    num_layers=2,
    scan_layers=True,
    attention="sliding_window,sparsek",
    qk_norm=True,
    use_bias=True,
  ),
  "full, every variant": dict(
    attention="full",
    norm="layer_norm",
    mlp="gelu",
    parallel_residual=True,
    rope_fraction=0.5,
    rope_scaling="llama3:8:1:4:32",
    use_bias=True,
    out_bias=True,
    mlp_bias=True,
  ),
  "sliding window, learned positions": dict(
    attention="sliding_window",
    positions="learned",
    max_positions=LENGTH,
    norm="layer_norm",
    mlp="gelu_tanh",
  ),
  "key_value, conv, lookahead == window": dict(
    gate="key_value", scorer="conv", scorer_lookahead=6, scorer_normalize=False
  ),
  "value, random, window 0": dict(gate="value", scorer="random", k=8, window=0),
  "straight_through, conv": dict(scorer="conv"),
  "straight_through, random": dict(scorer="random"),
  "key_value, conv, shared scores": dict(
    gate="key_value", scorer="conv", scorer_shared=True, scorer_init_noise=1.0, scorer_init_sink=2.0
  ),
  "key_value, linear": dict(gate="key_value"),
  "key_value, random": dict(gate="key_value", scorer="random"),
  "value, hybrid, k 1, window 1": dict(
    gate="value", attention="sparsek,full", num_layers=2, k=1, window=1, tie_embeddings=False
  ),
  "value, layers of their own k and window": dict(
    gate="value", attention="sparsek:k9:w2,sliding_window:w4", num_layers=2
  ),
  # borders are at every second and every fourth token
  "key_value, evictors": dict(
    gate="key_value", attention="tova:k40:w0,snapkv:k3:w64", num_layers=2
  ),
  "value, scores of its own": dict(gate="value", scorer="conv", attention="attention_sinks"),
  "value, conv, heads of their own k and window": dict(
    gate="value",
    scorer="conv",
    num_kv_heads=4,
    num_layers=2,
    attention="sparsek:h0.2:k0:w9,sparsek:k3:w4:h1-3:k7:w5",
  ),
  "straight_through, linear, heads of their own window": dict(
    num_layers=2, attention="sparsek:h1:k8:w0,sliding_window:w5:h0:w9"
  ),
}
TOKENS = jax.random.randint(jax.random.key(5), (BATCH, LENGTH), 0, 31)
# How rows are fed: a tuple is a prefill of so many tokens a row, a number so many decode_steps of
# the rows that have most left; then single steps to the end. The first prefill is of one chunk;
# afterwards one row has a full window, one a window with room (but where window is 0 or 1), one
# nothing.
MIXED = ((32, 3, 0), 2, (64, 33, 17), 20, (52, 32, 0), 9)
EVEN = ((90,) * BATCH,)
SCHEDULES = {
  "key_value, conv, shared scores": [MIXED, EVEN, ()],
  "value, scores of its own": [((CHUNK,) * BATCH,)],
  "value, conv, heads of their own k and window": [MIXED, ()],
}


def config_of(name):
  return dataclasses.replace(BASE, **CASES[name])


@functools.cache
def params_of(config):
  params = quick_jit(functools.partial(init_params, config))(jax.random.key(0))
  # Logits that move with every change of the hidden state, and biases and norms' scales that are
  # not 0 and 1.
  noise = lambda path, x: 0.3 * jax.random.normal(jax.random.key(len(path[-2].key)), x.shape)
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: x + noise(path, x) if path[-1].key == "bias" or "norm" in path[-2].key else x,
    params,
  )
  return {
    name: jax.tree.map(lambda x: 30 * x, leaf)
    if name in ("embed", "positions", "lm_head")
    else leaf
    for name, leaf in params.items()
  }


@functools.cache
def compiled(config):
  """The parallel forward, and decode_step."""
  return quick_jit(Transformer(config).apply), quick_jit(functools.partial(decode_step, config))


def feed(config, cache, counts, fed, tokens, params):
  """prefill of counts[b] tokens after fed[b]: (logits, cache). What is beyond a row's count differs
  from its next tokens.
  """
  part = np.full((len(tokens), max(counts)), 7)
  for row, (count, before) in enumerate(zip(counts, fed)):
    part[row, :count] = tokens[row, before : before + count]
  return prefill(config, params, cache, jnp.asarray(part), jnp.asarray(counts), chunk_size=CHUNK)


def feed_rows(config, schedule, tokens=TOKENS, params=None, **sizes):
  """Logits [B, LENGTH, V] of every token, and the cache after them."""
  step, params, tokens = (
    compiled(config)[1],
    params_of(config) if params is None else params,
    np.asarray(tokens),
  )
  cache, fed, logits = (
    init_cache(config, len(tokens), max_length=LENGTH, **sizes),
    np.zeros(len(tokens), int),
    np.zeros((*tokens.shape, 31)),
  )
  params = inference_params(config, params)
  for part in (*schedule, LENGTH):
    if isinstance(part, tuple):
      out, cache = feed(config, cache, part, fed, tokens, params)
      for row, count in enumerate(part):
        logits[row, fed[row] : fed[row] + count] = out[row, :count]
      fed += part
      continue
    for _ in range(part):
      active = (fed == fed.min()) if part < LENGTH else fed < LENGTH
      if not active.any():
        break
      out, cache = step(
        params,
        cache,
        jnp.asarray(tokens[np.arange(len(tokens)), np.minimum(fed, LENGTH - 1)]),
        jnp.asarray(active),
      )
      logits[active, fed[active]] = out[active]
      fed += active
  return logits, cache


@functools.cache
def parallel(config):
  return np.asarray(compiled(config)[0]({"params": params_of(config)}, TOKENS))


def test_the_cases_are_every_gate_with_every_scorer():
  assert {(config_of(name).gate, config_of(name).scorer) for name in CASES} == set(
    itertools.product(GATES, SCORERS)
  )


@pytest.mark.parametrize("name", CASES)
def test_rows_that_advance_by_themselves_equal_the_parallel_forward(name, monkeypatch):
  # so that full layers attend to several blocks of rows
  monkeypatch.setattr(cached_chunk, "MAX_LOGITS", 40 * CHUNK)
  config = config_of(name)
  want = parallel(config)
  for schedule in SCHEDULES.get(name, [MIXED]):
    got, cache = feed_rows(config, schedule)
    error = np.abs(got - want).max()
    print(
      f"{name}, fed as {schedule}: largest difference {error:.1e}, spread of "
      f"logits {want.std():.1f}"
    )
    assert error < 1e-4
    assert cache.seen.tolist() == [LENGTH] * BATCH
    assert lost_scores(cache).tolist() == [0] * BATCH


def test_selection_matters_in_these_tests():
  """The comparison above can fail: forgetting the support beyond the slots moves thresholds, gates
  and logits by far more than 1e-4.
  """
  config = config_of("value, random, window 0")
  got, cache = feed_rows(config, EVEN, support_size=0)
  assert np.abs(got - parallel(config)).max() > 1e-2 and np.all(lost_scores(cache) > 0)


def test_rows_do_not_influence_each_other():
  config = config_of("straight_through, linear")
  other = TOKENS.at[1].set(TOKENS[1, ::-1])
  np.testing.assert_array_equal(feed_rows(config, EVEN)[0][0], feed_rows(config, EVEN, other)[0][0])


@pytest.mark.parametrize("name", ["value, conv, scanned hybrid", "value, hybrid, k 1, window 1"])
def test_rows_that_do_not_advance_stay_as_they_are(name):
  config = config_of(name)
  _, cache = feed_rows(config, EVEN)  # a full layer's rows are full here
  _, after = compiled(config)[1](
    inference_params(config, params_of(config)),
    cache,
    TOKENS[:, 0],
    jnp.asarray([False, True, False]),
  )
  for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(after)):
    np.testing.assert_array_equal(old[::2], new[::2])


def test_lost_scores_are_counted():
  """A cache with room for all tells how large supports are; what a small one has no room for is
  lost, at the end of a chunk or when it first happens.
  """
  config = config_of("value, random, window 0")
  run = lambda size: prefill(
    config, params_of(config), init_cache(config, BATCH, support_size=size), TOKENS[:, :32]
  )[1].layers[0]
  beyond = np.sum(np.asarray(run(100).support) > -np.inf, axis=-1)
  assert beyond.min() > 2 and not run(100).lost.any()
  np.testing.assert_array_equal(run(2).lost, beyond - 2)
  small, large = (init_cache(config, BATCH, support_size=size) for size in (2, 100))
  was = np.zeros((BATCH, 2), int)
  for token in np.asarray(TOKENS[:, :32]).T:
    (_, small), (_, large) = (
      compiled(config)[1](params_of(config), cache, token) for cache in (small, large)
    )
    beyond, lost = (
      np.sum(np.asarray(large.layers[0].support) > -np.inf, axis=-1),
      np.asarray(small.layers[0].lost),
    )
    exact = was == 0  # afterwards a small support has other thresholds
    np.testing.assert_array_equal(lost[exact], np.maximum(beyond - 2, 0)[exact])
    was = lost
  assert was.min() > 0 and lost_scores(large).tolist() == [0] * BATCH


def test_gates_that_need_no_thresholds_keep_no_support():
  assert init_cache(BASE, 1, support_size=7).layers[0].support.shape == (1, 2, 0)
  soft = dataclasses.replace(BASE, gate="value")
  with pytest.raises(ValueError, match=r"gates with thresholds=False \(needed: True\)"):
    decode_step(soft, None, init_cache(BASE, 1), jnp.zeros(1, jnp.int32))


def test_cache_and_work_do_not_grow():
  config = config_of("value, conv, scanned hybrid")
  start = init_cache(config, BATCH)
  _, cache = feed_rows(config, MIXED)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), start) == jax.tree.map(
    lambda x: (x.shape, x.dtype), cache
  )
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == cache_bytes(start) < 5_000 * BATCH
  # The program of a step depends on shapes only, and has no loop over anything but the bisection:
  # its cost is that of the k + window rows.
  step = functools.partial(decode_step, config)
  flops = lambda cache: (
    quick_jit(step).lower(params_of(config), cache, TOKENS[:, 0]).cost_analysis()["flops"]
  )
  assert flops(start) == flops(cache)


@pytest.mark.parametrize("kind", ["tova", "kvzap", "random_sink"])
def test_evictors_keep_as_many_bytes_as_sparsek(kind):
  config = lambda kind: dataclasses.replace(BASE, attention=kind, k=512, window=512)
  size = lambda kind: cache_bytes(jax.eval_shape(functools.partial(init_cache, config(kind), 1)))
  assert 0.9 * size("sparsek") < size(kind) <= size("sparsek")


def test_each_group_of_heads_keeps_its_own_k_and_window():
  """Half the heads with twice the keys take as many bytes as all heads with the mean."""
  size = lambda pattern: cache_bytes(
    jax.eval_shape(
      functools.partial(
        init_cache, dataclasses.replace(BASE, num_kv_heads=4, attention=pattern), BATCH
      )
    )
  )
  mean = size("sparsek:k64:w64")
  assert size("sparsek:k64:w32:h0.3:w96") == size("sparsek:k32:w64:h1-2:k96") == mean
  assert size("sliding_window:w32:h1:w64") == BATCH * 4 * (1 + 2 * 4 * (3 * 32 + 64))
  cache = init_cache(dataclasses.replace(BASE, attention="sparsek:h0:k0:w9"), BATCH)
  assert [part.scorer for part in cache.layers[0].groups[:1]] == [None]
  assert lost_scores(cache).tolist() == [0] * BATCH
  other = dataclasses.replace(BASE, attention="sparsek:h0:k0:w8")
  with pytest.raises(ValueError, match=r"cache was made for window=9 \(needed: 8\)"):
    decode_step(other, None, cache, TOKENS[:, 0])


def test_of_equal_scores_the_earlier_token_keeps_its_slot():
  config = config_of("straight_through, linear")
  flat = lambda path, x: (
    0 * x if "slope" in jax.tree_util.keystr(path) or "linear" in jax.tree_util.keystr(path) else x
  )
  params = jax.tree_util.tree_map_with_path(flat, params_of(config))
  for schedule in (MIXED, ()):
    _, cache = feed_rows(config, schedule, params=params)
    np.testing.assert_array_equal(cache.layers[0].score, np.zeros((BATCH, 2, 11)))
    np.testing.assert_array_equal(
      np.sort(cache.layers[0].position, -1), np.broadcast_to(np.arange(5), (BATCH, 2, 5))
    )


def test_of_equal_scores_the_latest_token_leaves_first():
  position = jnp.asarray([[[3, 9, 5, 7], [8, 2, 1, 9]]])
  for scores in (
    [[1.0, 0.0, 0.0, 2.0], [4.0, 4.0, 4.0, 5.0]],
    [[9.0, -jnp.inf, -jnp.inf, 2.0], [0.0, 5.0, 5.0, 5.0]],
  ):
    score, index = cached_attention._worst(jnp.asarray([scores]), position)
    assert index.tolist() == [[1, 0]] and score.tolist() == [[min(row) for row in scores]]


def test_bfloat16():
  # dense, so that rounding changes no selection
  config = dataclasses.replace(BASE, gate="value", dtype="bfloat16", k=LENGTH)
  cache = init_cache(config, BATCH)
  assert cache.layers[0].rows.key.dtype == jnp.bfloat16
  logits, cache = prefill(config, params_of(config), cache, TOKENS[:, :30])
  last, _ = compiled(config)[1](params_of(config), cache, TOKENS[:, 30])
  assert logits.dtype == last.dtype == jnp.float32
  dense = quick_jit(Transformer(dataclasses.replace(BASE, attention="full")).apply)
  want = dense({"params": params_of(config)}, TOKENS[:, :31])
  assert np.abs(np.concatenate([logits, last[:, None]], 1) - want).max() < 0.1 * want.std()


def test_beyond_learned_positions():
  config = config_of("sliding window, learned positions")
  _, cache = feed_rows(config, EVEN)
  assert np.all(np.isnan(compiled(config)[1](params_of(config), cache, TOKENS[:, 0])[0]))
  with pytest.raises(ValueError, match="tokens has 151 tokens a row, more than max_positions=150"):
    jax.eval_shape(
      Transformer(config).apply,
      {"params": params_of(config)},
      jnp.zeros((1, LENGTH + 1), jnp.int32),
    )


@pytest.mark.parametrize("bad", [-1, -31, 31, 2**31 - 1, 2**32 + 5])
def test_a_token_outside_the_vocabulary_is_nan_in_its_row_alone(bad):
  config = config_of("straight_through, linear")
  tokens = np.asarray(TOKENS[:, :8], np.int64)
  tokens[1, 3] = bad
  wanted = np.zeros((BATCH, 8), bool)
  wanted[1, 3:] = True
  params, cache = params_of(config), init_cache(config, BATCH)
  with pytest.raises(ValueError, match=rf"tokens\[1, 3\]={bad} must be an id .* from 0 to 30"):
    prefill(config, params, cache, tokens)
  if bad < 2**31:
    logits, _ = quick_jit(functools.partial(prefill, config))(params, cache, tokens)
    np.testing.assert_array_equal(np.isnan(logits).all(axis=-1), wanted)
    np.testing.assert_array_equal(np.isnan(logits).any(axis=-1), wanted)
    token = jnp.asarray([1, bad, 2], jnp.int32)
    fed = decode_step(config, params, cache, token)[0]
    assert np.isnan(fed).all(axis=-1).tolist() == [False, True, False]
  # A token that is not fed does no harm.
  lengths = np.asarray([8, 3, 8])
  _, cache = prefill(config, params, init_cache(config, BATCH), tokens, lengths)
  active = jnp.asarray([True, False, True])
  _, cache = decode_step(config, params, cache, jnp.asarray([1, -1, 2]), active)
  last = decode_step(config, params, cache, jnp.asarray([1, 2, 3]))[0]
  again = prefill(config, params, init_cache(config, 1), np.asarray([[*tokens[1, :3], 2]]))[0][
    0, -1
  ]
  np.testing.assert_allclose(last[1], again, atol=1e-5)


def test_last_only():
  config = dataclasses.replace(BASE, attention="sliding_window")  # compiles fast
  run = functools.partial(
    prefill, config, params_of(config), init_cache(config, BATCH), chunk_size=CHUNK
  )
  every = run(TOKENS[:, :70])[0]
  last, cache = run(TOKENS[:, :70], np.asarray([70, 20, 0]), last_only=True)
  np.testing.assert_allclose(last[:2, 0], np.stack([every[0, 69], every[1, 19]]), atol=1e-5)
  assert cache.seen.tolist() == [70, 20, 0] and np.all(np.isnan(last[2]))


def test_prompts_of_many_lengths_compile_few_programs():
  config = dataclasses.replace(BASE, attention="sliding_window", window=7)
  run = functools.partial(
    prefill, config, params_of(config), init_cache(config, 1), last_only=True, chunk_size=CHUNK
  )
  before = cache_module._feed._cache_size()
  for length in (*range(1, 60, 7), 60, 61, 62, 63):
    _, cache = run(TOKENS[:1, :length])
  prefill(config, params_of(config), cache, TOKENS[:1, :40], last_only=True, chunk_size=CHUNK)
  assert cache_module._feed._cache_size() - before == 4  # chunks of 16 and 32, first and later ones


def test_the_compiled_step_copies_no_rows():
  """With the cache donated, what is written is the new token's place and a slot: no buffer of a
  layer's keys or values is made anew.
  """
  config = dataclasses.replace(BASE, attention="sparsek,full", num_layers=2, k=40, window=50)
  cache = init_cache(config, 1, max_length=90)
  params = inference_params(config, params_of(config))
  step = (
    jax.jit(functools.partial(decode_step, config), donate_argnums=1)
    .lower(params, cache, TOKENS[:1, 0])
    .compile()
  )
  memory, program = step.memory_analysis(), step.as_text()
  assert memory.alias_size_in_bytes == cache_bytes(cache)
  made = [
    line
    for line in program.splitlines()
    if re.search(r"= f32\[1,2,90,4\]\S* (copy|copy-start)\(", line)
  ]
  assert "f32[1,2,90,4]" in program and not made, made
  assert memory.temp_size_in_bytes < cache_bytes(cache) / 2


def test_full_layers_need_and_respect_max_length():
  config = dataclasses.replace(BASE, attention="full")
  with pytest.raises(ValueError, match="max_length"):
    init_cache(config, 1)
  cache = init_cache(config, 1, max_length=3)
  for i in range(4):
    logits, cache = compiled(config)[1](params_of(config), cache, TOKENS[:1, i])
    assert np.all(np.isnan(logits)) == (i == 3)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(tokens=TOKENS[:, :0]), r"tokens has shape \(3, 0\)"),
    (dict(tokens=TOKENS[0]), r"tokens has shape \(150,\)"),
    (dict(tokens=TOKENS[:1, :4]), r"batch=3 \(needed: 1\)"),
    (dict(tokens=TOKENS[:, :4].astype(jnp.float32)), "dtype float32"),
    (dict(config=dataclasses.replace(BASE, k=4)), r"k=5 \(needed: 4\)"),
    (dict(config=dataclasses.replace(BASE, window=4)), r"window=6 \(needed: 4\)"),
    (dict(config=dataclasses.replace(BASE, num_layers=2)), "num_layers=2"),
    (dict(config=dataclasses.replace(BASE, attention="full")), "layer 0 is full"),
    (dict(config=dataclasses.replace(BASE, attention="sparsek:h0:k9")), "is sparsek:h0:k9"),
    (dict(chunk_size=0), "chunk_size=0"),
    (
      dict(lengths=np.asarray([1, 2])),
      r"lengths must be integers of shape \(3,\), got int64 \(2,\)",
    ),
    (dict(lengths=np.asarray([1, 2, 5])), r"lengths=\[1, 2, 5\] must be from 0 to 4"),
    (
      dict(config=dataclasses.replace(BASE, dtype="bfloat16")),
      r"dtype=float32 \(needed: bfloat16\)",
    ),
  ],
)
def test_bad_arguments(arguments, message):
  arguments = (
    dict(config=BASE, params=None, cache=init_cache(BASE, BATCH), tokens=TOKENS[:, :4]) | arguments
  )
  with pytest.raises(ValueError, match=message):
    prefill(**arguments)


def test_bad_sizes():
  with pytest.raises(ValueError, match="batch_size=0"):
    init_cache(BASE, 0)
  with pytest.raises(ValueError, match="support_size=-1"):
    init_cache(BASE, 1, support_size=-1)
  with pytest.raises(ValueError, match=r"token has shape \(3, 3\)"):
    decode_step(BASE, None, init_cache(BASE, BATCH), TOKENS[:, :3])
  with pytest.raises(
    ValueError, match=r"active must be booleans of shape \(3,\), got int32 \(3,\)"
  ):
    decode_step(BASE, None, init_cache(BASE, BATCH), TOKENS[:, 0], jnp.ones(3, jnp.int32))


def errors_of_16_bits(gate, first, length):
  """Relative errors of logits in bfloat16 beside the parallel forward in float32, [2, length] each.

  Returns those of a prefill of `first` tokens and single steps behind it, and those of the parallel
  forward, by whatever implementations run here by default.
  """
  config = TransformerConfig(
    vocab_size=31,
    num_layers=2,
    embed_dim=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=128,
    k=64,
    window=64,
    gate=gate,
    dtype="bfloat16",
  )
  params = init_params(config, jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (2, length), 0, 31)

  def parallel(dtype):
    model = Transformer(dataclasses.replace(config, dtype=dtype))
    return jax.jit(model.apply)({"params": params}, tokens).astype(jnp.float32)

  with jax.default_matmul_precision("highest"):
    truth = parallel("float32")
  logits, cache = prefill(config, params, init_cache(config, 2), tokens[:, :first], chunk_size=256)
  step, cached = jax.jit(functools.partial(decode_step, config)), [logits]
  for i in range(first, length):
    logits, cache = step(params, cache, tokens[:, i])
    cached.append(logits[:, None])
  cached = jnp.concatenate(cached, axis=1).astype(jnp.float32)
  norm = functools.partial(jnp.linalg.norm, axis=-1)
  error = lambda x: np.asarray(norm(x - truth) / norm(truth))
  return error(cached), error(parallel("bfloat16"))


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["straight_through", "value"])
def test_the_default_kernels_generate_what_the_parallel_forward_does(gate):
  """Compares the errors of the cache with those of the parallel forward: they are of one size.

  Both round to bfloat16, each in its own way, and rounding swaps tokens of nearly equal score now
  and then.
  """
  first, length = 600, 640
  cached, parallel = errors_of_16_bits(gate, first, length)
  for name, part in (("prefill", slice(0, first)), ("steps", slice(first, length))):
    ours, theirs = cached[:, part], parallel[:, part]
    assert np.median(ours) < 1.5 * np.median(theirs), name
    assert np.mean(ours) < 2 * np.mean(theirs), name
