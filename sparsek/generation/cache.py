"""Generation with memory and time per token that do not depend on the length so far.

A sparsek layer keeps, per KV head, a ring of the last `window` keys and values, k slots (key,
value, score, position) for the selected tokens, and, for gates that need thresholds, the scores,
not the keys, of the rest of the SPARSEK support. A token that leaves the window takes the slot of
the worst selected token if it scores strictly higher; a score at or below the threshold is
forgotten, since thresholds never decrease. Logits equal those of `Transformer` at every position.
Keys are kept after their rotation.

Each row of the batch has seen its own number of tokens, and its results do not depend on the other
rows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparsek.attention.eviction import RULES, Kept, nothing_kept
from sparsek.attention.scoring import ScorerState
from sparsek.config import (
  HeadGroup,
  TransformerConfig,
  UnboundedCount,
  UnboundedIndex,
  check_config,
  check_number,
  check_type,
)
from sparsek.generation import inference
from sparsek.generation.block import CachedBlocks
from sparsek.generation.cached_attention import (
  GroupedCache,
  KeysAndValues,
  LayerCache,
  SelectionCache,
  needs_support,
  parts_of,
)
from sparsek.generation.inference import InferenceParams, inference_params
from sparsek.generation.rows import PARAMS, ROW, over_rows
from sparsek.kernels import devices
from sparsek.kernels.sentinels import NOWHERE
from sparsek.model.baselines import BASELINES
from sparsek.model.scorers import SCORER_FACTORIES, scorer_delay, scoring_network
from sparsek.model.transformer import Params, check_ids

SCORED = ("sparsek", "kvzap", "random", "random_sink", "attention_sinks")  # by a SelectionCache
CACHED = (*SCORED, *RULES, "sliding_window", "full")  # the kinds that have a cache
MIN_CHUNK = 16  # chunks are padded to a power of two of at least this size


class Cache(NamedTuple):
  """State of generation for the rows of a batch.

  Attributes:
    seen: [B] int32, tokens so far.
    layers: for each layer a SelectionCache (of kinds in SCORED), Kept (tova, h2o, snapkv),
      KeysAndValues (sliding_window, full), or the GroupedCache of heads with different k or window.
  """

  seen: jax.Array
  layers: tuple[LayerCache, ...]


def init_cache(
  config: TransformerConfig,
  batch_size: int,
  *,
  max_length: int | None = None,
  support_size: int | None = None,
) -> Cache:
  """Returns an empty cache.

  Args:
    config: of the model; the k and window of its layers determine the size.
    batch_size: rows that are fed together.
    max_length: tokens that full layers can hold; only they need and use it. Logits beyond it are
      NaN.
    support_size: scores kept per head beyond the k slots; 8 k + 64 by default. A support that is
      larger (nearly equal scores) loses its lowest scores, which makes the threshold slightly low
      and gates slightly high; `lost_scores` counts them. Gates that need no thresholds keep none.
  Raises:
    ValueError: for sizes below 1 (support_size below 0), max_length=None where a layer is full, or
      a layer of a baseline that has no cache.
    NotImplementedError: for a registered kind of attention, or a registered scorer that cannot
      stream.
  """
  check_config(config)
  batch_size = check_number("batch_size", batch_size, UnboundedCount)
  if support_size is not None:
    support_size = check_number("support_size", support_size, UnboundedIndex)
  for kind in config.layer_kinds:
    if kind in BASELINES and kind not in CACHED:
      raise ValueError(
        f"attention={kind!r}: there is no cache for this baseline; {', '.join(CACHED)} layers have "
        "one"
      )
    if kind not in CACHED:
      raise NotImplementedError(
        f"attention={kind!r} is registered, and only {', '.join(CACHED)} layers have a cache for "
        "generation"
      )
  if config.has_scorers:
    _check_streams(config)
  if "full" in config.layer_kinds:
    if max_length is None:
      raise ValueError(
        "max_length=None: a model with full attention layers keeps every token, so "
        "init_cache needs max_length >= 1"
      )
    max_length = check_number("max_length", max_length, UnboundedCount)
  return _empty(config, batch_size, max_length, support_size)


def _check_streams(config):
  """Raises NotImplementedError for a scorer that scores whole rows only."""
  network = scoring_network(config)
  missing = [name for name in ("stream", "initial_state") if not hasattr(network, name)]
  if missing:
    raise NotImplementedError(
      f"scorer={config.scorer!r} has no method {' and no '.join(missing)}, which generation needs: "
      "see sparsek.model.registration"
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(config, batch_size, max_length, support_size):
  def of_heads(kind, of, scorer):
    k, window, heads = of.k, of.window, (batch_size, of.num_kv_heads)
    zeros = lambda length: jnp.zeros((*heads, length, config.head_dim), config.activation_dtype)
    rows = lambda length: KeysAndValues(zeros(length), zeros(length))
    never = lambda size: jnp.full((*heads, size), -jnp.inf)
    if kind in RULES:
      rows_kept = (config.head_dim, config.activation_dtype)
      return nothing_kept(*heads, k, window, rows_kept, rows_kept)
    if kind not in SCORED:
      return rows(window if kind == "sliding_window" else max_length)
    lost = jnp.zeros(heads if needs_support(of.gate) else (batch_size, 0), jnp.int32)
    score = jnp.concatenate([never(k), jnp.zeros((*heads, window))], axis=-1)
    is_default = support_size is None or not needs_support(of.gate)
    support = never(default_support_size(of.gate, k) if is_default else support_size)
    return SelectionCache(
      rows(k + window),
      score,
      jnp.full((*heads, k), NOWHERE),
      support,
      lost,
      jnp.zeros((*heads, window)),
      scorer,
    )

  def layer(kind, of):
    scorer = scoring_network(of).initial_state(batch_size) if kind in SCORED else None
    if len(of.head_groups) == 1:
      return of_heads(kind, of, scorer)
    groups = tuple(of_heads(group.kind, group.config, None) for group in of.head_groups)
    return GroupedCache(groups, scorer)

  layers = map(layer, config.layer_kinds, config.layer_configs)
  return Cache(jnp.zeros(batch_size, jnp.int32), tuple(layers))


def default_support_size(gate: str, k: int) -> int:
  """Returns how many scores are kept per head beyond the k slots by default."""
  return 8 * k + 64 if needs_support(gate) else 0


def lost_scores(cache: Cache) -> np.ndarray:
  """Returns how many scores were dropped because a support outgrew `support_size`, [B] integers.

  It counts scores above the threshold, over all layers and heads. All gates are exact where it is
  0. It stays 0 with gates that need no thresholds.
  """
  check_type("cache", cache, Cache, "a cache, such as init_cache returns")
  lost = [
    np.asarray(part.lost, np.int64).sum(axis=1)
    for layer in cache.layers
    for part in parts_of(layer)
    if isinstance(part, SelectionCache)
  ]
  return np.sum(lost, axis=0) if lost else np.zeros(cache.seen.shape, np.int64)


def cache_bytes(cache: Cache | LayerCache) -> int:
  """Returns the memory of a cache, or of a part of it, real or from `jax.eval_shape`."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def default_chunk(config: TransformerConfig) -> int:
  """Returns the number of tokens that `prefill` takes at a time by default.

  It is so large that the work for the cached rows before a chunk is small beside that for the
  chunk, and that a GPU is busy.
  """
  if jax.default_backend() != "cpu":
    return 16384
  groups = (group.config for layer in config.layer_configs for group in layer.head_groups)
  rows = (of.k + of.window + default_support_size(of.gate, of.k) for of in groups)
  return max(512, pad_length(2 * max(rows)))


