"""What loops and kernels need inside `jax.shard_map` and `jax.vmap`."""

import jax
import jax.numpy as jnp


def varying_like(x: jax.Array, like: jax.Array) -> jax.Array:
  """`x`, typed as varying over the manual mesh axes that `like` varies over: a loop's first carry
  must have the type of the later ones.

  A selection between two equal branches says so under every JAX version, and compilers drop it.
  """
  return jnp.where(jnp.any(like == like), x, x)


def over_batch(f, *args):
  """f(*args), every array of which has a leading batch axis, with a vmap that merges its axis into
  that one.
  """
  f = jax.custom_batching.custom_vmap(f)

  @f.def_vmap
  def _(size, batched, *args):
    merge = lambda is_batched, x: (
      x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
    ).reshape(-1, *x.shape[1 + is_batched :])
    outs = over_batch(f.fun, *jax.tree.map(merge, tuple(batched), args))
    return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), outs), jax.tree.map(
      lambda _: True, outs
    )

  return f(*args)
