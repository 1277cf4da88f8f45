"""Attention of a layer whose KV heads have the same k and window, or form two groups that do.

Heads attend by themselves. So a group of them, with the query heads that read them, is a layer of
fewer heads: each is computed by the functions of a whole layer, and the outputs are put together
in the order of heads.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sparsek.config import HeadGroup, TransformerConfig
from sparsek.config.layer_patterns import head_runs
from sparsek.parallel import sequence_parallel


def take_heads(x: jax.Array, heads: Sequence[int], num_kv_heads: int, axis: int = 2) -> jax.Array:
  """Returns the part of an array that belongs to some KV heads.

  Args:
    x: queries, keys, values or scores; `axis` has as many query heads for each KV head.
    heads: indices of KV heads, ascending.
    num_kv_heads: of the layer.
    axis: that of heads.
  """
  if len(heads) == num_kv_heads:
    return x
  size = x.shape[axis] // num_kv_heads
  parts = [
    jax.lax.slice_in_dim(x, first * size, (last + 1) * size, axis=axis)
    for first, last in head_runs(heads)
  ]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)


def join_heads(parts: Sequence[jax.Array], groups: Sequence[HeadGroup], axis: int = 2) -> jax.Array:
  """Returns the array of all heads, in their order, of which each group has a part.

  It is the inverse of `take_heads`.
  """
  if len(parts) == 1:
    return parts[0]
  pieces: list[tuple[int, jax.Array]] = []
  for x, group in zip(parts, groups):
    size, start = x.shape[axis] // len(group.heads), 0
    for first, last in head_runs(group.heads):
      stop = start + (last + 1 - first) * size
      pieces.append((first, jax.lax.slice_in_dim(x, start, stop, axis=axis)))
      start = stop
  pieces.sort(key=lambda piece: piece[0])
  return jnp.concatenate([piece for _, piece in pieces], axis=axis)


def window_implementation(config: TransformerConfig) -> str | None:
  """Returns the implementation of a sliding window for `config`: XLA's for "reference", which has
  none.
  """
  return "xla" if config.implementation == "reference" else config.implementation


def window_attention(
  config: TransformerConfig,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
) -> jax.Array:
  """Attends to the last `window` tokens, in each group of heads to those of its own.

  Args:
    config: of the layer.
    query, key, value, segment_ids: as in `sparsek.model.layers.Tokens`.
  """
  parts = []
  for heads, group in config.head_groups:
    of_heads = (take_heads(x, heads, config.num_kv_heads) for x in (query, key, value))
    parts.append(
      sequence_parallel.sliding_window_attention(
        *of_heads,
        window=group.window,
        segment_ids=segment_ids,
        implementation=window_implementation(config),
      )
    )
  return join_heads(parts, config.head_groups)


def selecting_attention(
  config: TransformerConfig,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  scores: jax.Array,
  segment_ids: jax.Array | None,
  gate: str = "straight_through",
) -> jax.Array:
  """Attends to the window and to the k best-scored tokens before it, in each group of heads to
  those of its own.

  The scores of heads that see their window alone (k=0) are not read, and have gradients of 0.

  Args:
    config: of the layer.
    query, key, value, segment_ids: as in `sparsek.model.layers.Tokens`.
    scores: [B, N, G] float32.
    gate: as in `sparsek.sparsek_attention`.
  """
  parts = []
  for group in config.head_groups:
    take = functools.partial(take_heads, heads=group.heads, num_kv_heads=config.num_kv_heads)
    of_heads = take(query), take(key), take(value)
    if group.kind == "sliding_window":
      parts.append(window_attention(group.config, *of_heads, segment_ids))
      continue
    parts.append(
      sequence_parallel.sparsek_attention(
        *of_heads,
        take(scores),
        k=group.config.k,
        window=group.config.window,
        gate=gate,
        segment_ids=segment_ids,
        implementation=config.implementation,
      )
    )
  return join_heads(parts, config.head_groups)
