"""The O(n^2) reference of SPARSEK attention, with which every other implementation is compared.

Plain autodiff gives its gradients. It computes in float32, or in float64 where inputs are float64
(and jax_enable_x64 is on).
"""

import jax
import jax.numpy as jnp

sg = jax.lax.stop_gradient


def document_index(segment_ids: jax.Array | None, shape: tuple[int, int]) -> jax.Array:
  """Returns the [batch, n] index of each token's document; a document is a run of equal ids."""
  if segment_ids is None:
    return jnp.zeros(shape, jnp.int32)
  changed = segment_ids[:, 1:] != segment_ids[:, :-1]
  return jnp.pad(jnp.cumsum(changed, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def selection(
  scores: jax.Array, k: int, window: int, segment_ids: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Computes causal SPARSEK by brute force.

  Args:
    scores: [batch, n, G].
    k, window, segment_ids: as in `sparsek.sparsek_attention`.

  Returns:
    gate [batch, G, n, n] (p_ij; 1 for the first k candidates), selected and local [batch, G, n, n]
    masks: the top k candidates (equal scores: the earlier token) and the sliding window.
  """
  batch, n, _ = scores.shape
  document = document_index(segment_ids, (batch, n))
  same = (document[:, :, None] == document[:, None, :])[:, None]
  i, j = jnp.arange(n)[:, None], jnp.arange(n)[None, :]
  u = jnp.swapaxes(scores, 1, 2)[:, :, None, :]  # [batch, G, 1, n]
  u = jnp.where(u == jnp.inf, jnp.finfo(u.dtype).max, u)
  candidate = same & (j + window <= i) & (u > -jnp.inf)
  z = jnp.where(candidate, u, -jnp.inf)  # [batch, G, n, n]
  rank = jnp.argsort(jnp.argsort(-z, axis=-1, stable=True), axis=-1)
  selected = candidate & (rank < k)
  total = lambda t: jnp.sum(jnp.clip(z - t, 0, 1), axis=-1, keepdims=True)
  # Bisection for sum_j clip(z_j - tau, 0, 1) = k, then the exact solution on the linear piece that
  # it ends in, through which the gradient flows.
  safe = sg(jnp.where(candidate, u, 0))
  # halved: the sum of the two ends must not overflow
  low = jnp.min(safe, -1, keepdims=True) / 2 - 1
  high = jnp.max(safe, -1, keepdims=True) / 2 + 1
  low, high = 2 * low, jnp.minimum(2 * high, jnp.finfo(u.dtype).max)

  def halve(_, ends):
    low, high = ends
    middle = low / 2 + high / 2
    too_low = total(middle) >= k
    return jnp.where(too_low, middle, low), jnp.where(too_low, high, middle)

  low, high = jax.lax.fori_loop(0, 160, halve, (low, high))
  tau = sg(low)
  fractional = candidate & (z - 1 < tau) & (z > tau)
  ones = jnp.sum(candidate & (z - 1 >= tau), -1, keepdims=True)
  count = jnp.sum(fractional, -1, keepdims=True)
  exact = (jnp.sum(jnp.where(fractional, u, 0), -1, keepdims=True) + ones - k) / jnp.maximum(
    count, 1
  )
  fractional &= (u - exact > 0) & (u - exact < 1)
  gate = jnp.where(fractional, u - exact, candidate & (z > tau))
  gate = jnp.where(jnp.sum(candidate, -1, keepdims=True) <= k, candidate, gate)
  local = same & (j <= i) & (j > i - window)
  return gate.astype(u.dtype), selected, jnp.broadcast_to(local, selected.shape)


def without_nan(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns x [..., D] with 0 for numbers that are not finite, and which rows had any.

  Otherwise 0 * NaN would carry a NaN into sums that must not see it.
  """
  finite = jnp.isfinite(x)
  return jnp.where(finite, x, 0), ~jnp.all(finite, axis=-1)


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  scores: jax.Array,
  *,
  k: int,
  window: int,
  gate: str,
  scale: float,
  segment_ids: jax.Array | None = None,
) -> jax.Array:
  """Computes SPARSEK attention; shapes and meaning as in `sparsek.sparsek_attention`."""
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  groups = query.shape[2] // key.shape[2]
  q, kk, v = (
    x.astype(dtype) for x in (query, jnp.repeat(key, groups, 2), jnp.repeat(value, groups, 2))
  )
  (q, bad_query), (kk, bad_key), (v, bad_value) = map(without_nan, (q, kk, v))
  p, selected, local = (jnp.repeat(x, groups, 1) for x in selection(scores, k, window, segment_ids))
  p = jnp.where(local, 1, p)
  if gate == "straight_through":
    p = jnp.where(selected, 1 + p - sg(p), p)
  visible = selected | local
  logits = jnp.einsum("bihd,bjhd->bhij", q, kk, precision="highest") * scale
  if gate == "key_value":
    logits = logits * p
  logits = jnp.where(visible, logits, -jnp.inf)
  top = sg(jnp.max(logits, -1, keepdims=True))
  weights = jnp.where(visible, jnp.exp(logits - jnp.where(top == -jnp.inf, 0, top)), 0)
  weights = weights / jnp.maximum(jnp.sum(weights, -1, keepdims=True), jnp.finfo(dtype).tiny)
  out = jnp.einsum("bhij,bjhd->bihd", weights * jnp.where(visible, p, 0), v, precision="highest")
  seen = jnp.einsum("bhij,bjh->bih", visible.astype(dtype), (bad_key | bad_value).astype(dtype)) > 0
  return (out + jnp.where(seen | bad_query, jnp.nan, 0)[..., None]).astype(query.dtype)
