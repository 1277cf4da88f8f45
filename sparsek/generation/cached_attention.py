"""A layer's cache of constant size, and the attention of one new token to it.

`sparsek.generation.cache` describes the algorithm; the attention of several new tokens is in
`sparsek.generation.cached_chunk`.

Row b of the batch has seen `seen[b]` tokens before the new one. Keys and values in the cache are
[B, G, rows, D], those of the new token [B, G, D].
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp

from sparsek.attention.eviction import Kept
from sparsek.attention.operator import sparsek
from sparsek.attention.scoring import ScorerState
from sparsek.config import TransformerConfig
from sparsek.kernels.sentinels import NOWHERE
from sparsek.model.head_groups import join_heads, take_heads
from sparsek.model.scorers import scorer_delay


class KeysAndValues(NamedTuple):
  """Keys and values, [B, G, length, D] each.

  Those of a sliding window are a ring, in which token t has index t % window; those of a full layer
  are all tokens in order.
  """

  key: jax.Array
  value: jax.Array


class SelectionCache(NamedTuple):
  """Cache of a sparsek layer, or of another kind that chooses tokens by scores.

  Attributes:
    rows: keys and values [B, G, k + window, D]: k slots, then the ring of the last `window` tokens.
    score: [B, G, k + window] float32, scores of the tokens in the slots, -inf in an empty slot, and
      0 for the ring, so that score > -inf tells which rows hold a token once the ring is full.
    position: [B, G, k] int32, positions of the tokens in the slots, NOWHERE in an empty slot.
    support: [B, G, support_size] float32, scores of the support beyond the slots, -inf where empty.
    lost: [B, G] int32, number of scores that were dropped because `support` was full; [B, 0] with
      gates that need no thresholds.
    pending: [B, G, window] float32, scores of the tokens in the window, a ring like that of keys.
    scorer: state of the scoring network; a registered one's may be any tree of arrays.
  """

  rows: KeysAndValues
  score: jax.Array
  position: jax.Array
  support: jax.Array
  lost: jax.Array
  pending: jax.Array
  scorer: ScorerState | Any


class GroupedCache(NamedTuple):
  """Cache of a layer whose KV heads have different k or windows.

  Attributes:
    groups: for each of the layer's `head_groups` the cache of a layer of these heads alone, a
      SelectionCache without the state of a scorer, or KeysAndValues.
    scorer: state of the scoring network of all heads; None where no head selects.
  """

  groups: tuple[Any, ...]
  scorer: ScorerState | Any


LayerCache = SelectionCache | KeysAndValues | Kept | GroupedCache


def selects(layer: LayerCache) -> TypeGuard[SelectionCache | GroupedCache]:
  """Returns whether a layer keeps tokens by scores."""
  return any(isinstance(part, SelectionCache) for part in parts_of(layer))


def parts_of(layer: LayerCache) -> tuple[LayerCache, ...]:
  """Returns the caches of a layer's groups of heads; a layer without groups is one."""
  return layer.groups if isinstance(layer, GroupedCache) else (layer,)


def attend_by_groups(
  attend: Callable[..., tuple[jax.Array, LayerCache]],
  kind: str,
  config: TransformerConfig,
  layer: LayerCache,
  query: jax.Array,
  new: KeysAndValues,
  scores: jax.Array | None,
) -> tuple[jax.Array, LayerCache]:
  """Lets each group of heads attend to its own cache.

  Args:
    attend: of a layer, or of heads that are computed as one: takes the other arguments, and returns
      the output of attention, [..., H, D], and the next cache.
    kind, config, layer: of the whole layer.
    query, new, scores: [B, C, H, D], [B, C, G, D] each, and [B, C, G] or None.
  Returns:
    The output of all heads, and the next cache of the layer.
  """
  if not isinstance(layer, GroupedCache):
    return attend(kind, config, layer, query, new, scores)
  groups, parts, caches = config.head_groups, [], []
  for group, cache in zip(groups, layer.groups):
    take = functools.partial(take_heads, heads=group.heads, num_kv_heads=config.num_kv_heads)
    arrays = take(query), map_rows(take, new), None if scores is None else take(scores)
    part, cache = attend(group.kind, group.config, cache, *arrays)
    parts.append(part)
    caches.append(cache)
  return join_heads(parts, groups, parts[0].ndim - 2), layer._replace(groups=tuple(caches))


