"""Pairs of a tile of queries and a block of keys in the second pass of the scorers' loss on Hopper
GPUs (scorer_loss_gradients.py): what their attention adds to the sums of the keys.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsek.kernels.hopper.common import COLUMN, HALF, LOG2_E, by_column, by_row
from sparsek.kernels.hopper.scorer_loss_sums import BLOCK_KV

BLOCK = 32  # queries of a tile
LN_2 = math.log(2)
SHAPE = HALF, BLOCK  # keys of a warpgroup by queries


class Pairs(NamedTuple):
  """Pairs of a tile of queries and a warpgroup's part of a block of keys.

  Attributes:
    program: the Program of scorer_loss_gradients.
    i: number of the block of keys.
    tile: number of the tile of queries.
    slot: of the buffer of queries.
    score: [64].
    attention, log2_attention: [64, 32], averaged over the heads.
  """

  program: Any
  i: Any
  tile: Any
  slot: Any
  score: jax.Array
  attention: jax.Array
  log2_attention: jax.Array


def first_key(program: Any, i: Any) -> Any:
  """Returns the first key of the program's i-th block."""
  return (program.split + i * program.options.grid["split"]) * BLOCK_KV


def add_whole(pairs: Pairs, loss: jax.Array, dscore: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Adds a tile of queries of which all keys of the block are candidates.

  Args:
    pairs: see Pairs.
    loss, dscore: [64], sums so far.

  Returns:
    The next sums.
  """
  program, tiles = pairs.program, pairs.program.inputs.tiles
  top, log_total, weight = (_vector(pairs, name) for name in ("top_score", "log_total", "weight"))
  reference, expected = (
    x[program.b, program.g, pairs.tile] + 0 for x in (tiles.top_score, tiles.expected)
  )
  weighted = by_column(weight, SHAPE) * pairs.attention
  information = pairs.log2_attention * LN_2 + by_column(top - reference + log_total, SHAPE)
  mass, log_expected = weighted.sum(axis=1), pairs.score - reference
  loss += (weighted * information).sum(axis=1)
  loss -= jnp.where(mass > 0, mass * log_expected, 0.0)
  return loss, dscore + (jnp.exp2(log_expected * LOG2_E) * expected - mass)


def add_part(pairs: Pairs, loss: jax.Array, dscore: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Adds a tile of queries of which some keys of the block are candidates; as `add_whole`."""
  of_queries, candidate = functools.partial(_of_queries, pairs), _candidates(pairs)
  log_expected = by_row(pairs.score, SHAPE) - of_queries("top_score") - of_queries("log_total")
  expected = of_queries("expected") * jnp.exp2(log_expected * LOG2_E)
  weighted = of_queries("weight") * jnp.where(candidate, pairs.attention, 0.0)
  dscore += jnp.where(candidate, expected - weighted, 0.0).sum(axis=1)
  information = weighted * (pairs.log2_attention * LN_2 - log_expected)
  return loss + jnp.where(weighted > 0, information, 0.0).sum(axis=1), dscore


def largest_whole(pairs: Pairs, loss: jax.Array, largest: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Adds to the largest attention that keys were paid what a tile of queries pays of which all keys
  of the block are candidates; as `add_whole`.
  """
  return loss, jnp.maximum(largest, pairs.attention.max(axis=1))


def largest_part(pairs: Pairs, loss: jax.Array, largest: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Adds the same of a tile of queries of which some keys of the block are candidates."""
  attention = jnp.where(_candidates(pairs), pairs.attention, 0.0)
  return loss, jnp.maximum(largest, attention.max(axis=1))


def _vector(pairs: Pairs, name: str) -> jax.Array:
  """Loads a vector of queries."""
  program = pairs.program
  vector = getattr(program.scratch.queries, name).at[pairs.slot]
  return program.options.registers.vector(vector, COLUMN)


def _of_queries(pairs: Pairs, name: str) -> jax.Array:
  """Loads a vector of queries for each of the pairs."""
  return by_column(_vector(pairs, name), SHAPE)


def _candidates(pairs: Pairs) -> jax.Array:
  """Returns which keys of this warpgroup's part of a block are candidates of which queries."""
  program = pairs.program
  first = first_key(program, pairs.i) + program.warpgroup * HALF
  row = program.options.registers.index(SHAPE, 0) + first
  last, start = (_of_queries(pairs, name) for name in ("last", "start"))
  return jnp.logical_and(row <= last, row >= start)
