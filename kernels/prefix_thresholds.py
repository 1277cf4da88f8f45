"""Thresholds and expiry of every causal prefix, exactly and in parallel: the steps, and XLA's way
of running them.

Sort the tokens of a row by score: a token's place is its *rank*. As the threshold rises its gate
changes at two *events*: at u - 1 it leaves 1 (the lower event), at u it reaches 0 (the upper
event); all events of a row in order have the *positions* 0 to 2 n - 1. For each query, the
positions that are *over*, where the gates of its candidates would sum to more than k, come first:
their number is the query's *cut*, which never decreases. Expiry asks the same of the number of
candidates at or above a position. In the plane of queries and positions the cut is a staircase; the
plane is tiled, `block` queries by 2 `block` positions:

  1. `place`: the positions of each token's events, by merging two sorted lists;
  2. `enter`: every candidate adds its events to the sums of the tiles in which it enters; prefix
    sums then give the sums at every tile's corner;
  3. `tile_of`: the tiles that the staircase crosses, no more than rows and columns of tiles
    together;
  4. `walk`: follow the staircase through a tile, one event or one query a step.

All tiles are walked together: O(n) work, O(sqrt n) steps one after the other. Sums are integers in
fixed point, which wrap but never round, so a query's cut does not depend on how the plane is tiled.
Documents follow each other among the positions as they do among the queries, and at every position
of an earlier document a candidate's gate counts 1, so nothing restarts.

The steps read arrays through functions (index -> element; indices may lie outside), so that the
same code runs under XLA, here, and in GPU kernels (prefix_thresholds.py).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels.varying import varying_like

NEVER = 2**29  # the query at which a token enters that never does
# What is summed over the events of candidates from a position on: upper less lower ones, which is
# the number of fractional gates; upper ones; the former weighted with where they lie, low and high
# digit.
COUNT, UPPER, LOW, HIGH = range(4)
SUMS = 4
SEGMENT = 128  # numbers that are added up together


class Problem(NamedTuple):
  """What the steps depend on besides arrays. delay: queries from a token to the first that may
  select it. packed: there may be several documents.
  """

  n: int
  k: int
  delay: int
  packed: bool

  @property
  def bits(self):
    """Binary places of one digit of a score; n * 2^bits must fit an int32."""
    return min(12, 30 - math.ceil(math.log2(max(self.n, 2))))

  @property
  def block(self):
    """Queries of a tile, half its positions: a power of two, such that there are n to 4 n tiles and
    a walk is O(sqrt n) steps.
    """
    return 2 ** max(3, ((self.n - 1).bit_length() + 1) // 2 - 1)

  @property
  def width(self):
    """Positions of a tile."""
    return 2 * self.block

  @property
  def blocks(self):
    """Tiles along either side."""
    return -(-self.n // self.block)

  @property
  def cells(self):
    """At most so many tiles are crossed."""
    return 2 * self.blocks

  @property
  def steps(self):
    """At most so many steps in a tile: each of its queries and positions, and those that begin and
    end.
    """
    return self.block + self.width + 2


class Read(NamedTuple):
  """Functions index -> element, or tuple of four; indices outside give anything.

  By rank or by token, as the step says: score, start (first token of its document; the same for its
  rank). By token: end (of its document). By query: threshold. Rows of four int32:
    token, by token: positions of its upper and lower event, -1 if it is never a candidate; high and
    low digit of its score. event, by position: high and low digit of where it lies; 2 entry (query
    at which the token enters, or NEVER), + 1 for a lower event; bits of the float. found, by query:
    its cut; `missing` there, two numbers; number of fractional gates.
  """

  score: object = None
  start: object = None
  end: object = None
  threshold: object = None
  token: object = None
  event: object = None
  found: object = None


def no(x):
  """Not x; Mosaic cannot lower `~` of booleans."""
  return x ^ jnp.array(True)


def fixed_point(score, bits):
  """Order-preserving integers (whole, fraction) with score = whole + fraction / 2^(2 bits), rounded
  down.

  Beyond 2^24 neighbouring floats are 2 or more apart and only "more than 1 apart" matters, so they
  are numbered in steps of 2.
  """
  large = jnp.abs(score) > 2.0**24
  near = jnp.where(large, 0.0, score)
  floor = near.astype(jnp.int32)  # towards 0
  floor = jnp.where(floor.astype(jnp.float32) > near, floor - 1, floor)
  fraction = ((near - floor.astype(jnp.float32)) * 2.0 ** (2 * bits)).astype(jnp.int32)
  # the latter are the bits of 2^24
  step = lax.bitcast_convert_type(jnp.abs(score), jnp.int32) - (151 << 23)
  far = 2**24 + 2 * step
  whole = jnp.where(large, jnp.where(score < 0, -far, far), floor)
  return whole + (fraction >> (2 * bits)), fraction & (2 ** (2 * bits) - 1)


def next_below(x):
  """The next float32 below a finite x."""
  bits = lax.bitcast_convert_type(x, jnp.int32)
  bits = jnp.where(x > 0, bits - 1, jnp.where(x < 0, bits + 1, -(2**31) + 1))
  return lax.bitcast_convert_type(bits, jnp.float32)


def minus_one(score):
  """score - 1, or the next float below where floats are too coarse for that."""
  return jnp.where(jnp.abs(score) >= 2.0**24, next_below(score), score - 1)


def bisect(size, *searches):
  """For each (low, high, test) the smallest integer in [low, high] that passes, elementwise; `high`
  is taken to pass; high - low <= size.

  All searches go on together: what one reads another need not wait for.
  """

  def halve(_, ranges):
    middles = [(low + high) >> 1 for low, high in ranges]
    results = [test(middle) for (*_, test), middle in zip(searches, middles)]
    return tuple(
      (
        jnp.where((low < high) & no(passes), middle + 1, low),
        jnp.where((low < high) & passes, middle, high),
      )
      for (low, high), middle, passes in zip(ranges, middles, results)
    )

  ranges = lax.fori_loop(
    0, size.bit_length(), halve, tuple((low, high) for low, high, _ in searches)
  )
  return tuple(low for low, _ in ranges)


class Placed(NamedTuple):
  """A rank's events: their positions; their rows of `Read.event`; its token's row of
  `Read.token`.
  """

  upper: jax.Array
  lower: jax.Array
  upper_event: tuple
  lower_event: tuple
  token: tuple


def place(problem, read, rank, entry):
  """Where the events of a rank's token are; `read` is by rank."""
  score = read.score(rank)
  whole, fraction = fixed_point(score, problem.bits)
  document = read.start(rank) if problem.packed else 0

  def lower_first(a, b):
    """Does the lower event of a come before the upper event of b, of rank at most a's? Each a
    (whole, fraction, score, document).
    """
    # Rounding down and rounding are both monotone, so this order is that of both; one of the two
    # alone would not agree with the other.
    tie = (a[0] - 1 == b[0]) & ((a[1] < b[1]) | ((a[1] == b[1]) & (minus_one(a[2]) <= b[2])))
    first = (a[0] - 1 < b[0]) | tie
    return first & (a[3] == b[3]) if problem.packed else first

  def other(rank):
    score = read.score(rank)
    return *fixed_point(score, problem.bits), score, read.start(rank) if problem.packed else 0

  own = whole, fraction, score, document
  before_lower, before_upper = bisect(
    problem.n,
    (rank - rank, rank, lambda x: lower_first(own, other(x))),
    (rank, rank - rank + problem.n, lambda x: no(lower_first(other(x), own))),
  )
  upper, lower = rank + before_upper, rank + before_lower
  high, low = (whole << problem.bits) + (fraction >> problem.bits), fraction & (2**problem.bits - 1)
  bits = lambda x: lax.bitcast_convert_type(x, jnp.int32)
  only = lambda x: jnp.where(entry < NEVER, x, -1)
  return Placed(
    upper,
    lower,
    (high, low, 2 * entry, bits(score)),
    (high - 2**problem.bits, low, 2 * entry + 1, bits(minus_one(score))),
    (only(upper), only(lower), high, low),
  )


