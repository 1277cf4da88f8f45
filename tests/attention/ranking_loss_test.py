"""The ranking loss against its definition in float64, and the cuts that it is made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sparsek.attention import scorer_loss as blocks
from sparsek.attention.kth_largest import sorted_rows
from sparsek.attention.ranking_loss import ranking_loss
from tests.attention.scorer_loss_base import CHANGES, Case, changed_scores, example
from tests.helpers import quick_jit

CASES = {
  "documents": Case(n=40, window=2, documents=((1, 21), (2, 9), (1, 5), (0, 5))),
  "grouped": Case(n=40, heads=6, groups=2, window=3, documents=((1, 33), (0, 7))),
  "some_queries": Case(n=60, heads=3, groups=3, window=0, queries=13),
  "one_query": Case(n=33, window=1, queries=1),
  "one_token": Case(n=1, window=0),
  "window_beyond_row": Case(heads=2, groups=1, window=30),
}
# k of the cases that are no other's
BUDGETS = {name: 3 for name in CASES} | {"one_query": 1}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Computes few queries at once, so that there are several blocks, the last one filled up."""
  monkeypatch.setattr(blocks, "BLOCK_LOGITS", 2 * 4 * 40 * 7)


def written_out(scores, query, key, queries, case, k):
  """Returns the loss by its definition, over all pairs of queries and tokens at once."""
  ids = np.ones((2, case.n)) if case.segment_ids is None else case.segment_ids
  rows = zip(scores, query, key, queries, ids)
  return sum(_row_written_out(k, case.window, *row) for row in rows)


def _row_written_out(k, window, scores, query, key, queries, ids):
  i, j = np.asarray(queries)[:, None], np.arange(len(ids))
  document = np.cumsum(np.append(True, np.diff(ids) != 0))
  seen = (document[i] == document) & (j <= i)
  candidate, counted = seen & (j + window <= i), ids[i] != 0
  total, groups = 0.0, key.shape[1]
  for g, queries_of_g in enumerate(jnp.split(query[i[:, 0]], groups, axis=1)):
    logits = jnp.einsum("ihd,jd->hij", queries_of_g, key[:, g]) / key.shape[-1] ** 0.5
    attention = jnp.mean(jax.nn.softmax(jnp.where(seen, logits, -jnp.inf)), axis=0)
    target = jnp.max(jnp.where(candidate & counted, attention, 0), axis=0)
    losses = jax.vmap(functools.partial(_of_query, k, scores[:, g], target))(candidate)
    total += jnp.sum(jnp.where(counted[:, 0], losses, 0)) / max(np.sum(counted), 1) / groups
  return total


def _of_query(k, u, t, candidate):
  if k >= len(u):
    return 0.0
  u_cut, t_cut = (jnp.sort(jnp.where(candidate, x, -jnp.inf))[-k] for x in (u, t))
  counts = candidate & (jnp.sum(candidate) > k) & (t_cut > 0)  # padding asks nothing
  gap = jnp.log(jnp.where(counts, t, 1) / jnp.where(counts, t_cut, 1))
  distance = jnp.where(counts, u - lax.stop_gradient(u_cut), 0)
  weight = jnp.where(counts, jnp.minimum(1, jnp.abs(gap)), 0)
  losses = weight * jax.nn.softplus(jnp.where(gap >= 0, -distance, distance))
  over = lambda side: jnp.sum(losses * side) / jnp.maximum(jnp.sum(weight * side), 1e-30)
  return over(gap >= 0) / 2 + over(gap < 0) / 2


def check(case, arrays, queries, k, **others):
  """Compares loss and gradients with the definition; returns these."""
  loss = functools.partial(
    ranking_loss, k=k, window=case.window, segment_ids=case.segment_ids, **others
  )
  run = jax.value_and_grad(lambda *args: 3 * loss(*args, queries), (0, 1, 2))
  got, gradients = quick_jit(run)(*arrays)
  with jax.enable_x64(True):
    exact = [jnp.asarray(np.asarray(x), jnp.float64) for x in arrays]
    of_scores = lambda u: written_out(u, *exact[1:], np.asarray(queries), case, k)
    want, gradient = map(np.asarray, jax.jit(jax.value_and_grad(of_scores))(exact[0]))
  np.testing.assert_allclose(got, 3 * want, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(gradients[0], 3 * gradient, rtol=1e-3, atol=2e-6)
  assert not any(map(np.any, gradients[1:]))
  return want, gradient


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name):
  case = CASES[name]
  arrays, queries = example(case)
  want, gradient = check(case, arrays, queries, BUDGETS[name])
  empty = case.window >= case.n or case.n == 1
  assert (want > 1e-3) != empty and np.any(gradient) != empty


