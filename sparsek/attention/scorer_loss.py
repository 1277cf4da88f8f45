"""The loss that teaches scorers directly which tokens full attention reads after they have left
the window.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsek.attention.backends import choose_implementation
from sparsek.attention.documents import document_bounds
from sparsek.kernels import saved
from sparsek.kernels.sentinels import LOWEST

BLOCK_LOGITS = 2**25  # the most logits held at once: 128 MiB in float32, times a few such arrays


def sample_queries(keys: jax.Array, num_queries: int, length: int) -> jax.Array:
  """Draws the positions of queries: one from each of `num_queries` parts of the row, of equal
  length, in ascending order; all positions where there are no more.

  Args:
    keys: [batch] random keys, one a row.
    num_queries: the most queries of a row.
    length: tokens of a row.

  Returns:
    [batch, min(num_queries, length)] int32.
  """
  number = min(num_queries, length)
  edges = jnp.asarray(np.arange(number + 1) * length // number, jnp.int32)
  draw = lambda key: jax.random.randint(key, (number,), edges[:-1], edges[1:])
  return jax.vmap(draw)(keys)


def attention_mass_loss(
  scores: jax.Array,
  query: jax.Array,
  key: jax.Array,
  queries: jax.Array,
  *,
  window: int,
  scale: float | None = None,
  segment_ids: jax.Array | None = None,
  axis: str | None = None,
  implementation: str | None = None,
) -> jax.Array:
  r"""Computes the loss of a scorer, in nats: how badly its scores predict which candidates full
  attention reads.

  .. math:: L_i = M_i \, KL(A_{i \cdot} / M_i \,\|\, \mathrm{softmax}_{C_i}(u))
     = \sum_{j \in C_i} A_{ij} \log \frac{A_{ij}}{M_i} + M_i \log \sum_{j \in C_i} e^{u_j}
     - \sum_{j \in C_i} A_{ij} u_j

  A_ij is the softmax of `scale q_i . k_j` over all tokens j <= i of the document, averaged over the
  query heads of a KV head; C_i are the candidates, `j + window <= i`; M_i is their share of the
  attention. L_i >= 0, and 0 where the scores are the logarithm of that attention up to a constant.
  Tokens that are not selected get a gradient, too. DSA trains its indexer in the same way
  (DeepSeek-AI 2025, arXiv 2512.02556), but its scores depend on the query. Here one score must do
  for all later queries; at the minimum over all of them it is the logarithm of the attention that a
  token can expect.

  The scores enter as they are, at temperature 1, and the scorer's scale and slope learn too. A
  `scorer_init_scale` of 1 is near the spread of logarithms of attention; at 4 a scorer first has to
  become less sure.

  Only scores have a gradient, `M_i softmax_{C_i}(u)_j - A_ij`, which is formed in the forward pass.
  Time is O(num_queries n), memory O(n), under XLA beside BLOCK_LOGITS.

  Args:
    scores: [batch, n, G] float32, without exploration noise.
    query, key: [batch, n, H, D] and [batch, n, G, D]; products are in their dtype, summed in
      float32.
    queries: [batch, num_queries] int32 positions of the queries to compare at, as from
      `sample_queries`.
    window: as in `sparsek.sparsek_attention`.
    scale: of the logits; 1 / sqrt(D) by default.
    segment_ids: [batch, n] integers or None; every run of equal ids is a document. Queries in
      padding, which has the id 0, do not count.
    axis: name of the mesh axis over which tokens are sharded, inside `jax.shard_map`: `scores`,
      `query` and `key` then hold this shard's tokens, `segment_ids` those of whole rows, and
      `queries` positions in whole rows, the same on every shard.
    implementation: "mosaic_gpu" computes it by kernels for Hopper GPUs, which is the default where
      they can run, and every other implementation of attention under XLA.

  Returns:
    float32 scalar, summed over rows: the mean of L_i over the queries of a row that count and over
    KV heads. With `axis` its part that the shards sum to it, the same on each.

  Raises:
    NotImplementedError: if the implementation asked for by name cannot run here, with the reason.
  """
  problem = posed(scores, query, queries, window, scale, segment_ids, axis)
  chosen = choose_implementation(implementation, query, segment_ids, 0).implementation
  static = Static(problem.window, problem.scale, axis, chosen == "mosaic_gpu")
  scores = scores.astype(jnp.float32)
  return _loss(scores, problem.asked, key, queries, problem.start, problem.weight, static)


class Problem(NamedTuple):
  """Arrays and numbers of a loss of scorers, besides scores, keys and positions of queries.

  Attributes:
    asked: [B, C, H, D], the queries to compare at.
    start: [B, C] int32, the first token of their documents.
    weight: [B, C] float32; 0 for queries in padding.
    window, scale: of attention, as Python numbers.
  """

  asked: jax.Array
  start: jax.Array
  weight: jax.Array
  window: int
  scale: float


def posed(
  scores: jax.Array,
  query: jax.Array,
  queries: jax.Array,
  window: int,
  scale: float | None,
  segment_ids: jax.Array | None,
  axis: str | None,
) -> Problem:
  """Gathers the queries at `queries`; the arguments are those of `attention_mass_loss`."""
  batch, n, groups = scores.shape
  shards = 1 if axis is None else lax.axis_size(axis)
  start, _ = document_bounds(segment_ids, batch, shards * n)
  at = lambda x: jnp.take_along_axis(x, queries, axis=1)
  counted = (
    jnp.ones(queries.shape, jnp.float32)
    if segment_ids is None
    else at(segment_ids != 0).astype(jnp.float32)
  )
  weight = counted / (jnp.maximum(jnp.sum(counted, axis=1, keepdims=True), 1) * groups)
  scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
  window = min(int(window), shards * n)
  return Problem(_asked(query, queries, axis), at(start), weight, window, scale)


def max_attention_loss(
  scores: jax.Array,
  query: jax.Array,
  key: jax.Array,
  queries: jax.Array,
  *,
  window: int,
  scale: float | None = None,
  segment_ids: jax.Array | None = None,
  axis: str | None = None,
  implementation: str | None = None,
) -> jax.Array:
  r"""Computes how badly scores predict the largest attention that a later query pays a token.

  .. math:: L = \mathrm{Var}_j (u_j - t_j), \qquad
     t_j = \max_{i \ge j + window} \max_r \log A^r_{ij}

  A^r_ij is the softmax of `scale q_i . k_j` over all tokens j <= i of the document, of query head
  r of the KV head, and i are the given queries. It is the squared error of a regression whose
  constant is fitted, since a constant added to all scores of a head changes no selection. Tokens
  that no query has as a candidate do not count. KVzap (arXiv 2601.07891) learns such a target.

  Only scores have a gradient. Time and memory are as in `attention_mass_loss`, under XLA.

  Args:
    scores, query, key, queries, window, scale, segment_ids, axis: as in `attention_mass_loss`.
    implementation: is ignored; there are no kernels.

  Returns:
    float32 scalar, summed over rows: the mean of L over KV heads. With `axis` the part of this
    shard's tokens.
  """
  del implementation
  problem = posed(scores, query, queries, window, scale, segment_ids, axis)
  over_shards = lambda reduce, x: x if axis is None else reduce(x, axis)
  asked, key = map(lax.stop_gradient, (problem.asked, key))
  batch, n, groups = scores.shape

  def body(best_BxGxN, block):
    shifted_BxGxRxCxN, total_weight, candidate_Bx1xCxN = _shifted_logits(
      block, key, problem.window, problem.scale, axis
    )
    counted_Bx1xCxN = candidate_Bx1xCxN & (block.weight[:, None, :, None] > 0)
    log_BxGxCxN = jnp.max(shifted_BxGxRxCxN - jnp.log(total_weight), axis=2)
    log_BxGxCxN = jnp.where(counted_Bx1xCxN, log_BxGxCxN, -jnp.inf)
    return jnp.maximum(best_BxGxN, jnp.max(log_BxGxCxN, axis=2)), None

  blocks = query_blocks(asked, key, queries, problem.start, problem.weight)
  best_BxGxN, _ = lax.scan(body, jnp.full((batch, groups, n), -jnp.inf), blocks)
  counts_BxGxN = best_BxGxN > -jnp.inf
  error_BxGxN = jnp.where(
    counts_BxGxN, jnp.swapaxes(scores, 1, 2) - jnp.where(counts_BxGxN, best_BxGxN, 0), 0
  )
  count_BxGx1 = jnp.maximum(over_shards(lax.psum, _sum(counts_BxGxN.astype(jnp.float32))), 1)
  # The constant: the loss is smallest there, so that it needs no gradient.
  mean_BxGx1 = lax.stop_gradient(over_shards(lax.psum, _sum(error_BxGxN)) / count_BxGx1)
  squares = jnp.where(counts_BxGxN, (error_BxGxN - mean_BxGx1) ** 2, 0) / count_BxGx1
  return jnp.sum(squares) / groups


class Static(NamedTuple):
  """Options of the loss, besides its arrays."""

  window: int
  scale: float
  axis: str | None
  kernels: bool  # for Hopper GPUs

  @property
  def options(self) -> dict[str, Any]:
    """Arguments by keyword of both implementations."""
    return {"window": self.window, "scale": self.scale, "axis": self.axis}


def _asked(query, queries, axis):
  """Gathers the queries at [B, C] positions: [B, C, H, D]. Each lies on one shard."""
  if axis is None:
    return jnp.take_along_axis(query, queries[..., None, None], axis=1)
  index = (queries - first_token(query.shape[1], axis))[..., None, None]
  here = (index >= 0) & (index < query.shape[1])
  rows = jnp.take_along_axis(query, jnp.clip(index, 0, query.shape[1] - 1), axis=1)
  return lax.psum(jnp.where(here, rows, 0), axis)


def first_token(length: int, axis: str | None) -> jax.Array | int:
  """Returns the index in its row of the first of this shard's `length` tokens."""
  return 0 if axis is None else lax.axis_index(axis) * length


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _loss(scores, asked, key, queries, start, weight, static):
  return _forward(scores, asked, key, queries, start, weight, static)[0]