def pad_length(length: int) -> int:
  """Returns the next power of two, at least MIN_CHUNK, so that few sizes are ever compiled."""
  return max(MIN_CHUNK, 1 << (length - 1).bit_length())


def prefill(
  config: TransformerConfig,
  params: Params | InferenceParams,
  cache: Cache,
  tokens: jax.Array | np.ndarray,
  lengths: jax.Array | np.ndarray | None = None,
  *,
  last_only: bool = False,
  chunk_size: int | None = None,
  donate: bool = False,
  mesh: Mesh | None = None,
) -> tuple[jax.Array, Cache]:
  """Feeds tokens, in chunks, after those that the cache has seen.

  Args:
    config: of the model.
    params: the model's, or those of `inference_params`, which saves the cast.
    cache: from `init_cache`, `prefill` or `decode_step`.
    tokens: [B, m] integers, m >= 1; each row is one document. Chunks are padded to powers of two,
      so that few sizes are ever compiled.
    lengths: [B] integers from 0 to m: only the first lengths[b] tokens of row b are fed. None: all
      m tokens of every row.
    last_only: return the logits of each row's last token only; those of a long prompt are large.
    chunk_size: tokens processed at a time; None: `default_chunk`. An empty cache is filled fastest
      in one chunk.
    donate: reuse the memory of the given cache, which cannot be used afterwards.
    mesh: devices over which parameters and rows are spread, as `sparsek.generation.rows` says; the
      parameters are then those of `inference_params` with this mesh.
  Returns:
    Logits [B, m, vocab_size] float32 ([B, 1, vocab_size] with last_only; NaN in rows without
    tokens, and under `jax.jit` after a token that is no id of the vocabulary), meaningless beyond
    `lengths`, and the cache after these tokens.
  Raises:
    ValueError: for bad shapes, lengths out of range, tokens outside the vocabulary, or a cache made
      for another configuration or batch.
  """
  check_config(config)
  check_type("tokens", tokens, (jax.Array, np.ndarray), "an array of integers [batch, m]")
  if tokens.ndim != 2 or tokens.shape[1] < 1:
    raise ValueError(f"tokens has shape {tokens.shape}, expected [batch, m] with m >= 1")
  if chunk_size is not None:
    chunk_size = check_number("chunk_size", chunk_size, UnboundedCount)
  check_cache(config, cache, tokens)
  batch, length = tokens.shape
  lengths = _check_lengths(lengths, batch, length)
  params, chunk_size = inference_params(config, params), chunk_size or default_chunk(config)
  fresh = not isinstance(cache.seen, jax.core.Tracer) and not np.any(cache.seen)
  if not isinstance(tokens, jax.core.Tracer):
    tokens = np.asarray(tokens)  # sliced and padded by NumPy: nothing to compile
    if not isinstance(lengths, jax.core.Tracer):
      check_ids(
        "tokens", np.where(np.arange(length) < lengths[:, None], tokens, 0), config.vocab_size
      )
    in_vocabulary = (tokens >= 0) & (tokens < config.vocab_size)
    tokens = np.where(in_vocabulary, tokens, -1).astype(np.int32)
  pad = jnp.pad if isinstance(tokens, jax.core.Tracer) else np.pad
  clip = jnp.clip if isinstance(lengths, jax.core.Tracer) else np.clip
  if not donate:
    cache = jax.tree.map(jnp.copy, cache)
  all_logits, last = [], jnp.full((batch, config.vocab_size), jnp.nan, jnp.float32)
  for start in range(0, length, chunk_size):
    part = tokens[:, start : start + chunk_size]
    size = min(chunk_size, pad_length(part.shape[1]))
    count = clip(lengths - start, 0, part.shape[1]).astype(np.int32)
    part = pad(part, ((0, 0), (0, size - part.shape[1])))
    logits, last, cache = _feed(
      config, fresh and start == 0, last_only, mesh, params, cache, part, count, last
    )
    all_logits.append(logits)
  return (last[:, None] if last_only else jnp.concatenate(all_logits, axis=1)[:, :length]), cache


