"""SPARSEK attention on Hopper GPUs (H100, H200) with Pallas Mosaic kernels.

Kernels of single threads list the selected tokens per chunk of queries (selection_lists.py) and
gather their keys and values into contiguous buffers (gather_rows.py); the attention kernels read
contiguous tiles. The buffers are gathered again for the backward pass. Rows of gradients are summed
per token in a fixed order: results repeat to the bit.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels import devices
from sparsek.kernels.hopper import attention_backward, attention_forward, gather_rows
from sparsek.kernels.hopper import selection_lists as list_kernels
from sparsek.kernels.hopper.common import BLOCK_Q, HALF, TILINGS, Tiling
from sparsek.kernels.saved import saved
from sparsek.kernels.tiles import (
  key_tiles,
  list_tiles,
  no_lists,
  query_bounds,
  selection_lists,
  window_tiles,
)
from sparsek.kernels.varying import over_batch, varying_like

# Queries per list: longer ones are gathered less often, shorter ones hold fewer dead tokens and
# occupy more multiprocessors.
CHUNK, SHORT = 2048, 512
LISTS = 4  # of a row, at least, unless they would be shorter than SHORT
HEAD_DIMS = tuple(TILINGS)  # smaller head dimensions are padded with zeros


class Static(NamedTuple):
  """What the compiled functions depend on besides shapes."""

  k: int
  window: int
  gate: str
  scale: float
  chunk: int
  tiling: Tiling
  interpret: object = None


def chunk_size(n: int) -> int:
  """Queries per list, such that padding n to whole chunks adds less than 128 tokens a chunk."""
  chunks = max(-(-n // CHUNK), min(LISTS, -(-n // SHORT)))
  return -(-n // (chunks * BLOCK_Q)) * BLOCK_Q


def attention(
  query,
  key,
  value,
  scores,
  threshold,
  expiry,
  order,
  start,
  end,
  *,
  k,
  window,
  gate,
  scale,
  interpret=None,
):
  """SPARSEK attention, given the selection.

  Args:
    query: [batch, n, H, D] bfloat16 or float16, D <= 128.
    key, value: [batch, n, G, D].
    scores, threshold, expiry, order: [batch, G, n]; the latter three of `causal.select` with delay
      = window.
    start, end: [batch, n] int32, first token of each token's document, and one past its last.
    k: budget; 0 leaves the sliding window alone.
    window, gate, scale: as in `sparsek.sparsek_attention`.
    interpret: interpreter parameters, for tests without a GPU.

  Returns:
    [batch, n, H, D] in the dtype of `query`. Differentiable in query, key, value, scores and
    threshold.
  """
  n, dim = query.shape[1], query.shape[-1]
  chunk = chunk_size(n)
  rest = -n % chunk
  if scale <= 0:  # the kernels take the largest logit before they scale
    query, scale = query * (-1 if scale < 0 else 0), abs(scale) or 1.0
  wide = next(d for d in HEAD_DIMS if d >= dim)
  query, key, value = (
    jnp.pad(x, ((0, 0), (0, rest), (0, 0), (0, wide - dim))) for x in (query, key, value)
  )
  if rest:  # a padded token is a document of its own
    scores, threshold = (jnp.pad(x, ((0, 0), (0, 0), (0, rest))) for x in (scores, threshold))
    start, end = (_append_tokens(x, rest, offset) for x, offset in ((start, 0), (end, 1)))
  static = Static(min(k, n), min(window, n), gate, scale, chunk, TILINGS[wide], interpret)
  out = _attention(query, key, value, scores, threshold, expiry, order, start, end, static)
  return out[:, :n, :, :dim]


@functools.partial(jax.custom_vjp, nondiff_argnums=(9,))
def _attention(query, key, value, scores, threshold, expiry, order, start, end, static):
  return _forward_rule(query, key, value, scores, threshold, expiry, order, start, end, static)[0]


def _forward_rule(query, key, value, scores, threshold, expiry, order, start, end, static):
  lists, tiles, left, bounds = over_batch(functools.partial(_tables, static), expiry, order, start)
  out, logsumexp = over_batch(
    functools.partial(_forward, static), query, key, value, scores, threshold, lists, left, bounds
  )
  # kernels forget it
  out, logsumexp = saved(varying_like(out, query), varying_like(logsumexp, query))
  return out, (query, key, value, scores, threshold, end, lists, tiles, left, out, logsumexp)


def _backward_rule(static, residuals, cotangent):
  # or XLA would keep the gathered buffers from the forward pass
  residuals = lax.optimization_barrier(residuals)
  grads = over_batch(functools.partial(_backward, static), *residuals, cotangent)
  return *(varying_like(grad, residuals[0]) for grad in grads), None, None, None, None


_attention.defvjp(_forward_rule, _backward_rule)


def _per_head(f):
  return jax.vmap(jax.vmap(f))


def _flat(x):
  """[B, G, chunks, slots] -> [B, G, places]."""
  return x.reshape(*x.shape[:2], -1)


def _gather(key, value, scores, lists, interpret):
  """Listed keys, values [B, G, places, D], scores and last queries [B, G, places]."""
  token = _flat(lists.token)
  if _kernels(interpret):
    return *gather_rows.gather_rows(key, value, scores, lists), _flat(lists.last)
  rows = lambda x: _per_head(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(x, token)
  return (
    rows(jnp.swapaxes(key, 1, 2)),
    rows(jnp.swapaxes(value, 1, 2)),
    rows(scores),
    _flat(lists.last),
  )


def _kernels(interpret):
  """Whether the kernels of single threads are used."""
  return devices.SUPPORTED and interpret is None


def _append_tokens(x, rest, offset=0):
  """x [..., n] and behind it the numbers n + offset, n + offset + 1, ..., `rest` many."""
  n = x.shape[-1]
  return jnp.concatenate(
    [x, jnp.broadcast_to(jnp.arange(n, n + rest, dtype=x.dtype) + offset, (*x.shape[:-1], rest))],
    axis=-1,
  )


def make_lists(expiry, order, *, k, window, chunk, kernels):
  """`tiles.selection_lists` of [B, G, n] arrays, by kernels or under XLA; n is padded to whole
  chunks with unselected tokens; k = 0: empty ones.
  """
  rest = -expiry.shape[-1] % chunk
  if rest:
    expiry, order = jnp.pad(expiry, ((0, 0), (0, 0), (0, rest))), _append_tokens(order, rest)
  if k == 0:
    return no_lists(*expiry.shape, chunk)
  if kernels:
    return list_kernels.selection_lists(expiry, order, k=k, window=window, chunk=chunk)
  return _per_head(functools.partial(selection_lists, k=k, window=window, chunk=chunk))(
    expiry, order
  )


@functools.partial(jax.jit, static_argnums=0)
def _tables(static, expiry, order, start):
  """(lists, their tiles, first token of each query's window, bounds of each block of queries)."""
  k, window, _, _, chunk, tiling, interpret = static
  lists = make_lists(expiry, order, k=k, window=window, chunk=chunk, kernels=_kernels(interpret))
  left = jnp.maximum(jnp.arange(start.shape[-1], dtype=jnp.int32) - window + 1, start)
  bounds_of = list_kernels.query_bounds if _kernels(interpret) else query_bounds
  tiles = list_tiles(lists)
  return (
    lists,
    tiles,
    left,
    bounds_of(tiles, left, chunk=chunk, block_q=BLOCK_Q, block_kv=tiling.forward_keys),
  )


@functools.partial(jax.jit, static_argnums=0)
def _forward(static, query, key, value, scores, threshold, lists, left, bounds):
  return attention_forward.forward(
    query,
    key,
    value,
    left,
    lists.entered,
    threshold,
    _gather(key, value, scores, lists, static.interpret),
    bounds,
    gate=static.gate,
    scale=static.scale,
    chunk=static.chunk,
    tiling=static.tiling,
    interpret=static.interpret,
  )


@functools.partial(jax.jit, static_argnums=0)
def _backward(
  static, query, key, value, scores, threshold, end, lists, tiles, left, out, logsumexp, cotangent
):
  k, window, gate, scale, chunk, tiling, interpret = static
  batch, n, heads, _ = query.shape
  groups = key.shape[2]
  options = dict(gate=gate, scale=scale, tiling=tiling, interpret=interpret)
  listed = _gather(key, value, scores, lists, interpret)
  bounds_of = list_kernels.query_bounds if _kernels(interpret) else query_bounds
  bounds = bounds_of(tiles, left, chunk=chunk, block_q=HALF, block_kv=tiling.query_keys)
  dquery, delta, dtau = attention_backward.query_gradients(
    query,
    key,
    value,
    cotangent,
    out,
    logsumexp,
    left,
    lists.entered,
    threshold,
    listed,
    bounds,
    chunk=chunk,
    **options,
  )
  dtau = jnp.sum(dtau.reshape(batch, groups, heads // groups, n), axis=2)
  common = cotangent, logsumexp, delta
  if window:
    token = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (batch, n))
    last = jnp.minimum(token + window, end)
    bounds = key_tiles(
      window_tiles(end, window), jnp.zeros(batch, jnp.int32), limit=n, block_q=tiling.key_queries
    )
    dkey, dvalue = attention_backward.key_gradients(
      query, key, value, *common, token, last, bounds, **options
    )
  else:
    dkey, dvalue = jnp.zeros_like(key), jnp.zeros_like(value)
  if k == 0:
    return dquery, dkey, dvalue, jnp.zeros_like(scores), dtau
  base = jnp.broadcast_to(jnp.arange(n // chunk, dtype=jnp.int32) * chunk, lists.token.shape[:3])
  bounds = key_tiles(tiles, base, limit=chunk, block_q=tiling.key_queries).reshape(
    batch, groups, -1, 4
  )
  rows = attention_backward.key_gradients(
    query,
    *listed[:2],
    *common,
    _flat(lists.first),
    _flat(lists.last),
    bounds,
    lists=n // chunk,
    middle=k,
    score=listed[2],
    tau=threshold,
    **options,
  )
  dkey, dvalue, dscores = _sum_rows(dkey, dvalue, rows, lists, interpret)
  return dquery, dkey, dvalue, dscores, dtau


def _sum_rows(dkey, dvalue, rows, lists, interpret):
  """Gradients of the window plus those of listed tokens, in the order of their chunks; a row is
  read only where its place holds a token.
  """
  if _kernels(interpret):
    return gather_rows.sum_rows(dkey, dvalue, rows, lists)
  totals = (
    jnp.swapaxes(dkey, 1, 2),
    jnp.swapaxes(dvalue, 1, 2),
    jnp.zeros(dkey.shape[:1] + dkey.shape[2:0:-1], jnp.float32),
  )
  totals = _per_head(_add_rows)(totals, tuple(rows), lists)
  return (
    jnp.swapaxes(totals[0], 1, 2).astype(dkey.dtype),
    jnp.swapaxes(totals[1], 1, 2).astype(dvalue.dtype),
    totals[2],
  )


def _add_rows(totals, rows, lists):
  """totals [n, ...] plus the rows [places, ...] of listed tokens."""
  chunks, slots = lists.token.shape
  n, most = lists.new_place.shape[0], lists.old_place.shape[0] // chunks
  totals = tuple(
    total.astype(jnp.float32) + row.at[lists.new_place].get(mode="fill", fill_value=0)
    for total, row in zip(totals, rows)
  )
  slot = jnp.arange(most)

  def add(c, totals):
    token = jnp.where(slot < lists.old[c], lists.token[c, :most], n + slot)
    chunk = lambda row: lax.dynamic_slice_in_dim(row, c * slots, most)
    return tuple(
      total.at[token].add(chunk(row).astype(jnp.float32), mode="drop", unique_indices=True)
      for total, row in zip(totals, rows)
    )

  return lax.fori_loop(0, chunks, add, totals)
