"""The staircases of kernels/prefix_thresholds.py on GPUs: the tiles that they cross, and the walk
through them, in Pallas Mosaic kernels of single threads.

The plane is tiled twice. The tiles that a staircase crosses are tiled again, in shared memory, so
that walks are short; tiles that it does not cross cost nothing but the sums at their corners.

  kernel       a program for     a lane for       reads, writes
  sum_columns  column of tiles   event            events -> corners: the sums of the column's events
                                                  that count at each row of tiles
  add_columns  rows of tiles     row of tiles     corners, events -> sums over this and later
                                                  columns; columns: where the staircases are
  walk         tile, search      event, token     sums, columns, events, tokens -> cuts; passed

A program of the kernel walk:

  events at the tile's positions, tokens that enter in it --> inner: sums at the corners of its
      tiles, as above: added by all lanes, then summed down columns and along rows
  a lane for an inner row   where the staircase is there --> found
  a lane for an inner tile  follows the staircase through it --> cuts, passed

`inner` and `found` lie in shared memory; the program's lanes wait for each other between the steps.
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
  clear,
  gather,
  gather_row,
  kernel,
  reader,
  scatter,
  scatter_row,
)
from sparsek.kernels.hopper.thread_registers import LANES
from sparsek.kernels.hopper.thread_sync import sync_threads
from sparsek.kernels.prefix_thresholds import COUNT, HIGH, LOW, NEEDS, UPPER, Problem, Tile, Tiling

INNER = 32  # inner tiles along either side of a tile
SIDE = INNER + 1  # their corners
AT_ONCE = 11  # loads that a lane has in flight in prefix sums; divides SIDE
AHEAD = 4  # steps of a walk whose loads are in flight together


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
  """Shared memory of the kernel walk."""

  inner: Any
  found: Any


def outer_tiling(problem: Problem) -> Tiling:
  """Returns the tiles that are tiled again."""
  block = max(INNER, 4 * problem.tiling.block)
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


def _weights(problem, high, low, is_lower):
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
      for which, weight in _weights(problem, high, low, code & 1).items():
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


def _ahead(read, first):
  """Loads rows first to first + AHEAD - 1; returns a function like `read` that chooses one."""
  rows = [read(first + i) for i in range(AHEAD)]

  def near(index):
    result = rows[0]
    for i, row in enumerate(rows[1:], 1):
      result = tuple(jnp.where(index - first >= i, new, old) for new, old in zip(row, result))
    return result

  return near


def _walk(problem, tiling, inputs):
  """Follows the staircase of each search through each tile."""
  rows, n = inputs.tokens.shape[:2]

  def body(row, which, lane, inputs, cuts, scratch):
    cell = block_of(rows * len(NEEDS))
    own = lane - cell * LANES

    def record_cut(step):
      missing = prefix_thresholds.missing(problem, step.sums, step.event)
      values = step.position, *missing, step.sums[COUNT]
      scatter_row(cuts.at[row], step.query, values, step.cuts & (step.query < n))

    def record_pass(step):
      scatter(inputs.passed.at[row], step.position, step.query, step.passes)

    record = {prefix_thresholds.gates_over: record_cut, prefix_thresholds.number_over: record_pass}

    def walk_tile(number, over):
      def columns(line):
        return inputs.columns[row, number, jnp.clip(line, 0, tiling.blocks)]

      tile = prefix_thresholds.tile_of(tiling, columns, cell)

      @pl.when(tile.first < tile.end)
      def _walk():
        inner = Inner(problem, tiling, tile, own, scratch, NEEDS[over])
        read = prefix_thresholds.Read(
          token=reader(inputs.tokens, row), event=reader(inputs.events, row)
        )
        inner.add(read, gather_row_of(inputs.sums, row, tiling))
        inner.walk(read, over, record[over])

    for number, over in enumerate(NEEDS):
      pl.when(which == number)(functools.partial(walk_tile, number, over))

  most = max(map(len, NEEDS.values()))
  scratch = Scratch(plgpu.SMEM((most * SIDE * SIDE,), jnp.int32), plgpu.SMEM((SIDE,), jnp.int32))
  (cuts,) = kernel(
    body,
    rows,
    tiling.cells * LANES,
    len(NEEDS),
    name="walk",
    out_type=[_shape(rows, n, 4)],
    scratch_types=[scratch],
  )(inputs)
  return cuts


def gather_row_of(sums, row, tiling):
  """Returns a function that reads the four sums at the corner (row, column) of tiles."""

  def read(line, column):
    return reader(sums, row)(column * (tiling.blocks + 1) + line)

  return read


class Inner(NamedTuple):
  """The tiles inside a tile, in a program of the kernel walk.

  Attributes:
    own: the lane's number in the program.
    which: the sums that are needed; the others are not in shared memory.
  """

  problem: Problem
  outer: Tiling
  tile: Tile
  own: jax.Array
  scratch: Scratch
  which: tuple[int, ...]

  @property
  def tiling(self) -> Tiling:
    """The inner tiles."""
    return Tiling(self.outer.block // INNER, INNER)

  @property
  def bottom(self) -> jax.Array:
    """The first position."""
    return jnp.maximum(self.tile.bottom, 0)

  def corner(self, line: Any, column: Any) -> Any:
    """Returns the index of the first sum at a corner; the others follow SIDE^2 apart."""
    return line * SIDE + column

  def add(self, read: prefix_thresholds.Read, corner: Any) -> None:
    """Makes the sums at all inner corners."""
    problem, tile, own, inner = self.problem, self.tile, self.own, self.scratch.inner
    block, zero = self.outer.block, own - own
    clear(inner, own)
    sync_threads()

    def put(line, column, weights, there, atomic="add"):
      for i, number in enumerate(self.which):
        if number in weights:
          index = i * SIDE * SIDE + self.corner(line, column)
          scatter(inner, index, weights[number], there, atomic=atomic)

    beyond = corner(zero + tile.row, zero + (tile.column + 1))
    put(zero, zero + INNER, dict(enumerate(beyond)), own == 0, atomic=None)

    # events of tokens that had entered before the tile's first query
    @pl.loop(0, -(-self.outer.width // LANES))
    def _add_events(i):
      offset = i * LANES + own
      position = self.bottom + offset
      high, low, code, _ = read.event(position)
      inside = (offset < self.outer.width) & (position < 2 * problem.n)
      weights = _weights(problem, high, low, code & 1)
      column = offset >> _log2(self.tiling.width)
      put(zero, column, weights, inside & ((code >> 1) <= tile.first))

    # events of tokens that enter in the tile
    @pl.loop(0, -(-block // LANES))
    def _add_tokens(i):
      offset = i * LANES + own
      token = prefix_thresholds.newcomer(problem, tile.first + 1 + offset)
      upper, lower, high, low = read.token(token)
      line = (offset >> _log2(self.tiling.block)) + 1
      inside = (offset < block) & (token >= 0) & (token < problem.n) & (upper >= 0)
      for position, is_lower in ((upper, 0), (lower, 1)):
        if is_lower and self.which == (UPPER,):
          continue
        weights = _weights(problem, high - is_lower * 2**problem.bits, low, zero + is_lower)
        column = jnp.minimum((position - self.bottom) >> _log2(self.tiling.width), INNER)
        put(line, column, weights, inside & (position >= self.bottom))

    sync_threads()
    self._sum_lines(lambda i, step: self.corner(step, i))
    self._sum_lines(lambda i, step: self.corner(i, INNER - step))

  def _sum_lines(self, index_of):
    """Makes prefix sums along all lines of corners: a lane for a line and sum."""
    own, inner = self.own, self.scratch.inner
    inside = own < len(self.which) * SIDE
    own = jnp.minimum(own, len(self.which) * SIDE - 1)
    number, i = own // SIDE, own % SIDE

    def add(part, total):
      indices = [number * (SIDE * SIDE) + index_of(i, part * AT_ONCE + j) for j in range(AT_ONCE)]
      loaded = [gather(inner, index) for index in indices]
      for index, value in zip(indices, loaded):
        total += value
        scatter(inner, index, total, inside)
      return total

    lax.fori_loop(0, SIDE // AT_ONCE, add, own - own)
    sync_threads()

  def _sums(self, line, column):
    """Returns the sums at an inner corner, in the order of `which`."""
    index = self.corner(line, jnp.minimum(column, INNER))
    return [gather(self.scratch.inner, i * SIDE * SIDE + index) for i in range(len(self.which))]

  def walk(self, read: prefix_thresholds.Read, over: Any, record: Any) -> None:
    """Finds the inner tiles that the staircase crosses, and follows it through them."""
    problem, own, tiling, found = self.problem, self.own, self.tiling, self.scratch.found
    line = jnp.minimum(own, INNER)

    def not_over(column):
      sums = dict(zip(self.which, self._sums(line, column)))
      position = self.bottom + column * tiling.width
      is_over = over(problem, sums, read.event(position)) & (position < 2 * problem.n)
      return prefix_thresholds.logical_not(is_over)

    (columns,) = prefix_thresholds.bisect(INNER, (line - line, line - line + INNER, not_over))
    scatter(found, line, columns, own <= INNER)
    sync_threads()

    inner = prefix_thresholds.tile_of(
      tiling, lambda line: gather(found, jnp.clip(line, 0, INNER)), own
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
    sums = self._sums(inner.row, inner.column)
    state, step = prefix_thresholds.walk(problem, read, tile, over, self.which, sums)

    def walk_on(_, state):
      query, position, *_ = state
      newcomer = prefix_thresholds.newcomer(problem, query + 2)
      near = prefix_thresholds.Read(
        token=_ahead(read.token, newcomer), event=_ahead(read.event, position + 1)
      )
      for _ in range(AHEAD):
        state, at = step(state, near)
        record(at)
      return state

    lax.fori_loop(0, -(-tiling.steps // AHEAD), walk_on, state)