def _check_lengths(
  lengths: jax.Array | np.ndarray | None, batch: int, length: int
) -> jax.Array | np.ndarray:
  """Returns the lengths of rows, of NumPy unless traced; raises ValueError for bad ones."""
  if lengths is None:
    return np.full(batch, length)
  if not isinstance(lengths, jax.core.Tracer):
    lengths = np.asarray(lengths)
  if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
    raise ValueError(
      f"lengths must be integers of shape {(batch,)}, got {lengths.dtype} {lengths.shape}"
    )
  is_known = isinstance(lengths, np.ndarray)
  if is_known and not np.all((lengths >= 0) & (lengths <= length)):
    raise ValueError(f"lengths={lengths.tolist()} must be from 0 to {length}, the tokens given")
  return lengths


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def _feed(config, fresh, last_only, mesh, params, *rows):
  """Returns logits of a chunk or None, logits of each row's last token so far, the next cache.

  `rows` are (cache, tokens, count, last).
  """
  feed = functools.partial(_feed_rows, config, fresh, last_only)
  return over_rows(feed, config, mesh, (PARAMS, ROW, ROW, ROW, ROW), ROW)(params, *rows)


def _feed_rows(config, fresh, last_only, params, cache, tokens, count, last):
  """Computes `_feed` of the rows that are here."""
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
  """Feeds one token a row, in time that does not depend on the number of tokens before it.

  In a loop, compile it with the cache donated, so that the cache is updated in place, and pass
  `inference_params`:

    step = jax.jit(functools.partial(sparsek.decode_step, config), donate_argnums=1)

  Args:
    config, params, cache: as in `prefill`.
    token: [B] integers.
    active: [B] bool; rows where it is False stay as they are, and their logits mean nothing. None:
      all advance.
  Returns:
    Logits [B, vocab_size] float32 of the next token, NaN where a token was no id of the vocabulary,
    and the next cache.
  Raises:
    ValueError: as `prefill`.
  """
  check_config(config)
  check_type("token", token, (jax.Array, np.ndarray), "an array of integers [batch]")
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
  if devices.can_run_portable():
    from sparsek.generation import cached_kernels  # needs private names of JAX

    token = jnp.where(active, token, 0)  # what is computed for the others must be finite
    if cached_kernels.supports(config, params, cache.layers):
      hidden_BxE, layers = cached_kernels.step(
        config, params, cache.layers, cache.seen, token, active
      )
      return inference.logits(config, params, hidden_BxE), Cache(cache.seen + active, layers)
  hidden_Bx1xE, cache = _forward(
    config, params, cache, token[:, None], active.astype(jnp.int32), None
  )
  return inference.logits(config, params, hidden_Bx1xE[:, 0]), cache


