import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.config import PRESETS, TransformerConfig, preset
from sparsek.kernels import devices
from sparsek.model import transformer
from sparsek.model.layers import sample_loss_queries
from sparsek.model.transformer import (
  Transformer,
  count_params,
  hidden_to_logits,
  init_params,
  output_matrix,
  unstack_layers,
)
from tests.helpers import SMALLEST, quick_jit

N = 24
BASE = TransformerConfig(
  vocab_size=N,
  num_layers=1,
  embed_dim=16,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  mlp_dim=24,
  k=3,
  window=4,
  tie_embeddings=False,
  implementation="reference",
)
FULL = dataclasses.replace(BASE, attention="full")
SEGMENTS = jnp.asarray([[1] * 15 + [2] * 9], jnp.int32)
# each token once: row v of the embedding belongs to one position
TOKENS = jax.random.permutation(jax.random.key(9), N)[None]
# Every scorer; lookahead as far as the window; no window at all.
CASES = {
  "linear": dict(),
  "conv, lookahead == window": dict(scorer="conv", scorer_lookahead=4, gate="value"),
  "conv, window 1": dict(scorer="conv", scorer_lookahead=1, window=1, gate="key_value"),
  "conv, window 0": dict(scorer="conv", scorer_lookahead=0, window=0, gate="value"),
  "random": dict(scorer="random", gate="value"),
  "hybrid": dict(attention="full,sparsek", num_layers=2, scorer="conv", scorer_normalize=False),
}


@functools.cache
def params_of(config):
  return init_params(config, jax.random.key(0))


@functools.cache
def compiled(config):
  return quick_jit(Transformer(config).apply)


def run(config, tokens=TOKENS, segment_ids=SEGMENTS, params=None):
  return compiled(config)(
    {"params": params_of(config) if params is None else params}, tokens, segment_ids
  )


@pytest.mark.parametrize("name", CASES)
def test_no_logit_depends_on_a_later_token(name):
  config = dataclasses.replace(BASE, **CASES[name])
  params = params_of(config)
  weight = jax.random.normal(jax.random.key(3), (N,))

  def summary(embedding, tokens, query):
    logits = Transformer(config).apply(
      {"params": {**params, "embed": {"embedding": embedding}}}, tokens, SEGMENTS
    )[0]
    return logits[query] @ weight, logits

  gradient_and_logits = quick_jit(jax.grad(summary, has_aux=True))
  embedding = params["embed"]["embedding"]
  size = np.stack(
    [
      np.abs(gradient_and_logits(embedding, TOKENS, query)[0]).max(-1)[TOKENS[0]]
      for query in range(N)
    ]
  )
  i, j = np.arange(N)[:, None], np.arange(N)[None]
  past = (np.asarray(SEGMENTS[0])[:, None] == np.asarray(SEGMENTS[0])[None]) & (j <= i)
  assert not np.any(size[~past]), "a logit depends on a later token or another document"
  assert np.all(np.diag(size) > 0)
  assert np.mean(size[past] > 0) > 0.3  # the past is seen
  # Selection is not differentiable, so also change the tokens from 10 on: nothing before may move.
  changed = TOKENS.at[0, 10:].set(TOKENS[0, 10:][::-1])
  before, after = (gradient_and_logits(embedding, tokens, 0)[1] for tokens in (TOKENS, changed))
  np.testing.assert_array_equal(before[:10], after[:10])
  assert np.max(np.abs(before[10:] - after[10:])) > 1e-3


