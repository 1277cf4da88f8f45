"""The walk through a tile that a staircase crosses, by a warp of the kernel walk of staircase.py:

  events at the tile's positions, tokens that enter in it --> inner: sums at the corners of its
      tiles, as those of all tiles: added by all lanes, then summed down columns and along rows
  a lane for an inner row   where the staircase is there --> found
  a lane for an inner tile  follows the staircase through it --> cuts, passes

`inner`, `found` and packed copies of the tile's events and tokens, unless it has too many, lie in
shared memory; the warp's lanes wait for each other between the steps. Cuts and passes are collected
there too, so that whole lines of global memory are written.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparsek.kernels import prefix_events, prefix_thresholds
from sparsek.kernels.hopper.common import Ref
from sparsek.kernels.hopper.staircase_sums import log2, weights
from sparsek.kernels.hopper.thread_ops import gather, scatter, scatter_row
from sparsek.kernels.hopper.thread_registers import warp_any
from sparsek.kernels.hopper.thread_sums import WARP
from sparsek.kernels.hopper.thread_sync import sync_warp
from sparsek.kernels.prefix_events import Problem, Tiling
from sparsek.kernels.prefix_thresholds import COUNT, NEEDS, UPPER, Tile

INNER = 16  # inner tiles along either side of a tile; a lane for each that a staircase can cross
SIDE = INNER + 1  # their corners
COPIED = 512  # the most queries of a tile whose events and tokens are copied to shared memory
EVENTS, TOKENS = 8, 4  # that a lane has in flight, at most
# Bits of a low digit and of a position in packed copies; numbers beyond all that a tile compares.
_DIGIT, _HALF_WORD = 12, 15
_LATE, _BEYOND = 2**18 - 1, 2**_HALF_WORD - 1
_SUMS_SIZE = max(map(len, NEEDS.values())) * SIDE**2


class Layout(NamedTuple):
  """Shared memory of a warp of the kernel walk: where its arrays begin.

  Attributes:
    inner: the sums at the corners of inner tiles, and an unused number for each lane; in their
      place, once they have been read, the cuts of queries.
    found: the inner columns where the staircase is, by inner row.
    events, tokens: packed copies of those of the tile, an array for each number, or none; see
      `_packed_event` and `_packed_token`. A search that counts needs no digits: it has the first
      queries that pass positions, or -1, in place of the first of `events`.
    size: of all.
  """

  inner: int
  found: int
  events: tuple[int, ...]
  tokens: tuple[int, ...]
  size: int


def layout_of(tiling: Tiling) -> Layout:
  """Returns the layout for these outer tiles."""
  sizes = [_SUMS_SIZE + WARP, SIDE]
  if tiling.block <= COPIED:
    sizes += [_events_size(tiling)] * 2 + [tiling.block] * 3
  begins = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
  return Layout(begins[0], begins[1], tuple(begins[2:-1][:2]), tuple(begins[4:-1]), begins[-1])


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
    scratch: shared memory, a `Layout` for each warp.
    which: the sums that are needed; the others are not in shared memory.
    read: of tokens and events.
  """

  problem: Problem
  outer: Tiling
  tile: Tile
  own: jax.Array
  scratch: Ref
  which: tuple[int, ...]
  read: prefix_events.Read

  @property
  def tiling(self) -> Tiling:
    """The inner tiles."""
    return Tiling(self.outer.block // INNER, INNER)

  @property
  def lane(self) -> jax.Array:
    """The lane's number in its warp."""
    return self.own & (WARP - 1)

  @property
  def bottom(self) -> jax.Array:
    """The first position."""
    return jnp.maximum(self.tile.bottom, 0)

  @property
  def layout(self) -> Layout:
    """The beginnings of the arrays in shared memory."""
    return layout_of(self.outer)

  @property
  def counts(self) -> bool:
    """Tells whether the search counts candidates only."""
    return self.which == (UPPER,)

  def _at(self, begin, index):
    """Returns where an element of the warp's array that begins there is."""
    return (self.own >> log2(WARP)) * self.layout.size + (begin + index)

  def _corner(self, number, line, column):
    """Returns the index of the number-th sum at an inner corner."""
    return self._at(self.layout.inner, (number * SIDE + line) * SIDE + column)

  def _put(self, line, column, values, there, atomic="add"):
    """Adds to the sums at an inner corner."""
    for number, which in enumerate(self.which):
      index = self._corner(number, line, column)
      scatter(self.scratch, index, values[which], there, atomic=atomic)

  def add(self, beyond: prefix_events.Row) -> None:
    """Makes the sums at all inner corners; `beyond` are those at the tile's last position."""
    zero = self.own - self.own
    for i in range(-(-_SUMS_SIZE // WARP)):
      index = self._at(self.layout.inner, self.lane + i * WARP)
      scatter(self.scratch, index, 0, self.own >= 0)
    sync_warp()
    self._put(zero, zero + INNER, dict(enumerate(beyond)), self.lane == 0, atomic=None)

    @pl.loop(0, -(-self.outer.block // (TOKENS * WARP)))
    def _(i):
      self._add_tokens(zero + i, self._read_tokens(zero + i))

    if self.layout.events:
      self._copy_events()
      sync_warp()
    self._add_events()
    sync_warp()
    self._sum_lines(lambda column: (0, column), SIDE)
    self._sum_lines(lambda line: (line, INNER), -1)

  def _copy_events(self):
    """Copies the events at the tile's positions, and the next one."""
    times = -(-(self.outer.width + 1) // WARP)
    batches = -(-times // EVENTS)
    each = -(-times // batches)

    @pl.loop(0, batches)
    def _(i):
      offsets = [(i * each + j) * WARP + self.lane for j in range(each)]
      for offset, event in zip(offsets, [self.read.event(self.bottom + x) for x in offsets]):
        there, index = offset <= self.outer.width, self._event_index(offset)
        high, rest = self._packed_event(event)
        for begin, value in zip(self.layout.events, (-1 if self.counts else high, rest)):
          scatter(self.scratch, self._at(begin, index), value, there)

  def _packed_event(self, event):
    """Returns an event's high digit, and the rest: the low digit, whether it is a lower event, and
    at which query of the tile it enters.
    """
    high, low, code, _ = event
    entry = jnp.clip((code >> 1) - self.tile.first, 0, _LATE)
    return high, (entry << (_DIGIT + 1)) + ((code & 1) << _DIGIT) + low

  def _unpacked_event(self, high, rest):
    """Returns the event, with an entry that compares with the tile's queries like its own."""
    code = (rest >> _DIGIT) + 2 * self.tile.first
    return high, rest & (2**_DIGIT - 1), code, rest - rest

  def _packed_token(self, token):
    """Returns a token's positions, counted from the one before the tile's first, and its digits."""
    upper, lower, high, low = token
    there = [jnp.clip(x - (self.bottom - 1), 0, _BEYOND) for x in (upper, lower)]
    return (there[0] << _HALF_WORD) + there[1], high, low

  def _unpacked_token(self, positions, high, low):
    """Returns the token, with positions that compare with the tile's like its own."""
    before = self.bottom - 1
    upper, lower = positions >> _HALF_WORD, positions & (2**_HALF_WORD - 1)
    return upper + before, lower + before, high, low

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
      added = weights(high, low, code & 1)
      return tuple(
        total + jnp.where(counts, added[which], 0) for total, which in zip(sums, self.which)
      )

    sums = lax.fori_loop(0, half, add, (zero,) * len(self.which))
    self._put(zero, self.lane >> 1, dict(zip(self.which, sums)), self.own >= 0)

  def _read_tokens(self, batch):
    """Reads a batch of the tokens that enter in the tile, TOKENS for each lane."""
    first = self.tile.first + 1 + self.lane
    count = min(TOKENS, -(-self.outer.block // WARP))
    queries = [first + (batch * TOKENS + j) * WARP for j in range(count)]
    return [self.read.token(prefix_thresholds.newcomer(self.problem, query)) for query in queries]

  def _add_tokens(self, batch, tokens):
    """Copies a batch of tokens that enter in the tile, and adds their events."""
    problem, block, inner = self.problem, self.outer.block, self.tiling
    zero = self.own - self.own
    for j, row in enumerate(tokens):
      offset = (batch * TOKENS + j) * WARP + self.lane
      token = prefix_thresholds.newcomer(problem, self.tile.first + 1 + offset)
      upper, lower, high, low = row
      for begin, value in zip(self.layout.tokens, self._packed_token(row)):
        scatter(self.scratch, self._at(begin, offset), value, offset < block)
      line = (offset >> log2(inner.block)) + 1
      inside = (offset < block) & (token >= 0) & (token < problem.n) & (upper >= 0)
      for position, is_lower in ((upper, 0), (lower, 1)):
        if is_lower and self.counts:
          continue
        added = weights(high - is_lower * 2**problem.bits, low, zero + is_lower)
        column = jnp.minimum((position - self.bottom) >> log2(inner.width), INNER)
        self._put(line, column, added, inside & (position >= self.bottom))

  def _sum_lines(self, start, advance):
    """Makes prefix sums along all lines of corners: a lane for a line and sum.

    Args:
      start: function from the number of a line to (line, column) of its first corner.
      advance: how far apart its corners are.
    """
    lines = len(self.which) * SIDE
    unused = self._at(self.layout.inner, _SUMS_SIZE + self.lane)
    for begin in range(0, lines, WARP):
      there = self.lane + begin < lines
      line = jnp.minimum(self.lane + begin, lines - 1)
      number, line = lax.div(line, jnp.int32(SIDE)), lax.rem(line, jnp.int32(SIDE))
      first = self._corner(number, *start(line))
      indices = [jnp.where(there, first + step * advance, unused) for step in range(SIDE)]
      total = line - line
      for index, value in zip(indices, [gather(self.scratch, index) for index in indices]):
        total += value
        scatter(self.scratch, index, total, self.own >= 0)
    sync_warp()

  def _sums(self, line, column):
    """Returns the sums at an inner corner, in the order of `which`."""
    return [
      gather(self.scratch, self._corner(number, line, column)) for number in range(len(self.which))
    ]

  def _event_index(self, offset):
    """Returns where the copy of an event of the tile is."""
    offset = jnp.clip(offset, 0, self.outer.width)
    inner = offset >> log2(self.tiling.width)
    return offset + inner

  def _copies(self):
    """Returns `read`, of the copies in shared memory if there are any."""
    if not self.layout.events:
      return self.read

    def copied(begins, index):
      return [gather(self.scratch, self._at(begin, index)) for begin in begins]

    def event(position):
      index = self._event_index(position - self.bottom)
      return self._unpacked_event(*copied(self.layout.events, index))

    def token(token):
      first = prefix_thresholds.newcomer(self.problem, self.tile.first + 1)
      index = jnp.clip(token - first, 0, self.outer.block - 1)
      return self._unpacked_token(*copied(self.layout.tokens, index))

    return prefix_events.Read(event=event, token=token)

  def walk(
    self,
    over: prefix_thresholds.Over,
    record: Callable[[prefix_thresholds.Step], None],
    begin: Callable[[], None] = lambda: None,
  ) -> None:
    """Finds the inner tiles that the staircase crosses, and follows it through them. Calls `begin`
    when the sums at corners have been read, and `record` with each step.
    """
    problem, tiling, read = self.problem, self.tiling, self._copies()
    line = jnp.minimum(self.lane, INNER)

    def not_over(column):
      sums = dict(zip(self.which, self._sums(line, column)))
      position = self.bottom + column * tiling.width
      is_over = over(problem, sums, read.event(position)) & (position < 2 * problem.n)
      return prefix_thresholds.logical_not(is_over)

    (columns,) = prefix_thresholds.bisect(INNER, (line - line, line - line + INNER, not_over))
    found = functools.partial(self._at, self.layout.found)
    scatter(self.scratch, found(line), columns, self.lane <= INNER)
    sync_warp()

    inner = prefix_thresholds.tile_of(
      tiling, lambda line: gather(self.scratch, found(jnp.clip(line, 0, INNER))), self.lane
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
    begin()

    def walk_on(state):
      state, at = step(state, read)
      record(at)
      return state

    lax.while_loop(lambda state: warp_any(state[0] < tile.end), walk_on, state)

  def walk_and_cut(self, over: prefix_thresholds.Over, cuts: Ref) -> None:
    """Walks, and writes the cut of each query: at once, and not step by step, where the cuts fit in
    place of the sums at corners.
    """
    n, block, part = self.problem.n, self.outer.block, self.outer.block + INNER
    first = self.tile.first + 1

    def values_at(step):
      missing = prefix_thresholds.missing(self.problem, step.sums, step.event)
      return step.position, *missing, step.sums[COUNT]

    if 3 * part > _SUMS_SIZE:
      self.walk(
        over,
        lambda step: scatter_row(cuts, step.query, values_at(step), step.cuts & (step.query < n)),
      )
      return

    def place(number, offset):
      # lanes of different inner rows use different banks
      offset += offset >> log2(self.tiling.block)
      return self._at(self.layout.inner, number * part + offset)

    def begin():
      sync_warp()
      for i in range(-(-part // WARP)):
        index = self._at(self.layout.inner, i * WARP + self.lane)
        scatter(self.scratch, index, -1, i * WARP + self.lane < part)
      sync_warp()

    def record(step):
      position, whole, remainder, count = values_at(step)
      packed = ((position - self.bottom) << _DIGIT) + remainder
      for number, value in enumerate((packed, whole, count)):
        scatter(self.scratch, place(number, step.query - first), value, step.cuts)

    self.walk(over, record, begin)
    sync_warp()

    @pl.loop(0, -(-block // WARP))
    def _(i):
      offset = i * WARP + self.lane
      packed, whole, count = (
        gather(self.scratch, place(number, jnp.minimum(offset, block - 1))) for number in range(3)
      )
      there = (packed >= 0) & (offset < block) & (first + offset < n)
      cut = self.bottom + (packed >> _DIGIT), whole, packed & (2**_DIGIT - 1), count
      scatter_row(cuts, first + offset, cut, there)

  def walk_and_pass(self, over: prefix_thresholds.Over, passed: Ref) -> None:
    """Walks, and writes the first query that passes each position: at once, and not step by step,
    where it fits in shared memory.
    """
    if not self.layout.events:
      self.walk(over, lambda step: scatter(passed, step.position, step.query, step.passes))
      return

    def place(offset):
      return self._at(self.layout.events[0], self._event_index(offset))

    self.walk(
      over,
      lambda step: scatter(
        self.scratch, place(step.position - self.bottom), step.query, step.passes
      ),
    )
    sync_warp()

    @pl.loop(0, -(-self.outer.width // WARP))
    def _(i):
      offset = i * WARP + self.lane
      query = gather(self.scratch, place(offset))
      scatter(passed, self.bottom + offset, query, (query >= 0) & (offset < self.outer.width))
