"""Random keys as arguments: typed and legacy ones are taken, everything else is named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsek.functional as sk
from sparsek.generation.session import Session, generate
from sparsek.model.transformer import init_params
from tests.helpers import SMALLEST, quick_jit

OPTIONS = sk.Options(8, 1, 4, 4, implementation="reference")
X = jnp.zeros((1, 4, 8))
TURN = {"max_new_tokens": 1, "temperature": 1.0}


def draw(key):
  return quick_jit(lambda key: init_params(SMALLEST, key))(key)


@pytest.fixture(scope="module")
def params():
  return draw(jax.random.key(0))


def test_legacy_keys_give_what_typed_ones_give(params):
  for legacy in (jax.random.PRNGKey(0), np.asarray(jax.random.PRNGKey(0))):
    same = jax.tree.map(np.array_equal, draw(legacy), params)
    assert all(jax.tree.leaves(same))
  texts = [
    list(generate(SMALLEST, params, [1], key=key, max_new_tokens=3))
    for key in (jax.random.key(5), jax.random.PRNGKey(5))
  ]
  assert texts[0] == texts[1]


@pytest.mark.parametrize(
  "key, given, example",
  [
    (7, "key=7", "jax.random.key(7)"),
    (-1, "key=-1", "jax.random.key(0)"),
    (True, "key=True", "jax.random.key(0)"),
    ("a", "key='a'", "jax.random.key(0)"),
    (np.int32(3), "key=np.int32(3)", "jax.random.key(0)"),
    (jnp.int32(3), "key of int32 ()", "jax.random.key(0)"),
    (jnp.zeros(3, jnp.uint32), "key of uint32 (3,)", "jax.random.key(0)"),
    (jax.random.split(jax.random.key(0)), "key of shape (2,)", "jax.random.key(0)"),
  ],
)
def test_what_is_no_key_is_named(key, given, example, params):
  weights = jax.eval_shape(lambda: sk.init(OPTIONS, jax.random.key(0)))
  for call in (
    lambda: init_params(SMALLEST, key),
    functools.partial(jax.eval_shape, functools.partial(init_params, SMALLEST, key)),
    lambda: sk.init(OPTIONS, key),
    lambda: sk.apply_with_scorer_loss(OPTIONS, weights, X, key),
    lambda: generate(SMALLEST, params, [1], key=key, max_new_tokens=1),
  ):
    with pytest.raises(ValueError) as caught:
      call()
    assert str(caught.value) == f"{given} must be a random key of JAX, such as {example}"
  with pytest.raises(ValueError, match="noise_key"):
    sk.apply(OPTIONS, weights, X, noise_key=key)


@pytest.mark.parametrize(
  "keys, given",
  [
    (3, "keys=3"),
    (jax.random.key(3), r"keys of shape \(\)"),
    (jax.random.PRNGKey(3), r"keys of shape \(\)"),
    (jax.random.split(jax.random.key(3), 3), r"keys of shape \(3,\)"),
  ],
)
def test_a_session_needs_a_key_for_each_row(keys, given, params):
  message = rf"{given} must be a random key of JAX for each row, such as jax.random.split\(.*, 2\)"
  with pytest.raises(ValueError, match=message):
    Session(SMALLEST, params, batch_size=2).generate([[1], [2]], keys=keys, **TURN)