def test_packed_documents_give_the_logits_of_each_alone():
  config = dataclasses.replace(BASE, **CASES["conv, lookahead == window"])
  packed = run(config)
  alone = run(config, jnp.roll(TOKENS, -15, axis=1), jnp.roll(SEGMENTS, -15, axis=1))
  np.testing.assert_allclose(packed[:, 15:], alone[:, :9], atol=1e-5)
  np.testing.assert_allclose(packed[:, :15], alone[:, 9:], atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_times_output_matrix_is_the_logits(tied):
  config = dataclasses.replace(FULL, tie_embeddings=tied)
  params = params_of(config)
  hidden = quick_jit(functools.partial(Transformer(config).apply, method="hidden"))(
    {"params": params}, TOKENS, segment_ids=SEGMENTS
  )
  matrix = output_matrix(config, params)
  assert matrix.shape == (16, N) and ("lm_head" in params) != tied
  np.testing.assert_allclose(hidden_to_logits(hidden, matrix), run(config), atol=1e-5)


def test_scanned_layers_equal_a_loop():
  config = dataclasses.replace(
    BASE, num_layers=4, scan_layers=True, scorer="random", attention="sparsek,full"
  )
  params = params_of(config)
  assert params["layers"]["blocks_1"]["mlp"]["up"]["kernel"].shape == (2, 16, 24)
  loop = dataclasses.replace(config, scan_layers=False)
  assert jax.tree.map(jnp.shape, unstack_layers(config, params)) == jax.tree.map(
    jnp.shape, params_of(loop)
  )
  # The random scorer's salt is the layer's index: it must reach the scanned layers.
  np.testing.assert_allclose(
    run(config), run(loop, params=unstack_layers(config, params)), atol=1e-5
  )


def test_layers_have_a_k_and_a_window_of_their_own():
  """A pattern names as many layers, each as in a model that has its k and window everywhere."""
  uniform = dataclasses.replace(BASE, k=5, window=2)
  for pattern in ("sparsek:k5:w2", "sparsek:k5:w2*1"):
    np.testing.assert_array_equal(run(dataclasses.replace(BASE, attention=pattern)), run(uniform))
  mixed = dataclasses.replace(
    BASE, num_layers=4, attention="sliding_window:w2*3, sparsek:k5", window=3
  )
  assert mixed.attention == ("sliding_window:w2",) * 3 + ("sparsek:k5",) and mixed.layer_kinds == (
    "sliding_window",
  ) * 3 + ("sparsek",)
  assert [(layer.k, layer.window) for layer in mixed.layer_configs] == [(3, 2)] * 3 + [(5, 3)]
  # What a layer must not have, another may.
  mixed = dataclasses.replace(mixed, num_layers=2, attention="sliding_window:w2, sparsek:k5")
  assert dataclasses.replace(mixed, scorer="conv", scorer_lookahead=3).layer_configs[0].window == 2
  for other in ("sliding_window:w2,sparsek", "sliding_window,sparsek:k5"):
    changed = run(dataclasses.replace(mixed, attention=other), params=params_of(mixed))
    assert np.max(np.abs(run(mixed) - changed)) > 1e-3
  scanned = dataclasses.replace(mixed, scan_layers=True)
  np.testing.assert_allclose(run(scanned), run(mixed), atol=1e-5)
  for pattern, message in (
    ("sparsek:k0", "k=0 must be at least 1"),
    ("sliding_window:w0", "window=0 must be at least 1 for sliding_window"),
    ("sparsek:w1:k5", "the term 'sparsek:w1:k5' is not KIND, KIND:kK"),
    ("sparsek:k", "the term 'sparsek:k' is not KIND"),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(BASE, attention=pattern)
  with pytest.raises(ValueError, match="scorer_lookahead=4 must be at most window=3"):
    dataclasses.replace(BASE, scorer="conv", attention="sparsek:w3")


def test_remat_and_scan_change_no_gradient():
  plain = dataclasses.replace(BASE, **CASES["conv, lookahead == window"], tie_embeddings=True)
  stacked = dataclasses.replace(plain, scan_layers=True)
  params = params_of(stacked)

  def loss_and_gradient(config, remat):
    config = dataclasses.replace(config, remat=remat)
    used = params if config.scan_layers else unstack_layers(stacked, params)
    loss = lambda params: jnp.mean(
      Transformer(config).apply({"params": params}, TOKENS, SEGMENTS) ** 2
    )
    loss, gradient = quick_jit(jax.value_and_grad(loss))(used)
    return loss, unstack_layers(config, gradient)

  loss, gradient = loss_and_gradient(plain, "none")
  for config, remat in ((plain, "dots"), (stacked, "attention")):
    other, other_gradient = loss_and_gradient(config, remat)
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), other_gradient, gradient)
  flat = jax.tree_util.tree_flatten_with_path(gradient)[0]
  assert all(np.all(np.isfinite(leaf)) for _, leaf in flat)
  unused = [jax.tree_util.keystr(path) for path, leaf in flat if not np.any(leaf != 0)]
  assert not unused, f"parameters without a gradient: {unused}"


