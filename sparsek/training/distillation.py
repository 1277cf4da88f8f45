"""Learning from the predictions of a teacher, such as the dense model that a SPARSEK one was made
from.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp

from sparsek.config import TransformerConfig
from sparsek.data.tokenizer import load_tokenizer
from sparsek.errors import UsageError
from sparsek.huggingface import pretrained
from sparsek.model.transformer import Params, hidden_to_logits
from sparsek.runs import checkpoint
from sparsek.training.loss import cut, gradients_by_chunk

DTYPE = "bfloat16"  # of the teacher's parameters and activations; its logits are float32


def teacher_config(reference: str) -> TransformerConfig:
  """The model that `TrainConfig.distill_from` names, with its own attention. Raises UsageError
  where there is none.
  """
  if reference.startswith(pretrained.PREFIX):
    config = pretrained.load_config(reference.removeprefix(pretrained.PREFIX))
  else:
    config, _ = checkpoint.load_run_config(checkpoint.parse_run_reference(reference)[0])
  return dataclasses.replace(config, dtype=DTYPE, remat="none", implementation=None)


def load_teacher(reference: str, fingerprint: str, vocab_size: int, sharding=None) -> Params:
  """The bfloat16 parameters of that model.

  Raises:
    UsageError: where it cannot be read, has another tokenizer than that of `fingerprint`, or not
      `vocab_size` tokens.
  """
  folder, step = checkpoint.parse_run_reference(reference.removeprefix(pretrained.PREFIX))
  config, hf = teacher_config(reference), reference.startswith(pretrained.PREFIX)
  tokenizer = (
    load_tokenizer(folder) if hf else checkpoint.load_run_tokenizer(os.path.expanduser(folder))
  )
  if tokenizer.fingerprint != fingerprint or config.vocab_size != vocab_size:
    raise UsageError(
      f"--distill_from={reference}: its tokenizer ({tokenizer.name}, "
      f"{tokenizer.fingerprint[:12]}) and vocab_size={config.vocab_size} must be "
      f"those of the data ({fingerprint[:12]}) and the model ({vocab_size})"
    )
  if hf:
    return pretrained.load(folder, dtype=DTYPE, sharding=sharding)[1]
  params, _ = checkpoint.load_params(folder, config, step, sharding)
  return jax.jit(
    lambda tree: jax.tree.map(lambda leaf: leaf.astype(DTYPE), tree), out_shardings=sharding
  )(params)


def abstract_teacher(reference: str) -> Params:
  """Shapes and dtypes of what `load_teacher` returns."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(DTYPE)),
    checkpoint.abstract_params(teacher_config(reference)),
  )


def _of_chunk(
  weight,
  differentiate,
  hidden_CxE,
  matrix_ExV,
  teacher_hidden_CxE,
  teacher_matrix_ExV,
  targets_C,
  counted_C,
):
  """Summed cross-entropy and divergence, and the gradient of (1 - weight) and weight times them in
  the logits.
  """
  log_p_CxV, log_q_CxV = (
    jax.nn.log_softmax(hidden_to_logits(x, m))
    for x, m in ((teacher_hidden_CxE, teacher_matrix_ExV), (hidden_CxE, matrix_ExV))
  )
  p_CxV = jnp.exp(log_p_CxV)
  is_target_CxV = jax.lax.broadcasted_iota(jnp.int32, p_CxV.shape, 1) == targets_C[:, None]
  over_counted = lambda losses_CxV: jnp.sum(jnp.where(counted_C, jnp.sum(losses_CxV, axis=-1), 0.0))
  sums = (
    over_counted(jnp.where(is_target_CxV, -log_q_CxV, 0.0)),
    over_counted(p_CxV * (log_p_CxV - log_q_CxV)),
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
  """Sums over counted tokens of (1 - weight) CE + weight KL, CE and KL, with at most `chunk` rows
  of logits at a time, as in `chunked_cross_entropy`.

  CE is the cross-entropy of the targets under q, KL = sum_v p_v log(p_v / q_v), p and q are the
  softmax of the teacher's and the model's logits: temperature 1. Only the first sum has a gradient,
  softmax(logits) - (1 - weight) one_hot - weight p in the model's logits, and only in `hidden` and
  `matrix`.

  Args:
    hidden, matrix, targets, counted, chunk: as in `chunked_cross_entropy`.
    teacher_hidden, teacher_matrix: [N, E'] and [E', V] of the teacher.
    weight: in [0, 1].
  Returns:
    three float32 scalars.
  """

  def body(sums, xs):
    hidden_CxE, teacher_CxE, targets_C, counted_C = xs
    more, _ = _of_chunk(
      weight, False, hidden_CxE, matrix, teacher_CxE, teacher_matrix, targets_C, counted_C
    )
    return tuple(map(jnp.add, sums, more)), None

  sums, _ = jax.lax.scan(
    body, (jnp.zeros((), jnp.float32),) * 2, cut(chunk, hidden, teacher_hidden, targets, counted)
  )
  return _objective(weight, *sums)


def _objective(weight, cross_entropy, divergence):
  return (1 - weight) * cross_entropy + weight * divergence, cross_entropy, divergence


def _forward(hidden, matrix, teacher_hidden, teacher_matrix, targets, counted, weight, chunk):
  of_chunk = lambda hidden_CxE, weights, teacher_CxE, *rest: _of_chunk(
    weight, True, hidden_CxE, weights, teacher_CxE, teacher_matrix, *rest
  )
  sums, gradients = gradients_by_chunk(
    of_chunk, 2, chunk, hidden, matrix, teacher_hidden, targets, counted
  )
  return _objective(weight, *sums), gradients


def _backward(weight, chunk, residuals, d_sums):
  d_hidden, d_matrix = residuals
  return (d_sums[0] * d_hidden).astype(d_hidden.dtype), d_sums[0] * d_matrix, None, None, None, None


chunked_distillation.defvjp(_forward, _backward)