@pytest.mark.parametrize("k", [1, 38, 39, 40, 10**20])
def test_queries_with_at_most_k_candidates_have_no_loss(k):
  case = Case(n=40, window=1)
  want, _ = check(case, *example(case), k)
  assert (want > 0) == (k < 39)


@pytest.mark.parametrize("change", CHANGES)
def test_scores_of_any_size(change):
  case = CASES["documents"]
  (scores, query, key), queries = example(case)
  check(case, (changed_scores(scores, change), query, key), queries, 3)


def test_equal_targets():
  case = CASES["some_queries"]
  (scores, query, key), queries = example(case)
  # every third token has the same key, and all queries are the same
  key = jnp.repeat(key[:, ::3], 3, axis=1)
  check(case, (scores, jnp.broadcast_to(query[:, :1], query.shape), key), queries, 4)


def test_what_no_query_sees_does_not_matter():
  case = Case(n=50, window=1, documents=((1, 20), (2, 20), (1, 10)))
  (scores, query, key), _ = example(case)
  seen = jnp.zeros((2, 50), bool).at[:, 20:30].set(True)
  queries = jnp.tile(jnp.asarray([[22, 27, 29]], jnp.int32), (2, 1))
  ids = np.tile(np.repeat([1, 2, 1], [20, 20, 10]).astype(np.int32), (2, 1))
  run = quick_jit(
    jax.value_and_grad(functools.partial(ranking_loss, k=3, window=1, segment_ids=ids))
  )
  want = run(scores, query, key, queries)
  poisoned = lambda x: jnp.where(seen.reshape(2, 50, *[1] * (x.ndim - 2)), x, jnp.nan)
  got = run(poisoned(scores), query, poisoned(key), queries)
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_array_equal(got[1], want[1])
  assert want[0] > 0 and not np.any(want[1][~np.asarray(seen)])


def test_vmap():
  case = CASES["documents"]
  (scores, query, key), queries = example(case)
  arrays = [jnp.stack([x, x[::-1] * 0.5]) for x in (scores, query, key)]
  loss = functools.partial(ranking_loss, k=3, window=case.window)
  run = jax.value_and_grad(lambda *args: loss(*args, queries))
  got = jax.vmap(run)(*arrays)
  for i in range(2):
    want = run(*(x[i] for x in arrays))
    np.testing.assert_allclose(got[0][i], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1][i], want[1], rtol=1e-4, atol=1e-7)


def test_scores_that_are_logarithms_of_the_targets_have_a_small_loss():
  case = Case(n=60, heads=2, groups=2, window=4)
  (drawn, query, key), queries = example(case)
  attention = jnp.einsum("bihd,bjhd->bhij", query, key) / case.head_dim**0.5
  i, j = np.arange(60)[:, None], np.arange(60)
  attention = jax.nn.softmax(jnp.where(j <= i, attention, -jnp.inf))
  asked = (queries[..., None] == i.T).any(1)[:, None, :, None]
  targets = jnp.max(jnp.where((j + 4 <= i) & asked, attention, 0), axis=2).swapaxes(1, 2)
  loss = quick_jit(functools.partial(ranking_loss, k=3, window=4))
  far, near = (loss(u, query, key, queries) for u in (drawn, jnp.log(targets) + 7))
  assert near < 0.6 * far


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n, k, queries", [(1, 1, 1), (2, 1, 3), (37, 3, 20), (1000, 64, 40)])
def test_the_kth_largest_of_ranges(n, k, queries, ties):
  rng = np.random.default_rng(n)
  x = rng.normal(size=(2, 3, n)).astype(np.float32)
  x = np.round(x) if ties else x
  x[:, :, rng.integers(0, n, n // 10)] = np.nan  # come last
  first, end = (jnp.asarray(rng.integers(0, n + 1, (2, queries)), jnp.int32) for _ in range(2))
  got = jax.jit(lambda *args: sorted_rows(args[0]).kth_largest(*args[1:], k))(x, first, end)
  x = np.where(np.isnan(x), -np.inf, x)
  compared = 0
  for b, g, c in np.ndindex(got.shape):
    candidates = np.sort(x[b, g, first[b, c] : end[b, c]])
    if len(candidates) >= k:
      assert got[b, g, c] == candidates[-k]
      compared += 1
  assert compared or n < 3
