"""What loops need to run inside `jax.shard_map`."""

import jax
import jax.numpy as jnp


def varying_like(x: jax.Array, like: jax.Array) -> jax.Array:
  """`x`, typed as varying over the manual mesh axes that `like` varies over: a loop's first carry must have the type of the later ones.

  A selection between two equal branches says so under every JAX version, and compilers drop it.
  """
  return jnp.where(jnp.any(like == like), x, x)
