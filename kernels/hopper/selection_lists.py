"""Lists of selected tokens and bounds of tiles on GPUs (see tiles.py), in Pallas Mosaic kernels of
single threads.

Tokens are taken by rank (`order`), so those of a list that are live at its chunk's first query (the
*old* ones) come by increasing last query. Ranks are cut into segments:

  count_members   a lane for a rank: counts it in its segment, for each chunk where it is old
  (prefix sums)   where the part of each segment begins in each list
  list_old        a lane for a segment and chunk: writes its part of the list
  list_new        a lane for a token: writes it in the list of the chunk where it is selected first
  query_bounds    a lane for a block of queries: finds the tiles that it visits

Kernels follow each other on the stream; there are no barriers and no shared memory. Counts are
added atomically, and each place is written by one lane.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparsek.kernels.hopper.thread_ops import (
  block_of,
  contents,
  kernel,
  reader,
  scatter,
  scatter_row,
)
from sparsek.kernels.hopper.thread_registers import LANES
from sparsek.kernels.sentinels import NEVER
from sparsek.kernels.tiles import TILE, Lists, Tiles, list_slots, near_tiles, query_tiles

# the fewest ranks of a segment, and the most segments, so that memory stays linear
SEGMENT, SEGMENTS = 128, 1024
AT_ONCE = 8  # loads that a lane has in flight


class Sizes(NamedTuple):
  """Sizes of the lists of all rows."""

  rows: int
  n: int
  window: int
  chunk: int
  chunks: int
  slots: int  # of a list
  segment: int  # ranks of a segment
  segments: int

  @property
  def places(self) -> int:
    """The number of places in the lists of a row."""
    return self.chunks * self.slots


class Places(NamedTuple):
  """The lists, [rows, places], which the kernels write in place."""

  token: Any
  last: Any


class OldInputs(NamedTuple):
  """Arrays of the kernel list_old.

  Attributes:
    ranked: [rows, n, 4]: token, chunks [begin, end) where it is old, and its last query, by rank.
    begins, ends: [rows, (chunks + 1) * segments] and [rows, chunks + 1, segments]: the slot in each
      chunk's list where the part of a segment begins and ends. Behind the chunks follow the indices
      where it begins and ends in `Lists.old_place`.
  """

  ranked: Any
  begins: Any
  ends: Any


class OldOutputs(NamedTuple):
  """Results of the kernel list_old, see tiles.Lists."""

  old_place: Any
  old_begin: Any


class NewInputs(NamedTuple):
  """Arrays of the kernel list_new, [rows, n]; came: number of selected tokens with entry <= i."""

  expiry: Any
  came: Any
  entered: Any


class BoundsInputs(NamedTuple):
  """Arrays of the kernel query_bounds."""

  tiles: Tiles
  window_start: Any


def selection_lists(
  expiry: jax.Array, order: jax.Array, *, k: int, window: int, chunk: int
) -> Lists:
  """Makes the same as `tiles.selection_lists`, of [B, G, n] arrays."""
  batch, groups, n = expiry.shape
  rows = batch * groups
  lists = _lists(expiry.reshape(rows, n), order.reshape(rows, n), k, window, chunk)
  return jax.tree.map(lambda x: x.reshape(batch, groups, *x.shape[1:]), lists)


def _lists(expiry, order, k, window, chunk):
  rows, n = expiry.shape
  chunks, slots = n // chunk, list_slots(k, chunk)
  segment = max(SEGMENT, 1 << (-(-n // SEGMENTS) - 1).bit_length())
  sizes = Sizes(rows, n, window, chunk, chunks, slots, segment, -(-n // segment))

  ranked, members = _count_members(sizes, expiry, order)
  by_chunk = jnp.cumsum(members.reshape(rows, chunks + 1, sizes.segments), axis=1)[:, :chunks]
  counts = jnp.concatenate([by_chunk, jnp.sum(by_chunk, axis=1, keepdims=True)], axis=1)
  ends = jnp.cumsum(counts, axis=2)
  old, begins = ends[:, :chunks, -1], (ends - counts).reshape(rows, -1)
  lists = Places(_zeros(sizes, sizes.places), _zeros(sizes, sizes.places))
  old_places = _list_old(sizes, k, OldInputs(ranked, begins, ends), lists)

  # Tokens selected at later queries of a chunk are listed by entry, which is their order already.
  token = jnp.arange(n, dtype=jnp.int32)
  entry = token + window
  # by query i: number of selected tokens with entry <= i
  came = jnp.cumsum(expiry > entry, axis=1, dtype=jnp.int32)
  came = jnp.pad(came, ((0, 0), (window, 0)))[:, :n]
  entered = jnp.repeat(old - came[:, ::chunk], chunk, axis=1) + came
  listed = _zeros(sizes, n)
  new_place = _list_new(sizes, NewInputs(expiry, came, entered), lists, listed)

  tokens, lasts = (x.reshape(rows, chunks, slots) for x in contents(*lists))
  old_count = jnp.where(expiry > entry, jnp.maximum(-(-expiry // chunk) - -(-entry // chunk), 0), 0)
  return Lists(
    tokens,
    jnp.where(lasts > 0, tokens + window, NEVER),
    lasts,
    entered,
    old,
    new_place,
    old_places.old_place,
    old_places.old_begin,
    old_count,
    contents(listed)[0],
    came[:, -1],
  )


def _zeros(sizes, *shape):
  """Returns a reference to zeros that kernels write in place."""
  return jax.new_ref(jnp.zeros((sizes.rows, *shape), jnp.int32))


def _shape(sizes, *shape):
  return jax.ShapeDtypeStruct((sizes.rows, *shape), jnp.int32)


def _count_members(sizes, expiry, order):
  """Returns each rank's (token, chunks [begin, end) where it is old, last query), and for each
  chunk and segment how many ranks become old there less how many cease to be old.
  """
  chunk, n = sizes.chunk, sizes.n
  members = _zeros(sizes, (sizes.chunks + 1) * sizes.segments)

  def body(row, _, rank, expiry, order, members, ranked):
    token = reader(order, row)(rank)
    last, entry = reader(expiry, row)(token), token + sizes.window
    begin = (entry + (chunk - 1)) // chunk
    # old in chunks [begin, end)
    end = jnp.where(last > entry, jnp.maximum((last + (chunk - 1)) // chunk, begin), begin)
    scatter_row(ranked.at[row], rank, (token, begin, end, last), rank < n)
    for c, change in ((begin, 1), (end, -1)):
      scatter(
        members.at[row],
        c * sizes.segments + rank // sizes.segment,
        rank - rank + change,
        (rank < n) & (begin < end),
        atomic="add",
      )

  run = kernel(body, sizes.rows, n, name="count_members", out_type=[_shape(sizes, n, 4)])
  (ranked,) = run(expiry, order, members)
  return ranked, contents(members)[0]


def _list_old(sizes, k, inputs, lists):
  """Writes the part of each segment in each list; returns the places of each token."""
  n, chunks, segments = sizes.n, sizes.chunks, sizes.segments

  def body(row, _, lane, inputs, lists, outputs):
    first = block_of(sizes.rows) * LANES
    least, most = first // chunks, jnp.minimum((first + (LANES - 1)) // chunks, segments - 1)

    # No token of most segments is old anywhere.
    @pl.when(inputs.ends[row, chunks, most] > inputs.begins[row, chunks * segments + least])
    def _write():
      segment = lane // chunks
      c = lane - segment * chunks
      begin_of = reader(inputs.begins, row)
      place = c * sizes.slots + begin_of(c * segments + segment)
      copy = begin_of(chunks * segments + segment)

      def write(i, state):
        place, copy = state
        ranks = [segment * sizes.segment + (i * AT_ONCE + j) for j in range(AT_ONCE)]
        loaded = [reader(inputs.ranked, row)(rank) for rank in ranks]
        for rank, (token, begin, end, last) in zip(ranks, loaded):
          inside = rank < n
          here = (begin <= c) & (c < end) & inside
          scatter(lists.token.at[row], place, token, here)
          scatter(lists.last.at[row], place, last, here)
          scatter(outputs.old_place.at[row], copy + (c - begin), place, here)
          scatter(outputs.old_begin.at[row], token, copy, (begin < end) & (c == 0) & inside)
          place, copy = place + here.astype(jnp.int32), copy + jnp.where(inside, end - begin, 0)
        return place, copy

      lax.fori_loop(0, sizes.segment // AT_ONCE, write, (place, copy))

  out = OldOutputs(_shape(sizes, k * chunks), _shape(sizes, n))
  run = kernel(body, sizes.rows, chunks * segments, name="list_old", out_type=[out])
  (outputs,) = run(inputs, lists)
  return outputs


def _list_new(sizes, inputs, lists, listed):
  """Writes the tokens that are selected first at a later query of a chunk into its list, and all
  selected tokens into `listed`; returns the places of the former.
  """
  n, chunk = sizes.n, sizes.chunk

  def body(row, _, token, inputs, lists, listed, new_place):
    last, entry = reader(inputs.expiry, row)(token), token + sizes.window
    c = entry // chunk
    selected = (last > entry) & (token < n)
    scatter(listed.at[row], reader(inputs.came, row)(entry) - 1, token, selected)
    is_new = selected & (entry != c * chunk)
    place = c * sizes.slots + reader(inputs.entered, row)(entry) - 1
    place = jnp.where(is_new, place, sizes.places)
    scatter(lists.token.at[row], place, token, is_new)
    scatter(lists.last.at[row], place, last, is_new)
    scatter(new_place.at[row], token, place, token < n)

  run = kernel(body, sizes.rows, n, name="list_new", out_type=[_shape(sizes, n)])
  (new_place,) = run(inputs, lists, listed)
  return new_place


def query_bounds(
  tiles: Tiles, window_start: jax.Array, *, chunk: int, block_q: int, block_kv: int
) -> jax.Array:
  """Returns the same as `tiles.query_bounds`: a lane for a block of queries."""
  batch, groups, chunks, smallest = tiles.last_max.shape
  blocks, times = chunks * chunk // block_q, block_kv // TILE
  flat = Tiles(*(x.reshape(batch * groups, chunks * smallest) for x in tiles))

  def body(row, _, block, inputs, bounds):
    begin = block * block_q
    first = begin // chunk * smallest

    def read(t):
      parts = [
        [reader(ref, row)(first + t * times + i) for i in range(times)] for ref in inputs.tiles
      ]
      joins = (jnp.minimum, jnp.maximum) * 2
      return Tiles(*(functools.reduce(f, values) for f, values in zip(joins, parts)))

    in_list = query_tiles(read, begin, block_q, smallest // times)
    start_of = reader(inputs.window_start, row // groups)
    in_window = near_tiles(start_of, block, block_q, block_kv)
    for i, t in enumerate((*in_list, *in_window)):
      scatter(bounds.at[row], block * 6 + i, t, block < blocks)

  out = jax.ShapeDtypeStruct((batch * groups, blocks * 6), jnp.int32)
  run = kernel(body, batch * groups, blocks, name="query_bounds", out_type=[out])
  (bounds,) = run(BoundsInputs(flat, window_start))
  return bounds.reshape(batch, groups, blocks, 6)
