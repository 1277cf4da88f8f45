"""Attention of a chunk of new tokens to a layer's cache, and the layer's next cache.

Row b of the batch has seen `seen[b]` tokens before the chunk, and the first `count[b]` of its C new
tokens exist. Keys and values in the cache are [B, G, rows, D], those of the new tokens [B, C, G, D]
as in the model.

A chunk is computed by the attention of the parallel forward pass. In a sparsek layer its keys are

  k slots, by position | support, scores without keys | ring of the window, by position | C new

A slot is a candidate for every new query. The tokens of the ring and of the chunk become candidates
as they leave the window, just as in the parallel forward pass. Before `window` tokens have been
seen, the first part of this sequence does not exist and holds no candidate: it is moved to the end,
where no query sees it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsek.attention.api import resolve_window, sliding_window_attention, sparsek_attention
from sparsek.attention.operator import sparsek
from sparsek.config import TransformerConfig
from sparsek.generation.cached_attention import (
  KeysAndValues,
  SelectionCache,
  float32_product,
  map_rows,
  needs_support,
)
from sparsek.kernels.sentinels import NOWHERE
from sparsek.model.head_groups import window_implementation
from sparsek.model.scorers import scorer_delay

MAX_LOGITS = 2**22  # logits that a full layer computes at once for one head of a chunk


def attend_chunk(
  kind: str,
  config: TransformerConfig,
  cache: KeysAndValues | SelectionCache,
  seen: jax.Array,
  count: jax.Array,
  query: jax.Array,
  new: KeysAndValues,
  scores: jax.Array | None,
  fresh: bool,
) -> tuple[jax.Array, KeysAndValues | SelectionCache]:
  """Attends from a chunk of C new tokens a row.

  Args:
    kind, config, cache, seen: as in `cached_attention.attend_token`.
    count: [B], how many of the new tokens of a row exist.
    query: [B, C, H, D].
    new: keys and values of the new tokens, [B, C, G, D].
    scores: [B, C, G], those that have just become final in a sparsek layer.
    fresh: no row has seen a token before.
  Returns:
    The output of attention, [B, C, H, D], and the next cache of the layer.
  """
  if isinstance(cache, SelectionCache):
    return _select_chunk(config, cache, seen, count, query, new, scores, fresh)
  attend = _full_chunk if kind == "full" else _window_chunk
  return attend(config, cache, seen, count, query, new, fresh)


def _take_rows(x, index):
  """Returns x [B, N, ...] at index [B, M]."""
  return jax.vmap(lambda row, i: jnp.take(row, i, axis=0))(x, index)


def _tokens_first(x):
  """Turns [B, G, M, ...] into [B, M, G, ...], and back."""
  return jnp.swapaxes(x, 1, 2)


def _continue(attend, prefix, chunk, missing, fresh):
  """Returns the outputs of attention for a chunk behind a prefix.

  Args:
    attend: takes arrays [B, P + C, ...], each joined from prefix and chunk.
    prefix, chunk: tuples of arrays [B, P, ...] and [B, C, ...].
    missing: [B], how many of the first tokens of the prefix do not exist.
    fresh: True if there is no prefix.
  """
  length = prefix[0].shape[1]
  if fresh or not length:
    return attend(*chunk)
  joined = [jnp.concatenate(pair, axis=1) for pair in zip(prefix, chunk)]
  n, missing = joined[0].shape[1], missing[:, None]
  out = attend(*(_take_rows(x, (jnp.arange(n) + missing) % n) for x in joined))
  return _take_rows(out, jnp.arange(n - length) + length - missing)


def _next_ring(window, seen, count):
  """Returns the next ring as indices [B, window] into the ordered ring followed by the chunk."""
  return count[:, None] + (jnp.arange(window) - (seen + count)[:, None]) % window


def _in_order(ring, seen):
  """Turns a ring [B, G, window, ...] into [B, window, G, ...] with the earliest token first."""
  window = ring.shape[2]
  if not window:
    return _tokens_first(ring)
  return _take_rows(_tokens_first(ring), (seen[:, None] + jnp.arange(window)) % window)


def _window_chunk(config, ring, seen, count, query, new, fresh):
  before, window = map_rows(lambda x: _in_order(x, seen), ring), config.window
  attend = functools.partial(
    sliding_window_attention, window=window, implementation=window_implementation(config)
  )
  nothing = jnp.zeros((query.shape[0], window, *query.shape[2:]), query.dtype)
  mixed = _continue(attend, (nothing, *before), (query, *new), jnp.maximum(window - seen, 0), fresh)
  index = _next_ring(window, seen, count)
  keep = lambda x, y: _tokens_first(_take_rows(jnp.concatenate([x, y], axis=1), index))
  return mixed, KeysAndValues(keep(before.key, new.key), keep(before.value, new.value))


def _full_chunk(config, rows, seen, count, query, new, fresh):
  batch, length, heads, head_dim = query.shape
  capacity = rows.key.shape[2]
  position = seen[:, None] + jnp.arange(length)
  exists = jnp.arange(length) < count[:, None]
  b, index = jnp.arange(batch)[:, None], jnp.where(exists, position, capacity)
  put = lambda x, y: x.at[b, :, index].set(y, mode="drop")
  rows = KeysAndValues(put(rows.key, new.key), put(rows.value, new.value))
  if fresh:
    implementation = resolve_window(window_implementation(config), query, None)
    if implementation == "xla":
      mixed = jax.nn.dot_product_attention(query, *new, is_causal=True)
    else:
      mixed = sliding_window_attention(query, *new, window=length, implementation=implementation)
  else:
    mixed = _attend_to_all(config, query, rows, position)
  # NaN beyond max_length, so that the mistake is seen
  return jnp.where((exists & (position >= capacity))[..., None, None], jnp.nan, mixed), rows


def _attend_to_all(config, query, rows, position):
  """Attends causally from queries [B, C, H, D] at position [B, C] to rows [B, G, L, D].

  An online softmax goes over blocks of rows, up to the last that any query sees.
  """
  batch, length, heads, head_dim = query.shape
  groups, capacity = rows.key.shape[1:3]
  block = max(1, min(capacity, MAX_LOGITS // length))
  product = float32_product(query.dtype)
  query = jnp.moveaxis(query.reshape(batch, length, groups, -1, head_dim), 1, 3)  # [B, G, R, C, D]

  def step(i, state):
    top, total, mixed = state
    # the last block overlaps the one before it, whose rows are then not visible again
    first = jnp.minimum(i * block, capacity - block)
    key, value = (jax.lax.dynamic_slice_in_dim(x, first, block, axis=2) for x in rows)
    row = first + jnp.arange(block)
    visible = ((row >= i * block) & (row <= position[..., None]))[:, None, None]
    logits = jnp.where(visible, product("bgrcd,bgmd->bgrcm", query, key) * head_dim**-0.5, -jnp.inf)
    above = jnp.maximum(top, jnp.max(logits, axis=-1, keepdims=True))
    weights, shrink = jnp.exp(logits - above), jnp.exp(top - above)
    mixed = mixed * shrink + product("bgrcm,bgmd->bgrcd", weights.astype(value.dtype), value)
    return above, total * shrink + jnp.sum(weights, axis=-1, keepdims=True), mixed

  blocks = jnp.minimum(jnp.max(position), capacity - 1) // block + 1
  # The first block holds a visible row for every query, so that no logit is compared with -inf.
  start = (
    jnp.full((*query.shape[:-1], 1), -jnp.inf),
    jnp.zeros((*query.shape[:-1], 1)),
    jnp.zeros(query.shape),
  )
  _, total, mixed = jax.lax.fori_loop(0, blocks, step, start)
  mixed = jnp.moveaxis(mixed / total, 3, 1).reshape(batch, length, heads, head_dim)
  return mixed.astype(rows.value.dtype)


class _Ordered(NamedTuple):
  """Rows and scores of a sparsek layer before and in a chunk, in the order of attention's keys.

  Attributes:
    rows: keys and values [B, k + support_size + window, G, D], zeros for the support.
    slot_score, slot_position: [B, G, k], by position.
    near: [B, window + C, G], scores of ring and chunk, -inf where they are not known yet.
  """

  rows: list[jax.Array]
  slot_score: jax.Array
  slot_position: jax.Array
  near: jax.Array


def _select_chunk(config, cache, seen, count, query, new, scores, fresh):
  """Attends from a chunk of a sparsek layer."""
  k, window, support_size = config.k, config.window, cache.support.shape[-1]
  before = _in_order_of_keys(config, cache, seen, query, scores)
  before_scores = jnp.concatenate(
    [_tokens_first(before.slot_score), _tokens_first(cache.support), before.near[:, :window]],
    axis=1,
  )
  prefix = k + support_size + window
  nothing = jnp.zeros((query.shape[0], prefix, *query.shape[2:]), query.dtype)
  attend = functools.partial(
    sparsek_attention, k=k, window=window, gate=config.gate, implementation=config.implementation
  )
  missing = jnp.where(seen < window, prefix - seen, 0)
  mixed = _continue(
    attend,
    (nothing, *before.rows, before_scores),
    (query, *new, before.near[:, window:]),
    missing,
    fresh,
  )
  return mixed, _keep(config, cache, seen, count, new, before)


def _in_order_of_keys(config, cache, seen, query, scores):
  k, window, length = config.k, config.window, query.shape[1]
  batch, groups, delay = query.shape[0], config.num_kv_heads, scorer_delay(config)
  never = lambda size: jnp.full((batch, size, groups), -jnp.inf)
  # The scores of the last `delay` tokens are not known yet, nor needed.
  near = jnp.concatenate(
    [_in_order(cache.pending, seen)[:, : window - delay], scores, never(delay)], axis=1
  )
  index = jnp.arange(window + length)
  near = jnp.where((seen[:, None] + index >= window)[..., None], near, -jnp.inf)

  order = jnp.argsort(cache.position, axis=-1)
  # the first k scores are those of slots
  slot_score, slot_position = (
    jnp.take_along_axis(x, order, axis=-1) for x in (cache.score, cache.position)
  )
  slots = map_rows(lambda x: jnp.take_along_axis(x, order[..., None], axis=2), cache.rows)
  none = jnp.zeros((batch, cache.support.shape[-1], groups, config.head_dim), query.dtype)
  rows = [
    jnp.concatenate([_tokens_first(x), none, _in_order(y[:, :, k:], seen)], axis=1)
    for x, y in zip(slots, cache.rows)
  ]
  return _Ordered(rows, slot_score, slot_position, near)


def _keep(config, cache, seen, count, new, before):
  """Returns the next cache of a sparsek layer after a chunk.

  Candidates for the slots are the tokens in them and those that have left the window, which are the
  first `count` of ring and chunk. Of equal scores the earlier token wins: it stands first.
  """
  k, window, support_size = config.k, config.window, cache.support.shape[-1]
  (batch, length, groups), near = new.key.shape[:3], before.near
  leaving = jnp.where(
    (jnp.arange(length) < count[:, None])[..., None] & ~jnp.isnan(near[:, :length]),
    near[:, :length],
    -jnp.inf,
  )
  # [B, G, k + C]
  candidates = jnp.concatenate([before.slot_score, _tokens_first(leaving)], axis=-1)
  arrival = jnp.broadcast_to(
    (seen[:, None] - window + jnp.arange(length))[:, None], (batch, groups, length)
  )
  position = jnp.concatenate([before.slot_position, arrival], axis=-1)
  cache, chosen = keep_best(config, cache, candidates, position)
  index = _tokens_first(jnp.where(chosen < k, chosen, chosen + support_size))[..., None]
  ring = _next_ring(window, seen, count) if window else jnp.zeros((batch, 0), jnp.int32)

  def keep(before, new):
    rows = jnp.concatenate([before, new], axis=1)
    kept = [jnp.take_along_axis(rows, index, axis=1), _take_rows(rows, k + support_size + ring)]
    return _tokens_first(jnp.concatenate(kept, axis=1))

  key, value = before.rows
  return cache._replace(
    rows=KeysAndValues(keep(key, new.key), keep(value, new.value)),
    pending=_tokens_first(_take_rows(near, ring)),
  )


def keep_best(
  config: TransformerConfig, cache: SelectionCache, candidates: jax.Array, position: jax.Array
) -> tuple[SelectionCache, jax.Array]:
  """Puts the best candidates into the slots of a cache, and adds the others to its support.

  Args:
    config, cache: of the layer.
    candidates: [B, G, M] float32 scores, first those in the k slots; -inf where there is none.
    position: [B, G, M] int32 of the candidates.
  Returns:
    The cache without their keys and values, and the candidates that were chosen, [B, G, k] indices.
  """
  k, support_size = config.k, cache.support.shape[-1]
  batch, groups, _ = candidates.shape
  score, chosen = jax.lax.top_k(candidates, k)
  position = jnp.take_along_axis(position, chosen, axis=-1)
  cache = cache._replace(
    score=jnp.pad(score, ((0, 0), (0, 0), (0, config.window))),
    position=jnp.where(score > -jnp.inf, position, NOWHERE),
  )
  if not needs_support(config.gate):
    return cache, chosen
  b, g = jnp.ogrid[:batch, :groups]
  # candidates that have no slot
  beyond = candidates.at[b[..., None], g[..., None], chosen].set(-jnp.inf)
  beyond = jnp.concatenate([cache.support, beyond], axis=-1)
  in_support = sparsek(jnp.concatenate([score, beyond], axis=-1), k)[..., k:] > 0
  beyond = jnp.where(in_support, beyond, -jnp.inf)
  lost = jnp.maximum(jnp.sum(in_support, axis=-1, dtype=jnp.int32) - support_size, 0)
  support = jax.lax.top_k(beyond, support_size)[0]
  return cache._replace(support=support, lost=cache.lost + lost), chosen
