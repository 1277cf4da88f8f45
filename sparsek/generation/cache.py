"""Generation with memory and time per token that do not depend on the length so far.

A sparsek layer keeps, per KV head, a ring of the last `window` keys and values, k slots (key,
value, score, position) for the selected tokens, and, for gates that need thresholds, the scores,
not the keys, of the rest of the SPARSEK support. A token that leaves the window takes the slot of
the worst selected token if it scores strictly higher; a score at or below the threshold is
forgotten, since thresholds never decrease. Logits equal those of `Transformer` at every position.
Keys are kept after their rotation.

Rows advance by themselves: each has seen its own number of tokens, and what a row gets does not
depend on the others.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsek.config import TransformerConfig, check_at_least, parse_term
from sparsek.generation import cached_attention, cached_kernels, inference
from sparsek.generation.cached_attention import (
  NOWHERE,
  KeysAndValues,
  SelectionCache,
  needs_support,
)
from sparsek.generation.inference import InferenceParams, inference_params
from sparsek.model.baselines import BASELINES
from sparsek.model.layers import scoring_network
from sparsek.model.transformer import Params

GROWTH = 128  # rows of full layers grow by so many at once; the decode kernels take multiples of it
UNCLIPPED = 2**14  # k and windows up to here are never clipped to the length of texts
SMALLEST = (
  16  # chunks are padded to powers of two from here on, so that few sizes are ever compiled
)


class Cache(NamedTuple):
  """seen: [B] int32, tokens so far; layers: per layer a SelectionCache (sparsek) or KeysAndValues
  (sliding_window, full).
  """

  seen: jax.Array
  layers: tuple[SelectionCache | KeysAndValues, ...]


def init_cache(
  config: TransformerConfig,
  batch_size: int,
  *,
  max_length: int | None = None,
  support_size: int | None = None,
) -> Cache:
  """The empty cache.

  Args:
    config: of the model; its k and window, of every layer, fix the size.
    batch_size: rows that are fed together.
    max_length: tokens that full layers can hold; needed, and used, by them only. Logits beyond it
      are NaN.
    support_size: scores kept per head beyond the k slots; default 8 k + 64. Supports that are
      larger (nearly equal scores) lose their lowest members, which makes the threshold slightly low
      and gates slightly high; `lost_scores` counts them. Gates that need no thresholds keep none.
  Raises:
    ValueError: for sizes below 1 (support_size below 0), max_length=None where a layer is full, or
      a layer that is a baseline.
  """
  check_at_least("batch_size", batch_size, 1)
  if support_size is not None:
    check_at_least("support_size", support_size, 0)
  for kind in config.layer_kinds:
    if kind in BASELINES:
      raise ValueError(
        f"attention={kind!r}: there is no cache for baselines; sparsek, sliding_window "
        "and full layers have one"
      )
  if "full" in config.layer_kinds:
    if max_length is None:
      raise ValueError(
        "max_length=None: a model with full attention layers keeps every token, so "
        "init_cache needs max_length >= 1"
      )
    check_at_least("max_length", max_length, 1)
  return _empty(config, batch_size, max_length, support_size)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(config, batch_size, max_length, support_size):
  heads = (batch_size, config.num_kv_heads)
  rows = lambda length: KeysAndValues(
    *(jnp.zeros((*heads, length, config.head_dim), config.activation_dtype) for _ in range(2))
  )
  never = lambda size: jnp.full((*heads, size), -jnp.inf)

  def layer(kind, k, window):
    if kind != "sparsek":
      return rows(window if kind == "sliding_window" else max_length)
    lost = jnp.zeros(heads if needs_support(config.gate) else (batch_size, 0), jnp.int32)
    score = jnp.concatenate([never(k), jnp.zeros((*heads, window))], axis=-1)
    support = never(
      _support(config.gate, k)
      if support_size is None or not needs_support(config.gate)
      else support_size
    )
    return SelectionCache(
      rows(k + window),
      score,
      jnp.full((*heads, k), NOWHERE),
      support,
      lost,
      jnp.zeros((*heads, window)),
      scoring_network(config).initial_state(batch_size),
    )

  return Cache(
    jnp.zeros(batch_size, jnp.int32),
    tuple(
      layer(kind, own.k, own.window) for kind, own in zip(config.layer_kinds, config.layer_configs)
    ),
  )


def _support(gate, k):
  """Scores kept per head beyond the k slots, unless told."""
  return 8 * k + 64 if needs_support(gate) else 0


def with_room(config: TransformerConfig, cache: Cache, max_length: int) -> Cache:
  """The cache, whose full layers can hold max_length tokens if they could not: in steps of GROWTH,
  so that few sizes are compiled.
  """

  def widen(kind, layer):
    if kind != "full" or max_length <= layer.key.shape[2]:
      return layer
    missing = -(-max_length // GROWTH) * GROWTH - layer.key.shape[2]
    return KeysAndValues(*(jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))) for x in layer))

  return cache._replace(layers=tuple(map(widen, config.layer_kinds, cache.layers)))


def clip_sizes(config: TransformerConfig, length: int) -> TransformerConfig:
  """Returns a configuration whose cache is no larger than texts of `length` tokens can use.

  Their logits are the same.
  No token leaves a window that holds them all, and no more tokens are selected than there are.
  Sizes up to UNCLIPPED stay, larger ones become powers of two, so that few programs are compiled
  for texts that grow.
  """
  most = max(UNCLIPPED, _padded(length), config.scorer_lookahead)
  terms = []
  for kind, k, window in map(parse_term, config.attention):
    sizes = (
      f":{name}{min(size, most)}" for name, size in (("k", k), ("w", window)) if size is not None
    )
    terms.append("".join([kind, *sizes]))
  return dataclasses.replace(
    config, k=min(config.k, most), window=min(config.window, most), attention=tuple(terms)
  )


def resize(before: TransformerConfig, after: TransformerConfig, cache: Cache) -> Cache:
  """Returns a cache made for `before` as one of `after`, both from `clip_sizes`.

  The cache of `before` must hold all of the texts so far.
  """

  def last(x, size, fill=0):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size)], constant_values=fill)

  def rows_of(x, k, more_k, more_window):
    slots, ring = (jnp.swapaxes(part, 2, 3) for part in (x[:, :, :k], x[:, :, k:]))
    parts = (last(slots, more_k), last(ring, more_window))
    return jnp.concatenate([jnp.swapaxes(part, 2, 3) for part in parts], axis=2)

  def layer(kind, old, new, kept):
    more_k, more_window = new.k - old.k, new.window - old.window
    if kind == "sliding_window":
      return KeysAndValues(*(rows_of(x, 0, 0, more_window) for x in kept))
    if kind != "sparsek":
      return kept
    support = _support(new.gate, new.k) - _support(old.gate, old.k)
    score = jnp.concatenate(
      [
        last(kept.score[..., : old.k], more_k, -jnp.inf),
        last(kept.score[..., old.k :], more_window),
      ],
      axis=-1,
    )
    return kept._replace(
      rows=KeysAndValues(*(rows_of(x, old.k, more_k, more_window) for x in kept.rows)),
      score=score,
      position=last(kept.position, more_k, NOWHERE),
      support=last(kept.support, support, -jnp.inf),
      pending=last(kept.pending, more_window),
    )

  if before == after:
    return cache
  layers = map(layer, before.layer_kinds, before.layer_configs, after.layer_configs, cache.layers)
  return cache._replace(layers=tuple(layers))


def lost_scores(cache: Cache) -> np.ndarray:
  """[B] integers: scores that were above the threshold when they were dropped, over all layers and
  heads, because a support outgrew `support_size`.

  Where it is 0 all gates are exact. It stays 0 with gates that need no thresholds.
  """
  lost = [
    np.asarray(layer.lost, np.int64).sum(axis=1)
    for layer in cache.layers
    if isinstance(layer, SelectionCache)
  ]
  return np.sum(lost, axis=0) if lost else np.zeros(cache.seen.shape, np.int64)


def cache_bytes(cache: Cache) -> int:
  """Memory of a cache, real or of `jax.eval_shape`."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def default_chunk(config: TransformerConfig) -> int:
  """Tokens that `prefill` takes at a time unless told: enough for what precedes a chunk to weigh
  little, and for a GPU to be busy.
  """
  if jax.default_backend() != "cpu":
    return 16384
  return max(
    512,
    _padded(
      2
      * max(
        layer.k + layer.window + _support(config.gate, layer.k) for layer in config.layer_configs
      )
    ),
  )