def _forward(scores, asked, key, queries, start, weight, static):
  if static.kernels:
    from sparsek.kernels.hopper import scorer_loss as hopper

    first = first_token(scores.shape[1], static.axis)
    total, d_scores = hopper.attention_mass(
      scores, asked, key, queries - first, start - first, weight, **static.options
    )
  else:
    total, d_scores = _by_xla(scores, asked, key, queries, start, weight, **static.options)
  # The shards' parts sum to the total, and each shard has the gradient of the total in its scores.
  total = total if static.axis is None else total / lax.axis_size(static.axis)
  return total, saved.saved(d_scores)


@functools.partial(jax.jit, static_argnames=("window", "scale", "axis"))
def _by_xla(scores, asked, key, queries, start, weight, *, window, scale, axis):
  """Returns the loss and its gradient in the scores, a block of queries at a time."""
  batch, n, groups = scores.shape
  scores_BxGx1xN = jnp.swapaxes(scores, 1, 2)[:, :, None]
  over_shards = lambda reduce, x: x if axis is None else reduce(x, axis)

  def body(carry, block):
    total, d_scores_BxGxN = carry
    weight_BxC = block.weight
    attention_BxGxCxN, candidate_Bx1xCxN = attention_to_candidates(block, key, window, scale, axis)
    candidates_BxGxCxN = jnp.where(candidate_Bx1xCxN, scores_BxGx1xN, np.finfo(np.float32).min)
    top_score = over_shards(lax.pmax, _max(candidates_BxGxCxN))
    top_score = jnp.where(jnp.isfinite(top_score), top_score, 0)  # as logsumexp does
    total_exp = over_shards(lax.psum, _sum(jnp.exp(candidates_BxGxCxN - top_score)))
    # the logarithm of what the scores expect of the candidates' attention
    expected_BxGxCxN = scores_BxGx1xN - top_score - jnp.log(total_exp)
    information_BxGxCxN = jnp.where(
      attention_BxGxCxN > 0, attention_BxGxCxN * (jnp.log(attention_BxGxCxN) - expected_BxGxCxN), 0
    )
    mass_BxGxC, information_BxGxC = over_shards(
      lax.psum, (jnp.sum(attention_BxGxCxN, axis=-1), jnp.sum(information_BxGxCxN, axis=-1))
    )
    loss_BxGxC = information_BxGxC - jax.scipy.special.xlogy(mass_BxGxC, mass_BxGxC)
    expected_BxGxCxN = jnp.where(
      candidate_Bx1xCxN, mass_BxGxC[..., None] * jnp.exp(expected_BxGxCxN), 0
    )
    d_scores_BxGxN += jnp.einsum(
      "bgcj,bc->bgj",
      expected_BxGxCxN - attention_BxGxCxN,
      weight_BxC,
      precision=lax.Precision.HIGHEST,
    )
    return (total + jnp.sum(loss_BxGxC * weight_BxC[:, None]), d_scores_BxGxN), None

  zero = jnp.zeros((), jnp.float32), jnp.zeros((batch, groups, n), jnp.float32)
  (total, d_scores), _ = lax.scan(body, zero, query_blocks(asked, key, queries, start, weight))
  return total, jnp.swapaxes(d_scores, 1, 2)


