"""Helpers for loops and kernels inside `jax.shard_map` and `jax.vmap`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def varying_like(x: jax.Array, like: jax.Array) -> jax.Array:
  """Returns `x`, typed as varying over the manual mesh axes that `like` varies over.

  A loop's first carry must have the type of the later ones. A selection between two equal branches
  has that type under every JAX version, and compilers drop it.
  """
  return jnp.where(jnp.any(like == like), x, x)


def cast_varying(tree: Any, like: jax.Array) -> Any:
  """Returns the float arrays of `tree`, typed as `varying_like` types them, so that their gradients
  are summed over the axes; for the inputs of functions that have a gradient of their own.

  JAX casts the factors of a product, and compilers drop one that is 1.
  """
  one = jnp.where(jnp.any(like == like), 1.0, 1.0)
  return jax.tree.map(lambda x: x * one.astype(x.dtype), tree)


def over_batch(f: Callable[..., Any], *args: Any) -> Any:
  """Returns f(*args) for arrays with a leading batch axis; `jax.vmap` merges its axis into it."""
  batched_f = jax.custom_batching.custom_vmap(f)

  @batched_f.def_vmap
  def _(size, batched, *args):
    merge = lambda is_batched, x: (
      x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
    ).reshape(-1, *x.shape[1 + is_batched :])
    outs = over_batch(f, *jax.tree.map(merge, tuple(batched), args))
    return (
      jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), outs),
      jax.tree.map(lambda _: True, outs),
    )

  return batched_f(*args)
