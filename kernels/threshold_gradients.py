"""Gradients of causal thresholds: each score gets the sum of dtau_i / |S_i| over the interval of
queries in which its gate is between 0 and 1.

`interval` and `add_exactly` also run in the kernels for GPUs (hopper/prefix_gradients.py).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels.bisection import bisect, logical_not
from sparsek.kernels.fixed_point import lower_breakpoint
from sparsek.kernels.prefix_events import Read
from sparsek.kernels.prefix_thresholds import reader
from sparsek.kernels.varying import varying_like

SEGMENT = 128  # numbers of a segment, see `interval_sums`


def interval(read: Read, token: jax.Array, delay: int, n: int) -> tuple[jax.Array, jax.Array]:
  """Returns [first, last), the queries at which a token's gate is between 0 and 1, maybe none;
  `read` reads scores by token, which may be NaN or infinite. No gate is where thresholds are NaN.
  """
  score, end = read.score(token), read.end(token)
  candidate = score > -jnp.inf  # false for NaN too
  score = jnp.minimum(jnp.where(candidate, score, 0.0), float(jnp.finfo(jnp.float32).max))
  entry = jnp.minimum(token + delay, end)
  # thresholds above it leave the gate below 1
  one = lower_breakpoint(score)
  first, last = bisect(
    n,
    (entry, end, lambda i: logical_not(read.threshold(i) <= one)),
    (entry, end, lambda i: logical_not(read.threshold(i) < score)),
  )
  return jnp.where(candidate, jnp.minimum(first, last), last), last


@functools.partial(jax.jit, static_argnums=4)
def scores_gradient(
  cotangent: jax.Array, score: jax.Array, threshold: jax.Array, end: jax.Array, delay: int
) -> jax.Array:
  """Returns the gradient of each score, [n]: the sum of dtau_i / |S_i| over the queries i at which
  its gate is fractional. All arrays are [n], scores by token.
  """
  n = score.shape[0]
  first, last = interval(
    Read(reader(score), end=reader(end), threshold=reader(threshold)),
    varying_like(jnp.arange(n, dtype=jnp.int32), score),
    delay,
    n,
  )
  weight = (first < last).astype(jnp.int32)
  count = jnp.cumsum(
    jnp.zeros(n, jnp.int32).at[first].add(weight, mode="drop").at[last].add(-weight, mode="drop")
  )
  return interval_sums(jnp.where(count > 0, cotangent / jnp.maximum(count, 1), 0), first, last)


Exact = tuple[Any, Any]  # a number and its rounding error


def add_exactly(a: Exact, b: Exact) -> Exact:
  """Adds two (number, rounding error) pairs."""
  total = a[0] + b[0]
  part = total - a[0]
  return total, a[1] + b[1] + ((a[0] - (total - part)) + (b[0] - part))


def interval_sums(x: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
  """Sums x[first_j : last_j] for every j, [n] each.

  Sums inside segments and sums of whole segments are kept apart, the latter with their rounding
  errors, so that short intervals late in x stay accurate.
  """
  n = x.shape[0]
  x = jnp.pad(x, (0, SEGMENT - n % SEGMENT)).reshape(-1, SEGMENT)
  inside = jnp.pad(jnp.cumsum(x, axis=1), ((0, 0), (1, 0)))[:, :-1].reshape(-1)
  zero = varying_like(jnp.zeros(()), x)
  _, (total, error) = lax.scan(
    lambda before, x: (add_exactly(before, (x, 0.0)), before), (zero, zero), jnp.sum(x, axis=1)
  )
  (i, a, e), (j, b, f) = (
    (inside[at], total[at // SEGMENT], error[at // SEGMENT]) for at in (first, last)
  )
  return (j - i) + ((b - a) + (f - e))
