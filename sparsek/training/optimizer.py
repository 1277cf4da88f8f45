"""AdamW with linear warm-up and cosine decay, whose moments survive the borders of stages.

The moments of a parameter change while it is trained, and begin at zero. A stage that freezes the
parameter leaves them as they are.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsek.config import OptimizerConfig, TransformerConfig
from sparsek.model import lora
from sparsek.model.transformer import parameter_specs


def learning_rate_schedule(config: OptimizerConfig, begin: int = 0) -> optax.Schedule:
  """Returns the learning rate as a function of the number of updates made so far.

  Update number s = 1, ..., num_steps uses `learning_rate * s / warmup_steps` up to s =
  warmup_steps, then falls along half a cosine to `learning_rate * final_lr_ratio` at s = num_steps.
  (The first update is not wasted on a rate of 0.) A stage's updates are those after the first
  `begin` of the run.
  """

  def schedule(count):
    s = jnp.asarray(count - begin, jnp.float32) + 1.0
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


def trainable_mask(params: Any, trainable: str, config: TransformerConfig | None = None) -> Any:
  """Returns a tree of bools like `params`: True where a parameter changes.

  Args:
    params: of a run.
    trainable: `OptimizerConfig.trainable`.
    config: the model of a stage, which perhaps has not all of them; None: it has.
  """
  specs = params if config is None else parameter_specs(config, 1)
  has = {path for path, _ in jax.tree_util.tree_leaves_with_path(specs)}
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path in has and (trainable == "all" or _is_within(path, trainable)), params
  )


def keep_frozen(changes: Any, old: Any, new: Any) -> Any:
  """Returns the state of the optimizer `new` with the moments of `old` where nothing changes.

  Args:
    changes: as `trainable_mask` returns it for the learned parameters.
    old, new: before and after an update.
  """
  of_adam = lambda state: isinstance(state, optax.ScaleByAdamState)

  def choose(new, old):
    if not of_adam(new):
      return new
    pick = lambda changes, new, old: new if changes else old
    return new._replace(
      mu=jax.tree.map(pick, changes, new.mu, old.mu), nu=jax.tree.map(pick, changes, new.nu, old.nu)
    )

  return jax.tree.map(choose, new, old, is_leaf=of_adam)


def scale_scorers(multiplier: float) -> optax.GradientTransformation:
  """Returns a transformation that multiplies the updates in modules called "scorer"."""

  def scale(path, update):
    return multiplier * update if _is_within(path, "scorer") else update

  return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def make_optimizer(
  config: OptimizerConfig, begin: int = 0, late: Any = None
) -> optax.GradientTransformation:
  """Returns AdamW: clipping, Adam moments, weight decay, the schedule, the scorers' own rate.

  Clipping is by global norm, the moments are float32, weight decay is decoupled and applies to
  matrices.

  The structure of the state depends on the parameters only, so that a run can be resumed with other
  values of any optimizer flag. With adapters the state is that of the learned parameters (see
  `sparsek.model.lora.split`): `init` takes all parameters, `update` the learned ones and their
  gradients.

  Args:
    config: the settings.
    begin: steps of the run before those of the schedule.
    late: a tree of integers like the learned parameters: the steps of the run in which each was
      frozen. Bias is corrected for those in which it was trained. None: all were trained in all.
  """

  def chain(count: Any = 0) -> optax.GradientTransformation:
    # scale_scorers comes last: it has no state, so those before it keep their index in checkpoints.
    return optax.chain(
      optax.clip_by_global_norm(config.grad_clip) if config.grad_clip > 0 else optax.identity(),
      _adam(config, late, count),
      optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
      optax.scale_by_learning_rate(learning_rate_schedule(config, begin)),
      scale_scorers(config.scorer_lr_multiplier),
    )

  def update(grads, state, params=None):
    (count,) = (part.count for part in state if isinstance(part, optax.ScaleByScheduleState))
    return chain(count).update(grads, state, params)

  return optax.GradientTransformation(lambda params: chain().init(lora.split(params)[0]), update)


def _adam(config: OptimizerConfig, late: Any, count: Any) -> optax.GradientTransformation:
  """Returns the part of Adam; `count` is the number of steps of the run before the update."""
  adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=1e-8, mu_dtype=jnp.float32)
  if late is None:
    return adam

  def update(grads, state, params=None):
    updates, state = adam.update(grads, state, params)
    ratio = lambda steps: (1 - config.b1**steps) / jnp.sqrt(1 - config.b2**steps)

    def correct(update, frozen):
      if not frozen:
        return update
      trained = jnp.maximum(count + 1 - frozen, 1).astype(jnp.float32)
      return update * ratio(state.count) / ratio(trained)

    return jax.tree.map(correct, updates, late), state

  return optax.GradientTransformation(adam.init, update)