def needs_support(gate: str) -> bool:
  """Returns whether gates depend on thresholds in the forward pass."""
  return gate != "straight_through"


def attend_token(
  kind: str,
  config: TransformerConfig,
  cache: KeysAndValues | SelectionCache,
  seen: jax.Array,
  active: jax.Array,
  query: jax.Array,
  new: KeysAndValues,
  scores: jax.Array | None,
) -> tuple[jax.Array, KeysAndValues | SelectionCache]:
  """Attends from one new token a row.

  Args:
    kind: of the layer: "sparsek", "sliding_window" or "full".
    config: with the k and window of the layer.
    cache: of the layer.
    seen: [B], tokens before the new one.
    active: [B] bool; the cache of other rows stays as it is.
    query: [B, H, D].
    new: key and value of the new token, [B, G, D].
    scores: [B, G], those that have just become final in a sparsek layer.
  Returns:
    The output of attention, [B, H, D], and the next cache of the layer.
  """
  if isinstance(cache, SelectionCache):
    return _select_token(config, cache, seen, active, query, new, scores)
  attend = _full_token if kind == "full" else _window_token
  return attend(config, cache, seen, active, query, new)


def map_rows(function: Callable[[jax.Array], jax.Array], rows: KeysAndValues) -> KeysAndValues:
  """Applies a function to keys and to values."""
  return KeysAndValues(function(rows.key), function(rows.value))


def float32_product(dtype: jnp.dtype) -> Callable[..., jax.Array]:
  """Returns an einsum with float32 sums, and exact products where the inputs are float32."""
  precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
  return functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision)


def _attend(config, query_BxHxD, rows, visible, gate=None):
  """Attends from one query of each row of the batch to the visible rows of the cache.

  Args:
    rows: keys and values [B, G, M, D].
    visible: [B, 1 or G, M] bool.
    gate: [B, 1 or G, M], or None where all gates are 1.
  """
  batch, heads, head_dim = query_BxHxD.shape
  product = float32_product(query_BxHxD.dtype)
  query_BxGxRxD = query_BxHxD.reshape(batch, config.num_kv_heads, -1, head_dim)
  logits = product("bgrd,bgmd->bgrm", query_BxGxRxD, rows.key) * head_dim**-0.5
  if gate is not None and config.gate == "key_value":
    logits *= gate[:, :, None]
  weights = jax.nn.softmax(jnp.where(visible[:, :, None], logits, -jnp.inf), axis=-1)
  if gate is not None:
    weights *= jnp.where(visible, gate, 0)[:, :, None]
  mixed = product("bgrm,bgmd->bgrd", weights.astype(rows.value.dtype), rows.value)
  return mixed.reshape(batch, heads, head_dim).astype(query_BxHxD.dtype)


def _get(rows, index):
  """Returns rows [B, G, M, D] at index [B, G or 1]: [B, G, D] each."""
  return map_rows(
    lambda x: jnp.take_along_axis(x, index[..., None, None], axis=2, mode="clip")[:, :, 0], rows
  )


def _put(rows, index, new):
  """Returns rows [B, G, M, D] with new [B, G, I, D] at indices [B, G, I].

  The indices of a head must be distinct and in range. Rows that are donated are updated in place.
  To keep a row, write its present contents to it: leaving the update out would cost copies.
  """
  b, g = jnp.ogrid[: index.shape[0], : index.shape[1]]
  put = lambda x, y: x.at[b[..., None], g[..., None], index].set(
    y, mode="promise_in_bounds", unique_indices=True
  )
  return KeysAndValues(put(rows.key, new.key), put(rows.value, new.value))


def _choose(condition, new, old):
  """Returns new where the condition [B, G or 1] holds, else old; [B, G, D] each."""
  choose = lambda x, y: jnp.where(condition[..., None], x, y)
  return KeysAndValues(choose(new.key, old.key), choose(new.value, old.value))


def _append(rows, index, new, active):
  """Returns rows with new [B, G, D] at index [B] of all heads, in active rows of the batch."""
  index = index[:, None]
  new = _choose(active[:, None], new, _get(rows, index))
  indices = jnp.broadcast_to(index, new.key.shape[:2])[..., None]
  return _put(rows, indices, map_rows(lambda x: x[:, :, None], new))


