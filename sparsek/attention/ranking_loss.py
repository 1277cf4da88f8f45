"""The loss that teaches scorers on which side of the cut behind the k best tokens a token lies."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.attention.backends import choose_implementation
from sparsek.attention.kth_largest import sorted_rows, sums
from sparsek.attention.scorer_loss import (
  attention_to_candidates,
  first_token,
  in_blocks,
  posed,
  query_blocks,
)
from sparsek.kernels import saved


def ranking_loss(
  scores: jax.Array,
  query: jax.Array,
  key: jax.Array,
  queries: jax.Array,
  *,
  k: int,
  window: int,
  scale: float | None = None,
  segment_ids: jax.Array | None = None,
  axis: str | None = None,
  implementation: str | None = None,
) -> jax.Array:
  r"""Computes the loss of a scorer, in nats: how badly its scores tell the k tokens that later
  queries read most from the others.

  Each token has one target, the most attention that a query pays it beyond the window,

  .. math:: T_j = \max_{i: j \in C_i} A_{ij}

  over the queries i to compare at; A_ij and the candidates C_i are those of
  `sparsek.attention.scorer_loss.attention_mass_loss`. With t_i and c_i the k-th largest target and
  score in C_i, the loss of a query is logistic, of scores less their cut:

  .. math:: L_i = \sum_{j \in C_i} w_{ij} \log (1 + e^{-y_{ij} (u_j - c_i)})

  y_ij is 1 for the tokens with T_j >= t_i and -1 for the others. w_ij is
  `min(1, |log(T_j / t_i)|)`, so that a token at the cut hardly counts, divided so that the tokens
  on either side have 1/2 together. Queries with at most k candidates have no cut and no loss.

  The cuts t_i and c_i are constants of the gradient, and only scores have one. It is formed in the
  forward pass. Time is O(num_queries n), memory O(n).

  KVzap learns such maxima (Jeblick and Jegou 2026, arXiv 2601.07891), by regression.

  Args:
    scores: [batch, n, G] float32, without exploration noise.
    query, key, queries, window, scale, segment_ids, axis: as in `attention_mass_loss`.
    k: as in `sparsek.sparsek_attention`.
    implementation: as in `attention_mass_loss`.

  Returns:
    float32 scalar, as `attention_mass_loss`.

  Raises:
    NotImplementedError: if the implementation asked for by name cannot run here, with the reason.
  """
  problem = posed(scores, query, queries, window, scale, segment_ids, axis)
  chosen = choose_implementation(implementation, query, segment_ids, 0).implementation
  shards = 1 if axis is None else lax.axis_size(axis)
  budget = min(int(k), shards * scores.shape[1])
  static = Static(problem.window, problem.scale, axis, budget, chosen == "mosaic_gpu")
  at = problem.asked, key, queries, problem.start, problem.weight
  return _loss(scores.astype(jnp.float32), at, static)


class Static(NamedTuple):
  """Options of the loss, besides its arrays."""

  window: int
  scale: float
  axis: str | None
  k: int
  kernels: bool  # for Hopper GPUs

  def sum_of(self, x: Any) -> Any:
    """Sums an array over the shards of a row."""
    return x if self.axis is None else lax.psum(x, self.axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _loss(scores, at, static):
  return _forward(scores, at, static)[0]


def _forward(scores, at, static):
  total, d_scores = _loss_and_gradient(scores, at, static)
  # The shards' parts sum to the total, and each shard has the gradient of the total in its scores.
  total = total if static.axis is None else total / lax.axis_size(static.axis)
  return total, saved.saved(d_scores)


def _backward(static, residuals, d_total):
  return d_total * residuals[0], None


_loss.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=2)
def _loss_and_gradient(scores, at, static):
  """Returns the loss and its gradient in the scores, a block of queries at a time."""
  asked, key, queries, start, weight = at
  score_BxGxN = jnp.swapaxes(scores, 1, 2)
  targets = _targets_by_kernels if static.kernels else _targets_by_xla
  target_BxGxN = targets(asked, key, queries, start, weight, static)
  both = jnp.concatenate([score_BxGxN, target_BxGxN], axis=1)
  if static.axis is not None:
    both = lax.all_gather(both, static.axis, axis=2, tiled=True)
  rows = sorted_rows(both, kernels=static.kernels)
  tokens = Tokens(score_BxGxN, jnp.log(target_BxGxN))

  def body(carry, block):
    total, d_scores_BxGxN = carry
    loss, d_scores_of_block = _of_block(
      tokens, _cut(rows, Block(*block), key.shape[1], static), static
    )
    return (total + loss, d_scores_BxGxN + d_scores_of_block), None

  # A GPU's compiler forms pairs of queries and tokens inside of sums, where they take no memory.
  pairs = 0 if static.kernels else both.size
  by_query = Block(start, queries - static.window + 1, weight)
  zero = jnp.zeros((), jnp.float32), jnp.zeros_like(score_BxGxN)
  (total, d_scores_BxGxN), _ = lax.scan(body, zero, in_blocks(pairs, *by_query))
  return static.sum_of(total), jnp.swapaxes(d_scores_BxGxN, 1, 2)


def _targets_by_kernels(asked, key, queries, start, weight, static):
  """Returns the target of each token, [B, G, N]; 0 where no query has it as a candidate."""
  from sparsek.kernels.hopper import scorer_loss as hopper

  first = first_token(key.shape[1], static.axis)
  options = {"window": static.window, "scale": static.scale, "axis": static.axis}
  return hopper.largest_attention(asked, key, queries - first, start - first, weight, **options)


def _targets_by_xla(asked, key, queries, start, weight, static):
  """Returns the same, a block of queries at a time."""

  def body(largest_BxGxN, block):
    attention_BxGxCxN, _ = attention_to_candidates(
      block, key, static.window, static.scale, static.axis
    )
    counted_BxCx1 = block.weight[..., None] > 0
    attention_BxGxCxN = jnp.where(counted_BxCx1[:, None], attention_BxGxCxN, 0)
    return jnp.maximum(largest_BxGxN, jnp.max(attention_BxGxCxN, axis=2)), None

  batch, n, groups, _ = key.shape
  blocks = query_blocks(asked, key, queries, start, weight)
  return lax.scan(body, jnp.zeros((batch, groups, n), jnp.float32), blocks)[0]


class Block(NamedTuple):
  """Queries that are compared at the same time.

  Attributes:
    first, end: [B, C] int32, their candidates in whole rows: first <= j < end.
    weight: [B, C] float32.
  """

  first: jax.Array
  end: jax.Array
  weight: jax.Array


class Tokens(NamedTuple):
  """Numbers of the tokens that are here, [B, G, N] float32."""

  score: jax.Array
  log_target: jax.Array


class Queries(NamedTuple):
  """Queries and their cuts.

  Attributes:
    first, end: [B, 1, C, 1] int32, their candidates among the tokens that are here.
    score, log_target: [B, G, C, 1] float32, the k-th largest ones of their candidates.
    has_cut: [B, G, C, 1].
    weight: [B, 1, C, 1] float32.
  """

  first: jax.Array
  end: jax.Array
  score: jax.Array
  log_target: jax.Array
  has_cut: jax.Array
  weight: jax.Array


def _cut(rows, block, length, static):
  """Returns the queries of a block with their cuts.

  Args:
    rows: SortedRows of scores, then of targets.
    block: see Block.
    length: tokens that are here.
    static: options.
  """
  of_queries = lambda x: x[:, None, :, None]
  cuts_BxGxCx1 = rows.kth_largest(block.first, block.end, static.k)[..., None]
  score, target = jnp.split(cuts_BxGxCx1, 2, axis=1)
  has_cut = of_queries(block.end - block.first > static.k) & (target > 0)
  log_target = jnp.log(jnp.where(has_cut, target, 1))
  here = first_token(length, static.axis)
  first, end, weight = map(of_queries, block)
  return Queries(first - here, end - here, score, log_target, has_cut, weight)


def _of_block(tokens, queries, static):
  """Returns the loss of queries, in part, and its gradient in the scores, [B, G, N]."""
  j = jnp.arange(tokens.score.shape[2], dtype=jnp.int32)
  counted_BxGxCxN = (j >= queries.first) & (j < queries.end) & queries.has_cut
  # weights: positive of tokens among the k best, negative of others
  gap_BxGxCxN = tokens.log_target[:, :, None] - queries.log_target
  gap_BxGxCxN = jnp.where(counted_BxGxCxN, jnp.clip(gap_BxGxCxN, -1, 1), 0)
  share_BxGxCx1 = lambda total: queries.weight / (2 * jnp.where(total > 0, total, 1))
  kept, dropped = (
    share_BxGxCx1(static.sum_of(total[..., None]))
    for total in sums(jnp.maximum(gap_BxGxCxN, 0), jnp.maximum(-gap_BxGxCxN, 0), axis=-1)
  )
  gap_BxGxCxN *= jnp.where(gap_BxGxCxN > 0, kept, dropped)

  distance_BxGxCxN = jnp.where(counted_BxGxCxN, tokens.score[:, :, None] - queries.score, 0)
  wrong_BxGxCxN = jnp.where(gap_BxGxCxN > 0, -distance_BxGxCxN, distance_BxGxCxN)
  decay_BxGxCxN = jnp.exp(-jnp.abs(distance_BxGxCxN))
  softplus_BxGxCxN = jnp.maximum(wrong_BxGxCxN, 0) + jnp.log1p(decay_BxGxCxN)
  sigmoid_BxGxCxN = jnp.where(wrong_BxGxCxN > 0, 1, decay_BxGxCxN) / (1 + decay_BxGxCxN)
  losses = jnp.abs(gap_BxGxCxN) * softplus_BxGxCxN, -gap_BxGxCxN * sigmoid_BxGxCxN
  loss_BxGxN, d_scores_BxGxN = sums(*losses, axis=2)
  return jnp.sum(loss_BxGxN), d_scores_BxGxN
