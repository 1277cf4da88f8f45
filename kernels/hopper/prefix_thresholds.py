"""Thresholds and expiry on GPUs: the steps of prefix_thresholds.py in Pallas Mosaic kernels, one
rank, tile or column of tiles to a thread.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparsek.kernels import prefix_thresholds, threshold_gradients
from sparsek.kernels.hopper.thread_ops import (
  add_row,
  contents,
  gather_bytes,
  gather_row,
  kernel,
  reader,
  scatter,
  scatter_bytes,
  scatter_row,
  sums_of,
)
from sparsek.kernels.prefix_thresholds import COUNT, NEEDS
from sparsek.kernels.threshold_gradients import SEGMENT
from sparsek.kernels.varying import over_batch, varying_like

AT_ONCE = 16  # loads that a scan has under way
PARTS = 8  # of a row, that are sorted each on their own
AHEAD = 4  # steps of a walk whose loads are under way together


def _over_rows(f, *args):
  """f, which takes and returns [rows, ...], of [batch, heads, ...] arrays; [batch, ...] ones it
  gets as they are.
  """

  def flat(*args):
    shape = args[0].shape[:2]
    out = f(*(x if x.ndim < args[0].ndim else x.reshape(-1, *x.shape[2:]) for x in args))
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), out)

  # kernels forget it
  return jax.tree.map(lambda x: varying_like(x, args[0]), over_batch(flat, *args))


def sort(key):
  """(keys in order, their tokens) by key, then later token first; [batch, heads, n] each, keys
  uint32 below 2^32 - 1.
  """
  return _over_rows(_sort, key)


def solve(problem, score, entry, order, start, scores):
  """As `prefix_thresholds.solve`, of [batch, heads, n] arrays and start [batch, n]; thresholds are
  NaN from where a NaN of `scores`, by token, may enter.
  """
  return _over_rows(functools.partial(_solve, problem), score, entry, order, start, scores)


def scores_gradient(cotangent, score, threshold, end, delay):
  """As `threshold_gradients.scores_gradient`, of [batch, heads, n] arrays and end [batch, n]."""
  return _over_rows(functools.partial(_scores_gradient, delay), cotangent, score, threshold, end)


@jax.jit
def _sort(key):
  """Sorts parts of the rows; an element's place is the number of those before it in each part."""
  rows, n = key.shape
  size = -(-n // PARTS)
  sign = jnp.uint32(2**31)
  parts = jnp.pad(
    lax.bitcast_convert_type(key ^ sign, jnp.int32),
    ((0, 0), (0, PARTS * size - n)),
    constant_values=2**31 - 1,
  ).reshape(rows, PARTS, size)
  from_end = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[::-1], parts.shape)
  # to be stable, a GPU would move a third array
  parts, from_end = lax.sort((parts, from_end), num_keys=2, is_stable=False)

  def merge(row, _, lane, parts, from_end, ranked, order):
    value, own = reader(parts, row)(lane), lane // size

    def before(step):
      """How many elements of another part come before."""
      part = (own + step) % PARTS

      def after(place):
        other = reader(parts, row)(part * size + place)
        return (other > value) | ((other == value) & (own > part))

      return lane - lane, lane - lane + size, after

    rank = sum(prefix_thresholds.bisect(size, *map(before, range(1, PARTS))), lane - own * size)
    inside = (lane < PARTS * size) & (rank < n)
    scatter(ranked.at[row], rank, value, inside)
    scatter(order.at[row], rank, own * size + size - 1 - reader(from_end, row)(lane), inside)

  shape = jax.ShapeDtypeStruct((rows, n), jnp.int32)
  ranked, order = kernel(merge, rows, PARTS * size, name="merge", out_type=[shape] * 2)(
    parts.reshape(rows, -1), from_end.reshape(rows, -1)
  )
  return lax.bitcast_convert_type(ranked, jnp.uint32) ^ sign, order