@pytest.mark.parametrize(
  "remat, times, implementation",
  [
    ("attention", 1, "xla"),
    ("full", 2, "xla"),
    ("attention", 1, "mosaic_gpu"),
    ("dots", 1, "mosaic_gpu"),
  ],
)
def test_attention_is_computed_again_under_full_remat_only(
  remat, times, implementation, monkeypatch
):
  """Traced only: no GPU is needed."""
  monkeypatch.setattr(devices, "hopper_refusal", lambda _: None)
  config = dataclasses.replace(
    FULL,
    num_layers=2,
    attention="sparsek",
    dtype="bfloat16",
    remat=remat,
    implementation=implementation,
  )
  params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  gradient = jax.make_jaxpr(
    jax.grad(lambda params: jnp.sum(Transformer(config).apply({"params": params}, TOKENS)))
  )(params)

  def count(jaxpr, name):
    inside = (
      part
      for eqn in jaxpr.eqns
      for part in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
      if hasattr(part, "eqns")
    )
    return sum(eqn.params.get("name") == name for eqn in jaxpr.eqns) + sum(
      count(part, name) for part in inside
    )

  assert {name: count(gradient.jaxpr, name) for name in ("_forward", "select")} == {
    "_forward": 2 * times,
    "select": 2 * times,
  }


def test_bfloat16_activations_float32_parameters():
  config = dataclasses.replace(FULL, dtype="bfloat16")
  params = params_of(config)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  logits = run(config)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, run(FULL, params=params), atol=0.02)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_diagnostics_hold_the_scores(scan_layers):
  config = dataclasses.replace(BASE, num_layers=2, scan_layers=scan_layers)
  apply = functools.partial(Transformer(config).apply, mutable=["diagnostics"])
  _, left = jax.eval_shape(apply, {"params": params_of(config)}, TOKENS, SEGMENTS)
  shapes = [leaf.shape for leaf in jax.tree.leaves(left["diagnostics"])]
  assert shapes == ([(2, 1, N, 1)] if scan_layers else [(1, N, 1)] * 2)


def test_no_parameter_depends_on_k_window_or_gate():
  shapes = lambda config: jax.tree.map(jnp.shape, params_of(config))
  assert shapes(BASE) == shapes(dataclasses.replace(BASE, k=9, window=0, gate="value"))


def test_presets_have_the_sizes_their_names_promise():
  want = {"tiny": 0.8, "mini": 16, "gpt2_small": 124, "gpt2_medium": 354, "1b": 1005}
  assert set(want) == set(PRESETS)
  for name, millions in want.items():
    config = preset(name)
    # pylint: disable=cell-var-from-loop
    count = count_params(jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0)))
    print(name, count)
    assert abs(count / 1e6 / millions - 1) < 0.03, (name, count)


def test_bad_shapes():
  for tokens in (jnp.zeros(3, jnp.int32), jnp.zeros((1, 0), jnp.int32), jnp.zeros((1, 3))):
    with pytest.raises(ValueError, match="tokens must be integers .* with length >= 1, got"):
      run(FULL, tokens)
  with pytest.raises(ValueError, match=r"segment_ids has shape \(1, 24\)"):
    run(FULL, jnp.zeros((1, 7), jnp.int32))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64])
@pytest.mark.parametrize("bad", [-1, -N, N, 127, -128])
def test_a_token_outside_the_vocabulary_is_nan_where_it_is_seen(bad, dtype):
  tokens = np.array(TOKENS, dtype)
  tokens[0, 5] = bad
  is_nan = np.isnan(run(BASE, tokens, None)).all(axis=-1)
  # Its score is NaN too, so that only its window sees it.
  assert is_nan.tolist() == [[5 <= i < 5 + BASE.window for i in range(N)]]


