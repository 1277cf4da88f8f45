"""The scorers' loss under XLA, and what it looks at."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.attention import scorer_loss
from sparsek.attention.scorer_loss import attention_mass_loss, sample_queries
from tests.attention.scorer_loss_base import Case, ScorerLossTest, example


class TestXla(ScorerLossTest):
  implementation = "xla"
  dtype = "float32"

  @pytest.fixture(autouse=True)
  def blocks(self, monkeypatch):
    """Computes few queries at once, so that there are several blocks, the last one filled up."""
    monkeypatch.setattr(scorer_loss, "BLOCK_LOGITS", 2 * 4 * 20 * 7)


def test_queries_are_spread_evenly_and_their_mean_is_that_of_all():
  queries = sample_queries(jax.random.split(jax.random.key(1), 500), 6, 20)
  edges = np.arange(7) * 20 // 6
  assert np.all(queries >= edges[:-1]) and np.all(queries < edges[1:])
  assert set(np.unique(queries)) == set(range(20))
  arrays = [jnp.repeat(x[:1], 500, axis=0) for x in example(Case())[0]]
  some = attention_mass_loss(*arrays, queries, window=2) / 500
  every = attention_mass_loss(*(x[:1] for x in arrays), jnp.arange(20)[None], window=2)
  np.testing.assert_allclose(some, every, rtol=0.05)


def test_bfloat16_and_memory():
  (scores, query, key), _ = example(Case())
  queries = sample_queries(jax.random.split(jax.random.key(1), 2), 8, 20)
  exact, close = (
    float(attention_mass_loss(scores, query.astype(dtype), key.astype(dtype), queries, window=2))
    for dtype in (jnp.float32, jnp.bfloat16)
  )
  assert close == pytest.approx(exact, rel=0.02) and close != exact
  long = [
    jax.ShapeDtypeStruct((1, 2**18, *shape), dtype)
    for shape, dtype in (((3,), jnp.float32), ((12, 64), jnp.bfloat16), ((3, 64), jnp.bfloat16))
  ]
  compiled = (
    jax.jit(jax.grad(functools.partial(attention_mass_loss, window=512)))
    .lower(*long, jax.ShapeDtypeStruct((1, 128), jnp.int32))
    .compile()
  )
  assert compiled.memory_analysis().temp_size_in_bytes < 2**30


def test_a_window_beyond_every_integer_leaves_no_candidates():
  arrays, queries = example(Case())
  assert attention_mass_loss(*arrays, queries, window=2**31 - 1) == 0
