"""Lists of the tokens that are selected anywhere in a chunk of queries, so that attention reads
short contiguous buffers.

A token is selected on one interval of queries, `[j + window, expiry_j)`. At most k tokens are
selected at a chunk's first query and each query admits at most one more, so a chunk of C queries
needs k + C slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels.bisection import bisect
from sparsek.kernels.prefix_thresholds import reader
from sparsek.kernels.varying import varying_like


def chunk_size(n: int, k: int, window: int) -> int:
  """Returns the queries per chunk, at least 2.

  That is about a quarter of the budget, so that the 2 C keys that a chunk reads beyond its
  k + window stay a fraction of the work. XLA fails to compile chunks of one query for GPUs.
  """
  return max(2, min(n, max(64, min(512, (k + window) // 128 * 32))))


def chunk_lists(expiry: jax.Array, k: int, window: int, chunk: int) -> jax.Array:
  """Lists the tokens selected anywhere in each chunk, in ascending order.

  Args:
    expiry: [n] int32, as from `sparsek.causal_sparsek` with delay = window.
    k: budget; 0 for empty lists.
    window: steps after which a token may be selected.
    chunk: queries per chunk; n need not be a multiple.

  Returns:
    [chunks, min(k + chunk, n)] int32 token indices, or [chunks, 0] for k = 0. Unused slots hold
    distinct values from n on, for scatters to drop and gathers to fill.
  """
  n = expiry.shape[0]
  chunks, slots = -(-n // chunk), min(k + chunk, n)
  if not k:
    return varying_like(jnp.zeros((chunks, 0), jnp.int32), expiry)
  entry = jnp.arange(n, dtype=jnp.int32) + window
  first, last = entry // chunk, (expiry - 1) // chunk
  lives = jnp.where(expiry > entry, last - first + 1, 0)  # chunks that each token is listed in
  ends = jnp.cumsum(lives)  # in a list of the pairs of a token and a chunk, by token
  pairs = chunks * slots
  pair = varying_like(jnp.arange(pairs, dtype=jnp.int32), expiry)
  ends_at = reader(ends)
  (token,) = bisect(n, (pair - pair, pair - pair + n, lambda j: ends_at(j) > pair))
  member = jnp.where(token < n, reader(last + 1 - ends)(token) + pair, chunks)
  member, token = lax.sort((member, token), num_keys=2)
  member_at = reader(member)
  number = varying_like(jnp.arange(chunks + 1, dtype=jnp.int32), expiry)
  low = number - number
  (begin,) = bisect(pairs, (low, low + pairs, lambda i: member_at(i) >= number))
  count = begin[1:] - begin[:-1]
  slot = jnp.arange(slots, dtype=jnp.int32)
  index = begin[:-1, None] + slot
  return jnp.where(slot < count[:, None], token.at[index].get(mode="clip"), n + slot)


class Live(NamedTuple):
  """The tokens selected at the first query of each chunk, in ascending order.

  Attributes:
    token: [chunks, slots] int32, n where a slot is empty.
    score: [chunks, slots].
    expiry: [chunks, slots] int32, 0 where a slot is empty.
    count: [chunks] int32, how many slots are filled.
  """

  token: jax.Array
  score: jax.Array
  expiry: jax.Array
  count: jax.Array  # type: ignore[assignment]  # tuple.count is not used


def by_entry(x: jax.Array, delay: int) -> jax.Array:
  """Returns, for each query, x of the token `delay` steps before it, or 0: [n]."""
  n = x.shape[0]
  return jnp.pad(x[: max(n - delay, 0)], (min(delay, n), 0))


def live_lists(score: jax.Array, expiry: jax.Array, *, window: int, chunk: int, slots: int) -> Live:
  """Lists the tokens selected at the first query of each chunk: those that stay of the list before,
  and those that have entered since. Nothing is gathered, which TPUs do slowly.

  Args:
    score: [n].
    expiry, window, chunk: as in `chunk_lists`; n must be a multiple of `chunk`.
    slots: slots of a list, at least the budget.
  """
  n = expiry.shape[0]
  token = jnp.arange(n, dtype=jnp.int32)
  # of tokens that enter after the first query of the chunk before, up to that of this chunk
  since = lambda x: by_entry(x, window + chunk - 1).reshape(-1, chunk)
  empty = varying_like(jnp.zeros(slots, jnp.int32), expiry)

  def step(last_list, entering):
    begin, *entering = entering
    joined = tuple(jnp.concatenate(pair) for pair in zip(last_list, entering))
    expired = (joined[2] <= begin).astype(jnp.int32)
    expired, *live_first = lax.sort((expired, *joined), num_keys=1, is_stable=True)
    live = expired[:slots] == 0
    token, score, expiry = (x[:slots] for x in live_first)
    new_list = jnp.where(live, token, n), score, jnp.where(live, expiry, 0)
    return new_list, Live(*new_list, jnp.sum(live, dtype=jnp.int32))

  begin = jnp.arange(0, n, chunk, dtype=jnp.int32)
  return lax.scan(
    step,
    (empty, empty.astype(score.dtype), empty),
    (begin, since(token), since(score), since(jnp.where(expiry > token + window, expiry, 0))),
  )[1]
