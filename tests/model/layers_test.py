import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.attention.documents import position_in_document
from sparsek.attention.exact_product import exact_product
from sparsek.attention.joined_products import joined_products
from sparsek.attention.ranking_loss import ranking_loss
from sparsek.attention.scorer_loss import attention_mass_loss
from sparsek.config import SCORER_LOSSES, TransformerConfig
from sparsek.model import projections
from sparsek.model.layers import (
  ATTENTION_MODULES,
  MLP,
  LayerNorm,
  RMSNorm,
  rope_angles,
  rope_frequencies,
  rotary_embedding,
)
from tests.helpers import quick_jit

CONFIG = TransformerConfig(
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=24,
  num_layers=2,
  k=3,
  window=4,
  qk_norm=True,
  use_bias=True,
  implementation="reference",
)
SEGMENTS = jnp.asarray([[1] * 9 + [2] * 11, [3] * 5 + [4] * 10 + [0] * 5], jnp.int32)


def inputs(dtype=jnp.float32):
  return jax.random.normal(jax.random.key(0), (2, 20, 16)).astype(dtype)


@functools.cache
def attention(kind):
  """The module of `kind`, its variables and its jitted apply."""
  module = ATTENTION_MODULES[kind](CONFIG)
  variables = {"params": quick_jit(module.init)(jax.random.key(1), inputs())["params"]}
  return module, variables, quick_jit(module.apply)


def test_rms_norm():
  x = np.random.default_rng(0).normal(size=(3, 5)) * 100
  norm = RMSNorm(epsilon=1e-3)
  got = norm.apply({"params": {"scale": jnp.arange(5.0)}}, jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(
    got, x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-3) * np.arange(5), rtol=1e-5
  )
  small = jnp.full((1, 5), 1e-3, jnp.bfloat16)
  assert norm.apply({"params": {"scale": jnp.ones(5)}}, small).dtype == jnp.bfloat16


def test_rotary_embedding_rotates_pairs():
  x = np.random.default_rng(1).normal(size=(1, 3, 2, 6))
  positions = np.asarray([[0, 7, 1000]])
  angle = positions[0][:, None, None] * 100.0 ** (-np.arange(3) / 3)
  rotated = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angle)[None]
  got = rotary_embedding(jnp.asarray(x, jnp.float32), jnp.asarray(positions), 100.0)
  np.testing.assert_allclose(got, np.concatenate([rotated.real, rotated.imag], -1), atol=2e-6)
  shifted = rotary_embedding(jnp.asarray(x, jnp.float32), jnp.asarray(positions[0]), 100.0)
  np.testing.assert_array_equal(got, shifted)


@pytest.mark.parametrize("scaling", [None, ("llama3", 8.0, 1.0, 4.0, 8192.0)])
def test_angles_are_exact_at_any_position(scaling):
  frequencies = rope_frequencies(64, 5e5, scaling)
  positions = np.concatenate(
    [
      np.arange(1000),
      *(2**i + np.arange(-500, 500) for i in (17, 20, 24, 27)),
      2**31 - 1 - np.arange(1000),
    ]
  )
  got = quick_jit(lambda positions: rope_angles(positions, frequencies))(
    jnp.asarray(positions, jnp.int32)
  )
  error = np.exp(1j * np.asarray(got, np.float64)) - np.exp(
    1j * (positions[:, None] * frequencies.astype(np.longdouble))
  )
  assert got.dtype == jnp.float32 and np.abs(got).max() < 3.1416 and np.abs(error).max() < 6e-7


def test_rotary_products_depend_on_distance_only():
  q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in (0, 1))
  product = lambda i, j: float(
    jnp.sum(rotary_embedding(q, jnp.asarray([i]), 1e4) * rotary_embedding(k, jnp.asarray([j]), 1e4))
  )
  assert (
    abs(product(5, 3) - product(105, 103)) < 1e-6
    and abs(product(5, 3) - product(2**30 + 5, 2**30 + 3)) < 1e-6
  )
  assert abs(product(5, 3) - product(5, 0)) > 1e-3


def test_swiglu():
  module, x = MLP(CONFIG), inputs()
  params = module.init(jax.random.key(0), x)["params"]
  matrix = {name: np.asarray(params[name]["kernel"], np.float64) for name in params}
  gate = np.asarray(x, np.float64) @ matrix["gate"]
  want = (gate / (1 + np.exp(-gate)) * (x @ matrix["up"])) @ matrix["down"]
  np.testing.assert_allclose(module.apply({"params": params}, x), want, atol=1e-5)


def test_kernels_start_with_fan_in_scale():
  config = TransformerConfig(
    embed_dim=256,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    mlp_dim=512,
    num_layers=8,
    attention="sliding_window",
  )
  x = jnp.zeros((1, 2, 256))
  kernels = quick_jit(ATTENTION_MODULES["sliding_window"](config).init)(jax.random.key(0), x)[
    "params"
  ]
  assert abs(kernels["query"]["kernel"].std() * 16 - 1) < 0.02
  assert abs(kernels["out"]["kernel"].std() * 16 * 4 - 1) < 0.02, "1 / sqrt(2 * 8 layers)"


