"""The events by position, the sums at the corners of the tiles that a staircase crosses, and where
it is, on GPUs: see staircase.py, whose kernel walk reads them.

  kernel       a program for     reads            writes
  sum_columns  column of tiles   ranks            events; corners: the sums of the column's events
                                                  that count at each row of tiles
  add_columns  WARPS rows of     corners, events  sums over this and later columns; columns: where
               tiles                              the staircases are

A column's upper events are those of neighbouring ranks, and its lower events are too: the kernel
sum_columns finds these, puts their events in order in shared memory, and writes whole lines of
global memory. The kernel add_columns has a warp for a row of tiles, and a lane for a column.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels import prefix_events
from sparsek.kernels.hopper.thread_ops import (
  block_of,
  gather,
  gather_row,
  kernel,
  reader,
  scatter,
  scatter_row,
)
from sparsek.kernels.hopper.thread_registers import LANES, warp_count, warp_prefix_sums, warp_value
from sparsek.kernels.hopper.thread_sums import WARP, WARPS, clear
from sparsek.kernels.hopper.thread_sync import sync_threads
from sparsek.kernels.prefix_events import Problem, Tiling
from sparsek.kernels.prefix_thresholds import COUNT, HIGH, LOW, NEEDS, SUMS, UPPER

SPAN = 512  # positions whose events are put in order together


def corner_sums(
  problem: Problem, tiling: Tiling, ranks: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns `WalkInputs.events`, `WalkInputs.sums` and `WalkInputs.columns` of staircase.py."""
  events, corners = _sum_columns(problem, tiling, ranks)
  return events, *_add_columns(problem, tiling, events, corners)


def log2(power: int) -> int:
  """Returns the exponent of a power of two."""
  return power.bit_length() - 1


def weights(high: jax.Array, low: jax.Array, is_lower: jax.Array) -> dict[int, jax.Array]:
  """Returns what an event of those digits adds to each sum; is_lower is 0 or 1."""
  sign = 1 - 2 * is_lower
  return {UPPER: 1 - is_lower, COUNT: sign, HIGH: sign * high, LOW: sign * low}


