"""Transport of the tokens that a shard's queries may see: the `halo` tokens before its own, and
those further back that are alive, that is selected, at its first query.

A token is selected on one interval of queries, so its expiry says at which shards' first queries it
is alive: at most k tokens a head are. A shard gets them in ascending order, each in a slot of its
own.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.parallel.exchange import first_token, tokens_before
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


class Alive(NamedTuple):
  """Tokens that arrived in this shard's slots; zeros in empty slots.

  Attributes:
    key, value: [B, slots, G, D].
    scores: [B, slots, G] float32.
    lifetime: [B, slots, G] float32, the expiry counted from the shard's first query, at most L.
  """

  key: jax.Array
  value: jax.Array
  scores: jax.Array
  lifetime: jax.Array


class Received(NamedTuple):
  """Tokens that arrived at this shard.

  Attributes:
    before: [B, halo, G, 2 D], key and value of the tokens before the shard; zeros before the row.
    before_small: [B, halo, G, 2] float32, their scores and lifetimes.
    alive: what is in the slots, or None without slots.
  """

  before: jax.Array
  before_small: jax.Array
  alive: Alive | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def send_tokens(
  halo: int,
  key: jax.Array,
  value: jax.Array,
  scores: jax.Array,
  lifetime: jax.Array,
  expiry: jax.Array,
  index: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, Received]:
  """Sends tokens to the shards where they are needed.

  A slot is filled by one shard, so a sum over shards moves it exactly.

  Args:
    halo: tokens before a shard that it gets.
    key, value: [B, L, G, D] of this shard.
    scores: [B, L, G] float32.
    lifetime: [B, L, G] float32, the expiry counted from the token.
    expiry: [B, L, G] int32.
    index: from `alive_tokens`; None for no slots.

  Returns:
    key, value and scores unchanged, and what arrives here. Differentiable in these three; their
    gradients are completed in place, only where a token was sent.
  """
  tail = min(halo, key.shape[1])
  rows = jnp.concatenate([_last(key, tail), _last(value, tail)], axis=-1)
  small = jnp.stack([_last(scores, tail), _last(lifetime, tail)], axis=-1)
  before, before_small = rows, small
  if halo:
    before, before_small = _from_bytes(tokens_before(_to_bytes(rows, small), halo), rows)
  alive = None if index is None else _send_alive(key, value, scores, expiry, index)
  return key, value, scores, Received(before, before_small, alive)


def _last(x: jax.Array, count: int) -> jax.Array:
  """Returns the last `count` tokens of [B, L, ...]."""
  return x[:, x.shape[1] - count :]


def _send_alive(key, value, scores, expiry, index):
  shards, length = axis_size(CONTEXT), key.shape[1]
  begin = jnp.arange(shards, dtype=jnp.int32)[:, None, None, None] * length
  lifetime = jnp.clip(_rows(expiry, index) - begin, 0, length)
  small = jnp.stack([_rows(scores, index), lifetime.astype(jnp.float32)], axis=-1)
  rows = jnp.concatenate([_rows(key, index), _rows(value, index)], axis=-1)
  received = _from_bytes(lax.psum_scatter(_to_bytes(rows, small), CONTEXT), rows)
  rows, small = (jnp.swapaxes(x, 1, 2) for x in received)
  dim = key.shape[-1]
  return Alive(rows[..., :dim], rows[..., dim:], small[..., 0], small[..., 1])


def _to_bytes(rows: jax.Array, small: jax.Array) -> jax.Array:
  """Joins [..., F] of any dtype and [..., S] float32 in one array, which one collective moves."""
  parts = [lax.bitcast_convert_type(x, jnp.uint8) for x in (rows, small)]
  return jnp.concatenate([x.reshape(*x.shape[:-2], -1) for x in parts], axis=-1)


def _from_bytes(joined: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Undoes `_to_bytes`, where the rows have the last axis and the dtype of `like`."""
  size, dtype = like.shape[-1], like.dtype
  cut = size * dtype.itemsize
  rows, small = joined[..., :cut], joined[..., cut:]
  split = lambda x, width: x.reshape(*x.shape[:-1], -1, width)
  return (
    lax.bitcast_convert_type(split(rows, dtype.itemsize), dtype),
    lax.bitcast_convert_type(split(small, 4), jnp.float32),
  )


