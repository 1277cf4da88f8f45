"""SPARSEK attention in plain XLA, linear in the sequence length in time and memory, on any device.

A scan over chunks of queries. Each step gathers the keys listed for its chunk (see compaction.py),
slices the window's keys, and takes one softmax over both. The backward pass is a second scan that
gathers again, so only the logsumexp is saved.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels import gates
from sparsek.kernels.compaction import chunk_lists, chunk_size
from sparsek.kernels.reference import without_nan
from sparsek.kernels.saved import saved
from sparsek.kernels.varying import varying_like

# Axes: B batch, G key/value heads, R query heads per key/value head, C queries of a chunk, K keys
# (listed, then window), D head dimension. Matrix products have their operands and results in the
# order (batch, rows, columns), the only one for which every backend takes bfloat16 inputs and
# float32 sums.


class Static(NamedTuple):
  """Settings that the compiled functions depend on besides shapes."""

  k: int
  window: int
  gate: str
  scale: float
  chunk: int


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  scores: jax.Array,
  threshold: jax.Array,
  expiry: jax.Array,
  start: jax.Array,
  *,
  k: int,
  window: int,
  gate: str,
  scale: float,
) -> jax.Array:
  """Computes SPARSEK attention, given the selection.

  Args:
    query: [batch, n, H, D].
    key, value: [batch, n, G, D].
    scores, threshold, expiry: [batch, n, G]; of `sparsek.causal_sparsek` with delay = window.
    start: [batch, n] int32, first token of each token's document.
    k: budget; 0 leaves the sliding window alone.
    window, gate, scale: as in `sparsek.sparsek_attention`.

  Returns:
    [batch, n, H, D] in the dtype of `query`. Differentiable in query, key, value, scores and
    threshold.
  """
  n = query.shape[1]
  k, window = min(k, n), min(window, n)
  static = Static(k, window, gate, float(scale), chunk_size(n, k, window))
  by_head = lambda x: jnp.swapaxes(x, 1, 2)
  expiry = by_head(expiry)
  lists = jax.vmap(jax.vmap(lambda e: chunk_lists(e, k, window, static.chunk)))(expiry)
  selection = Selection(expiry, lists, start)
  return _attention(query, key, value, by_head(scores), by_head(threshold), selection, static)


class Selection(NamedTuple):
  """The keys that queries see.

  Attributes:
    expiry: [batch, G, n].
    lists: [batch, G, chunks, listed], from `chunk_lists`.
    start: [batch, n].
  """

  expiry: jax.Array
  lists: jax.Array
  start: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(query, key, value, scores, threshold, selection, static):
  return _forward(query, key, value, scores, threshold, selection, static)[0]


def _einsum(equation, a, b):
  """Multiplies in the wider dtype and sums in float32.

  Softmax weights stay float32 beside bfloat16 values, so that the result is as exact as its own
  rounding. A GPU may compute such a product in TF32, but not one of two float32 inputs.
  """
  dtype = jnp.promote_types(a.dtype, b.dtype)
  precision = lax.Precision.HIGHEST if a.dtype == b.dtype == jnp.float32 else lax.Precision.DEFAULT
  return jnp.einsum(
    equation,
    a.astype(dtype),
    b.astype(dtype),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def _chunks(x, axis, chunk):
  """Cuts `axis` into chunks, which become the leading axis; the last one is padded with zeros."""
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, -x.shape[axis] % chunk)
  x = jnp.pad(x, padding)
  return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :]), axis, 0)


def _unchunk(x, axis, n):
  """Undoes `_chunks`."""
  x = jnp.moveaxis(x, 0, axis)
  x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
  return lax.slice_in_dim(x, 0, n, axis=axis)


def _by_group(x, groups):
  """Turns [B, n, H, ...] into [B, G, R, n, ...]."""
  return jnp.moveaxis(x.reshape(*x.shape[:2], groups, -1, *x.shape[3:]), 1, 3)


class Chunk(NamedTuple):
  """The part of the inputs that a step reads; the scans have the chunks along a leading axis.

  Attributes:
    number: [], of the chunk.
    query: [B, G, R, C, D].
    tau: [B, G, C].
    start: [B, C].
    lists: [B, G, listed] tokens of the chunk's list.
  """

  number: jax.Array
  query: jax.Array
  tau: jax.Array
  start: jax.Array
  lists: jax.Array


def _inputs(query, groups, threshold, selection, chunk) -> Chunk:
  """Returns the chunks that the scans read."""
  n = query.shape[1]
  return Chunk(
    jnp.arange(-(-n // chunk)),
    _chunks(_by_group(query, groups), 3, chunk),
    _chunks(threshold, 2, chunk),
    _chunks(selection.start, 1, chunk),
    jnp.moveaxis(selection.lists, 2, 0),
  )


def _padded(x, static):
  """Pads [batch, n, G, D] to [batch, G, window - 1 + n + rest, D], so that every chunk's window is
  a plain slice.
  """
  _, window, _, _, chunk = static
  return jnp.pad(
    jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (max(window - 1, 0), -x.shape[1] % chunk), (0, 0))
  )


def _window_length(static):
  _, window, _, _, chunk = static
  return window - 1 + chunk if window else 0


def _rows(x, index, axis=2):
  """Gathers rows of x [B, G, n, ...] at index [B, G, S]; zeros where the index is out of range."""
  take = lambda rows, i: rows.at[i].get(mode="fill", fill_value=0)
  return jax.vmap(jax.vmap(take))(x, index)


class Pairs(NamedTuple):
  """The pairs of a chunk's queries with its keys, listed ones first and then the window's.

  Attributes:
    query: [B, G, R, C, D]; numbers that are not finite are 0, as in keys and values.
    key, value: [B, G, K, D].
    products: [B, G, R, C, K] scaled products of query and key: the logits before the gate.
    visible: [B, G, 1, C, K].
    gate: [B, G, C, listed] clip(u - tau, 0, 1).
    fractional: [B, G, C, listed] where the gate is between 0 and 1.
    spoilt: [B, G, R, C], whether the query is or sees a row with a number that is not finite.
  """

  query: jax.Array
  key: jax.Array
  value: jax.Array
  products: jax.Array
  visible: jax.Array
  gate: jax.Array
  fractional: jax.Array
  spoilt: jax.Array


def _pairs(inputs: Chunk, keys, values, scores, expiry, static) -> Pairs:
  """Gathers the keys of one chunk and multiplies them with its queries."""
  c, q, tau, start, lists = inputs
  k, window, gate, scale, chunk = static
  pad = max(window - 1, 0)
  near = c * chunk + jnp.arange(_window_length(static)) - pad  # token indices of the window's keys
  gather = lambda x: jnp.concatenate(
    [
      _rows(lax.slice_in_dim(x, pad, None, axis=2), lists),
      lax.dynamic_slice_in_dim(x, c * chunk, near.shape[0], axis=2),
    ],
    axis=2,
  )
  q, bad_query = without_nan(q)
  key, bad_key = without_nan(gather(keys))
  value, bad_value = without_nan(gather(values))
  i = c * chunk + jnp.arange(chunk)
  u, end = _rows(scores, lists)[:, :, None, :], _rows(expiry, lists)[:, :, None, :]
  selected = (lists[:, :, None, :] + window <= i[:, None]) & (i[:, None] < end)  # [B, G, C, listed]
  # [B, C, window]
  local = (near <= i[:, None]) & (near > i[:, None] - window) & (near >= start[:, :, None])
  local = jnp.broadcast_to(local[:, None], (*selected.shape[:3], near.shape[0]))
  visible = jnp.concatenate([selected, local], axis=-1)
  tau = tau[..., None]
  p = jnp.clip(u - tau, 0, 1)
  # comparisons are exact where u - tau would round to 1
  fractional = selected & (u - 1 < tau) & (u > tau)
  products = _einsum("bgrcd,bgkd->bgrck", q, key) * scale
  seen = jnp.any(visible & (bad_key | bad_value)[:, :, None], axis=-1)
  visible, spoilt = visible[:, :, None], seen[:, :, None] | bad_query
  return Pairs(q, key, value, products, visible, p, fractional, spoilt)


def _gates_of(pairs: Pairs, gate: str) -> jax.Array:
  """Returns the gates of listed and window keys, [B, G, 1, C, K]; all 1 for "straight_through"."""
  p = jnp.ones_like(pairs.gate) if gate == "straight_through" else pairs.gate
  rest = pairs.products.shape[-1] - p.shape[-1]
  return jnp.pad(p, ((0, 0),) * 3 + ((0, rest),), constant_values=1)[:, :, None]


@functools.partial(jax.jit, static_argnums=6)
def _forward(query, key, value, scores, threshold, selection, static):
  gate, n = static.gate, query.shape[1]
  keys, values = _padded(key, static), _padded(value, static)

  def step(_, inputs):
    pairs = _pairs(inputs, keys, values, scores, selection.expiry, static)
    visible, p = pairs.visible, _gates_of(pairs, gate)
    logits = gates.gated_logits(pairs.products, p, gate=gate)
    logits = jnp.where(visible, logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0, top)  # a query may see nothing at all: its output is 0
    weights = jnp.exp(logits - top)
    total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    weights = jnp.where(visible, weights * p, 0) / total  # p may be NaN or 0 * inf where invisible
    out = _einsum("bgrck,bgkd->bgrcd", weights, pairs.value)
    out = out + jnp.where(pairs.spoilt, jnp.nan, 0)[..., None]
    return None, (out.astype(query.dtype), (top + jnp.log(total))[..., 0])

  inputs = _inputs(query, key.shape[2], threshold, selection, static.chunk)
  _, (out, logsumexp) = lax.scan(step, None, inputs)
  return jnp.moveaxis(_unchunk(out, 3, n), 3, 1).reshape(query.shape), _unchunk(logsumexp, 3, n)


def _forward_rule(query, key, value, scores, threshold, selection, static):
  out, logsumexp = saved(*_forward(query, key, value, scores, threshold, selection, static))
  return out, (query, key, value, scores, threshold, selection, logsumexp)


@functools.partial(jax.jit, static_argnums=0)
def _backward_rule(static, residuals, cotangent):
  query, key, value, scores, threshold, selection, logsumexp = residuals
  _, window, gate, scale, chunk = static
  n, groups, pad = query.shape[1], key.shape[2], max(window - 1, 0)
  keys, values = _padded(key, static), _padded(value, static)

  def step(carry, xs):
    dkeys, dvalues, dscores = carry
    inputs, do, lse = xs
    c, lists = inputs.number, inputs.lists
    pairs = _pairs(inputs, keys, values, scores, selection.expiry, static)
    dlogits, dgates, gated = _gradients(pairs, do, lse, gate)
    # summed over the query heads of the group: [B, G, C, listed]
    dgates = jnp.where(pairs.fractional, jnp.sum(dgates, axis=2), 0)
    dlogits = dlogits * scale
    dq = _einsum("bgrck,bgkd->bgrcd", dlogits, pairs.key).astype(query.dtype)
    dk = _einsum("bgrck,bgrcd->bgkd", dlogits, pairs.query)
    dv = _einsum("bgrck,bgrcd->bgkd", gated, do)
    carry = (
      _scatter(dkeys, dk, lists + pad, c * chunk, n + pad),
      _scatter(dvalues, dv, lists + pad, c * chunk, n + pad),
      _add_rows(dscores, jnp.sum(dgates, axis=2), lists),
    )
    return carry, (dq, -jnp.sum(dgates, axis=-1))

  inputs = _inputs(query, groups, threshold, selection, chunk)
  zeros = tuple(
    varying_like(jnp.zeros(x.shape, jnp.float32), query) for x in (keys, values, scores)
  )
  (dkeys, dvalues, dscores), (dq, dtau) = lax.scan(
    step,
    zeros,
    (inputs, _chunks(_by_group(cotangent, groups), 3, chunk), _chunks(logsumexp, 3, chunk)),
  )
  rows = lambda x: jnp.swapaxes(x[:, :, pad : pad + n], 1, 2)
  return (
    jnp.moveaxis(_unchunk(dq, 3, n), 3, 1).reshape(query.shape),
    rows(dkeys).astype(key.dtype),
    rows(dvalues).astype(value.dtype),
    dscores,
    _unchunk(dtau, 2, n),
    None,
  )


def _gradients(pairs: Pairs, do, lse, gate: str):
  """Returns the gradients of the products [B, G, R, C, K] and of the listed keys' gates
  [B, G, R, C, listed], not yet masked, and the weights of the values.
  """
  visible, products, listed = pairs.visible, pairs.products, pairs.gate.shape[-1]
  p = _gates_of(pairs, gate)
  logits = gates.gated_logits(products, p, gate=gate)
  weights = jnp.where(visible, jnp.exp(logits - lse[..., None]), 0)
  inner = _einsum("bgrcd,bgkd->bgrck", do, pairs.value)  # <dO_i, v_j>
  gated = jnp.where(visible, weights * p, 0)
  dlogits = gated * inner - weights * jnp.sum(gated * inner, axis=-1, keepdims=True)
  dgates = weights[..., :listed] * inner[..., :listed]
  dproducts, of_logits = gates.through_gate(products, p, dlogits, gate=gate)
  if of_logits is not None:
    dgates += of_logits[..., :listed]
    dproducts = jnp.where(visible, dproducts, 0)  # the gate may be NaN where it is invisible
  return dproducts, dgates, gated


def _add_rows(x, rows, index):
  """Adds rows to x [B, G, n, ...] at index [B, G, S]; no index occurs twice, so the sum does not
  depend on an order of atomics.
  """
  add = lambda x, i, rows: x.at[i].add(rows, mode="drop", unique_indices=True)
  return jax.vmap(jax.vmap(add))(x, index, rows)


def _scatter(x, rows, index, first, limit):
  """Adds a chunk's listed rows at their tokens and its window rows at the slice they were read
  from.
  """
  listed = index.shape[-1]
  x = _add_rows(x, rows[:, :, :listed], jnp.where(index < limit, index, x.shape[2] + index))
  near = rows[:, :, listed:]
  current = lax.dynamic_slice_in_dim(x, first, near.shape[2], axis=2)
  return lax.dynamic_update_slice_in_dim(x, current + near, first, axis=2)


_attention.defvjp(_forward_rule, _backward_rule)
