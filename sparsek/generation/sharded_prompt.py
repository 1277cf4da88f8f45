"""Prompts whose tokens are sharded over `context`: the cache after them, from the parallel pass.

A shard computes its part of every layer as in training. What the cache keeps of a layer, at most
window + k tokens a head, then goes to all shards; of a full layer that is every token.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sparsek.config import TransformerConfig
from sparsek.generation import inference
from sparsek.generation.block import Blocks
from sparsek.generation.cache import Cache, init_cache, pad_length
from sparsek.generation.cached_attention import (
  KeysAndValues,
  LayerCache,
  SelectionCache,
  attend_by_groups,
  map_rows,
  selects,
)
from sparsek.generation.cached_chunk import keep_best
from sparsek.generation.inference import InferenceParams, Projections, inference_specs
from sparsek.generation.rows import map_shards
from sparsek.model.head_groups import window_implementation
from sparsek.model.layers import full_attention
from sparsek.model.scorers import scoring_network
from sparsek.parallel import sequence_parallel
from sparsek.parallel.exchange import first_token, tokens_at
from sparsek.parallel.mesh import CONTEXT, FSDP, ROWS

LONG_SHARD = 2048  # longer shards are padded to a multiple of it, shorter ones to a power of two


def prefill_sharded(
  config: TransformerConfig,
  params: InferenceParams,
  tokens: np.ndarray,
  lengths: np.ndarray,
  max_length: int,
  mesh: Mesh,
) -> tuple[jax.Array, Cache]:
  """Makes a cache and feeds it prompts, as `sparsek.generation.cache.prefill` does, to rounding.

  Args:
    config: of the model.
    params: of `inference_params` with this mesh.
    tokens: [B, m] integers; a row is one document.
    lengths: [B] integers from 1 to m, how many tokens of a row are fed.
    max_length: as in `init_cache`.
    mesh: devices; the tokens of a row are split over `context`.

  Returns:
    Logits [B, vocab_size] float32 after each row's last token, and the cache.

  Raises:
    ValueError, NotImplementedError: as `init_cache`, and for attention that cannot be computed so.
  """
  shards = mesh.shape[CONTEXT]
  shard = -(-tokens.shape[1] // shards)
  shard = pad_length(shard) if shard <= LONG_SHARD else -(-shard // LONG_SHARD) * LONG_SHARD
  padded = np.pad(tokens, ((0, 0), (0, shard * shards - tokens.shape[1])))
  fed = padded.astype(np.int32), lengths.astype(np.int32)
  return _prefill(config, max_length, mesh, params, *fed)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(config, max_length, mesh, params, tokens, lengths):
  groups = mesh.size // mesh.shape[CONTEXT]
  axes = () if len(tokens) % groups else ROWS
  rows = P(axes or None)
  return map_shards(
    functools.partial(_prefill_shard, config, max_length),
    mesh,
    (inference_specs(config, mesh.shape[FSDP]), P(axes or None, CONTEXT), rows),
    rows,
    len(tokens),
    axes,
  )(params, tokens, lengths)


def _prefill_shard(config, max_length, params, tokens, count):
  """Computes `prefill_sharded` of the tokens that are here."""
  batch, length = tokens.shape
  position = jnp.broadcast_to(first_token(length) + jnp.arange(length), (batch, length))
  # Tokens that do not exist are at position 0, so that what is computed for them is finite.
  position = jnp.where(position < count[:, None], position, 0)
  x_BxLxE = inference.embed(config, params, tokens, position)
  empty = init_cache(config, batch, max_length=max_length)
  x_BxLxE, layers = ShardedBlocks(config, params, empty.layers, position, count).run(x_BxLxE)
  last_BxE = tokens_at(x_BxLxE, count[:, None] - 1)[:, 0]
  return inference.logits(config, params, last_BxE), Cache(count, layers)


class ShardedBlocks(Blocks[Projections, jax.Array]):
  """The blocks for this shard's tokens of prompts; they fill an empty cache.

  Args:
    config, params: as in `Blocks`.
    layers: of the cache.
    position: [B, L] of the tokens.
    count: [B], tokens of the whole prompt.
  """

  def __init__(
    self,
    config: TransformerConfig,
    params: InferenceParams,
    layers: tuple[LayerCache, ...],
    position: jax.Array,
    count: jax.Array,
  ):
    super().__init__(config, params)
    self._caches, self._position, self._count = layers, position, count

  def project(self, i: int, x: jax.Array) -> Projections:
    """Returns queries, keys and values of block i."""
    projected = inference.project(self.config, self.layers[i], x, self._position)
    if projected.scorer_logits is None:
      return projected
    return projected._replace(
      scorer_input=inference.norm(self.config, self.layers[i]["attention_norm"], x)
    )

  def attend(self, i: int, projected: Projections) -> tuple[jax.Array, LayerCache]:
    """Returns attention in block i, [B, L, H, D], and the layer's cache."""
    config, cache, scores, delay = self.configs[i], self._caches[i], None, 0
    if selects(cache):
      network, variables = scoring_network(config), {"params": self.layers[i].get("scorer", {})}
      x, delay = projected.scorer_input, network.delay
      scores = network.apply(variables, x, None, i)
      state: Any = network.apply(variables, x, self._count, method="state_after")
      cache = cache._replace(scorer=state)
    query, key, value, *_ = projected
    new, attend = KeysAndValues(key, value), functools.partial(self._attend, delay)
    return attend_by_groups(attend, self.kinds[i], config, cache, query, new, scores)

  def _attend(self, delay, kind, config, cache, query, new, scores):
    """Attends in a layer, or in some heads of it.

    Args:
      delay: tokens after which a score is final.
      kind, config, cache, query, new, scores: as in `attend_by_groups`.
    """
    if isinstance(cache, SelectionCache):
      return self._select(config, cache, query, new, scores, delay)
    if kind == "full":
      return full_attention(config, query, new.key, new.value, None), self._all_rows(cache, new)
    mixed = sequence_parallel.sliding_window_attention(
      query, *new, window=config.window, implementation=window_implementation(config)
    )
    return mixed, map_rows(lambda x: _heads_first(tokens_at(x, self._ring(config.window))), new)

  def _ring(self, window):
    """Returns the token at each place of a ring, [B, window]; below 0 where there is none."""
    start = self._count[:, None] - window
    return start + (-start + jnp.arange(window)) % max(window, 1)

  def _all_rows(self, cache, new):
    """Returns all keys and values, zeros behind the prompt."""

    def rows(x, like):
      whole = _heads_first(lax.all_gather(x, CONTEXT, axis=1, tiled=True))
      size = like.shape[2]
      whole = jnp.pad(whole, ((0, 0), (0, 0), (0, max(size - whole.shape[2], 0)), (0, 0)))
      exists = jnp.arange(size) < self._count[:, None]
      return jnp.where(exists[:, None, :, None], whole[:, :, :size], 0)

    return KeysAndValues(*map(rows, new, cache))

  def _select(self, config, cache, query, new, scores, delay):
    """Attends in a sparsek layer, and fills its slots, support and ring."""
    count = self._count[:, None, None]
    mixed = sequence_parallel.sparsek_attention(
      query,
      new.key,
      new.value,
      scores,
      k=config.k,
      window=config.window,
      gate=config.gate,
      implementation=config.implementation,
    )
    known = _heads_first(lax.all_gather(scores, CONTEXT, axis=1, tiled=True))  # [B, G, n]
    token = jnp.arange(known.shape[2], dtype=jnp.int32)
    known = jnp.where(token < count - delay, known, -jnp.inf)
    candidate = (token < count - config.window) & ~jnp.isnan(known)
    slots = ((0, 0), (0, 0), (config.k, 0))  # empty
    cache, chosen = keep_best(
      config,
      cache,
      jnp.pad(jnp.where(candidate, known, -jnp.inf), slots, constant_values=-jnp.inf),
      jnp.pad(jnp.broadcast_to(token, known.shape), slots),
    )
    ring = self._ring(config.window)
    pending = jnp.take_along_axis(known, jnp.maximum(ring, 0)[:, None], axis=2)

    def kept(x):
      by_head = jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], x.shape[3])
      chosen_rows = tokens_at(by_head, chosen.reshape(len(by_head), -1) - config.k)
      chosen_rows = chosen_rows.reshape(*chosen.shape, x.shape[3])
      return jnp.concatenate([chosen_rows, _heads_first(tokens_at(x, ring))], axis=2)

    return mixed, cache._replace(
      rows=map_rows(kept, new), pending=jnp.where(ring[:, None] >= 0, pending, -jnp.inf)
    )

  def project_output(self, i: int, mixed: jax.Array, x: jax.Array) -> jax.Array:
    """Returns x plus the output projection of attention in block i."""
    return inference.dense(self.layers[i]["out"], mixed.reshape(*x.shape[:2], -1), x)


def _heads_first(x):
  """Turns [B, N, G, ...] into [B, G, N, ...]."""
  return jnp.swapaxes(x, 1, 2)