@functools.partial(jax.jit, static_argnums=0)
def _solve(problem, score, entry, order, start, scores):
  rows, n = score.shape
  heads, blocks = rows // start.shape[0], problem.blocks
  corner = lambda row, column: row * (blocks + 1) + column
  # of the four sums
  corner_reader = lambda corners, row: (
    lambda index: gather_row(corners.at[row], jnp.clip(index, 0, (blocks + 1) ** 2 - 1))
  )
  filled = lambda *shape, fill=0: jax.new_ref(jnp.full((rows, *shape), fill, jnp.int32))
  new = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct((rows, *shape), dtype)
  corners, first_nan = filled(4 * (blocks + 1) ** 2), filled(n, fill=n)

  def enter(
    row, _, lane, score, entry, order, start, scores, corners, first_nan, tokens, events, passed
  ):
    inside = lane < n
    value, first = reader(scores, row)(lane), reader(start, row // heads)(lane)
    scatter(first_nan.at[row], first, lane, inside & (value != value), atomic="min")
    entry, token = (reader(ref, row)(lane) for ref in (entry, order))
    placed = prefix_thresholds.locate_events(
      problem, prefix_thresholds.Read(reader(score, row), reader(start, row // heads)), lane, entry
    )
    scatter_row(tokens.at[row], token, placed.token, inside)
    for position, event in ((placed.upper, placed.upper_event), (placed.lower, placed.lower_event)):
      scatter_row(events.at[row], position, event, inside)
      scatter(passed.at[row], position, n, inside)  # never, until a walk says otherwise
    for line, column, weights in prefix_thresholds.enter(problem, placed, entry):
      add_row(
        corners.at[row],
        corner(line, column),
        [weights.get(i, 0) for i in range(4)],
        inside & (line <= blocks),
      )

  out = [new(n, 4), new(2 * n, 4), new(2 * n)]
  tokens, events, passed = kernel(enter, rows, n, name="enter", out_type=out)(
    score, entry, order, start, scores, corners, first_nan
  )
  passed = jax.new_ref(passed)

  def add_rows(row, _, column, corners):
    read = corner_reader(corners, row)

    def go(i, total):
      lines = [i * AT_ONCE + j for j in range(AT_ONCE)]
      for line, sums in zip(lines, [sums_of(read(corner(line, column))) for line in lines]):
        total = tuple(x + y for x, y in zip(total, sums))
        scatter_row(
          corners.at[row], corner(line, column), total, (line <= blocks) & (column <= blocks)
        )
      return total

    lax.fori_loop(0, -(-(blocks + 1) // AT_ONCE), go, (column - column,) * 4)

  kernel(add_rows, rows, blocks + 1, name="add_rows")(corners)

  def add_columns(row, _, lane, corners):
    line, which = lane // 4, lane % 4  # neighbours read neighbouring sums

    def go(i, total):
      columns = [blocks - (i * AT_ONCE + j) for j in range(AT_ONCE)]
      places = [4 * corner(line, column) + which for column in columns]
      for column, place, value in zip(
        columns, places, [reader(corners, row)(place) for place in places]
      ):
        total += value
        scatter(corners.at[row], place, total, (line <= blocks) & (column >= 0))
      return total

    lax.fori_loop(0, -(-(blocks + 1) // AT_ONCE), go, line - line)

  kernel(add_columns, rows, 4 * (blocks + 1), name="add_columns")(corners)

  def find_columns(row, which, line, events, corners, columns):
    for number, over in enumerate(NEEDS):

      @pl.when(which == number)
      def _():
        def not_over(column):
          sums = corner_reader(corners, row)(corner(line, column))
          position = column * problem.width
          return prefix_thresholds.logical_not(
            over(problem, sums, reader(events, row)(position)) & (position < 2 * n)
          )

        (value,) = prefix_thresholds.bisect(blocks, (line - line, line - line + blocks, not_over))
        scatter(columns.at[row, number], line, value, line <= blocks)

  (columns,) = kernel(
    find_columns,
    rows,
    blocks + 1,
    len(NEEDS),
    name="columns",
    out_type=[new(len(NEEDS), blocks + 1)],
  )(events, corners)

  def ahead(read, first):
    """`read`, from loads of the rows first to first + AHEAD - 1."""
    rows = [read(first + i) for i in range(AHEAD)]

    def near(index):
      found = rows[0]
      for i, row in enumerate(rows[1:], 1):
        found = tuple(jnp.where(index - first >= i, new, old) for new, old in zip(row, found))
      return found

    return near

  def walk(row, which, cell, tokens, events, corners, columns, passed, found):
    def record_cut(step):
      values = (
        step.position,
        *prefix_thresholds.missing(problem, step.sums, step.event),
        step.sums[COUNT],
      )
      scatter_row(found.at[row], step.query, values, step.cuts & (step.query < n))

    record = {
      prefix_thresholds.gates_over: record_cut,
      prefix_thresholds.number_over: lambda step: scatter(
        passed.at[row], step.position, step.query, step.passes
      ),
    }
    for number, over in enumerate(NEEDS):

      @pl.when(which == number)
      def _():
        tile = prefix_thresholds.tile_of(problem, reader(columns, row, number), cell)
        sums = corner_reader(corners, row)(corner(tile.row, tile.column))
        sums = [sums[i] for i in NEEDS[over]]
        read = prefix_thresholds.Read(token=reader(tokens, row), event=reader(events, row))
        state, step = prefix_thresholds.walk(problem, read, tile, over, NEEDS[over], sums)

        def go(_, state):
          query, position, *_ = state
          near = prefix_thresholds.Read(
            token=ahead(read.token, prefix_thresholds.newcomer(problem, query + 2)),
            event=ahead(read.event, position + 1),
          )
          for _ in range(AHEAD):
            state, at = step(state, near)
            record[over](at)
          return state

        lax.fori_loop(0, -(-problem.steps // AHEAD), go, state)

  (found,) = kernel(walk, rows, problem.cells, len(NEEDS), name="walk", out_type=[new(n, 4)])(
    tokens, events, corners, columns, passed
  )

  def finish(row, _, query, start, tokens, events, found, passed, first_nan, tau, expiry):
    own = prefix_thresholds.Read(
      start=reader(start, row // heads),
      token=reader(tokens, row),
      event=reader(events, row),
      cut=reader(found, row),
    )
    value = prefix_thresholds.threshold(problem, own, query)
    spoilt = query - problem.delay >= reader(first_nan, row)(own.start(query))
    scatter(tau.at[row], query, jnp.where(spoilt, jnp.nan, value), query < n)
    upper = own.token(query)[0]  # of the token of that number
    scatter(expiry.at[row], query, jnp.where(upper >= 0, reader(passed, row)(upper), 0), query < n)

  out = [new(n, dtype=jnp.float32), new(n)]
  return tuple(
    kernel(finish, rows, n, name="finish", out_type=out)(
      start, tokens, events, found, passed, first_nan
    )
  )


@functools.partial(jax.jit, static_argnums=0)
def _scores_gradient(delay, cotangent, score, threshold, end):
  rows, n = score.shape
  heads, segments = rows // end.shape[0], n // SEGMENT + 1  # of 0 to n
  new = lambda size, dtype=jnp.float32: jax.ShapeDtypeStruct((rows, size), dtype)
  whole = -(-(n + 1) // 4) * 4  # numbers are moved 16 bytes at a time
  change, changes = (jax.new_ref(jnp.zeros((rows, size), jnp.int32)) for size in (whole, segments))

  def find_intervals(row, _, token, score, threshold, end, change, changes, first, last):
    own = prefix_thresholds.Read(
      reader(score, row), end=reader(end, row // heads), threshold=reader(threshold, row)
    )
    ends = threshold_gradients.interval(own, token, delay, n)
    for ref, at, weight in zip((first, last), ends, (1, -1)):
      scatter(ref.at[row], token, at, token < n)
      there = (token < n) & (ends[0] < ends[1])
      scatter(change.at[row], at, weight, there, atomic="add")
      scatter(changes.at[row], at // SEGMENT, weight, there, atomic="add")

  first, last = kernel(find_intervals, rows, n, name="intervals", out_type=[new(n, jnp.int32)] * 2)(
    score, threshold, end, change, changes
  )
  (changes,) = contents(changes)
  counts = jnp.cumsum(changes, axis=1) - changes  # before every segment

  def share(row, _, segment, cotangent, change, counts, prefix, shares):
    """dtau_i / |S_i| and its sums from the start of each segment on."""

    def go(i, state):
      count, total = state
      queries = [segment * SEGMENT + (i * AT_ONCE + j) for j in range(0, AT_ONCE, 4)]
      four = lambda ref, query: gather_bytes(
        ref.at[row], jnp.minimum(query, ref.shape[-1] - 4), 0, 1
      )
      for query, differences, gradients in [
        (query, four(change, query), four(cotangent, query)) for query in queries
      ]:
        sums = []
        for j in range(4):
          count += differences[j]
          sums.append(lax.bitcast_convert_type(total, jnp.int32))
          gradient = lax.bitcast_convert_type(gradients[j], jnp.float32)
          total += jnp.where(
            (count > 0) & (query + j < n), gradient / jnp.maximum(count, 1).astype(jnp.float32), 0.0
          )
        scatter_bytes(prefix.at[row], query, 0, 1, sums, query <= n)
      return count, total

    _, total = lax.fori_loop(
      0,
      SEGMENT // AT_ONCE,
      go,
      (reader(counts, row)(segment), (segment - segment).astype(jnp.float32)),
    )
    scatter(shares.at[row], segment, total, segment < segments)

  prefix, shares = kernel(
    share, rows, segments, name="shares", out_type=[new(whole), new(segments)]
  )(jnp.pad(cotangent, ((0, 0), (0, -n % 4))), change, counts)

  def add_segments(row, _, segment, shares, total, error):
    """The sum of all earlier segments, and its rounding error."""

    def go(i, state):
      places = [i * AT_ONCE + j for j in range(AT_ONCE)]
      for place, value in zip(
        places, [shares[row, jnp.minimum(place, segments - 1)] for place in places]
      ):
        state = threshold_gradients.add_exactly(
          state, (jnp.where(place < segment, value, 0.0), 0.0)
        )
      return state

    sums = lax.fori_loop(
      0, -(-segments // AT_ONCE), go, ((segment - segment).astype(jnp.float32),) * 2
    )
    for ref, value in zip((total, error), sums):
      scatter(ref.at[row], segment, value, segment < segments)

  total, error = kernel(
    add_segments, rows, segments, name="segments", out_type=[new(segments)] * 2
  )(shares)

  def gradients(row, _, token, first, last, prefix, total, error, out):
    ends = [reader(ref, row)(token) for ref in (first, last)]
    inside, whole, rest = (
      [reader(ref, row)(end // size) for end in ends]
      for ref, size in ((prefix, 1), (total, SEGMENT), (error, SEGMENT))
    )
    value = (inside[1] - inside[0]) + ((whole[1] - whole[0]) + (rest[1] - rest[0]))
    scatter(out.at[row], token, value, token < n)

  (out,) = kernel(gradients, rows, n, name="gradients", out_type=[new(n)])(
    first, last, prefix, total, error
  )
  return out
