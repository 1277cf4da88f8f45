"""What the Pallas kernels read: lists of selected tokens per chunk of queries, and which tiles of pairs are dead, partly live or wholly live.

A selected token is live on one interval of queries, `first <= i < last`. A chunk's list holds the tokens already selected at its first query, by increasing
last, so that tiles die one after the other, and then those selected later, by increasing first, so that tiles start one after the other.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

ROWS = 128                       # the places of a list are a multiple of it
NEVER = 2 ** 30                  # first query of a place that holds no token


class Lists(NamedTuple):
  """The lists of one row of tokens; under vmap [batch, heads] come in front.

  Attributes:
    token: [chunks, slots] int32; 0 where a place is empty.
    first, last: [chunks, slots] int32; NEVER and 0 where a place is empty.
    entered: [n] int32, how many places of its chunk's list hold tokens with first <= i: they are the foremost.
    old: [chunks] int32, how many of them are live at the chunk's first query.
    new_place: [n] int32, the place (over all chunks) where a token is listed as selected later; chunks * slots where it is not.
    old_place: [k * chunks] int32, the places where tokens are listed as live at the chunk's first query: those of token j from old_begin_j on, old_count_j
      many, chunk after chunk.
    old_begin, old_count: [n] int32.
  """
  token: jax.Array
  first: jax.Array
  last: jax.Array
  entered: jax.Array
  old: jax.Array
  new_place: jax.Array
  old_place: jax.Array
  old_begin: jax.Array
  old_count: jax.Array


def list_slots(k: int, chunk: int) -> int:
  """Places of a list: at most k tokens are live at a chunk's first query, and every later query admits one."""
  return -(-(k + chunk - 1) // ROWS) * ROWS


def selection_lists(expiry: jax.Array, order: jax.Array, *, k: int, window: int, chunk: int) -> Lists:
  """Lists the tokens live anywhere in each chunk of queries.

  Args:
    expiry: [n] int32, of `sparsek.causal_sparsek` with delay = window; n must be a multiple of `chunk`.
    order: [n] int32, the tokens by increasing expiry.
    k: budget.
    window: steps from a token to the first query that may select it.
    chunk: queries per chunk.
  """
  n = expiry.shape[0]
  chunks, slots, places = n // chunk, list_slots(k, chunk), k * (n // chunk)
  token = jnp.arange(n, dtype=jnp.int32)
  entry = token + window
  # Tokens live at the first query of a chunk: one copy for every such chunk, in order of expiry, then sorted by chunk.
  old_count = jnp.where(expiry > entry, jnp.maximum((expiry - 1) // chunk - (entry - 1) // chunk, 0), 0)
  held = old_count[order]
  end = jnp.cumsum(held)
  begin = end - held
  copy = jnp.arange(places, dtype=jnp.int32)
  rank = jnp.repeat(token, held, total_repeat_length=places)
  member = jnp.where(copy < end[-1], (-(-entry // chunk)[order] - begin)[rank] + copy, chunks)
  member, copy = _sort_stably(member, copy, chunks)
  holder = order[rank[copy]]
  old = jnp.zeros(chunks, jnp.int32).at[member].add(1, mode="drop")
  old_start = jnp.cumsum(old) - old
  place = (jnp.arange(chunks + 1, dtype=jnp.int32) * slots - jnp.append(old_start, 0))[member] + jnp.arange(places, dtype=jnp.int32)
  old_place = jnp.zeros(places, jnp.int32).at[copy].set(place, unique_indices=True)
  old_begin = jnp.zeros(n, jnp.int32).at[order].set(begin, unique_indices=True)
  # Tokens selected at a later query of the chunk, which are in their own order already.
  new = (expiry > entry) & (entry % chunk != 0)
  newcomers = jnp.zeros(n, jnp.int32).at[jnp.where(new, jnp.cumsum(new) - 1, n)].set(token, mode="drop")
  count = jnp.concatenate([jnp.zeros(min(window, n), jnp.int32), jnp.cumsum(new, dtype=jnp.int32)])[:n]     # of those with entry <= i
  before = count[::chunk]
  entered = jnp.repeat(old - before, chunk, total_repeat_length=n) + count
  slot = jnp.arange(slots, dtype=jnp.int32)
  later = slot - old[:, None]
  tokens = jnp.where(later < 0, holder.at[old_start[:, None] + slot].get(mode="clip"), newcomers.at[before[:, None] + later].get(mode="clip"))
  used = slot < entered[chunk - 1::chunk, None]
  tokens = jnp.where(used, tokens, 0)
  home = entry // chunk
  at = jnp.minimum(entry, n - 1)
  new_place = jnp.where(new & (entry < n), home * slots + entered[at] - 1, chunks * slots)
  return Lists(tokens, jnp.where(used, tokens + window, NEVER), jnp.where(used, expiry[tokens], 0), entered, old, new_place, old_place, old_begin, old_count)


def _sort_stably(key, value, limit):
  """Sorts pairs by `key` in [0, limit], equal ones by `value`, which is 0, 1, 2, ...; one packed integer sorts faster."""
  size = value.shape[0]
  if (limit + 1) * size >= 2 ** 31:
    return lax.sort((key, value), num_keys=1, is_stable=True)
  packed = jnp.sort(key * size + value)
  return packed // size, packed % size


def query_tiles(lists: Lists, left: jax.Array, *, chunk: int, block_q: int, block_kv: int) -> jax.Array:
  """Which tiles every block of queries visits.

  Args:
    lists: see `selection_lists`.
    left: [n] int32, first token of each query's window, never decreasing.
    chunk, block_q, block_kv: queries per chunk and per block, keys per tile.

  Returns:
    [n / block_q, 6] int32: tiles of the chunk's list [t0, t1) of which all tokens have entered, [t1, t2) live for every query, [t2, t3) the others; tiles of
    tokens [t4, t5) that the window may enter or leave, [t5, first tile of the block) inside every query's window; the block's own tiles follow.
  """
  n, chunks = left.shape[0], lists.token.shape[0]
  blocks = chunk // block_q
  begin = (jnp.arange(chunks * blocks, dtype=jnp.int32) * block_q).reshape(chunks, blocks, 1)
  end = begin + block_q - 1
  by_tile = lambda x, f: f(x.reshape(chunks, 1, -1, block_kv), axis=-1)
  tiles = lists.first.shape[1] // block_kv
  live = (by_tile(lists.last, jnp.max) > begin) & (by_tile(lists.first, jnp.min) <= end)
  full = (by_tile(lists.last, jnp.min) > end) & (by_tile(lists.first, jnp.max) <= begin)
  t0, t3 = first_true(live), tiles - first_true(live[..., ::-1])
  t3 = jnp.maximum(t0, t3)
  t0 = jnp.minimum(t0, t3)
  t1 = jnp.where(jnp.any(full, -1), first_true(full), t0)
  t2 = t1 + first_true(~full & (jnp.arange(tiles) >= t1[..., None])) - t1
  t2 = jnp.where(jnp.any(full, -1), t2, t0)
  own = jnp.arange(n // block_q, dtype=jnp.int32) * (block_q // block_kv)
  t4 = jnp.minimum(left[::block_q] // block_kv, own)
  t5 = jnp.clip(-(-left[block_q - 1::block_q] // block_kv), t4, own)
  return jnp.stack([*(t.reshape(-1) for t in (t0, t1, t2, t3)), t4, t5], axis=-1).astype(jnp.int32)


def key_tiles(first: jax.Array, last: jax.Array, base: jax.Array, *, limit: int, block_q: int, block_kv: int) -> jax.Array:
  """Which blocks of queries every tile of keys visits.

  Args:
    first, last: [..., keys] int32, each key is live for queries first <= i < last; empty places as in `Lists`.
    base: [...] int32, first query that may be visited, and `limit` how many there are; a multiple of block_q.
    block_q, block_kv: queries per block, keys per tile.

  Returns:
    [..., keys / block_kv, 4] int32, blocks counted from query 0: [b0, b1) partly live, [b1, b2) wholly live, [b2, b3) partly live.
  """
  tiled = lambda x, f: f(x.reshape(*x.shape[:-1], -1, block_kv), axis=-1)
  base = base[..., None]
  low, high = jnp.maximum(tiled(first, jnp.min), base), jnp.minimum(tiled(last, jnp.max), base + limit)
  b0 = low // block_q
  b3 = jnp.where(high > low, -(-high // block_q), b0)
  b1 = jnp.clip(-(-tiled(first, jnp.max) // block_q), b0, b3)
  b2 = jnp.clip(tiled(last, jnp.min) // block_q, b1, b3)
  b1, b2 = jnp.where(b2 > b1, b1, b0), jnp.where(b2 > b1, b2, b0)
  return jnp.stack([b0, b1, b2, b3], axis=-1).astype(jnp.int32)


def first_true(x: jax.Array) -> jax.Array:
  """Index of the first true along the last axis; its length where none is."""
  return jnp.where(jnp.any(x, -1), jnp.argmax(x, -1), x.shape[-1])
