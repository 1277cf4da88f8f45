"""The staircases of kernels/prefix_thresholds.py on GPUs: the tiles that they cross, and the walk
through them, in Pallas Mosaic kernels of single threads.

The plane is tiled twice. The tiles that a staircase crosses are tiled again, in shared memory, so
that walks are short; tiles that it does not cross cost nothing but the sums at their corners.

  kernel       a program for     a lane for       reads, writes
  sum_columns  column of tiles   event            events -> corners: the sums of the column's events
                                                  that count at each row of tiles
  add_columns  rows of tiles     row of tiles     corners, events -> sums over this and later
                                                  columns; columns: where the staircases are
  walk         tiles, search     event, token     sums, columns, events, tokens -> cuts; passed

A warp of the kernel walk takes a tile:

  events at the tile's positions, tokens that enter in it --> inner: sums at the corners of its
      tiles, as above: added by all lanes, then summed down columns and along rows
  a lane for an inner row   where the staircase is there --> found
  a lane for an inner tile  follows the staircase through it --> cuts, passed

`inner`, `found` and copies of the tile's events and tokens, unless it has too many, lie in shared
memory; the warp's lanes wait for each other between the steps.
The two searches are those of NEEDS: for the cuts of queries, and for the expiry of tokens.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels import prefix_thresholds
from sparsek.kernels.hopper.thread_ops import (
  block_of,
  gather,
  gather_row,
  kernel,
  reader,
  scatter,
  scatter_row,
)
from sparsek.kernels.hopper.thread_registers import LANES, warp_any
from sparsek.kernels.hopper.thread_sums import WARP, WARPS, clear
from sparsek.kernels.hopper.thread_sync import sync_threads, sync_warp
from sparsek.kernels.prefix_thresholds import COUNT, HIGH, LOW, NEEDS, UPPER, Problem, Tile, Tiling

INNER = 16  # inner tiles along either side of a tile; a lane for each that a staircase can cross
SIDE = INNER + 1  # their corners
COPIED = 512  # the most queries of a tile whose events and tokens are copied to shared memory
AT_ONCE = 16  # loads that a lane has in flight in prefix sums


class Events(NamedTuple):
  """Results of the kernel enter.

  Attributes:
    tokens: [rows, n, 4] by token: `Located.token`.
    events: [rows, 2 n, 4] by position: `Located.upper_event`, `Located.lower_event`.
    passed: [rows, 2 n] by position: the first query that passes it, n by default.
  """

  tokens: Any
  events: Any
  passed: Any


class WalkInputs(NamedTuple):
  """Arrays of the kernel walk.

  Attributes:
    sums: [rows, (blocks + 1)^2, 4] at the corners of tiles, by column and row.
    columns: [rows, searches, blocks + 1] by row: how many columns begin with a position that is
      over, at the last query before the row.
    the rest: see Events.
  """

  tokens: Any
  events: Any
  sums: Any
  columns: Any
  passed: Any


class Scratch(NamedTuple):
  """Shared memory of the kernel walk, a part of each array for each warp.

  Attributes:
    inner: the sums at the corners of inner tiles.
    found: the inner columns where the staircase is, by inner row.
    events, tokens: copies of those of the tile, an array for each column, or none.
  """

  inner: Any
  found: Any
  events: tuple
  tokens: tuple


def outer_tiling(problem: Problem) -> Tiling:
  """Returns the tiles that are tiled again."""
  block = 2 * problem.tiling.block
  return Tiling(block, -(-problem.n // block))


def find_cuts(problem: Problem, inputs: Events) -> jax.Array:
  """Returns the cut of each query, [rows, n, 4], as `prefix_thresholds.threshold` reads it; writes
  into `passed` the first query that passes each position.
  """
  tokens, events, passed = inputs
  tiling = outer_tiling(problem)
  corners = _sum_columns(problem, tiling, events)
  sums, columns = _add_columns(problem, tiling, events, corners)
  return _walk(problem, tiling, WalkInputs(tokens, events, sums, columns, passed))


def _shape(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def _log2(power):
  return power.bit_length() - 1


def _weights(high, low, is_lower):
  """Returns what an event of those digits adds to each sum; is_lower is 0 or 1."""
  sign = 1 - 2 * is_lower
  return {UPPER: 1 - is_lower, COUNT: sign, HIGH: sign * high, LOW: sign * low}


def _sum_columns(problem, tiling, events):
  """Returns [rows, blocks (blocks + 1), 4], by column and row of tiles: the sums of the column's
  events whose tokens entered before the row.
  """
  rows, n = events.shape[0], problem.n
  block, blocks = tiling
  lines = blocks + 1

  def body(row, _, lane, events, corners, sums):
    column = block_of(rows)
    own = lane - column * LANES
    clear(sums, own)
    sync_threads()

    @pl.loop(0, -(-tiling.width // LANES))
    def _add(i):
      offset = i * LANES + own
      position = column * tiling.width + offset
      high, low, code, _ = reader(events, row)(position)
      line = (code >> (1 + _log2(block))) + 1
      there = (offset < tiling.width) & (position < 2 * n) & (line <= blocks)
      for which, weight in _weights(high, low, code & 1).items():
        scatter(sums, which * lines + line, weight, there, atomic="add")

    sync_threads()
    which = jnp.minimum(own, prefix_thresholds.SUMS - 1)

    def add(i, total):
      steps = [i * AT_ONCE + j for j in range(AT_ONCE)]
      indices = [which * lines + jnp.minimum(step, blocks) for step in steps]
      loaded = [gather(sums, index) for index in indices]
      for step, index, value in zip(steps, indices, loaded):
        total += value
        scatter(sums, index, total, (own < prefix_thresholds.SUMS) & (step <= blocks))
      return total

    lax.fori_loop(0, -(-lines // AT_ONCE), add, own - own)
    sync_threads()

    @pl.loop(0, -(-lines // LANES))
    def _write(i):
      line = i * LANES + own
      values = [
        gather(sums, number * lines + jnp.minimum(line, blocks))
        for number in range(prefix_thresholds.SUMS)
      ]
      scatter_row(corners.at[row], column * lines + line, values, line < lines)

  (corners,) = kernel(
    body,
    rows,
    blocks * LANES,
    name="sum_columns",
    out_type=[_shape(rows, blocks * lines, 4)],
    scratch_types=[plgpu.SMEM((prefix_thresholds.SUMS * lines,), jnp.int32)],
  )(events)
  return corners


def _add_columns(problem, tiling, events, corners):
  """Returns the sums over this and all later columns, at each corner, and the columns where the
  staircases are, see WalkInputs.
  """
  rows, n, blocks = events.shape[0], problem.n, tiling.blocks
  lines = blocks + 1

  def body(row, _, lane, events, corners, sums, columns):
    line, inside = jnp.minimum(lane, blocks), lane <= blocks
    zero = lane - lane
    scatter_row(sums.at[row], blocks * lines + line, (zero,) * 4, inside)

    def add(i, state):
      total, counts = state
      steps = [zero + (blocks - 1 - (i * AT_ONCE + j)) for j in range(AT_ONCE)]
      loaded = [
        (
          gather_row(corners.at[row], jnp.maximum(column, 0) * lines + line),
          reader(events, row)(column * tiling.width),
        )
        for column in steps
      ]
      for column, (values, event) in zip(steps, loaded):
        there, position = column >= 0, column * tiling.width
        total = tuple(x + jnp.where(there, y, 0) for x, y in zip(total, values))
        scatter_row(sums.at[row], column * lines + line, total, inside & there)
        named = dict(enumerate(total))
        counts = tuple(
          count + (over(problem, named, event) & (position < 2 * n) & there).astype(jnp.int32)
          for count, over in zip(counts, NEEDS)
        )
      return total, counts

    state = (zero,) * prefix_thresholds.SUMS, (zero,) * len(NEEDS)
    _, counts = lax.fori_loop(0, -(-blocks // AT_ONCE), add, state)
    for number, count in enumerate(counts):
      scatter(columns.at[row, number], line, count, inside)

  out = [_shape(rows, lines**2, 4), _shape(rows, len(NEEDS), lines)]
  run = kernel(body, rows, lines, name="add_columns", out_type=out)
  return run(events, corners)


def _walk(problem, tiling, inputs):
  """Follows the staircase of each search through each tile."""
  rows, n = inputs.tokens.shape[:2]

  def body(row, which, lane, inputs, cuts, scratch):
    def record_cut(step):
      missing = prefix_thresholds.missing(problem, step.sums, step.event)
      values = step.position, *missing, step.sums[COUNT]
      scatter_row(cuts.at[row], step.query, values, step.cuts & (step.query < n))

    def record_pass(step):
      scatter(inputs.passed.at[row], step.position, step.query, step.passes)

    record = {prefix_thresholds.gates_over: record_cut, prefix_thresholds.number_over: record_pass}

    def walk_tile(number, over):
      columns = reader(inputs.columns, row, number)
      tile = prefix_thresholds.tile_of(tiling, columns, lane // WARP)

      @pl.when(warp_any(tile.first < tile.end))
      def _walk():
        read = prefix_thresholds.Read(
          token=reader(inputs.tokens, row), event=reader(inputs.events, row)
        )
        inner = Inner(problem, tiling, tile, lane % LANES, scratch, NEEDS[over], read)
        corner = (tile.column + 1) * (tiling.blocks + 1) + tile.row
        inner.add(reader(inputs.sums, row)(corner))
        inner.walk(over, record[over])

    for number, over in enumerate(NEEDS):
      pl.when(which == number)(functools.partial(walk_tile, number, over))

  copied = tiling.block <= COPIED
  shared = lambda size: plgpu.SMEM((WARPS * size,), jnp.int32)
  scratch = Scratch(
    shared(_INNER_SIZE),
    shared(SIDE),
    (shared(_events_size(tiling)),) * 3 if copied else (),
    (shared(tiling.block),) * 4 if copied else (),
  )
  (cuts,) = kernel(
    body,
    rows,
    tiling.cells * WARP,
    len(NEEDS),
    name="walk",
    out_type=[_shape(rows, n, 4)],
    scratch_types=[scratch],
  )(inputs)
  return cuts


# a multiple of the lanes of a warp
_INNER_SIZE = -(-max(map(len, NEEDS.values())) * SIDE**2 // WARP) * WARP


def _events_size(tiling):
  """Returns the size of the copy of a tile's events: the first one of the next tile is among them,
  and one number is left out after those of each inner tile, so that lanes use different banks.
  """
  return tiling.width + INNER + 1


class Inner(NamedTuple):
  """The tiles inside a tile, in a warp of the kernel walk.

  Attributes:
    problem, outer, tile: the tile, and the tiling that it is of.
    own: the lane's number in the program.
    scratch: shared memory.
    which: the sums that are needed; the others are not in shared memory.
    read: of tokens and events.
  """

  problem: Problem
  outer: Tiling
  tile: Tile
  own: jax.Array
  scratch: Scratch
  which: tuple[int, ...]
  read: prefix_thresholds.Read

  @property
  def tiling(self) -> Tiling:
    """The inner tiles."""
    return Tiling(self.outer.block // INNER, INNER)

  @property
  def lane(self) -> jax.Array:
    """The lane's number in its warp."""
    return self.own % WARP

  @property
  def bottom(self) -> jax.Array:
    """The first position."""
    return jnp.maximum(self.tile.bottom, 0)

  def _part(self, size):
    """Returns where the warp's part of an array begins."""
    return self.own // WARP * size

  def _corner(self, number, line, column):
    """Returns the index of the number-th sum at an inner corner."""
    return self._part(_INNER_SIZE) + ((number * SIDE + line) * SIDE + column)

  def _put(self, line, column, weights, there, atomic="add"):
    """Adds to the sums at an inner corner."""
    for number, which in enumerate(self.which):
      index = self._corner(number, line, column)
      scatter(self.scratch.inner, index, weights[which], there, atomic=atomic)

  def add(self, beyond: prefix_thresholds.Row) -> None:
    """Makes the sums at all inner corners; `beyond` are those at the tile's last position."""
    zero = self.own - self.own
    for i in range(_INNER_SIZE // WARP):
      index = self._part(_INNER_SIZE) + (self.lane + i * WARP)
      scatter(self.scratch.inner, index, 0, self.own >= 0)
    if self.scratch.events:
      self._copy_events()
    sync_warp()
    self._put(zero, zero + INNER, dict(enumerate(beyond)), self.lane == 0, atomic=None)
    self._add_events()
    self._add_tokens()
    sync_warp()
    self._sum_lines(lambda i, step: (step, i))
    self._sum_lines(lambda i, step: (i, INNER - step))

  def _copy_events(self):
    """Copies the events at the tile's positions, and the next one."""

    @pl.loop(0, -(-(self.outer.width + 1) // WARP))
    def _(i):
      offset = i * WARP + self.lane
      row = self.read.event(self.bottom + offset)
      for ref, value in zip(self.scratch.events, row):
        scatter(ref, self._event_index(offset), value, offset <= self.outer.width)

  def _add_events(self):
    """Adds the events of tokens that had entered before the tile's first query: a lane takes half
    of an inner column.
    """
    half, read = self.outer.width // WARP, self._copies()
    zero = self.own - self.own

    def add(i, sums):
      position = self.bottom + (self.lane * half + i)
      high, low, code, _ = read.event(position)
      counts = (position < 2 * self.problem.n) & ((code >> 1) <= self.tile.first)
      weights = _weights(high, low, code & 1)
      return tuple(
        total + jnp.where(counts, weights[which], 0) for total, which in zip(sums, self.which)
      )

    sums = lax.fori_loop(0, half, add, (zero,) * len(self.which))
    self._put(zero, self.lane // 2, dict(zip(self.which, sums)), self.own >= 0)

  def _add_tokens(self):
    """Adds the events of tokens that enter in the tile."""
    problem, block, inner = self.problem, self.outer.block, self.tiling
    zero = self.own - self.own

    @pl.loop(0, -(-block // WARP))
    def _(i):
      offset = i * WARP + self.lane
      token = prefix_thresholds.newcomer(problem, self.tile.first + 1 + offset)
      row = self.read.token(token)
      upper, lower, high, low = row
      for ref, value in zip(self.scratch.tokens, row):
        scatter(ref, self._part(block) + offset, value, offset < block)
      line = (offset >> _log2(inner.block)) + 1
      inside = (offset < block) & (token >= 0) & (token < problem.n) & (upper >= 0)
      for position, is_lower in ((upper, 0), (lower, 1)):
        if is_lower and self.which == (UPPER,):
          continue
        weights = _weights(high - is_lower * 2**problem.bits, low, zero + is_lower)
        column = jnp.minimum((position - self.bottom) >> _log2(inner.width), INNER)
        self._put(line, column, weights, inside & (position >= self.bottom))

  def _sum_lines(self, corner_of):
    """Makes prefix sums along all lines of corners: a lane for a line and sum."""
    lines = len(self.which) * SIDE
    for begin in range(0, lines, WARP):
      line = jnp.minimum(self.lane + begin, lines - 1)
      total, number = line - line, line // SIDE
      indices = [self._corner(number, *corner_of(line % SIDE, step)) for step in range(SIDE)]
      for index, value in zip(indices, [gather(self.scratch.inner, index) for index in indices]):
        total += value
        scatter(self.scratch.inner, index, total, self.lane + begin < lines)
    sync_warp()

  def _sums(self, line, column):
    """Returns the sums at an inner corner, in the order of `which`."""
    return [
      gather(self.scratch.inner, self._corner(number, line, column))
      for number in range(len(self.which))
    ]

  def _event_index(self, offset):
    """Returns where the copy of an event of the tile is."""
    offset = jnp.clip(offset, 0, self.outer.width)
    inner = offset >> _log2(self.tiling.width)
    return self._part(_events_size(self.outer)) + offset + inner

  def _copies(self):
    """Returns `read`, of the copies in shared memory if there are any."""
    events, tokens = self.scratch.events, self.scratch.tokens
    if not events:
      return self.read

    def event(position):
      index = self._event_index(position - self.bottom)
      return *(gather(ref, index) for ref in events), index - index

    def token(token):
      first = prefix_thresholds.newcomer(self.problem, self.tile.first + 1)
      index = self._part(self.outer.block) + jnp.clip(token - first, 0, self.outer.block - 1)
      return tuple(gather(ref, index) for ref in tokens)

    return prefix_thresholds.Read(event=event, token=token)

  def walk(self, over: prefix_thresholds.Over, record: Any) -> None:
    """Finds the inner tiles that the staircase crosses, and follows it through them."""
    problem, tiling, found, read = self.problem, self.tiling, self.scratch.found, self._copies()
    line = jnp.minimum(self.lane, INNER)

    def not_over(column):
      sums = dict(zip(self.which, self._sums(line, column)))
      position = self.bottom + column * tiling.width
      is_over = over(problem, sums, read.event(position)) & (position < 2 * problem.n)
      return prefix_thresholds.logical_not(is_over)

    (columns,) = prefix_thresholds.bisect(INNER, (line - line, line - line + INNER, not_over))
    found_at = self._part(SIDE)
    scatter(found, found_at + line, columns, self.lane <= INNER)
    sync_warp()

    inner = prefix_thresholds.tile_of(
      tiling, lambda line: gather(found, found_at + jnp.clip(line, 0, INNER)), self.lane
    )
    # A tile below all positions has inner tiles below all of them only, and others have none there.
    exists = (inner.bottom < 0).astype(jnp.int32) == (self.tile.bottom < 0).astype(jnp.int32)
    first = inner.first + (self.tile.first + 1)
    tile = inner._replace(
      first=first,
      end=jnp.where(exists, inner.end + (self.tile.first + 1), first),
      bottom=inner.bottom + self.bottom,
      top=inner.top + self.bottom,
    )
    sums = self._sums(inner.row, jnp.minimum(inner.column, INNER))
    state, step = prefix_thresholds.walk(problem, read, tile, over, self.which, sums)

    def walk_on(state):
      state, at = step(state, read)
      record(at)
      return state

    lax.while_loop(lambda state: warp_any(state[0] < tile.end), walk_on, state)
