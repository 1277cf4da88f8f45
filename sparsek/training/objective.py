"""Training objective: cross-entropy, divergence from a teacher, the scorers' auxiliary loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsek.config import TransformerConfig
from sparsek.model.transformer import Params, Transformer, output_matrix
from sparsek.training.distillation import chunked_distillation
from sparsek.training.loss import Batch, chunked_cross_entropy, token_cross_entropy


class Teacher(NamedTuple):
  """A model to learn from, and the weight in [0, 1] of the divergence from it."""

  config: TransformerConfig
  params: Params
  weight: float


class Losses(NamedTuple):
  """Sums over a batch, float32 scalars.

  Attributes:
    objective: the cross-entropy; with a teacher (1 - weight) cross_entropy + weight divergence, in
      which case cross_entropy and divergence themselves have no gradient.
    cross_entropy: in nats, over the counted targets.
    divergence: KL(teacher || model) in nats over the same targets; 0 without a teacher.
    scorers: the auxiliary loss of `SparseKAttention`, a sum over rows and a mean over the
      layers that compute it; 0 where it is not computed, as by default.
  """

  objective: jax.Array
  cross_entropy: jax.Array
  divergence: jax.Array
  scorers: jax.Array


def _hidden(config, params, batch, packed, key=None, mutable=(), score_factor=None):
  """Returns the final hidden states [B * n, E], and the mean auxiliary loss of layers with scorers.

  Each layer writes its loss to a collection; `mutable` names that collection.
  """
  segment_ids = batch["segment_ids"] if packed else None
  rngs = {} if key is None else {"scorer_noise": key, "scorer_loss": jax.random.fold_in(key, 1)}
  hidden, collections = Transformer(config, trace_once=True).apply(
    {"params": params},
    batch["tokens"],
    segment_ids=segment_ids,
    row_index=batch["row_index"],
    score_factor=score_factor,
    method="hidden",
    rngs=rngs,
    mutable=list(mutable),
  )
  losses = jax.tree.leaves(collections)
  scorers = sum(map(jnp.sum, losses), jnp.zeros(())) / max(sum(loss.size for loss in losses), 1)
  return hidden.reshape(-1, hidden.shape[-1]), scorers


def summed_losses(
  config: TransformerConfig,
  params: Params,
  batch: Batch,
  chunk: int,
  packed: bool = True,
  *,
  scorer_loss: bool = False,
  key: jax.Array | None = None,
  teacher: Teacher | None = None,
  score_factor: jax.Array | None = None,
) -> Losses:
  """Returns the losses of a batch.

  Args:
    config, params: the model and its parameters.
    batch: as `cut_targets` returns it; inside `jax.shard_map` over `context` the tokens, targets
      and counted of this shard, and whole rows of segment_ids.
    chunk: rows of logits held at once.
    packed: True if rows may hold several documents. Otherwise segment_ids only mark padding at the
      ends of rows, and attention ignores them, since causal attention does not see what follows.
    scorer_loss: compute the auxiliary loss of `SparseKAttention` too.
    key: random key of the noise on the scores and of the queries of the auxiliary loss, which needs
      it. None: no noise.
    score_factor: of gates, see `Transformer.hidden`; not of the teacher's.
    teacher: the model to learn from, which costs a forward pass; no gradient reaches it.
  """
  targets, counted = batch["targets"].reshape(-1), batch["counted"].reshape(-1)
  hidden, scorers = _hidden(
    config, params, batch, packed, key, ["scorer_loss"] if scorer_loss else [], score_factor
  )
  matrix = output_matrix(config, params)
  if teacher is None:
    loss = chunked_cross_entropy(hidden, matrix, targets, counted, chunk)
    return Losses(loss, loss, jnp.zeros(()), scorers)
  teacher_hidden, _ = _hidden(teacher.config, teacher.params, batch, packed)
  sums = chunked_distillation(
    hidden,
    matrix,
    teacher_hidden,
    output_matrix(teacher.config, teacher.params),
    targets,
    counted,
    teacher.weight,
    chunk,
  )
  return Losses(*sums, scorers)


def token_losses(
  config: TransformerConfig, params: Params, batch: Batch, chunk: int, packed: bool = True
) -> jax.Array:
  """Returns the cross-entropy in nats of each target, float32 [B, n]; 0 where it does not count.

  The arguments are those of `summed_losses`.
  """
  hidden, _ = _hidden(config, params, batch, packed)
  targets, counted, matrix = batch["targets"], batch["counted"], output_matrix(config, params)
  losses = token_cross_entropy(hidden, matrix, targets.reshape(-1), counted.reshape(-1), chunk)
  return losses.reshape(targets.shape)


def scorer_warmup_loss(
  config: TransformerConfig, params: Params, batch: Batch, packed: bool, key: jax.Array | None
) -> jax.Array:
  """Returns `Losses.scorers` of a forward pass in which sparsek layers attend to everything.

  It computes no logits, and only the scorers' parameters have a gradient.
  """
  return _hidden(config, params, batch, packed, key, ["scorer_warmup"])[1]
