"""Transport of the tokens that are alive, that is selected, at the first query of each shard.

A token is selected on one interval of queries, so its expiry says at which shards' first queries it
is alive: at most k tokens a head are. Tokens that a shard finds in the `halo` tokens before its own
do not travel here. A shard gets the others in ascending order, each in a slot of its own.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.parallel.exchange import first_token
from sparsek.parallel.mesh import CONTEXT, axis_size


def alive_tokens(expiry: jax.Array, halo: int, slots: int) -> jax.Array:
  """Finds which of this shard's tokens each shard needs, and in which slots.

  Args:
    expiry: [B, L, G] int32 of this shard, counted from the start of the row.
    halo: tokens before a shard that it gets in another way.
    slots: at least as many as tokens are alive.

  Returns:
    [P, B, G, slots] int32: for each shard and slot the token, counted from this shard's first. The
    slots that other shards fill, and empty ones, hold distinct numbers from L on.
  """
  shards, (batch, length, groups) = axis_size(CONTEXT), expiry.shape
  token = jnp.arange(length, dtype=jnp.int32)
  begin = jnp.arange(shards, dtype=jnp.int32)[:, None, None, None] * length
  in_front = first_token(length) + token < begin - halo
  alive = in_front & (jnp.swapaxes(expiry, 1, 2) > begin)  # [P, B, G, L]
  rank = jnp.cumsum(alive, axis=-1, dtype=jnp.int32)
  counts = lax.all_gather(rank[..., -1], CONTEXT)  # [source, destination, B, G]
  earlier = jnp.arange(shards)[:, None, None, None] < lax.axis_index(CONTEXT)
  before = jnp.sum(jnp.where(earlier, counts, 0), axis=0)
  slot = jnp.where(alive, before[..., None] + rank - 1, slots + token)
  empty = length + jnp.arange(slots, dtype=jnp.int32)

  def fill(slot):
    return empty.at[slot].set(token, mode="drop", unique_indices=True)

  index = jax.vmap(fill)(slot.reshape(-1, length))
  return index.reshape(shards, batch, groups, slots)


@jax.custom_vjp
def send_alive(
  rows: jax.Array, scores: jax.Array, expiry: jax.Array, index: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Sends tokens to the shards and slots where they are needed.

  A slot is filled by one shard, so a sum over shards moves it exactly.

  Args:
    rows: [B, L, G, F] of this shard.
    scores: [B, L, G] float32.
    expiry: [B, L, G] int32.
    index: from `alive_tokens`.

  Returns:
    What arrives at this shard, zeros in empty slots: rows [B, slots, G, F], scores [B, slots, G],
    and the expiry, counted from the shard's first query and at most L, as float32. Differentiable
    in rows and scores.
  """
  shards, length = axis_size(CONTEXT), rows.shape[1]
  begin = jnp.arange(shards, dtype=jnp.int32)[:, None, None, None] * length
  lifetime = jnp.clip(_rows(expiry, index) - begin, 0, length)
  small = jnp.stack([_rows(scores, index), lifetime.astype(jnp.float32)], axis=-1)
  rows, small = (
    jnp.swapaxes(lax.psum_scatter(x, CONTEXT), 1, 2) for x in (_rows(rows, index), small)
  )
  return rows, small[..., 0], small[..., 1]


def _rows(x, index):
  """Gathers rows of x [B, L, G, ...] at index [P, B, G, slots]; zeros where there is none."""
  take = jax.vmap(jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0)))
  return jax.vmap(take, in_axes=(None, 0))(jnp.swapaxes(x, 1, 2), index)


def _send_forward(rows, scores, expiry, index):
  return send_alive(rows, scores, expiry, index), (rows[..., :0], index)


def _send_backward(residuals, cotangents):
  """Brings gradients back to the tokens, and adds them shard after shard.

  Within a shard's slots no token occurs twice, so the sums do not depend on an order of atomics.
  """
  like, index = residuals
  batch, length, groups = like.shape[:3]
  d_rows, d_scores = (
    lax.all_gather(jnp.swapaxes(x, 1, 2), CONTEXT) for x in (cotangents[0], cotangents[1])
  )
  add = jax.vmap(jax.vmap(lambda x, i, y: x.at[i].add(y, mode="drop", unique_indices=True)))

  def step(sums, shard):
    index, *shares = shard
    return tuple(add(x, index, y.astype(jnp.float32)) for x, y in zip(sums, shares)), None

  shape = batch, groups, length
  zeros = jnp.zeros((*shape, d_rows.shape[-1]), jnp.float32), jnp.zeros(shape, jnp.float32)
  sums, _ = lax.scan(step, zeros, (index, d_rows, d_scores))
  d_rows, d_scores = (jnp.swapaxes(x, 1, 2) for x in sums)
  return d_rows.astype(like.dtype), d_scores, None, None


send_alive.defvjp(_send_forward, _send_backward)
