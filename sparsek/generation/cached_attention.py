"""Attention of new queries to a layer's cache of constant size, and what the cache keeps
afterwards; see sparsek/generation/cache.py.

Row b has `seen[b]` tokens before the new ones. Keys and values lie in the cache as [B, G, rows, D];
those of C new tokens, of which the first count[b] exist, are [B, C, G, D] as in the model, and of
one new token [B, G, D].

A chunk goes through the attention of the parallel forward, on what the cache holds with the chunk
behind it:

  slots, by position (k) | scores of the support (their keys do not matter) | ring, by position
  (window) | new tokens (C)

A slot is a candidate for every new query, and the tokens of the ring and the chunk become
candidates as they leave the window, just as among all tokens. Before `window` tokens have been
seen, the front of this sequence does not exist, and holds no candidate: it is moved to the end,
where no query sees it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsek.attention.api import resolve_window, sliding_window_attention, sparsek_attention
from sparsek.attention.operator import sparsek
from sparsek.attention.scoring import ScorerState
from sparsek.kernels.sentinels import NOWHERE
from sparsek.model.layers import window_implementation

LOGITS = 2**22  # of a head, at once, of a chunk in a full layer


class KeysAndValues(NamedTuple):
  """[B, G, length, D] each: a ring (token t lies at t % window) or, for a full layer, all tokens in
  order.
  """

  key: jax.Array
  value: jax.Array


class SelectionCache(NamedTuple):
  """State of a sparsek layer.

  Attributes:
    rows: keys and values [B, G, k + window, D]: k slots, then the ring of the last `window` tokens.
    score: [B, G, k + window] float32, of the tokens in the slots, -inf where empty; 0 for the ring,
      so that it says of all rows which there are.
    position: [B, G, k] int32 of the tokens in the slots; NOWHERE where empty.
    support: [B, G, support_size] float32 scores of the support beyond the slots, -inf where empty.
    lost: [B, G] int32, scores that were dropped for want of room in `support`; [B, 0] with gates
      that need no thresholds.
    pending: [B, G, window] scores of the tokens in the window, a ring like that of the keys.
    scorer: state of the scoring network.
  """

  rows: KeysAndValues
  score: jax.Array
  position: jax.Array
  support: jax.Array
  lost: jax.Array
  pending: jax.Array
  scorer: ScorerState


def needs_support(gate: str) -> bool:
  """Whether gates depend on thresholds in the forward pass."""
  return gate != "straight_through"


def _each(function, rows):
  return KeysAndValues(*map(function, rows))


def _take_rows(x, index):
  """x [B, N, ...] at index [B, M]."""
  return jax.vmap(lambda row, i: jnp.take(row, i, axis=0))(x, index)


def _tokens_first(x):
  """[B, G, M, ...] -> [B, M, G, ...], and back."""
  return jnp.swapaxes(x, 1, 2)


# One new token.


def _attend(config, query_BxHxD, rows, visible, gate=None):
  """Attention of one query to rows [B, G, M, D] under visible and gate [B, 1 or G, M]; gate is None
  where all gates are 1.
  """
  batch, heads, head_dim = query_BxHxD.shape
  precision = jax.lax.Precision.HIGHEST if query_BxHxD.dtype == jnp.float32 else None
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision)
  logits = (
    product(
      "bgrd,bgmd->bgrm", query_BxHxD.reshape(batch, config.num_kv_heads, -1, head_dim), rows.key
    )
    * head_dim**-0.5
  )
  if gate is not None and config.gate == "key_value":
    logits *= gate[:, :, None]
  weights = jax.nn.softmax(jnp.where(visible[:, :, None], logits, -jnp.inf), axis=-1)
  if gate is not None:
    weights *= jnp.where(visible, gate, 0)[:, :, None]
  mixed = product("bgrm,bgmd->bgrd", weights.astype(rows.value.dtype), rows.value)
  return mixed.reshape(batch, heads, head_dim).astype(query_BxHxD.dtype)


def _get(rows, index):
  """rows [B, G, M, D] at index [B, G or 1]: [B, G, D] each."""
  return _each(
    lambda x: jnp.take_along_axis(x, index[..., None, None], axis=2, mode="clip")[:, :, 0], rows
  )


def _put(rows, index, new):
  """rows [B, G, M, D] with new [B, G, I, D] at index [B, G, I], different and in range.

  In place where the rows are donated: places that shall stay as they are get what they hold, since
  an update that is left out costs copies.
  """
  b, g = jnp.ogrid[: index.shape[0], : index.shape[1]]
  return KeysAndValues(
    *(
      x.at[b[..., None], g[..., None], index].set(y, mode="promise_in_bounds", unique_indices=True)
      for x, y in zip(rows, new)
    )
  )


def _choose(condition, new, old):
  """new where the condition [B, G or 1] holds, else old; [B, G, D] each."""
  return KeysAndValues(*(jnp.where(condition[..., None], x, y) for x, y in zip(new, old)))


def _append(rows, place, new, active):
  """rows with new [B, G, D] at place [B] of every head, where active."""
  place = place[:, None]
  new = _choose(active[:, None], new, _get(rows, place))
  return _put(
    rows, jnp.broadcast_to(place, new.key.shape[:2])[..., None], _each(lambda x: x[:, :, None], new)
  )


def full_token(config, rows, seen, active, query, new):
  capacity = rows.key.shape[2]
  rows = _append(rows, jnp.minimum(seen, capacity - 1), new, active & (seen < capacity))
  mixed = _attend(config, query, rows, (jnp.arange(capacity) <= seen[:, None])[:, None])
  return jnp.where(
    (seen < capacity)[:, None, None], mixed, jnp.nan
  ), rows  # beyond max_length: loud, not wrong


def window_token(config, ring, seen, active, query, new):
  ring = _append(ring, seen % config.window, new, active)
  return _attend(config, query, ring, (jnp.arange(config.window) <= seen[:, None])[:, None]), ring


def _worst(score, position):
  """(score, index) [B, G] of the slot to give up first: the lowest score, of equals the latest
  position.
  """

  def worse(a, b):
    first = (a[0] < b[0]) | ((a[0] == b[0]) & ((a[1] > b[1]) | ((a[1] == b[1]) & (a[2] < b[2]))))
    return tuple(jnp.where(first, x, y) for x, y in zip(a, b))

  index = jnp.broadcast_to(jnp.arange(score.shape[-1], dtype=jnp.int32), score.shape)
  start = jnp.float32(jnp.inf), jnp.int32(-1), jnp.int32(NOWHERE)
  score, _, index = jax.lax.reduce((score, position, index), start, worse, (2,))
  return score, index


def select_token(config, cache, seen, active, query, new, scores):
  """Sparsek attention of one query: O(k + window + support) work. scores [B, G] have just become
  final.
  """
  k, window, delay = config.k, config.window, cache.scorer.linear.shape[1]
  rows, pending, arriving = cache.rows, cache.pending, scores
  place = (k + seen % max(window, 1))[:, None]
  if window:
    if delay < window:  # else the score of what leaves has become final just now
      arriving = jnp.take_along_axis(pending, (seen % window)[:, None, None], axis=2)[..., 0]
    final = (jnp.arange(window) == ((seen - delay) % window)[:, None])[:, None] & active[
      :, None, None
    ]
    pending = jnp.where(final, scores[..., None], pending)
    leaving = _get(rows, place)
  else:
    leaving = new
  arriving = jnp.where((active & (seen >= window))[:, None], arriving, -jnp.inf)  # [B, G]
  worst_score, worst = _worst(cache.score[..., :k], cache.position)
  enters = arriving > worst_score
  # What leaves the window goes into its slot and the new token into the ring: one update of the
  # rows.
  batch, groups = enters.shape
  index, written = [worst], [_choose(enters, leaving, _get(rows, worst))]
  if window:
    index, written = (
      [worst, jnp.broadcast_to(place, worst.shape)],
      [*written, _choose(active[:, None], new, leaving)],
    )
  rows = _put(
    rows,
    jnp.stack(index, axis=2),
    KeysAndValues(*(jnp.stack(pair, axis=2) for pair in zip(*written))),
  )
  taken = (jnp.arange(k + window) == worst[..., None]) & enters[..., None]
  score = jnp.where(taken, arriving[..., None], cache.score)
  position = jnp.where(taken[..., :k], (seen - window)[:, None, None], cache.position)
  cache = cache._replace(rows=rows, score=score, position=position, pending=pending)
  visible = (score > -jnp.inf) & (jnp.arange(k + window) <= k + seen[:, None])[:, None]
  if not needs_support(config.gate):
    return _attend(config, query, rows, visible), cache

  loser = jnp.where(enters, worst_score, arriving)
  beyond = jnp.concatenate([cache.support, loser[..., None]], axis=-1)
  gates = sparsek(jnp.concatenate([score[..., :k], beyond], axis=-1), k)
  beyond = jnp.where(gates[..., k:] > 0, beyond, -jnp.inf)
  support, loser = beyond[..., :-1], beyond[..., -1]
  if support.shape[-1]:
    least = jnp.argmin(support, axis=-1)[..., None]
    room = jnp.take_along_axis(support, least, axis=-1)[..., 0]
    support = jnp.where(
      jnp.arange(support.shape[-1]) == least, jnp.maximum(loser, room)[..., None], support
    )
    loser = jnp.minimum(loser, room)
  gate = jnp.concatenate([gates[..., :k], jnp.ones((batch, groups, window))], axis=-1)
  return _attend(config, query, rows, visible, gate), cache._replace(
    support=support, lost=cache.lost + (loser > -jnp.inf)
  )


# A chunk of new tokens. `fresh` is for rows that have seen nothing: the chunk is all there is.


def _continue(attend, prefix, chunk, missing, fresh):
  """attend(*arrays) on what precedes and the chunk together: the outputs of the chunk.

  Args:
    prefix, chunk: tuples of arrays [B, P, ...] and [B, C, ...].
    missing: [B], how many of the first places of the prefix do not exist.
  """
  length = prefix[0].shape[1]
  if fresh or not length:
    return attend(*chunk)
  joined = [jnp.concatenate(pair, axis=1) for pair in zip(prefix, chunk)]
  n, missing = joined[0].shape[1], missing[:, None]
  out = attend(*(_take_rows(x, (jnp.arange(n) + missing) % n) for x in joined))
  return _take_rows(out, jnp.arange(n - length) + length - missing)


def _next_ring(window, seen, count):
  """[B, window]: which of the ring in order and the chunk behind it lies at each place of the next
  ring.
  """
  return count[:, None] + (jnp.arange(window) - (seen + count)[:, None]) % window


def _in_order(ring, seen):
  """[B, G, window, ...] -> [B, window, G, ...], the earliest first."""
  window = ring.shape[2]
  return (
    _take_rows(_tokens_first(ring), (seen[:, None] + jnp.arange(window)) % window)
    if window
    else _tokens_first(ring)
  )


def window_chunk(config, ring, seen, count, query, new, fresh):
  before, window = _each(lambda x: _in_order(x, seen), ring), config.window
  attend = functools.partial(
    sliding_window_attention, window=window, implementation=window_implementation(config)
  )
  nothing = jnp.zeros((query.shape[0], window, *query.shape[2:]), query.dtype)
  mixed = _continue(attend, (nothing, *before), (query, *new), jnp.maximum(window - seen, 0), fresh)
  at = _next_ring(window, seen, count)
  return mixed, KeysAndValues(
    *(_tokens_first(_take_rows(jnp.concatenate(pair, axis=1), at)) for pair in zip(before, new))
  )


def full_chunk(config, rows, seen, count, query, new, fresh):
  batch, length, heads, head_dim = query.shape
  capacity = rows.key.shape[2]
  position = seen[:, None] + jnp.arange(length)
  exists = jnp.arange(length) < count[:, None]
  b, place = jnp.arange(batch)[:, None], jnp.where(exists, position, capacity)
  rows = KeysAndValues(*(x.at[b, :, place].set(y, mode="drop") for x, y in zip(rows, new)))
  if fresh:
    implementation = resolve_window(window_implementation(config), query, None)
    if implementation == "xla":
      mixed = jax.nn.dot_product_attention(query, *new, is_causal=True)
    else:
      mixed = sliding_window_attention(query, *new, window=length, implementation=implementation)
  else:
    mixed = _attend_to_all(config, query, rows, position)
  return jnp.where(
    (exists & (position >= capacity))[..., None, None], jnp.nan, mixed
  ), rows  # beyond max_length: loud, not wrong


def _attend_to_all(config, query, rows, position):
  """Causal attention of queries [B, C, H, D] at position [B, C] to rows [B, G, L, D], by blocks of
  rows up to the last that any query sees.
  """
  batch, length, heads, head_dim = query.shape
  groups, capacity = rows.key.shape[1:3]
  block = max(1, min(capacity, LOGITS // length))
  precision = jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision)
  query = jnp.moveaxis(query.reshape(batch, length, groups, -1, head_dim), 1, 3)  # [B, G, R, C, D]

  def step(i, state):
    top, total, mixed = state
    # the last block reaches back into the one before it
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
  return (
    jnp.moveaxis(mixed / total, 3, 1)
    .reshape(batch, length, heads, head_dim)
    .astype(rows.value.dtype)
  )


def select_chunk(config, cache, seen, count, query, new, scores, fresh):
  """Sparsek attention of a chunk; scores [B, C, G] have just become final."""
  k, window, length, extra = config.k, config.window, query.shape[1], cache.support.shape[-1]
  batch, groups, delay = query.shape[0], config.num_kv_heads, cache.scorer.linear.shape[1]
  never = lambda size: jnp.full((batch, size, groups), -jnp.inf)
  # Scores of the ring and of the new tokens; those of the last `delay` are not known yet, nor
  # needed.
  near = jnp.concatenate(
    [_in_order(cache.pending, seen)[:, : window - delay], scores, never(delay)], axis=1
  )
  place = jnp.arange(window + length)
  near = jnp.where((seen[:, None] + place >= window)[..., None], near, -jnp.inf)

  order = jnp.argsort(cache.position, axis=-1)
  # a slot is one of the first k
  slot_score, slot_position = (
    jnp.take_along_axis(x, order, axis=-1) for x in (cache.score, cache.position)
  )
  slots = _each(lambda x: jnp.take_along_axis(x, order[..., None], axis=2), cache.rows)
  none = jnp.zeros((batch, extra, groups, config.head_dim), query.dtype)
  before = [
    jnp.concatenate([_tokens_first(x), none, _in_order(y[:, :, k:], seen)], axis=1)
    for x, y in zip(slots, cache.rows)
  ]
  before_scores = jnp.concatenate(
    [_tokens_first(slot_score), _tokens_first(cache.support), near[:, :window]], axis=1
  )
  prefix = k + extra + window
  nothing = jnp.zeros((batch, prefix, *query.shape[2:]), query.dtype)
  attend = functools.partial(
    sparsek_attention, k=k, window=window, gate=config.gate, implementation=config.implementation
  )
  missing = jnp.where(seen < window, prefix - seen, 0)
  mixed = _continue(
    attend, (nothing, *before, before_scores), (query, *new, near[:, window:]), missing, fresh
  )

  # Candidates at the end: the slots, and what has left the window, the first `count` of ring and
  # chunk. Of equal scores the earlier wins: it stands first.
  left = jnp.where(
    (jnp.arange(length) < count[:, None])[..., None] & ~jnp.isnan(near[:, :length]),
    near[:, :length],
    -jnp.inf,
  )
  candidates = jnp.concatenate([slot_score, _tokens_first(left)], axis=-1)  # [B, G, k + C]
  score, chosen = jax.lax.top_k(candidates, k)
  arrival = jnp.broadcast_to(
    (seen[:, None] - window + jnp.arange(length))[:, None], (batch, groups, length)
  )
  position = jnp.take_along_axis(
    jnp.concatenate([slot_position, arrival], axis=-1), chosen, axis=-1
  )
  at = _tokens_first(jnp.where(chosen < k, chosen, chosen + extra))[..., None]
  ring = _next_ring(window, seen, count) if window else jnp.zeros((batch, 0), jnp.int32)

  def keep(before, new):
    every = jnp.concatenate([before, new], axis=1)
    return _tokens_first(
      jnp.concatenate(
        [jnp.take_along_axis(every, at, axis=1), _take_rows(every, k + extra + ring)], axis=1
      )
    )

  cache = cache._replace(
    rows=KeysAndValues(*map(keep, before, new)),
    score=jnp.pad(score, ((0, 0), (0, 0), (0, window))),
    position=jnp.where(score > -jnp.inf, position, NOWHERE),
    pending=_tokens_first(_take_rows(near, ring)),
  )
  if needs_support(config.gate):
    b, g = jnp.ogrid[:batch, :groups]
    # candidates that have no slot
    beyond = candidates.at[b[..., None], g[..., None], chosen].set(-jnp.inf)
    beyond = jnp.concatenate([cache.support, beyond], axis=-1)
    alive = sparsek(jnp.concatenate([score, beyond], axis=-1), k)[..., k:] > 0
    beyond = jnp.where(alive, beyond, -jnp.inf)
    lost = jnp.maximum(jnp.sum(alive, axis=-1, dtype=jnp.int32) - extra, 0)
    cache = cache._replace(support=jax.lax.top_k(beyond, extra)[0], lost=cache.lost + lost)
  return mixed, cache
