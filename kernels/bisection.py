"""Binary search for many integers at once, under XLA and in GPU kernels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

Search = tuple[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]


def logical_not(x: jax.Array) -> jax.Array:
  """Negates booleans; Mosaic cannot lower `~` of them."""
  return x ^ jnp.array(True)


def bisect(size: int, *searches: Search) -> tuple[jax.Array, ...]:
  """Finds for each (low, high, test) the smallest integer in [low, high] that passes, elementwise.

  `high` is assumed to pass, and high - low to be at most `size`. All searches share one loop, so
  that their loads do not wait for each other.
  """

  def halve(_, ranges):
    middles = [(low + high) >> 1 for low, high in ranges]
    results = [test(middle) for (*_, test), middle in zip(searches, middles)]
    return tuple(
      (
        jnp.where((low < high) & logical_not(passes), middle + 1, low),
        jnp.where((low < high) & passes, middle, high),
      )
      for (low, high), middle, passes in zip(ranges, middles, results)
    )

  ranges = lax.fori_loop(
    0, size.bit_length(), halve, tuple((low, high) for low, high, _ in searches)
  )
  return tuple(low for low, _ in ranges)
