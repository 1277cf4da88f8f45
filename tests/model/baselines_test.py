"""Each baseline against its definition written out in float64, and what all of them promise:
causality, documents apart, memory linear in n.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from sparsek.attention.documents import position_in_document
from sparsek.config import ATTENTION_KINDS, TransformerConfig
from sparsek.generation.cache import init_cache
from sparsek.model import baselines
from sparsek.model.baselines import BASELINES
from sparsek.model.layers import Tokens, rotary_embedding
from tests.helpers import quick_jit

LENGTH = 150  # more than a chunk of queries
CONFIG = TransformerConfig(
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=24,
  num_layers=2,
  k=6,
  window=5,
  implementation="xla",
)
SEGMENTS = np.repeat(np.array([[1, 2, 3, 0]]), [70, 1, 60, 19], axis=1)


def inputs(length=LENGTH):
  return jax.random.normal(jax.random.key(0), (1, length, 16))


def layer(kind, config=CONFIG):
  return baselines.ATTENTION_MODULES[kind](config.for_term(kind))


@functools.cache
def attention(kind):
  """Variables and jitted apply."""
  module = layer(kind)
  return {"params": quick_jit(module.init)(jax.random.key(1), inputs())["params"]}, quick_jit(
    module.apply
  )


def projected(variables, x, segments):
  """Queries [N, H, D], keys and values [N, G, D] in float64, keys before their rotation, and
  positions.
  """
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
  position = np.asarray(position_in_document(jnp.asarray(segments), 1, x.shape[1]))
  heads = lambda name: np.einsum("ne,ehd->nhd", np.asarray(x[0], np.float64), p[name]["kernel"])
  rotate = lambda y: np.asarray(
    rotary_embedding(jnp.asarray(y[None], jnp.float32), position, CONFIG.rope_theta)[0], np.float64
  )
  return rotate(heads("query")), rotate(heads("key")), heads("value"), heads("key"), position[0], p


def visible(kind, query, key, unrotated, position):
  """[G, N, N]: the keys j that query i sees, by the definition of the kind."""
  n, (groups, dim), k, window = len(position), key.shape[1:], CONFIG.k, CONFIG.window
  start = np.arange(n) - position
  seen = np.zeros((groups, n, n), bool)
  mean = lambda block: key[block * k : (block + 1) * k].mean(0)  # blocks of min(64, k) keys
  if kind == "lsh":
    size = next(size for size in range(2, n, 2) if size**2 * (k + window) >= n)
    directions = np.asarray(
      jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), (2, groups, dim, size // 2)),
      np.float64,
    )
    places = np.einsum("ngd,sgdr->sngr", unrotated, directions)
    bucket = (
      size * np.argmax(np.concatenate([places, -places], -1), -1)[0]
      + np.argmax(np.concatenate([places, -places], -1), -1)[1]
    )
  for g in range(groups):
    for i in range(n):
      near = range(max(start[i], i - window + 1), i + 1)
      old = range(start[i], max(start[i], i - window + 1))
      if kind == "attention_sinks":
        chosen = [*near, *list(old)[:k]]
      elif kind == "strided":
        stride = int(np.ceil(n / k))
        chosen = [*near, *(j for j in old if position[j] % stride == stride - 1)]
      elif kind == "lsh":
        chosen = [j for j in range(start[i], i + 1) if bucket[j, g] == bucket[i, g]][
          -(k + window) :
        ]
      elif kind == "block_topk":
        may = [
          b for b in range(n // k + 1) if start[i] <= b * k <= i - window and (b + 1) * k - 1 <= i
        ]
        queries = query[i].reshape(groups, -1, dim)[g].sum(0)
        best = sorted(may, key=lambda b: -(queries @ mean(b)[g]))[:1]
        chosen = [*near, *(j for b in best for j in range(b * k, (b + 1) * k) if j <= i - window)]
      seen[g, i, chosen] = True
  return seen


@pytest.mark.parametrize("kind", ["attention_sinks", "strided", "lsh", "block_topk"])
def test_matches_its_definition(kind):
  variables, apply = attention(kind)
  query, key, value, unrotated, position, p = projected(variables, inputs(), SEGMENTS)
  seen = np.repeat(visible(kind, query, key, unrotated, position), 2, axis=0)
  assert np.all(seen.sum(-1) <= CONFIG.k + CONFIG.window), "more keys than the budget"
  logits = np.einsum("ihd,jhd->hij", query, np.repeat(key, 2, axis=1)) / 2
  weights = np.where(seen, np.exp(logits), 0)
  mixed = np.einsum(
    "hij,jhd->ihd", weights / weights.sum(-1, keepdims=True), np.repeat(value, 2, axis=1)
  )
  np.testing.assert_allclose(
    apply(variables, inputs(), SEGMENTS)[0],
    np.einsum("nhd,hde->ne", mixed, p["out"]["kernel"]),
    atol=2e-5,
  )


def test_a_block_sums_the_gradients_of_all_that_chose_it():
  rng = np.random.default_rng(0)
  # the last block is never chosen
  x, block = (rng.normal(size=(2, 3, 5, 2, 4)).astype(np.float32), rng.integers(0, 4, (2, 3, 7, 2)))
  weight = rng.normal(size=(2, 3, 7, 2, 2, 4)).astype(np.float32)
  found = jax.grad(lambda x: jnp.sum(baselines._blocks_of(x, block) * weight))(x)
  want = np.zeros(x.shape)
  for b, g, i, c in np.ndindex(block.shape):
    want[b, g, block[b, g, i, c]] += weight[b, g, i, c]
  np.testing.assert_allclose(found, want, atol=1e-6)
  assert not want[:, :, 4].any() and found.dtype == x.dtype


def test_linear_matches_its_recurrence():
  variables, apply = attention("linear")
  query, key, value, _, position, p = projected(variables, inputs(), SEGMENTS)
  decay = 1 / (
    1 + np.exp(-(np.asarray(inputs()[0], np.float64) @ p["decay"]["kernel"] + p["decay"]["bias"]))
  )
  state, far = np.zeros((2, 4, 4)), np.zeros(query.shape)
  for i in range(LENGTH):
    state = state * (decay[i] ** (1 / 16))[:, None, None] * (position[i] > 0) + np.einsum(
      "gd,ge->gde", key[i], value[i]
    )
    far[i] = np.einsum("grd,gde->gre", query[i].reshape(2, 2, 4), state).reshape(4, 4)
  far /= np.sqrt((far**2).mean(-1, keepdims=True) + CONFIG.norm_eps)
  shared = {"params": {name: leaf for name, leaf in variables["params"].items() if name != "decay"}}
  near = quick_jit(baselines.ATTENTION_MODULES["sliding_window"](CONFIG).apply)(
    shared, inputs(), SEGMENTS
  )
  np.testing.assert_allclose(
    apply(variables, inputs(), SEGMENTS)[0] - near[0],
    np.einsum("nhd,hde->ne", far, p["out"]["kernel"]),
    atol=1e-4,
  )


def test_random_is_sparsek_with_a_random_scorer():
  variables, apply = attention("random")
  control = baselines.ATTENTION_MODULES["sparsek"](
    dataclasses.replace(CONFIG, scorer="random", scorer_init_scale=1.0, scorer_init_slope=0.0)
  )
  np.testing.assert_array_equal(
    apply(variables, inputs(), SEGMENTS), quick_jit(control.apply)(variables, inputs(), SEGMENTS)
  )


def test_random_sink_chooses_the_first_token_before_random_ones():
  x, segments = inputs(), jnp.asarray(SEGMENTS)
  scores, noise = (
    layer(kind).scores(Tokens(x, x, x, x, segments, 0, x)) for kind in ("random_sink", "random")
  )
  first = position_in_document(segments, 1, LENGTH)[..., None] == 0
  assert np.all(jnp.where(first, scores, jnp.inf) > jnp.max(noise)) and first.sum() == 4
  np.testing.assert_array_equal(jnp.where(first, 0, scores), jnp.where(first, 0, noise))


# tests/attention/eviction_test.py compares those that are left out, or SPARSEK's tests do.
OWN = [kind for kind in BASELINES if kind not in ("tova", "h2o", "snapkv", "random_sink", "kvzap")]


@pytest.mark.parametrize("kind", OWN)
def test_nothing_comes_from_later_tokens_or_other_documents(kind):
  variables, apply = attention(kind)
  x = inputs()
  before = apply(variables, x, SEGMENTS)
  # in the first document, and all of the second
  after = apply(variables, x.at[0, 40:71].add(1.0), SEGMENTS)
  np.testing.assert_allclose(after[0, :40], before[0, :40], atol=1e-5)
  np.testing.assert_allclose(after[0, 71:], before[0, 71:], atol=1e-5)
  assert np.all(np.any(np.abs(after - before)[0, 40:71] > 1e-3, axis=-1))


@pytest.mark.parametrize("kind", [*OWN, "tova", "kvzap"])
def test_no_array_is_quadratic_and_gradients_are_finite(kind):
  module, n = layer(kind), 20000
  variables, _ = attention(kind)
  loss = lambda variables, x: jnp.sum(module.apply(variables, x) ** 2)
  jaxpr = jax.make_jaxpr(jax.grad(loss))(variables, jax.ShapeDtypeStruct((1, n, 16), jnp.float32))

  def largest(jaxpr):
    inner = [largest(sub) for equation in jaxpr.eqns for sub in jaxprs_in_params(equation.params)]
    return max(
      [x.aval.size for equation in jaxpr.eqns for x in equation.outvars if hasattr(x.aval, "size")]
      + inner,
      default=0,
    )

  assert largest(jaxpr.jaxpr) < n * n / 16
  gradient = quick_jit(jax.grad(loss))(variables, inputs())
  frozen = gradient["params"].pop("scorer", {})
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen))
  assert all(np.all(np.isfinite(leaf)) and np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
  "kind, scorer",
  [*((kind, "linear") for kind in ATTENTION_KINDS), ("sparsek", "conv"), ("sparsek", "random")],
)
def test_a_batch_may_be_empty(kind, scorer):
  module = layer(kind, dataclasses.replace(CONFIG, scorer=scorer))
  nothing, segments = jnp.zeros((0, 20, 16)), jnp.zeros((0, 20), jnp.int32)
  out, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), nothing, segments)
  assert out.shape == nothing.shape


def test_blocks_of_an_empty_batch_have_a_gradient():
  x, block = jnp.zeros((0, 2, 3, 6, 4)), jnp.zeros((0, 2, 128, 1), jnp.int32)
  gradient = jax.eval_shape(jax.grad(lambda x: jnp.sum(baselines._blocks_of(x, block))), x)
  assert gradient.shape == x.shape


@pytest.mark.parametrize("kind, joint", [("kvzap", False), ("sparsek", True)])
def test_the_scorer_of_kvzap_learns_in_the_warm_up_alone(kind, joint, monkeypatch):
  losses = []
  compute = lambda *arrays, **options: losses.append(arrays) or jnp.zeros(())
  monkeypatch.setattr(baselines, "max_attention_loss", compute)
  module, variables, rngs = layer(kind), attention("kvzap")[0], {"scorer_loss": jax.random.key(0)}
  sown = lambda name: jax.eval_shape(
    functools.partial(module.apply, mutable=[name], rngs=rngs), variables, inputs()
  )[1]
  assert sown("scorer_warmup") and bool(sown("scorer_loss")) == joint
  assert bool(losses) != joint


def test_names_and_what_is_refused():
  assert set(ATTENTION_KINDS) == set(baselines.ATTENTION_MODULES)
  with pytest.raises(ValueError, match="window=0 must be at least 1 for block_topk"):
    dataclasses.replace(CONFIG, attention="block_topk", window=0)
  with pytest.raises(ValueError, match="attention='lsh': there is no cache for this baseline"):
    init_cache(dataclasses.replace(CONFIG, attention="lsh"), 1)


def test_block_topk_takes_a_window_longer_than_the_row():
  config = TransformerConfig(
    embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, k=4, window=6, attention="block_topk"
  )
  x = jax.random.normal(jax.random.key(0), (1, 6, 8))
  layer = lambda window: baselines.BlockTopKAttention(dataclasses.replace(config, window=window))
  params = layer(6).init(jax.random.key(1), x)
  np.testing.assert_array_equal(layer(2**31 - 1).apply(params, x), layer(6).apply(params, x))
