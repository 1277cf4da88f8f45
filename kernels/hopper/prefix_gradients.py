"""Gradient of the scores from that of the thresholds, on GPUs, in Pallas Mosaic kernels of single
threads: the same as `threshold_gradients.scores_gradient`.

A score gets the sum of dtau_i / |S_i| over the interval of queries for which its gate is
fractional. Queries are cut into segments; the sum over an interval is a difference of prefix sums
inside the segments, plus a difference of sums of whole segments:

  kernel     a lane for  reads                      writes
  intervals  token       score, threshold, end      first, last; change, changes (adds)
  shares     query       cotangent, change, counts  prefix: sums from the segment's start on; shares
  segments   segment     shares                     total, error: the sum of all earlier segments
  gradients  token       first, last; prefix;       the gradient
                         total, error

Each kernel waits for the one before. The lanes of a program of the kernel shares, one for each
query of a segment, add by shuffles and in shared memory.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels import prefix_events, threshold_gradients
from sparsek.kernels.hopper.prefix_thresholds import over_rows
from sparsek.kernels.hopper.thread_ops import block_of, contents, kernel, reader, scatter
from sparsek.kernels.hopper.thread_sums import WARPS, prefix_sums
from sparsek.kernels.threshold_gradients import SEGMENT

AT_ONCE = 16  # loads that a lane has in flight in sums of segments


class Inputs(NamedTuple):
  """Arrays of the kernel intervals: [rows, n], end [batch, n]."""

  score: Any
  threshold: Any
  end: Any


class Changes(NamedTuple):
  """Changes of the number of fractional gates: at each query, and summed over each segment."""

  change: Any
  changes: Any


class Ends(NamedTuple):
  """The interval [first, last) of queries for which a token's gate is fractional."""

  first: Any
  last: Any


class Totals(NamedTuple):
  """The sum of the shares of all earlier segments, and its rounding error."""

  total: Any
  error: Any


class GradientInputs(NamedTuple):
  """Arrays of the kernel gradients."""

  ends: Ends
  prefix: Any
  totals: Totals


def scores_gradient(
  cotangent: jax.Array, score: jax.Array, threshold: jax.Array, end: jax.Array, delay: int
) -> jax.Array:
  """Computes the same as `threshold_gradients.scores_gradient`, of [batch, heads, n] arrays and
  end [batch, n].
  """
  return over_rows(functools.partial(_scores_gradient, delay), cotangent, score, threshold, end)


@functools.partial(jax.jit, static_argnums=0)
def _scores_gradient(delay, cotangent, score, threshold, end):
  rows, n = score.shape
  segments = n // SEGMENT + 1  # of the queries 0 to n
  changes = Changes(
    *(jax.new_ref(jnp.zeros((rows, size), jnp.int32)) for size in (n + 1, segments))
  )
  ends = _find_intervals(delay, Inputs(score, threshold, end), changes)
  (by_segment,) = contents(changes.changes)
  counts = jnp.cumsum(by_segment, axis=1) - by_segment  # before each segment
  prefix, shares = _add_shares(cotangent, changes.change, counts)
  totals = _add_segments(shares)
  return _gradients(GradientInputs(ends, prefix, totals))


def _shape(rows, size, dtype=jnp.float32):
  return jax.ShapeDtypeStruct((rows, size), dtype)


def _find_intervals(delay, inputs, changes):
  """Returns the interval of each token, and adds its two ends to `changes`."""
  rows, n = inputs.score.shape
  heads = rows // inputs.end.shape[0]

  def body(row, _, token, inputs, changes, outputs):
    read = prefix_events.Read(
      reader(inputs.score, row),
      end=reader(inputs.end, row // heads),
      threshold=reader(inputs.threshold, row),
    )
    ends = threshold_gradients.interval(read, token, delay, n)
    for ref, query, weight in zip(outputs, ends, (1, -1)):
      scatter(ref.at[row], token, query, token < n)
      there = (token < n) & (ends[0] < ends[1])
      scatter(changes.change.at[row], query, weight, there, atomic="add")
      scatter(changes.changes.at[row], query // SEGMENT, weight, there, atomic="add")

  out = Ends(_shape(rows, n, jnp.int32), _shape(rows, n, jnp.int32))
  (ends,) = kernel(body, rows, n, name="intervals", out_type=[out])(inputs, changes)
  return ends


def _add_shares(cotangent, change, counts):
  """Returns the sums of dtau_i / |S_i| from the start of each query's segment on, and those of
  whole segments.
  """
  rows, n = cotangent.shape
  segments = counts.shape[1]

  def body(row, _, query, cotangent, change, counts, prefix, shares, changed, added):
    segment = block_of(rows)
    own = query - segment * SEGMENT
    number = jnp.where(query <= n, reader(change, row)(query), 0)
    count, _ = prefix_sums(number, own, changed)
    count += reader(counts, row)(own - own + segment)
    share = jnp.where(
      (count > 0) & (query < n),
      reader(cotangent, row)(query) / jnp.maximum(count, 1).astype(jnp.float32),
      0.0,
    )
    sums, total = prefix_sums(share, own, added)
    scatter(prefix.at[row], query, (query - query).astype(jnp.float32), (own == 0) & (query <= n))
    scatter(prefix.at[row], query + 1, sums, (own < SEGMENT - 1) & (query < n))
    scatter(shares.at[row], query - query + segment, total, own == 0)

  run = kernel(
    body,
    rows,
    segments * SEGMENT,
    name="shares",
    out_type=[_shape(rows, n + 1), _shape(rows, segments)],
    scratch_types=[plgpu.SMEM((WARPS,), jnp.int32), plgpu.SMEM((WARPS,), jnp.float32)],
  )
  return run(cotangent, change, counts)


def _add_segments(shares):
  """Returns the sum of all segments before each, with its rounding error."""
  rows, segments = shares.shape

  def body(row, _, segment, shares, outputs):
    def add(i, state):
      indices = [i * AT_ONCE + j for j in range(AT_ONCE)]
      loaded = [shares[row, jnp.minimum(index, segments - 1)] for index in indices]
      for index, value in zip(indices, loaded):
        state = threshold_gradients.add_exactly(
          state, (jnp.where(index < segment, value, 0.0), 0.0)
        )
      return state

    zero = (segment - segment).astype(jnp.float32)
    sums = lax.fori_loop(0, -(-segments // AT_ONCE), add, (zero, zero))
    for ref, value in zip(outputs, sums):
      scatter(ref.at[row], segment, value, segment < segments)

  out = Totals(_shape(rows, segments), _shape(rows, segments))
  (totals,) = kernel(body, rows, segments, name="segments", out_type=[out])(shares)
  return totals


def _gradients(inputs):
  """Returns the gradient of each token's score: the sum over its interval."""
  rows, n = inputs.ends.first.shape

  def body(row, _, token, inputs, out):
    ends = [reader(ref, row)(token) for ref in inputs.ends]
    inside, whole, rest = (
      [reader(ref, row)(end // size) for end in ends]
      for ref, size in (
        (inputs.prefix, 1),
        (inputs.totals.total, SEGMENT),
        (inputs.totals.error, SEGMENT),
      )
    )
    value = (inside[1] - inside[0]) + ((whole[1] - whole[0]) + (rest[1] - rest[0]))
    scatter(out.at[row], token, value, token < n)

  (out,) = kernel(body, rows, n, name="gradients", out_type=[_shape(rows, n)])(inputs)
  return out