def test_layer_norm():
  x = np.random.default_rng(0).normal(size=(3, 5)) * 100 + 1000
  got = LayerNorm(epsilon=1e-3).apply(
    {"params": {"scale": jnp.arange(5.0), "bias": jnp.ones(5)}}, jnp.asarray(x, jnp.float32)
  )
  np.testing.assert_allclose(
    got,
    (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * np.arange(5) + 1,
    rtol=1e-4,
    atol=1e-4,
  )


@pytest.mark.parametrize("approximate", [False, True])
def test_gelu_mlp_with_biases(approximate):
  config = dataclasses.replace(CONFIG, mlp="gelu_tanh" if approximate else "gelu", mlp_bias=True)
  module, x = MLP(config), inputs()
  params = jax.tree.map(lambda leaf: leaf + 0.1, module.init(jax.random.key(0), x)["params"])
  assert set(params) == {"up", "down"}
  up = x @ params["up"]["kernel"] + params["up"]["bias"]
  cdf = (
    (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))) / 2
    if approximate
    else jax.scipy.stats.norm.cdf(up)
  )
  np.testing.assert_allclose(
    module.apply({"params": params}, x),
    up * cdf @ params["down"]["kernel"] + params["down"]["bias"],
    atol=1e-5,
  )


def test_part_of_a_head_is_rotated():
  x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
  got = rotary_embedding(x, jnp.arange(3), 100.0, dim=4)
  np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
  np.testing.assert_array_equal(got[..., :4], rotary_embedding(x[..., :4], jnp.arange(3), 100.0))


def test_rope_scaling():
  plain = np.asarray(rope_frequencies(16, 1e4), np.float64)
  np.testing.assert_allclose(rope_frequencies(16, 1e4, ("linear", 4.0)), plain / 4, rtol=1e-6)
  got = rope_frequencies(16, 1e4, ("llama3", 8.0, 1.0, 4.0, 64.0))
  turns = 64 * plain / (2 * np.pi)  # in the original context
  assert np.any(turns > 4) and np.any((turns > 1) & (turns < 4)) and np.any(turns < 1)
  for f, t, value in zip(plain, turns, got):
    np.testing.assert_allclose(
      value, f if t > 4 else f / 8 if t < 1 else f * (t - 1) / 3 + f / 8 * (4 - t) / 3, rtol=1e-5
    )


@pytest.mark.parametrize("kind", ATTENTION_MODULES)
def test_matches_dense_attention_written_out(kind):
  """Selection is covered by tests/kernels; here k >= n makes SPARSEK dense, and the rest is
  compared with float64 numpy.
  """
  module, variables, _ = attention(kind)
  if kind == "sparsek":
    module = ATTENTION_MODULES[kind](TransformerConfig(**{**vars(CONFIG), "k": 20}))
  x = np.asarray(inputs(), np.float64)
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
  got = quick_jit(module.apply)(variables, inputs(), SEGMENTS)

  def heads(name):
    y = np.einsum("bne,ehd->bnhd", x, p[name]["kernel"]) + p[name]["bias"]
    if name != "value":
      y = (
        y / np.sqrt((y * y).mean(-1, keepdims=True) + CONFIG.norm_eps) * p[f"{name}_norm"]["scale"]
      )
      position = np.asarray([[*range(9), *range(11)], [*range(5), *range(10), *range(5)]])
      y = np.asarray(
        rotary_embedding(jnp.asarray(y, jnp.float32), position, CONFIG.rope_theta), np.float64
      )
    return y

  query, key, value = (
    heads("query"),
    np.repeat(heads("key"), 2, axis=2),
    np.repeat(heads("value"), 2, axis=2),
  )
  logits = np.einsum("bihd,bjhd->bhij", query, key) / 2
  i, j = np.arange(20)[:, None], np.arange(20)[None]
  visible = (j <= i) & (SEGMENTS[:, :, None] == SEGMENTS[:, None, :])[:, None]
  if kind == "sliding_window":
    visible &= j > i - CONFIG.window
  weights = np.where(visible, np.exp(logits), 0)
  mixed = np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), value)
  np.testing.assert_allclose(got, np.einsum("bnhd,hde->bne", mixed, p["out"]["kernel"]), atol=1e-5)


@pytest.mark.parametrize("kind", ATTENTION_MODULES)
def test_documents_attend_as_if_alone(kind):
  _, variables, apply = attention(kind)
  packed = apply(variables, inputs(), SEGMENTS)
  alone = apply(variables, jnp.roll(inputs(), -5, axis=1), jnp.roll(SEGMENTS, -5, axis=1))
  np.testing.assert_allclose(packed[1, 5:15], alone[1, :10], atol=1e-5)