def enter(problem, placed, entry):
  """How a candidate enters the sums: (row, column, weights) of its upper event, and of its lower
  one; row and column count tiles.
  """
  row = (
    entry >> (problem.block.bit_length() - 1)
  ) + 1  # the first row of tiles in which it counts from the start; beyond the last for NEVER
  column = lambda position: position >> (problem.width.bit_length() - 1)
  (high, low, *_), (lower_high, lower_low, *_) = placed.upper_event, placed.lower_event
  upper, lower = (
    {UPPER: 1, COUNT: 1, HIGH: high, LOW: low},
    {COUNT: -1, HIGH: -lower_high, LOW: -lower_low},
  )
  return (row, column(placed.upper), upper), (row, column(placed.lower), lower)


def missing(problem, sums, event):
  """k less the sum of gates at an event, given the sums from it on: in 2^-bits, less a remainder in
  2^(-2 bits).
  """
  at_high, at_low, *_ = event
  low = sums[LOW] - sums[COUNT] * at_low
  whole = (problem.k << problem.bits) - (sums[HIGH] - sums[COUNT] * at_high) - (low >> problem.bits)
  return whole, low & (2**problem.bits - 1)


def gates_over(problem, sums, event):
  """Would the gates at an event sum to more than k, given the sums from it on?"""
  whole, remainder = missing(problem, sums, event)
  return (whole < 0) | ((whole == 0) & (remainder > 0))


