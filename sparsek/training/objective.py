"""What a step of training makes small: cross-entropy, a teacher's predictions, the scorers' own
loss.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsek.config import TransformerConfig
from sparsek.model.transformer import Params, Transformer, output_matrix
from sparsek.training.distillation import chunked_distillation
from sparsek.training.loss import Batch, chunked_cross_entropy, next_token_targets


class Teacher(NamedTuple):
  """A model to learn from, and its weight in [0, 1]."""

  config: TransformerConfig
  params: Params
  weight: float


class Losses(NamedTuple):
  """Sums over a batch, float32 scalars.

  Attributes:
    objective: (1 - weight) cross_entropy + weight divergence, the one that has a gradient with a
      teacher; without one the cross-entropy.
    cross_entropy: in nats, over the counted targets.
    divergence: KL(teacher || model) in nats over the same targets; 0 without a teacher.
    scorers: the auxiliary loss of `SparseKAttention` over rows, a mean over sparsek layers; 0
      unless it is asked for.
  """

  objective: jax.Array
  cross_entropy: jax.Array
  divergence: jax.Array
  scorers: jax.Array


def _hidden(config, params, batch, packed, key=None, mutable=()):
  """Final hidden states [B * n, E], and the mean over sparsek layers of what they leave in the
  collections `mutable`.
  """
  segment_ids = batch["segment_ids"][:, :-1] if packed else None
  rngs = {} if key is None else {"scorer_noise": key, "scorer_loss": jax.random.fold_in(key, 1)}
  hidden, left = Transformer(config).apply(
    {"params": params},
    batch["tokens"][:, :-1],
    segment_ids=segment_ids,
    method="hidden",
    rngs=rngs,
    mutable=list(mutable),
  )
  scorers = sum(map(jnp.sum, jax.tree.leaves(left)), jnp.zeros(())) / max(
    config.layer_kinds.count("sparsek"), 1
  )
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
) -> Losses:
  """The losses of a batch.

  Args:
    config, params: the model and its parameters.
    batch: as in `next_token_targets`.
    chunk: rows of logits held at once.
    packed: rows may hold more than one document; else segment_ids only tell padding at their ends,
      and attention, which is causal, needs none.
    scorer_loss: whether to compute the auxiliary loss of `SparseKAttention`.
    key: of the noise on the scores, which there is none of with None, and of the queries of the
      auxiliary loss, which needs it.
    teacher: costs a forward pass of it; no gradient reaches it.
  """
  targets, counted = (x.reshape(-1) for x in next_token_targets(batch))
  hidden, scorers = _hidden(
    config, params, batch, packed, key, ["scorer_loss"] if scorer_loss else []
  )
  matrix = output_matrix(config, params)
  if teacher is None:
    loss = chunked_cross_entropy(hidden, matrix, targets, counted, chunk)
    return Losses(loss, loss, jnp.zeros(()), scorers)
  theirs, _ = _hidden(teacher.config, teacher.params, batch, packed)
  sums = chunked_distillation(
    hidden,
    matrix,
    theirs,
    output_matrix(teacher.config, teacher.params),
    targets,
    counted,
    teacher.weight,
    chunk,
  )
  return Losses(*sums, scorers)


def scorer_warmup_loss(
  config: TransformerConfig, params: Params, batch: Batch, packed: bool, key: jax.Array
) -> jax.Array:
  """`Losses.scorers` of a forward pass in which sparsek layers attend to everything: no logits, and
  no gradient but that of the scorers' parameters.
  """
  return _hidden(config, params, batch, packed, key, ["scorer_warmup"])[1]
