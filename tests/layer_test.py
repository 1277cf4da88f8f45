"""The attention layer of `sparsek.functional`, `sparsek.linen` and `sparsek.nnx`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sparsek.functional as sk
import sparsek.linen
import sparsek.nnx
from sparsek.attention.api import sparsek_attention
from sparsek.config import TransformerConfig
from sparsek.model import layers
from sparsek.model.layers import rotary_embedding
from tests.helpers import quick_jit

SHAPE = dict(num_heads=4, num_kv_heads=2, k=3, window=4, implementation="reference")
OPTIONS = sk.Options(16, use_bias=True, **SHAPE)
SEGMENTS = jnp.asarray([[1] * 9 + [2] * 11, [3] * 5 + [4] * 10 + [0] * 5], jnp.int32)
X = jax.random.normal(jax.random.key(0), (2, 20, 16))
apply = quick_jit(sk.apply, static_argnums=0)


@functools.cache
def params(options=OPTIONS):
  values = sk.init(options, jax.random.key(1))
  # Biases and slopes of 0 would hide mistakes.
  leaves, tree = jax.tree.flatten(values)
  noise = [0.1 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
  return jax.tree.unflatten(tree, [x + y for x, y in zip(leaves, noise)])


def test_is_the_layer_of_the_model():
  config = TransformerConfig(
    embed_dim=16, head_dim=4, num_layers=1, use_bias=True, out_bias=True, **SHAPE
  )
  layer = layers.SparseKAttention(config)
  wanted = quick_jit(layer.apply)({"params": params()}, X, SEGMENTS)
  np.testing.assert_array_equal(apply(OPTIONS, params(), X, SEGMENTS), wanted)


def test_is_projections_around_the_operator():
  positions = jnp.arange(40)[None, ::2] + jnp.asarray([[0], [7]])
  weights = params()
  project = lambda name: (
    jnp.einsum("bne,ehd->bnhd", X, weights[name]["kernel"]) + weights[name]["bias"]
  )
  rotate = lambda x: rotary_embedding(x, positions, 10000.0)
  scores = sk.scores(OPTIONS, weights, X)
  mixed = sparsek_attention(
    rotate(project("query")),
    rotate(project("key")),
    project("value"),
    scores,
    k=3,
    window=4,
    implementation="reference",
  )
  wanted = jnp.einsum("bnhd,hde->bne", mixed, weights["out"]["kernel"]) + weights["out"]["bias"]
  got = apply(OPTIONS, weights, X, None, positions)
  np.testing.assert_allclose(got, wanted, atol=2e-6)
  assert not np.allclose(got, apply(OPTIONS, weights, X), atol=1e-2)


def test_without_rotation_positions_do_not_matter():
  options = dataclasses.replace(OPTIONS, rope_theta=None)
  once = apply(options, params(), X)
  np.testing.assert_array_equal(apply(options, params(), X, None, 3 + 2 * jnp.arange(20)), once)


@pytest.mark.parametrize("gate, scorer", [("value", "conv"), ("straight_through", "linear")])
def test_decoding_equals_the_parallel_forward(gate, scorer):
  options = dataclasses.replace(OPTIONS, gate=gate, scorer=scorer)
  weights = params(options)
  wanted = apply(options, weights, X)
  lengths = jnp.asarray([9, 6])
  first, cache = quick_jit(sk.prefill, static_argnums=0)(
    options, weights, sk.init_cache(options, 2), X[:, :9], lengths
  )
  size = sum(x.nbytes for x in jax.tree.leaves(cache))
  step = quick_jit(sk.decode, static_argnums=0)
  for t in range(14):
    at = lengths + t
    active = at < 20
    x = X[jnp.arange(2), jnp.minimum(at, 19)]
    y, cache = step(options, weights, cache, x, active)
    for row in np.flatnonzero(active):
      np.testing.assert_allclose(y[row], wanted[row, at[row]], atol=2e-6)
  np.testing.assert_allclose(first[0], wanted[0, :9], atol=2e-6)
  np.testing.assert_allclose(first[1, :6], wanted[1, :6], atol=2e-6)
  assert cache.seen.tolist() == [20, 20]
  assert sum(x.nbytes for x in jax.tree.leaves(cache)) == size


def test_linen_has_the_same_parameters_and_output():
  layer = sparsek.linen.SparseKAttention(use_bias=True, **SHAPE)
  variables = layer.init(jax.random.key(1), X)
  assert set(variables) == {"params"}
  assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, params())
  y, sown = layer.apply(
    {"params": params()},
    X,
    SEGMENTS,
    mutable=["scorer_loss", "diagnostics"],
    rngs={"scorer_loss": jax.random.key(2)},
  )
  np.testing.assert_allclose(y, apply(OPTIONS, params(), X, SEGMENTS), atol=1e-6)
  ((scores,), (loss,)) = sown["diagnostics"]["scores"], sown["scorer_loss"]["attention_mass"]
  np.testing.assert_allclose(scores, sk.scores(OPTIONS, params(), X, SEGMENTS), atol=1e-6)
  assert loss.shape == () and loss > 0
  assert layer.init_cache(16, 2).seen.shape == (2,)


def test_linen_has_the_fields_of_the_options():
  of = lambda cls: {
    field.name: field.default
    for field in dataclasses.fields(cls)
    if field.name not in ("features", "parent", "name")
  }
  assert of(sparsek.linen.SparseKAttention) == of(sk.Options)


def test_nnx_trains_and_decodes():
  layer = sparsek.nnx.SparseKAttention(16, use_bias=True, rngs=nnx.Rngs(1), **SHAPE)
  assert jax.tree.map(jnp.shape, layer.params) == jax.tree.map(jnp.shape, params())
  optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)

  @nnx.jit
  def step(layer, optimizer):
    loss, grads = nnx.value_and_grad(lambda layer: jnp.mean((layer(X) - X) ** 2))(layer)
    optimizer.update(layer, grads)
    return loss, grads["scorer"]["linear"]["kernel"]

  losses, grads = zip(*(step(layer, optimizer) for _ in range(3)))
  assert losses[2] < losses[1] < losses[0]
  assert jnp.max(jnp.abs(grads[0].get_value())) > 0  # the scorer learns from this loss alone
  again = nnx.merge(*nnx.split(layer))
  y = nnx.jit(lambda layer: layer(X))(again)
  np.testing.assert_allclose(y, apply(OPTIONS, layer.params, X), atol=1e-6)

  @nnx.jit
  def generate(layer):
    _, cache = layer.prefill(layer.init_cache(2), X[:, :19])
    return layer.decode(cache, X[:, 19])[0]

  np.testing.assert_allclose(generate(layer), y[:, 19], atol=2e-6)
  layer.options = dataclasses.replace(layer.options, k=20)
  y, loss = nnx.jit(lambda layer: layer.with_scorer_loss(X, rngs=nnx.Rngs(0)))(layer)
  wanted = apply(dataclasses.replace(OPTIONS, k=20), layer.params, X)
  np.testing.assert_allclose(y, wanted, atol=1e-6)
  assert loss > 0


def test_noise_on_scores_needs_its_key():
  options = dataclasses.replace(OPTIONS, scorer_noise=10.0)
  once = apply(options, params(), X)
  np.testing.assert_array_equal(once, apply(OPTIONS, params(), X))
  noisy = apply(options, params(), X, noise_key=jax.random.key(0))
  assert not np.allclose(noisy, once, atol=1e-3)


NARROW = X[..., :8]
OTHER = dataclasses.replace(OPTIONS, features=8)
NNX = sparsek.nnx.SparseKAttention(16, use_bias=True, rngs=nnx.Rngs(1), **SHAPE)
LINEN = sparsek.linen.SparseKAttention(use_bias=True, **SHAPE)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: sk.apply(OPTIONS, params(), NARROW), "x has width 8, .* features=16"),
    (lambda: sk.apply(OTHER, params(), NARROW), r"query/kernel \(16, 4, 4\) \(needed: \(8, 4, 2\)"),
    (lambda: LINEN.apply({"params": params()}, NARROW), "x has width 8, .* features=16"),
    (lambda: sk.apply(OPTIONS, params(), X[0]), r"x must be floats \[batch, n, features\]"),
    (lambda: sk.decode(OPTIONS, params(), sk.init_cache(OPTIONS, 2), X), r"\[batch, features\]"),
    (lambda: sk.apply(OPTIONS, {}, X), "query/kernel is missing"),
    (
      lambda: sk.decode(OPTIONS, params(), sk.init_cache(OPTIONS, 3), X[:, 0]),
      r"cache was made for batch=3 \(needed: 2\)",
    ),
    (
      lambda: sk.prefill(OPTIONS, params(), sk.init_cache(OPTIONS, 2), X, jnp.asarray([3, 21])),
      "from 0 to 20",
    ),
    (lambda: sk.apply(OPTIONS, params(), X[:, :0]), r"x must be floats .* with n >= 1, .* \(2, 0"),
    (lambda: LINEN.apply({"params": params()}, X[:, :0]), "with n >= 1"),
    (lambda: NNX(X[:, :0]), "with n >= 1"),
    (
      lambda: NNX(X, None, jnp.arange(19)),
      r"positions must have shape \(2, 20\) or .* got \(19,\)",
    ),
    (
      lambda: LINEN.apply({"params": params()}, X, None, jnp.arange(19)),
      "positions must have shape",
    ),
    (
      lambda: sk.decode(
        OPTIONS, params(), sk.init_cache(OPTIONS, 2), X[:, 0], positions=jnp.arange(3)
      ),
      r"positions must have shape \(2,\) or \(1,\), got \(3,\)",
    ),
    (lambda: sk.Options(30), "num_heads=8 must divide features=30"),
    (lambda: sk.Options(32, num_heads=0), "num_heads=0 must be at least 1"),
    (lambda: sk.Options(32, rope_theta=0.0), "rope_theta=0.0 must be at least 1"),
    (lambda: sk.Options(32, scorer="nope"), "scorer='nope' is not one of linear, conv, random"),
    (lambda: sk.Options(32, dtype="int8"), "dtype='int8' is not one of float32, bfloat16"),
    (lambda: sparsek.nnx.SparseKAttention(30, rngs=nnx.Rngs(0)), "must divide features=30"),
    (lambda: sparsek.nnx.SparseKAttention(32, rngs=0), r"rngs=0 must be .* nnx.Rngs\(0\)"),
    (lambda: sk.apply(params(), OPTIONS, X), "options is of type dict, it must be sparsek.fun"),
    (lambda: jax.jit(sk.apply)(OPTIONS, params(), X), "which jax.jit must not trace: jax.jit"),
  ],
)
def test_wrong_widths_and_options_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
