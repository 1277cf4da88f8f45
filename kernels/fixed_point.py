"""Scores in fixed point, and the breakpoints of their gates as floats."""

import jax
import jax.numpy as jnp
from jax import lax


def fixed_point(score: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
  """Splits scores into integers: score = whole + fraction / 2^(2 bits), rounded down.

  Pairs (whole, fraction) have the order of the scores. Beyond 2^24 neighbouring floats are 2 or
  more apart, and all that matters of two scores is whether they are more than 1 apart. So floats
  are numbered there, in steps of 2.
  """
  large = jnp.abs(score) > 2.0**24
  near = jnp.where(large, 0.0, score)
  floor = near.astype(jnp.int32)  # towards 0
  floor = jnp.where(floor.astype(jnp.float32) > near, floor - 1, floor)
  fraction = ((near - floor.astype(jnp.float32)) * 2.0 ** (2 * bits)).astype(jnp.int32)
  # 151 << 23 are the bits of the float 2^24
  step = lax.bitcast_convert_type(jnp.abs(score), jnp.int32) - (151 << 23)
  far = 2**24 + 2 * step
  whole = jnp.where(large, jnp.where(score < 0, -far, far), floor)
  return whole + (fraction >> (2 * bits)), fraction & (2 ** (2 * bits) - 1)


def next_below(x: jax.Array) -> jax.Array:
  """Returns the next float32 below a finite x."""
  bits = lax.bitcast_convert_type(x, jnp.int32)
  bits = jnp.where(x > 0, bits - 1, jnp.where(x < 0, bits + 1, -(2**31) + 1))
  return lax.bitcast_convert_type(bits, jnp.float32)


def minus_one(score: jax.Array) -> jax.Array:
  """Returns score - 1, or the next float below where floats are too coarse for that."""
  return jnp.where(jnp.abs(score) >= 2.0**24, next_below(score), score - 1)


def lower_breakpoint(score: jax.Array) -> jax.Array:
  """Returns score - 1, above which a threshold leaves the gate below 1; the score itself where
  floats are too coarse for that.
  """
  coarse = jnp.abs(score) >= 2.0 ** (jnp.finfo(score.dtype).nmant + 1)
  return jnp.where(coarse, score, score - 1)