def number_over(problem, sums, event):
  """Are there more than k candidates at or above an event?"""
  return sums[UPPER] > problem.k


# Which sums each test needs.
NEEDS = {gates_over: (COUNT, HIGH, LOW), number_over: (UPPER,)}


class Tile(NamedTuple):
  """A tile: cuts in (bottom, top], or 0 where bottom is -1, of queries first + 1 to end - 1; its
  row, and the column of its first position.
  """

  first: jax.Array
  end: jax.Array
  bottom: jax.Array
  top: jax.Array
  row: jax.Array
  column: jax.Array


def tile_of(problem, columns, cell):
  """The cell-th tile on the staircase; one that is not there has no queries.

  columns: row of tiles -> how many columns of tiles begin with a position that is over, at the last
    query before the row.
  """
  (row,) = bisect(
    problem.blocks,
    (
      cell - cell,
      cell - cell + (problem.blocks - 1),
      lambda row: columns(row + 1) + (row + 1) > cell,
    ),
  )
  column = cell - row
  first = row * problem.block - 1
  end = jnp.where(column > columns(row + 1), first, first + 1 + problem.block)
  bottom = jnp.where(column > 0, (column - 1) * problem.width, -1)
  return Tile(first, end, bottom, column * problem.width, row, jnp.maximum(column - 1, 0))


class Step(NamedTuple):
  """One step of a walk, at a query and an event with the sums from there on: its position is the
  query's cut, or the query is the first to pass it.
  """

  query: jax.Array
  position: jax.Array
  event: tuple
  sums: dict
  cuts: jax.Array
  passes: jax.Array


def newcomer(problem, query):
  """The token that may enter at a query."""
  return query - problem.delay


