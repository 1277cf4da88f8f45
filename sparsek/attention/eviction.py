r"""Attention to a window and to k slots whose keys are chosen by the attention that they receive:
TOVA, H2O and SnapKV as one algorithm with three rules.

A token that leaves the window becomes a candidate for a slot. Plans are made at borders, every
`block_size` tokens of a document: of the keys in the slots and of the tokens that leave the window
before the next border, the k with the highest marks stay. Each token that wins takes the slot of
the worst loser when it leaves the window, so that no query ever sees more than k + window keys, and
in a long document each sees exactly as many. A token that does not exist yet at the border wins.

Marks come from the queries before the border and the keys that these saw: of a rule

  "tova": the attention of the latest query, averaged over all query heads of the layer (Oren et al.
    2024, arXiv 2401.06104);
  "h2o": the sum of all attention since the token came, averaged over the query heads of the KV head
    (Zhang et al. 2023, arXiv 2306.14048);
  "snapkv": the same sum over the queries since the last border, averaged over POOL neighbours among
    the keys that are kept (Li et al. 2024, arXiv 2404.14469).

Of equal marks the earlier token wins.

Whole rows, chunks of a prompt and single tokens all go through `advance`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.attention.api import Options, attend_selected, check_arguments
from sparsek.attention.backends import PALLAS, choose_implementation
from sparsek.attention.documents import document_bounds
from sparsek.attention.prefix_selection import order_by_expiry
from sparsek.config import check_choice
from sparsek.kernels import cudnn, devices
from sparsek.kernels.saved import saved
from sparsek.kernels.sentinels import LOWEST, NOWHERE

RULES = ("tova", "h2o", "snapkv")
POOL = 5  # neighbours whose marks snapkv averages
MAX_BLOCK = 128  # tokens between two borders


def block_size(k: int, window: int) -> int:
  """Returns the number of tokens between two borders: a sixteenth of the budget, up to MAX_BLOCK.

  With a budget below 32 keys every token is a border, as in the published TOVA and H2O.
  """
  return max(1, min(MAX_BLOCK, (k + window) // 16))


class Kept(NamedTuple):
  """Keys of a document that are kept: k slots, and the last `window` tokens in their order.

  Attributes:
    rows: arrays [B, G, k + window, D]: keys, or keys and values; slots first.
    mark: [B, G, k + window] float32.
    position: [B, G, k] int32, of the tokens in the slots, NOWHERE in an empty slot.
    plan: [B, G, block_size] int32: the slot of each token that leaves the window between two
      borders, NOWHERE for a loser.
  """

  rows: tuple[jax.Array, ...]
  mark: jax.Array
  position: jax.Array
  plan: jax.Array


class Seen(NamedTuple):
  """Keys that L queries saw, of the M = k + window + L in the slots, the window and their own.

  Attributes:
    weights: [B, G, R, L, M] float32, of the R query heads of a KV head.
    rows: arrays [B, G, M, D].
    evicted: [B, G, L] int32, position of the token that no query sees from this one on; NOWHERE
      where there is none.
  """

  weights: jax.Array
  rows: tuple[jax.Array, ...]
  evicted: jax.Array


def nothing_kept(batch: int, groups: int, k: int, window: int, *rows: tuple[int, Any]) -> Kept:
  """Returns what is kept before the first token; `rows` are (D, dtype) of each array of rows."""
  full = lambda size, fill, dtype: jnp.full((batch, groups, size), fill, dtype)
  return Kept(
    tuple(jnp.zeros((batch, groups, k + window, dim), dtype) for dim, dtype in rows),
    full(k + window, 0, jnp.float32),
    full(k, NOWHERE, jnp.int32),
    full(block_size(k, window), NOWHERE, jnp.int32),
  )


def _take(x, index):
  """Returns x [B, G, M, ...] at index [B, G or 1, I]."""
  index = index.reshape(*index.shape, *[1] * (x.ndim - 3))
  return jnp.take_along_axis(x, index, axis=2, mode="clip")


def smoothed(mark: jax.Array) -> jax.Array:
  """Averages marks [B, G, M] over POOL neighbours, 0 where there is none."""
  side = jnp.pad(mark, ((0, 0), (0, 0), (POOL // 2, POOL // 2)))
  return jnp.mean(jnp.stack([side[..., t : t + mark.shape[-1]] for t in range(POOL)]), axis=0)


def _planned(rule, kept, seen):
  """Makes the plan of the border before token `seen` [B]."""
  k, size = kept.position.shape[-1], kept.plan.shape[-1]
  window = kept.mark.shape[-1] - k
  # empty slots first, then by position
  by_position = jnp.argsort(jnp.where(kept.position < NOWHERE, kept.position, -1), axis=-1)
  filled = _take(kept.position, by_position) < NOWHERE
  mark = jnp.concatenate([_take(kept.mark, by_position), kept.mark[..., k:]], axis=-1)
  mark = smoothed(mark) if rule == "snapkv" else mark
  leaving = jnp.pad(mark[..., k:], ((0, 0), (0, 0), (0, size)), constant_values=jnp.inf)[..., :size]
  exists = (seen[:, None] + jnp.arange(size) >= window)[:, None]
  candidates = jnp.concatenate(
    [jnp.where(filled, mark[..., :k], -jnp.inf), jnp.where(exists, leaving, -jnp.inf)], axis=-1
  )
  best_first = lax.top_k(candidates, k + size)[1]
  rank = jnp.argsort(best_first, axis=-1)
  wins = rank[..., k:] < k
  worst_first = best_first[..., ::-1]
  slots = _take(worst_first, jnp.argsort(worst_first >= k, axis=-1, stable=True))
  slot = _take(by_position, _take(slots, jnp.cumsum(wins, axis=-1) - 1))
  mark = jnp.zeros_like(kept.mark) if rule == "snapkv" else kept.mark
  return kept._replace(plan=jnp.where(wins, slot, NOWHERE), mark=mark)


def advance(
  rule: str,
  kept: Kept,
  seen: jax.Array,
  count: jax.Array,
  query: jax.Array,
  rows: tuple[jax.Array, ...],
  scale: float,
) -> tuple[Kept, Seen]:
  """Lets queries see what is kept and each other's keys, and keeps what the next ones may see.

  Args:
    rule: out of RULES.
    kept: before these tokens.
    seen: [B], tokens of the document before.
    count: [B], how many of the L new tokens exist; no border may lie between them.
    query: [B, L, H, D].
    rows: arrays [B, L, G, D] of the new tokens.
    scale: of the logits.
  """
  batch, length, heads, dim = query.shape
  k, size = kept.position.shape[-1], kept.plan.shape[-1]
  groups, window = kept.mark.shape[1], kept.mark.shape[-1] - k
  border = (seen % size == 0) & (count > 0)

  def planned(kept):
    new = _planned(rule, kept, seen)
    choose = lambda x, y: jnp.where(border[:, None, None], x, y)
    return kept._replace(plan=choose(new.plan, kept.plan), mark=choose(new.mark, kept.mark))

  kept = lax.cond(jnp.any(border), planned, lambda kept: kept, kept)
  c = jnp.arange(length, dtype=jnp.int32)
  leaving = seen[:, None] + c - window  # [B, L], the token that leaves the window before query c
  leaves = (leaving >= 0) & (c < count[:, None])
  slot = jnp.where(leaves[:, None], _take(kept.plan, (seen[:, None] % size + c)[:, None]), NOWHERE)
  b, g = jnp.ogrid[:batch, :groups]
  # the query from which a slot holds its next token
  change = jnp.full((batch, groups, k), length, jnp.int32)
  change = change.at[b[..., None], g[..., None], slot].set(c, mode="drop")
  changes = change < length

  i, m = c[:, None], jnp.arange(window + length)  # of the window and the new tokens
  in_slot = (kept.position < NOWHERE)[:, :, None] & (i < change[:, :, None])
  wins = jnp.pad(slot < NOWHERE, ((0, 0), (0, 0), (0, window)))
  near = (m <= i + window) & ((m > i) | wins[:, :, None])
  near &= (seen[:, None] + m >= window)[:, None, None]
  visible = jnp.concatenate([in_slot, near], axis=-1)[:, :, None]  # [B, G, 1, L, M]

  heads_first = lambda x: jnp.swapaxes(x, 1, 2)
  local = tuple(
    jnp.concatenate([old, heads_first(new)], axis=2) for old, new in zip(kept.rows, rows)
  )
  exact = lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
  logits = scale * jnp.einsum(
    "bcgrd,bgmd->bgrcm",
    query.reshape(batch, length, groups, heads // groups, dim),
    local[0],
    preferred_element_type=jnp.float32,
    precision=exact,
  )
  weights = jax.nn.softmax(jnp.where(visible, logits, LOWEST), axis=-1)

  received = jnp.mean(weights, axis=2)  # [B, G, L, M]
  before = jnp.pad(kept.mark, ((0, 0), (0, 0), (0, length)))
  if rule == "tova":
    received = jnp.broadcast_to(jnp.mean(received, axis=1, keepdims=True), received.shape)
    last = _take(received, jnp.maximum(count - 1, 0)[:, None, None])[:, :, 0]
    mark = jnp.where((count > 0)[:, None, None], last, before)
  else:
    exists = (c < count[:, None])[:, None, :, None]
    mark = before + jnp.sum(jnp.where(exists, received, 0), axis=2)

  index = jnp.where(changes, k + change, jnp.arange(k))
  ring = jnp.broadcast_to(
    (k + count[:, None] + jnp.arange(window))[:, None], (batch, groups, window)
  )
  index = jnp.concatenate([index, ring], axis=-1)
  position = jnp.where(changes, (seen - window)[:, None, None] + change, kept.position)
  evicted = jnp.where(slot < NOWHERE, _take(kept.position, slot), leaving[:, None])
  evicted = jnp.where(leaves[:, None], evicted, NOWHERE)
  new = Kept(tuple(_take(x, index) for x in local), _take(mark, index), position, kept.plan)
  return new, Seen(weights, local, evicted)


def over_blocks(
  rule: str,
  kept: Kept,
  query: jax.Array,
  rows: tuple[jax.Array, ...],
  start: jax.Array,
  end: jax.Array,
  count: jax.Array,
  scale: float,
  write: Callable[[jax.Array, jax.Array, Seen], jax.Array],
  out: jax.Array,
) -> tuple[Kept, jax.Array]:
  """Advances over rows of tokens, from border to border.

  Args:
    rule, kept, scale: as in `advance`.
    query, rows: as in `advance`, of n tokens.
    start, end: [B, n], index of the first token of each token's document, below 0 where it came
      before, and one past its last.
    count: [B], how many of a row's tokens exist.
    write: takes `out`, the indices [B, L] of L tokens, n for those that do not exist, and what they
      saw; returns the next `out`.
    out: what `write` gets first.

  Returns:
    What is kept after the rows, and the last `out`.
  """
  n, size = query.shape[1], kept.plan.shape[-1]
  length = min(size, n)

  def body(carry):
    done, kept, out = carry
    at = lambda x: jnp.take_along_axis(x, jnp.minimum(done, n - 1)[:, None], axis=1)[:, 0]
    seen = done - at(start)
    here = jnp.minimum(size - seen % size, jnp.minimum(at(end), count) - done)
    here = jnp.where(done < count, here, 0)
    index = done[:, None] + jnp.arange(length, dtype=jnp.int32)
    new = lambda x: jnp.take_along_axis(x, jnp.minimum(index, n - 1)[..., None, None], axis=1)
    is_first = (seen == 0)[:, None, None]
    kept = kept._replace(position=jnp.where(is_first, NOWHERE, kept.position))
    kept, what = advance(rule, kept, seen, here, new(query), tuple(map(new, rows)), scale)
    index = jnp.where(jnp.arange(length) < here[:, None], index, n)
    return done + here, kept, write(out, index, what)

  unfinished = lambda carry: jnp.any(carry[0] < count)
  _, kept, out = lax.while_loop(unfinished, body, (jnp.zeros_like(count), kept, out))
  return kept, out


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7))
def expiries(
  rule: str,
  query: jax.Array,
  key: jax.Array,
  start: jax.Array,
  end: jax.Array,
  k: int,
  window: int,
  scale: float,
) -> jax.Array:
  """Returns the first query that no longer sees each token, [B, G, n] int32, as `select` does.

  A token is in a slot for the queries from `window` after it up to there.

  Args:
    rule: out of RULES.
    query, key: [B, n, H, D] and [B, n, G, D].
    start, end: [B, n], from `document_bounds`.
    k, window: at most n.
    scale: of the logits.
  """
  batch, n, groups, dim = key.shape
  b, g = jnp.ogrid[:batch, :groups]

  def write(expiry, index, what):
    first = jnp.take_along_axis(start, jnp.minimum(index[:, :1], n - 1), axis=1)  # of the document
    token = jnp.where(what.evicted < NOWHERE, first[..., None] + what.evicted, n)
    return expiry.at[b[..., None], g[..., None], token].set(index[:, None], mode="drop")

  return over_blocks(
    rule,
    nothing_kept(batch, groups, k, window, (dim, key.dtype)),
    query,
    (key,),
    start,
    end,
    jnp.full(batch, n, jnp.int32),
    scale,
    write,
    jnp.broadcast_to(end[:, None], (batch, groups, n)),
  )[1]


def evicting_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  rule: str,
  k: int,
  window: int,
  segment_ids: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Attends from every query to its `window` latest tokens and to k slots, in time linear in n.

  Queries, keys and values have gradients for the keys that are seen; the choice has none.

  Args:
    query, key, value, k, window, segment_ids: as in `sparsek.sparsek_attention`.
    rule: out of RULES.
    implementation: of the attention to what is chosen: "xla", "mosaic_gpu", "mosaic_mma",
      "mosaic_tpu", or None for the fastest that can run.

  Returns:
    [batch, n, H, D] in query's dtype.

  Raises:
    ValueError, NotImplementedError: as `sparsek.sparsek_attention`.
  """
  check_arguments(query, key, value, None, k, window, "straight_through", None, segment_ids)
  check_choice("implementation", implementation, (None, "xla", *PALLAS))
  batch, n, groups, dim = key.shape
  k, window, scale = min(int(k), n), min(int(window), n), dim**-0.5
  if not query.size:
    return query
  chosen = choose_implementation(implementation, query, segment_ids, window).implementation
  if chosen == "cudnn":  # the window holds the row
    return cudnn.attention(query, key, value, window=window, scale=scale)
  start, end = document_bounds(segment_ids, batch, n)
  expiry = jnp.broadcast_to(end[:, None], (batch, groups, n))
  if k + window < n:
    seen = map(lax.stop_gradient, (query, key))
    (expiry,) = saved(expiries(rule, *seen, start, end, k, window, scale))
  order = expiry  # which XLA does not read
  if chosen in PALLAS:
    (order,) = saved(order_by_expiry(expiry, devices.can_run_portable()))
  zeros = jnp.zeros((batch, groups, n), jnp.float32)
  options = Options(k, window, "straight_through", scale)
  selection = zeros, expiry, order
  return attend_selected(chosen, query, key, value, zeros, selection, start, end, options)
