"""Sizes of a cache, which grow with the texts and are no larger than the texts can use."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp

from sparsek.attention.eviction import Kept
from sparsek.config import TransformerConfig, parse_term
from sparsek.generation.cache import (
  Cache,
  cache_bytes,
  default_support_size,
  init_cache,
  pad_length,
)
from sparsek.generation.cached_attention import (
  GroupedCache,
  KeysAndValues,
  LayerCache,
  SelectionCache,
  map_rows,
)
from sparsek.kernels.sentinels import NOWHERE

GROWTH = 128  # rows that full layers grow by; the decoding kernels take multiples of it
UNCLIPPED = 2**14  # k and windows up to here are never clipped to the length of texts


def padded_length(max_length: int) -> int:
  """Returns the number of tokens for which full layers have room, a multiple of GROWTH."""
  return -(-max_length // GROWTH) * GROWTH


def with_room(config: TransformerConfig, cache: Cache, max_length: int) -> Cache:
  """Returns the cache with full layers that can hold at least max_length tokens.

  They grow in steps of GROWTH, so that few sizes are compiled.
  """

  def widen(kind: str, layer: LayerCache) -> LayerCache:
    if not isinstance(layer, KeysAndValues) or kind != "full":
      return layer
    if max_length <= layer.key.shape[2]:
      return layer
    missing = padded_length(max_length) - layer.key.shape[2]
    return map_rows(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))), layer)

  return cache._replace(layers=tuple(map(widen, config.layer_kinds, cache.layers)))


def clip_sizes(config: TransformerConfig, length: int) -> TransformerConfig:
  """Returns a configuration whose cache is no larger than texts of `length` tokens can use.

  Their logits are the same: no token leaves a window that holds them all, and no more tokens are
  selected than there are. Sizes up to UNCLIPPED stay, larger ones become powers of two, so that few
  programs are compiled for texts that grow.
  """
  most = max(UNCLIPPED, pad_length(length), config.scorer_lookahead)
  least = lambda size: None if size is None else min(size, most)
  terms = []
  for term in map(parse_term, config.attention):
    own = term.own and term.own._replace(k=least(term.own.k), window=least(term.own.window))
    terms.append(term.with_sizes(least(term.k), least(term.window), own))
  return dataclasses.replace(
    config, k=min(config.k, most), window=min(config.window, most), attention=tuple(terms)
  )


def resize(before: TransformerConfig, after: TransformerConfig, cache: Cache) -> Cache:
  """Returns a cache made for `before` as one made for `after`, both from `clip_sizes`.

  The cache of `before` must hold all of the texts so far.
  """
  if before == after:
    return cache
  layers = map(
    _resize_layer, before.layer_kinds, before.layer_configs, after.layer_configs, cache.layers
  )
  return cache._replace(layers=tuple(layers))


def _resize_layer(
  kind: str, old: TransformerConfig, new: TransformerConfig, layer: LayerCache
) -> LayerCache:
  if isinstance(layer, GroupedCache):
    groups = zip(old.head_groups, new.head_groups, layer.groups)
    resized = tuple(_resize_layer(a.kind, a.config, b.config, part) for a, b, part in groups)
    return layer._replace(groups=resized)
  extra_k, extra_window = new.k - old.k, new.window - old.window
  if isinstance(layer, Kept):  # its window is in order
    front = lambda x: jnp.concatenate(
      [
        x[:, :, : old.k],
        jnp.zeros((*x.shape[:2], extra_k + extra_window, *x.shape[3:]), x.dtype),
        x[:, :, old.k :],
      ],
      axis=2,
    )
    position = _pad_end(layer.position, extra_k, NOWHERE)
    return Kept(tuple(map(front, layer.rows)), front(layer.mark), position, layer.plan)
  if not isinstance(layer, SelectionCache):
    if kind == "full":
      return layer
    return map_rows(lambda x: _pad_rows(x, 0, 0, extra_window), layer)
  extra_support = default_support_size(new.gate, new.k) - default_support_size(old.gate, old.k)
  score = jnp.concatenate(
    [
      _pad_end(layer.score[..., : old.k], extra_k, -jnp.inf),
      _pad_end(layer.score[..., old.k :], extra_window),
    ],
    axis=-1,
  )
  return layer._replace(
    rows=map_rows(lambda x: _pad_rows(x, old.k, extra_k, extra_window), layer.rows),
    score=score,
    position=_pad_end(layer.position, extra_k, NOWHERE),
    support=_pad_end(layer.support, extra_support, -jnp.inf),
    pending=_pad_end(layer.pending, extra_window),
  )


def _pad_end(x: jax.Array, size: int, fill: float = 0) -> jax.Array:
  """Pads the last axis at its end."""
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size)], constant_values=fill)


def _pad_rows(x: jax.Array, k: int, extra_k: int, extra_window: int) -> jax.Array:
  """Adds slots and places of the ring to rows [B, G, k + window, D]."""
  slots, ring = (jnp.swapaxes(part, 2, 3) for part in (x[:, :, :k], x[:, :, k:]))
  parts = (_pad_end(slots, extra_k), _pad_end(ring, extra_window))
  return jnp.concatenate([jnp.swapaxes(part, 2, 3) for part in parts], axis=2)


def check_memory(config: TransformerConfig, batch_size: int, max_length: int, name: str) -> None:
  """Raises ValueError where memory could never hold a cache.

  Args:
    config, batch_size, max_length: as in `init_cache`.
    name: the option that asks for so much, with its value, for the message.
  """
  shapes = jax.eval_shape(functools.partial(init_cache, config, batch_size, max_length=max_length))
  # `prefill` makes copies of a ring, one layer at a time.
  rings = (
    cache_bytes(layer) for kind, layer in zip(config.layer_kinds, shapes.layers) if kind != "full"
  )
  need = cache_bytes(shapes) + 4 * max(rings, default=0)
  device = jax.devices()[0].memory_stats() or {}  # a CPU has none
  memory = device.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  if need > memory:
    raise ValueError(
      f"{name}: what the model would keep of {batch_size} texts at the same time "
      f"takes about {need:,} bytes, more than the {memory:,} bytes of memory here"
    )
