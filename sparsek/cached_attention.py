"""Attention of a few new queries to a layer's cache of constant size, and what the cache keeps afterwards; see sparsek/cache.py.

C new tokens follow `seen` earlier ones. Keys and values are [B, G, rows, D] here, queries [B, C, H, D] and scores [B, C, G] as in the
model.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsek.operator import causal_sparsek, sparsek
from sparsek.scoring import ScorerState

NOWHERE = jnp.iinfo(jnp.int32).max        # position of an empty slot: later than any token


class KeysAndValues(NamedTuple):
  """[B, G, length, D] each: a ring (token t lies at t % window) or, for a full layer, all tokens in order."""
  key: jax.Array
  value: jax.Array


class SelectionCache(NamedTuple):
  """State of a sparsek layer.

  Attributes:
    ring: the last `window` keys and values.
    slots: keys and values of the selected tokens; score [B, G, k] float32, -inf where empty; position [B, G, k] int32.
    support: [B, G, support_size] float32 scores of the support beyond the slots, -inf where empty.
    pending: [B, window - delay, G] scores of the tokens in the window that are final.
    scorer: state of the scoring network.
  """
  ring: KeysAndValues
  slots: KeysAndValues
  score: jax.Array
  position: jax.Array
  support: jax.Array
  pending: jax.Array
  scorer: ScorerState


def _softmax_values(config, query_BxCxHxD, rows, visible, gate=None):
  """Attention of a chunk to rows [B, G, M, D] under visible and gate [B or 1, G or 1, C, M]; gate is None where all gates are 1."""
  batch, length, heads, head_dim = query_BxCxHxD.shape
  precision = jax.lax.Precision.HIGHEST if query_BxCxHxD.dtype == jnp.float32 else None
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision)
  query = query_BxCxHxD.reshape(batch, length, config.num_kv_heads, -1, head_dim)
  logits = product("bcgrd,bgmd->bgrcm", query, rows.key) * head_dim**-0.5
  if gate is not None and config.gate == "key_value":
    logits *= gate[:, :, None]
  if gate is not None and config.gate == "softmax":
    logits += jnp.log(gate[:, :, None])
  weights = jax.nn.softmax(jnp.where(visible[:, :, None], logits, -jnp.inf), axis=-1)
  if gate is not None and config.gate in ("value", "key_value"):
    weights *= jnp.where(visible, gate, 0)[:, :, None]
  # Transposed afterwards: XLA's CPU backend refuses a bfloat16 product that sums in float32 and writes its axes in another order.
  mixed = product("bgrcm,bgmd->bgrcd", weights.astype(rows.value.dtype), rows.value)
  return jnp.moveaxis(mixed, 3, 1).reshape(batch, length, heads, head_dim).astype(query_BxCxHxD.dtype)


def _join(*parts):
  """Rows one after another."""
  return KeysAndValues(*(jnp.concatenate(arrays, axis=2) for arrays in zip(*parts)))


def _take(rows, index):
  """rows[..., index, :] with an index [B, G, M] per head or [M] for all."""
  if index.ndim == 1:
    return KeysAndValues(*(jnp.take(x, index, axis=2) for x in rows))
  return KeysAndValues(*(jnp.take_along_axis(x, index[..., None], axis=2) for x in rows))


def full_attention(config, rows, seen, query, new):
  length, capacity = query.shape[1], rows.key.shape[2]
  rows = KeysAndValues(*(jax.lax.dynamic_update_slice_in_dim(x, y, seen, axis=2) for x, y in zip(rows, new)))
  visible = jnp.arange(capacity) <= seen + jnp.arange(length)[:, None]
  mixed = _softmax_values(config, query, rows, visible[None, None])
  return jnp.where(seen + length > capacity, jnp.nan, mixed), rows          # beyond max_length: loud, not wrong


def _extend_ring(ring, seen, new):
  """Ring and chunk in order, positions seen - window .. seen + C - 1, and the next ring."""
  window, length = ring.key.shape[2], new.key.shape[2]
  if window == 0:
    return new, ring
  slot = jnp.arange(window)
  rows = _join(_take(ring, (seen + slot) % window), new)
  return rows, _take(rows, length + (slot - seen - length) % window)


def _in_window(window, seen, length):
  """[C, window + C]: which rows of `_extend_ring` each query of the chunk sees in its window."""
  row, query = jnp.arange(window + length), jnp.arange(length)[:, None]
  return (query < row) & (row <= query + window) & (row >= window - seen)


def window_attention(config, ring, seen, query, new):
  if query.shape[1] == 1:
    _, ring = _exchange(ring, seen, new)
    return _softmax_values(config, query, ring, (jnp.arange(config.window) <= seen)[None, None, None]), ring
  rows, ring = _extend_ring(ring, seen, new)
  return _softmax_values(config, query, rows, _in_window(config.window, seen, query.shape[1])[None, None]), ring


def select_chunk(config, cache, seen, query, new, scores):
  """Sparsek attention of a chunk of C queries; scores [B, C, G] have just become final."""
  k, window, length, extra = config.k, config.window, query.shape[1], cache.support.shape[-1]
  rows, ring = _extend_ring(cache.ring, seen, new)
  # Query t of the chunk admits the token at t - window: the first C rows, with the first C of the scores in the delay line.
  line = jnp.concatenate([cache.pending, scores], axis=1)
  arrival_position = seen - window + jnp.arange(length)
  arriving = jnp.where(arrival_position >= 0, jnp.swapaxes(line[:, :length], 1, 2), -jnp.inf)                        # [B, G, C]

  # Slots in order of position, then the support, then the arrivals: so that of equal scores the earlier token wins, and what has lost
  # stays out.
  order = jnp.argsort(cache.position, axis=-1)
  slots = _take(cache.slots, order)
  slot_score, slot_position = (jnp.take_along_axis(x, order, axis=-1) for x in (cache.score, cache.position))
  sequence = jnp.concatenate([slot_score, cache.support, arriving], axis=-1)
  threshold, expiry = (jnp.swapaxes(x, 1, 2) for x in causal_sparsek(jnp.swapaxes(sequence, 1, 2), k))
  threshold = threshold[..., k + extra:]                                                                            # [B, G, C]
  expiry = expiry - (k + extra)                                                          # in queries of this chunk
  keyed = jnp.concatenate([jnp.arange(k), k + extra + jnp.arange(length)])               # entries whose keys are at hand: slots, arrivals
  score, expiry = sequence[..., keyed], expiry[..., keyed]

  at = jnp.arange(length)[:, None]
  entry = jnp.concatenate([jnp.zeros(k, jnp.int32), jnp.arange(length)])
  selected = (score > -jnp.inf)[:, :, None] & (entry <= at) & (at < expiry[:, :, None])                             # [B, G, C, k + C]
  gate = jnp.clip(score[:, :, None] - threshold[..., None], 0, 1)
  # Rows of attention: slots, then ring and chunk. The first C of the latter are the arrivals; the other rows are seen in the window only.
  spare = ((0, 0), (0, 0), (0, 0), (0, window))
  local = jnp.pad(_in_window(window, seen, length), ((0, 0), (k, 0)))
  visible = jnp.pad(selected, spare) | local
  mixed = _softmax_values(config, query, _join(slots, rows), visible, jnp.where(local, 1, jnp.pad(gate, spare)))

  alive = (score > -jnp.inf) & (expiry >= length)                                                                   # at most k of them
  keep = jnp.argsort(~alive, axis=-1, stable=True)[..., :k]
  kept = jnp.take_along_axis(alive, keep, axis=-1)
  position = jnp.concatenate([slot_position, jnp.broadcast_to(arrival_position, arriving.shape)], axis=-1)
  take = lambda x, empty: jnp.where(kept, jnp.take_along_axis(x, keep, axis=-1), empty)
  in_slot = jnp.concatenate([alive[..., :k], jnp.zeros_like(cache.support, bool), alive[..., k:]], axis=-1)
  lost = jnp.where(~in_slot & (sequence > threshold[..., -1:]), sequence, -jnp.inf)
  return mixed, cache._replace(
      ring=ring, slots=_take(_join(slots, KeysAndValues(*(x[:, :, :length] for x in rows))), keep), score=take(score, -jnp.inf),
      position=take(position, NOWHERE), support=jax.lax.top_k(lost, extra)[0], pending=line[:, length:])


def _exchange(ring, seen, new):
  """Puts one token into the ring: what it pushes out (its key and value, [B, G, 1, D]) and the next ring."""
  window = ring.key.shape[2]
  if window == 0:
    return new, ring
  at = seen % window
  leaving = KeysAndValues(*(jax.lax.dynamic_slice_in_dim(x, at, 1, axis=2) for x in ring))
  return leaving, KeysAndValues(*(jax.lax.dynamic_update_slice_in_dim(x, y, at, axis=2) for x, y in zip(ring, new)))


def _put(x, index, update):
  """x [B, G, M, ...] with x[b, g, index[b, g]] = update[b, g]."""
  b, g = jnp.ogrid[:x.shape[0], :x.shape[1]]
  return x.at[b, g, index].set(update)


def select_token(config, cache, seen, query, new, scores):
  """Sparsek attention of one query: O(k + window + support) work."""
  leaving, ring = _exchange(cache.ring, seen, new)
  line = jnp.concatenate([cache.pending, scores], axis=1)
  arriving = jnp.where(seen >= config.window, line[:, 0], -jnp.inf)                                                 # [B, G]
  worst_score = jnp.min(cache.score, axis=-1)
  worst = jnp.argmax(jnp.where(cache.score == worst_score[..., None], cache.position, -1), axis=-1)                 # the latest of equals
  enters = arriving > worst_score
  put = lambda x, y: _put(x, worst, jnp.where(enters.reshape(enters.shape + (1,) * (y.ndim - 2)), y, _get(x, worst)))
  slots = KeysAndValues(*(put(x, y[:, :, 0]) for x, y in zip(cache.slots, leaving)))
  score = put(cache.score, arriving)
  position = put(cache.position, jnp.broadcast_to(seen - config.window, arriving.shape))
  support = cache.support
  if support.shape[-1]:
    loser, least = jnp.where(enters, worst_score, arriving), jnp.argmin(support, axis=-1)
    support = _put(support, least, jnp.maximum(loser, _get(support, least)))
  gates = sparsek(jnp.concatenate([score, support], axis=-1), config.k)
  gate, support = gates[..., :config.k], jnp.where(gates[..., config.k:] > 0, support, -jnp.inf)

  in_window = jnp.broadcast_to(jnp.arange(config.window) <= seen, (*score.shape[:2], config.window))
  visible = jnp.concatenate([score > -jnp.inf, in_window], axis=-1)[:, :, None]
  gate = jnp.concatenate([gate, jnp.ones(in_window.shape)], axis=-1)[:, :, None]
  mixed = _softmax_values(config, query, _join(slots, ring), visible, gate)
  return mixed, cache._replace(ring=ring, slots=slots, score=score, position=position, support=support, pending=line[:, 1:])


def _get(x, index):
  """x [B, G, M, ...] at index [B, G]."""
  b, g = jnp.ogrid[:x.shape[0], :x.shape[1]]
  return x[b, g, index]
