"""Thresholds and expiry on GPUs: the steps of kernels/prefix_thresholds.py in Pallas Mosaic kernels
of single threads. Each kernel waits for the one before; there are no barriers and no shared memory.

  kernel       a lane for               reads                        writes
  merge        element of a sorted part the parts                    keys in order, their tokens
  enter        rank, and token          score, entry, order, start,  tokens, events, passed; corners
                                        scores                       (adds), first_nan (minimum)
  add_rows     column of tiles          corners                      corners: sums down the column
  add_columns  row of tiles, sum        corners                      corners: suffix sums in the row
  columns      row of tiles, search     corners, events              columns: where to begin to walk
  walk         tile, search             tokens, events, corners,     cuts; passed (in place)
                                        columns
  finish       query; token             cuts, first_nan; passed      thresholds; expiry

The two searches are those of NEEDS: for the cuts of queries, and for the expiry of tokens.
The gradient of the scores: hopper/prefix_gradients.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparsek.kernels import prefix_thresholds
from sparsek.kernels.hopper.thread_ops import (
  add_row,
  gather_row,
  kernel,
  reader,
  scatter,
  scatter_row,
  sums_of,
)
from sparsek.kernels.prefix_thresholds import COUNT, NEEDS, Problem
from sparsek.kernels.varying import over_batch, varying_like

AT_ONCE = 16  # loads that a lane has in flight in prefix sums
PARTS = 8  # of a row, which are sorted separately and then merged
AHEAD = 4  # steps of a walk whose loads are in flight together


class Inputs(NamedTuple):
  """Arrays of the kernel enter, see `solve`: [rows, n], start [batch, n]."""

  score: Any
  entry: Any
  order: Any
  start: Any
  scores: Any


class Entered(NamedTuple):
  """Results of the kernel enter.

  Attributes:
    tokens: [rows, n, 4] by token: `Located.token`.
    events: [rows, 2 n, 4] by position: `Located.upper_event`, `Located.lower_event`.
    passed: [rows, 2 n] by position: the first query that passes it, n by default.
  """

  tokens: Any
  events: Any
  passed: Any


class Sums(NamedTuple):
  """Arrays to which the kernel enter adds.

  Attributes:
    corners: [rows, 4 (blocks + 1)^2] four sums at each corner of the tiles.
    first_nan: [rows, n] by a document's first token: its first token whose score is NaN, else n.
  """

  corners: Any
  first_nan: Any


class WalkInputs(NamedTuple):
  """Arrays of the kernel walk; columns: [rows, searches, blocks + 1]."""

  tokens: Any
  events: Any
  corners: Any
  columns: Any
  passed: Any


class FinishInputs(NamedTuple):
  """Arrays of the kernel finish; cuts: [rows, n, 4] by query, as `prefix_thresholds.threshold`
  reads them.
  """

  start: Any
  tokens: Any
  events: Any
  cuts: Any
  passed: Any
  first_nan: Any


class Selection(NamedTuple):
  """Results of the kernel finish, [rows, n]."""

  threshold: Any
  expiry: Any


def over_rows(f: Callable, *args: jax.Array) -> Any:
  """Applies f, which takes and returns [rows, ...] arrays, to [batch, heads, ...] arrays; [batch,
  ...] arrays are passed on as they are.
  """

  def flat(*args):
    shape = args[0].shape[:2]
    out = f(*(x if x.ndim < args[0].ndim else x.reshape(-1, *x.shape[2:]) for x in args))
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), out)

  # Results of kernels are not typed as varying over a mesh's axes.
  return jax.tree.map(lambda x: varying_like(x, args[0]), over_batch(flat, *args))


def sort(key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the keys in order and their tokens, by key, then later token first; [batch, heads, n]
  each, keys uint32 below 2^32 - 1.
  """
  return over_rows(_sort, key)


