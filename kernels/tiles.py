"""What the Pallas kernels read: lists of selected tokens per chunk of queries, and which tiles of
pairs are dead, partly live or wholly live.

A selected token is live on one interval of queries, `first <= i < last`. A chunk's list holds the
tokens already selected at its first query, by increasing last, so that tiles die one after the
other, and then those selected later, by increasing first, so that tiles start one after the other.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels.varying import varying_like

ROWS = 128  # the places of a list are a multiple of it
TILE = 64  # places or keys of the smallest tile
NEVER = 2**30  # first query of a place that holds no token


class Lists(NamedTuple):
  """The lists of one row of tokens; under vmap [batch, heads] come in front.

  Attributes:
    token: [chunks, slots] int32; 0 where a place is empty.
    first, last: [chunks, slots] int32; NEVER and 0 where a place is empty.
    entered: [n] int32, how many places of its chunk's list hold tokens with first <= i: they are
      the foremost.
    old: [chunks] int32, how many of them are live at the chunk's first query.
    new_place: [n] int32, the place (over all chunks) where a token is listed as selected later;
      chunks * slots where it is not.
    old_place: [k * chunks] int32, the places where tokens are listed as live at the chunk's first
      query: those of token j from old_begin_j on, old_count_j many, chunk after chunk.
    old_begin, old_count: [n] int32; the former is arbitrary where the latter is 0.
    listed: [n] int32, the tokens of all lists, each once, in their order; 0 behind them. number: []
      int32, how many they are.
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
  listed: jax.Array
  number: jax.Array


