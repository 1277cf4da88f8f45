"""Checks of the random keys that callers hand in."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsek.storage.files import shown


def random_keys(name: str, value: Any, shape: tuple[int, ...] = ()) -> jax.Array:
  """Returns random keys of this shape, typed ones also for those of `jax.random.PRNGKey`.

  Args:
    name: of the argument that holds them.
    value: what was given.
    shape: () for one key, [B] for a key of each row.
  Raises:
    ValueError: for what is no random key, such as a seed, and for another shape.
  """
  seed = value if type(value) is int and value >= 0 else 0
  example = f"jax.random.key({seed})"
  needed = f"a random key of JAX, such as {example}"
  if shape:
    needed = f"a random key of JAX for each row, such as jax.random.split({example}, {shape[0]})"
  is_array = isinstance(value, (jax.Array, np.ndarray))
  if is_array and value.dtype == jnp.uint32 and value.ndim:
    try:
      value = jax.random.wrap_key_data(value)
    except TypeError:  # the last axis is not that of a key
      pass
  if not (isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)):
    given = f" of {value.dtype} {value.shape}" if is_array else f"={' '.join(shown(value).split())}"
    raise ValueError(f"{name}{given} must be {needed}")
  if value.shape != shape:
    raise ValueError(f"{name} of shape {value.shape} must be {needed}")
  return value
