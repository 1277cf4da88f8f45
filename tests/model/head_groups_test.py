"""Layers whose KV heads have a k and a window of their own: the pattern that says so, and attention
of each head, which is compared with that of the head alone.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.attention.ranking_loss import ranking_loss
from sparsek.attention.scorer_loss import attention_mass_loss
from sparsek.config import SCORER_LOSSES, TransformerConfig, parse_layer_pattern
from sparsek.config.model import GATES
from sparsek.kernels import reference
from sparsek.model.baselines import ATTENTION_MODULES
from sparsek.model.head_groups import join_heads, selecting_attention, take_heads
from sparsek.model.transformer import Transformer, init_params, unstack_layers
from tests.helpers import quick_jit
from tests.kernels.attention_base import output_and_gradients, relative_error

HEADS = TransformerConfig(embed_dim=12, num_heads=8, num_kv_heads=4, head_dim=6, k=3, window=5)
MODEL = dataclasses.replace(HEADS, vocab_size=50, num_layers=2, mlp_dim=16)
N = 37
DOCUMENTS = jnp.asarray([[1] * 20 + [2] * 17, [3] * 1 + [4] * 30 + [0] * 6], jnp.int32)
# (k, window) of each head by the term of a layer
TERMS = {
  "sparsek:h1.3:k7": ((3, 5), (7, 5), (3, 5), (7, 5)),
  "sparsek:h0.2:k0:w9": ((0, 9), (3, 5), (0, 9), (3, 5)),
  "sparsek:k4:w0:h3:k1:w2": ((4, 0), (4, 0), (4, 0), (1, 2)),
  "sparsek:k90:w3:h0-2:k2:w80": ((2, 80), (2, 80), (2, 80), (90, 3)),
}


def of_layer(term, config=HEADS):
  return config.for_term(term)


def test_terms_name_heads_with_a_k_and_a_window_of_their_own():
  pattern = "sparsek:k16:w512:h0.1.3:k1040*2, sliding_window:w8:h2:w64"
  assert parse_layer_pattern(pattern) == (
    *("sparsek:k16:w512:h0-1.3:k1040",) * 2,
    "sliding_window:w8:h2:w64",
  )
  config = dataclasses.replace(HEADS, attention=pattern)
  groups = [layer.head_groups for layer in config.layer_configs]
  assert [[(g.heads, g.kind, g.config.k, g.config.window) for g in of] for of in groups[1:3]] == [
    [((2,), "sparsek", 16, 512), ((0, 1, 3), "sparsek", 1040, 512)],
    [((0, 1, 3), "sliding_window", 3, 8), ((2,), "sliding_window", 3, 64)],
  ]
  assert [(g.config.num_heads, g.config.num_kv_heads) for g in groups[0]] == [(2, 1), (6, 3)]
  assert config.values_of("k") == (16, 1040) and config.values_of("window") == (512, 8, 64)
  (whole,) = HEADS.head_groups
  assert whole.heads == (0, 1, 2, 3) and whole.config is HEADS


@pytest.mark.parametrize(
  "pattern, message",
  [
    ("full:h0:w3", "'full:h0:w3' names heads, which only sparsek, sliding_window, kvzap"),
    ("sparsek:h0", "'sparsek:h0' names heads, but neither their k nor their window"),
    ("sparsek:h3-2:k2", "must name heads in ascending order, each once"),
    ("sparsek:h1.1:k2", "must name heads in ascending order, each once"),
    ("sparsek:h4:k2", "h4 must name some of the heads from 0 to num_kv_heads - 1 = 3"),
    ("sparsek:h0-3:k2", "h0-3 must name some of the heads .* and not all"),
    ("sparsek:h0:k0:w0", "k0 needs a window of at least 1 in the same heads, got 0"),
    ("sparsek:k0:h1:k3", "k=0 must be at least 1"),
    ("sliding_window:h0:k3", "gives heads a k, and sliding_window has none"),
    ("sliding_window:h0:w0", "window=0 must be at least 1 for sliding_window"),
    ("sparsek:h0:w2:k3", "'sparsek:h0:w2:k3' is not KIND, KIND:kK"),
  ],
)
def test_bad_heads_are_refused(pattern, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(HEADS, attention=pattern)


def test_a_conv_scorer_looks_ahead_no_farther_than_the_window_of_heads_that_select():
  conv = dataclasses.replace(HEADS, scorer="conv")
  with pytest.raises(ValueError, match="scorer_lookahead=4 must be at most window=3"):
    dataclasses.replace(conv, attention="sparsek:h0:k2:w3")
  dataclasses.replace(conv, attention="sparsek:h0:k0:w3")


@pytest.mark.parametrize("heads", [(0,), (1, 3), (0, 1, 2), (1, 2), (0, 2)])
def test_heads_are_taken_and_put_back(heads):
  config = of_layer("sparsek:h" + ".".join(map(str, heads)) + ":k9")
  for size in (1, 2):
    x = np.arange(2 * 3 * 4 * size * 5).reshape(2, 3, 4 * size, 5)
    parts = [take_heads(x, group.heads, 4) for group in config.head_groups]
    rows = [size * head + i for head in heads for i in range(size)]
    np.testing.assert_array_equal(parts[1], x[:, :, rows])
    np.testing.assert_array_equal(join_heads(parts, config.head_groups), x)


@functools.cache
def problem():
  """Returns query, key, value, scores and a cotangent of the output."""
  keys = jax.random.split(jax.random.key(3), 5)
  shapes = ((2, N, 8, 6), (2, N, 4, 6), (2, N, 4, 6), (2, N, 4), (2, N, 8, 6))
  *arrays, cotangent = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes))
  return arrays, cotangent


def truth(sizes, gate, ids):
  """Returns output and gradients in float64 by the O(n^2) reference of each KV head alone."""

  def attention(query, key, value, scores, segment_ids=None):
    outputs = []
    for head, (k, window) in enumerate(sizes):
      one = slice(head, head + 1)
      u = scores[:, :, one] if k else jnp.full_like(scores[:, :, one], -jnp.inf)
      of_head = query[:, :, 2 * head : 2 * head + 2], key[:, :, one], value[:, :, one], u
      options = {"k": k or 1, "window": window, "gate": gate, "scale": 6**-0.5}
      outputs.append(reference.attention(*of_head, segment_ids=segment_ids, **options))
    return jnp.concatenate(outputs, axis=2)

  arrays, cotangent = problem()
  with jax.enable_x64(True):
    wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (*arrays, cotangent)]
    return [np.asarray(x) for x in output_and_gradients(attention, wide[:4], wide[4], ids)]


@pytest.mark.parametrize(
  "term, gate, packed",
  [
    *((term, "straight_through", True) for term in TERMS),
    *(("sparsek:k4:w0:h3:k1:w2", gate, True) for gate in GATES if gate != "straight_through"),
    ("sparsek:k90:w3:h0-2:k2:w80", "straight_through", False),
  ],
)
def test_each_head_attends_as_it_would_alone(term, gate, packed):
  ids = DOCUMENTS if packed else None
  config = of_layer(term, dataclasses.replace(HEADS, gate=gate, implementation="xla"))

  def attention(query, key, value, scores, segment_ids=None):
    return selecting_attention(config, query, key, value, scores, segment_ids, gate)

  got = output_and_gradients(attention, *problem(), ids)
  want = truth(TERMS[term], gate, ids)
  for name, x, y in zip(("out", "query", "key", "value", "scores"), got, want):
    assert relative_error(x, y) < 1e-5, name
  of_scores = [np.any(np.asarray(got[4])[..., head]) for head in range(4)]
  # Heads that select learn from it, where there is something to choose.
  assert of_scores == [k in range(1, N) and window < N for k, window in TERMS[term]]


@pytest.mark.parametrize("kind", ["sliding_window", "random", "attention_sinks"])
def test_other_kinds_have_windows_by_heads(kind):
  x = jax.random.normal(jax.random.key(0), (2, N, 12))
  base = dataclasses.replace(HEADS, positions="learned", implementation="xla", out_bias=False)
  modules = {
    term: ATTENTION_MODULES[kind](of_layer(term, base))
    for term in (f"{kind}:w5", f"{kind}:w2", f"{kind}:w5:h1:w2")
  }
  variables = quick_jit(modules[f"{kind}:w5"].init)(jax.random.key(1), x)
  mixed = {}
  for term, module in modules.items():
    run = functools.partial(module.apply, capture_intermediates=only_mix, mutable=True)
    _, state = quick_jit(run)(variables, x, DOCUMENTS)
    mixed[term] = np.asarray(state["intermediates"]["mix"][0])
  wide, narrow, both = mixed.values()
  np.testing.assert_allclose(both[:, :, 2:4], narrow[:, :, 2:4], atol=1e-6)
  np.testing.assert_allclose(
    both[:, :, [0, 1, 4, 5, 6, 7]], wide[:, :, [0, 1, 4, 5, 6, 7]], atol=1e-6
  )
  assert np.max(np.abs(wide - narrow)) > 0.1


def only_mix(_, method):
  return method == "mix"


@pytest.mark.parametrize("kind", SCORER_LOSSES)
@pytest.mark.parametrize("term", ["sparsek:h0.2:k0:w9", "sparsek:k4:w0:h3:k1:w2"])
def test_the_loss_of_scorers_is_the_mean_over_the_heads_that_select(term, kind):
  x = jax.random.normal(jax.random.key(0), (2, N, 12))
  config = dataclasses.replace(HEADS, implementation="xla", scorer_loss_kind=kind)
  module = ATTENTION_MODULES["sparsek"](of_layer(term, config))
  variables = {"params": quick_jit(module.init)(jax.random.key(1), x)["params"]}
  queries = jnp.asarray([[6, 20, 36], [11, 17, 30]], jnp.int32)

  def loss(params):
    _, state = module.apply(
      {"params": params}, x, DOCUMENTS, loss_queries=queries, mutable=["scorer_loss"]
    )
    return state["scorer_loss"]["attention_mass"][0]

  def expected(params):
    bound = module.bind({"params": params})
    position = jnp.asarray([[*range(20), *range(17)], [0, *range(30), *range(6)]])
    query, key, _ = map(jax.lax.stop_gradient, bound.project(x, position))
    scores = bound.scorer(x, DOCUMENTS, 0)
    of_heads = [
      (attention_mass_loss if kind == "divergence" else functools.partial(ranking_loss, k=k))(
        scores[:, :, head : head + 1],
        query[:, :, 2 * head : 2 * head + 2],
        key[:, :, head : head + 1],
        queries,
        window=window,
        segment_ids=DOCUMENTS,
      )
      for head, (k, window) in enumerate(TERMS[term])
      if k
    ]
    return sum(of_heads, jnp.zeros(())) / len(of_heads)

  got, gradient = quick_jit(jax.value_and_grad(loss))(variables["params"])
  want, wanted = quick_jit(jax.value_and_grad(expected))(variables["params"])
  np.testing.assert_allclose(got, want, rtol=1e-5)
  kernels = [np.asarray(of["scorer"]["linear"]["kernel"]) for of in (gradient, wanted)]
  np.testing.assert_allclose(*kernels, rtol=1e-4, atol=1e-7)
  assert [bool(np.any(kernel)) for kernel in kernels[0].T] == [k > 0 for k, _ in TERMS[term]]


@functools.cache
def params(config=MODEL):
  return quick_jit(functools.partial(init_params, config))(jax.random.key(0))


def logits(config, parameters=None):
  tokens = jax.random.randint(jax.random.key(1), (2, N), 0, 50)
  run = quick_jit(lambda p: Transformer(config).apply({"params": p}, tokens, DOCUMENTS))
  return np.asarray(run(params() if parameters is None else parameters))


def test_a_model_computes_each_layer_by_its_own_groups():
  """Parameters do not depend on the pattern, and each layer has the heads of its own term."""
  plain = logits(MODEL)
  with_attention = lambda pattern: dataclasses.replace(MODEL, attention=pattern)
  np.testing.assert_allclose(logits(with_attention("sparsek:h1.2:k3:w5")), plain, atol=1e-5)
  first, second = (
    logits(with_attention(p)) for p in ("sparsek:h0:k0,sparsek", "sparsek,sparsek:h0:k0")
  )
  for x, y in itertools.combinations((plain, first, second), 2):
    assert np.max(np.abs(x - y)) > 1e-3
  # A layer without groups beside one that has them.
  full = logits(with_attention("sparsek:h0:k99:w99,full"))
  assert np.max(np.abs(full - logits(with_attention("sparsek:h0:k99:w99")))) > 1e-3


def test_scanned_layers_have_groups_of_heads():
  scanned = dataclasses.replace(
    MODEL, num_layers=4, attention="sparsek:h1.3:k0:w9,sparsek:h0:k7", scan_layers=True
  )
  parameters = params(scanned)
  loop = dataclasses.replace(scanned, scan_layers=False)
  np.testing.assert_allclose(
    logits(scanned, parameters), logits(loop, unstack_layers(scanned, parameters)), atol=1e-5
  )
