"""Losses of scorers that look at each token's attention over all later queries together, and at the
cut between the k tokens that are kept and the others.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsek.attention.scorer_loss import (
  attention_mass_loss,
  attention_to_candidates,
  posed,
  query_blocks,
  visible_keys,
)
from sparsek.config import SCORER_LOSSES, SCORER_TARGETS, check_choice
from sparsek.kernels import saved
from sparsek.kernels.bisection import bisect
from sparsek.kernels.sort_keys import LOWEST_KEY, SCORES


def scorer_loss(
  scores: jax.Array,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  queries: jax.Array,
  *,
  k: int,
  window: int,
  target: str = "mean",
  kind: str = "divergence",
  value_norm: bool = False,
  scale: float | None = None,
  segment_ids: jax.Array | None = None,
  axis: str | None = None,
  implementation: str | None = None,
) -> jax.Array:
  r"""Computes the loss of a scorer, in nats: by default `attention_mass_loss`, which see.

  Otherwise each token has one target,

  .. math:: T_j = \max_{i} A_{ij} \|v_j\|  \quad\text{or}\quad
     T_j = \mathrm{mean}_{i} A_{ij} \|v_j\|

  over the queries i to compare at that have token j among their candidates C_i, beyond the window:
  A_ij is the attention of `attention_mass_loss`, and the norm of the value is 1 without
  `value_norm`. At each query the targets of its candidates are compared with their scores:

  - "divergence": `KL(T / sum_C T || softmax_C(u))`.
  - "ranking": with t_i and c_i the k-th largest target and score in C_i, a logistic loss
    `sum_j w_ij softplus(-y_ij (u_j - c_i))`, where y_ij is 1 for the tokens with T_j >= t_i and -1
    for the others. w_ij is `min(1, |log(T_j / t_i)|)`, so that a token at the cut hardly counts,
    divided so that the tokens on either side have 1/2 together.

  The cuts t_i and c_i are constants of the gradient. Queries with at most k candidates have no cut
  and no such loss. KVzap learns maxima over queries, times norms of values (Jeblick and Jegou 2026,
  arXiv 2601.07891).

  Args:
    scores, query, key, queries, window, scale, segment_ids, axis: as in `attention_mass_loss`.
    value: [batch, n, G, D].
    k: as in `sparsek.sparsek_attention`.
    target: "mean" or "max".
    kind: "divergence" or "ranking".
    value_norm: multiply attention by the norm of the value.
    implementation: of `attention_mass_loss`; the other losses are computed under XLA.

  Returns:
    float32 scalar, as `attention_mass_loss`.
  """
  check_choice("target", target, SCORER_TARGETS)
  check_choice("kind", kind, SCORER_LOSSES)
  if (target, kind, value_norm) == ("mean", "divergence", False):
    return attention_mass_loss(
      scores,
      query,
      key,
      queries,
      window=window,
      scale=scale,
      segment_ids=segment_ids,
      axis=axis,
      implementation=implementation,
    )
  problem = posed(scores, query, queries, window, scale, segment_ids, axis)
  size_BxNxG = (
    jnp.linalg.norm(value.astype(jnp.float32), axis=-1) if value_norm else jnp.ones(scores.shape)
  )
  static = Static(problem.window, problem.scale, axis, int(k), target, kind)
  at = problem.asked, key, size_BxNxG, queries, problem.start, problem.weight
  return _loss(scores.astype(jnp.float32), at, static)


class Static(NamedTuple):
  """Options of the loss, besides its arrays."""

  window: int
  scale: float
  axis: str | None
  k: int
  target: str
  kind: str

  def over_shards(self, reduce: Callable, x: Any) -> Any:
    """Reduces an array over the shards of a row."""
    return x if self.axis is None else reduce(x, self.axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _loss(scores, at, static):
  return _forward(scores, at, static)[0]


def _forward(scores, at, static):
  total, d_scores = _by_xla(scores, at, static)
  # The shards' parts sum to the total, and each shard has the gradient of the total in its scores.
  total = total if static.axis is None else total / lax.axis_size(static.axis)
  return total, saved.saved(d_scores)


def _backward(static, residuals, d_total):
  return d_total * residuals[0], None


_loss.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=2)
def _by_xla(scores, at, static):
  """Returns the loss and its gradient in the scores, a block of queries at a time."""
  asked, key, size_BxNxG, queries, start, weight = at
  blocks = query_blocks(asked, key, queries, start, weight)
  target_BxGx1xN = _targets(blocks, key, jnp.swapaxes(size_BxNxG, 1, 2), static)[:, :, None]
  score_BxGx1xN = jnp.swapaxes(scores, 1, 2)[:, :, None]

  def body(carry, block):
    total, d_scores_BxGxN = carry
    _, candidate_Bx1xCxN = visible_keys(block, key.shape[1], static.window, static.axis)
    loss_BxGxC, gradient_BxGxCxN = _KINDS[static.kind](
      score_BxGx1xN, target_BxGx1xN, candidate_Bx1xCxN, static
    )
    d_scores_BxGxN += jnp.einsum(
      "bgcj,bc->bgj", gradient_BxGxCxN, block.weight, precision=lax.Precision.HIGHEST
    )
    return (total + jnp.sum(loss_BxGxC * block.weight[:, None]), d_scores_BxGxN), None

  zero = jnp.zeros((), jnp.float32), jnp.zeros(score_BxGx1xN[:, :, 0].shape, jnp.float32)
  (total, d_scores), _ = lax.scan(body, zero, blocks)
  return total, jnp.swapaxes(d_scores, 1, 2)


def _targets(blocks, key, size_BxGxN, static):
  """Returns the target of each token, [B, G, N]; 0 where no query has it as a candidate."""

  def body(carry, block):
    attention_BxGxCxN, candidate_Bx1xCxN = attention_to_candidates(
      block, key, static.window, static.scale, static.axis
    )
    counted_BxCx1 = block.weight[..., None] > 0
    attention_BxGxCxN = jnp.where(counted_BxCx1[:, None], attention_BxGxCxN, 0)
    if static.target == "max":
      return jnp.maximum(carry, jnp.max(attention_BxGxCxN, axis=2)), None
    total_BxGxN, number_Bx1xN = carry
    number_Bx1xN += jnp.sum(candidate_Bx1xCxN & counted_BxCx1[:, None], axis=2)
    return (total_BxGxN + jnp.sum(attention_BxGxCxN, axis=2), number_Bx1xN), None

  zeros = jnp.zeros_like(size_BxGxN)
  if static.target == "max":
    largest_BxGxN, _ = lax.scan(body, zeros, blocks)
    return largest_BxGxN * size_BxGxN
  number = jnp.zeros_like(size_BxGxN[:, :1], jnp.int32)
  (total_BxGxN, number_Bx1xN), _ = lax.scan(body, (zeros, number), blocks)
  return total_BxGxN / jnp.maximum(number_Bx1xN, 1) * size_BxGxN


# Each kind of loss takes scores [B, G, 1, N], targets [B, G, 1, N], which pairs are candidates
# [B, 1, C, N] and Static. It returns the loss of queries [B, G, C] and its gradient in their
# scores [B, G, C, N].


def _divergence(u, t, candidate, static):
  top = static.over_shards(lax.pmax, _max(jnp.where(candidate, u, np.finfo(np.float32).min)))
  exp = jnp.where(candidate, jnp.exp(jnp.where(candidate, u - top, 0)), 0)
  t = jnp.where(candidate, t, 0)
  total, sum_exp = static.over_shards(lax.psum, (_sum(t), _sum(exp)))
  share = t / jnp.where(total > 0, total, 1)
  log_expected = u - top - jnp.log(jnp.where(sum_exp > 0, sum_exp, 1))
  information = jnp.where(share > 0, share * (jnp.log(share) - log_expected), 0)
  loss = static.over_shards(lax.psum, jnp.sum(information, axis=-1))
  expected = exp / jnp.where(sum_exp > 0, sum_exp, 1)
  return loss, jnp.where(total > 0, expected - share, 0)


def _ranking(u, t, candidate, static):
  distance, gap, compared = _at_the_cut(u, t, candidate, static)
  is_kept = compared & (gap >= 0)
  weight = jnp.where(compared, jnp.minimum(jnp.abs(gap), 1), 0)
  kept, dropped = static.over_shards(
    lax.psum, (_sum(jnp.where(is_kept, weight, 0)), _sum(jnp.where(is_kept, 0, weight)))
  )
  of_side = jnp.where(is_kept, kept, dropped)
  weight = jnp.where(of_side > 0, weight / (2 * jnp.where(of_side > 0, of_side, 1)), 0)
  sign = jnp.where(is_kept, 1.0, -1.0)
  loss = jnp.sum(weight * jax.nn.softplus(-sign * distance), axis=-1)
  return static.over_shards(lax.psum, loss), -weight * sign * jax.nn.sigmoid(-sign * distance)


_KINDS = {"divergence": _divergence, "ranking": _ranking}


def _at_the_cut(u, t, candidate, static):
  """Returns how far scores lie above the k-th largest of a query's candidates, and logarithms of
  targets above that of theirs; and which pairs count, those of queries with a cut.
  """
  t_cut, u_cut = (_kth_largest(x, candidate, static) for x in (t, u))
  number = static.over_shards(lax.psum, _sum(candidate.astype(jnp.int32)))
  compared = candidate & (number > static.k) & (t_cut > 0)
  gap = jnp.log(jnp.where(compared, t, 1)) - jnp.log(jnp.where(t_cut > 0, t_cut, 1))
  return jnp.where(compared, u - u_cut, 0), jnp.where(compared, gap, 0), compared


def _kth_largest(x, candidate, static):
  """Returns the k-th largest of a query's candidates, [B, G, C, 1]; less where there are fewer."""
  key = jnp.where(candidate, SCORES.encode(x), LOWEST_KEY)
  above = lambda least: static.over_shards(lax.psum, _sum((key > least).astype(jnp.int32)))
  is_last = lambda least: above(least) < static.k
  # Integers of either sign would lie too far apart for one search.
  negative = is_last(jnp.full((*key.shape[:-1], 1), -1, jnp.int32))
  low = jnp.where(negative, LOWEST_KEY, 0)
  (found,) = bisect(2**31 - 1, (low, jnp.where(negative, -1, 2**31 - 2), is_last))
  return SCORES.decode(found)


def _max(x):
  return jnp.max(x, axis=-1, keepdims=True)


def _sum(x):
  return jnp.sum(x, axis=-1, keepdims=True)