def walk(problem, read, tile, over, which, sums):
  """(state, (state, Read) -> (state, Step)): the staircase of `over` through a tile, from its
  corner on, with the sums that it needs: `which`.

  A state begins with a query and a position. A step from there reads the event at position + 1 and
  the token `newcomer(problem, query + 2)`.
  """

  def step(state, read):
    query, position, event, token, sums = state
    next_event, next_token = read.event(position + 1), read.token(newcomer(problem, query + 2))
    sums = dict(zip(which, sums))
    active = query < tile.end
    is_over = over(problem, sums, event) & (position < 2 * problem.n)
    waits, passes, leaves = (
      active & no(is_over),
      active & is_over & (position < tile.top),
      active & is_over & (position >= tile.top),
    )
    # One query on, a token may enter.
    enters = waits & (newcomer(problem, query + 1) >= 0)
    *ends, high, low = token
    upper, lower = ((enters & (end >= position)).astype(jnp.int32) for end in ends)
    # One position on, its event counts no longer.
    at_high, at_low, code, _ = event
    gone = passes & ((code >> 1) <= query)
    is_lower = (code & 1) == 1
    upper_gone, lower_gone = ((gone & kind).astype(jnp.int32) for kind in (no(is_lower), is_lower))
    sign = upper_gone - lower_gone
    change = {
      UPPER: upper - upper_gone,
      COUNT: upper - lower - sign,
      HIGH: upper * high - lower * (high - 2**problem.bits) - sign * at_high,
      LOW: (upper - lower) * low - sign * at_low,
    }
    choose = lambda where, new, old: tuple(jnp.where(where, a, b) for a, b in zip(new, old))
    new = query > tile.first
    found = Step(query, position, event, sums, waits & new & (position > tile.bottom), passes & new)
    return (
      jnp.where(leaves, tile.end, jnp.where(waits, query + 1, query)),
      jnp.where(passes, position + 1, position),
      choose(passes, next_event, event),
      choose(waits, next_token, token),
      tuple(sums[i] + change[i] for i in which),
    ), found

  position = jnp.maximum(tile.bottom, 0)
  return (
    tile.first,
    position,
    tuple(read.event(position)),
    tuple(read.token(newcomer(problem, tile.first + 1))),
    tuple(sums),
  ), step


def threshold(problem, read, query):
  """tau of a query, on the piece that ends at its cut; it never decreases from query to query, and
  lies strictly below the events that are not over.
  """
  cut, whole, remainder, count = read.found(query)
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
def solve(problem, score, entry, order, start):
  """Thresholds by query, and by token the first query at which it is not among the k best: [n]
  each.

  Of a token that is never a candidate the latter is 0, of one that is never driven out it is n.

  score [n] float32, entry [n], order [n]: of each rank's token, its score, the query at which it
  enters (or NEVER), and which it is. start [n]: the first token of each token's document.
  """
  n, blocks = problem.n, problem.blocks
  numbers = lambda size: varying_like(jnp.arange(size, dtype=jnp.int32), score)
  placed = place(problem, Read(_reader(score), _reader(start)), numbers(n), entry)
  rows = lambda *groups: jnp.stack([jnp.concatenate(columns) for columns in zip(*groups)], axis=-1)
  token = jnp.zeros((n, 4), jnp.int32).at[order].set(rows(placed.token), unique_indices=True)
  position = jnp.concatenate([placed.upper, placed.lower])
  event = (
    jnp.zeros((2 * n, 4), jnp.int32)
    .at[position]
    .set(rows(placed.upper_event, placed.lower_event), unique_indices=True)
  )
  read = Read(start=_reader(start), token=_reader(token), event=_reader(event))

  sums = jnp.zeros((SUMS, blocks + 1, blocks + 1), jnp.int32)
  for row, column, weights in enter(problem, placed, entry):
    for which, weight in weights.items():
      sums = sums.at[which, row, column].add(weight, mode="drop")
  sums = jnp.cumsum(jnp.cumsum(sums, axis=1)[..., ::-1], axis=2)[..., ::-1]

  # Both staircases in one loop, a cell after the other: what is compiled is half as long.
  which = tuple(range(SUMS))
  cell = numbers(2 * problem.cells)
  counting = cell >= problem.cells
  both = lambda problem, sums, event: jnp.where(
    counting, number_over(problem, sums, event), gates_over(problem, sums, event)
  )
  position = numbers(blocks + 1) * problem.width
  is_over = [
    over(problem, sums, read.event(position)) & (position < 2 * n)
    for over in (gates_over, number_over)
  ]
  columns = jnp.sum(jnp.stack(is_over), axis=-1, dtype=jnp.int32)
  tile = tile_of(
    problem,
    lambda row: columns[counting.astype(jnp.int32), row],
    jnp.where(counting, cell - problem.cells, cell),
  )
  state, step = walk(
    problem, read, tile, both, which, [sums[i, tile.row, tile.column] for i in which]
  )

  def go(_, carry):
    state, found, passed = carry
    state, at = step(state, read)
    values = jnp.stack([at.position, *missing(problem, at.sums, at.event), at.sums[COUNT]], axis=-1)
    found = found.at[jnp.where(at.cuts & no(counting) & (at.query < n), at.query, n)].set(
      values, mode="drop", unique_indices=True
    )
    passed = passed.at[jnp.where(at.passes & counting, at.position, 2 * n)].set(
      at.query, mode="drop", unique_indices=True
    )
    return state, found, passed

  carry = state, jnp.zeros((n, 4), jnp.int32), jnp.full(2 * n, n, jnp.int32)
  _, found, passed = lax.fori_loop(
    0, problem.steps, go, jax.tree.map(lambda x: varying_like(x, score), carry)
  )
  tau = threshold(problem, read._replace(found=_reader(found)), numbers(n))
  return tau, jnp.where(token[:, 0] >= 0, passed[token[:, 0]], 0)