def _padded(length):
  return max(SMALLEST, 1 << (length - 1).bit_length())


def prefill(
  config: TransformerConfig,
  params: Params | InferenceParams,
  cache: Cache,
  tokens: jax.Array,
  lengths: jax.Array | None = None,
  *,
  last_only: bool = False,
  chunk_size: int | None = None,
  donate: bool = False,
) -> tuple[jax.Array, Cache]:
  """Feeds tokens, in chunks, after those that the cache has seen.

  Args:
    config: of the model.
    params: the model's, or what `inference_params` made of them, which saves the cast.
    cache: from `init_cache`, `prefill` or `decode_step`.
    tokens: [B, m] integers, m >= 1; the rows are one document each. Chunks are padded to powers of
      two: few sizes are ever compiled.
    lengths: [B] integers from 0 to m: row b has only the first lengths[b] of its tokens; what
      follows them is not read. None: all have m.
    last_only: return the logits of each row's last token only; those of a long prompt are large.
    chunk_size: tokens processed at a time; default: `default_chunk`. A cache that has seen nothing
      is cheapest filled in one chunk.
    donate: the cache given is used up, and its memory used again.
  Returns:
    Logits [B, m, vocab_size] float32 ([B, 1, vocab_size] with last_only; NaN in rows without
    tokens), meaningless beyond `lengths`, and the cache after these tokens.
  Raises:
    ValueError: for bad shapes, lengths out of range, or a cache made for another configuration or
      batch.
  """
  if tokens.ndim != 2 or tokens.shape[1] < 1:
    raise ValueError(f"tokens has shape {tokens.shape}, expected [batch, m] with m >= 1")
  if chunk_size is not None:
    check_at_least("chunk_size", chunk_size, 1)
  check_cache(config, cache, tokens)
  batch, length = tokens.shape
  traced = isinstance(lengths, jax.core.Tracer)
  lengths = (
    np.full(batch, length) if lengths is None else lengths if traced else np.asarray(lengths)
  )
  if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
    raise ValueError(
      f"lengths must be integers of shape {(batch,)}, got {lengths.dtype} {lengths.shape}"
    )
  if not traced and not np.all((lengths >= 0) & (lengths <= length)):
    raise ValueError(f"lengths={lengths.tolist()} must be from 0 to {length}, the tokens given")
  params, chunk_size = inference_params(config, params), chunk_size or default_chunk(config)
  fresh = not isinstance(cache.seen, jax.core.Tracer) and not np.any(cache.seen)
  if not isinstance(tokens, jax.core.Tracer):
    tokens = np.asarray(tokens, np.int32)  # cut and padded by NumPy: nothing to compile
  pad = jnp.pad if isinstance(tokens, jax.core.Tracer) else np.pad
  if not donate:
    cache = jax.tree.map(jnp.copy, cache)
  every, last = [], jnp.full((batch, config.vocab_size), jnp.nan)
  for start in range(0, length, chunk_size):
    part = tokens[:, start : start + chunk_size]
    size = min(chunk_size, _padded(part.shape[1]))
    count = (jnp if traced else np).clip(lengths - start, 0, part.shape[1]).astype(np.int32)
    logits, last, cache = _feed(
      config,
      fresh and start == 0,
      last_only,
      params,
      cache,
      pad(part, ((0, 0), (0, size - part.shape[1]))),
      count,
      last,
    )
    every.append(logits)
  return (last[:, None] if last_only else jnp.concatenate(every, axis=1)[:, :length]), cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _feed(config, fresh, last_only, params, cache, tokens, count, last):
  """(logits of a chunk or None, logits of each row's last token so far, the next cache)."""
  hidden_BxCxE, cache = _forward(config, params, cache, tokens, count, fresh)
  if last_only:
    logits, of_last = None, inference.logits(config, params, _at_end(hidden_BxCxE, count))
  else:
    logits = inference.logits(config, params, hidden_BxCxE)
    of_last = _at_end(logits, count)
  return logits, jnp.where(count[:, None] > 0, of_last, last), cache


