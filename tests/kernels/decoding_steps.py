"""Compiles steps of generation for a device that need not be attached."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparsek.config import TransformerConfig
from sparsek.generation import cache, session
from sparsek.generation.inference import inference_params
from sparsek.runs.checkpoint import abstract_params


def compiled_steps(
  config: TransformerConfig, batch: int, device: jax.Device
) -> jax.stages.Compiled:
  """Compiles the loop of greedy steps of `batch` texts; inside `devices.compiling_for(device)`."""
  shape = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype)
  arguments = (
    jax.eval_shape(functools.partial(inference_params, config), abstract_params(config)),
    jax.eval_shape(lambda: cache.init_cache(config, batch, max_length=1152)),
    shape(jnp.int32, batch),
    shape(bool, batch),
    shape(jnp.int32),
    shape(jnp.int32),
    jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch)),
  )
  sharding = jax.sharding.SingleDeviceSharding(device)
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
  )
  return session.run_steps.lower(
    config, "greedy", 8, *arguments, 0.0, 1.0, 0, np.zeros(0, np.int32)
  ).compile()