def list_slots(k: int, chunk: int) -> int:
  """Places of a list: at most k tokens are live at a chunk's first query, and every later query
  admits one.
  """
  return -(-(k + chunk - 1) // ROWS) * ROWS


def selection_lists(
  expiry: jax.Array, order: jax.Array, *, k: int, window: int, chunk: int
) -> Lists:
  """Lists the tokens live anywhere in each chunk of queries: for tests and the interpreter, in
  O(n^2 / chunk). On GPUs selection_lists.py does it.

  Args:
    expiry: [n] int32, of `sparsek.causal_sparsek` with delay = window; n must be a multiple of
      `chunk`.
    order: [n] int32, tokens in such an order that the expiry of those that were ever selected never
      decreases.
    k: budget.
    window: steps from a token to the first query that may select it.
    chunk: queries per chunk.
  """
  n = expiry.shape[0]
  chunks, slots = n // chunk, list_slots(k, chunk)
  token, c = jnp.arange(n, dtype=jnp.int32), jnp.arange(chunks, dtype=jnp.int32)[:, None]
  entry, begin = token + window, c * chunk
  is_old = (entry <= begin) & (begin < expiry)  # [chunks, n]
  is_new = (entry > begin) & (entry < begin + chunk) & (entry < expiry)
  count = lambda x, axis: jnp.sum(x, axis=axis, dtype=jnp.int32)
  before = lambda x: jnp.cumsum(x, axis=1, dtype=jnp.int32) - x
  old = count(is_old, 1)
  place_if_old = c * slots + jnp.zeros_like(is_old, jnp.int32).at[:, order].set(
    before(is_old[:, order])
  )
  place_if_new = c * slots + old[:, None] + before(is_new)
  place = jnp.where(is_old, place_if_old, jnp.where(is_new, place_if_new, chunks * slots))
  listed = lambda x: (
    jnp.zeros(chunks * slots, jnp.int32)
    .at[place]
    .set(jnp.broadcast_to(x, place.shape), mode="drop")
    .reshape(chunks, slots)
  )
  tokens, last = listed(token), listed(expiry)
  entered = (
    jnp.cumsum(
      jnp.zeros(n, jnp.int32).at[entry].add(count(is_new, 0), mode="drop").reshape(chunks, chunk),
      axis=1,
    )
    + old[:, None]
  )
  old_count = count(is_old, 0)
  old_begin = jnp.zeros(n, jnp.int32).at[order].set(jnp.cumsum(old_count[order]) - old_count[order])
  copy = jnp.where(is_old, old_begin + before(is_old.T).T, k * chunks)
  old_place = jnp.zeros(k * chunks, jnp.int32).at[copy].set(place, mode="drop")
  new_place = jnp.min(jnp.where(is_new, place, chunks * slots), axis=0)
  selected = expiry > entry
  everyone = (
    jnp.zeros(n, jnp.int32)
    .at[jnp.where(selected, jnp.cumsum(selected) - 1, n)]
    .set(token, mode="drop")
  )
  return Lists(
    tokens,
    jnp.where(last > 0, tokens + window, NEVER),
    last,
    entered.reshape(n),
    old,
    new_place,
    old_place,
    old_begin,
    old_count,
    everyone,
    jnp.sum(selected, dtype=jnp.int32),
  )


class Tiles(NamedTuple):
  """Of the tokens or places of each tile: the earliest and latest first query, the earliest and
  latest last one; [..., tiles] int32 each.
  """

  first_min: jax.Array
  first_max: jax.Array
  last_min: jax.Array
  last_max: jax.Array


def no_lists(batch: int, groups: int, n: int, chunk: int) -> Lists:
  """[batch, groups, ...] lists that hold no token, for a sliding window alone; what sums of
  gradients need is left out.
  """
  fill = lambda value, *shape: jnp.full((batch, groups, *shape), value, jnp.int32)
  places = n // chunk, ROWS
  return Lists(
    token=fill(0, *places),
    first=fill(NEVER, *places),
    last=fill(0, *places),
    entered=fill(0, n),
    old=fill(0, n // chunk),
    new_place=None,
    old_place=None,
    old_begin=None,
    old_count=None,
    listed=None,
    number=None,
  )


def list_tiles(lists: Lists) -> Tiles:
  """[..., chunks, slots / TILE]."""
  tiled = lambda x, f: f(x.reshape(*x.shape[:-1], -1, TILE), axis=-1)
  return Tiles(
    tiled(lists.first, jnp.min),
    tiled(lists.first, jnp.max),
    tiled(lists.last, jnp.min),
    tiled(lists.last, jnp.max),
  )


def window_tiles(end: jax.Array, window: int) -> Tiles:
  """[..., n / TILE]; end: [..., n], one past the last token of each token's document, never
  decreasing.
  """
  token = jnp.broadcast_to(jnp.arange(end.shape[-1], dtype=jnp.int32), end.shape)
  last = jnp.minimum(token + window, end)
  return Tiles(*(x[..., i::TILE] for x in (token, last) for i in (0, TILE - 1)))


def larger_tiles(tiles: Tiles, times: int) -> Tiles:
  """Tiles of so many neighbours each."""
  joined = lambda x, f: f(x.reshape(*x.shape[:-1], -1, times), axis=-1)
  return Tiles(*(joined(x, f) for x, f in zip(tiles, (jnp.min, jnp.max) * 2)))


def query_tiles(read, begin: jax.Array, block_q: int, tiles: int) -> tuple:
  """Which tiles of its chunk's list every block of queries visits.

  Args:
    read: t -> Tiles, of the t-th tile of every block's list.
    begin: first query of every block. block_q: queries per block. tiles: of a list.

  Returns:
    t0, t1, t2, t3: of the tiles [t0, t1) all tokens have entered, [t1, t2) are live for every
      query, [t2, t3) are the others. All are `tiles` if none is live.
  """
  end = begin + (block_q - 1)

  def visit(t, state):
    t0, t1, t2, t3 = state
    tile, t = read(t), begin - begin + t  # an array, as kernels want it
    live = (tile.last_max > begin) & (tile.first_min <= end)
    whole = (tile.last_min > end) & (tile.first_max <= begin)
    return (
      jnp.where(live, jnp.minimum(t0, t), t0),
      jnp.where(whole, jnp.minimum(t1, t), t1),
      jnp.where(whole & ((t2 == t) | (t1 == tiles)), t + 1, t2),
      jnp.where(live, t + 1, t3),
    )

  nowhere = begin - begin + tiles
  t0, t1, t2, t3 = lax.fori_loop(0, tiles, visit, (nowhere, nowhere, nowhere, nowhere))
  return t0, *(jnp.where(t1 < tiles, t, t0) for t in (t1, t2)), t3


def near_tiles(left: Callable, block: jax.Array, block_q: int, block_kv: int) -> tuple:
  """Which tiles of tokens every block of queries visits before its own.

  Args:
    left: function query -> first token of its window, never decreasing.
    block: numbers of the blocks. block_q, block_kv: queries per block, tokens per tile.

  Returns:
    t4, t5: tiles [t4, t5) may enter or leave the window, [t5, first tile of the block) are inside
      every query's window; the block's own tiles follow.
  """
  begin, own = block * block_q, block * block_q // block_kv
  t4 = jnp.minimum(left(begin) // block_kv, own)
  return t4, jnp.clip((left(begin + (block_q - 1)) + (block_kv - 1)) // block_kv, t4, own)


def query_bounds(
  tiles: Tiles, left: jax.Array, *, chunk: int, block_q: int, block_kv: int
) -> jax.Array:
  """What `query_tiles` and `near_tiles` say of every block of queries, under XLA; on GPUs that of
  selection_lists.py does it.

  Args:
    tiles: [B, G, chunks, slots / TILE] each, of `list_tiles`.
    left: [B, n] int32, first token of each query's window.
    chunk, block_q, block_kv: queries per chunk and per block, keys per tile.

  Returns:
    [B, G, n / block_q, 6] int32: t0, ..., t5.
  """
  tiles = larger_tiles(tiles, block_kv // TILE)
  batch, groups, chunks, count = tiles.last_max.shape
  block = jnp.arange(chunks * chunk // block_q, dtype=jnp.int32)
  begin = varying_like(
    jnp.broadcast_to(
      (block * block_q).reshape(chunks, -1), (batch, groups, chunks, chunk // block_q)
    ),
    tiles.last_max,
  )
  listed = query_tiles(
    lambda t: Tiles(*(lax.dynamic_index_in_dim(x, t, axis=-1) for x in tiles)),
    begin,
    block_q,
    count,
  )
  near = near_tiles(lambda query: left[:, None, query], block, block_q, block_kv)
  shape = batch, groups, chunks * chunk // block_q
  return jnp.stack(
    [*(t.reshape(shape) for t in listed), *(jnp.broadcast_to(t, shape) for t in near)], axis=-1
  )


def key_tiles(tiles: Tiles, base: jax.Array, *, limit: int, block_q: int) -> jax.Array:
  """Which blocks of queries every tile of keys visits.

  Args:
    tiles: [..., tiles] each.
    base: [...] int32, first query that may be visited, and `limit` how many there are; a multiple
      of block_q.
    block_q: queries per block.

  Returns:
    [..., tiles, 4] int32, blocks counted from query 0: [b0, b1) partly live, [b1, b2) wholly live,
    [b2, b3) partly live.
  """
  base = base[..., None]
  low, high = jnp.maximum(tiles.first_min, base), jnp.minimum(tiles.last_max, base + limit)
  b0 = low // block_q
  b3 = jnp.where(high > low, -(-high // block_q), b0)
  b1 = jnp.clip(-(-tiles.first_max // block_q), b0, b3)
  b2 = jnp.clip(tiles.last_min // block_q, b1, b3)
  b1, b2 = jnp.where(b2 > b1, b1, b0), jnp.where(b2 > b1, b2, b0)
  return jnp.stack([b0, b1, b2, b3], axis=-1).astype(jnp.int32)
