"""SPARSEK attention on Hopper GPUs (H100, H200) with Pallas Mosaic kernels.

Kernels of single threads (thread_ops.py) list the selected tokens of each chunk of queries
(selection_lists.py) and gather their keys and values into contiguous buffers (gather_rows.py); the
attention kernels read contiguous tiles. The backward pass reads the same buffers; where memory is
short, `jax.checkpoint` with the policy of saved.py gathers them again. Rows of gradients are summed
per token in a fixed order, so results repeat to the bit.

  forward    _tables: lists, bounds of tiles -> _gather: gather_rows -> attention_forward
  backward   attention_query_gradients -> attention_key_gradients of the window, and of the lists
             -> sum_rows (attention_wide_queries and attention_wide_keys for heads of 256)
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels import devices
from sparsek.kernels.hopper import (
  attention_forward,
  attention_key_gradients,
  attention_query_gradients,
  attention_wide_keys,
  attention_wide_queries,
  gather_rows,
)
from sparsek.kernels.hopper import selection_lists as list_kernels
from sparsek.kernels.hopper.attention_tiles import Listed
from sparsek.kernels.hopper.common import BLOCK_Q, HALF, TILINGS, Tiling
from sparsek.kernels.saved import saved
from sparsek.kernels.tiles import (
  Lists,
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
LISTS = 4  # the fewest lists of a row, unless they would be shorter than SHORT
WIDE = 256  # head_dim whose gradients have kernels of their own


class Kernels(NamedTuple):
  """The attention kernels for heads of one size.

  Attributes:
    forward, query_gradients, key_gradients: functions with the arguments and results of those of
      the same name in attention_forward.py, attention_query_gradients.py and
      attention_key_gradients.py.
    forward_queries: queries of a block of the forward kernel.
    tiling: sizes of the tiles.
  """

  forward: Callable
  query_gradients: Callable
  key_gradients: Callable
  forward_queries: int
  tiling: Tiling


def _hopper_kernels(dim):
  wide = dim == WIDE
  return Kernels(
    attention_forward.forward,
    (attention_wide_queries if wide else attention_query_gradients).query_gradients,
    (attention_wide_keys if wide else attention_key_gradients).key_gradients,
    BLOCK_Q,
    TILINGS[dim],
  )


# by head_dim; smaller head dimensions are padded with zeros
HOPPER = {dim: _hopper_kernels(dim) for dim in TILINGS}


class Static(NamedTuple):
  """Options of the compiled functions, besides the shapes of their arguments."""

  k: int
  window: int
  gate: str
  scale: float
  chunk: int
  kernels: Kernels
  interpret: object = None

  @property
  def options(self) -> dict[str, Any]:
    """Arguments that all attention kernels take."""
    return dict(
      gate=self.gate, scale=self.scale, tiling=self.kernels.tiling, interpret=self.interpret
    )


class Softmax(NamedTuple):
  """Arrays from which a tile's softmax and its gradient are computed again.

  Attributes:
    cotangent: [B, m, H, D] gradient of the output.
    logsumexp: [B, H, m] float32 of the logits, to base 2.
    delta: [B, H, m] float32, products of output and cotangent.
  """

  cotangent: jax.Array
  logsumexp: jax.Array
  delta: jax.Array


def chunk_size(n: int) -> int:
  """Returns the queries of a list, so many that padding n adds less than 128 tokens a chunk."""
  chunks = max(-(-n // CHUNK), min(LISTS, -(-n // SHORT)))
  return -(-n // (chunks * BLOCK_Q)) * BLOCK_Q


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  scores: jax.Array,
  threshold: jax.Array,
  expiry: jax.Array,
  order: jax.Array,
  start: jax.Array,
  end: jax.Array,
  *,
  k: int,
  window: int,
  gate: str,
  scale: float,
  kernels: Mapping[int, Kernels] = HOPPER,
  interpret: object = None,
) -> jax.Array:
  """Computes SPARSEK attention, given the selection.

  Args:
    query: [batch, m, H, D] bfloat16 or float16, of the last m tokens.
    key, value: [batch, n, G, D].
    scores, threshold, expiry, order: [batch, G, n]; the latter three of `prefix_selection.select`
      with delay = window.
    start, end: [batch, n] int32, first token of each token's document, and one past its last.
    k: budget; 0 leaves the sliding window alone.
    window, gate, scale: as in `sparsek.sparsek_attention`.
    kernels: the attention kernels by head_dim, of which the largest bounds D.
    interpret: interpreter parameters, for tests without a GPU.

  Returns:
    [batch, m, H, D] in the dtype of `query`. Differentiable in query, key, value, scores and
    threshold.
  """
  (_, queries, _, dim), n = query.shape, key.shape[1]
  chunk = chunk_size(n)
  front, rest = (n - queries) % BLOCK_Q, -n % chunk
  if scale <= 0:  # the kernels take the largest logit before they scale
    query, scale = query * (-1 if scale < 0 else 0), abs(scale) or 1.0
  wide = next(d for d in kernels if d >= dim)
  query, key, value = (
    jnp.pad(x, ((0, 0), (before, rest), (0, 0), (0, wide - dim)))
    for x, before in ((query, front), (key, 0), (value, 0))
  )
  if rest:  # a padded token is a document of its own
    scores, threshold = (jnp.pad(x, ((0, 0), (0, 0), (0, rest))) for x in (scores, threshold))
    start, end = (_append_tokens(x, rest, offset) for x, offset in ((start, 0), (end, 1)))
  static = Static(min(k, n), min(window, n), gate, scale, chunk, kernels[wide], interpret)
  out = _attention(query, key, value, scores, threshold, expiry, order, start, end, static)
  return out[:, front : front + queries, :, :dim]


@functools.partial(jax.custom_vjp, nondiff_argnums=(9,))
def _attention(query, key, value, scores, threshold, expiry, order, start, end, static):
  return _forward_rule(query, key, value, scores, threshold, expiry, order, start, end, static)[0]


def _forward_rule(query, key, value, scores, threshold, expiry, order, start, end, static):
  lists, tiles, window_start, bounds, later_bounds = over_batch(
    functools.partial(_tables, static), expiry, order, start
  )
  listed = over_batch(functools.partial(_gather, static.interpret), key, value, scores, lists)
  out, logsumexp = over_batch(
    functools.partial(_forward, static),
    query,
    key,
    value,
    threshold,
    listed,
    lists.entered,
    window_start,
    bounds,
  )
  # Results of kernels are not typed as varying over a mesh's axes.
  out, logsumexp = saved(varying_like(out, query), varying_like(logsumexp, query))
  return out, (
    query,
    key,
    value,
    scores,
    threshold,
    end,
    lists,
    listed,
    tiles,
    window_start,
    later_bounds,
    out,
    logsumexp,
  )


def _backward_rule(static, residuals, cotangent):
  grads = over_batch(functools.partial(_backward, static), *residuals, cotangent)
  dquery, dkey, dvalue, dscores, dthreshold = (varying_like(x, residuals[0]) for x in grads)
  return dquery, dkey, dvalue, dscores, dthreshold, None, None, None, None


_attention.defvjp(_forward_rule, _backward_rule)


def _per_head(f):
  """Maps f, which takes arrays without batch and heads, over [B, G, ...] arrays."""
  return jax.vmap(jax.vmap(f))


def _flat(x):
  """Reshapes [B, G, chunks, slots] to [B, G, places]."""
  return x.reshape(*x.shape[:2], -1)


@functools.partial(jax.jit, static_argnums=0)
def _gather(interpret, key, value, scores, lists):
  """Gathers the rows of the lists' tokens."""
  token = _flat(lists.token)
  if _thread_kernels(interpret):
    return Listed(*gather_rows.gather_rows(key, value, scores, lists), _flat(lists.last))

  def rows(x):
    return _per_head(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(x, token)

  return Listed(
    rows(jnp.swapaxes(key, 1, 2)), rows(jnp.swapaxes(value, 1, 2)), rows(scores), _flat(lists.last)
  )


def _thread_kernels(interpret):
  """Returns whether the kernels of single threads are used: the interpreter cannot run them."""
  return devices.SUPPORTED and interpret is None


def _append_tokens(x, rest, offset=0):
  """Returns x [..., n] with the numbers n + offset, n + offset + 1, ... behind it, `rest` many."""
  n = x.shape[-1]
  return jnp.concatenate(
    [x, jnp.broadcast_to(jnp.arange(n, n + rest, dtype=x.dtype) + offset, (*x.shape[:-1], rest))],
    axis=-1,
  )


def make_lists(
  expiry: jax.Array, order: jax.Array, *, k: int, window: int, chunk: int, kernels: bool
) -> Lists:
  """Makes `tiles.selection_lists` of [B, G, n] arrays, by kernels or under XLA.

  n is padded to whole chunks with tokens that are not selected. With k = 0 the lists are empty.
  """
  rest = -expiry.shape[-1] % chunk
  if rest:
    expiry, order = jnp.pad(expiry, ((0, 0), (0, 0), (0, rest))), _append_tokens(order, rest)
  if k == 0:
    batch, groups, n = expiry.shape
    return no_lists(batch, groups, n, chunk)
  if kernels:
    return list_kernels.selection_lists(expiry, order, k=k, window=window, chunk=chunk)
  return _per_head(functools.partial(selection_lists, k=k, window=window, chunk=chunk))(
    expiry, order
  )


@functools.partial(jax.jit, static_argnums=0)
def _tables(static, expiry, order, start):
  """Returns the lists, their tiles, the first token of each query's window, and which tiles each
  block of queries visits in the forward pass and in the backward pass.
  """
  k, window, _, _, chunk, (*_, forward_queries, tiling), interpret = static
  kernels = _thread_kernels(interpret)
  lists = make_lists(expiry, order, k=k, window=window, chunk=chunk, kernels=kernels)
  window_start = jnp.maximum(jnp.arange(start.shape[-1], dtype=jnp.int32) - window + 1, start)
  blocks = (forward_queries, tiling.forward_keys), (HALF, tiling.query_keys)
  if kernels:
    tiles, bounds = list_kernels.bound_tiles(lists, window_start, chunk=chunk, blocks=blocks)
  else:
    tiles = list_tiles(lists)
    bounds = [
      query_bounds(tiles, window_start, chunk=chunk, block_q=block_q, block_kv=block_kv)
      for block_q, block_kv in blocks
    ]
  return lists, tiles, window_start, *bounds


@functools.partial(jax.jit, static_argnums=0)
def _forward(static, query, key, value, threshold, listed, entered, window_start, bounds):
  return static.kernels.forward(
    query,
    key,
    value,
    window_start,
    entered,
    threshold,
    listed,
    bounds,
    chunk=static.chunk,
    **static.options,
  )


@functools.partial(jax.jit, static_argnums=0)
def _backward(
  static,
  query,
  key,
  value,
  scores,
  threshold,
  end,
  lists,
  listed,
  tiles,
  window_start,
  bounds,
  out,
  logsumexp,
  cotangent,
):
  batch, queries, heads, _ = query.shape
  n, groups = key.shape[1:3]
  dquery, delta, dtau = static.kernels.query_gradients(
    query,
    key,
    value,
    cotangent,
    out,
    logsumexp,
    window_start,
    lists.entered,
    threshold,
    listed,
    bounds,
    chunk=static.chunk,
    **static.options,
  )
  dtau = jnp.sum(dtau.reshape(batch, groups, heads // groups, queries), axis=2)
  dtau = jnp.pad(dtau, ((0, 0), (0, 0), (n - queries, 0)))
  softmax = Softmax(cotangent, logsumexp, delta)
  if static.window:
    dkey, dvalue = _window_gradients(static, query, key, value, softmax, end)
  else:
    dkey, dvalue = jnp.zeros_like(key), jnp.zeros_like(value)
  if static.k == 0:
    return dquery, dkey, dvalue, jnp.zeros_like(scores), dtau
  rows = _listed_gradients(static, query, listed, softmax, lists, tiles, threshold)
  dkey, dvalue, dscores = _sum_rows(dkey, dvalue, rows, lists, static.interpret)
  return dquery, dkey, dvalue, dscores, dtau


def _window_gradients(static, query, key, value, softmax, end):
  """Returns the gradients of keys and values from the queries whose windows they are in."""
  batch, n = key.shape[:2]
  token = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (batch, n))
  last = jnp.minimum(token + static.window, end)
  tiles = window_tiles(end, static.window)
  begin = jnp.full(batch, n - query.shape[1], jnp.int32)
  bounds = key_tiles(
    tiles, begin, jnp.full_like(begin, n), block_q=static.kernels.tiling.key_queries
  )
  return static.kernels.key_gradients(
    query,
    key,
    value,
    softmax.cotangent,
    softmax.logsumexp,
    softmax.delta,
    token,
    last,
    bounds,
    tokens=n,
    **static.options,
  )


def _listed_gradients(static, query, listed, softmax, lists, tiles, threshold):
  """Returns the gradients of the keys, values and scores in all places of the lists."""
  n, chunk = threshold.shape[-1], static.chunk
  begin = jnp.broadcast_to(jnp.arange(n // chunk, dtype=jnp.int32) * chunk, lists.token.shape[:3])
  bounds = key_tiles(
    tiles,
    jnp.maximum(begin, n - query.shape[1]),
    begin + chunk,
    block_q=static.kernels.tiling.key_queries,
  )
  bounds = bounds.reshape(*lists.token.shape[:2], -1, 4)
  return static.kernels.key_gradients(
    query,
    listed.key,
    listed.value,
    softmax.cotangent,
    softmax.logsumexp,
    softmax.delta,
    _flat(lists.first),
    _flat(lists.last),
    bounds,
    lists=n // chunk,
    middle=static.k,
    score=listed.score,
    tau=threshold,
    tokens=n,
    **static.options,
  )


def _sum_rows(dkey, dvalue, rows, lists, interpret):
  """Adds the gradients of listed tokens to those of the window, in the order of their chunks;
  places without a token do not count.
  """
  if _thread_kernels(interpret):
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
  """Adds the rows [places, ...] of listed tokens to totals [n, ...]."""
  chunks, slots = lists.token.shape
  n, most = lists.new_place.shape[0], lists.old_place.shape[0] // chunks
  totals = tuple(
    total.astype(jnp.float32) + row.at[lists.new_place].get(mode="fill", fill_value=0)
    for total, row in zip(totals, rows)
  )
  slot = jnp.arange(most)

  def add(c, totals):
    token = jnp.where(slot < lists.old[c], lists.token[c, :most], n + slot)

    def add_chunk(total, row):
      new = lax.dynamic_slice_in_dim(row, c * slots, most).astype(jnp.float32)
      return total.at[token].add(new, mode="drop", unique_indices=True)

    return tuple(map(add_chunk, totals, rows))

  return lax.fori_loop(0, chunks, add, totals)