def solve(
  problem: Problem,
  score: jax.Array,
  entry: jax.Array,
  order: jax.Array,
  start: jax.Array,
  scores: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Computes the same as `prefix_thresholds.solve`, of [batch, heads, n] arrays and start
  [batch, n]; thresholds are NaN from the query at which a NaN of `scores`, by token, may enter.
  """
  return over_rows(functools.partial(_solve, problem), score, entry, order, start, scores)


@jax.jit
def _sort(key):
  """Sorts parts of the rows, and merges them: an element's rank is the number of those before it in
  each part.
  """
  rows, n = key.shape
  size = -(-n // PARTS)
  sign = jnp.uint32(2**31)
  parts = jnp.pad(
    lax.bitcast_convert_type(key ^ sign, jnp.int32),
    ((0, 0), (0, PARTS * size - n)),
    constant_values=2**31 - 1,
  ).reshape(rows, PARTS, size)
  from_end = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[::-1], parts.shape)
  # A stable sort would move a third array on GPUs.
  parts, from_end = lax.sort((parts, from_end), num_keys=2, is_stable=False)

  def merge(row, _, lane, parts, from_end, ranked, order):
    value, own_part = reader(parts, row)(lane), lane // size

    def before(step):
      """Returns the search for how many elements of another part come before."""
      part = (own_part + step) % PARTS

      def after(index):
        other = reader(parts, row)(part * size + index)
        return (other > value) | ((other == value) & (own_part > part))

      return lane - lane, lane - lane + size, after

    rank = sum(
      prefix_thresholds.bisect(size, *map(before, range(1, PARTS))), lane - own_part * size
    )
    inside = (lane < PARTS * size) & (rank < n)
    scatter(ranked.at[row], rank, value, inside)
    scatter(order.at[row], rank, own_part * size + size - 1 - reader(from_end, row)(lane), inside)

  shape = jax.ShapeDtypeStruct((rows, n), jnp.int32)
  ranked, order = kernel(merge, rows, PARTS * size, name="merge", out_type=[shape] * 2)(
    parts.reshape(rows, -1), from_end.reshape(rows, -1)
  )
  return lax.bitcast_convert_type(ranked, jnp.uint32) ^ sign, order


@functools.partial(jax.jit, static_argnums=0)
def _solve(problem, score, entry, order, start, scores):
  rows, n = score.shape
  heads = rows // start.shape[0]
  sums = Sums(
    corners=jax.new_ref(jnp.full((rows, 4 * (problem.blocks + 1) ** 2), 0, jnp.int32)),
    first_nan=jax.new_ref(jnp.full((rows, n), n, jnp.int32)),
  )
  entered = _enter(problem, heads, Inputs(score, entry, order, start, scores), sums)
  entered = entered._replace(passed=jax.new_ref(entered.passed))
  _add_rows(problem, rows, sums.corners)
  _add_columns(problem, rows, sums.corners)
  columns = _find_columns(problem, rows, entered.events, sums.corners)
  tokens, events, passed = entered
  cuts = _walk(problem, rows, WalkInputs(tokens, events, sums.corners, columns, passed))
  return _finish(problem, heads, FinishInputs(start, tokens, events, cuts, passed, sums.first_nan))


def _shape(rows, *shape, dtype=jnp.int32):
  return jax.ShapeDtypeStruct((rows, *shape), dtype)


def _corner(problem, row, column):
  """Returns the index of a corner of the tiles."""
  return row * (problem.blocks + 1) + column


def _corner_reader(problem, corners, row):
  """Returns a function that reads the four sums of a corner."""
  last = (problem.blocks + 1) ** 2 - 1
  return lambda index: gather_row(corners.at[row], jnp.clip(index, 0, last))


def _enter(problem, heads, inputs, sums):
  """Finds the positions of each rank's events, and adds the events to the corners of the tiles in
  which its token enters.
  """
  rows, n = inputs.score.shape

  def body(row, _, lane, inputs, sums, outputs):
    inside = lane < n
    value = reader(inputs.scores, row)(lane)
    first = reader(inputs.start, row // heads)(lane)
    scatter(sums.first_nan.at[row], first, lane, inside & (value != value), atomic="min")
    entry, token = (reader(ref, row)(lane) for ref in (inputs.entry, inputs.order))
    read = prefix_thresholds.Read(reader(inputs.score, row), reader(inputs.start, row // heads))
    placed = prefix_thresholds.locate_events(problem, read, lane, entry)
    scatter_row(outputs.tokens.at[row], token, placed.token, inside)
    for position, event in ((placed.upper, placed.upper_event), (placed.lower, placed.lower_event)):
      scatter_row(outputs.events.at[row], position, event, inside)
      scatter(outputs.passed.at[row], position, n, inside)  # never, until a walk says otherwise
    for line, column, weights in prefix_thresholds.enter(problem, placed, entry):
      add_row(
        sums.corners.at[row],
        _corner(problem, line, column),
        [weights.get(i, 0) for i in range(4)],
        inside & (line <= problem.blocks),
      )

  out = Entered(_shape(rows, n, 4), _shape(rows, 2 * n, 4), _shape(rows, 2 * n))
  (entered,) = kernel(body, rows, n, name="enter", out_type=[out])(inputs, sums)
  return entered


def _add_rows(problem, rows, corners):
  """Makes prefix sums down each column of corners, in place, and separates the sums that `add_row`
  packed.
  """
  blocks = problem.blocks

  def body(row, _, column, corners):
    read = _corner_reader(problem, corners, row)

    def add(i, total):
      lines = [i * AT_ONCE + j for j in range(AT_ONCE)]
      loaded = [sums_of(read(_corner(problem, line, column))) for line in lines]
      for line, sums in zip(lines, loaded):
        total = tuple(x + y for x, y in zip(total, sums))
        index, inside = _corner(problem, line, column), (line <= blocks) & (column <= blocks)
        scatter_row(corners.at[row], index, total, inside)
      return total

    lax.fori_loop(0, -(-(blocks + 1) // AT_ONCE), add, (column - column,) * 4)

  kernel(body, rows, blocks + 1, name="add_rows")(corners)


def _add_columns(problem, rows, corners):
  """Makes suffix sums along each row of corners, in place."""
  blocks = problem.blocks

  def body(row, _, lane, corners):
    line, which = lane // 4, lane % 4  # neighbours read neighbouring sums

    def add(i, total):
      columns = [blocks - (i * AT_ONCE + j) for j in range(AT_ONCE)]
      indices = [4 * _corner(problem, line, column) + which for column in columns]
      loaded = [reader(corners, row)(index) for index in indices]
      for column, index, value in zip(columns, indices, loaded):
        total += value
        scatter(corners.at[row], index, total, (line <= blocks) & (column >= 0))
      return total

    lax.fori_loop(0, -(-(blocks + 1) // AT_ONCE), add, line - line)

  kernel(body, rows, 4 * (blocks + 1), name="add_columns")(corners)


def _find_columns(problem, rows, events, corners):
  """Returns, for each search and row of tiles, how many columns of tiles begin with a position that
  is over.
  """
  blocks, n = problem.blocks, problem.n

  def body(row, which, line, events, corners, columns):
    def search(number, over):
      def not_over(column):
        sums = _corner_reader(problem, corners, row)(_corner(problem, line, column))
        position = column * problem.width
        is_over = over(problem, sums, reader(events, row)(position))
        return prefix_thresholds.logical_not(is_over & (position < 2 * n))

      (value,) = prefix_thresholds.bisect(blocks, (line - line, line - line + blocks, not_over))
      scatter(columns.at[row, number], line, value, line <= blocks)

    for number, over in enumerate(NEEDS):
      pl.when(which == number)(functools.partial(search, number, over))

  out = [_shape(rows, len(NEEDS), blocks + 1)]
  (columns,) = kernel(body, rows, blocks + 1, len(NEEDS), name="columns", out_type=out)(
    events, corners
  )
  return columns


def _ahead(read, first):
  """Loads rows first to first + AHEAD - 1; returns a function like `read` that chooses one."""
  rows = [read(first + i) for i in range(AHEAD)]

  def near(index):
    result = rows[0]
    for i, row in enumerate(rows[1:], 1):
      result = tuple(jnp.where(index - first >= i, new, old) for new, old in zip(row, result))
    return result

  return near


def _walk(problem, rows, inputs):
  """Follows the staircase of each search through each tile; returns the cut of each query, and
  writes into `passed` the first query that passes each position.
  """
  n = problem.n

  def body(row, which, cell, inputs, cuts):
    tokens, events = reader(inputs.tokens, row), reader(inputs.events, row)

    def record_cut(step):
      missing = prefix_thresholds.missing(problem, step.sums, step.event)
      values = step.position, *missing, step.sums[COUNT]
      scatter_row(cuts.at[row], step.query, values, step.cuts & (step.query < n))

    def record_pass(step):
      scatter(inputs.passed.at[row], step.position, step.query, step.passes)

    record = {prefix_thresholds.gates_over: record_cut, prefix_thresholds.number_over: record_pass}

    def walk_tile(number, over):
      tile = prefix_thresholds.tile_of(problem, reader(inputs.columns, row, number), cell)
      corner = _corner(problem, tile.row, tile.column)
      sums = _corner_reader(problem, inputs.corners, row)(corner)
      sums = [sums[i] for i in NEEDS[over]]
      read = prefix_thresholds.Read(token=tokens, event=events)
      state, step = prefix_thresholds.walk(problem, read, tile, over, NEEDS[over], sums)

      def walk_on(_, state):
        query, position, *_ = state
        newcomer = prefix_thresholds.newcomer(problem, query + 2)
        near = prefix_thresholds.Read(
          token=_ahead(tokens, newcomer), event=_ahead(events, position + 1)
        )
        for _ in range(AHEAD):
          state, at = step(state, near)
          record[over](at)
        return state

      lax.fori_loop(0, -(-problem.steps // AHEAD), walk_on, state)

    for number, over in enumerate(NEEDS):
      pl.when(which == number)(functools.partial(walk_tile, number, over))

  out = [_shape(rows, n, 4)]
  (cuts,) = kernel(body, rows, problem.cells, len(NEEDS), name="walk", out_type=out)(inputs)
  return cuts


def _finish(problem, heads, inputs):
  """Returns the threshold of each query and the expiry of each token."""
  rows, n = inputs.tokens.shape[:2]

  def body(row, _, query, inputs, outputs):
    start_of, token_of = reader(inputs.start, row // heads), reader(inputs.tokens, row)
    read = prefix_thresholds.Read(
      start=start_of, token=token_of, event=reader(inputs.events, row), cut=reader(inputs.cuts, row)
    )
    value = prefix_thresholds.threshold(problem, read, query)
    spoilt = query - problem.delay >= reader(inputs.first_nan, row)(start_of(query))
    scatter(outputs.threshold.at[row], query, jnp.where(spoilt, jnp.nan, value), query < n)
    upper = token_of(query)[0]  # position of the upper event of the token of that number
    expiry = jnp.where(upper >= 0, reader(inputs.passed, row)(upper), 0)
    scatter(outputs.expiry.at[row], query, expiry, query < n)

  out = Selection(_shape(rows, n, dtype=jnp.float32), _shape(rows, n))
  (selection,) = kernel(body, rows, n, name="finish", out_type=[out])(inputs)
  return tuple(selection)
