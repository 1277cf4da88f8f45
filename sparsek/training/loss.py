"""Next-token cross-entropy that never holds all logits."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from sparsek.model.transformer import hidden_to_logits

Batch = Mapping[str, jax.Array]


def next_token_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Returns the targets of a batch, and the mask of those that count.

  Args:
    batch: "tokens", "segment_ids": [B, n + 1] int32; segment 0 is padding. Optionally "counted":
      [B, n + 1] bool, tokens that may count.
  Returns:
    targets [B, n] int32 and counted [B, n] bool: a target counts where it may and belongs to the
    same document as the token before it.
  """
  segment_ids = batch["segment_ids"]
  counted = (segment_ids[:, :-1] == segment_ids[:, 1:]) & (segment_ids[:, 1:] != 0)
  if "counted" in batch:
    counted &= batch["counted"][:, 1:]
  return batch["tokens"][:, 1:], counted


def cut_targets(batch: Batch) -> dict[str, jax.Array]:
  """Cuts rows of n + 1 tokens into what a model reads and what it predicts.

  Args:
    batch: as in `next_token_targets`.
  Returns:
    "tokens", "segment_ids": [B, n] of the tokens read; "targets", "counted": as
    `next_token_targets` returns them; "row_index": [B] int32, the index of each row in the batch.
  """
  targets, counted = next_token_targets(batch)
  return {
    "tokens": batch["tokens"][:, :-1],
    "segment_ids": batch["segment_ids"][:, :-1],
    "targets": targets,
    "counted": counted,
    "row_index": jnp.arange(targets.shape[0], dtype=jnp.int32),
  }