def test_the_embedding_learns_from_its_own_tokens_alone():
  logits = lambda params: Transformer(BASE).apply({"params": params}, TOKENS[:, :4])
  grad = jax.grad(lambda params: logits(params).sum())(params_of(BASE))
  rows = np.abs(grad["embed"]["embedding"]).sum(axis=1) > 0
  assert set(np.flatnonzero(rows)) == set(np.asarray(TOKENS[0, :4]).tolist())


def test_layers_with_equal_settings_are_lowered_once():
  """A step of a deep model has as many functions as one of a shallow model, and one more layer of
  another kind adds its own.
  """

  def functions(**fields):
    config = dataclasses.replace(BASE, remat="attention", **fields)
    model = Transformer(config, trace_once=True)
    loss = lambda params: model.apply({"params": params}, TOKENS, SEGMENTS).sum()
    params = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    return jax.jit(jax.grad(loss)).lower(params).as_text().count("func.func")

  shallow, deep = (functions(num_layers=layers, attention="sparsek") for layers in (3, 6))
  assert shallow == deep
  assert functions(num_layers=4, attention="sparsek,full") > functions(
    num_layers=4, attention="full"
  )


def test_layers_traced_once_compute_the_same():
  config = dataclasses.replace(BASE, num_layers=3, attention="sparsek,sparsek,full")

  def apply(once):
    model = Transformer(config, trace_once=once)
    return quick_jit(functools.partial(model.apply, mutable=["diagnostics"]))(
      {"params": params_of(config)}, TOKENS, SEGMENTS
    )

  jax.tree.map(np.testing.assert_array_equal, apply(True), apply(False))


def test_layers_traced_once_draw_other_numbers_each():
  config = dataclasses.replace(BASE, num_layers=2, attention="sparsek", scorer_loss_queries=2)
  params = params_of(config)
  # Both layers get the same input, since the first adds nothing.
  first = jax.tree.map(lambda x: x, params["layers_1"])
  for name, kernel in (("attention", "out"), ("mlp", "down")):
    first[name][kernel] = jax.tree.map(jnp.zeros_like, first[name][kernel])
  _, sown = Transformer(config, trace_once=True).apply(
    {"params": params | {"layers_0": first}},
    TOKENS,
    rngs={"scorer_loss": jax.random.key(0)},
    mutable=["scorer_loss"],
  )
  one, two = jax.tree.leaves(sown)
  assert abs(one - two) > 1e-6


def test_the_queries_of_the_scorers_loss_do_not_depend_on_the_layout():
  """They are drawn for all layers at once: other ones for each layer and row."""
  stacked = dataclasses.replace(
    BASE, num_layers=4, attention="sparsek,sparsek:k2", scorer_loss_queries=2, scan_layers=True
  )
  params = params_of(stacked)

  def losses(config, params):
    _, sown = quick_jit(functools.partial(Transformer(config).apply, mutable=["scorer_loss"]))(
      {"params": params}, jnp.tile(TOKENS, (2, 1)), rngs={"scorer_loss": jax.random.key(0)}
    )
    return sown["scorer_loss"]

  got = losses(stacked, params)["layers"]
  flat = dataclasses.replace(stacked, scan_layers=False)
  wanted = losses(flat, unstack_layers(stacked, params))
  for i in range(4):
    (wanted_of_layer,) = jax.tree.leaves(wanted[f"layers_{i}"])
    (got_of_layers,) = jax.tree.leaves(got[f"blocks_{i % 2}"])
    np.testing.assert_allclose(got_of_layers[i // 2], wanted_of_layer, rtol=1e-5)
  keys = jax.random.split(jax.random.key(1), 8)
  drawn = sample_loss_queries(dataclasses.replace(BASE, scorer_loss_queries=2), keys, 1000)
  assert drawn.shape == (8, 2) and len(np.unique(np.asarray(drawn), axis=0)) == 8


def test_models_that_differ_in_no_parameter_share_the_compiled_draw():
  """A grid over implementations or what is recomputed compiles the draw once."""
  key, before = jax.random.key(0), transformer._init_params._cache_size()
  for fields in ({}, {"remat": "attention"}, {"implementation": "xla"}):
    transformer.init_params(dataclasses.replace(SMALLEST, vocab_size=19, **fields), key)
  assert transformer._init_params._cache_size() == before + 1
