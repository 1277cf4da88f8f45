"""AdamW with linear warm-up and cosine decay."""

import jax
import jax.numpy as jnp
import optax

from sparsek.config import OptimizerConfig
from sparsek.model import lora


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
  """The learning rate as a function of the number of updates made so far (0 for the first update).

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


def decay_mask(params):
  """A tree of bools like `params`: True where weight decay applies, which is on matrices: leaves
  called "kernel", and adapters.

  Names decide and not ranks, because scanned layers stack a rank-1 norm scale into rank 2, and
  embeddings are matrices by rank only.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: getattr(path[-1], "key", None) in lora.MATRICES, params
  )


def trainable_mask(params, trainable: str):
  """A tree of bools like `params`: which parameters change, as `OptimizerConfig.trainable` says."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: (
      trainable == "all" or any(getattr(key, "key", None) == trainable for key in path)
    ),
    params,
  )


def scale_scorers(multiplier: float) -> optax.GradientTransformation:
  """Multiplies the updates of every parameter of a scoring network, which the models call
  "scorer".
  """
  in_scorer = lambda path: any(getattr(key, "key", None) == "scorer" for key in path)
  return optax.stateless(
    lambda updates, _: jax.tree_util.tree_map_with_path(
      lambda path, x: multiplier * x if in_scorer(path) else x, updates
    )
  )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  """Clipping by global norm, Adam moments in float32, decoupled weight decay on matrices, the
  schedule, the scorers' own rate.

  The structure of the state depends on the parameters only, so that a run can be resumed with any
  other optimizer flag. With adapters among them it is that of the learned ones,
  `sparsek.model.lora.split`: `init` takes all parameters, `update` the learned ones and their
  gradients.
  """
  # last: it has no state, and those before it keep their places in checkpoints
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
