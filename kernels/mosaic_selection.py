"""Thresholds and expiry on GPUs: the steps of staircase.py in Pallas Mosaic kernels, one rank, tile or column of tiles to a thread."""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from . import staircase
from .mosaic_lanes import kernel, reader, scatter, scatter_row
from .staircase import COUNT, NEEDS, SEGMENT
from .varying import over_batch, varying_like

AT_ONCE = 8                      # loads that a scan has under way


def _over_rows(f, *args):
  """f, which takes and returns [rows, ...], of [batch, heads, ...] arrays; [batch, ...] ones it gets as they are."""
  def flat(*args):
    shape = args[0].shape[:2]
    out = f(*(x if x.ndim < args[0].ndim else x.reshape(-1, *x.shape[2:]) for x in args))
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), out)
  return jax.tree.map(lambda x: varying_like(x, args[0]), over_batch(flat, *args))        # kernels forget it


def solve(problem, score, entry, order, start):
  """As `staircase.solve`, of [batch, heads, n] arrays and start [batch, n]."""
  return _over_rows(functools.partial(_solve, problem), score, entry, order, start)


def scores_gradient(cotangent, score, threshold, end, delay):
  """As `staircase.scores_gradient`, of [batch, heads, n] arrays and end [batch, n]."""
  return _over_rows(functools.partial(_scores_gradient, delay), cotangent, score, threshold, end)