def _reader(x):
  def read(i):
    found = x.at[jnp.clip(i, 0, x.shape[0] - 1)].get(
      mode="promise_in_bounds", wrap_negative_indices=False
    )
    return found if x.ndim == 1 else tuple(jnp.unstack(found, axis=-1))

  return read


def interval(read, token, delay, n):
  """[first, last): the queries at which a token's gate is between 0 and 1, empty where it never is;
  `read` has the scores as they are, by token.
  """
  score, end = read.score(token), read.end(token)
  candidate = score > -jnp.inf  # false for NaN too
  score = jnp.minimum(jnp.where(candidate, score, 0.0), float(jnp.finfo(jnp.float32).max))
  entry = jnp.minimum(token + delay, end)
  # thresholds above it leave the gate below 1
  one = jnp.where(jnp.abs(score) >= 2.0**24, score, score - 1)
  first, last = bisect(
    n,
    (entry, end, lambda i: read.threshold(i) > one),
    (entry, end, lambda i: read.threshold(i) >= score),
  )
  return jnp.where(candidate, jnp.minimum(first, last), last), last


@functools.partial(jax.jit, static_argnums=4)
def scores_gradient(cotangent, score, threshold, end, delay):
  """du_j = sum over the queries i in which j is fractional of dtau_i / |S_i|; all [n], scores by
  token.
  """
  n = score.shape[0]
  first, last = interval(
    Read(_reader(score), end=_reader(end), threshold=_reader(threshold)),
    varying_like(jnp.arange(n, dtype=jnp.int32), score),
    delay,
    n,
  )
  weight = (first < last).astype(jnp.int32)
  count = jnp.cumsum(
    jnp.zeros(n, jnp.int32).at[first].add(weight, mode="drop").at[last].add(-weight, mode="drop")
  )
  return interval_sums(jnp.where(count > 0, cotangent / jnp.maximum(count, 1), 0), first, last)


def add_exactly(a, b):
  """The sum of two (number, rounding error) pairs."""
  total = a[0] + b[0]
  part = total - a[0]
  return total, a[1] + b[1] + ((a[0] - (total - part)) + (b[0] - part))


def interval_sums(x, first, last):
  """sum of x[first_j : last_j] for every j, [n] each.

  It adds inside segments, and whole segments with their rounding errors, so that short intervals
  late in x stay accurate.
  """
  n = x.shape[0]
  x = jnp.pad(x, (0, SEGMENT - n % SEGMENT)).reshape(-1, SEGMENT)
  inside = jnp.pad(jnp.cumsum(x, axis=1), ((0, 0), (1, 0)))[:, :-1].reshape(-1)
  zero = varying_like(jnp.zeros(()), x)
  _, (total, error) = lax.scan(
    lambda before, x: (add_exactly(before, (x, 0.0)), before), (zero, zero), jnp.sum(x, axis=1)
  )
  (i, a, e), (j, b, f) = (
    (inside[at], total[at // SEGMENT], error[at // SEGMENT]) for at in (first, last)
  )
  return (j - i) + ((b - a) + (f - e))