def _at_end(x_BxCx, count):
  return jnp.take_along_axis(x_BxCx, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]


def decode_step(
  config: TransformerConfig,
  params: Params | InferenceParams,
  cache: Cache,
  token: jax.Array,
  active: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
  """Feeds one token a row, in a time that does not depend on how many came before.

  In a loop, compile it with the cache donated, so that the cache is updated in place, and give it
  `inference_params`:

    step = jax.jit(functools.partial(sparsek.decode_step, config), donate_argnums=1)

  Args:
    config, params, cache: as in `prefill`.
    token: [B] integers.
    active: [B] bool; rows where it is False stay as they are, and their logits mean nothing. None:
      all advance.
  Returns:
    Logits [B, vocab_size] float32 of the token after it, and the next cache.
  Raises:
    ValueError: as `prefill`.
  """
  if token.ndim != 1:
    raise ValueError(f"token has shape {token.shape}, expected [batch]")
  check_cache(config, cache, token)
  if active is not None and (active.shape != token.shape or active.dtype != bool):
    raise ValueError(
      f"active must be booleans of shape {token.shape}, got {active.dtype} {active.shape}"
    )
  active = jnp.ones(token.shape, bool) if active is None else active
  return _decode(config, inference_params(config, params), cache, token, active)


@functools.partial(jax.jit, static_argnums=0)
def _decode(config, params, cache, token, active):
  if cached_kernels.supports(config, params, cache.layers):
    hidden_BxE, layers = cached_kernels.step(
      config, params, cache.layers, cache.seen, token, active
    )
    return inference.logits(config, params, hidden_BxE), Cache(cache.seen + active, layers)
  hidden_Bx1xE, cache = _forward(
    config, params, cache, token[:, None], active.astype(jnp.int32), None
  )
  return inference.logits(config, params, hidden_Bx1xE[:, 0]), cache


def check_cache(config: TransformerConfig, cache: Cache, tokens: jax.Array) -> None:
  """Raises ValueError unless the cache was made for `config` and as many rows as `tokens`, which
  must be integers.
  """
  if not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f"tokens has dtype {tokens.dtype}, expected integers")
  if len(cache.layers) != config.num_layers:
    raise ValueError(
      f"cache has {len(cache.layers)} layers, the configuration num_layers={config.num_layers}"
    )
  delay, soft = scoring_network(config).delay, needs_support(config.gate)
  for i, (kind, own, layer) in enumerate(
    zip(config.layer_kinds, config.layer_configs, cache.layers)
  ):
    if isinstance(layer, SelectionCache) != (kind == "sparsek"):
      raise ValueError(f"cache does not fit the configuration: layer {i} is {kind}")
    got, want = (
      {},
      {
        "batch": tokens.shape[0],
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "dtype": config.dtype,
      },
    )
    rows = layer.rows if kind == "sparsek" else layer
    got["batch"], got["num_kv_heads"], length, got["head_dim"], got["dtype"] = (
      *rows.key.shape,
      str(rows.key.dtype),
    )
    if kind == "sliding_window":
      got["window"], want["window"] = length, own.window
    if kind == "sparsek":
      got |= {
        "k": layer.position.shape[-1],
        "window": layer.pending.shape[-1],
        "lookahead": layer.scorer.linear.shape[1],
        "gates with thresholds": layer.lost.shape[-1] > 0,
      }
      want |= {"k": own.k, "window": own.window, "lookahead": delay, "gates with thresholds": soft}
    if got != want:
      differ = ", ".join(
        f"{name}={got[name]} (needed: {want[name]})" for name in want if got[name] != want[name]
      )
      raise ValueError(f"cache was made for {differ}")


