"""Backward pass of SPARSEK attention on TPUs, which recomputes the softmax from the logsumexp. See
grid.py for the blocks.

`query_gradients`: gradients of the queries, thresholds and listed tokens; its steps go over the
same tiles as those of the forward pass.

  step t of block i                           VMEM (scratch)
  ------------------------------------------  ------------------------------------------------------
  t = 0: clear query, tau                     query   R, parts, D, rows   float32
  t < list_tiles: if the tile holds tokens,   tau     parts, 1, rows      float32
    clear listed; visit it; write listed      listed  as a tile of Keys   float32
  else: if not beyond the block's last tile,  For 1 head, 2048 queries, D = 128 and tiles of 512:
    visit it                                  1 MiB, 8 KiB, 514 KiB.
  last t: write query, tau

`near_gradients`: gradients of the near tokens; here the third axis of the grid numbers blocks of
keys, and the steps go over the blocks of queries that may see them.

  step t of block j                           VMEM (scratch)
  ------------------------------------------  ------------------------------------------------------
  t = 0: clear the sums                       key, value  tiles, keys, D   float32   1 MiB each
  while block j + t is in reach: for each     score       tiles, 1, keys   float32   8 KiB
    tile of the block, visit it
  last t: write the sums

  Steps wait for nothing but the blocks that Pallas fetches for them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sparsek.kernels.gates import tile_gradients, tile_weights
from sparsek.kernels.tpu.grid import (
  A_B,
  A_BT,
  AT_B,
  Bounds,
  Grid,
  Inputs,
  Keys,
  Leaf,
  Outputs,
  Pairs,
  Queries,
  Static,
  as_row,
  dot,
)


class KeyGradients(NamedTuple):
  """Gradients of Keys, or memory for their sums, float32."""

  key: Leaf
  value: Leaf
  score: Leaf


class QueryGradients(NamedTuple):
  """Gradients of the queries, of the thresholds (float32) and of the listed tokens, if any."""

  query: Leaf
  tau: Leaf
  listed: KeyGradients | None


def query_gradients(
  queries: Queries,
  outputs: Outputs,
  listed: Keys | None,
  near: Keys,
  bounds: Bounds,
  static: Static,
) -> QueryGradients:
  """Computes the gradients of queries, thresholds and listed tokens."""
  grid = Grid(queries, listed, near, static)
  query_specs, output_specs = grid.specs(lambda b, g, i, t, bounds: i)
  list_specs, size = grid.list_specs() if listed else None, static.tiling.listed
  list_sums = KeyGradients(
    grid.buffer(size, grid.dim), grid.buffer(size, grid.dim), grid.buffer(1, size)
  )
  return grid.call(
    functools.partial(_query_kernel, grid),
    grid.list_tiles + grid.near_tiles,
    bounds,
    (
      Inputs(queries, outputs, listed, near),
      Inputs(query_specs, output_specs, list_specs, grid.near_specs()),
    ),
    (
      QueryGradients(
        jax.ShapeDtypeStruct(queries.query.shape, queries.query.dtype),
        _like(queries.tau),
        KeyGradients(*map(_like, listed[:3])) if listed else None,
      ),
      QueryGradients(
        query_specs.query, query_specs.tau, KeyGradients(*list_specs[:3]) if list_specs else None
      ),
    ),
    QueryGradients(
      grid.buffer(grid.heads, grid.parts, grid.dim, grid.rows),
      grid.buffer(grid.parts, 1, grid.rows),
      list_sums if listed else None,
    ),
    grid.flops(5, 3),
    grid.extra_key_bytes(near),
  )


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, jnp.float32)


def _query_kernel(
  grid: Grid, bounds: Bounds, inputs: Inputs, results: QueryGradients, sums: QueryGradients
) -> None:
  listed = inputs.listed
  b, g, i, t = (pl.program_id(axis) for axis in range(4))

  @pl.when(t == 0)
  def clear():
    sums.query[...] = jnp.zeros_like(sums.query)
    sums.tau[...] = jnp.zeros_like(sums.tau)

  visit = functools.partial(_visit, grid.static, inputs, sums)
  if listed is not None:
    list_results, list_sums = results.listed, sums.listed
    assert list_results is not None and list_sums is not None

    @pl.when(t < bounds.listed[grid.flat(b, g, i)])
    def add_listed():
      for x in list_sums:
        x[...] = jnp.zeros_like(x)
      grid.for_listed_pairs(i, listed, visit(listed, list_sums))
      _store_key_gradients(list_results, list_sums, grid.static.scale)

  tile = grid.near_tile(b, i, t, bounds)
  window_start = inputs.queries.window_start
  pl.when((t >= grid.list_tiles) & (tile <= grid.last_tile(i)))(
    lambda: grid.for_near_pairs(
      b, g, i, tile, inputs.near, window_start, bounds, visit(inputs.near)
    )
  )

  @pl.when(t == pl.num_programs(3) - 1)
  def finish():
    results.tau[...] = sums.tau[...]

    def store_query(*at):
      gradient = jnp.transpose(sums.query[at] * grid.static.scale)
      results.query[at] = gradient.astype(results.query.dtype)

    grid.for_each_part(store_query)


def _visit(
  static: Static,
  inputs: Inputs,
  sums: QueryGradients,
  keys: Keys,
  key_sums: KeyGradients | None = None,
) -> Callable:
  """Returns a function that adds the gradients of some queries from a tile of keys, and with
  `key_sums` also those of the keys.
  """

  def run(head, part, pairs: Pairs):
    at = head, part
    ds, dgates, weights = _gradients(static, inputs, keys, at, pairs)
    sums.query[at] += dot(keys.key[...], ds.astype(keys.key.dtype), AT_B)
    if dgates is not None:
      sums.tau[part] -= jnp.sum(dgates, axis=0, keepdims=True)
    if key_sums:
      _add_to_keys(key_sums, inputs, at, ds, dgates, weights)

  return run


def _gradients(
  static: Static, inputs: Inputs, keys: Keys, at: tuple, pairs: Pairs
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
  """Returns the gradients of the scaled logits, those of the gates or None, and the weights of the
  values, of one tile and some queries.
  """
  queries, outputs = inputs.queries, inputs.outputs
  assert outputs is not None
  s = dot(keys.key[...], queries.query[at], A_BT) * static.scale
  dp = dot(keys.value[...], outputs.cotangent[at], A_BT)

  def probability(logits):
    return jnp.where(pairs.visible, jnp.exp(logits - outputs.logsumexp[at]), 0.0)

  distance = pairs.distance(queries.tau[at[1]])
  p, gates, weights = tile_weights(s, probability, distance, gate=static.gate)
  ds, of_gates = tile_gradients(
    s, p, gates, dp, outputs.delta[at], distance, gate=static.gate, scale=1.0
  )
  return ds, of_gates and of_gates(), weights


def _add_to_keys(
  sums: KeyGradients,
  inputs: Inputs,
  at: tuple,
  ds: jax.Array,
  dgates: jax.Array | None,
  weights: jax.Array,
) -> None:
  """Adds the gradients of a tile's keys, values and scores from some queries."""
  assert inputs.outputs is not None
  query, cotangent = inputs.queries.query, inputs.outputs.cotangent
  sums.key[...] += dot(ds.astype(query.dtype), query[at], A_B)
  sums.value[...] += dot(weights.astype(cotangent.dtype), cotangent[at], A_B)
  if dgates is not None:
    sums.score[...] += as_row(jnp.sum(dgates, axis=1, keepdims=True))


