"""Thresholds and expiry on GPUs: the steps of kernels/prefix_thresholds.py in Pallas Mosaic kernels
of single threads. Each kernel waits for the one before.

  kernel  a lane for                  reads                        writes
  ...     see hopper/sorting.py       keys                         keys in order, their tokens
  enter   rank, and token             score, order, scores         tokens, ranks, passed;
                                                                   first_nan (minimum)
  ...     see hopper/staircase.py     tokens, ranks                events, cuts; passed (in place)
  finish  query; token                cuts, first_nan; passed      thresholds; expiry

The gradient of the scores: hopper/prefix_gradients.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsek.kernels import prefix_events, prefix_thresholds
from sparsek.kernels.hopper import sorting
from sparsek.kernels.hopper.staircase import Entered, find_cuts
from sparsek.kernels.hopper.thread_ops import kernel, reader, scatter, scatter_row
from sparsek.kernels.hopper.thread_registers import warp_any
from sparsek.kernels.prefix_events import Problem
from sparsek.kernels.sort_keys import LARGEST, Coding
from sparsek.kernels.varying import over_batch, varying_like


class Inputs(NamedTuple):
  """Arrays of the kernel enter, see `solve`: [rows, n], start and end [batch, n], or None for rows
  of one document.
  """

  score: Any
  order: Any
  start: Any
  end: Any
  scores: Any


class FinishInputs(NamedTuple):
  """Arrays of the kernel finish; cuts: [rows, n, 4] by query, as `prefix_thresholds.threshold`
  reads them; first_nan: [rows, n] by the first token of the document, [rows, 1] for one document.
  """

  start: Any
  end: Any
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


def sort(x: jax.Array, coding: Coding) -> tuple[jax.Array, jax.Array]:
  """Returns the numbers in order, decoded, and their tokens: by key, then later token first;
  [batch, heads, n] each.
  """
  return over_rows(functools.partial(sorting.sort, coding), x)


def solve(
  problem: Problem,
  score: jax.Array,
  order: jax.Array,
  start: jax.Array,
  end: jax.Array,
  scores: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Computes thresholds and expiry of `prefix_selection.select`.

  Args:
    problem: sizes.
    score: [batch, heads, n], by rank, -inf where the token is not a candidate.
    order: [batch, heads, n], by rank, its token.
    start, end: [batch, n], of `document_bounds`.
    scores: [batch, heads, n], by token. Thresholds are NaN from the query at which a NaN of them
      may enter.
  """
  return over_rows(functools.partial(_solve, problem), score, order, start, end, scores)


@functools.partial(jax.jit, static_argnums=0)
def _solve(problem, score, order, start, end, scores):
  rows, n = score.shape
  heads = rows // start.shape[0]
  if not problem.packed:
    start = end = None
  first_nan = jax.new_ref(jnp.full((rows, n if problem.packed else 1), n, jnp.int32))
  entered = _enter(problem, heads, Inputs(score, order, start, end, scores), first_nan)
  entered = entered._replace(passed=jax.new_ref(entered.passed))
  events, cuts = find_cuts(problem, entered)
  inputs = FinishInputs(start, end, entered.tokens, events, cuts, entered.passed, first_nan)
  return _finish(problem, heads, inputs)


def _shape(rows, *shape, dtype=jnp.int32):
  return jax.ShapeDtypeStruct((rows, *shape), dtype)


def _reader_if(packed, start, b):
  """Returns a function from a token to the first one of its document."""
  return reader(start, b) if packed else lambda token: token - token


def _enter(problem, heads, inputs, first_nan):
  """Finds the positions of each rank's events, and the first NaN of each document."""
  rows, n = inputs.score.shape

  def body(row, _, lane, inputs, first_nan, outputs):
    inside = lane < n
    value = reader(inputs.scores, row)(lane)
    start_of = _reader_if(problem.packed, inputs.start, row // heads)
    first = start_of(lane)
    scatter(first_nan.at[row], first, lane, inside & (value != value), atomic="min")
    token, last = reader(inputs.order, row)(lane), n
    if problem.packed:
      last = reader(inputs.end, row // heads)(token)
    score_of = reader(inputs.score, row)
    read = prefix_events.Read(lambda rank: jnp.maximum(score_of(rank), -LARGEST), start_of)
    _, entry = prefix_events.entering(problem, score_of(lane), token, last)
    placed = prefix_events.locate_events(problem, read, lane, entry, warp_any)
    scatter_row(outputs.tokens.at[row], token, placed.token, inside)
    by_rank = placed.upper, placed.lower, entry, placed.upper_event[3]
    scatter_row(outputs.ranks.at[row], lane, by_rank, inside)
    for half in range(2):
      # never, until a walk says otherwise
      scatter(outputs.passed.at[row], half * n + lane, n, inside)

  out = Entered(_shape(rows, n, 4), _shape(rows, n, 4), _shape(rows, 2 * n))
  (entered,) = kernel(body, rows, n, name="enter", out_type=[out])(inputs, first_nan)
  return entered


def _finish(problem, heads, inputs):
  """Returns the threshold of each query and the expiry of each token."""
  rows, n = inputs.tokens.shape[:2]

  def body(row, _, query, inputs, outputs):
    start_of = _reader_if(problem.packed, inputs.start, row // heads)
    token_of = reader(inputs.tokens, row)
    read = prefix_events.Read(
      start=start_of, token=token_of, event=reader(inputs.events, row), cut=reader(inputs.cuts, row)
    )
    value = prefix_thresholds.threshold(problem, read, query)
    spoilt = query - problem.delay >= reader(inputs.first_nan, row)(start_of(query))
    scatter(outputs.threshold.at[row], query, jnp.where(spoilt, jnp.nan, value), query < n)
    upper = token_of(query)[0]  # position of the upper event of the token of that number
    expiry = reader(inputs.passed, row)(upper)
    if problem.packed:
      expiry = jnp.minimum(expiry, reader(inputs.end, row // heads)(query))
    scatter(outputs.expiry.at[row], query, jnp.where(upper >= 0, expiry, 0), query < n)

  out = Selection(_shape(rows, n, dtype=jnp.float32), _shape(rows, n))
  (selection,) = kernel(body, rows, n, name="finish", out_type=[out])(inputs)
  return tuple(selection)