def _forward(config, params, cache, tokens_BxC, count_B, fresh):
  """Tokens, of which each row has the first `count`, through all layers: hidden states before the
  last norm, and the next cache.

  `fresh` is None for a single token a row, which takes the shorter way; else whether every row is
  empty.
  """
  seen, length = cache.seen, tokens_BxC.shape[1]
  # Tokens that do not exist are fed as if at position 0: what is computed for them is never read,
  # but must be finite.
  position_BxC = jnp.where(
    jnp.arange(length) < count_B[:, None], seen[:, None] + jnp.arange(length), 0
  )
  x_BxCxE = inference.embed(config, params, tokens_BxC, position_BxC)
  layers = []
  for i, (kind, own, block, layer) in enumerate(
    zip(config.layer_kinds, config.layer_configs, params.layers, cache.layers)
  ):
    query, key, value, h_BxCxE, logits = inference.project(config, block, x_BxCxE, position_BxC)
    if kind == "sparsek":
      scores, state = scoring_network(config).apply(
        {"params": block.get("scorer", {})},
        x_BxCxE if h_BxCxE is None else h_BxCxE,
        layer.scorer,
        seen,
        i,
        count_B,
        logits,
        method="stream",
      )
      layer = layer._replace(scorer=state)
    if fresh is None:
      inputs = (own, layer, seen, count_B > 0, query[:, 0], KeysAndValues(key[:, 0], value[:, 0]))
      step = {
        "full": cached_attention.full_token,
        "sliding_window": cached_attention.window_token,
        "sparsek": cached_attention.select_token,
      }[kind]
      mixed, layer = step(*inputs, *([scores[:, 0]] if kind == "sparsek" else []))
    else:
      inputs = (own, layer, seen, count_B, query, KeysAndValues(key, value))
      step = {
        "full": cached_attention.full_chunk,
        "sliding_window": cached_attention.window_chunk,
        "sparsek": cached_attention.select_chunk,
      }[kind]
      mixed, layer = step(*inputs, *([scores] if kind == "sparsek" else []), fresh)
    y_BxCxE = inference.dense(block["out"], mixed.reshape(*x_BxCxE.shape[:2], -1), x_BxCxE)
    x_BxCxE = inference.mlp(
      config, block, x_BxCxE if config.parallel_residual else y_BxCxE, y_BxCxE
    )
    layers.append(layer)
  return x_BxCxE, Cache(seen + count_B, tuple(layers))