def _at(index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the index of [B, L, G, ...] arrays that takes the tokens index [..., B, G, slots]."""
  batch, groups = index.shape[-3:-1]
  return jnp.arange(batch)[:, None, None], index, jnp.arange(groups)[:, None]


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
  """Gathers rows of x [B, L, G, ...] at index [..., B, G, slots]; zeros where there is none."""
  return x.at[_at(index)].get(mode="fill", fill_value=0)


def _send_forward(halo, key, value, scores, lifetime, expiry, index):
  return send_tokens(halo, key, value, scores, lifetime, expiry, index), index


def _send_backward(halo, index, cotangents):
  """Brings gradients back to the tokens."""
  d_key, d_value, d_scores, received = cotangents
  (length, groups, dim), tail = d_key.shape[1:], min(halo, d_key.shape[1])
  if halo:
    shape = (*d_key.shape[:1], tail, groups, 2 * dim)
    d_rows = _sent_back(received.before, halo, shape)
    d_small = _sent_back(received.before_small, halo, (*shape[:3], 2))
    d_key, d_value, d_scores = (
      x.at[:, length - tail :].add(y)
      for x, y in (
        (d_key, d_rows[..., :dim]),
        (d_value, d_rows[..., dim:]),
        (d_scores, d_small[..., 0]),
      )
    )
  if index is not None:
    d_key, d_value, d_scores = _add_alive(index, received.alive, d_key, d_value, d_scores)
  return d_key, d_value, d_scores, None, None, None


def _sent_back(x: jax.Array, halo: int, shape: tuple[int, ...]) -> jax.Array:
  """Returns the sum of what the shards behind say of this shard's last tokens."""
  transpose = jax.linear_transpose(
    functools.partial(tokens_before, count=halo), jax.ShapeDtypeStruct(shape, x.dtype)
  )
  (result,) = transpose(x)
  return result


def _add_alive(index, alive, d_key, d_value, d_scores):
  """Adds the gradients of tokens in slots, those of several shards in float32.

  Tokens that were sent to any shard are numbered; the sums are over these few. No two summands of
  an addition have the same index, so no result depends on an order of atomics.
  """
  length, dim = d_key.shape[1], d_key.shape[-1]
  rows = jnp.concatenate([alive.key, alive.value], axis=-1)
  joined = jnp.swapaxes(_to_bytes(rows, alive.scores[..., None]), 1, 2)
  shares = _from_bytes(lax.all_gather(joined, CONTEXT), rows)
  token, number = _numbered(index, length)

  def add(sums, shard):
    number, shares = shard  # [B, G, slots], [B, G, slots, 2 D] and [B, G, slots, 1]
    share = jnp.concatenate([x.astype(jnp.float32) for x in shares], axis=-1)
    put = jax.vmap(jax.vmap(lambda x, i, y: x.at[i].add(y, mode="drop", unique_indices=True)))
    return put(sums, number, share), None

  zeros = jnp.zeros((*token.shape, 2 * dim + 1), jnp.float32)
  sums, _ = lax.scan(add, zeros, (number, shares))

  def added(x, y):
    total = (_rows(x, token).astype(jnp.float32) + y).astype(x.dtype)
    return x.at[_at(token)].set(total, mode="drop", unique_indices=True)

  return (
    added(d_key, sums[..., :dim]),
    added(d_value, sums[..., dim : 2 * dim]),
    added(d_scores, sums[..., 2 * dim]),
  )


def _numbered(index: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
  """Numbers the tokens of this shard that are sent to any shard.

  Args:
    index: [P, B, G, slots], from `alive_tokens`.
    length: L.
  Returns:
    the token of each number, [B, G, min(L, P slots)], distinct numbers from L on for none; and the
    number of each entry of `index`, also distinct, and out of range for none.
  """
  shards, batch, groups, slots = index.shape
  count = min(length, shards * slots)
  by_head = jnp.moveaxis(index, 0, 2).reshape(batch, groups, -1)

  def of_head(index):
    sent = jnp.zeros(length, bool).at[index].set(True, mode="drop")
    rank = jnp.cumsum(sent, dtype=jnp.int32) - 1
    token = jnp.arange(length, dtype=jnp.int32)
    none = length + jnp.arange(count, dtype=jnp.int32)
    tokens = none.at[jnp.where(sent, rank, count + token)].set(
      token, mode="drop", unique_indices=True
    )
    number = jnp.where(index < length, rank.at[index].get(mode="clip"), count + index)
    return tokens, number

  token, number = jax.vmap(jax.vmap(of_head))(by_head)
  return token, jnp.moveaxis(number.reshape(batch, groups, shards, slots), 2, 0)


send_tokens.defvjp(_send_forward, _send_backward)
