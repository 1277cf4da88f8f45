"""TOVA, H2O and SnapKV against their definition written out token by token, and against kvpress."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.attention import eviction
from sparsek.attention.documents import document_bounds
from sparsek.attention.eviction import block_size, evicting_attention, expiries
from tests.helpers import quick_jit

LENGTH, HEADS, GROUPS, DIM = 150, 4, 2, 4
SEGMENTS = np.repeat(np.array([[1, 2, 3, 0], [1, 1, 1, 1]]), [70, 1, 60, 19], axis=1)
CASES = [  # borders every 1, 2, 4, 1, 4 and 2 tokens
  ("tova", 6, 5),
  ("tova", 1, 40),
  ("tova", 64, 0),
  ("h2o", 1, 0),
  ("snapkv", 30, 34),
  ("snapkv", 3, 30),
]


def inputs(length=LENGTH, batch=2, dtype=jnp.float32):
  draw = lambda key, heads: jax.random.normal(key, (batch, length, heads, DIM), dtype)
  keys = jax.random.split(jax.random.key(0), 3)
  return 2 * draw(keys[0], HEADS), draw(keys[1], GROUPS), draw(keys[2], GROUPS)


def visible(rule, query, key, segments, k, window):
  """[G, n, n]: the keys j that query i sees, by the definition, token by token."""
  n, size = len(segments), block_size(k, window)
  seen = np.zeros((GROUPS, n, n), bool)
  logits = np.einsum("igrd,jgd->grij", query.reshape(n, GROUPS, -1, DIM), key) / DIM**0.5
  start = 0
  for i in range(n):
    if i == 0 or segments[i] != segments[i - 1]:
      start, slots = i, [[] for _ in range(GROUPS)]
      losers, marks = [[] for _ in range(GROUPS)], np.zeros((GROUPS, n))
    if (i - start) % size == 0:
      for g in range(GROUPS):
        known = [*slots[g], *range(max(start, i - window), i)]
        mark = dict(zip(known, marks[g, known]))
        if rule == "snapkv":
          around = lambda at: known[max(at - 2, 0) : at + 3]
          mark = {j: sum(marks[g, around(at)]) / 5 for at, j in enumerate(known)}
          marks[g] = 0
        candidates = [*slots[g], *(j for j in range(i - window, i - window + size) if j >= start)]
        best = sorted(candidates, key=lambda j: (-mark.get(j, np.inf), j))
        losers[g] = [j for j in best[k:]][::-1]  # the worst first
    for g in range(GROUPS):
      j = i - window
      if j >= start:
        if j in losers[g]:
          losers[g].remove(j)
        else:
          if len(slots[g]) == k:
            slots[g].remove(next(old for old in losers[g] if old in slots[g]))
          slots[g].append(j)
      seen[g, i, [*slots[g], *range(max(start, j + 1), i + 1)]] = True
    weights = np.exp(logits[:, :, i]) * seen[:, None, i]
    weights = (weights / weights.sum(-1, keepdims=True)).mean(1)
    marks = {
      "tova": lambda: np.broadcast_to(weights.mean(0), weights.shape),
      "h2o": lambda: marks + weights,
      "snapkv": lambda: marks + weights,
    }[rule]()
  return seen


def by_definition(rule, arrays, k, window):
  """Returns `visible` of both rows, [2, G, n, n]."""
  query, key, _ = (np.asarray(x, np.float64) for x in arrays)
  rows = zip(query, key, SEGMENTS)
  return np.stack([visible(rule, *row, k, window) for row in rows])


@pytest.mark.parametrize("rule, k, window", [*CASES, ("tova, of equal marks", 6, 5)])
def test_queries_see_the_keys_of_the_definition(rule, k, window):
  rule, _, equal = rule.partition(",")
  arrays = [jnp.zeros_like(x) if equal else x for x in inputs()]
  want = by_definition(rule, arrays, k, window)
  start, end = document_bounds(jnp.asarray(SEGMENTS), *SEGMENTS.shape)
  expiry = np.asarray(expiries(rule, *arrays[:2], start, end, k, window, DIM**-0.5))
  token = np.arange(LENGTH)
  age = token[:, None] - token
  seen = (age >= 0) & (token >= np.asarray(start)[:, None, :, None])
  seen = seen & ((age < window) | (token[:, None] < expiry[:, :, None]))
  np.testing.assert_array_equal(seen, want)
  keys = seen.sum(-1)
  assert keys.max() == k + window and np.all(keys[1, :, k + window :] == k + window)


def masked(query, key, value, seen):
  """Attention under a mask [B, G, n, n]."""
  repeat = lambda x: jnp.repeat(x, HEADS // GROUPS, axis=2)
  logits = jnp.einsum("bihd,bjhd->bhij", query, repeat(key)) / DIM**0.5
  logits = jnp.where(jnp.repeat(seen, HEADS // GROUPS, axis=1), logits, -jnp.inf)
  return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(logits), repeat(value))


def test_outputs_and_gradients_are_those_of_the_definition():
  arrays = inputs()
  seen = by_definition("h2o", arrays, 40, 0)
  attend = functools.partial(
    evicting_attention, rule="h2o", k=40, window=0, segment_ids=SEGMENTS, implementation="xla"
  )
  weight = jax.random.normal(jax.random.key(1), arrays[0].shape)

  def results(attend):
    loss = lambda *arrays: (jnp.sum(attend(*arrays) * weight), attend(*arrays))
    return quick_jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)

  got, want = results(attend), results(functools.partial(masked, seen=seen))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), got, want)


def test_rows_that_fit_the_budget_are_dense(monkeypatch):
  monkeypatch.setattr(eviction, "expiries", None)
  arrays = inputs(20)
  want = masked(*arrays, np.broadcast_to(np.tri(20, dtype=bool), (2, GROUPS, 20, 20)))
  for k, window in ((10**10, 0), (7, 13)):
    attend = functools.partial(evicting_attention, rule="tova", k=k, window=window)
    got = quick_jit(functools.partial(attend, implementation="xla"))(*arrays)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_bfloat16_and_bad_arguments():
  arrays = inputs(40, dtype=jnp.bfloat16)
  run = jax.eval_shape(functools.partial(evicting_attention, rule="h2o", k=9, window=3), *arrays)
  assert run.dtype == jnp.bfloat16
  with pytest.raises(ValueError, match="k=0 must be at least 1"):
    evicting_attention(*arrays, rule="h2o", k=0, window=3)
  with pytest.raises(ValueError, match="implementation='reference' is not one of None, xla"):
    evicting_attention(*arrays, rule="h2o", k=1, window=3, implementation="reference")
