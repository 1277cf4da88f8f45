"""The SPARSEK operator (arXiv 2406.16747, section 3), over a whole axis and causally for every
prefix at once.

`sparsek(z, k) = argmin ||p - z||^2  subject to  0 <= p <= 1, sum p = k` has the solution
`p = clip(z - tau, 0, 1)`. The threshold tau is piecewise linear between the breakpoints `z_j - 1`
and `z_j`; both functions find the piece that holds it, then solve on it: `sparsek` by bisection
over the sorted breakpoints, `causal_sparsek` for all prefixes together, with no loop over tokens
(kernels/prefix_thresholds.py).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsek.attention.documents import document_bounds
from sparsek.attention.prefix_selection import finite, select
from sparsek.kernels import devices
from sparsek.kernels.bisection import bisect
from sparsek.kernels.fixed_point import lower_breakpoint
from sparsek.kernels.varying import varying_like


class CausalSelection(NamedTuple):
  """Thresholds of all causal prefixes and the lifetimes of their selected tokens.

  Attributes:
    threshold: [batch, n, heads] float32, tau_i of query i, never decreasing within a document; -inf
      while at most k candidates exist.
    expiry: [batch, n, heads] int32; token j is among the top k of query i, in its document, if and
      only if j + delay <= i < expiry_j.
  """

  threshold: jax.Array
  expiry: jax.Array


def _check(name: str, scores: jax.Array, k: int, ndim: int | None = None) -> None:
  if not jnp.issubdtype(scores.dtype, jnp.floating):
    raise ValueError(f"{name}: scores must be floating point, got {scores.dtype}")
  if ndim is not None and scores.ndim != ndim:
    raise ValueError(f"{name}: scores must have shape [batch, n, heads], got {scores.shape}")
  if ndim is None and scores.ndim < 1:
    raise ValueError(f"{name}: scores must have at least one axis, got a scalar")
  if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
    raise ValueError(f"{name}: k={k!r} must be a Python integer")
  if k < 1:
    raise ValueError(f"{name}: k={k} must be at least 1")


def _below(tau: jax.Array, kth_best: jax.Array) -> jax.Array:
  """Lowers tau to strictly below the k-th best score, where rounding, or floats more than 1 apart,
  left it higher. So all of the top k have a gate above 0.
  """
  return jnp.minimum(tau, jnp.nextafter(kth_best, jnp.full_like(kth_best, -jnp.inf)))


def sparsek(scores: jax.Array, k: int) -> jax.Array:
  r"""Computes a differentiable top-k mask over the last axis.

  .. math:: p^* = \arg\min_p \|p - z\|^2 \quad \text{s.t.} \quad 0 \le p \le 1,
     \ \textstyle\sum_j p_j = k, \qquad p^*_j = \min(\max(z_j - \tau, 0), 1)

  The Jacobian is `diag(s) - s s^T / |s|` with `s = 1[0 < p < 1]`; zero where no entry is
  fractional.

  Args:
    scores: [..., n] floating point. -inf leaves an entry out (gate 0, not counted); +inf counts as
      the largest finite number; a NaN makes its row NaN.
    k: sum of the gates, a Python integer >= 1. With k or fewer entries every gate is 1.

  Returns:
    Gates p, [..., n] in the dtype of `scores` (computed in float32 at least).

  Raises:
    ValueError: if k < 1 or scores are not floating point.

  Example:
    >>> sparsek(jnp.array([2.0, 1.5, 1.0, -3.0]), 2)
    Array([1. , 0.75, 0.25, 0.  ], dtype=float32)

  Reference: Lou, Jia, Zheng, Tu. Sparser is Faster and Less is More, arXiv 2406.16747, section 3.1.
  """
  scores = jnp.asarray(scores)
  _check("sparsek", scores, k)
  if not scores.size:
    return scores
  z = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
  return _sparsek(z, min(int(k), scores.shape[-1])).astype(scores.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
@functools.partial(jax.jit, static_argnums=1)
def _sparsek(z, k):
  n = z.shape[-1]
  present = z > -jnp.inf
  u = finite(z)
  lower = lower_breakpoint(u)
  breakpoints = jnp.sort(jnp.concatenate([lower, u], axis=-1), axis=-1)

  def evaluate(rank):
    """Returns, for the piece that ends at a breakpoint, its value, the number of fractional
    entries, and k less the sum of the gates at it.
    """
    b = jnp.take_along_axis(breakpoints, rank, axis=-1)
    fractional = present & (lower < b) & (u >= b)
    total = jnp.sum(jnp.where(fractional, u - b, 0), -1, keepdims=True)
    # an integer, so exact, where nothing is fractional
    missing = k - jnp.sum(present & (lower >= b), -1, keepdims=True) - total
    return b, jnp.sum(fractional, -1, keepdims=True), missing

  # The last breakpoint passes: no gate is above 0 there, unless floats are more than 1 apart.
  low, high = (varying_like(jnp.full((*z.shape[:-1], 1), end), z) for end in (0, 2 * n - 1))
  (rank,) = bisect(2 * n, (low, high, lambda rank: evaluate(rank)[2] >= 0))
  b, count, missing = evaluate(rank)
  kth_best = lax.slice_in_dim(jnp.sort(u, axis=-1), max(n - k, 0), max(n - k, 0) + 1, axis=-1)
  tau = _below(b - jnp.where(count > 0, missing / jnp.maximum(count, 1), 0), kth_best)
  gate = jnp.clip(u - tau, 0, 1) * present
  gate = jnp.where(jnp.sum(present, -1, keepdims=True) <= k, present.astype(z.dtype), gate)
  return jnp.where(jnp.any(jnp.isnan(z), -1, keepdims=True), jnp.nan, gate)


def _sparsek_forward(z, k):
  gate = _sparsek(z, k)
  return gate, gate


def _sparsek_backward(k, gate, cotangent):
  fractional = (gate > 0) & (gate < 1)
  mean = jnp.sum(jnp.where(fractional, cotangent, 0), -1, keepdims=True) / jnp.maximum(
    jnp.sum(fractional, -1, keepdims=True), 1
  )
  gradient = jnp.where(fractional, cotangent - mean, 0)
  return (jnp.where(jnp.isnan(gate), gate, gradient),)


_sparsek.defvjp(_sparsek_forward, _sparsek_backward)


def causal_sparsek(
  scores: jax.Array, k: int, *, delay: int = 0, segment_ids: jax.Array | None = None
) -> CausalSelection:
  r"""Computes SPARSEK and the top k of every causal prefix, exactly and in parallel.

  Query i has the candidates j <= i - delay of its own document. Its gates are
  `p_ij = clip(u_j - tau_i, 0, 1)` with `sum_j p_ij = k`; its selection is the k best candidates,
  equal scores going to the earlier token. Both are monotone: tau_i never decreases, and a token
  that has dropped out never returns.

  The gradient of the thresholds is `dtau_i / du_j = 1[j in S_i] / |S_i|` with S_i the fractional
  entries of query i, zero where none is; `expiry` has none.

  Args:
    scores: [batch, n, heads] float. -inf: never a candidate, not counted; +inf: the largest finite
      number; NaN: never selected, and the threshold is NaN for every query of the document from the
      one that admits it, so that it shows.
    k: budget, a Python integer >= 1.
    delay: a token becomes a candidate this many steps after its own; the sliding window's length in
      SPARSEK attention.
    segment_ids: [batch, n] integers; every run of equal ids is a document. By default a row is one
      document.

  Returns:
    CausalSelection(threshold, expiry). Thresholds are exact to 2^-24 in a gate up to n = 2^18, to
    2^(2 ceil(log2 n) - 60) beyond.

  Raises:
    ValueError: for bad shapes, dtypes, k < 1 or delay < 0.

  Reference: arXiv 2406.16747, section 3.3, whose sequential heaps this replaces.
  """
  scores = jnp.asarray(scores)
  _check("causal_sparsek", scores, k, ndim=3)
  if delay < 0:
    raise ValueError(f"causal_sparsek: delay={delay} must be at least 0")
  batch, n, _ = scores.shape
  if not 1 <= n <= 2**26:
    raise ValueError(f"causal_sparsek: n={n} must be from 1 to 2^26 tokens")
  if segment_ids is not None and (
    segment_ids.shape != (batch, n) or not jnp.issubdtype(segment_ids.dtype, jnp.integer)
  ):
    raise ValueError(
      f"causal_sparsek: segment_ids must be integers of shape {(batch, n)}, got "
      f"{segment_ids.dtype} {segment_ids.shape}"
    )
  start, end = document_bounds(segment_ids, batch, n)
  by_head = jnp.swapaxes(scores.astype(jnp.float32), 1, 2)
  threshold, expiry, _ = select(
    by_head,
    start,
    end,
    min(int(k), n),
    min(int(delay), n),
    segment_ids is not None,
    devices.can_run_portable(),
  )
  return CausalSelection(jnp.swapaxes(threshold, 1, 2), jnp.swapaxes(expiry, 1, 2))