class QueryBlock(NamedTuple):
  """Queries that are compared at the same time.

  Attributes:
    asked: [B, C, G, H / G, D].
    last, start: [B, C, 1] int32, their positions and the first tokens of their documents.
    weight: [B, C] float32.
  """

  asked: jax.Array
  last: jax.Array
  start: jax.Array
  weight: jax.Array


def query_blocks(
  asked: jax.Array, key: jax.Array, queries: jax.Array, start: jax.Array, weight: jax.Array
) -> QueryBlock:
  """Cuts queries into blocks of equal size, the axis of `lax.scan`, with BLOCK_LOGITS logits each;
  the last one is filled up with queries of weight 0.
  """
  (batch, number, heads, _), (_, n, groups, _) = asked.shape, key.shape
  asked = asked.reshape(batch, number, groups, -1, asked.shape[-1])
  by_query = asked, queries[..., None], start[..., None], weight
  return QueryBlock(*in_blocks(batch * heads * n, *by_query))


def in_blocks(pairs: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Cuts the queries of [B, C, ...] arrays into blocks of equal size: [blocks, B, size, ...].

  A block has as many queries as make BLOCK_LOGITS pairs with tokens, if each has so many `pairs`;
  all of them for 0. The last block is filled up with zeros.
  """
  number = arrays[0].shape[1]
  most = max(1, BLOCK_LOGITS // pairs) if pairs else number
  size = -(-number // -(-number // most))

  def cut(x):
    x = jnp.pad(x, ((0, 0), (0, -number % size), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

  return tuple(map(cut, arrays))


def visible_keys(
  block: QueryBlock, length: int, window: int, axis: str | None
) -> tuple[jax.Array, jax.Array]:
  """Returns which of the `length` keys that are here a query sees, [B, C, N], and which of them are
  its candidates, [B, 1, C, N].
  """
  j = first_token(length, axis) + jnp.arange(length, dtype=jnp.int32)
  seen_BxCxN = (j <= block.last) & (j >= block.start)
  return seen_BxCxN, (seen_BxCxN & (j + window <= block.last))[:, None]


def attention_to_candidates(
  block: QueryBlock, key: jax.Array, window: int, scale: float, axis: str | None
) -> tuple[jax.Array, jax.Array]:
  """Returns the attention of queries to their candidates among the keys that are here, averaged
  over the query heads of a KV head, [B, G, C, N] float32 and 0 elsewhere; and which keys are
  candidates, [B, 1, C, N].
  """
  shifted_BxGxRxCxN, total_weight, candidate_Bx1xCxN = _shifted_logits(
    block, key, window, scale, axis
  )
  attention_BxGxCxN = jnp.mean(jnp.exp(shifted_BxGxRxCxN) / total_weight, axis=2)
  return jnp.where(candidate_Bx1xCxN, attention_BxGxCxN, 0), candidate_Bx1xCxN


def _shifted_logits(block, key, window, scale, axis):
  """Returns logits less the largest of a query, [B, G, R, C, N]; the sum of their exponentials over
  all keys that it sees, [B, G, R, C, 1]; and which keys are candidates, [B, 1, C, N].
  """
  seen_BxCxN, candidate_Bx1xCxN = visible_keys(block, key.shape[1], window, axis)
  over_shards = lambda reduce, x: x if axis is None else reduce(x, axis)
  logits_BxGxRxCxN = (
    jnp.einsum("bcgrd,bjgd->bgrcj", block.asked, key, preferred_element_type=jnp.float32) * scale
  )
  logits_BxGxRxCxN = jnp.where(seen_BxCxN[:, None, None], logits_BxGxRxCxN, LOWEST)
  shifted_BxGxRxCxN = logits_BxGxRxCxN - over_shards(lax.pmax, _max(logits_BxGxRxCxN))
  total_weight = over_shards(lax.psum, _sum(jnp.exp(shifted_BxGxRxCxN)))
  return shifted_BxGxRxCxN, total_weight, candidate_Bx1xCxN


def _max(x):
  return jnp.max(x, axis=-1, keepdims=True)


def _sum(x):
  return jnp.sum(x, axis=-1, keepdims=True)


def _backward(static, residuals, d_total):
  return (d_total * residuals[0], None, None, None, None, None)


_loss.defvjp(_forward, _backward)
