"""Selection for one new token on NVIDIA GPUs where the attention kernel cannot make it, because
several programs read the rows of a KV head: one kernel updates the caches of all layers in place,
before the first layer runs. It does not depend on the new token.

A program of one warpgroup serves one layer, row and KV head; each lane reads every 128th slot.

  each lane                       worst of its slots
  each warp                       worst of its lanes              -> worst[warp]
  wait for `program` barrier
  each lane                       worst of the four; if the token that leaves the window scores
                                  higher: copy its key and value to that slot, write its score and
                                  position

  shared memory    shape   type                    bytes
  worst            4       float32, int32, int32   16 each: score, position and index
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.hopper.row_preparation import Ref
from sparsek.kernels.hopper.thread_ops import (
  contents,
  gather,
  gather_bytes,
  kernel,
  scatter,
  scatter_bytes,
)
from sparsek.kernels.hopper.thread_registers import LANES, shuffle_xor
from sparsek.kernels.hopper.thread_sync import sync_threads


class Rows(NamedTuple):
  """A layer's cache; for a layer that selects nothing k is 0, and all but keys and values are None.

  Attributes:
    key, value: [B, G, k + window, D], first the slots, then the window.
    score: [B, G, k + window] of the tokens in them.
    position: [B, G, k] of the selected tokens.
    pending: [B, G, window], scores of the window's tokens.
    moments: four of [B, G]: mean and deviation of the scorer's logits, and their rounding errors.
  """

  key: jax.Array
  value: jax.Array
  score: jax.Array | None = None
  position: jax.Array | None = None
  pending: jax.Array | None = None
  moments: tuple[jax.Array, ...] | None = None


class Token(NamedTuple):
  """Score, position and slot of a selected token, one a lane."""

  score: Any
  position: Any
  slot: Any


class Refs(NamedTuple):
  """References of `evict`: seen and active, the layers (without moments), and in shared memory the
  worst token of each warp.
  """

  seen: Ref
  active: Ref
  layers: list[Rows]
  worst: Token


@jax.jit
def evict(layers: list[Rows], seen: jax.Array, active: jax.Array) -> list[Rows]:
  """Moves the token that leaves each window to the slot of the worst selected token if it scores
  higher, as in `cached_attention.attend_token`.

  Args:
    layers: caches of the layers that select.
    seen, active: [B] int32: tokens before the new one; 0 for batch rows that stay as they are.

  Returns:
    The updated caches.
  """
  batch, groups, _, _ = layers[0].key.shape
  worst = Token(*(plgpu.SMEM((4,), dtype) for dtype in (jnp.float32, jnp.int32, jnp.int32)))
  arrays = [layer._replace(moments=None) for layer in layers]
  structure = jax.tree.structure(Refs(seen, active, arrays, worst))

  def body(row, number, lane, *flat_refs):
    refs = jax.tree.unflatten(structure, flat_refs)
    b, g = row // groups, row % groups
    for i in range(len(layers)):
      pl.when(number == i)(functools.partial(_evict_from_layer, refs, refs.layers[i], b, g, lane))

  of_layers, structure_of_layers = jax.tree.flatten(arrays)
  cache_refs = list(map(jax.new_ref, of_layers))
  kernel(body, batch * groups, LANES, len(layers), name="evict", scratch_types=list(worst))(
    seen, active, *cache_refs
  )
  moved = jax.tree.unflatten(structure_of_layers, contents(*cache_refs))
  return [new._replace(moments=old.moments) for new, old in zip(moved, layers)]


def _evict_from_layer(refs: Refs, rows: Rows, b: jax.Array, g: jax.Array, lane: jax.Array) -> None:
  assert rows.score is not None and rows.position is not None and rows.pending is not None
  (slots,), (window,), dim = rows.position.shape[2:], rows.pending.shape[2:], rows.key.shape[3]
  seen = refs.seen[b]
  arriving = gather(rows.pending.at[b, g], lane * 0 + lax.rem(seen, jnp.int32(window)))
  # `lane * 0 +` makes arrays of scalar integers; PARAMS in thread_ops.py says why.
  lives = ((lane * 0 + refs.active[b]) > 0) & ((lane * 0 + seen) >= window)
  arriving = jnp.where(lives, arriving, -jnp.inf)
  worst = worst_slot(rows.score.at[b, g], rows.position.at[b, g], slots, lane, LANES)
  worst = worst_of_all(refs.worst, worst, lane, 4, sync_threads)
  enters, part = arriving > worst.score, (lane & (dim // 8 - 1)) * 8
  for ref in (rows.key, rows.value):
    words = gather_bytes(
      ref.at[b, g], lane * 0 + (slots + lax.rem(seen, jnp.int32(window))), part, dim
    )
    scatter_bytes(ref.at[b, g], worst.slot, part, dim, words, enters & (lane < dim // 8))
  scatter(rows.score.at[b, g], worst.slot, arriving, enters & (lane == 0))
  scatter(rows.position.at[b, g], worst.slot, lane * 0 + (seen - window), enters & (lane == 0))


def worst_slot(score: Ref, position: Ref, slots: int, first: jax.Array, step: int) -> Token:
  """Returns the worst of the slots that each lane reads: every step-th from `first` on."""
  worst = None
  for start in range(0, slots, step):
    index = jnp.minimum(first + start, slots - 1)  # lanes beyond the last slot repeat it
    token = Token(gather(score, index), gather(position, index), index)
    worst = token if worst is None else _worse(worst, token)
  assert worst is not None, "a layer that selects has slots"
  return worst


def worst_of_all(
  shared: Token, worst: Token, lane: jax.Array, warps: int, wait: Callable[[], None]
) -> Token:
  """Returns the worst token of all lanes, in every lane.

  Args:
    shared: references in shared memory, one number a warp.
    worst: of each lane.
    lane: its number among all.
    warps: that these lanes are in.
    wait: waits for all of them.
  """
  for distance in (16, 8, 4, 2, 1):
    worst = _worse(worst, Token(*(shuffle_xor(x, distance) for x in worst)))
  for ref, x in zip(shared, worst):
    scatter(ref, lane >> 5, x, (lane & 31) == 0)
  wait()
  of_warp = [Token(*(gather(ref, lane * 0 + warp) for ref in shared)) for warp in range(warps)]
  return functools.reduce(_worse, of_warp)


def _worse(a: Token, b: Token) -> Token:
  """Returns the one of two tokens to give up first: that of lower score, then of later position,
  then of lower slot.
  """
  first = (a.score < b.score) | (
    (a.score == b.score)
    & ((a.position > b.position) | ((a.position == b.position) & (a.slot < b.slot)))
  )
  return Token(*(jnp.where(first, x, y) for x, y in zip(a, b)))
