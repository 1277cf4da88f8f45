"""Backward pass of SPARSEK attention on GPUs since Ampere: gradients of queries and thresholds.

The kernel visits the tiles of the forward pass, and computes the softmax again from the logsumexp.
A program computes a block of 64 queries of one head. Queries and cotangents stay in registers;
shared memory is that of forward.py, with the logsumexp beside the thresholds. The values of a tile
come before its keys here:

  values of step j                             keys of step j
  wait for their group, for all warps          wait for their group, for all warps
  begin to copy the keys of j + stages - 1     begin to copy the values of j + stages
  dP = cotangent value^T                       S = query key^T, P, dS;  dquery += dS key
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels.ampere.tiles import (
  Options,
  Position,
  Scratch,
  Steps,
  Tiles,
  find_steps,
  options_of,
  parts_of,
  position,
  run_kernel,
  scratch_of,
  visit,
)
from sparsek.kernels.ampere.warp_products import BLOCK
from sparsek.kernels.gates import tile_gradients, tile_weights
from sparsek.kernels.hopper.attention_query_gradients import Inputs, Outputs
from sparsek.kernels.hopper.attention_tiles import Listed, Pairs, live_pairs
from sparsek.kernels.hopper.common import (
  COLUMN,
  MATRIX,
  ROW,
  Ref,
  Tiling,
  by_column,
  by_row,
  grid_of,
  in_block,
)


class Program(NamedTuple):
  """Everything that the functions of a program need."""

  options: Options
  at: Position
  steps: Steps
  tiles: Tiles
  window_start: Any  # of the queries, in shared memory, as are the next three
  entered: Any
  logsumexp: Any
  tau: Any
  query: Any  # in registers, as are the next two
  cotangent: Any
  delta: Any


def query_gradients(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  cotangent: jax.Array,
  out: jax.Array,
  logsumexp: jax.Array,
  window_start: jax.Array,
  entered: jax.Array,
  tau: jax.Array,
  listed: Listed,
  bounds: jax.Array,
  *,
  gate: str,
  scale: float,
  chunk: int,
  tiling: Tiling,
  interpret: object = None,
) -> list[jax.Array]:
  """Computes the gradients of queries and thresholds.

  Args and results are those of `hopper.attention_query_gradients.query_gradients`, but D is 64 or
  128.
  """
  batch, queries, heads, _ = query.shape
  listed = Listed(*listed)
  options = options_of(
    query,
    key,
    listed,
    gate=gate,
    scale=scale,
    chunk=chunk,
    stages=tiling.query_stages,
    interpret=interpret,
  )
  per_query = jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)
  return run_kernel(
    lambda *refs: _kernel(options, *refs),
    Inputs(
      query, key, value, cotangent, out, logsumexp, window_start, entered, tau, listed, bounds
    ),
    Outputs(jax.ShapeDtypeStruct(query.shape, query.dtype), per_query, per_query),
    scratch_of(options, vectors=2),
    **grid_of(**options.grid),
    interpret=interpret,
    kernel_name="sparsek_mma_query_gradients",
  )


def _kernel(options: Options, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
  at, matrices, stages = position(options), options.registers, options.stages
  steps = find_steps(at, inputs.bounds)
  tiles = Tiles(
    scratch.key,
    scratch.value,
    scratch.integers.at[2:],
    scratch.floats.at[2:],
    (inputs.key, inputs.value),
    inputs.listed,
    scores=True,
  )
  window_start, entered = scratch.integers.at[0], scratch.integers.at[1]
  tau, logsumexp = scratch.floats.at[0], scratch.floats.at[1]
  rows, staging = ((at.b, None, at.h), at.query, BLOCK), scratch.key.at[stages - 1]
  matrices.copy_rows(inputs.cotangent, *rows, scratch.value.at[0])
  matrices.copy_rows(inputs.out, *rows, staging)
  matrices.copy_vector(inputs.window_start, (at.b,), at.first, window_start)
  matrices.copy_vector(inputs.entered, (at.b, at.g), at.first, entered)
  matrices.copy_vector(inputs.tau, (at.b, at.g), at.first, tau)
  matrices.copy_vector(inputs.logsumexp, (at.b, at.h), at.query, logsumexp)
  matrices.commit()
  matrices.wait(0)
  cotangent, out = matrices.load(scratch.value.at[0]), matrices.load(staging)
  delta = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=1)
  matrices.sync()
  matrices.copy_rows(inputs.query, *rows, staging)
  for step in range(stages):
    tiles.load_values(options, at, steps, jnp.int32(step))
    if step < stages - 1:
      tiles.load_keys(options, at, steps, jnp.int32(step))
  matrices.wait(2 * (stages - 1))
  program = Program(
    options,
    at,
    steps,
    tiles,
    window_start,
    entered,
    logsumexp,
    tau,
    matrices.load(staging),
    cotangent,
    delta,
  )
  carry = matrices.full((BLOCK, options.dim), 0, MATRIX), matrices.full((BLOCK,), 0, ROW)
  dquery, dgate = visit(steps, functools.partial(_tile, program), carry)
  matrices.sync()
  _store(program, outputs, scratch, dquery, dgate)


def _tile(
  program: Program, carry: tuple, step: Any, t: Any, is_list: bool, exits: bool, enters: bool
) -> tuple:
  """Adds the gradients from one tile.

  Args:
    program: see Program.
    carry: (dquery [64, D] without the scale, gradient of the gates [64] summed over keys).
    step: of the circular buffers.
    t: the tile's number among those of the window or the list.
    is_list, exits, enters: see `live_pairs`.

  Returns:
    The next carry.
  """
  options, at, steps, tiles = program[:4]
  matrices, stages = options.registers, options.stages
  dquery, dgate = carry
  slot = lax.rem(step, jnp.int32(stages))
  parts = parts_of(options.gate, is_list)
  matrices.wait(2 * (stages - 1))
  tiles.load_keys(options, at, steps, step + (stages - 1))
  products = [matrices.product(program.cotangent, tiles.value.at[slot, part]) for part in parts]
  matrices.wait(2 * (stages - 1))
  tiles.load_values(options, at, steps, step + stages)
  for i, (part, dp) in enumerate(zip(parts, products)):
    key = tiles.key.at[slot, part]
    live = live_pairs(
      Pairs(matrices, (BLOCK, part.size)),
      at.first,
      t * len(parts) + i,
      is_list=is_list,
      exits=exits,
      enters=enters,
      last=tiles.last.at[slot, part],
      window_start=program.window_start,
      entered=program.entered,
    )
    ds, of_gates = _logit_gradients(
      program,
      matrices.product(program.query, key),
      dp,
      live,
      tiles.score.at[slot, part] if is_list else None,
    )
    if of_gates is not None:
      dgate = in_block(t, lambda x, f=of_gates: x + f().sum(axis=1), dgate)
    ds = lax.optimization_barrier(ds.astype(options.dtype))
    dquery = in_block(t, lambda x, d=ds, k=key: matrices.add_product(x, d, k), dquery)
  return dquery, dgate


def _logit_gradients(
  program: Program, s: jax.Array, dp: jax.Array, live: Any, score: Ref | None
) -> tuple:
  """Computes the gradients of a part of a tile's logits, and a function for those of its gates
  (see gates.tile_gradients).

  Args:
    program: see Program.
    s, dp: products of queries and keys, of cotangents and values.
    live: which pairs are live, or None where all are.
    score: of listed keys, in shared memory; None for the window.
  """
  options, shape, matrices = program.options, s.shape, program.options.registers

  def of_queries(ref):
    return by_row(matrices.vector(ref, ROW), shape)

  def probability(logits):
    p = jnp.exp2(logits * options.to_log2 - of_queries(program.logsumexp))
    return p if live is None else jnp.where(live, p, 0.0)

  def load_distance():
    return by_column(matrices.vector(score, COLUMN), shape) - of_queries(program.tau)

  distance = None if score is None else load_distance
  p, g, _ = tile_weights(s, probability, distance, gate=options.gate)
  delta = by_row(program.delta, shape)
  return tile_gradients(s, p, g, dp, delta, distance, gate=options.gate, scale=options.scale)


def _store(
  program: Program, outputs: Outputs, scratch: Scratch, dquery: jax.Array, dgate: jax.Array
) -> None:
  """Stores the gradients of the queries."""
  options, at, matrices = program.options, program.at, program.options.registers
  dquery = (dquery * options.scale).astype(options.dtype)
  matrices.store_rows(dquery, scratch.value.at[0], outputs.dquery, (at.b, None, at.h), at.query)
  matrices.store_vector(program.delta, outputs.delta, (at.b, at.h), at.query)
  matrices.store_vector(-dgate, outputs.dtau, (at.b, at.h), at.query)
