"""Exchange of token data between the shards of a row, inside `jax.shard_map` over `context`.

A row of n tokens lies on P shards of L = n / P consecutive tokens each. Every function here has a
transpose that JAX knows, so that gradients travel the same way back.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.parallel.mesh import CONTEXT, axis_size


def first_token(length: int) -> jax.Array | int:
  """Returns the index in its row of this shard's first token, given the shard's `length`."""
  return lax.axis_index(CONTEXT) * length if axis_size(CONTEXT) > 1 else 0


def own_tokens(whole: jax.Array) -> jax.Array:
  """Slices this shard's tokens out of whole rows: [B, n, ...] to [B, L, ...]."""
  if axis_size(CONTEXT) == 1:
    return whole
  length = whole.shape[1] // axis_size(CONTEXT)
  return lax.dynamic_slice_in_dim(whole, first_token(length), length, axis=1)


def tokens_at(x: jax.Array, index: jax.Array) -> jax.Array:
  """Returns some tokens of whole rows on every shard: [B, L, ...] at index [B, M], counted from the
  start of the row, to [B, M, ...]; zeros outside the row.

  One shard has a token, so a sum over shards moves it exactly.
  """
  length = x.shape[1]
  own = index - first_token(length)
  is_own = ((own >= 0) & (own < length)).reshape(*own.shape, *[1] * (x.ndim - 2))
  taken = jax.vmap(lambda row, i: jnp.take(row, i, axis=0))(x, jnp.clip(own, 0, length - 1))
  taken = jnp.where(is_own, taken, 0)
  return lax.psum(taken, CONTEXT) if axis_size(CONTEXT) > 1 else taken


def tokens_before(x: jax.Array, count: int) -> jax.Array:
  """Returns the `count` tokens before this shard's first, from as many shards as that needs.

  Args:
    x: [B, L, ...] of this shard.
    count: at least 0.
  Returns:
    [B, count, ...]; zeros before the start of the row.
  """
  length, shards, parts = x.shape[1], axis_size(CONTEXT), []
  for distance in range(1, -(-count // length) + 1):
    part = x[:, max(distance * length - count, 0) :]
    if distance < shards:
      pairs = [(source, source + distance) for source in range(shards - distance)]
      parts.append(lax.ppermute(part, CONTEXT, pairs))
    else:
      parts.append(jnp.zeros_like(part))
  return jnp.concatenate([*parts[::-1], x[:, :0]], axis=1)


def tokens_after(x: jax.Array, count: int) -> jax.Array:
  """Returns the `count` tokens after this shard's last: [B, count, ...]; zeros behind the row."""
  length, shards, parts = x.shape[1], axis_size(CONTEXT), []
  for distance in range(1, -(-count // length) + 1):
    part = x[:, : min(count - (distance - 1) * length, length)]
    if distance < shards:
      pairs = [(source, source - distance) for source in range(distance, shards)]
      parts.append(lax.ppermute(part, CONTEXT, pairs))
    else:
      parts.append(jnp.zeros_like(part))
  return jnp.concatenate([*parts, x[:, :0]], axis=1)


def to_whole_rows(x: jax.Array) -> jax.Array:
  """Gives each shard whole rows of some heads: [B, L, S] to [B, n, ceil(S / P)].

  Shard p gets heads p ceil(S / P) and so on; heads beyond S are zeros.
  """
  shards = axis_size(CONTEXT)
  x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % shards)))
  return lax.all_to_all(x, CONTEXT, split_axis=2, concat_axis=1, tiled=True)


def to_own_tokens(x: jax.Array, heads: int) -> jax.Array:
  """Undoes `to_whole_rows`: [B, n, ceil(S / P)] to [B, L, S], with S = `heads`."""
  return lax.all_to_all(x, CONTEXT, split_axis=1, concat_axis=2, tiled=True)[:, :, :heads]