def _full_token(config, rows, seen, active, query, new):
  capacity = rows.key.shape[2]
  rows = _append(rows, jnp.minimum(seen, capacity - 1), new, active & (seen < capacity))
  mixed = _attend(config, query, rows, (jnp.arange(capacity) <= seen[:, None])[:, None])
  # NaN beyond max_length, so that the mistake is seen
  return jnp.where((seen < capacity)[:, None, None], mixed, jnp.nan), rows


def _window_token(config, ring, seen, active, query, new):
  ring = _append(ring, seen % config.window, new, active)
  return _attend(config, query, ring, (jnp.arange(config.window) <= seen[:, None])[:, None]), ring


def _worst(score, position):
  """Returns (score, index) [B, G] of the slot to give up first.

  It is the one of the lowest score and, among equal scores, of the latest position.
  """

  def worse(a, b):
    first = (a[0] < b[0]) | ((a[0] == b[0]) & ((a[1] > b[1]) | ((a[1] == b[1]) & (a[2] < b[2]))))
    return tuple(jnp.where(first, x, y) for x, y in zip(a, b))

  index = jnp.broadcast_to(jnp.arange(score.shape[-1], dtype=jnp.int32), score.shape)
  start = jnp.float32(jnp.inf), jnp.int32(-1), jnp.int32(NOWHERE)
  score, _, index = jax.lax.reduce((score, position, index), start, worse, (2,))
  return score, index


def _select_token(config, cache, seen, active, query, new, scores):
  """Attends from one query of a sparsek layer: O(k + window + support) work."""
  k, window, delay = config.k, config.window, scorer_delay(config)
  rows, pending, arriving = cache.rows, cache.pending, scores
  ring_index = (k + seen % max(window, 1))[:, None]
  if window:
    if delay < window:  # else the score of the leaving token has just become final
      arriving = jnp.take_along_axis(pending, (seen % window)[:, None, None], axis=2)[..., 0]
    final = (jnp.arange(window) == ((seen - delay) % window)[:, None])[:, None] & active[
      :, None, None
    ]
    pending = jnp.where(final, scores[..., None], pending)
    leaving = _get(rows, ring_index)
  else:
    leaving = new
  arriving = jnp.where((active & (seen >= window))[:, None], arriving, -jnp.inf)  # [B, G]
  worst_score, worst = _worst(cache.score[..., :k], cache.position)
  enters = arriving > worst_score
  # One update of the rows: the token that leaves the window goes into its slot, the new token into
  # the ring.
  index, written = [worst], [_choose(enters, leaving, _get(rows, worst))]
  if window:
    index.append(jnp.broadcast_to(ring_index, worst.shape))
    written.append(_choose(active[:, None], new, leaving))
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
  support, dropped, gates = _add_to_support(cache.support, score, loser, k)
  gate = jnp.concatenate([gates[..., :k], jnp.ones((*enters.shape, window))], axis=-1)
  return _attend(config, query, rows, visible, gate), cache._replace(
    support=support, lost=cache.lost + (dropped > -jnp.inf)
  )


def _add_to_support(support, score, loser, k):
  """Adds a score that has no slot to the support of the scores beyond the slots.

  Args:
    support: [B, G, support_size].
    score: [B, G, k + window], those of the slots first.
    loser: [B, G], the score to be added.
    k: of the layer.
  Returns:
    (the next support; the score [B, G] that it has no room for, -inf where there is none; the gates
    [B, G, k + support_size + 1] of all scores).
  """
  beyond = jnp.concatenate([support, loser[..., None]], axis=-1)
  gates = sparsek(jnp.concatenate([score[..., :k], beyond], axis=-1), k)
  beyond = jnp.where(gates[..., k:] > 0, beyond, -jnp.inf)
  support, loser = beyond[..., :-1], beyond[..., -1]
  if support.shape[-1]:
    least = jnp.argmin(support, axis=-1)[..., None]
    lowest = jnp.take_along_axis(support, least, axis=-1)[..., 0]
    support = jnp.where(
      jnp.arange(support.shape[-1]) == least, jnp.maximum(loser, lowest)[..., None], support
    )
    loser = jnp.minimum(loser, lowest)
  return support, loser, gates
