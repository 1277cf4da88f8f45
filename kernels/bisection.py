"""Binary search for many integers at once, under XLA and in GPU kernels."""

import functools
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

  `high` is assumed to pass, and high - low to be at most `size`. Tests are called with 0 too, whose
  result does not count: all that need no test share its loads. All searches share one loop, so that
  their loads do not wait for each other.
  """
  return _bisect(size.bit_length(), size.bit_length(), searches)


def bisect_near(
  size: int,
  guesses: tuple[jax.Array, ...],
  any_lane: Callable[[jax.Array], jax.Array],
  *searches: Search,
) -> tuple[jax.Array, ...]:
  """Returns the same as `bisect`, by two tests for each search where all guesses are right.

  Args:
    size, searches: as in `bisect`.
    guesses: of the results, inside [low, high].
    any_lane: reduces booleans to the scalar that tells whether one of them is true; all that it
      sees are searched again then.
  """
  wrong = [
    ((guess < high) & logical_not(test(guess))) | ((guess > low) & test(guess - 1))
    for guess, (low, high, test) in zip(guesses, searches)
  ]
  again = any_lane(functools.reduce(jnp.logical_or, wrong))
  rounds = again.astype(jnp.int32) * size.bit_length()
  found = _bisect(size.bit_length(), rounds, searches)
  return tuple(jnp.where(again, x, guess) for x, guess in zip(found, guesses))


def _bisect(bits, rounds, searches):
  """Makes so many rounds of a search whose results have so many bits."""

  def advance(i, found):
    """Skips so many integers where the last one of them fails."""
    step = jnp.asarray(1 << (bits - 1 - i), jnp.int32)
    ends = [low + step for low in found]
    inside = [end <= high for (_, high, _), end in zip(searches, ends)]
    results = [
      test(jnp.where(there, end - 1, 0)) for (*_, test), there, end in zip(searches, inside, ends)
    ]
    return tuple(
      jnp.where(there & logical_not(passes), end, low)
      for low, end, there, passes in zip(found, ends, inside, results)
    )

  lows = tuple(low for low, *_ in searches)
  return lax.fori_loop(0, rounds, advance, lows)