@functools.partial(jax.jit, static_argnums=0)
def _solve(problem, score, entry, order, start):
  rows, n = score.shape
  heads, blocks = rows // start.shape[0], problem.blocks
  corner = lambda row, column: row * (blocks + 1) + column
  new = lambda *shape, fill=0, dtype=jnp.int32: jax.new_ref(jnp.full((rows, *shape), fill, dtype))
  tokens, events, found = new(n, 4), new(2 * n, 4), new(n, 4)
  corners, columns = new(staircase.SUMS, (blocks + 1) ** 2), new(len(NEEDS), blocks + 1)
  tau, passed, expiry = new(n, fill=jnp.nan, dtype=jnp.float32), new(2 * n, fill=n), new(n)

  def enter(row, _, lane, score, entry, order, start, tokens, events, corners):
    inside = lane < n
    entry, token = (reader(ref, row)(lane) for ref in (entry, order))
    placed = staircase.place(problem, staircase.Read(reader(score, row), reader(start, row // heads)), lane, entry)
    scatter_row(tokens.at[row], token, placed.token, inside)
    scatter_row(events.at[row], placed.upper, placed.upper_event, inside)
    scatter_row(events.at[row], placed.lower, placed.lower_event, inside)
    for line, column, weights in staircase.enter(problem, placed, entry):
      for which, weight in weights.items():
        scatter(corners.at[row, which], corner(line, column), weight, inside & (line <= blocks), add=True)
  kernel(enter, rows, n, name="enter")(score, entry, order, start, tokens, events, corners)

  def add_up(row, which, lane, corners, *, along, across, backward):
    def go(i, total):
      places = [lane - lane + (i * AT_ONCE + j) for j in range(AT_ONCE)]
      index = [(blocks - place if backward else place) * along + lane * across for place in places]
      values = [reader(corners, row, which)(x) for x in index]
      for place, x, value in zip(places, index, values):
        total = total + value                              # what lies beyond the last place is not stored
        scatter(corners.at[row, which], x, total, (lane <= blocks) & (place <= blocks))
      return total
    lax.fori_loop(0, -(-(blocks + 1) // AT_ONCE), go, lane - lane)
  for options in (dict(along=corner(1, 0), across=1, backward=False), dict(along=1, across=corner(1, 0), backward=True)):
    kernel(functools.partial(add_up, **options), rows, blocks + 1, staircase.SUMS, name="add_up")(corners)

  def find_columns(row, which, line, events, corners, columns):
    for number, over in enumerate(NEEDS):
      @pl.when(which == number)
      def _():
        def not_over(column):
          sums = {i: reader(corners, row, i)(corner(line, column)) for i in NEEDS[over]}
          position = column * problem.width
          return staircase.no(over(problem, sums, reader(events, row)(position)) & (position < 2 * n))
        value = staircase.bisect(line - line, line - line + blocks, not_over, blocks)
        scatter(columns.at[row, number], line, value, line <= blocks)
  kernel(find_columns, rows, blocks + 1, len(NEEDS), name="columns")(events, corners, columns)

  def walk(row, which, cell, tokens, events, corners, columns, found, passed):
    def record_cut(step):
      values = step.position, *staircase.missing(problem, step.sums, step.event), step.sums[COUNT]
      scatter_row(found.at[row], step.query, values, step.cuts & (step.query < n))

    record = {staircase.gates_over: record_cut, staircase.number_over: lambda step: scatter(passed.at[row], step.position, step.query, step.passes)}
    for number, over in enumerate(NEEDS):
      @pl.when(which == number)
      def _():
        tile = staircase.tile_of(problem, reader(columns, row, number), cell)
        sums = [reader(corners, row, i)(corner(tile.row, tile.column)) for i in NEEDS[over]]
        state, step = staircase.walk(problem, staircase.Read(token=reader(tokens, row), event=reader(events, row)), tile, over, NEEDS[over], sums)
        def go(_, state):
          state, at = step(state)
          record[over](at)
          return state
        lax.fori_loop(0, problem.steps, go, state)
  kernel(walk, rows, problem.cells, len(NEEDS), name="walk")(tokens, events, corners, columns, found, passed)

  def finish(row, _, lane, start, tokens, events, found, passed, tau, expiry):
    own = staircase.Read(start=reader(start, row // heads), token=reader(tokens, row), event=reader(events, row), found=reader(found, row))
    scatter(tau.at[row], lane, staircase.threshold(problem, own, lane), lane < n)
    upper = own.token(lane)[0]
    scatter(expiry.at[row], lane, reader(passed, row)(upper), (lane < n) & (upper >= 0))
  kernel(finish, rows, n, name="finish")(start, tokens, events, found, passed, tau, expiry)
  return tau[...], expiry[...]


@functools.partial(jax.jit, static_argnums=0)
def _scores_gradient(delay, cotangent, score, threshold, end):
  rows, n = score.shape
  heads, segments = rows // end.shape[0], -(-n // SEGMENT)
  new = lambda size, dtype: jax.new_ref(jnp.zeros((rows, size), dtype))
  first, last, change, out = new(n, jnp.int32), new(n, jnp.int32), new(n + 1, jnp.int32), new(n, jnp.float32)
  changes, total, error, prefix, shares = new(segments + 1, jnp.int32), *(new(size, jnp.float32) for size in (segments + 1, segments + 1, n + 1, segments))

  def find_intervals(row, _, token, score, threshold, end, first, last, change, changes):
    own = staircase.Read(reader(score, row), end=reader(end, row // heads), threshold=reader(threshold, row))
    ends = staircase.interval(own, token, delay, n)
    for ref, at, weight in zip((first, last), ends, (1, -1)):
      scatter(ref.at[row], token, at, token < n)
      there = (token < n) & (ends[0] < ends[1])
      scatter(change.at[row], at, weight, there, add=True)
      scatter(changes.at[row], at // SEGMENT, weight, there, add=True)
  kernel(find_intervals, rows, n, name="intervals")(score, threshold, end, first, last, change, changes)

  def sums_before(ref, row, segment, join, zero):
    """What `join` makes of all earlier segments, AT_ONCE loads at a time."""
    def go(i, state):
      places = [i * AT_ONCE + j for j in range(AT_ONCE)]
      for place, value in zip(places, [ref[row, jnp.minimum(place, segments - 1)] for place in places]):
        state = join(state, jnp.where(place < segment, value, 0))
      return state
    return lax.fori_loop(0, -(-segments // AT_ONCE), go, zero)

  def share(row, _, segment, cotangent, change, changes, prefix, shares):
    """dtau_i / |S_i| and its sums from the start of each segment on."""
    def go(i, state):
      count, total = state
      queries = [segment * SEGMENT + (i * AT_ONCE + j) for j in range(AT_ONCE)]
      loads = [(query, reader(change, row)(query), reader(cotangent, row)(query)) for query in queries]
      for query, difference, gradient in loads:
        count += difference
        scatter(prefix.at[row], query, total, query <= n)
        total += jnp.where((count > 0) & (query < n), gradient / jnp.maximum(count, 1).astype(jnp.float32), 0.)
      return count, total
    count = sums_before(changes, row, segment, jnp.add, segment - segment)
    _, total = lax.fori_loop(0, SEGMENT // AT_ONCE, go, (count, (segment - segment).astype(jnp.float32)))
    scatter(shares.at[row], segment, total, segment < segments)
  kernel(share, rows, segments, name="shares")(cotangent, change, changes, prefix, shares)

  def add_segments(row, _, segment, shares, total, error):
    sums = sums_before(shares, row, segment, lambda state, x: staircase.add_exactly(state, (x, 0.)), ((segment - segment).astype(jnp.float32),) * 2)
    for ref, value in zip((total, error), sums):
      scatter(ref.at[row], segment, value, segment <= segments)
  kernel(add_segments, rows, segments + 1, name="segments")(shares, total, error)

  def gradients(row, _, token, first, last, prefix, total, error, out):
    ends = [reader(ref, row)(token) for ref in (first, last)]
    inside, whole, rest = ([reader(ref, row)(end // size) for end in ends] for ref, size in ((prefix, 1), (total, SEGMENT), (error, SEGMENT)))
    value = (inside[1] - inside[0]) + ((whole[1] - whole[0]) + (rest[1] - rest[0]))
    scatter(out.at[row], token, value, token < n)
  kernel(gradients, rows, n, name="gradients")(first, last, prefix, total, error, out)
  return out[...]