def _store_key_gradients(results: KeyGradients, sums: KeyGradients, scale: float) -> None:
  results.key[...] = sums.key[...] * scale
  results.value[...] = sums.value[...]
  results.score[...] = sums.score[...]


def near_gradients(
  queries: Queries, outputs: Outputs, near: Keys, bounds: Bounds, static: Static
) -> KeyGradients:
  """Computes the gradients of the near tokens."""
  grid = Grid(queries, None, near, static)
  query_specs, output_specs = grid.specs(
    lambda b, g, j, t, bounds: jnp.minimum(j + t, bounds.reach[b * grid.blocks + j])
  )
  tiles = grid.queries // grid.keys
  key_specs = grid.key_specs(grid.keys, lambda b, g, j, t, bounds: j, tiles)
  matrix = tiles, grid.keys, grid.dim
  return grid.call(
    functools.partial(_near_kernel, grid, tiles),
    grid.reach,
    bounds,
    (Inputs(queries, outputs, None, near), Inputs(query_specs, output_specs, None, key_specs)),
    (KeyGradients(*map(_like, near[:3])), KeyGradients(*key_specs[:3])),
    KeyGradients(grid.buffer(*matrix), grid.buffer(*matrix), grid.buffer(tiles, 1, grid.keys)),
    grid.flops(0, 4),
    (queries.query.nbytes + outputs.cotangent.nbytes) * (grid.reach - 1),
  )


def _near_kernel(
  grid: Grid, tiles: int, bounds: Bounds, inputs: Inputs, results: KeyGradients, sums: KeyGradients
) -> None:
  b, g, j, t = (pl.program_id(axis) for axis in range(4))

  @pl.when(t == 0)
  def clear():
    for x in sums:
      x[...] = jnp.zeros_like(x)

  def visit_tile(c):
    keys = Keys(*(x.at[c] for x in inputs.near))
    of_keys = KeyGradients(*(x.at[c] for x in sums))

    def visit(head, part, pairs):
      at = head, part
      _add_to_keys(of_keys, inputs, at, *_gradients(grid.static, inputs, keys, at, pairs))

    window_start = inputs.queries.window_start
    grid.for_near_pairs(b, g, j + t, j * tiles + c, keys, window_start, bounds, visit)

  @pl.when(j + t <= bounds.reach[b * grid.blocks + j])
  def add():
    pl.loop(0, tiles)(visit_tile)

  pl.when(t == pl.num_programs(3) - 1)(
    lambda: _store_key_gradients(results, sums, grid.static.scale)
  )