def check_cache(config: TransformerConfig, cache: Cache, tokens: jax.Array | np.ndarray) -> None:
  """Raises ValueError unless the cache fits a configuration and tokens.

  Args:
    config: that the cache must have been made for.
    cache: to be checked.
    tokens: integers; the cache must have as many rows.
  """
  if not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f"tokens has dtype {tokens.dtype}, expected integers")
  check_sizes(config, cache, tokens.shape[0])


def check_sizes(config: TransformerConfig, cache: Cache, batch_size: int) -> None:
  """Raises ValueError unless the cache was made for this configuration and number of rows."""
  check_type("cache", cache, Cache, "a cache, such as init_cache returns")
  if len(cache.layers) != config.num_layers:
    raise ValueError(
      f"cache has {len(cache.layers)} layers, the configuration num_layers={config.num_layers}"
    )
  for i, (kind, layer_config, layer) in enumerate(
    zip(config.layer_kinds, config.layer_configs, cache.layers)
  ):
    parts, groups = parts_of(layer), layer_config.head_groups
    classes = [_cache_class(group.kind) for group in groups]
    if [type(part) for part in parts] != classes:
      raise ValueError(
        f"cache does not fit the configuration: layer {i} is {config.layer_terms[i]}"
      )
    for part, group in zip(parts, groups):
      scorer = getattr(layer, "scorer", None)
      _check_sizes_of(part, scorer, group, batch_size)


