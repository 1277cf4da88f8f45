"""Thresholds and expiry on GPUs: the steps of kernels/prefix_thresholds.py in Pallas Mosaic kernels
of single threads. Each kernel waits for the one before.

  kernel  a lane for                  reads                        writes
  ...     see hopper/sorting.py       keys                         keys in order, their tokens
  enter   rank, and token             score, entry, order, start,  tokens, events, passed;
                                      scores                       first_nan (minimum)
  ...     see hopper/staircase.py     tokens, events               cuts; passed (in place)
  finish  query; token                cuts, first_nan; passed      thresholds; expiry

The gradient of the scores: hopper/prefix_gradients.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels import prefix_thresholds
from sparsek.kernels.hopper import sorting
from sparsek.kernels.hopper.staircase import Events, find_cuts
from sparsek.kernels.hopper.thread_ops import kernel, reader, scatter, scatter_row
from sparsek.kernels.prefix_thresholds import Problem
from sparsek.kernels.varying import over_batch, varying_like


class Inputs(NamedTuple):
  """Arrays of the kernel enter, see `solve`: [rows, n], start [batch, n]."""

  score: Any
  entry: Any
  order: Any
  start: Any
  scores: Any


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
  sign = jnp.uint32(2**31)
  ranked, order = sorting.sort(lax.bitcast_convert_type(key ^ sign, jnp.int32))
  return lax.bitcast_convert_type(ranked, jnp.uint32) ^ sign, order


@functools.partial(jax.jit, static_argnums=0)
def _solve(problem, score, entry, order, start, scores):
  rows, n = score.shape
  heads = rows // start.shape[0]
  first_nan = jax.new_ref(jnp.full((rows, n), n, jnp.int32))
  entered = _enter(problem, heads, Inputs(score, entry, order, start, scores), first_nan)
  entered = entered._replace(passed=jax.new_ref(entered.passed))
  cuts = find_cuts(problem, entered)
  tokens, events, passed = entered
  return _finish(problem, heads, FinishInputs(start, tokens, events, cuts, passed, first_nan))


def _shape(rows, *shape, dtype=jnp.int32):
  return jax.ShapeDtypeStruct((rows, *shape), dtype)


def _enter(problem, heads, inputs, first_nan):
  """Finds the positions of each rank's events, and the first NaN of each document."""
  rows, n = inputs.score.shape

  def body(row, _, lane, inputs, first_nan, outputs):
    inside = lane < n
    value = reader(inputs.scores, row)(lane)
    first = reader(inputs.start, row // heads)(lane)
    scatter(first_nan.at[row], first, lane, inside & (value != value), atomic="min")
    entry, token = (reader(ref, row)(lane) for ref in (inputs.entry, inputs.order))
    read = prefix_thresholds.Read(reader(inputs.score, row), reader(inputs.start, row // heads))
    placed = prefix_thresholds.locate_events(problem, read, lane, entry)
    scatter_row(outputs.tokens.at[row], token, placed.token, inside)
    for position, event in ((placed.upper, placed.upper_event), (placed.lower, placed.lower_event)):
      scatter_row(outputs.events.at[row], position, event, inside)
      scatter(outputs.passed.at[row], position, n, inside)  # never, until a walk says otherwise

  out = Events(_shape(rows, n, 4), _shape(rows, 2 * n, 4), _shape(rows, 2 * n))
  (entered,) = kernel(body, rows, n, name="enter", out_type=[out])(inputs, first_nan)
  return entered


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
