"""The scorers' loss against its definition, written out in float64 over all pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.attention import scorer_loss
from sparsek.attention.scorer_loss import attention_mass_loss, sample_queries
from tests.helpers import quick_jit

SEGMENTS = np.asarray([[1] * 9 + [2] * 11, [3] * 5 + [4] * 10 + [0] * 5], np.int32)


def example(heads=4, groups=2, n=20):
  rng = np.random.default_rng(0)
  scores, query, key = (
    rng.normal(size=(2, n, groups)) * 2,
    rng.normal(size=(2, n, heads, 8)) * 2,
    rng.normal(size=(2, n, groups, 8)),
  )
  return tuple(jnp.asarray(x, jnp.float32) for x in (scores, query, key))


def written_out(scores, query, key, window, segment_ids, scale):
  """The loss and its gradient in the scores, query by query."""
  scores, query, key = (np.asarray(x, np.float64) for x in (scores, query, key))
  (batch, n, groups), heads = scores.shape, query.shape[2]
  total, gradient = 0.0, np.zeros(scores.shape)
  for b in range(batch):
    counted = [i for i in range(n) if segment_ids is None or segment_ids[b, i]]
    for i in counted:
      seen = [
        j for j in range(i + 1) if segment_ids is None or segment_ids[b, j] == segment_ids[b, i]
      ]
      for g in range(groups):
        attention = np.zeros(n)
        for h in range(g * heads // groups, (g + 1) * heads // groups):
          weights = np.exp(scale * key[b, seen, g] @ query[b, i, h])
          attention[seen] += weights / weights.sum() * groups / heads
        candidates = [j for j in seen if j + window <= i]
        if candidates:
          mass, expected = (
            attention[candidates].sum(),
            np.exp(scores[b, candidates, g]) / np.exp(scores[b, candidates, g]).sum(),
          )
          share = attention[candidates] / mass
          total += mass * np.sum(share * np.log(share / expected)) / len(counted) / groups
          gradient[b, candidates, g] += (
            (mass * expected - attention[candidates]) / len(counted) / groups
          )
  return total, gradient


@pytest.mark.parametrize(
  "heads, groups, window, segment_ids, scale",
  [
    (4, 2, 4, SEGMENTS, None),
    (3, 1, 0, SEGMENTS, 0.2),
    (2, 2, 1, None, None),
    (2, 1, 30, SEGMENTS, None),
  ],
)
def test_value_and_gradient(monkeypatch, heads, groups, window, segment_ids, scale):
  # blocks of 7, the last one filled up
  monkeypatch.setattr(scorer_loss, "BLOCK_LOGITS", 2 * heads * 20 * 7)
  arrays = example(heads, groups)
  queries = jnp.broadcast_to(jnp.arange(20), (2, 20))
  loss = functools.partial(
    attention_mass_loss, queries=queries, window=window, scale=scale, segment_ids=segment_ids
  )
  got, gradients = quick_jit(jax.value_and_grad(lambda *args: 3 * loss(*args), argnums=(0, 1, 2)))(
    *arrays
  )
  want, gradient = written_out(*arrays, window, segment_ids, scale or 8**-0.5)
  np.testing.assert_allclose(got, 3 * want, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(gradients[0], 3 * gradient, rtol=1e-3, atol=1e-6)
  assert (want > 0.1) == (window < 20) and not np.any(gradients[1]) and not np.any(gradients[2])


def test_scores_that_explain_the_attention_have_no_loss():
  scores, query, key = example(1, 1)
  # every query asks the same, and one score can do for all
  query = jnp.broadcast_to(query[:, :1], query.shape)
  scores = jnp.einsum("bhd,bjhd->bjh", query[:, 0], key) / 8**0.5 + 100
  queries = sample_queries(jax.random.split(jax.random.key(0), 2), 20, 20)
  np.testing.assert_array_equal(queries, np.tile(np.arange(20), (2, 1)))
  loss, gradient = jax.value_and_grad(attention_mass_loss)(scores, query, key, queries, window=3)
  np.testing.assert_allclose(loss, 0, atol=1e-5)
  np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_queries_are_spread_evenly_and_their_mean_is_that_of_all():
  queries = sample_queries(jax.random.split(jax.random.key(1), 500), 6, 20)
  edges = np.arange(7) * 20 // 6
  assert np.all(queries >= edges[:-1]) and np.all(queries < edges[1:])
  assert set(np.unique(queries)) == set(range(20))
  arrays = [jnp.repeat(x[:1], 500, axis=0) for x in example()]
  some = attention_mass_loss(*arrays, queries, window=2) / 500
  every = attention_mass_loss(*(x[:1] for x in arrays), jnp.arange(20)[None], window=2)
  np.testing.assert_allclose(some, every, rtol=0.05)


def test_bfloat16_and_memory():
  scores, query, key = example()
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
  arrays = example()
  queries = jnp.arange(20)[None].repeat(len(arrays[0]), 0)
  assert attention_mass_loss(*arrays, queries, window=2**31 - 1) == 0
