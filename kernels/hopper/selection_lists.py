"""Lists of selected tokens and bounds of tiles on GPUs (see tiles.py), in Pallas Mosaic kernels of
single threads.

Tokens come by rank (order), so those of a list that are live at its chunk's first query come by
increasing last query. A segment of ranks counts its members of every chunk; sums over the segments
before tell where in each list a segment begins, and one thread for a segment and chunk writes its
part of the list.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparsek.kernels.hopper.thread_ops import (
  LANES,
  block_of,
  contents,
  kernel,
  reader,
  scatter,
  scatter_row,
)
from sparsek.kernels.sentinels import NEVER
from sparsek.kernels.tiles import TILE, Lists, Tiles, list_slots, near_tiles, query_tiles

# ranks that are counted together, at least; and segments, at most, so that memory stays linear
SEGMENT, SEGMENTS = (128, 1024)
AT_ONCE = 8  # loads that a thread has under way


def selection_lists(expiry, order, *, k, window, chunk):
  """As `tiles.selection_lists`, of [B, G, n] arrays."""
  batch, groups, n = expiry.shape
  rows = batch * groups
  lists = _lists(expiry.reshape(rows, n), order.reshape(rows, n), k, window, chunk)
  return jax.tree.map(lambda x: x.reshape(batch, groups, *x.shape[1:]), lists)


def _lists(expiry, order, k, window, chunk):
  rows, n = expiry.shape
  chunks, slots = n // chunk, list_slots(k, chunk)
  segment_size = max(SEGMENT, 1 << (-(-n // SEGMENTS) - 1).bit_length())
  segments, places = -(-n // segment_size), chunks * slots
  zeros = lambda *shape: jax.new_ref(jnp.zeros((rows, *shape), jnp.int32))
  shape = lambda *shape: jax.ShapeDtypeStruct((rows, *shape), jnp.int32)

  members = zeros((chunks + 1) * segments)

  def count(row, _, rank, expiry, order, members, ranked):
    token = reader(order, row)(rank)
    last, entry = reader(expiry, row)(token), token + window
    begin = (entry + (chunk - 1)) // chunk
    # listed as old in chunks [begin, end)
    end = jnp.where(last > entry, jnp.maximum((last + (chunk - 1)) // chunk, begin), begin)
    scatter_row(ranked.at[row], rank, (token, begin, end, last), rank < n)
    for c, change in ((begin, 1), (end, -1)):
      scatter(
        members.at[row],
        c * segments + rank // segment_size,
        rank - rank + change,
        (rank < n) & (begin < end),
        atomic="add",
      )

  (ranked,) = kernel(count, rows, n, name="count_members", out_type=[shape(n, 4)])(
    expiry, order, members
  )

  by_chunk = jnp.cumsum(contents(members)[0].reshape(rows, chunks + 1, segments), axis=1)[
    :, :chunks
  ]
  counts = jnp.concatenate([by_chunk, jnp.sum(by_chunk, axis=1, keepdims=True)], axis=1)
  ends = jnp.cumsum(counts, axis=2)
  old, begins = ends[:, :chunks, -1], (ends - counts).reshape(rows, -1)
  tokens, lasts = zeros(places), zeros(places)

  def list_old(row, _, lane, ranked, begins, ends, tokens, lasts, old_place, old_begin):
    first = block_of(rows) * LANES
    least, most = first // chunks, jnp.minimum((first + (LANES - 1)) // chunks, segments - 1)

    @pl.when(
      ends[row, chunks, most] > begins[row, chunks * segments + least]
    )  # of most segments no token is old anywhere
    def _():
      segment = lane // chunks
      c = lane - segment * chunks
      own = reader(begins, row)
      place, copy = c * slots + own(c * segments + segment), own(chunks * segments + segment)

      def go(i, state):
        place, copy = state
        ranks = [segment * segment_size + (i * AT_ONCE + j) for j in range(AT_ONCE)]
        for rank, (token, begin, end, last) in zip(
          ranks, [reader(ranked, row)(rank) for rank in ranks]
        ):
          inside = rank < n
          here = (begin <= c) & (c < end) & inside
          scatter(tokens.at[row], place, token, here)
          scatter(lasts.at[row], place, last, here)
          scatter(old_place.at[row], copy + (c - begin), place, here)
          scatter(old_begin.at[row], token, copy, (begin < end) & (c == 0) & inside)
          place, copy = place + here.astype(jnp.int32), copy + jnp.where(inside, end - begin, 0)
        return place, copy

      lax.fori_loop(0, segment_size // AT_ONCE, go, (place, copy))

  old_place, old_begin = kernel(
    list_old, rows, chunks * segments, name="list_old", out_type=[shape(k * chunks), shape(n)]
  )(ranked, begins, ends, tokens, lasts)

  # Tokens selected at a later query of a chunk are in their own order already.
  token = jnp.arange(n, dtype=jnp.int32)
  entry = token + window
  # with entry <= i
  came = jnp.pad(jnp.cumsum(expiry > entry, axis=1, dtype=jnp.int32), ((0, 0), (window, 0)))[:, :n]
  entered = jnp.repeat(old - came[:, ::chunk], chunk, axis=1) + came

  def list_new(row, _, token, expiry, came, entered, tokens, lasts, listed, new_place):
    last, entry = reader(expiry, row)(token), token + window
    c = entry // chunk
    selected = (last > entry) & (token < n)
    scatter(listed.at[row], reader(came, row)(entry) - 1, token, selected)
    there = selected & (entry != c * chunk)
    place = jnp.where(there, c * slots + reader(entered, row)(entry) - 1, places)
    scatter(tokens.at[row], place, token, there)
    scatter(lasts.at[row], place, last, there)
    scatter(new_place.at[row], token, place, token < n)

  listed = zeros(n)
  (new_place,) = kernel(list_new, rows, n, name="list_new", out_type=[shape(n)])(
    expiry, came, entered, tokens, lasts, listed
  )

  tokens, lasts = (x.reshape(rows, chunks, slots) for x in contents(tokens, lasts))
  old_count = jnp.where(expiry > entry, jnp.maximum(-(-expiry // chunk) - -(-entry // chunk), 0), 0)
  return Lists(
    tokens,
    jnp.where(lasts > 0, tokens + window, NEVER),
    lasts,
    entered,
    old,
    new_place,
    old_place,
    old_begin,
    old_count,
    contents(listed)[0],
    came[:, -1],
  )


def query_bounds(tiles, left, *, chunk, block_q, block_kv):
  """As `tiles.query_bounds`."""
  batch, groups, chunks, smallest = tiles.last_max.shape
  blocks, times = chunks * chunk // block_q, block_kv // TILE
  flat = [x.reshape(batch * groups, chunks * smallest) for x in tiles]

  def body(row, _, block, *refs):
    *tiles, left, bounds = refs
    begin = block * block_q
    first = begin // chunk * smallest

    def read(t):
      of = [[reader(ref, row)(first + t * times + i) for i in range(times)] for ref in tiles]
      return Tiles(
        *(functools.reduce(f, values) for f, values in zip((jnp.minimum, jnp.maximum) * 2, of))
      )

    found = query_tiles(read, begin, block_q, smallest // times)
    for i, t in enumerate(
      (*found, *near_tiles(reader(left, row // groups), block, block_q, block_kv))
    ):
      scatter(bounds.at[row], block * 6 + i, t, block < blocks)

  out = jax.ShapeDtypeStruct((batch * groups, blocks * 6), jnp.int32)
  (bounds,) = kernel(body, batch * groups, blocks, name="query_bounds", out_type=[out])(*flat, left)
  return bounds.reshape(batch, groups, blocks, 6)
