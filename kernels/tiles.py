"""Tables that the Pallas kernels read: lists of selected tokens per chunk of queries, and which
tiles of pairs are dead, partly live or wholly live.

A selected token is live on one interval of queries, `first <= i < last`. A chunk's list holds the
tokens already selected at its first query, by increasing last, so that tiles die one after the
other, and then those selected later, by increasing first, so that tiles start one after the other:

                     slots of a list ->
      first query   | live live live |  -    -    -   |
           |        |  -   live live | live  -    -   |
           v        |  -    -   live | live live  -   |
      last query    |  -    -    -   |  -   live live |
                     selected at the   selected later
                     first query
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels.sentinels import NEVER
from sparsek.kernels.varying import varying_like

ROWS = 128  # the slots of a list are a multiple of it
TILE = 64  # slots or keys of the smallest tile


class Lists(NamedTuple):
  """The lists of one row of tokens; under vmap [batch, heads] come in front.

  A *place* is a slot, numbered through the lists of all chunks.

  Attributes:
    token: [chunks, slots] int32; 0 where a slot is empty.
    first, last: [chunks, slots] int32, the token is live for queries first <= i < last; NEVER and 0
      where a slot is empty.
    entered: [n] int32, how many slots of its chunk's list, from the first one on, hold tokens with
      first <= i.
    old: [chunks] int32, how many tokens of a list are live at the chunk's first query.

  The others serve sums of gradients, and are None in lists without tokens:
    new_place: [n] int32, the place where a token is listed because it was selected after the
      chunk's first query; chunks * slots if there is none.
    old_place: [k * chunks] int32, the places where tokens are listed because they are live at the
      chunk's first query. Token j has old_count_j of them, from index old_begin_j on, chunk after
      chunk.
    old_begin, old_count: [n] int32; old_begin is arbitrary where old_count is 0.
    listed: [n] int32, the tokens of all lists, each once, in ascending order; 0 behind them.
    number: [] int32, how many they are.
  """

  token: jax.Array
  first: jax.Array
  last: jax.Array
  entered: jax.Array
  old: jax.Array
  new_place: jax.Array | None
  old_place: jax.Array | None
  old_begin: jax.Array | None
  old_count: jax.Array | None
  listed: jax.Array | None
  number: jax.Array | None


def list_slots(k: int, chunk: int) -> int:
  """Returns the number of slots of a list: at most k tokens are live at a chunk's first query, and
  each later query admits one.
  """
  return -(-(k + chunk - 1) // ROWS) * ROWS


def selection_lists(
  expiry: jax.Array, order: jax.Array, *, k: int, window: int, chunk: int
) -> Lists:
  """Lists the tokens live anywhere in each chunk of queries, in O(n^2 / chunk): for tests and the
  interpreter. GPUs use hopper/selection_lists.py.

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
  slot_if_old = c * slots + jnp.zeros_like(is_old, jnp.int32).at[:, order].set(
    before(is_old[:, order])
  )
  slot_if_new = c * slots + old[:, None] + before(is_new)
  slot = jnp.where(is_old, slot_if_old, jnp.where(is_new, slot_if_new, chunks * slots))
  listed = lambda x: (
    jnp.zeros(chunks * slots, jnp.int32)
    .at[slot]
    .set(jnp.broadcast_to(x, slot.shape), mode="drop")
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
  old_place = jnp.zeros(k * chunks, jnp.int32).at[copy].set(slot, mode="drop")
  new_place = jnp.min(jnp.where(is_new, slot, chunks * slots), axis=0)
  selected = expiry > entry
  all_listed = (
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
    all_listed,
    jnp.sum(selected, dtype=jnp.int32),
  )


class Tiles(NamedTuple):
  """The lifetimes of the tokens or slots of each tile: their earliest and latest first query, and
  their earliest and latest last one; [..., tiles] int32 each.
  """

  first_min: jax.Array
  first_max: jax.Array
  last_min: jax.Array
  last_max: jax.Array


def no_lists(batch: int, groups: int, n: int, chunk: int) -> Lists:
  """Returns [batch, groups, ...] lists that hold no token, for a sliding window alone; the arrays
  that sums of gradients need are left out.
  """
  fill = lambda value, *shape: jnp.full((batch, groups, *shape), value, jnp.int32)
  slots = n // chunk, ROWS
  return Lists(
    token=fill(0, *slots),
    first=fill(NEVER, *slots),
    last=fill(0, *slots),
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
  """Returns the tiles of lists, [..., chunks, slots / TILE]."""
  tiled = lambda x, f: f(x.reshape(*x.shape[:-1], -1, TILE), axis=-1)
  return Tiles(
    tiled(lists.first, jnp.min),
    tiled(lists.first, jnp.max),
    tiled(lists.last, jnp.min),
    tiled(lists.last, jnp.max),
  )


def window_tiles(end: jax.Array, window: int) -> Tiles:
  """Returns the tiles of the tokens of a row as keys of the window, [..., n / TILE].

  Args:
    end: [..., n], one past the last token of each token's document, never decreasing.
    window: tokens that a query sees, itself included.
  """
  token = jnp.broadcast_to(jnp.arange(end.shape[-1], dtype=jnp.int32), end.shape)
  last = jnp.minimum(token + window, end)
  return Tiles(*(x[..., i::TILE] for x in (token, last) for i in (0, TILE - 1)))


def larger_tiles(tiles: Tiles, times: int) -> Tiles:
  """Joins every `times` neighbouring tiles."""
  joined = lambda x, f: f(x.reshape(*x.shape[:-1], -1, times), axis=-1)
  return Tiles(*(joined(x, f) for x, f in zip(tiles, (jnp.min, jnp.max) * 2)))


def query_tiles(
  read: Callable[[jax.Array], Tiles], begin: jax.Array, block_q: int, tiles: int
) -> tuple[jax.Array, ...]:
  """Finds the tiles of its chunk's list that each block of queries visits.

  Args:
    read: function that returns the lifetimes of the t-th tile of each block's list, given t.
    begin: first query of each block.
    block_q: queries per block.
    tiles: how many a list has.

  Returns:
    t0, t1, t2, t3: in tiles [t0, t1) all tokens have entered and some may leave, tiles [t1, t2) are
      live for every query of the block, and [t2, t3) are the rest. All four are `tiles` if no tile
      is live.
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


def near_tiles(
  window_start: Callable[[jax.Array], jax.Array], block: jax.Array, block_q: int, block_kv: int
) -> tuple[jax.Array, jax.Array]:
  """Finds the tiles of tokens that each block of queries visits before the tiles of the block
  itself.

  Args:
    window_start: function from a query to the first token of its window, which never decreases.
    block: numbers of the blocks.
    block_q, block_kv: queries per block, tokens per tile.

  Returns:
    t4, t5: tiles [t4, t5) may have left the windows of some of the block's queries, [t5, first
      tile of the block) are inside every query's window; the tiles of the block itself follow.
  """
  begin, block_tile = block * block_q, block * block_q // block_kv
  t4 = jnp.minimum(window_start(begin) // block_kv, block_tile)
  end = window_start(begin + (block_q - 1))
  return t4, jnp.clip((end + (block_kv - 1)) // block_kv, t4, block_tile)


def query_bounds(
  tiles: Tiles, window_start: jax.Array, *, chunk: int, block_q: int, block_kv: int
) -> jax.Array:
  """Applies `query_tiles` and `near_tiles` to each block of queries, under XLA; GPUs use
  `bound_tiles` of hopper/selection_lists.py.

  Args:
    tiles: [B, G, chunks, slots / TILE] each, of `list_tiles`.
    window_start: [B, n] int32, first token of each query's window.
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
  near = near_tiles(lambda query: window_start[:, None, query], block, block_q, block_kv)
  shape = batch, groups, chunks * chunk // block_q
  return jnp.stack(
    [*(t.reshape(shape) for t in listed), *(jnp.broadcast_to(t, shape) for t in near)], axis=-1
  )


def key_tiles(tiles: Tiles, begin: jax.Array, end: jax.Array, *, block_q: int) -> jax.Array:
  """Finds the blocks of queries that each tile of keys visits.

  Args:
    tiles: [..., tiles] each.
    begin, end: [...] int32, first query that may be visited, and one past the last; multiples of
      block_q. No query may be where end <= begin.
    block_q: queries per block, a power of two.

  Returns:
    [..., tiles, 4] int32, blocks counted from query 0: [b0, b1) partly live, [b1, b2) wholly live,
    [b2, b3) partly live.
  """
  shift = block_q.bit_length() - 1
  block_of = lambda query: query >> shift  # as query // block_q, by one operation of XLA
  blocks_before = lambda query: -(-query >> shift)
  low = jnp.maximum(tiles.first_min, begin[..., None])
  high = jnp.minimum(tiles.last_max, end[..., None])
  b0 = block_of(low)
  b3 = jnp.where(high > low, blocks_before(high), b0)
  b1 = jnp.clip(blocks_before(tiles.first_max), b0, b3)
  b2 = jnp.clip(block_of(tiles.last_min), b1, b3)
  b1, b2 = jnp.where(b2 > b1, b1, b0), jnp.where(b2 > b1, b2, b0)
  return jnp.stack([b0, b1, b2, b3], axis=-1).astype(jnp.int32)
