"""Forward pass of SPARSEK attention on TPUs: one online softmax over the tiles of a block's list,
then over its near tiles. See grid.py for the blocks.

  step t of block i                           inputs, fetched by Pallas for the step
  ------------------------------------------  ------------------------------------------------------
  t = 0: clear top, total, acc                queries of the block, at the first step only
  t < list_tiles: if the tile holds tokens,   tile t of the list
    visit it
  else: if not beyond the block's last tile,  near tile t - list_tiles, counted from the start of
    visit it                                  the first query's window
  last t: out = acc / total, logsumexp        written by Pallas after the last step

  A visit goes over all heads and parts of `rows` queries: S = key query^T, softmax, gates,
  acc += value^T W.

  VMEM (scratch)   shape                  type      bytes for 1 head, 2048 queries, D = 128
  top, total       R, parts, 1, rows      float32     8 KiB each
  acc              R, parts, D, rows      float32     1 MiB
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sparsek.kernels.gates import tile_weights
from sparsek.kernels.tpu.grid import (
  A_BT,
  AT_B,
  Bounds,
  Grid,
  Inputs,
  Keys,
  Leaf,
  Pairs,
  Queries,
  Static,
  dot,
)


class Results(NamedTuple):
  """The output [B, G, R, n / rows, rows, D], and its logsumexp as in Outputs."""

  out: Leaf
  logsumexp: Leaf


class Scratch(NamedTuple):
  """VMEM, see the drawing above."""

  top: Leaf
  total: Leaf
  acc: Leaf


def forward(
  queries: Queries, listed: Keys | None, near: Keys, bounds: Bounds, static: Static
) -> Results:
  """Computes attention and the logsumexp of its logits."""
  grid = Grid(queries, listed, near, static)
  specs, out_specs = grid.specs(lambda b, g, i, t, bounds: i)
  rows = (*queries.query.shape[:4], 1, grid.rows)
  of_query = (grid.heads, grid.parts, 1, grid.rows)
  return grid.call(
    functools.partial(_kernel, grid),
    grid.list_tiles + grid.near_tiles,
    bounds,
    (
      Inputs(queries, None, listed, near),
      Inputs(specs, None, grid.list_specs() if listed else None, grid.near_specs()),
    ),
    (
      Results(
        jax.ShapeDtypeStruct(queries.query.shape, queries.query.dtype),
        jax.ShapeDtypeStruct(rows, jnp.float32),
      ),
      Results(out_specs.cotangent, out_specs.logsumexp),
    ),
    Scratch(
      top=grid.buffer(*of_query),
      total=grid.buffer(*of_query),
      acc=grid.buffer(grid.heads, grid.parts, grid.dim, grid.rows),
    ),
    grid.flops(2, 2),
    grid.extra_key_bytes(near),
  )


def _kernel(grid: Grid, bounds: Bounds, inputs: Inputs, results: Results, scratch: Scratch) -> None:
  listed = inputs.listed
  b, g, i, t = (pl.program_id(axis) for axis in range(4))

  @pl.when(t == 0)
  def clear():
    scratch.top[...] = jnp.full_like(scratch.top, -jnp.inf)
    scratch.total[...] = jnp.zeros_like(scratch.total)
    scratch.acc[...] = jnp.zeros_like(scratch.acc)

  visit = functools.partial(_visit, grid.static, inputs.queries, scratch)
  if listed is not None:
    pl.when(t < bounds.listed[grid.flat(b, g, i)])(
      lambda: grid.for_listed_pairs(i, listed, visit(listed))
    )
  tile = grid.near_tile(b, i, t, bounds)
  window_start = inputs.queries.window_start
  pl.when((t >= grid.list_tiles) & (tile <= grid.last_tile(i)))(
    lambda: grid.for_near_pairs(
      b, g, i, tile, inputs.near, window_start, bounds, visit(inputs.near)
    )
  )
  pl.when(t == pl.num_programs(3) - 1)(
    lambda: grid.for_each_part(functools.partial(_finish, results, scratch))
  )


def _visit(static: Static, queries: Queries, scratch: Scratch, keys: Keys) -> Callable:
  """Returns a function that adds a tile of keys to the online softmax of some queries."""

  def run(head, part, pairs: Pairs):
    at = head, part
    s = dot(keys.key[...], queries.query[at], A_BT) * static.scale
    shrink: jax.Array | None = None

    def probability(logits):
      nonlocal shrink
      logits = jnp.where(pairs.visible, logits, -jnp.inf)
      before = scratch.top[at]
      after = jnp.maximum(before, jnp.max(logits, axis=0, keepdims=True))
      finite = jnp.where(after == -jnp.inf, 0.0, after)  # nothing may have been seen yet
      p = jnp.exp(logits - finite)
      shrink = jnp.exp(before - finite)
      scratch.top[at] = after
      scratch.total[at] = scratch.total[at] * shrink + jnp.sum(p, axis=0, keepdims=True)
      return p

    *_, w = tile_weights(s, probability, pairs.distance(queries.tau[part]), gate=static.gate)
    assert shrink is not None  # `probability` has been called
    scratch.acc[at] = scratch.acc[at] * shrink + dot(
      keys.value[...], w.astype(keys.value.dtype), AT_B
    )

  return run


def _finish(results: Results, scratch: Scratch, head: jax.Array, part: jax.Array) -> None:
  """Writes the output and logsumexp of some queries."""
  at = head, part
  m, l = scratch.top[at], jnp.maximum(scratch.total[at], float(jnp.finfo(jnp.float32).tiny))
  results.out[at] = jnp.transpose(scratch.acc[at] / l).astype(results.out.dtype)
  results.logsumexp[at] = jnp.where(m == -jnp.inf, 0.0, m) + jnp.log(l)
