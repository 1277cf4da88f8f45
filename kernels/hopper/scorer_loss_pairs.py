"""Pairs of a tile of queries and a block of keys in the second pass of the scorers' loss on Hopper
GPUs (scorer_loss_gradients.py): what their attention adds to the sums of the keys.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from sparsek.kernels.hopper.common import COLUMN, HALF, LOG2_E, by_column, by_row
from sparsek.kernels.hopper.scorer_loss_sums import BLOCK_KV

BLOCK = 32  # queries of a tile
LN_2 = math.log(2)
SHAPE = HALF, BLOCK  # keys of a warpgroup by queries


def first_key(program: Any, i: Any) -> Any:
  """Returns the first key of the program's i-th block."""
  return (program.split + i * program.options.grid["split"]) * BLOCK_KV


def add_whole(
  program: Any,
  i: Any,
  tile: Any,
  slot: Any,
  score: jax.Array,
  attention: jax.Array,
  log2_attention: jax.Array,
  loss: jax.Array,
  dscore: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Adds a tile of queries of which all keys of the block are candidates.

  Args:
    program: the Program of scorer_loss_gradients.
    i: number of the block of keys.
    tile: number of the tile of queries.
    slot: of the buffer of queries.
    score: [64].
    attention, log2_attention: [64, 32], averaged over the heads.
    loss, dscore: [64], sums so far.

  Returns:
    The next sums.
  """
  registers, queries, tiles = (
    program.options.registers,
    program.scratch.queries,
    program.inputs.tiles,
  )
  top, log_total, weight = (
    registers.vector(x.at[slot], COLUMN)
    for x in (queries.top_score, queries.log_total, queries.weight)
  )
  reference, expected = (
    x[program.b, program.g, tile] + 0 for x in (tiles.top_score, tiles.expected)
  )
  weighted = by_column(weight, SHAPE) * attention
  information = log2_attention * LN_2 + by_column(top - reference + log_total, SHAPE)
  mass, log_expected = weighted.sum(axis=1), score - reference
  loss += (weighted * information).sum(axis=1)
  loss -= jnp.where(mass > 0, mass * log_expected, 0.0)
  return loss, dscore + (jnp.exp2(log_expected * LOG2_E) * expected - mass)


def add_part(
  program: Any,
  i: Any,
  tile: Any,
  slot: Any,
  score: jax.Array,
  attention: jax.Array,
  log2_attention: jax.Array,
  loss: jax.Array,
  dscore: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Adds a tile of queries of which some keys of the block are candidates; as `add_whole`."""
  del tile
  of_queries, candidate = (
    functools.partial(_of_queries, program, slot),
    _candidates(program, i, slot),
  )
  log_expected = by_row(score, SHAPE) - of_queries("top_score") - of_queries("log_total")
  expected = of_queries("expected") * jnp.exp2(log_expected * LOG2_E)
  weighted = of_queries("weight") * jnp.where(candidate, attention, 0.0)
  dscore += jnp.where(candidate, expected - weighted, 0.0).sum(axis=1)
  information = weighted * (log2_attention * LN_2 - log_expected)
  return loss + jnp.where(weighted > 0, information, 0.0).sum(axis=1), dscore


def largest_whole(
  program: Any,
  i: Any,
  tile: Any,
  slot: Any,
  score: jax.Array,
  attention: jax.Array,
  log2_attention: jax.Array,
  loss: jax.Array,
  largest: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Adds to the largest attention that keys were paid what a tile of queries pays of which all keys
  of the block are candidates; as `add_whole`.
  """
  del program, i, tile, slot, score, log2_attention
  return loss, jnp.maximum(largest, attention.max(axis=1))


def largest_part(
  program: Any,
  i: Any,
  tile: Any,
  slot: Any,
  score: jax.Array,
  attention: jax.Array,
  log2_attention: jax.Array,
  loss: jax.Array,
  largest: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Adds the same of a tile of queries of which some keys of the block are candidates."""
  del tile, score, log2_attention
  attention = jnp.where(_candidates(program, i, slot), attention, 0.0)
  return loss, jnp.maximum(largest, attention.max(axis=1))


def _of_queries(program: Any, slot: Any, name: str) -> jax.Array:
  """Loads a vector of queries for each of the pairs."""
  vector = getattr(program.scratch.queries, name).at[slot]
  return by_column(program.options.registers.vector(vector, COLUMN), SHAPE)


def _candidates(program: Any, i: Any, slot: Any) -> jax.Array:
  """Returns which keys of this warpgroup's part of a block are candidates of which queries."""
  first = first_key(program, i) + program.warpgroup * HALF
  row = program.options.registers.index(SHAPE, 0) + first
  last, start = (_of_queries(program, slot, name) for name in ("last", "start"))
  return jnp.logical_and(row <= last, row >= start)