def _shape(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def _uppers_before(of_rank, n, positions, own):
  """Returns how many ranks have their upper event before each position, which is the same in all
  lanes: each lane of a warp looks at other ranks.
  """
  bits = WARP.bit_length() - 1  # that a round finds
  rounds = max(-(-(n - 1).bit_length() // bits), 1)

  def narrow(i, found):
    step = jnp.asarray(1 << (bits * (rounds - 1 - i)), jnp.int32)
    ends = [x + (own % WARP + 1) * step for x in found]
    uppers = [of_rank(end - 1)[0] for end in ends]
    return tuple(
      x + step * warp_count((end <= n) & (upper < position))
      for x, end, upper, position in zip(found, ends, uppers, positions)
    )

  return lax.fori_loop(0, rounds, narrow, (own - own,) * len(positions))


def _sum_columns(problem, tiling, ranks):
  """Returns the events by position, and [rows, blocks (blocks + 1), 4], by column and row of tiles:
  the sums of the column's events whose tokens entered before the row.
  """
  assert WARPS == SUMS  # a warp adds up a sum
  rows, n = ranks.shape[:2]
  block, blocks = tiling
  lines, span = blocks + 1, min(tiling.width, SPAN)
  times = -(-span // LANES)

  def body(row, _, lane, ranks, events, corners, sums, in_order):
    column = block_of(rows)
    own = lane - column * LANES
    of_rank = reader(ranks, row)
    clear(sums, own)

    @pl.loop(0, tiling.width // span)
    def _span(i):
      first = own - own + (column * tiling.width + i * span)
      begin, end = _uppers_before(of_rank, n, (first, first + span), own)
      uppers, size = end - begin, jnp.minimum(2 * n - first, span)
      items = [j * LANES + own for j in range(times)]
      is_lower = [item >= uppers for item in items]
      loaded = [
        of_rank(jnp.where(lower, first - begin - uppers, begin) + item)
        for item, lower in zip(items, is_lower)
      ]
      sync_threads()  # the events of the last span have been read
      for item, lower, (*positions, entry, bits) in zip(items, is_lower, loaded):
        choose = lambda a, b, lower=lower: jnp.where(lower, b, a)
        score = lax.bitcast_convert_type(bits, jnp.float32)
        event = list(map(choose, *prefix_events.event_rows(problem, score, entry)))
        offset, there = choose(*positions) - first, item < size
        for number, value in enumerate(event):
          scatter(in_order, number * span + offset, value, there)
        high, low, code, _ = event
        line = (code >> (1 + log2(block))) + 1
        for which, weight in weights(high, low, code & 1).items():
          scatter(sums, which * lines + line, weight, there & (line <= blocks), atomic="add")
      sync_threads()
      for item in items:
        event = [gather(in_order, jnp.minimum(item, span - 1) + k * span) for k in range(4)]
        scatter_row(events.at[row], first + item, event, item < size)

    sync_threads()
    first = own // WARP * lines

    def add(i, earlier):
      line = i * WARP + own % WARP
      value = gather(sums, first + jnp.minimum(line, blocks))
      total = earlier + warp_prefix_sums(jnp.where(line <= blocks, value, 0))
      scatter(sums, first + jnp.minimum(line, blocks), total, line <= blocks)
      return warp_value(total, WARP - 1)

    lax.fori_loop(0, -(-lines // WARP), add, own - own)
    sync_threads()

    @pl.loop(0, -(-lines // LANES))
    def _write(i):
      line = i * LANES + own
      values = [gather(sums, number * lines + jnp.minimum(line, blocks)) for number in range(SUMS)]
      scatter_row(corners.at[row], column * lines + line, values, line < lines)

  return kernel(
    body,
    rows,
    blocks * LANES,
    name="sum_columns",
    out_type=[_shape(rows, 2 * n, 4), _shape(rows, blocks * lines, 4)],
    scratch_types=[plgpu.SMEM((size,), jnp.int32) for size in (SUMS * lines, 4 * span)],
  )(ranks)


def _add_columns(problem, tiling, events, corners):
  """Returns the sums over this and all later columns, at each corner, and the columns where the
  staircases are.
  """
  rows, n, blocks = events.shape[0], problem.n, tiling.blocks
  lines = blocks + 1

  def body(row, _, lane, events, corners, sums, columns):
    line, inside, own = jnp.minimum(lane // WARP, blocks), lane // WARP <= blocks, lane % WARP
    zero = lane - lane
    scatter_row(sums.at[row], line * lines + blocks, (zero,) * SUMS, inside & (own == 0))

    def add(i, state):
      later, counts = state
      column = blocks - 1 - (i * WARP + own)
      there, position = column >= 0, column * tiling.width
      values = gather_row(corners.at[row], jnp.maximum(column, 0) * lines + line)
      event = reader(events, row)(position)
      total = tuple(x + warp_prefix_sums(jnp.where(there, y, 0)) for x, y in zip(later, values))
      scatter_row(sums.at[row], line * lines + column, total, inside & there)
      named = dict(enumerate(total))
      counts = tuple(
        count + (over(problem, named, event) & (position < 2 * n) & there).astype(jnp.int32)
        for count, over in zip(counts, NEEDS)
      )
      return tuple(warp_value(x, WARP - 1) for x in total), counts

    state = (zero,) * SUMS, (zero,) * len(NEEDS)
    _, counts = lax.fori_loop(0, -(-blocks // WARP), add, state)
    for number, count in enumerate(counts):
      scatter(columns.at[row, number], line, warp_prefix_sums(count), inside & (own == WARP - 1))

  out = [_shape(rows, lines**2, 4), _shape(rows, len(NEEDS), lines)]
  run = kernel(body, rows, lines * WARP, name="add_columns", out_type=out)
  return run(events, corners)
