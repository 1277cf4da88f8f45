"""Attention of new tokens to what a layer of tova, h2o or snapkv keeps."""

import jax
import jax.numpy as jnp

from sparsek.attention.eviction import Kept, Seen, advance, over_blocks
from sparsek.generation.cached_attention import KeysAndValues, float32_product


def attend_evicting(
  rule: str, kept: Kept, seen: jax.Array, count: jax.Array, query: jax.Array, new: KeysAndValues
) -> tuple[jax.Array, Kept]:
  """Attends from a chunk of C new tokens a row, or from a single one.

  Args:
    rule: out of `sparsek.attention.eviction.RULES`.
    kept: what the layer keeps, keys and values.
    seen: [B], tokens before the new ones.
    count: [B], how many of the new tokens of a row exist.
    query: [B, C, H, D].
    new: keys and values of the new tokens, [B, C, G, D].

  Returns:
    The output of attention, [B, C, H, D], and what the layer keeps next.
  """
  batch, length, _, dim = query.shape
  scale = dim**-0.5
  if length == 1:
    kept, what = advance(rule, kept, seen, count, query, tuple(new), scale)
    return _mixed(what, query), kept

  def write(out, index, what):
    return out.at[jnp.arange(batch)[:, None], index].set(_mixed(what, query), mode="drop")

  start = jnp.broadcast_to(-seen[:, None], (batch, length))
  end = jnp.broadcast_to(count[:, None], (batch, length))
  out = jnp.zeros_like(query)
  kept, out = over_blocks(rule, kept, query, tuple(new), start, end, count, scale, write, out)
  return out, kept


def _mixed(what: Seen, query: jax.Array) -> jax.Array:
  """Returns the mean of the values under the weights of L queries, [B, L, H, D]."""
  value = what.rows[1]
  product = float32_product(query.dtype)
  mixed = product("bgrcm,bgmd->bcgrd", what.weights.astype(value.dtype), value)
  return mixed.reshape(*mixed.shape[:2], *query.shape[2:]).astype(query.dtype)
