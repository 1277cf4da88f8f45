"""SPARSEK attention on TPUs (v5e, v5p, v6e) with Pallas kernels (attention_forward.py,
attention_backward.py): refusals, padding, lists, gathers, and the custom_vjp around them.

XLA gathers the keys and values of all lists into contiguous buffers, again for the backward pass,
and adds the gradients of listed rows to their tokens.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels.compaction import by_entry, live_lists
from sparsek.kernels.saved import saved
from sparsek.kernels.tpu import attention_backward, attention_forward
from sparsek.kernels.tpu.grid import LANES, Bounds, Keys, Outputs, Queries, Static, Tiling
from sparsek.kernels.varying import over_batch, varying_like

# Sizes of the matrices that are multiplied: a square of 512 fills 1 MiB in float32.
ROWS, LISTED = (512, 512)
QUERIES = 2048  # the most of a block: longer ones gather less and need more memory
MOST = 2**20  # the most numbers in a block's queries, with all query heads of a KV head


def _up(x: int, multiple: int = LANES) -> int:
  return -(-x // multiple) * multiple


def tiling(n: int, heads: int, dim: int, k: int) -> Tiling:
  """Returns the sizes for n tokens and `heads` query heads of `dim` for each KV head."""
  rows = min(ROWS, _up(n), max(LANES, MOST // (heads * dim) // LANES * LANES))
  count = -(-n // rows)
  most = max(1, min(QUERIES, MOST // (heads * dim)) // rows)
  # As many parts as leave little padding.
  parts = max(p for p in range(1, most + 1) if -count % p <= count / 8)
  return Tiling(queries=parts * rows, rows=rows, keys=rows, listed=min(LISTED, _up(k)))


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  scores: jax.Array,
  threshold: jax.Array,
  expiry: jax.Array,
  order: jax.Array | None,
  start: jax.Array,
  end: jax.Array,
  *,
  k: int,
  window: int,
  gate: str,
  scale: float,
) -> jax.Array:
  """Computes SPARSEK attention, given the selection.

  Args:
    query: [batch, n, H, D] bfloat16 or float32, D <= 256.
    key, value: [batch, n, G, D].
    scores, threshold, expiry, order: [batch, G, n]; the latter three of `prefix_selection.select`
      with delay = window. `order` is not read.
    start, end: [batch, n] int32, first token of each token's document, and one past its last.
    k: budget; 0 leaves the sliding window alone.
    window, gate, scale: as in `sparsek.sparsek_attention`.

  Returns:
    [batch, n, H, D] in the dtype of `query`. Differentiable in query, key, value, scores and
    threshold.
  """
  del order
  _, n, heads, dim = query.shape
  k, window, wide = min(k, n), min(window, n), 64 if dim <= 64 else _up(dim)
  sizes = tiling(n, heads // key.shape[2], wide, k)
  rest = -n % sizes.queries
  query, key, value = (
    jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, rest), (0, wide - dim)))
    for x in (query, key, value)
  )
  scores, threshold, expiry = (
    jnp.pad(x, ((0, 0), (0, 0), (0, rest))) for x in (scores, threshold, expiry)
  )
  if rest:  # a padded token is a document of its own
    padding = jnp.broadcast_to(jnp.arange(n, n + rest, dtype=jnp.int32), (start.shape[0], rest))
    start, end = (
      jnp.concatenate([start, padding], axis=1),
      jnp.concatenate([end, padding + 1], axis=1),
    )
  out = _attention(
    query, key, value, scores, threshold, expiry, start, end, k, Static(window, gate, scale, sizes)
  )
  return jnp.swapaxes(out[:, :, :n, :dim], 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _attention(query, key, value, scores, threshold, expiry, start, end, k, static):
  return _forward_rule(query, key, value, scores, threshold, expiry, start, end, k, static)[0]


def _forward_rule(query, key, value, scores, threshold, expiry, start, end, k, static):
  tables = functools.partial(_tables, k, static)
  live, bounds, window_start = over_batch(tables, scores, expiry, start, end)
  out, logsumexp = over_batch(
    functools.partial(_forward, static),
    query,
    key,
    value,
    scores,
    threshold,
    expiry,
    live,
    bounds,
    window_start,
  )
  out, logsumexp = saved(varying_like(out, query), varying_like(logsumexp, query))
  saved_arrays = query, key, value, scores, threshold, expiry, live, bounds, window_start
  return out, (*saved_arrays, out, logsumexp)


def _backward_rule(k, static, residuals, cotangent):
  # Without this barrier XLA would keep the gathered buffers from the forward pass.
  residuals = lax.optimization_barrier(residuals)
  grads = over_batch(functools.partial(_backward, static), *residuals, cotangent)
  return *(varying_like(grad, residuals[0]) for grad in grads), None, None, None


_attention.defvjp(_forward_rule, _backward_rule)


def _per_head(f):
  return jax.vmap(jax.vmap(f))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _tables(k, static, scores, expiry, start, end):
  """Returns the `Live` lists [B, G, ...] or None, Bounds [B, ...], and the first token of each
  query's window [B, n].
  """
  (batch, groups, n), (queries, rows, _, listed), window = (
    expiry.shape,
    static.tiling,
    static.window,
  )
  start, end = varying_like(start, scores), varying_like(end, scores)
  number = jnp.arange(n, dtype=jnp.int32)
  window_start = jnp.maximum(number - window + 1, start)
  enters = _per_head(functools.partial(by_entry, delay=window))(
    (expiry > number + window).astype(jnp.int32)
  )
  entering = jnp.max(enters.reshape(batch, groups, -1, queries)[..., 1:], axis=-1)
  last = slice(queries - 1, None, queries)
  reach = jnp.minimum(number[last] + max(window - 1, 0), end[:, last] - 1) // queries
  live, tiles = None, jnp.zeros_like(entering)
  if k:
    live = _per_head(
      functools.partial(live_lists, window=window, chunk=queries, slots=_up(k, listed))
    )(scores, expiry)
    tiles = -(-live.count // listed)
  return live, Bounds(tiles, entering, window_start[:, ::rows], reach), window_start


def _operands(static, query, key, value, scores, threshold, expiry, live, bounds, window_start):
  """Returns what the kernels read: Queries, listed Keys or None, near Keys, Bounds."""
  (batch, groups, n, dim), rows = key.shape, static.tiling.rows
  queries = Queries(
    query.reshape(batch, groups, -1, n // rows, rows, dim),
    threshold.reshape(batch, groups, n // rows, 1, rows),
    window_start.reshape(batch, n // rows, 1, rows),
  )
  tiled = lambda x, size: x.reshape(batch, groups, -1, size, dim)
  row = lambda x, size: x.reshape(batch, groups, -1, 1, size)
  size, listed = static.tiling.keys, None
  near = Keys(tiled(key, size), tiled(value, size), row(scores, size), row(expiry, size))
  if live is not None:
    token = jnp.where(live.token < n, live.token, 0)
    gather = lambda x: _per_head(_rows_at)(x, token)
    size = static.tiling.listed
    listed = Keys(
      tiled(gather(key), size),
      tiled(gather(value), size),
      row(live.score, size),
      row(live.expiry, size),
    )
  return queries, listed, near, Bounds(*(x.reshape(-1) for x in bounds))


def _rows_at(x, index):
  return x.at[index].get(mode="promise_in_bounds")


@functools.partial(jax.jit, static_argnums=0)
def _forward(static, query, key, value, scores, threshold, expiry, live, bounds, window_start):
  queries, listed, near, bounds = _operands(
    static, query, key, value, scores, threshold, expiry, live, bounds, window_start
  )
  out, logsumexp = attention_forward.forward(queries, listed, near, bounds, static)
  return out.reshape(query.shape), logsumexp.reshape(query.shape[:3])


@functools.partial(jax.jit, static_argnums=0)
def _backward(
  static,
  query,
  key,
  value,
  scores,
  threshold,
  expiry,
  live,
  bounds,
  window_start,
  out,
  logsumexp,
  cotangent,
):
  queries, listed, near, bounds = _operands(
    static, query, key, value, scores, threshold, expiry, live, bounds, window_start
  )
  delta = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
  row = lambda x: x.reshape(*queries.query.shape[:4], 1, static.tiling.rows)
  outputs = Outputs(cotangent.reshape(queries.query.shape), row(logsumexp), row(delta))
  dquery, dtau, dlisted = attention_backward.query_gradients(
    queries, outputs, listed, near, bounds, static
  )
  of_near = attention_backward.near_gradients(queries, outputs, near, bounds, static)
  totals = [x.reshape(like.shape) for x, like in zip(of_near, (key, value, scores))]
  if live is not None:
    assert dlisted is not None
    add = _per_head(
      lambda total, i, rows: total.at[i].add(rows.reshape(*i.shape, *total.shape[1:]), mode="drop")
    )
    totals = [add(total, live.token, rows) for total, rows in zip(totals, dlisted)]
  dkey, dvalue, dscores = totals
  return (
    dquery.reshape(query.shape),
    dkey.astype(key.dtype),
    dvalue.astype(value.dtype),
    dscores,
    dtau.reshape(threshold.shape),
  )
