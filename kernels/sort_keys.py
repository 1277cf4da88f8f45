"""Integers in the order of the numbers that are sorted by them, under XLA and in GPU kernels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LOWEST_KEY = -(2**31)  # of scores that are not candidates
LARGEST = float(jnp.finfo(jnp.float32).max)


class Coding(NamedTuple):
  """A way to sort numbers: by their keys, int32 below 2^31 - 1.

  Attributes:
    encode: returns the key of a number, elementwise.
    decode: returns what the result holds in place of a key, elementwise.
    dtype: of that.
  """

  encode: Callable[[jax.Array], jax.Array]
  decode: Callable[[jax.Array], jax.Array]
  dtype: Any


def _encode(score: jax.Array) -> jax.Array:
  """Returns the key of a float32; NaN and -inf have the lowest, and infinity that of LARGEST."""
  # -0 and 0 are equal, so they get the same key
  score = jnp.where(score == 0, 0.0, jnp.minimum(score, LARGEST))
  bits = lax.bitcast_convert_type(score, jnp.int32)
  return jnp.where(score > -jnp.inf, jnp.where(bits < 0, bits ^ (2**31 - 1), bits), LOWEST_KEY)


def _decode(key: jax.Array) -> jax.Array:
  """Undoes `_encode`; the lowest key gives -inf."""
  bits = jnp.where(key < 0, key ^ (2**31 - 1), key)
  return jnp.where(key > LOWEST_KEY, lax.bitcast_convert_type(bits, jnp.float32), -jnp.inf)


def _same(x: jax.Array) -> jax.Array:
  """Returns x."""
  return x


SCORES = Coding(_encode, _decode, jnp.float32)
INTEGERS = Coding(_same, _same, jnp.int32)
