"""Thresholds, expiry and rank order of every causal prefix: the computation of `causal_sparsek`.

Array shapes are [batch, heads, n]; the work on a single row is in kernels/prefix_thresholds.py, or,
on Hopper GPUs, in kernels/hopper/prefix_thresholds.py, which is imported only there.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels import prefix_events, prefix_thresholds, threshold_gradients
from sparsek.kernels.saved import saved
from sparsek.kernels.sort_keys import INTEGERS, SCORES, Coding
from sparsek.kernels.varying import varying_like


def finite(scores: jax.Array) -> jax.Array:
  """Replaces NaN and -inf (both "not a candidate" here) and +inf by finite numbers, so that
  arithmetic on them stays defined.
  """
  largest = float(jnp.finfo(scores.dtype).max)
  return jnp.nan_to_num(scores, nan=-largest, neginf=-largest, posinf=largest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def select(
  scores: jax.Array,
  start: jax.Array,
  end: jax.Array,
  k: int,
  delay: int,
  packed: bool,
  kernels: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns threshold, expiry and order, [batch, heads, n] each.

  Threshold and expiry are those of `causal_sparsek`. Order lists the tokens by document, then by
  ascending score, of equal scores the later token first; along it the expiry of tokens that were
  ever selected never decreases. Only the thresholds have a gradient.

  Args:
    scores: [batch, heads, n] float32.
    start, end: [batch, n], from `document_bounds`.
    k, delay: as in `causal_sparsek`.
    packed: whether there may be more than one document in a row.
    kernels: whether to use those for GPUs; `devices.can_run_portable()` tells whether they can run.
  """
  n = scores.shape[-1]
  token = jnp.arange(n, dtype=jnp.int32)
  start, end = varying_like(start, scores), varying_like(end, scores)
  score, order = in_order(scores, SCORES, kernels)
  if packed:
    order = _per_head(_by_document)(order, start)
    score = jnp.take_along_axis(SCORES.decode(SCORES.encode(scores)), order, axis=-1)
  problem = prefix_events.Problem(n, k, delay, packed)
  # A document's ranks are the same range as its tokens, so `start` and `end` serve both.
  if kernels:
    from sparsek.kernels.hopper import prefix_thresholds as hopper_thresholds

    tau, expiry = hopper_thresholds.solve(problem, score, order, start, end, scores)
    return tau, expiry, order
  score, entry = prefix_events.entering(problem, score, order, end[:, None])
  tau, expiry = _per_head(functools.partial(prefix_thresholds.solve, problem))(
    score, entry, order, start
  )
  admitted = token - delay  # by each query
  first_nan = _per_head(functools.partial(_first_nan, token))(scores, start)
  return jnp.where(admitted >= first_nan, jnp.nan, tau), jnp.minimum(expiry, end[:, None]), order


def in_order(x: jax.Array, coding: Coding, kernels: bool) -> tuple[jax.Array, jax.Array]:
  """Returns the numbers in order, decoded, and their tokens; of equal keys the later token comes
  first.
  """
  if kernels:
    from sparsek.kernels.hopper import prefix_thresholds as hopper_thresholds

    return hopper_thresholds.sort(x, coding)
  key, token = coding.encode(x), jnp.arange(x.shape[-1], dtype=jnp.int32)
  key, order = _per_head(
    lambda key: lax.sort((key[::-1], token[::-1]), num_keys=1, is_stable=True)
  )(key)
  return coding.decode(key), order


def order_by_expiry(expiry: jax.Array, kernels: bool) -> jax.Array:
  """Returns an order of the tokens along which the expiry never decreases: [batch, heads, n].

  It serves the attention kernels as well as that of `select`, where only expiries are known.
  """
  return in_order(expiry, INTEGERS, kernels)[1]


def _first_nan(token: jax.Array, scores: jax.Array, start: jax.Array) -> jax.Array:
  """Returns, for each token, the first one of its document with a NaN score, or n: [n]."""
  n = scores.shape[0]
  return (
    jnp.full(n, n, jnp.int32)
    .at[jnp.where(jnp.isnan(scores), start, n)]
    .min(token, mode="drop")[start]
  )


def _per_head(f: Callable) -> Callable:
  """Maps f over [batch, heads, ...] arrays, and over [batch, ...] ones, which have one axis less
  than the first argument.
  """

  def over_batch(*args):
    return jax.vmap(f, in_axes=[0 if x.ndim == args[0].ndim else None for x in args])(*args)

  return jax.vmap(over_batch)


def _by_document(order, start):
  """Returns the tokens by document, in the given order inside each.

  Two sorts by one key are faster than one by two.
  """
  return lax.sort((start[order], order), num_keys=1, is_stable=True)[1]


def _select_forward(scores, start, end, k, delay, packed, kernels):
  threshold, expiry, order = saved(*select(scores, start, end, k, delay, packed, kernels))
  return (threshold, expiry, order), (scores, threshold, varying_like(end, scores))


def select_backward(
  k: int,
  delay: int,
  packed: bool,
  kernels: bool,
  residuals: tuple[jax.Array, jax.Array, jax.Array],
  cotangents: tuple[jax.Array, ...],
) -> tuple[jax.Array, None, None]:
  """Returns the gradient of the scores, given that of the thresholds: cotangents[0]."""
  scores, threshold, end = residuals
  if kernels:
    from sparsek.kernels.hopper import prefix_gradients

    gradient = prefix_gradients.scores_gradient(cotangents[0], scores, threshold, end, delay)
  else:
    gradient = _per_head(functools.partial(threshold_gradients.scores_gradient, delay=delay))(
      cotangents[0], scores, threshold, end
    )
  return gradient, None, None


select.defvjp(_select_forward, select_backward)
