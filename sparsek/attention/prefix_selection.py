"""Thresholds, expiry and rank order of every causal prefix: the inside of `causal_sparsek`."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels import prefix_thresholds
from sparsek.kernels.hopper import prefix_gradients as hopper_gradients
from sparsek.kernels.hopper import prefix_thresholds as hopper_thresholds
from sparsek.kernels.saved import saved
from sparsek.kernels.varying import varying_like


def finite(scores):
  """NaN and -inf (both "not a candidate" here) and +inf become finite, so that arithmetic on them
  stays defined.
  """
  largest = float(jnp.finfo(scores.dtype).max)
  return jnp.nan_to_num(scores, nan=-largest, neginf=-largest, posinf=largest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def select(scores, start, end, k, delay, packed, kernels=False):
  """(threshold, expiry, order), [batch, heads, n] each: those of `causal_sparsek`, and the tokens
  by (document, score, later first).

  Along `order` the expiry of tokens that were ever selected never decreases. Only the thresholds
  have a gradient.

  Args:
    scores: [batch, heads, n] float32.
    start, end: [batch, n], from `document_bounds`.
    k, delay: as in `causal_sparsek`.
    packed: there may be more than one document.
    kernels: use those for GPUs; `thread_ops.can_run()` says whether they can run.
  """
  n = scores.shape[-1]
  token = jnp.arange(n, dtype=jnp.int32)
  start, end = varying_like(start, scores), varying_like(end, scores)
  key = _key(scores)
  ranked, order = (
    hopper_thresholds.sort(key)
    if kernels
    else _per_head(lambda key: lax.sort((key[::-1], token[::-1]), num_keys=1, is_stable=True))(key)
  )
  if packed:
    ranked, order = _per_head(_by_document)(key, order, start)
  score, entry = _per_head(functools.partial(_entering, delay=delay, packed=packed))(
    ranked, order, end
  )
  problem = prefix_thresholds.Problem(n, k, delay, packed)
  # A document's ranks are its tokens: `start` holds for both.
  if kernels:
    tau, expiry = hopper_thresholds.solve(problem, score, entry, order, start, scores)
  else:
    tau, expiry = _per_head(functools.partial(prefix_thresholds.solve, problem))(
      score, entry, order, start
    )
    first_nan = lambda scores, start: (
      jnp.full(n, n, jnp.int32)
      .at[jnp.where(jnp.isnan(scores), start, n)]
      .min(token, mode="drop")[start]
    )
    tau = jnp.where(token - delay >= _per_head(first_nan)(scores, start), jnp.nan, tau)
  return tau, jnp.where(scores > -jnp.inf, jnp.minimum(expiry, end[:, None]), 0), order


def _per_head(f):
  """f over [batch, heads, ...] arrays, and [batch, ...] ones, which have an axis less than the
  first.
  """

  def over_batch(*args):
    return jax.vmap(f, in_axes=[0 if x.ndim == args[0].ndim else None for x in args])(*args)

  return jax.vmap(over_batch)


def _key(scores):
  """Integers ordered like the scores, 0 for NaN and -inf."""
  # -0 and 0 are equal
  bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0, finite(scores)), jnp.int32)
  key = jnp.where(bits < 0, ~bits, bits | jnp.int32(-(2**31))).astype(jnp.uint32)
  return jnp.where(scores > -jnp.inf, key, 0)


def _by_document(key, order, start):
  """(keys in order, tokens) by document, inside each as they were: two sorts by one key beat one by
  two.
  """
  order = lax.sort((start[order], order), num_keys=1, is_stable=True)[1]
  return key[order], order


def _entering(key, order, end, *, delay, packed):
  """By rank: score, query at which its token enters."""
  last = end[order] if packed else order.shape[0]
  return _score(key), jnp.where(
    (key > 0) & (order + delay < last), order + delay, prefix_thresholds.NEVER
  )


def _score(key):
  bits = lax.bitcast_convert_type(key, jnp.int32)
  return finite(
    lax.bitcast_convert_type(jnp.where(bits < 0, bits & jnp.int32(2**31 - 1), ~bits), jnp.float32)
  )


def select_forward(scores, start, end, k, delay, packed, kernels):
  threshold, expiry, order = saved(*select(scores, start, end, k, delay, packed, kernels))
  return (threshold, expiry, order), (scores, threshold, varying_like(end, scores))


def select_backward(k, delay, packed, kernels, residuals, cotangents):
  scores, threshold, end = residuals
  if kernels:
    return (
      hopper_gradients.scores_gradient(cotangents[0], scores, threshold, end, delay),
      None,
      None,
    )
  return (
    _per_head(functools.partial(prefix_thresholds.scores_gradient, delay=delay))(
      cotangents[0], scores, threshold, end
    ),
    None,
    None,
  )


select.defvjp(select_forward, select_backward)
