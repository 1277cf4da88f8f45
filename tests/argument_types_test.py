"""Arguments of another type from Python: each is refused by its name and what is allowed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsek
import sparsek.functional as sk
import sparsek.linen
import sparsek.nnx
from sparsek.generation.session import generate as generate_tokens

CONFIG = sparsek.TransformerConfig(
  vocab_size=9,
  num_layers=1,
  embed_dim=8,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=8,
  k=2,
  window=3,
  implementation="reference",
)
KEY = jax.random.key(0)
PARAMS = sparsek.init_params(CONFIG, KEY)
TOKENS = jnp.zeros((1, 4), jnp.int32)
CACHE = sparsek.init_cache(CONFIG, 1)
OPTIONS = sk.Options(8, num_heads=2, k=2, window=3, implementation="reference")
LAYER = sk.init(OPTIONS, KEY)
LAYER_CACHE = sk.init_cache(OPTIONS, 1)
X = jnp.zeros((1, 4, 8))
NNX = sparsek.nnx.SparseKAttention(8, 2, k=2, window=3, rngs=nnx.Rngs(0))
LINEN = sparsek.linen.SparseKAttention(2, k=2, window=3)
NO_CONFIG = ("tiny", None, PARAMS)
NO_CACHE = (None, "x", TOKENS, (1, 2))
NO_PARAMS = (None, "x", 3, [X])
NO_ARRAY = (None, "x", 3, [[[0.5]]], LAYER_CACHE)
greedy = dict(max_new_tokens=2, temperature=0.0)

OF_CONFIG = {
  "init_params": lambda config: sparsek.init_params(config, KEY),
  "Transformer.init": lambda config: sparsek.Transformer(config).init(KEY, TOKENS),
  "Transformer.apply": lambda config: sparsek.Transformer(config).apply({"params": PARAMS}, TOKENS),
  "Session": lambda config: sparsek.Session(config, PARAMS, 1),
  "Session.load": lambda config: sparsek.Session.load("no such file", config, PARAMS),
  "generate": lambda config: generate_tokens(config, PARAMS, [1], **greedy),
  "init_cache": lambda config: sparsek.init_cache(config, 1),
  "inference_params": lambda config: sparsek.inference_params(config, PARAMS),
  "prefill": lambda config: sparsek.prefill(config, PARAMS, CACHE, TOKENS),
  "decode_step": lambda config: sparsek.decode_step(config, PARAMS, CACHE, TOKENS[0, :1]),
}
OF_OPTIONS = {
  "init": lambda options: sk.init(options, KEY),
  "apply": lambda options: sk.apply(options, LAYER, X),
  "apply_with_scorer_loss": lambda options: sk.apply_with_scorer_loss(options, LAYER, X, KEY),
  "scores": lambda options: sk.scores(options, LAYER, X),
  "init_cache": lambda options: sk.init_cache(options, 1),
  "prefill": lambda options: sk.prefill(options, LAYER, LAYER_CACHE, X),
  "decode": lambda options: sk.decode(options, LAYER, LAYER_CACHE, X[:, 0]),
}
OF_PARAMS = {
  "Session": lambda params: sparsek.Session(CONFIG, params, 1),
  "inference_params": lambda params: sparsek.inference_params(CONFIG, params),
  "prefill": lambda params: sparsek.prefill(CONFIG, params, CACHE, TOKENS),
  "decode_step": lambda params: sparsek.decode_step(CONFIG, params, CACHE, TOKENS[0, :1]),
  "functional.apply": lambda params: sk.apply(OPTIONS, params, X),
  "functional.apply_with_scorer_loss": lambda params: sk.apply_with_scorer_loss(
    OPTIONS, params, X, KEY
  ),
  "functional.scores": lambda params: sk.scores(OPTIONS, params, X),
  "functional.prefill": lambda params: sk.prefill(OPTIONS, params, LAYER_CACHE, X),
  "functional.decode": lambda params: sk.decode(OPTIONS, params, LAYER_CACHE, X[:, 0]),
}
OF_CACHE = {
  "prefill": lambda cache: sparsek.prefill(CONFIG, PARAMS, cache, TOKENS),
  "decode_step": lambda cache: sparsek.decode_step(CONFIG, PARAMS, cache, TOKENS[0, :1]),
  "lost_scores": sparsek.lost_scores,
  "functional.prefill": lambda cache: sk.prefill(OPTIONS, LAYER, cache, X),
  "functional.decode": lambda cache: sk.decode(OPTIONS, LAYER, cache, X[:, 0]),
  "nnx.prefill": lambda cache: NNX.prefill(cache, X),
  "nnx.decode": lambda cache: NNX.decode(cache, X[:, 0]),
  "linen.prefill": lambda cache: LINEN.prefill(LAYER, cache, X),
  "linen.decode": lambda cache: LINEN.decode(LAYER, cache, X[:, 0]),
}
OF_X = {
  "functional.apply": lambda x: sk.apply(OPTIONS, LAYER, x),
  "functional.apply_with_scorer_loss": lambda x: sk.apply_with_scorer_loss(OPTIONS, LAYER, x, KEY),
  "functional.scores": lambda x: sk.scores(OPTIONS, LAYER, x),
  "functional.prefill": lambda x: sk.prefill(OPTIONS, LAYER, LAYER_CACHE, x),
  "functional.decode": lambda x: sk.decode(OPTIONS, LAYER, LAYER_CACHE, x),
  "nnx": NNX,
  "nnx.with_scorer_loss": lambda x: NNX.with_scorer_loss(x, rngs=nnx.Rngs(0)),
  "nnx.prefill": lambda x: NNX.prefill(LAYER_CACHE, x),
  "nnx.decode": lambda x: NNX.decode(LAYER_CACHE, x),
  "linen.init": lambda x: LINEN.init(KEY, x),
  "linen.apply": lambda x: LINEN.apply({"params": LAYER}, x),
  "linen.prefill": lambda x: LINEN.prefill(LAYER, LAYER_CACHE, x),
  "linen.decode": lambda x: LINEN.decode(LAYER, LAYER_CACHE, x),
}
OF_TOKENS = {
  "Transformer": lambda tokens: sparsek.Transformer(CONFIG).apply({"params": PARAMS}, tokens),
  "prefill": lambda tokens: sparsek.prefill(CONFIG, PARAMS, CACHE, tokens),
  "decode_step": lambda token: sparsek.decode_step(CONFIG, PARAMS, CACHE, token),
}
KINDS = {
  "config": (OF_CONFIG, NO_CONFIG, "^config=.* must be a TransformerConfig, such as sparsek"),
  "options": (OF_OPTIONS, (None, "x", CONFIG), "^options is of type .* sparsek.functional.Options"),
  "params": (OF_PARAMS, NO_PARAMS, "^params=.* must be .*, such as sparsek.*init.* returns"),
  "count_params": ({"": sparsek.count_params}, (*NO_PARAMS[:3], {"a": "x"}), "^params=.* must be"),
  "cache": (OF_CACHE, NO_CACHE, "^cache=.* must be a cache, such as init_cache returns"),
  "x": (OF_X, NO_ARRAY, r"^x=.* must be an array of floats \[batch"),
  "tokens": (OF_TOKENS, NO_ARRAY, r"^tokens?=.* must be an array of integers \[batch"),
}


@pytest.mark.parametrize(
  "kind, name, value",
  [
    pytest.param(kind, name, value, id=f"{kind} {name} {i}")
    for kind, (calls, values, _) in KINDS.items()
    for name in calls
    for i, value in enumerate(values)
  ],
)
def test_another_type_is_refused_by_name(kind, name, value):
  calls, _, message = KINDS[kind]
  with pytest.raises(ValueError, match=message) as error:
    calls[name](value)
  assert len(str(error.value)) < 250 and "\n" not in str(error.value)


def test_leaves_of_another_type_are_named():
  with pytest.raises(ValueError, match=r"query/kernel str \(needed: \(8, 2, 4\)\)"):
    sk.apply(OPTIONS, LAYER | {"query": {"kernel": "x"}}, X)


TABLE_SIZE = f"must be an id of the vocabulary, from 0 to {CONFIG.vocab_size - 1}"


@pytest.mark.parametrize("bad", [-1, CONFIG.vocab_size, 9999])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_known_tokens_outside_the_vocabulary_are_refused(bad, array):
  tokens = array([[1, 2, 3, 4], [5, bad, 7, 8]])
  where = rf"^tokens\[1, 1\]={bad} {TABLE_SIZE}"
  apply = lambda params: sparsek.Transformer(CONFIG).apply({"params": params}, tokens)
  hidden = functools.partial(sparsek.Transformer(CONFIG).apply, method="hidden")
  for call in (
    lambda: apply(PARAMS),
    lambda: hidden({"params": PARAMS}, tokens),
    lambda: jax.vjp(apply, PARAMS),
    lambda: sparsek.prefill(CONFIG, PARAMS, sparsek.init_cache(CONFIG, 2), tokens),
  ):
    with pytest.raises(ValueError, match=where):
      call()
  with pytest.raises(ValueError, match=rf"^prompt_tokens\[1\]={bad} {TABLE_SIZE}"):
    sparsek.Session(CONFIG, PARAMS, 1).generate([tokens[1]], **greedy)
  with pytest.raises(ValueError, match=rf"^prompt_tokens\[1\]={bad} {TABLE_SIZE}"):
    generate_tokens(CONFIG, PARAMS, tokens[1], **greedy)


def test_traced_tokens_are_not_read():
  apply = jax.jit(sparsek.Transformer(CONFIG).apply)
  assert np.all(np.isnan(apply({"params": PARAMS}, jnp.full((1, 4), CONFIG.vocab_size))))
