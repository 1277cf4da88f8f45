"""Events of tokens, in the order of their positions: step 1 of kernels/prefix_thresholds.py."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels.bisection import bisect, bisect_near, logical_not
from sparsek.kernels.fixed_point import fixed_point, minus_one
from sparsek.kernels.sentinels import NEVER_ENTERS
from sparsek.kernels.sort_keys import LARGEST

Row = tuple[jax.Array, ...]  # four int32 arrays


class Tiling(NamedTuple):
  """A plane in tiles.

  Attributes:
    block: queries of a tile, half its positions: a power of two.
    blocks: tiles along either side.
  """

  block: int
  blocks: int

  @property
  def width(self) -> int:
    """Positions of a tile."""
    return 2 * self.block

  @property
  def cells(self) -> int:
    """The most tiles that a staircase can cross."""
    return 2 * self.blocks

  @property
  def steps(self) -> int:
    """The most steps of a walk through a tile: one for each of its queries and positions, one to
    begin and one to end.
    """
    return self.block + self.width + 2


class Problem(NamedTuple):
  """The sizes that the steps depend on.

  Attributes:
    n: tokens of the row.
    k: budget.
    delay: queries from a token to the first that may select it.
    packed: whether there may be several documents.
  """

  n: int
  k: int
  delay: int
  packed: bool

  @property
  def bits(self) -> int:
    """Binary places of one digit of a score; n * 2^bits must fit an int32."""
    return min(12, 30 - math.ceil(math.log2(max(self.n, 2))))

  @property
  def tiling(self) -> Tiling:
    """Tiles of a power of two of queries, such that there are n to 4 n tiles and a walk is
    O(sqrt n) steps.
    """
    block = 2 ** max(3, ((self.n - 1).bit_length() + 1) // 2 - 1)
    return Tiling(block, -(-self.n // block))


def _absent(index: jax.Array) -> Any:
  raise NotImplementedError("a step reads an array that it was not given")


class Read(NamedTuple):
  """Functions index -> element, or tuple of four; indices outside give anything.

  Attributes:
    score: by rank or by token, as the step says.
    start: first token of a token's document, or of its rank's, which is the same.
    end: one past the last token of a token's document.
    threshold: by query.
    token: by token, four int32: positions of its upper and lower event, -1 if it is never a
      candidate; high and low digit of its score.
    event: by position, four int32: high and low digit of its value; 2 entry (the query at which the
      token enters, or NEVER_ENTERS), + 1 for a lower event; bits of the value as a float.
    cut: by query, four int32: its cut; the two results of `missing` there; the number of fractional
      gates.
  """

  score: Callable[[jax.Array], jax.Array] = _absent
  start: Callable[[jax.Array], jax.Array] = _absent
  end: Callable[[jax.Array], jax.Array] = _absent
  threshold: Callable[[jax.Array], jax.Array] = _absent
  token: Callable[[jax.Array], Row] = _absent
  event: Callable[[jax.Array], Row] = _absent
  cut: Callable[[jax.Array], Row] = _absent


def entering(
  problem: Problem, score: jax.Array, token: jax.Array, end: Any
) -> tuple[jax.Array, jax.Array]:
  """Returns a token's score as a finite number, and the query at which it becomes a candidate, or
  NEVER_ENTERS.

  Args:
    problem: sizes.
    score: -inf where the token is not a candidate.
    token: its number.
    end: one past the last token of its document.
  """
  query = token + problem.delay
  there = (score > -jnp.inf) & (query < end)
  return jnp.maximum(score, -LARGEST), jnp.where(there, query, NEVER_ENTERS)


class Located(NamedTuple):
  """A rank's events.

  Attributes:
    upper, lower: their positions.
    upper_event, lower_event: their rows of `Read.event`.
    token: the row of `Read.token` of the rank's token.
  """

  upper: jax.Array
  lower: jax.Array
  upper_event: Row
  lower_event: Row
  token: Row


def event_rows(problem: Problem, score: jax.Array, entry: jax.Array) -> tuple[Row, Row]:
  """Returns the rows of `Read.event` of the upper and the lower event of a token with that score,
  which enters at `entry`.
  """
  whole, fraction = fixed_point(score, problem.bits)
  high, low = (whole << problem.bits) + (fraction >> problem.bits), fraction & (2**problem.bits - 1)
  bits = lambda x: lax.bitcast_convert_type(x, jnp.int32)
  return (
    (high, low, 2 * entry, bits(score)),
    (high - 2**problem.bits, low, 2 * entry + 1, bits(minus_one(score))),
  )


def locate_events(
  problem: Problem,
  read: Read,
  rank: jax.Array,
  entry: jax.Array,
  any_lane: Callable[[jax.Array], jax.Array] | None = None,
) -> Located:
  """Locates the events of a rank's token, which enters at `entry`; `read` is by rank. With
  `any_lane`, see `bisect_near`, they are first located by floats, which is faster.
  """
  score = read.score(rank)
  whole, fraction = fixed_point(score, problem.bits)
  document = read.start(rank) if problem.packed else 0

  def lower_first(a, b):
    """Tells whether the lower event of a comes before the upper event of b, of rank at most a's.

    Each is (whole, fraction, score, document).
    """
    # Fixed point rounds down, floats to the nearest. Both are monotone, so an order by the one and
    # then by the other agrees with both; an order by one alone might not.
    tie = (a[0] - 1 == b[0]) & ((a[1] < b[1]) | ((a[1] == b[1]) & (minus_one(a[2]) <= b[2])))
    first = (a[0] - 1 < b[0]) | tie
    return first & (a[3] == b[3]) if problem.packed else first

  def other(rank):
    score = read.score(rank)
    return *fixed_point(score, problem.bits), score, read.start(rank) if problem.packed else 0

  this = whole, fraction, score, document
  ends = (rank - rank, rank), (rank, rank - rank + problem.n)
  searches = (
    (*ends[0], lambda x: lower_first(this, other(x))),
    (*ends[1], lambda x: logical_not(lower_first(other(x), this))),
  )
  if any_lane is None:
    before_lower, before_upper = bisect(problem.n, *searches)
  else:
    same = lambda x: read.start(x) == document if problem.packed else jnp.array(True)
    below = minus_one(score)
    guesses = bisect(
      problem.n,
      (*ends[0], lambda x: (below <= read.score(x)) & same(x)),
      (*ends[1], lambda x: logical_not((read.score(x) - 1 <= score) & same(x))),
    )
    before_lower, before_upper = bisect_near(problem.n, guesses, any_lane, *searches)
  upper, lower = rank + before_upper, rank + before_lower
  upper_event, lower_event = event_rows(problem, score, entry)
  if_candidate = lambda x: jnp.where(entry < NEVER_ENTERS, x, -1)
  token = if_candidate(upper), if_candidate(lower), *upper_event[:2]
  return Located(upper, lower, upper_event, lower_event, token)
