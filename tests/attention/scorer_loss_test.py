"""The scorers' loss under XLA, and what it looks at."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.attention import scorer_loss
from sparsek.attention.scorer_loss import attention_mass_loss, max_attention_loss, sample_queries
from tests.attention.scorer_loss_base import DOCUMENTS, Case, ScorerLossTest, example
from tests.helpers import quick_jit


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


def largest_attention(query, key, queries, window, ids):
  """Returns the logarithm of the largest attention of a later query to each token, [n, G], query by
  query; -inf where no query has it as a candidate.
  """
  (n, heads, dim), groups = query.shape, key.shape[1]
  best = np.full((n, groups), -np.inf)
  for i in (i for i in queries if ids[i]):
    start = i - np.argmax(np.append(ids[i::-1] != ids[i], True)) + 1
    for h in range(heads):
      g = h * groups // heads
      logits = key[start : i + 1, g] @ query[i, h] / dim**0.5
      log = logits - np.log(np.sum(np.exp(logits)))
      for j in range(start, i - window + 1):
        best[j, g] = max(best[j, g], log[j - start])
  return best


@pytest.mark.parametrize("shards", [1, 4])
def test_the_largest_attention_is_the_target_of_a_regression(shards, monkeypatch):
  """A sharded row is one of several arrays that are mapped over together."""
  monkeypatch.setattr(scorer_loss, "BLOCK_LOGITS", 2 * 4 * 20 * 7)
  case = Case(documents=DOCUMENTS)
  (scores, query, key), _ = example(case)
  queries = sample_queries(jax.random.split(jax.random.key(1), 2), 11, case.n)
  total, gradient = 0, np.zeros(scores.shape)
  for b in range(2):
    wide = [np.asarray(x[b], np.float64) for x in (query, key, scores)]
    best = largest_attention(*wide[:2], np.asarray(queries[b]), case.window, case.segment_ids[b])
    assert 4 < np.isfinite(best[:, 0]).sum() < case.n - case.window
    for g in range(2):
      counts = np.isfinite(best[:, g])
      error = (wide[2] - best)[counts, g]
      total += np.var(error) / 2
      gradient[b, counts, g] = (error - error.mean()) / len(error)
  loss = lambda *arrays: max_attention_loss(
    *arrays, queries, window=case.window, segment_ids=case.segment_ids, axis=axis
  )
  axis = "shards" if shards > 1 else None
  run = jax.value_and_grad(loss, argnums=(0, 1, 2))
  cut = lambda x: jnp.stack(jnp.split(x, shards, axis=1))
  got, gradients = (
    quick_jit(jax.vmap(run, axis_name=axis))(*map(cut, (scores, query, key)))
    if axis
    else quick_jit(run)(scores, query, key)
  )
  np.testing.assert_allclose(jnp.sum(got), total, rtol=1e-5)
  join = lambda x: jnp.concatenate(x, axis=1) if axis else x
  np.testing.assert_allclose(join(gradients[0]), gradient, atol=1e-6)
  assert not np.any(gradients[1]) and not np.any(gradients[2])
