"""Lists and tile bounds of the Pallas kernels against a direct enumeration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsek
from sparsek.attention.documents import document_bounds
from sparsek.kernels import specs
from sparsek.kernels.tiles import (
  key_tiles,
  larger_tiles,
  list_tiles,
  query_bounds,
  selection_lists,
  window_tiles,
)

CASES = [
  (256, 7, 5, 64),
  (256, 60, 0, 128),
  (128, 200, 3, 64),
  (64, 1, 1, 64),
  (192, 4, 500, 64),
  (512, 40, 33, 256),
  (512, 130, 64, 512),
]


# One program for all scores and documents of a case.
lists_of = jax.jit(selection_lists, static_argnames=("k", "window", "chunk"))
query_bounds_of = jax.jit(query_bounds, static_argnames=("chunk", "block_q", "block_kv"))


@functools.partial(jax.jit, static_argnames=("times", "limit"))
def key_tiles_of(tiles, base, times, limit):
  return key_tiles(larger_tiles(tiles, times), base, base + limit, block_q=16)


@functools.lru_cache(maxsize=None)
def build(n, k, window, chunk, family, documents=()):
  spec = specs.Spec("lists", n=n, documents=documents)
  ids = specs.segment_ids(spec)
  scores = specs.make_scores(family, jax.random.key(n + k), (1, n, 1))
  expiry = sparsek.causal_sparsek(scores, k, delay=window, segment_ids=ids).expiry[0, :, 0]
  start, end = (x[0] for x in document_bounds(ids, 1, n))
  order = jnp.argsort(expiry).astype(jnp.int32)
  lists = lists_of(expiry, order, k=min(k, n), window=window, chunk=chunk)
  return expiry, start, end, jax.tree.map(np.asarray, lists)


@pytest.mark.parametrize("documents", ((), (3, 60, 1, 20)))
@pytest.mark.parametrize("family", ("normal", "rising", "ties"))
@pytest.mark.parametrize("n, k, window, chunk", CASES)
def test_lists_hold_exactly_the_live_tokens(n, k, window, chunk, family, documents):
  expiry, _, _, lists = build(n, k, window, chunk, family, documents)
  for c in range(n // chunk):
    begin = c * chunk
    live = [j for j in range(n) if max(j + window, begin) < min(expiry[j], begin + chunk)]
    old = [j for j in live if j + window <= begin]
    assert lists.old[c] == len(old) and sorted(lists.token[c, : len(old)]) == old
    assert np.all(np.diff(lists.last[c, : len(old)]) >= 0)
    np.testing.assert_array_equal(
      lists.token[c, len(old) : len(live)], [j for j in live if j + window > begin]
    )
    np.testing.assert_array_equal(lists.first[c, : len(live)], lists.token[c, : len(live)] + window)
    np.testing.assert_array_equal(
      lists.last[c, : len(live)], np.asarray(expiry)[lists.token[c, : len(live)]]
    )
    assert np.all(lists.last[c, len(live) :] == 0) and np.all(lists.first[c, len(live) :] >= n)
    for i in range(begin, begin + chunk):
      assert lists.entered[i] == np.sum(lists.first[c] <= i)
  selected = np.unique([lists.token[c, s] for c, s in zip(*np.nonzero(lists.last))])
  assert lists.number == len(selected)
  np.testing.assert_array_equal(lists.listed, [*selected, *[0] * (n - len(selected))])
  places = lists.token.size
  for j in range(n):
    listed = lists.old_place[lists.old_begin[j] : lists.old_begin[j] + lists.old_count[j]]
    np.testing.assert_array_equal(
      listed,
      [
        c * lists.token.shape[1] + s
        for c, s in zip(*np.nonzero(lists.token == j))
        if s < lists.old[c]
      ],
    )
    is_new = j + window < n and expiry[j] > j + window and (j + window) % chunk
    assert (lists.new_place[j] < places) == bool(is_new)
    assert (
      not is_new
      or lists.token.reshape(-1)[lists.new_place[j]] == j
      and (j + window) // chunk == lists.new_place[j] // lists.token.shape[1]
    )


@pytest.mark.parametrize("documents", ((), (3, 60, 1, 20)))
@pytest.mark.parametrize("family", ("normal", "rising"))
@pytest.mark.parametrize("n, k, window, chunk", [case for case in CASES if case[3] >= 64])
def test_tiles_cover_every_live_pair_and_call_full_only_what_is(
  n, k, window, chunk, family, documents
):
  expiry, start, end, lists = build(n, k, window, chunk, family, documents)
  token = jnp.arange(n)
  left, right = jnp.maximum(token - window + 1, start), jnp.minimum(token + window, end)
  block_q = block_kv = 64
  of_lists, of_window = list_tiles(jax.tree.map(jnp.asarray, lists)), window_tiles(end, window)
  meta = np.asarray(
    query_bounds_of(
      jax.tree.map(lambda x: x[None, None], of_lists),
      left[None],
      chunk=chunk,
      block_q=block_q,
      block_kv=block_kv,
    )
  )[0, 0]
  pairs = lambda first, last: (np.arange(n)[:, None] >= first) & (np.arange(n)[:, None] < last)
  window_live = pairs(np.arange(n), np.asarray(right))
  np.testing.assert_array_equal(
    window_live,
    (np.asarray(left)[:, None] <= np.arange(n)) & (np.arange(n) <= np.arange(n)[:, None]),
  )
  for b, (t0, t1, t2, t3, t4, t5) in enumerate(meta):
    rows, c = slice(b * block_q, (b + 1) * block_q), b * block_q // chunk
    live = pairs(lists.first[c], lists.last[c])[rows].reshape(block_q, -1, block_kv)
    assert t0 <= t1 <= t2 <= t3
    assert not live[:, :t0].any() and not live[:, t3:].any() and live[:, t1:t2].all()
    assert np.all(lists.first[c].reshape(-1, block_kv)[t0:t1] <= b * block_q)
    live = window_live[rows].reshape(block_q, -1, block_kv)
    own = b * block_q // block_kv
    assert t4 <= t5 <= own
    assert (
      not live[:, :t4].any()
      and not live[:, own + block_q // block_kv :].any()
      and live[:, t5:own].all()
    )
  for times in (1, 2) if chunk % 128 == 0 else (1,):
    check_key_tiles(
      lists.first,
      lists.last,
      key_tiles_of(of_lists, jnp.arange(n // chunk) * chunk, times, chunk),
      chunk,
      n,
      64 * times,
    )
    check_key_tiles(
      np.arange(n)[None],
      np.asarray(right)[None],
      key_tiles_of(of_window, jnp.zeros((), int), times, n)[None],
      n,
      n,
      64 * times,
    )


def check_key_tiles(first, last, meta, chunk, n, block_kv):
  for c, tiles in enumerate(np.asarray(meta)):
    for t, (b0, b1, b2, b3) in enumerate(tiles):
      keys = slice(t * block_kv, (t + 1) * block_kv)
      live = (np.arange(n)[:, None] >= first[c, keys]) & (np.arange(n)[:, None] < last[c, keys])
      live[: c * chunk] = live[(c + 1) * chunk :] = False
      live = live.reshape(-1, 16, block_kv)
      assert b0 <= b1 <= b2 <= b3
      assert not live[:b0].any() and not live[b3:].any() and live[b1:b2].all()
