"""The scorers' loss on Hopper GPUs (H100, H200): two kernels that read the keys once each, and
between them a few numbers a query.

  scorer_loss_sums -> logsumexp of each query, share of its candidates -> scorer_loss_gradients

The second one computes the loss and its gradient, or only the targets of the ranking loss.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import xlogy

from sparsek.kernels.hopper.common import HALF, TILINGS
from sparsek.kernels.hopper.scorer_loss_gradients import Queries, score_gradients
from sparsek.kernels.hopper.scorer_loss_gradients import Tiles as TilesOfQueries
from sparsek.kernels.hopper.scorer_loss_pairs import BLOCK
from sparsek.kernels.hopper.scorer_loss_sums import BLOCK_KV, SMALLEST, Span, Tiles, query_sums
from sparsek.kernels.varying import over_batch, varying_like


class Static(NamedTuple):
  """Options of the compiled functions, besides the shapes of their arguments."""

  scale: float
  interpret: object = None


class Problem(NamedTuple):
  """Arguments of the kernels, filled up to whole tiles.

  Attributes:
    query, key: [B, C, H, D] and [B, n, G, D].
    span: see Span.
    weight: [B, C] float32.
    static: options.
  """

  query: jax.Array
  key: jax.Array
  span: Span
  weight: jax.Array
  static: Static


class Sums(NamedTuple):
  """Sums of a softmax for every query, over parts of the keys; see `query_sums`."""

  top: jax.Array
  total: jax.Array
  candidates: jax.Array
  top_score: jax.Array
  total_score: jax.Array

  def joined(self, largest: Callable, sum_of: Callable) -> "Sums":
    """Joins the parts over which `largest` and `sum_of` reduce."""
    top, top_score = largest(self.top), largest(self.top_score)
    factor, score_factor = jnp.exp2(self.top - top), jnp.exp(self.top_score - top_score)
    total, candidates = (sum_of(x * factor) for x in (self.total, self.candidates))
    return Sums(top, total, candidates, top_score, sum_of(self.total_score * score_factor))


def attention_mass(
  scores: jax.Array,
  query: jax.Array,
  key: jax.Array,
  last: jax.Array,
  start: jax.Array,
  weight: jax.Array,
  *,
  window: int,
  scale: float,
  axis: str | None = None,
  interpret: object = None,
) -> tuple[jax.Array, jax.Array]:
  """Computes `sparsek.attention.scorer_loss.attention_mass_loss` at given queries.

  Args:
    scores: [B, n, G] float32.
    query: [B, C, H, D] bfloat16 or float16, of the queries to compare at; D <= 256.
    key: [B, n, G, D].
    last, start: [B, C] int32, a query's own token and the first one of its document, counted from
      the first key here, which with `axis` is not the row's first.
    weight: [B, C] float32, of the queries.
    window, scale, axis: as there.
    interpret: parameters of the interpreter, or None.

  Returns:
    The loss, a float32 scalar, and its gradient in the scores [B, n, G].
  """
  (n, groups), rest = scores.shape[1:], -scores.shape[1] % BLOCK_KV
  problem = _filled_up(query, key, last, start, weight, window, scale, interpret)
  score = jnp.pad(jnp.swapaxes(scores, 1, 2), ((0, 0), (0, 0), (0, rest)))
  queries, mass = _per_query(*_all_sums(problem, score, axis), groups)
  second_pass = functools.partial(_gradients, problem.static, False)
  dscore, loss = over_batch(second_pass, problem.query, problem.key, score, queries)
  total = jnp.sum(loss)
  total = total if axis is None else lax.psum(total, axis)
  total -= jnp.sum(xlogy(mass, mass) * problem.weight[:, None])
  dscore = jnp.swapaxes(dscore[:, :, :n], 1, 2)
  return varying_like(total, scores), varying_like(dscore, scores)


def largest_attention(
  query: jax.Array,
  key: jax.Array,
  last: jax.Array,
  start: jax.Array,
  weight: jax.Array,
  *,
  window: int,
  scale: float,
  axis: str | None = None,
  interpret: object = None,
) -> jax.Array:
  """Computes the targets of `sparsek.attention.ranking_loss.ranking_loss`.

  Args:
    query, key, last, start, weight, window, scale, axis, interpret: as in `attention_mass`.

  Returns:
    [B, G, n] float32, the largest attention that a query pays each key, averaged over the query
    heads of the KV head; 0 of keys that no query with a weight has as a candidate.
  """
  n, groups = key.shape[1:3]
  problem = _filled_up(query, key, last, start, weight, window, scale, interpret)
  score = jnp.zeros((key.shape[0], groups, problem.key.shape[1]), jnp.float32)
  score = varying_like(score, key)
  queries, _ = _per_query(*_all_sums(problem, score, axis), groups)
  second_pass = functools.partial(_gradients, problem.static, True)
  largest, _ = over_batch(second_pass, problem.query, problem.key, score, queries)
  return varying_like(largest[:, :, :n], key)


def _filled_up(query, key, last, start, weight, window, scale, interpret):
  """Returns the Problem of arguments of `attention_mass`."""
  count, n, dim = query.shape[1], key.shape[1], query.shape[-1]
  more, rest = -count % HALF, -n % BLOCK_KV
  wide = next(d for d in TILINGS if d >= dim) - dim
  if scale <= 0:  # the kernels take the largest logit before they scale
    query, scale = query * (-1 if scale < 0 else 0), abs(scale) or 1.0
  query = jnp.pad(query, ((0, 0), (0, more), (0, 0), (0, wide)))
  key = jnp.pad(key, ((0, 0), (0, rest), (0, 0), (0, wide)))
  last, start, weight = (jnp.pad(x, ((0, 0), (0, more))) for x in (last, start, weight))
  # Queries that do not count, or see no key here, see none.
  seen, candidate = (
    jnp.where(weight > 0, jnp.clip(x, -1, n - 1), -1) for x in (last, last - window)
  )
  span = Span(jnp.where(seen < 0, n, jnp.maximum(start, 0)), seen, candidate)
  return Problem(query, key, span, weight, Static(scale, interpret))


def _all_sums(problem, score, axis):
  """Returns the sums of queries over all keys, and what else `_per_query` reads of queries."""
  sums_of_shard = functools.partial(_sums, problem.static)
  sums = Sums(*over_batch(sums_of_shard, problem.query, problem.key, score, problem.span))
  if axis is not None:
    largest, sum_of = (functools.partial(f, axis_name=axis) for f in (lax.pmax, lax.psum))
    sums = sums.joined(largest, sum_of)
  return sums, problem.weight, problem.span


@functools.partial(jax.jit, static_argnums=0)
def _sums(static, query, key, score, span):
  sums = query_sums(query, key, score, span, _tiles(score, span), **static._asdict())
  largest, sum_of = (functools.partial(f, axis=2, keepdims=True) for f in (jnp.max, jnp.sum))
  joined = Sums(*jnp.moveaxis(sums, 3, 0)).joined(largest, sum_of)
  return tuple(x[:, :, 0] for x in joined)


def _tiles(score, span):
  """Returns what the first kernel reads of tiles of keys."""
  tiles = score.reshape(*score.shape[:2], -1, BLOCK_KV)
  top = jnp.max(tiles, axis=3, initial=SMALLEST)
  total = jnp.sum(jnp.exp(tiles - top[..., None]), axis=3)
  start, last, candidate = (x.reshape(x.shape[0], -1, HALF) for x in span)
  base = jnp.arange(top.shape[2], dtype=jnp.int32) * BLOCK_KV
  # keys before which a query begins, or ends, to see them or to have them as candidates
  edges = (x[..., None] - base for x in (start, last + 1, candidate + 1))
  parts = functools.reduce(jnp.logical_or, [(0 < x) & (x < BLOCK_KV) for x in edges])
  whole = jnp.min(jnp.where(parts, 0, 1), axis=2)
  return Tiles(jnp.min(start, axis=2), jnp.max(last, axis=2), whole, top, total)


@functools.partial(jax.jit, static_argnums=3)
def _per_query(sums, weight, span, groups):
  """Returns what the second kernel reads of queries, and their candidates' share [B, G, C] of the
  attention.
  """
  seen, repeats = sums.total > 0, sums.total.shape[1] // groups
  share = jnp.where(seen, sums.candidates / jnp.where(seen, sums.total, 1), 0)
  mass = jnp.mean(share.reshape(share.shape[0], groups, repeats, -1), axis=2)
  logsumexp = jnp.where(seen, sums.top + jnp.log2(jnp.where(seen, sums.total, 1)), 0)
  top, total = (x[:, ::repeats] for x in (sums.top_score, sums.total_score))
  top, total = jnp.where(total == 0, 0, top), jnp.where(total == 0, 1, total)
  expected = mass * weight[:, None]
  vectors = logsumexp, top, jnp.log(total), expected, weight
  return Queries(*vectors, span.candidate, span.start), mass


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(static, largest, query, key, score, queries):
  tiles = lambda x: x.reshape(*x.shape[:-1], -1, BLOCK)
  start, last, top = tiles(queries.start), tiles(queries.last), tiles(queries.top_score)
  reference = jnp.min(top, axis=3)
  expected = jnp.exp(reference[..., None] - top - tiles(queries.log_total))
  expected = jnp.sum(expected * tiles(queries.expected), axis=3)
  return score_gradients(
    query,
    key,
    score,
    queries,
    TilesOfQueries(
      jnp.min(start, axis=2),
      jnp.max(start, axis=2),
      jnp.min(last, axis=2),
      jnp.max(last, axis=2),
      reference,
      expected,
    ),
    largest=largest,
    **static._asdict(),
  )
