"""Thresholds and expiry of every causal prefix, exactly and in parallel: the steps, and XLA's way
of running them.

Sort the tokens of a row by score: a token's index in that order is its *rank*. As the threshold
rises its gate changes at two *events*: at u - 1 it leaves 1 (the lower event), at u it reaches 0
(the upper event); all events of a row in order have the *positions* 0 to 2 n - 1. For each query,
the positions that are *over*, where the gates of its candidates would sum to more than k, come
first: their number is the query's *cut*, which never decreases. Expiry asks the same of the number
of candidates at or above a position. In the plane of queries and positions the cut is a staircase;
the plane is tiled, `block` queries by 2 `block` positions:

    positions
      ^            :        ___:____   the cut of each query; the positions below it are over
      |            :    ___|   :
      |............:...|.......:....   tiles; only those that the staircase crosses are walked
      |         ___:___|       :
      |  ______|   :           :
      +-----------------------------> queries

  1. `locate_events` of kernels/prefix_events.py: the positions of each token's events, by merging
     two sorted lists;
  2. `enter`: every candidate adds its events to the sums of the tiles in which it enters; prefix
     sums then give the sums at every tile's corner;
  3. `tile_of`: the tiles that the staircase crosses, no more than rows and columns of tiles
     together;
  4. `walk`: follows the staircase through a tile, one event or one query a step.

All tiles are walked together: O(n) work, O(sqrt n) steps one after the other. Sums are integers in
fixed point, which wrap but never round, so a query's cut does not depend on how the plane is tiled.
Documents follow each other among the positions as they do among the queries, and at every position
of an earlier document a candidate's gate counts 1, so nothing restarts.

The steps read arrays through functions (index -> element; indices may lie outside), so that the
same code runs under XLA, here, and in GPU kernels (hopper/prefix_thresholds.py).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels.bisection import bisect, logical_not
from sparsek.kernels.fixed_point import next_below
from sparsek.kernels.prefix_events import Located, Problem, Read, Row, Tiling, locate_events
from sparsek.kernels.varying import varying_like

# Sums over the events of candidates from a position on. COUNT: upper less lower events, which is
# the number of fractional gates. UPPER: upper events. LOW, HIGH: as COUNT, but weighted by the low
# and the high digit of the events' values.
COUNT, UPPER, LOW, HIGH = range(4)
SUMS = 4

Sums = dict[int, jax.Array]  # by COUNT, UPPER, LOW, HIGH
Over = Callable[..., jax.Array]  # (Problem, Sums, Row) -> booleans

Weights = dict[int, Any]  # of the sums: arrays, and 1 or -1 for counts


def enter(
  problem: Problem, located: Located, entry: jax.Array
) -> tuple[tuple[jax.Array, jax.Array, Weights], ...]:
  """Returns what a candidate adds to the sums: (row, column, weights) of its upper event, and of
  its lower one; row and column count tiles.
  """
  # The first row of tiles in which it counts from the start; beyond the last for NEVER_ENTERS.
  tiling = problem.tiling
  row = (entry >> (tiling.block.bit_length() - 1)) + 1
  column = lambda position: position >> (tiling.width.bit_length() - 1)
  (high, low, *_), (lower_high, lower_low, *_) = located.upper_event, located.lower_event
  upper: Weights = {UPPER: 1, COUNT: 1, HIGH: high, LOW: low}
  lower: Weights = {COUNT: -1, HIGH: -lower_high, LOW: -lower_low}
  return (row, column(located.upper), upper), (row, column(located.lower), lower)


def missing(problem: Problem, sums: Sums, event: Row) -> tuple[jax.Array, jax.Array]:
  """Returns k less the sum of gates at an event, given the sums from it on, as (whole, remainder):
  whole 2^-bits - remainder 2^(-2 bits).
  """
  at_high, at_low, *_ = event
  low = sums[LOW] - sums[COUNT] * at_low
  whole = (problem.k << problem.bits) - (sums[HIGH] - sums[COUNT] * at_high) - (low >> problem.bits)
  return whole, low & (2**problem.bits - 1)


def gates_over(problem: Problem, sums: Sums, event: Row) -> jax.Array:
  """Tells whether the gates at an event would sum to more than k, given the sums from it on."""
  whole, remainder = missing(problem, sums, event)
  return (whole < 0) | ((whole == 0) & (remainder > 0))


def number_over(problem: Problem, sums: Sums, event: Row) -> jax.Array:
  """Tells whether more than k candidates are at or above an event."""
  del event
  return sums[UPPER] > problem.k


# The sums that each test needs.
NEEDS: dict[Over, tuple[int, ...]] = {gates_over: (COUNT, HIGH, LOW), number_over: (UPPER,)}


class Tile(NamedTuple):
  """A tile of the plane.

  Attributes:
    first, end: its queries are first + 1 to end - 1.
    bottom, top: its cuts are in (bottom, top], or 0 where bottom is -1.
    row, column: of tiles; the column is that of its first position.
  """

  first: jax.Array
  end: jax.Array
  bottom: jax.Array
  top: jax.Array
  row: jax.Array
  column: jax.Array


def tile_of(tiling: Tiling, columns: Callable[[jax.Array], jax.Array], cell: jax.Array) -> Tile:
  """Returns the cell-th tile on the staircase; one that does not exist has no queries.

  Args:
    tiling: of the plane.
    columns: function from a row of tiles to the number of columns of tiles that begin with a
      position that is over, at the last query before the row.
    cell: number of the tile.
  """
  (row,) = bisect(
    tiling.blocks,
    (
      cell - cell,
      cell - cell + (tiling.blocks - 1),
      lambda row: columns(row + 1) + (row + 1) > cell,
    ),
  )
  column = cell - row
  first = row * tiling.block - 1
  end = jnp.where(column > columns(row + 1), first, first + 1 + tiling.block)
  bottom = jnp.where(column > 0, (column - 1) * tiling.width, -1)
  return Tile(first, end, bottom, column * tiling.width, row, jnp.maximum(column - 1, 0))


class Step(NamedTuple):
  """One step of a walk, at a query and an event with the sums from there on.

  Attributes:
    query, position, event, sums: where it is.
    cuts: whether the position is the query's cut.
    passes: whether the query is the first to pass the event.
  """

  query: jax.Array
  position: jax.Array
  event: Row
  sums: Sums
  cuts: jax.Array
  passes: jax.Array


# query, position, event there, token that may enter next, sums
State = tuple[jax.Array, jax.Array, Row, Row, tuple[jax.Array, ...]]


def newcomer(problem: Problem, query: jax.Array) -> jax.Array:
  """Returns the token that may enter at a query."""
  return query - problem.delay


def walk(
  problem: Problem,
  read: Read,
  tile: Tile,
  over: Over,
  which: Sequence[int],
  sums: Sequence[jax.Array],
) -> tuple[State, Callable[[State, Read], tuple[State, Step]]]:
  """Follows the staircase of `over` through a tile, from its corner on.

  Args:
    problem: sizes.
    read: of tokens and events.
    tile: the tile.
    over: the test.
    which: the sums that `over` needs.
    sums: their values at the corner.

  Returns:
    The first state, and a function that makes a step. A state begins with a query and a position. A
    step from there reads the event at position + 1 and the token `newcomer(problem, query + 2)`.
  """

  def step(state, read):
    query, position, event, token, values = state
    next_event, next_token = read.event(position + 1), read.token(newcomer(problem, query + 2))
    sums = dict(zip(which, values))
    active = query < tile.end
    is_over = over(problem, sums, event) & (position < 2 * problem.n)
    waits, passes, leaves = (
      active & logical_not(is_over),
      active & is_over & (position < tile.top),
      active & is_over & (position >= tile.top),
    )
    # One query on, a token may enter.
    enters = waits & (newcomer(problem, query + 1) >= 0)
    *ends, high, low = token
    upper, lower = ((enters & (end >= position)).astype(jnp.int32) for end in ends)
    # One position on, its event no longer counts.
    at_high, at_low, code, _ = event
    gone = passes & ((code >> 1) <= query)
    is_lower = (code & 1) == 1
    upper_gone, lower_gone = (
      (gone & kind).astype(jnp.int32) for kind in (logical_not(is_lower), is_lower)
    )
    sign = upper_gone - lower_gone
    change = {
      UPPER: upper - upper_gone,
      COUNT: upper - lower - sign,
      HIGH: upper * high - lower * (high - 2**problem.bits) - sign * at_high,
      LOW: (upper - lower) * low - sign * at_low,
    }
    choose = lambda where, new, old: tuple(jnp.where(where, a, b) for a, b in zip(new, old))
    new = query > tile.first
    cuts = waits & new & (position > tile.bottom)
    # Tokens that enter beyond the row's end may be anything.
    made = Step(query, position, event, sums, cuts, passes & new & (query < problem.n))
    return (
      jnp.where(leaves, tile.end, jnp.where(waits, query + 1, query)),
      jnp.where(passes, position + 1, position),
      choose(passes, next_event, event),
      choose(waits, next_token, token),
      tuple(sums[i] + change[i] for i in which),
    ), made

  position = jnp.maximum(tile.bottom, 0)
  return (
    tile.first,
    position,
    tuple(read.event(position)),
    tuple(read.token(newcomer(problem, tile.first + 1))),
    tuple(sums),
  ), step


def threshold(problem: Problem, read: Read, query: jax.Array) -> jax.Array:
  """Returns tau of a query, on the piece that ends at its cut.

  It never decreases from query to query, and lies strictly below the events that are not over.
  """
  cut, whole, remainder, count = read.cut(query)
  count = jnp.maximum(count, 1)
  # The quotient is rounded up, digit by digit.
  extra = count - 1 - remainder
  whole, extra = whole + (extra >> problem.bits), extra & (2**problem.bits - 1)
  high = lax.div(whole, count)
  low = lax.div(((whole - high * count) << problem.bits) + extra, count)
  step = high.astype(jnp.float32) * 2.0**-problem.bits + low.astype(jnp.float32) * 2.0 ** (
    -2 * problem.bits
  )
  last, value = (
    lax.bitcast_convert_type(read.event(position)[3], jnp.float32) for position in (cut - 1, cut)
  )
  tau = jnp.where(step > 0, jnp.minimum(value - step, next_below(value)), value)
  start = read.start(query) if problem.packed else 0
  # at the lowest event of a document every gate is 1
  return jnp.where(cut > 2 * start, jnp.maximum(tau, last), -jnp.inf)


@functools.partial(jax.jit, static_argnums=0)
def solve(
  problem: Problem, score: jax.Array, entry: jax.Array, order: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns thresholds by query, and by token the first query at which it is not among the k best:
  [n] each.

  The latter is 0 for a token that is never a candidate, and n for one that is never driven out.

  Args:
    problem: sizes.
    score: [n] float32, by rank.
    entry: [n], by rank, the query at which its token enters, or NEVER_ENTERS.
    order: [n], by rank, its token.
    start: [n], the first token of each token's document.
  """
  n, tiling = problem.n, problem.tiling
  blocks = tiling.blocks
  numbers = lambda size: varying_like(jnp.arange(size, dtype=jnp.int32), score)
  located = locate_events(problem, Read(reader(score), reader(start)), numbers(n), entry)
  rows = lambda *groups: jnp.stack([jnp.concatenate(columns) for columns in zip(*groups)], axis=-1)
  token = jnp.zeros((n, 4), jnp.int32).at[order].set(rows(located.token), unique_indices=True)
  position = jnp.concatenate([located.upper, located.lower])
  event = (
    jnp.zeros((2 * n, 4), jnp.int32)
    .at[position]
    .set(rows(located.upper_event, located.lower_event), unique_indices=True)
  )
  read = Read(start=reader(start), token=reader(token), event=reader(event))

  # One scatter for all sums, as each is a long program for XLA.
  row, column, weights = zip(*enter(problem, located, entry))
  of_sums = lambda weights: [jnp.broadcast_to(weights.get(i, 0), n) for i in range(SUMS)]
  sums = jnp.zeros((blocks + 1, blocks + 1, SUMS), jnp.int32)
  sums = sums.at[jnp.concatenate(row), jnp.concatenate(column)].add(
    rows(*map(of_sums, weights)), mode="drop"
  )
  sums = jnp.moveaxis(sums, 2, 0)
  sums = jnp.cumsum(jnp.cumsum(sums, axis=1)[..., ::-1], axis=2)[..., ::-1]

  # Both staircases are walked in one loop, so that the compiled program is half as long.
  which = tuple(range(SUMS))
  cell = numbers(2 * tiling.cells)
  counting = cell >= tiling.cells
  both = lambda problem, sums, event: jnp.where(
    counting, number_over(problem, sums, event), gates_over(problem, sums, event)
  )
  position = numbers(blocks + 1) * tiling.width
  overs: tuple[Over, ...] = (gates_over, number_over)
  is_over = [over(problem, sums, read.event(position)) & (position < 2 * n) for over in overs]
  columns = jnp.sum(jnp.stack(is_over), axis=-1, dtype=jnp.int32)
  tile = tile_of(
    tiling,
    lambda row: columns[counting.astype(jnp.int32), row],
    jnp.where(counting, cell - tiling.cells, cell),
  )
  state, step = walk(
    problem, read, tile, both, which, [sums[i, tile.row, tile.column] for i in which]
  )

  def go(_, carry):
    state, cuts, passed = carry
    state, at = step(state, read)
    values = jnp.stack([at.position, *missing(problem, at.sums, at.event), at.sums[COUNT]], axis=-1)
    cuts = cuts.at[jnp.where(at.cuts & logical_not(counting) & (at.query < n), at.query, n)].set(
      values, mode="drop", unique_indices=True
    )
    passed = passed.at[jnp.where(at.passes & counting, at.position, 2 * n)].set(
      at.query, mode="drop", unique_indices=True
    )
    return state, cuts, passed

  carry = state, jnp.zeros((n, 4), jnp.int32), jnp.full(2 * n, n, jnp.int32)
  _, cuts, passed = lax.fori_loop(
    0, tiling.steps, go, jax.tree.map(lambda x: varying_like(x, score), carry)
  )
  tau = threshold(problem, read._replace(cut=reader(cuts)), numbers(n))
  return tau, jnp.where(token[:, 0] >= 0, passed[token[:, 0]], 0)


def reader(x: jax.Array) -> Callable[[jax.Array], Any]:
  """Makes a function that reads elements of x, or rows of it as tuples."""

  def read(i):
    element = x.at[jnp.clip(i, 0, x.shape[0] - 1)].get(
      mode="promise_in_bounds", wrap_negative_indices=False
    )
    return element if x.ndim == 1 else tuple(jnp.unstack(element, axis=-1))

  return read
