"""SPARSEK, sliding-window and full attention of rows whose tokens are sharded over `context`.

Selection runs on whole rows, of some heads on each shard. Its result tells which tokens are alive,
that is selected, at the first query of each shard; their keys and values move there, and so do
those of the window. A shard then computes attention on an ordinary row:

   | slots: tokens alive at the first  | span: up to window - 1 tokens before the shard, |
   | own query, from before the span   | and its own L, to which the queries belong      |
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.attention import api
from sparsek.attention.backends import (
  PALLAS,
  choose_implementation,
  choose_window_implementation,
  padding,
)
from sparsek.attention.documents import document_bounds
from sparsek.attention.prefix_selection import order_by_expiry, select
from sparsek.config import IMPLEMENTATIONS, check_at_least, check_choice
from sparsek.kernels import devices
from sparsek.kernels.saved import saved
from sparsek.parallel.alive_tokens import Alive, alive_tokens, send_tokens
from sparsek.parallel.exchange import (
  first_token,
  own_tokens,
  to_own_tokens,
  to_whole_rows,
  tokens_before,
)
from sparsek.parallel.mesh import CONTEXT, axis_size

MAX_SHARD = 2**24  # float32 holds every distance between two tokens of a span
ALIGNMENT = 128  # long spans are a multiple of it, so that kernels need not copy them
FULL_CHUNK = 512  # queries whose weights of all keys XLA's full attention holds at a time


class _Span(NamedTuple):
  """The span of this shard in its row.

  Attributes:
    length: L, tokens of the shard.
    halo: tokens of the span besides the own ones: window - 1, or a few more.
    base: index in the row of the span's first token, below 0 where empty tokens come first.
    offset: index in the span of the first own token.
  """

  length: int
  halo: int
  base: jax.Array
  offset: jax.Array | int

  def read(self, x: jax.Array) -> jax.Array:
    """Returns the tokens of the span, given the shard's own: [B, L, ...] to [B, halo + L, ...]."""
    if not self.halo:
      return x
    (before,) = saved(tokens_before(x[:, -min(self.halo, self.length) :], self.halo))
    return self._from_base(before, x)

  def place(self, x: jax.Array) -> jax.Array:
    """Puts own tokens at their places in the span, with zeros at those of the others."""
    return self._from_base(jnp.zeros((x.shape[0], self.halo, *x.shape[2:]), x.dtype), x)

  def _from_base(self, before, x):
    row = jnp.concatenate([before, x, jnp.zeros_like(before)], axis=1)
    size = self.halo + self.length
    return lax.dynamic_slice_in_dim(row, self.halo - self.offset, size, axis=1)

  def bounds(self, start: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cuts `document_bounds` of whole rows to the span, counted from its first token."""
    size, first = self.halo + self.length, self.base + self.halo
    # Empty tokens before the row are a document.
    start, end = (
      lax.dynamic_slice_in_dim(_behind(self.halo, x, fill), first, size, axis=1)
      for x, fill in ((start, -self.halo), (end, 0))
    )
    return jnp.maximum(start - self.base, 0), jnp.minimum(end - self.base, size)


def _span(length: int, window: int, empty_first: bool) -> _Span:
  """Returns the span of a shard of `length` tokens.

  The first shards have fewer than `halo` tokens before them. Empty ones take their places, or, with
  `empty_first` False, come behind the own tokens, where no own query looks. The former is faster,
  the latter needs no documents.
  """
  halo = max(window - 1, 0)
  if halo >= ALIGNMENT:
    halo += -halo % ALIGNMENT
  halo = min(halo, length * (axis_size(CONTEXT) - 1))
  first = jnp.asarray(first_token(length), jnp.int32)
  if empty_first:
    return _Span(length, halo, first - halo, halo)
  base = jnp.maximum(first - halo, 0)
  return _Span(length, halo, base, first - base)


def _check(query, key, value, scores, k, window, gate, scale, segment_ids):
  """Raises ValueError for arguments that do not fit, as on one device."""
  api.check_arguments(query, key, value, scores, k, window, gate, scale, None)
  batch, length = query.shape[:2]
  n = length * axis_size(CONTEXT)
  if segment_ids is not None and segment_ids.shape != (batch, n):
    raise ValueError(
      f"segment_ids must hold whole rows, shape {(batch, n)}, got {segment_ids.shape}"
    )
  if n > api.MAX_TOKENS or min(window, n) + length > MAX_SHARD:
    raise ValueError(
      f"rows must hold at most 2^26 tokens, and window + tokens of a shard at most 2^24; got "
      f"{n} tokens in {axis_size(CONTEXT)} shards and window {window}"
    )


def sparsek_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  scores: jax.Array,
  *,
  k: int,
  window: int,
  gate: str = "straight_through",
  scale: float | None = None,
  segment_ids: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Computes `sparsek.sparsek_attention` of rows whose tokens may be sharded over `context`.

  Args:
    query: [B, L, H, D], the tokens of this shard; key, value and scores too.
    key, value, scores, k, window, gate, scale: as in `sparsek.sparsek_attention`.
    segment_ids: [B, n] of whole rows, or None.
    implementation: as in `sparsek.sparsek_attention`; "reference" takes whole rows only.

  Returns:
    [B, L, H, D] of this shard.

  Raises:
    ValueError, NotImplementedError: as `sparsek.sparsek_attention`.
  """
  shards = axis_size(CONTEXT)
  if shards == 1:
    return api.sparsek_attention(
      query,
      key,
      value,
      scores,
      k=k,
      window=window,
      gate=gate,
      scale=scale,
      segment_ids=segment_ids,
      implementation=implementation,
    )
  _check(query, key, value, scores, k, window, gate, scale, segment_ids)
  check_choice("implementation", implementation, (None, *IMPLEMENTATIONS))
  if implementation == "reference":
    raise NotImplementedError(
      "implementation='reference' takes whole rows, and tokens are sharded over "
      f"context={shards}; use 'xla'"
    )
  if not query.size:
    return query
  chosen = choose_implementation(implementation, query, segment_ids, 0).implementation
  batch, length = query.shape[:2]
  n = length * shards
  k, window = min(int(k), n), min(int(window), n)
  scores = scores.astype(jnp.float32)
  start, end = document_bounds(segment_ids, batch, n)
  threshold, expiry = select_own(scores, start, end, k, window, segment_ids is not None)
  span = _span(length, window, empty_first=True)
  alive = min(k, n - length - span.halo)
  slots = alive + padding(chosen, alive + span.halo + length)
  row = _local_row(span, alive, slots, key, value, scores, expiry)
  row_start, row_end = _row_bounds(span, slots, *span.bounds(start, end))
  tau = _behind(slots + span.halo, threshold, -jnp.inf)
  order = row.expiry
  if chosen in PALLAS:
    (order,) = saved(order_by_expiry(row.expiry, devices.can_run_portable()))
  return api.attend_selected(
    chosen,
    query,
    row.key,
    row.value,
    row.scores,
    (jnp.swapaxes(tau, 1, 2), row.expiry, order),
    row_start,
    row_end,
    api.Options(
      min(k, slots + span.halo + length),
      window,
      gate,
      query.shape[-1] ** -0.5 if scale is None else float(scale),
    ),
  )


def select_own(
  scores: jax.Array, start: jax.Array, end: jax.Array, k: int, window: int, packed: bool
) -> tuple[jax.Array, jax.Array]:
  """Returns threshold and expiry of this shard's tokens, to the bit as on one device.

  Args:
    scores: [B, L, G] float32 of this shard.
    start, end: [B, n], `document_bounds` of whole rows.
    k, window: at most n.
    packed: whether there may be more than one document in a row.

  Returns:
    [B, L, G] each; expiry counts tokens from the start of the row.
  """
  (whole,) = saved(to_whole_rows(scores))
  selection = select(
    jnp.swapaxes(whole, 1, 2), start, end, k, window, packed, devices.can_run_portable()
  )
  threshold, expiry = (jnp.swapaxes(x, 1, 2) for x in selection[:2])
  heads = scores.shape[2]
  if start.shape[1] <= MAX_SHARD:  # float32 holds every expiry: one exchange does
    both = to_own_tokens(jnp.concatenate([threshold, expiry.astype(jnp.float32)]), heads)
    threshold, expiry = jnp.split(both, 2)
    expiry = expiry.astype(jnp.int32)
  else:
    threshold, expiry = (to_own_tokens(x, heads) for x in (threshold, expiry))
  threshold, expiry = saved(threshold, expiry)
  return threshold, expiry


def _behind(slots, x, fill=0.0):
  """Returns x [B, span, ...] behind `slots` tokens of `fill`."""
  padding = [(0, 0)] * x.ndim
  padding[1] = (slots, 0)
  return jnp.pad(x, padding, constant_values=fill)


class _Row(NamedTuple):
  """The keys of a shard's row: key and value [B, M, G, D], scores and expiry [B, G, M]."""

  key: jax.Array
  value: jax.Array
  scores: jax.Array
  expiry: jax.Array


def _local_row(span, alive, slots, key, value, scores, expiry):
  """Collects the tokens that the shard's queries may see; `alive` slots, the last, may be taken."""
  length, size, halo = span.length, span.halo + span.length, span.halo
  token = first_token(length) + jnp.arange(length, dtype=jnp.int32)
  # Expiry travels as a number of steps from its token, as far as the span reaches.
  lifetime = jnp.clip(expiry - token[:, None], 0, size).astype(jnp.float32)
  index = None
  if alive:
    (index,) = saved(alive_tokens(expiry, halo, alive))
  key, value, scores, received = send_tokens(halo, key, value, scores, lifetime, expiry, index)
  before, before_small = saved(received.before, received.before_small)
  parts = [
    [before[..., : key.shape[-1]], key],
    [before[..., key.shape[-1] :], value],
    [before_small[..., 0], scores],
    [before_small[..., 1], lifetime],
  ]
  row_key, row_value, row_scores, lifetime = (jnp.concatenate(part, axis=1) for part in parts)
  place = jnp.arange(size, dtype=jnp.int32)[:, None]
  row_expiry = jnp.minimum(place + lifetime.astype(jnp.int32), size) + slots
  if received.alive is not None:
    listed = Alive(*(_behind(slots - alive, x) for x in saved(*received.alive)))
  else:
    listed = Alive(
      *(jnp.zeros((x.shape[0], slots, *x.shape[2:]), x.dtype) for x in (key, value, scores, scores))
    )
  lifetime = listed.lifetime.astype(jnp.int32)  # from the first own query on; 0 in an empty slot
  listed_expiry = jnp.where(lifetime > 0, lifetime + slots + halo, 0)
  row_key, row_value, row_scores, row_expiry = (
    jnp.concatenate(pair, axis=1)
    for pair in zip((*listed[:3], listed_expiry), (row_key, row_value, row_scores, row_expiry))
  )
  return _Row(row_key, row_value, jnp.swapaxes(row_scores, 1, 2), jnp.swapaxes(row_expiry, 1, 2))


def _row_bounds(span, slots, start, end):
  """Puts the slots in front of the span's `document_bounds`.

  The slots belong to the first own token's document if that may reach back beyond the span, and are
  a document of their own if not: then they are empty.
  """
  first = lambda x: lax.dynamic_slice_in_dim(x, span.offset, 1, axis=1)
  joined = (first(start) == 0) & (span.base > 0)
  slot_start = jnp.zeros((start.shape[0], slots), jnp.int32)
  slot_end = jnp.broadcast_to(jnp.where(joined, first(end) + slots, slots), slot_start.shape)
  start = jnp.where(joined & (start == 0), 0, start + slots)
  return (
    jnp.concatenate([slot_start, start], axis=1),
    jnp.concatenate([slot_end, end + slots], axis=1),
  )


def sliding_window_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  window: int,
  scale: float | None = None,
  segment_ids: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Computes `sparsek.sliding_window_attention` of rows that may be sharded over `context`.

  Arguments, result and errors are as in `sparsek_attention`, except the implementation, which is as
  in `sparsek.sliding_window_attention`.
  """
  shards = axis_size(CONTEXT)
  if shards == 1:
    return api.sliding_window_attention(
      query,
      key,
      value,
      window=window,
      scale=scale,
      segment_ids=segment_ids,
      implementation=implementation,
    )
  check_at_least("window", window, 1)
  check_choice("implementation", implementation, (None, *api.WINDOW_IMPLEMENTATIONS))
  _check(query, key, value, None, 1, window, "straight_through", scale, segment_ids)
  if not query.size:
    return query
  batch, length = query.shape[:2]
  window = min(int(window), length * shards)
  chosen = choose_window_implementation(implementation, query, segment_ids, window).implementation
  whole_rows = chosen == "cudnn"
  span = _span(length, window, empty_first=not whole_rows)
  start, end = document_bounds(segment_ids, batch, length * shards)
  key_value = span.read(jnp.concatenate([key, value], axis=-1))
  out = api.attend_window(
    chosen,
    span.place(query) if whole_rows else query,
    key_value[..., : key.shape[-1]],
    key_value[..., key.shape[-1] :],
    *span.bounds(start, end),
    window,
    query.shape[-1] ** -0.5 if scale is None else float(scale),
  )
  return lax.dynamic_slice_in_dim(out, span.offset, length, axis=1) if whole_rows else out


def full_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  scale: float | None = None,
  segment_ids: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Attends, causally, to the whole document; every shard gathers all keys and values.

  For the Pallas kernels rows are rotated, so that the own tokens are the last; those of later
  shards, which come first then, see themselves alone. cuDNN takes only rows of n queries and is not
  considered.

  Args:
    query: [B, L, H, D], the tokens of this shard; key and value too.
    scale, segment_ids: as in `sparsek_attention`.
    implementation: "xla", "mosaic_gpu", "mosaic_mma", "mosaic_tpu", or None for the fastest that
      can run.

  Returns:
    [B, L, H, D] of this shard.

  Raises:
    ValueError, NotImplementedError: as `sparsek.sliding_window_attention`.
  """
  batch, length = query.shape[:2]
  n, shards = length * axis_size(CONTEXT), axis_size(CONTEXT)
  if shards == 1:
    return api.sliding_window_attention(
      query,
      key,
      value,
      window=n,
      scale=scale,
      segment_ids=segment_ids,
      implementation=implementation,
    )
  check_choice("implementation", implementation, (None, "xla", *PALLAS))
  _check(query, key, value, None, 1, 0, "straight_through", scale, segment_ids)
  if not query.size:
    return query
  scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
  chosen = choose_implementation(implementation, query, segment_ids, 0).implementation
  start, end = document_bounds(segment_ids, batch, n)
  key_value = jnp.concatenate([key, value], axis=-1)
  (key_value,) = saved(lax.all_gather(key_value, CONTEXT, axis=1, tiled=True))
  key, value = key_value[..., : key.shape[-1]], key_value[..., key.shape[-1] :]
  first = first_token(length)
  if chosen == "xla":
    return _full_by_chunks(query, key, value, own_tokens(start), first, scale)
  later = n - length - first  # tokens of later shards
  token = jnp.arange(n, dtype=jnp.int32)
  key, value, start, end = (jnp.roll(x, later, axis=1) for x in (key, value, start, end))
  start = jnp.where(token < later, token, start + later)
  end = jnp.where(token < later, token + 1, jnp.minimum(end + later, n))
  return api.attend_window(chosen, query, key, value, start, end, n, scale)


def _full_by_chunks(query, key, value, start, first, scale):
  """Computes full attention of own queries, a chunk at a time, to keep memory linear."""
  length = query.shape[1]
  chunk = min(FULL_CHUNK, length)
  rest = -length % chunk
  query = jnp.pad(query, ((0, 0), (0, rest), (0, 0), (0, 0)))
  start = jnp.pad(start, ((0, 0), (0, rest)))
  token = jnp.arange(key.shape[1], dtype=jnp.int32)

  @jax.checkpoint
  def attend(inputs):
    query, start, position = inputs
    mask = (token <= position[:, None]) & (token >= start[:, :, None])
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], scale=scale)

  chunks = lambda x: jnp.swapaxes(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 0, 1)
  position = (first + jnp.arange(length + rest, dtype=jnp.int32)).reshape(-1, chunk)
  out = lax.map(attend, (chunks(query), chunks(start), position))
  return jnp.swapaxes(out, 0, 1).reshape(query.shape)[:, :length]
