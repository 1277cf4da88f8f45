"""Distillation loss, the divergence from a teacher, that never holds all logits."""

import functools

import jax
import jax.numpy as jnp

from sparsek.model.transformer import hidden_to_logits
from sparsek.training.loss import cut, gradients_by_chunk


def _chunk_losses(
  weight,
  differentiate,
  hidden_CxE,
  matrix_ExV,
  teacher_hidden_CxE,
  teacher_matrix_ExV,
  targets_C,
  counted_C,
):
  """Returns the summed (cross-entropy, divergence) of a chunk, and a gradient or None.

  With `differentiate` it is the gradient of (1 - weight) cross-entropy + weight divergence in the
  model's logits, [C, V].
  """
  log_p_CxV, log_q_CxV = (
    jax.nn.log_softmax(hidden_to_logits(x, m))
    for x, m in ((teacher_hidden_CxE, teacher_matrix_ExV), (hidden_CxE, matrix_ExV))
  )
  p_CxV = jnp.exp(log_p_CxV)
  is_target_CxV = jax.lax.broadcasted_iota(jnp.int32, p_CxV.shape, 1) == targets_C[:, None]

  def sum_over_counted(losses_CxV):
    return jnp.sum(jnp.where(counted_C, jnp.sum(losses_CxV, axis=-1), 0.0))

  sums = (
    sum_over_counted(jnp.where(is_target_CxV, -log_q_CxV, 0.0)),
    sum_over_counted(p_CxV * (log_p_CxV - log_q_CxV)),
  )
  if not differentiate:
    return sums, None
  return sums, jnp.where(
    counted_C[:, None], jnp.exp(log_q_CxV) - ((1 - weight) * is_target_CxV + weight * p_CxV), 0.0
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def chunked_distillation(
  hidden: jax.Array,
  matrix: jax.Array,
  teacher_hidden: jax.Array,
  teacher_matrix: jax.Array,
  targets: jax.Array,
  counted: jax.Array,
  weight: float,
  chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the sums over counted tokens of (1 - weight) CE + weight KL, of CE and of KL.

  CE is the cross-entropy of the targets under q, KL = sum_v p_v log(p_v / q_v), where p and q are
  the softmax of the teacher's and the model's logits, at temperature 1. At most `chunk` rows of
  logits exist at a time, as in `chunked_cross_entropy`.

  Only the first sum has a gradient, and only in `hidden` and `matrix`; in the model's logits it is
  softmax(logits) - (1 - weight) one_hot - weight p.

  Args:
    hidden, matrix, targets, counted, chunk: as in `chunked_cross_entropy`.
    teacher_hidden, teacher_matrix: [N, E'] and [E', V] of the teacher.
    weight: in [0, 1].
  Returns:
    three float32 scalars.
  """

  def body(sums, xs):
    hidden_CxE, teacher_CxE, targets_C, counted_C = xs
    chunk_sums, _ = _chunk_losses(
      weight, False, hidden_CxE, matrix, teacher_CxE, teacher_matrix, targets_C, counted_C
    )
    return tuple(map(jnp.add, sums, chunk_sums)), None

  sums, _ = jax.lax.scan(
    body, (jnp.zeros((), jnp.float32),) * 2, cut(chunk, hidden, teacher_hidden, targets, counted)
  )
  return _objective(weight, *sums)


def _objective(weight, cross_entropy, divergence):
  return (1 - weight) * cross_entropy + weight * divergence, cross_entropy, divergence


def _forward(hidden, matrix, teacher_hidden, teacher_matrix, targets, counted, weight, chunk):
  def chunk_losses(hidden_CxE, weights, teacher_CxE, targets_C, counted_C):
    return _chunk_losses(
      weight, True, hidden_CxE, weights, teacher_CxE, teacher_matrix, targets_C, counted_C
    )

  sums, gradients = gradients_by_chunk(
    chunk_losses, 2, chunk, hidden, matrix, teacher_hidden, targets, counted
  )
  return _objective(weight, *sums), gradients


def _backward(weight, chunk, residuals, d_sums):
  d_hidden, d_matrix = residuals
  return (d_sums[0] * d_hidden).astype(d_hidden.dtype), d_sums[0] * d_matrix, None, None, None, None


chunked_distillation.defvjp(_forward, _backward)