def _check_sizes_of(
  layer: LayerCache, scorer: ScorerState | Any, group: HeadGroup, batch_size: int
) -> None:
  """Raises ValueError unless the cache of some heads was made for them."""
  got = _sizes_of(layer, scorer, group.kind)
  needed = _sizes_needed(group.config, group.kind, batch_size)
  if got != needed:
    differ = ", ".join(
      f"{name}={got[name]} (needed: {needed[name]})" for name in needed if got[name] != needed[name]
    )
    raise ValueError(f"cache was made for {differ}")


def _cache_class(kind: str) -> type:
  """Returns the class of the cache of a layer."""
  return Kept if kind in RULES else SelectionCache if kind in SCORED else KeysAndValues


def _sizes_of(layer: LayerCache, scorer: ScorerState | Any, kind: str) -> dict[str, Any]:
  """Returns the sizes that the cache of a layer, or of some of its heads, was made for, by name."""
  assert not isinstance(layer, GroupedCache)
  key = (layer if isinstance(layer, KeysAndValues) else layer.rows)[0]
  batch, num_kv_heads, length, head_dim = key.shape
  sizes: dict[str, Any] = {
    "batch": batch,
    "num_kv_heads": num_kv_heads,
    "head_dim": head_dim,
    "dtype": str(key.dtype),
  }
  if kind == "sliding_window":
    sizes["window"] = length
  if isinstance(layer, Kept):
    k = layer.position.shape[-1]
    sizes |= {"k": k, "window": length - k}
  if isinstance(layer, SelectionCache):
    sizes |= {
      "k": layer.position.shape[-1],
      "window": layer.pending.shape[-1],
      "lookahead": scorer.linear.shape[1] if isinstance(scorer, ScorerState) else None,
      "gates with thresholds": layer.lost.shape[-1] > 0,
    }
  return sizes


def _sizes_needed(config: TransformerConfig, kind: str, batch: int) -> dict[str, Any]:
  """Returns the sizes that a layer's cache must be made for; the configuration is the layer's."""
  sizes: dict[str, Any] = {
    "batch": batch,
    "num_kv_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "dtype": config.dtype,
  }
  if kind == "sliding_window":
    sizes["window"] = config.window
  if kind in RULES:
    sizes |= {"k": config.k, "window": config.window}
  if kind in SCORED:
    sizes |= {
      "k": config.k,
      "window": config.window,
      "lookahead": None if config.scorer in SCORER_FACTORIES else scorer_delay(config),
      "gates with thresholds": needs_support(config.gate),
    }
  return sizes


def _forward(config, params, cache, tokens_BxC, count_B, fresh):
  """Feeds tokens, of which each row has the first `count`, through all blocks.

  Returns hidden states before the last norm, and the next cache; `fresh` as in `CachedBlocks`.
  """
  seen, length = cache.seen, tokens_BxC.shape[1]
  # Tokens that do not exist are fed as id 0 at position 0: what is computed for them is never read,
  # but must be finite.
  exists = jnp.arange(length) < count_B[:, None]
  position_BxC = jnp.where(exists, seen[:, None] + jnp.arange(length), 0)
  tokens_BxC = jnp.where(exists, tokens_BxC, 0)
  x_BxCxE = inference.embed(config, params, tokens_BxC, position_BxC)
  blocks = CachedBlocks(config, params, cache.layers, seen, position_BxC, count_B, fresh)
  x_BxCxE, layers = blocks.run(x_BxCxE)
  return x_BxCxE, Cache(seen + count_B, layers)
