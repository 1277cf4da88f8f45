"""AdamW with linear warm-up and cosine decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsek.config import OptimizerConfig
from sparsek.model import lora


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
  """Returns the learning rate as a function of the number of updates made so far.

  Update number s = 1, ..., num_steps uses `learning_rate * s / warmup_steps` up to s =
  warmup_steps, then falls along half a cosine to `learning_rate * final_lr_ratio` at s = num_steps.
  (The first update is not wasted on a rate of 0.)
  """

  def schedule(count):
    s = jnp.asarray(count, jnp.float32) + 1.0
    warmup = s / max(config.warmup_steps, 1)
    progress = jnp.clip(
      (s - config.warmup_steps) / max(config.num_steps - config.warmup_steps, 1), 0.0, 1.0
    )
    cosine = config.final_lr_ratio + (1.0 - config.final_lr_ratio) * 0.5 * (
      1.0 + jnp.cos(jnp.pi * progress)
    )
    return config.learning_rate * jnp.where(s <= config.warmup_steps, warmup, cosine)

  return schedule


def decay_mask(params: Any) -> Any:
  """Returns a tree of bools like `params`: True where weight decay applies.

  It applies to matrices: leaves called "kernel", and adapters. Names decide and not ranks, because
  scanned layers stack a rank-1 norm scale into rank 2, and embeddings are matrices by rank only.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: getattr(path[-1], "key", None) in lora.MATRICES, params
  )


def _is_within(path: tuple, name: str) -> bool:
  """Returns whether a module or parameter of that name is on a path."""
  return any(getattr(key, "key", None) == name for key in path)


def trainable_mask(params: Any, trainable: str) -> Any:
  """Returns a tree of bools like `params`: True where a parameter changes.

  Args:
    params: of a model.
    trainable: `OptimizerConfig.trainable`.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: trainable == "all" or _is_within(path, trainable), params
  )


def scale_scorers(multiplier: float) -> optax.GradientTransformation:
  """Returns a transformation that multiplies the updates in modules called "scorer"."""

  def scale(path, update):
    return multiplier * update if _is_within(path, "scorer") else update

  return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  """Returns AdamW: clipping, Adam moments, weight decay, the schedule, the scorers' own rate.

  Clipping is by global norm, the moments are float32, weight decay is decoupled and applies to
  matrices.

  The structure of the state depends on the parameters only, so that a run can be resumed with other
  values of any optimizer flag. With adapters the state is that of the learned parameters (see
  `sparsek.model.lora.split`): `init` takes all parameters, `update` the learned ones and their
  gradients.
  """
  # scale_scorers comes last: it has no state, so those before it keep their index in checkpoints.
  chain = optax.chain(
    optax.clip_by_global_norm(config.grad_clip) if config.grad_clip > 0 else optax.identity(),
    optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=1e-8, mu_dtype=jnp.float32),
    optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    optax.scale_by_learning_rate(learning_rate_schedule(config)),
    scale_scorers(config.scorer_lr_multiplier),
  )
  return optax.GradientTransformation(
    lambda params: chain.init(lora.split(params)[0]), chain.update
  )
