"""Lists of selected tokens and bounds of tiles on GPUs (see tiles.py), in Pallas Mosaic kernels of
single threads.

Tokens are taken by rank (`order`), so those of a list that are live at its chunk's first query (the
*old* ones) come by increasing last query. Ranks and tokens are cut into segments, and counted by
*line*: for each chunk the ranks that are old there; the places that old tokens take in all chunks;
and the tokens that are ever selected.

  kernel         a program for  reads                        writes
  count_members  segment        order, expiry                ranked; counts of each line; came,
                                                             old_count
  add_counts     line           counts                       begins: sums over earlier segments;
                                                             old, number: sums over all
  write_lists    segment        ranked, begins               the part of the segment in each list
                 segment        expiry, came, begins, old    tokens that are listed later than at a
                                                             chunk's first query; entered, listed
                 LANES places   came, begins, old            empty slots
  bound_tiles    chunk          first, last; window_start    the lifetimes of the list's tiles; the
                                                             tiles that each block of queries visits

Kernels follow each other on the stream. In the first three the lanes of a program add by shuffles
and in shared memory.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.hopper.thread_ops import (
  block_of,
  gather,
  gather_bytes,
  kernel,
  reader,
  scatter,
  scatter_row,
)
from sparsek.kernels.hopper.thread_registers import LANES, shuffle_xor, warp_any
from sparsek.kernels.hopper.thread_sums import WARPS, clear, prefix_sums
from sparsek.kernels.hopper.thread_sync import sync_threads
from sparsek.kernels.sentinels import NEVER
from sparsek.kernels.tiles import TILE, Lists, Tiles, list_slots, near_tiles, query_tiles

# the fewest ranks of a segment, a multiple of LANES, and the most segments, so that memory stays
# linear
SEGMENT, SEGMENTS = 128, 1024
_JOINS = (jnp.minimum, jnp.maximum) * 2  # of the lifetimes of tokens to those of tiles


class Sizes(NamedTuple):
  """Sizes of the lists of all rows."""

  rows: int
  n: int
  k: int
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

  @property
  def lines(self) -> int:
    """The number of lines that are counted."""
    return self.chunks + 2


class Counted(NamedTuple):
  """Results of the kernel count_members.

  Attributes:
    ranked: [rows, n, 4]: token, chunks [begin, end) where it is old, and its last query, by rank.
    counts: [rows, lines * segments].
    came: [rows, n], how many tokens up to this one, of its segment, are ever selected.
    old_count: see tiles.Lists.
  """

  ranked: Any
  counts: Any
  came: Any
  old_count: Any


class Added(NamedTuple):
  """Results of the kernel add_counts: [rows, lines * segments]; and see tiles.Lists."""

  begins: Any
  old: Any
  number: Any


class ListInputs(NamedTuple):
  """Arrays of the kernel write_lists."""

  expiry: Any
  ranked: Any
  came: Any
  begins: Any
  old: Any
  number: Any


class Written(NamedTuple):
  """Results of the kernel write_lists, see tiles.Lists; lists are [rows, places]."""

  token: Any
  first: Any
  last: Any
  entered: Any
  new_place: Any
  old_place: Any
  old_begin: Any
  listed: Any


class BoundsInputs(NamedTuple):
  """Arrays of the kernel bound_tiles."""

  first: Any
  last: Any
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
  sizes = Sizes(rows, n, k, window, chunk, chunks, slots, segment, -(-n // segment))
  counted = _count_members(sizes, expiry, order)
  added = _add_counts(sizes, counted.counts)
  written = _write_lists(sizes, ListInputs(expiry, counted.ranked, counted.came, *added))
  tokens, first, last = (
    x.reshape(rows, chunks, slots) for x in (written.token, written.first, written.last)
  )
  return Lists(
    tokens,
    first,
    last,
    written.entered,
    added.old,
    written.new_place,
    written.old_place,
    written.old_begin,
    counted.old_count,
    written.listed,
    added.number.reshape(rows),
  )


def _shape(sizes, *shape):
  return jax.ShapeDtypeStruct((sizes.rows, *shape), jnp.int32)


def _shared(size):
  return plgpu.SMEM((size,), jnp.int32)


def _own(sizes, lane):
  """Returns the number of the program in its row, and that of the lane in the program."""
  program = block_of(sizes.rows)
  return program, lane - program * LANES


def _count_members(sizes, expiry, order):
  """Finds the chunks where each rank is old, and counts the segments' tokens of each line."""
  chunk, chunks, n = sizes.chunk, sizes.chunks, sizes.n

  def body(row, _, lane, expiry, order, outputs, changes, totals):
    segment, own = _own(sizes, lane)
    last_of = reader(expiry, row)
    clear(changes, own)
    sync_threads()

    def lifetime(token, last):
      """Returns the chunks [begin, end) in which a token is old, maybe none."""
      entry = token + sizes.window
      begin = (entry + (chunk - 1)) // chunk
      return begin, jnp.where(
        last > entry, jnp.maximum((last + (chunk - 1)) // chunk, begin), begin
      )

    def count(i, selected):
      rank = segment * sizes.segment + i * LANES + own
      token, inside = reader(order, row)(rank), rank < n
      own_last, last = last_of(rank), last_of(token)
      begin, end = lifetime(token, last)
      scatter_row(outputs.ranked.at[row], rank, (token, begin, end, last), inside)
      is_old = inside & (begin < end)
      for line, change in ((begin, 1), (end, -1), (own - own + (chunks + 1), end - begin)):
        scatter(changes, line, change, is_old, atomic="add")
      # from here on the rank stands for the token of the same number
      begin, end = lifetime(rank, own_last)
      scatter(outputs.old_count.at[row], rank, end - begin, inside)
      new = ((own_last > rank + sizes.window) & inside).astype(jnp.int32)
      came, total = prefix_sums(new, own, totals)
      scatter(outputs.came.at[row], rank, selected + came, inside)
      return selected + total

    selected = lax.fori_loop(0, sizes.segment // LANES, count, own - own)

    def write(line, value, where):
      scatter(outputs.counts.at[row], line * sizes.segments + segment, value, where)

    def add(i, earlier):
      line = i * LANES + own
      sums, total = prefix_sums(
        jnp.where(line < chunks, gather(changes, jnp.minimum(line, chunks)), 0), own, totals
      )
      write(line, earlier + sums, line < chunks)
      return earlier + total

    lax.fori_loop(0, -(-chunks // LANES), add, own - own)
    first = own == 0
    write(own - own + chunks, gather(changes, own - own + (chunks + 1)), first)
    write(own - own + (chunks + 1), selected, first)

  out = Counted(
    _shape(sizes, n, 4), _shape(sizes, sizes.lines * sizes.segments), *[_shape(sizes, n)] * 2
  )
  run = kernel(
    body,
    sizes.rows,
    sizes.segments * LANES,
    name="count_members",
    out_type=[out],
    scratch_types=[_shared(sizes.lines), _shared(WARPS)],
  )
  (counted,) = run(expiry, order)
  return counted


def _add_counts(sizes, counts):
  """Adds up the counts of each line, segment after segment."""
  chunks, segments = sizes.chunks, sizes.segments

  def body(row, _, lane, counts, outputs, totals):
    line, own = _own(sizes, lane)

    def add(i, earlier):
      segment = i * LANES + own
      inside = segment < segments
      index = line * segments + jnp.minimum(segment, segments - 1)
      count = jnp.where(inside, gather(counts.at[row], index), 0)
      sums, total = prefix_sums(count, own, totals)
      scatter(outputs.begins.at[row], index, earlier + sums - count, inside)
      return earlier + total

    total = lax.fori_loop(0, -(-segments // LANES), add, own - own)
    zero = own - own
    scatter(outputs.old.at[row], zero + line, total, (own == 0) & (line < chunks))
    scatter(outputs.number.at[row], zero, total, (own == 0) & (line == chunks + 1))

  out = Added(_shape(sizes, sizes.lines * segments), _shape(sizes, chunks), _shape(sizes, 1))
  run = kernel(
    body,
    sizes.rows,
    sizes.lines * LANES,
    name="add_counts",
    out_type=[out],
    scratch_types=[_shared(WARPS)],
  )
  (added,) = run(counts)
  return added


def _write_lists(sizes, inputs):
  """Writes the lists and what else is known of their places."""
  segments = sizes.segments

  def body(row, _, lane, inputs, outputs, filled, totals):
    program, own = _own(sizes, lane)

    @pl.when(program < segments)
    def _old():
      _list_old(sizes, row, program, own, inputs, outputs, filled, totals)

    @pl.when((program >= segments) & (program < 2 * segments))
    def _new():
      @pl.loop(0, sizes.segment // LANES)
      def _(i):
        _list_new(
          sizes, row, (program - segments) * sizes.segment + i * LANES + own, inputs, outputs
        )

    @pl.when(program >= 2 * segments)
    def _empty():
      _clear_slots(sizes, row, (program - 2 * segments) * LANES + own, inputs, outputs)

  of_place, of_token = _shape(sizes, sizes.places), _shape(sizes, sizes.n)
  out = Written(
    token=of_place,
    first=of_place,
    last=of_place,
    entered=of_token,
    new_place=of_token,
    old_place=_shape(sizes, sizes.k * sizes.chunks),
    old_begin=of_token,
    listed=of_token,
  )
  run = kernel(
    body,
    sizes.rows,
    2 * segments * LANES + sizes.places,
    name="write_lists",
    out_type=[out],
    scratch_types=[_shared(sizes.chunks), _shared(WARPS)],
  )
  (written,) = run(inputs)
  return written


def _write_slot(outputs, row, place, values, where):
  """Writes a token, its first and its last query."""
  for ref, value in zip((outputs.token, outputs.first, outputs.last), values):
    scatter(ref.at[row], place, value, where)


def _list_old(sizes, row, segment, own, inputs, outputs, filled, totals):
  """Writes the part of a segment of ranks in each list."""
  chunks, zero = sizes.chunks, own - own
  begin_of = reader(inputs.begins, row)

  @pl.loop(0, -(-chunks // LANES))
  def _load(i):
    c = i * LANES + own
    scatter(filled, jnp.minimum(c, chunks - 1), begin_of(c * sizes.segments + segment), c < chunks)

  sync_threads()

  def list_ranks(i, copies):
    rank = segment * sizes.segment + i * LANES + own
    token, begin, end, last = reader(inputs.ranked, row)(rank)
    is_old = (rank < sizes.n) & (begin < end)
    count = is_old.astype(jnp.int32) * (end - begin)
    sums, total = prefix_sums(count, own, totals)
    copy = copies + sums - count
    scatter(outputs.old_begin.at[row], token, copy, is_old)

    def list_chunk(c, nothing):
      here = is_old & (begin <= c) & (c < end)
      sums, count = prefix_sums(here.astype(jnp.int32), own, totals)
      slot = gather(filled, zero + c)
      sync_threads()
      scatter(filled, zero + c, slot + count, own == 0)
      place = slot + sums + (c * sizes.slots - 1)
      _write_slot(outputs, row, place, (token, token + sizes.window, last), here)
      scatter(outputs.old_place.at[row], copy + (c - begin), place, here)
      return nothing

    first = jnp.min(jnp.where(is_old, begin, chunks))
    lax.fori_loop(first, jnp.max(jnp.where(is_old, end, 0)), list_chunk, 0)
    return copies + total

  copies = begin_of(zero + (chunks * sizes.segments + segment))
  lax.fori_loop(0, sizes.segment // LANES, list_ranks, copies)


def _came_by(sizes, row, inputs):
  """Returns a function of a query: how many tokens that are ever selected enter up to it."""
  begin_of, came_of = reader(inputs.begins, row), reader(inputs.came, row)

  def came(query):
    token = query - sizes.window
    earlier = begin_of((sizes.chunks + 1) * sizes.segments + jnp.maximum(token, 0) // sizes.segment)
    return jnp.where(token >= 0, earlier + came_of(token), 0)

  return came


def _list_new(sizes, row, token, inputs, outputs):
  """Writes a token into the list of the chunk where it is selected first, if it is not old there,
  and into `listed`; and how much of its list a query of the same number has.
  """
  n, chunk = sizes.n, sizes.chunk
  came, old = _came_by(sizes, row, inputs), reader(inputs.old, row)

  def entered(query):
    c = query // chunk
    return old(c) + came(query) - came(c * chunk)

  inside = token < n
  scatter(outputs.entered.at[row], token, entered(token), inside)
  last, entry = reader(inputs.expiry, row)(token), token + sizes.window
  selected = (last > entry) & inside
  scatter(outputs.listed.at[row], came(entry) - 1, token, selected)
  number = reader(inputs.number, row)(token - token)
  scatter(outputs.listed.at[row], token, 0, inside & (token >= number))
  c = entry // chunk
  is_new = selected & (entry != c * chunk)
  place = jnp.where(is_new, c * sizes.slots + entered(entry) - 1, sizes.places)
  _write_slot(outputs, row, place, (token, entry, last), is_new)
  scatter(outputs.new_place.at[row], token, place, inside)


def _clear_slots(sizes, row, place, inputs, outputs):
  """Writes the slots of a list that hold no token."""
  came, old = _came_by(sizes, row, inputs), reader(inputs.old, row)
  c = place // sizes.slots
  first = c * sizes.chunk
  used = old(c) + came(first + (sizes.chunk - 1)) - came(first)
  empty = (place < sizes.places) & (place - c * sizes.slots >= used)
  zero = place - place
  _write_slot(outputs, row, place, (zero, zero + NEVER, zero), empty)


def bound_tiles(
  lists: Lists, window_start: jax.Array, *, chunk: int, blocks: Sequence[tuple[int, int]]
) -> tuple[Tiles, list[jax.Array]]:
  """Returns the same as `tiles.list_tiles`, and `tiles.query_bounds` for each (block_q, block_kv)
  in `blocks`.
  """
  batch, groups, chunks, slots = lists.token.shape
  rows, smallest, lanes = batch * groups, slots // TILE, TILE // 4  # that read a tile

  def body(row, _, lane, inputs, tiles, bounds):
    c = block_of(rows)
    own = lane - c * LANES

    @pl.loop(0, -(-smallest * lanes // LANES))
    def _tiles(i):
      t = i * (LANES // lanes) + own // lanes
      place = (c * smallest + jnp.minimum(t, smallest - 1)) * TILE + own % lanes * 4
      words = [gather_bytes(ref.at[row], place, 0, 1) for ref in (inputs.first, inputs.last)]
      for ref, part, join in zip(tiles, (words[0], words[0], *words[1:] * 2), _JOINS):
        value = functools.reduce(join, part)
        for distance in (lanes >> (j + 1) for j in range(lanes.bit_length() - 1)):
          value = join(value, shuffle_xor(value, distance))
        scatter(ref.at[row], c * smallest + t, value, (t < smallest) & (own % lanes == 0))

    sync_threads()  # what lanes have written can be read
    start_of = reader(inputs.window_start, row // groups)

    def bound(ref, sizes, inside, index):
      """Finds the tiles of the block of that index in the chunk, in the lanes `inside`."""
      block_q, block_kv = sizes
      number, times = chunk // block_q, block_kv // TILE
      block = c * number + index

      def read(t):
        at = [c * smallest + t * times + j for j in range(times)]
        parts = [map(reader(tile, row), at) for tile in tiles]
        return Tiles(*(functools.reduce(join, x) for join, x in zip(_JOINS, parts)))

      in_list = query_tiles(read, block * block_q, block_q, smallest // times)
      in_window = near_tiles(start_of, block, block_q, block_kv)
      for j, t in enumerate((*in_list, *in_window)):
        scatter(ref.at[row], block * 6 + j, t, inside & (index < number))

    share = LANES // len(blocks)  # lanes for blocks of one size: whole warps
    for i, (ref, sizes) in enumerate(zip(bounds, blocks)):
      inside = own // share == i

      @pl.when(warp_any(inside))
      def _bounds(ref=ref, sizes=sizes, inside=inside):
        @pl.loop(0, -(-chunk // (sizes[0] * share)))
        def _(j):
          bound(ref, sizes, inside, j * share + own % share)

  shape: Any = lambda size: jax.ShapeDtypeStruct((rows, size), jnp.int32)
  sizes = [chunks * chunk // block_q for block_q, _ in blocks]
  out = [Tiles(*[shape(chunks * smallest)] * 4), tuple(shape(size * 6) for size in sizes)]
  run = kernel(body, rows, chunks * LANES, name="bound_tiles", out_type=out)
  first, last = (x.reshape(rows, -1) for x in (lists.first, lists.last))
  tiles, bounds = run(BoundsInputs(first, last, window_start))
  return (
    Tiles(*(x.reshape(batch, groups, chunks, smallest) for x in tiles)),
    [x.reshape(batch, groups, size, 6) for x, size in zip(bounds, sizes)],
  )
