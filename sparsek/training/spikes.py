"""Spikes: training steps whose loss or gradient norm leaps, so that their update is skipped.

The decision is made on the device, so that nothing waits for it, and from running means that are
saved with each checkpoint, so that a resumed run decides the same.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

FIRST = 20  # ordinary steps before one can be a spike, unless it is not finite
MEMORY = 100  # ordinary steps that the running means reach back
MOST_IN_A_ROW = 10  # this many are no longer spikes: the run itself has gone wrong


class Spikes(NamedTuple):
  """Float32 running means over the ordinary steps, and int32 counts of both kinds."""

  loss: jax.Array
  grad_norm: jax.Array
  ordinary: jax.Array
  skipped: jax.Array


def start(factor: float, saved: list | None = None) -> Spikes | tuple[()]:
  """Returns the running means that a run begins with, or () where `factor` is 0.

  Args:
    factor: `TrainConfig.spike_factor`; with 0 no step is a spike.
    saved: as `to_json` returned it, for a run that resumes.
  """
  if not factor:
    return ()
  loss, grad_norm, ordinary, skipped = saved or (0.0, 0.0, 0, 0)
  return Spikes(jnp.float32(loss), jnp.float32(grad_norm), jnp.int32(ordinary), jnp.int32(skipped))


def to_json(spikes: Spikes | tuple[()]) -> list:
  """Returns the means and counts as numbers that JSON keeps exactly."""
  return [value.item() for value in jax.device_get(spikes)]


def judge(
  spikes: Spikes, factor: float, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, Spikes]:
  """Returns a bool scalar, whether a step is a spike, and the means for the next step."""
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  leaps = (loss > factor * spikes.loss) | (grad_norm > factor * spikes.grad_norm)
  is_spike = ~finite | (leaps & (spikes.ordinary >= FIRST))
  ordinary = spikes.ordinary + ~is_spike
  weight = 1 / jnp.clip(ordinary, 1, MEMORY).astype(jnp.float32)

  def running_mean(old, value):
    return jnp.where(is_spike, old, old + weight * (value - old))

  return is_spike, Spikes(
    running_mean(spikes.loss, loss),
    running_mean(spikes.grad_norm, grad_norm),
    ordinary,
    spikes.skipped + is_spike,
  )


def keep(is_spike: jax.Array, old: Any, new: Any) -> Any:
  """Returns `old` after a spike, else `new`; the schedule's count of steps is always new."""

  def choose(new, old):
    is_count = isinstance(new, optax.ScaleByScheduleState)
    return new if is_count else jnp.where(is_spike, old, new)

  return jax.tree.map(choose, new, old, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))
