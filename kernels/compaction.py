"""Compaction: the tokens selected anywhere in a chunk of queries, listed per chunk, so that attention reads short contiguous buffers.

A token is selected on one interval of queries, `[j + window, expiry_j)`. At most k tokens are selected at a chunk's first query and each query admits
at most one more, so a chunk of C queries needs k + C places.
"""

import jax
from jax import lax
import jax.numpy as jnp


def chunk_size(n: int, k: int, window: int) -> int:
  """Queries per chunk: about a quarter of the budget, so that the 2 C keys a chunk reads beyond its k + window stay a fraction of the work."""
  return min(n, max(64, min(512, (k + window) // 128 * 32)))


def chunk_lists(expiry: jax.Array, k: int, window: int, chunk: int) -> jax.Array:
  """Lists the tokens selected anywhere in each chunk, in order of entry (which is their own order).

  Args:
    expiry: [n] int32, as from `sparsek.causal_sparsek` with delay = window.
    k: budget; 0 for empty lists.
    window: steps after which a token may be selected.
    chunk: queries per chunk; n need not be a multiple.

  Returns:
    [chunks, min(k + chunk, n)] int32 token indices, or [chunks, 0] for k = 0. Unused places hold distinct values from n on, for scatters to drop and
    gathers to fill.
  """
  n = expiry.shape[0]
  chunks, slots = -(-n // chunk), min(k + chunk, n) if k else 0
  entry = jnp.arange(n, dtype=jnp.int32) + window
  first, last = entry // chunk, (expiry - 1) // chunk
  lives = jnp.where(expiry > entry, last - first + 1, 0)                  # chunks that each token is listed in
  total = chunks * slots
  token = jnp.repeat(jnp.arange(n, dtype=jnp.int32), lives, total_repeat_length=total)
  before = jnp.cumsum(lives) - lives
  place = jnp.arange(total, dtype=jnp.int32)
  member = jnp.where(place < jnp.sum(lives), first[token] + place - before[token], chunks)
  member, token = lax.sort((member, token), num_keys=2)
  count = jnp.zeros(chunks, jnp.int32).at[member].add(1, mode="drop")
  slot = jnp.arange(slots, dtype=jnp.int32)
  place = (jnp.cumsum(count) - count)[:, None] + slot
  return jnp.where(slot < count[:, None], token.at[place].get(mode="clip"), n + slot)
