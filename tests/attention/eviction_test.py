"""TOVA, H2O and SnapKV against their definition written out token by token, and against kvpress."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.attention import eviction
from sparsek.attention.eviction import RULES, block_size, evicting_attention
from tests.helpers import quick_jit

LENGTH, HEADS, GROUPS, DIM = 150, 4, 2, 4
SEGMENTS = np.repeat(np.array([[1, 2, 3, 0], [1, 1, 1, 1]]), [70, 1, 60, 19], axis=1)
SIZES = [(6, 5), (1, 0), (1, 40), (40, 0), (30, 34), (3, 1)]  # blocks of 1, 1, 2, 2, 4 and 1


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


def masked(query, key, value, seen):
  """Attention under a mask [B, G, n, n]."""
  repeat = lambda x: jnp.repeat(x, HEADS // GROUPS, axis=2)
  logits = jnp.einsum("bihd,bjhd->bhij", query, repeat(key)) / DIM**0.5
  logits = jnp.where(jnp.repeat(seen, HEADS // GROUPS, axis=1), logits, -jnp.inf)
  return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(logits), repeat(value))


@pytest.mark.parametrize("k, window", SIZES)
@pytest.mark.parametrize("rule", RULES)
def test_matches_its_definition(rule, k, window):
  arrays = inputs()
  wide = [np.asarray(x, np.float64) for x in arrays]
  seen = np.stack(
    [visible(rule, wide[0][b], wide[1][b], SEGMENTS[b], k, window) for b in range(len(SEGMENTS))]
  )
  keys = seen.sum(-1)
  assert keys.max() == k + window and np.all(keys[1, :, k + window :] == k + window)
  attend = functools.partial(
    evicting_attention, rule=rule, k=k, window=window, segment_ids=SEGMENTS, implementation="xla"
  )
  weight = jax.random.normal(jax.random.key(1), arrays[0].shape)
  results = [
    quick_jit(
      lambda *arrays, f=f: (
        f(*arrays),
        jax.grad(lambda *a: jnp.sum(f(*a) * weight), (0, 1, 2))(*arrays),
      )
    )(*arrays)
    for f in (attend, functools.partial(masked, seen=seen))
  ]
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), *results)