def cut(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Cuts [N, ...] arrays into [ceil(N / chunk), chunk, ...], padded with zeros."""
  length = arrays[0].shape[0]
  chunk = min(chunk, length)
  padding = -length % chunk
  return tuple(
    jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1)).reshape(-1, chunk, *a.shape[1:])
    for a in arrays
  )


def _logsumexp(logits_CxV):
  """Returns the logsumexp of each row in one pass; `jax.nn.logsumexp` reads all logits twice.

  It is a reduction of pairs: a maximum m, and the sum of exp(x - m).
  """

  def join(a, b):
    # Equal maxima are a case of their own, as both may be -inf.
    factor = jnp.exp(jnp.where(a[0] == b[0], 0.0, -jnp.abs(a[0] - b[0])))
    total = jnp.where(a[0] < b[0], a[1] * factor + b[1], a[1] + b[1] * factor)
    return jnp.maximum(a[0], b[0]), total

  maximum_C, total_C = jax.lax.reduce(
    (logits_CxV, jnp.ones_like(logits_CxV)), (-jnp.inf, 0.0), join, (1,)
  )
  return maximum_C + jnp.log(total_C)


def _chunk_losses(hidden_CxE, matrix_ExV, targets_C, counted_C):
  """Returns the losses of a chunk, and the logits and logsumexp they were computed from."""
  logits_CxV = hidden_to_logits(hidden_CxE, matrix_ExV)
  logsumexp_C = _logsumexp(logits_CxV)
  target_logit_C = jnp.take_along_axis(logits_CxV, targets_C[:, None], axis=-1)[:, 0]
  return jnp.where(counted_C, logsumexp_C - target_logit_C, 0.0), logits_CxV, logsumexp_C


def token_cross_entropy(
  hidden: jax.Array, matrix: jax.Array, targets: jax.Array, counted: jax.Array, chunk: int
) -> jax.Array:
  """Returns the terms of the sum that `chunked_cross_entropy` returns, float32 [N]; 0 if uncounted.

  The arguments are its; at most `chunk` rows of logits exist at a time.
  """

  def body(carry, xs):
    hidden_CxE, targets_C, counted_C = xs
    return carry, _chunk_losses(hidden_CxE, matrix, targets_C, counted_C)[0]

  losses = jax.lax.scan(body, None, cut(chunk, hidden, targets, counted))[1]
  return losses.reshape(-1)[: len(targets)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked_cross_entropy(
  hidden: jax.Array, matrix: jax.Array, targets: jax.Array, counted: jax.Array, chunk: int
) -> jax.Array:
  """Returns the sum over counted tokens t of logsumexp(h_t W) - (h_t W)[target_t], in float32.

  At most `chunk` rows of logits exist at a time. Under differentiation the gradients are computed
  in the same pass, from the logits of each chunk, so that no matrix product is done twice:
  d(logits) = softmax - one_hot. The backward pass only multiplies them by the incoming scalar.

  Args:
    hidden: [N, E], in the dtype of the matrix products.
    matrix: [E, V] float32.
    targets: [N] int32 in [0, V).
    counted: [N] bool.
    chunk: rows of logits held at once; need not divide N.
  Returns:
    float32 scalar.
  """

  def body(total, xs):
    hidden_CxE, targets_C, counted_C = xs
    return total + jnp.sum(_chunk_losses(hidden_CxE, matrix, targets_C, counted_C)[0]), None

  return jax.lax.scan(body, jnp.zeros((), jnp.float32), cut(chunk, hidden, targets, counted))[0]


def gradients_by_chunk(
  chunk_losses: Callable,
  num_sums: int,
  chunk: int,
  hidden: jax.Array,
  matrix: jax.Array,
  *rows: jax.Array,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, jax.Array]]:
  """Returns sums of losses over all rows, and their gradients, from the logits of chunks.

  Args:
    chunk_losses: (hidden [C, E], matrix [E, V] in the dtype of hidden, chunks of `rows`) -> (sums
      of losses, gradient in the logits [C, V]).
    num_sums: how many sums it returns.
    chunk: rows of logits held at once.
    hidden, matrix: as in `chunked_cross_entropy`.
    rows: [N, ...] arrays that are cut along with hidden.
  Returns:
    sums, and the gradients (hidden's, [N, E] in its dtype; the matrix's, [E, V] float32).
  """
  # Without the barrier XLA converts the matrix again for every chunk.
  weights = jax.lax.optimization_barrier(matrix.astype(hidden.dtype))

  def body(carry, xs):
    sums, d_matrix = carry
    hidden_CxE, *rest = xs
    chunk_sums, d_logits_CxV = chunk_losses(hidden_CxE, weights, *rest)
    d_logits_CxV = d_logits_CxV.astype(hidden.dtype)
    d_hidden_CxE = jnp.matmul(d_logits_CxV, weights.T, preferred_element_type=jnp.float32).astype(
      hidden.dtype
    )
    d_matrix += jnp.matmul(hidden_CxE.T, d_logits_CxV, preferred_element_type=jnp.float32)
    return (tuple(map(jnp.add, sums, chunk_sums)), d_matrix), d_hidden_CxE

  start = ((jnp.zeros((), jnp.float32),) * num_sums, jnp.zeros(matrix.shape, jnp.float32))
  (sums, d_matrix), d_hidden = jax.lax.scan(body, start, cut(chunk, hidden, *rows))
  return sums, (d_hidden.reshape(-1, hidden.shape[-1])[: hidden.shape[0]], d_matrix)


def _forward(hidden, matrix, targets, counted, chunk):
  def chunk_losses(hidden_CxE, weights, targets_C, counted_C):
    losses_C, logits_CxV, logsumexp_C = _chunk_losses(hidden_CxE, weights, targets_C, counted_C)
    softmax_CxV = jnp.exp(logits_CxV - logsumexp_C[:, None])
    is_target_CxV = jax.lax.broadcasted_iota(jnp.int32, softmax_CxV.shape, 1) == targets_C[:, None]
    return (jnp.sum(losses_C),), jnp.where(counted_C[:, None], softmax_CxV - is_target_CxV, 0.0)

  (total,), gradients = gradients_by_chunk(chunk_losses, 1, chunk, hidden, matrix, targets, counted)
  return total, gradients


def _backward(chunk, residuals, d_total):
  d_hidden, d_matrix = residuals
  return (d_total * d_hidden).astype(d_hidden.dtype), d_total * d_matrix, None, None


chunked_cross_entropy.defvjp(_forward, _backward)