def test_scores_are_left_in_diagnostics():
  module, variables, apply = attention("sparsek")
  out, left = quick_jit(functools.partial(module.apply, mutable=["diagnostics"]))(
    variables, inputs()
  )
  (scores,) = left["diagnostics"]["scores"]
  assert scores.shape == (2, 20, 2) and scores.dtype == jnp.float32
  np.testing.assert_allclose(out, apply(variables, inputs()), atol=1e-6)


@pytest.mark.parametrize("kind", SCORER_LOSSES)
def test_the_scorers_loss_is_that_of_its_inputs_and_teaches_the_scorer_alone(kind):
  _, variables, _ = attention("sparsek")
  module = ATTENTION_MODULES["sparsek"](dataclasses.replace(CONFIG, scorer_loss_kind=kind))

  def loss(params):
    rngs = {"scorer_loss": jax.random.key(2)}
    (loss,) = module.apply(
      {"params": params}, inputs(), SEGMENTS, mutable=["scorer_loss"], rngs=rngs
    )[1]["scorer_loss"]["attention_mass"]
    return loss

  got, grads = quick_jit(jax.value_and_grad(loss))(variables["params"])
  query, key, _ = module.apply(
    variables, inputs(), position_in_document(SEGMENTS, *SEGMENTS.shape), method="project"
  )
  scores = module.apply(
    variables, inputs(), SEGMENTS, method=lambda module, x, ids: module.scorer(x, ids)
  )
  out, left = module.apply(
    variables,
    inputs(),
    SEGMENTS,
    mutable=["scorer_warmup"],
    rngs={"scorer_loss": jax.random.key(2)},
  )
  np.testing.assert_allclose(left["scorer_warmup"]["attention_mass"][0], got, rtol=1e-5)
  full = {"params": {name: leaf for name, leaf in variables["params"].items() if name != "scorer"}}
  np.testing.assert_allclose(
    out, ATTENTION_MODULES["full"](CONFIG).apply(full, inputs(), SEGMENTS), atol=1e-6
  )
  taught = {
    "divergence": attention_mass_loss,
    "ranking": functools.partial(ranking_loss, k=CONFIG.k),
  }
  queries = jnp.broadcast_to(jnp.arange(20), (2, 20))
  want = taught[kind](scores, query, key, queries, window=CONFIG.window, segment_ids=SEGMENTS)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert all(np.any(g) for g in jax.tree.leaves(grads.pop("scorer"))) and not any(
    np.any(g) for g in jax.tree.leaves(grads)
  )


@pytest.mark.parametrize("kind", ATTENTION_MODULES)
def test_bfloat16(kind):
  _, variables, apply = attention(kind)
  module = ATTENTION_MODULES[kind](
    TransformerConfig(**{**vars(CONFIG), "dtype": "bfloat16", "k": 20})
  )
  exact = ATTENTION_MODULES[kind](TransformerConfig(**{**vars(CONFIG), "k": 20}))
  got, want = (
    quick_jit(module.apply)(variables, inputs(jnp.bfloat16)),
    quick_jit(exact.apply)(variables, inputs()),
  )
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.05)


def one_by_one(x, kernels, exact):
  products = tuple(jnp.tensordot(x, kernel.astype(x.dtype), 1) for kernel in kernels)
  return products, None if exact is None else exact_product(x, exact)


@pytest.mark.parametrize("kind", ["full", "linear", "conv", "shared", "random"])
def test_joined_products_change_gradients_by_rounding_alone(kind, monkeypatch):
  """A layer in bfloat16, against the same with one product for each matrix."""
  fields = {"scorer": kind} if kind in ("linear", "conv", "random") else {"scorer_shared": True}
  config = dataclasses.replace(CONFIG, dtype="bfloat16", **fields)
  module = ATTENTION_MODULES["full" if kind == "full" else "sparsek"](config)
  x = inputs(jnp.bfloat16)
  variables = quick_jit(module.init)(jax.random.key(1), x)
  weights = jax.random.normal(jax.random.key(2), x.shape)

  def loss(params, x):
    return jnp.sum(module.apply({"params": params}, x, SEGMENTS).astype(jnp.float32) * weights)

  used = []

  def run(products):
    monkeypatch.setattr(projections, "joined_products", products)
    return quick_jit(jax.value_and_grad(loss, argnums=(0, 1)))(variables["params"], x)

  def counted(*args):
    used.append(args)
    return joined_products(*args)

  (got, got_grads), (want, want_grads) = run(counted), run(one_by_one)
  assert len(used) == 1 and (used[0][2] is None) == (kind in ("full", "random"))
  assert got == want

  def compare(got, want):
    error = jnp.max(jnp.abs((got - want).astype(jnp.float32)))
    assert got.dtype == want.dtype and error < 2**-5 * jnp.max(jnp.abs(want)) + 1e-6

  jax.tree.map(compare, got_grads, want_grads)
