"""Forward pass of SPARSEK attention on GPUs since Ampere: one online softmax over the tiles of the
window, latest first, then over the tiles of listed tokens. See tiles.py for the order of copies.

A program computes a block of 64 queries of one head. Queries stay in registers; shared memory:

  key, value        stages, 64, D   16 bit    16 KiB each and stage for D = 128; values take the
                                              queries first, and the output in the end
  floats            1 + stages, 64  float32   thresholds of the queries, scores of the keys
  integers          2 + stages, 64  int32     window_start and entered of the queries, last of keys
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
  position,
  run_kernel,
  scratch_of,
  visit,
)
from sparsek.kernels.ampere.warp_products import BLOCK
from sparsek.kernels.hopper.attention_forward_program import Inputs, Outputs
from sparsek.kernels.hopper.attention_tiles import Listed, Pairs, live_pairs
from sparsek.kernels.hopper.common import (
  COLUMN,
  LOG2_E,
  MATRIX,
  ROW,
  Tiling,
  by_row,
  gate_of,
  grid_of,
)
from sparsek.kernels.sentinels import LOWEST


class Program(NamedTuple):
  """Everything that the functions of a program need."""

  options: Options
  at: Position
  steps: Steps
  tiles: Tiles
  window_start: Any  # of the queries, in shared memory
  entered: Any
  query: Any  # in registers
  tau: Any  # None where the gate does not need it


def forward(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
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
  """Computes attention and the logsumexp of its logits.

  Args and results are those of `hopper.attention_forward.forward`, but D is 64 or 128, and `bounds`
  are of blocks of 64 queries and tiles of 64 keys.
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
    stages=tiling.forward_stages,
    interpret=interpret,
  )
  return run_kernel(
    lambda *refs: _kernel(options, *refs),
    Inputs(query, key, value, window_start, entered, tau, listed, bounds),
    Outputs(
      out=jax.ShapeDtypeStruct(query.shape, query.dtype),
      logsumexp=jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
    ),
    scratch_of(options, vectors=1),
    **grid_of(**options.grid),
    interpret=interpret,
    kernel_name="sparsek_mma_forward",
  )


def _kernel(options: Options, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
  at, matrices, stages = position(options), options.registers, options.stages
  steps = find_steps(at, inputs.bounds)
  gated = options.gate != "straight_through"
  tiles = Tiles(
    scratch.key,
    scratch.value,
    scratch.integers.at[2:],
    scratch.floats.at[1:],
    (inputs.key, inputs.value),
    inputs.listed,
    gated,
  )
  staging = scratch.value.at[stages - 1]
  matrices.copy_rows(inputs.query, (at.b, None, at.h), at.query, BLOCK, staging)
  window_start, entered, tau = scratch.integers.at[0], scratch.integers.at[1], scratch.floats.at[0]
  matrices.copy_vector(inputs.window_start, (at.b,), at.first, window_start)
  matrices.copy_vector(inputs.entered, (at.b, at.g), at.first, entered)
  matrices.copy_vector(inputs.tau, (at.b, at.g), at.first, tau)
  for step in range(stages):
    tiles.load_keys(options, at, steps, jnp.int32(step))
    if step < stages - 1:
      tiles.load_values(options, at, steps, jnp.int32(step))
  matrices.wait(2 * (stages - 1))
  program = Program(
    options,
    at,
    steps,
    tiles,
    window_start,
    entered,
    matrices.load(staging),
    matrices.vector(tau, ROW) if gated else None,
  )
  carry = (
    matrices.full((BLOCK, options.dim), 0, MATRIX),
    matrices.full((BLOCK,), LOWEST, ROW),
    matrices.full((BLOCK,), 0, ROW),
  )
  acc, top, total = visit(steps, functools.partial(_tile, program), carry)
  matrices.sync()
  _store(program, outputs, scratch, acc, top, total)


def _tile(
  program: Program, carry: tuple, step: Any, t: Any, is_list: bool, exits: bool, enters: bool
) -> tuple:
  """Adds one tile to the online softmax.

  Args:
    program: see Program.
    carry: (acc [64, D], top [64], total [64]): sums of weighted values, the largest logit so far,
      and the sum of exp2(logit - top).
    step: of the circular buffers.
    t: the tile's number among those of the window or the list.
    is_list, exits, enters: see `live_pairs`.

  Returns:
    The next carry.
  """
  options, at, steps, tiles = program[:4]
  matrices, shape, stages = options.registers, options.shape, options.stages
  acc, top, total = carry
  slot = lax.rem(step, jnp.int32(stages))
  matrices.wait(2 * (stages - 1))
  tiles.load_values(options, at, steps, step + (stages - 1))
  s = matrices.product(program.query, tiles.key.at[slot])
  gates: Any = None
  if program.tau is not None and is_list:
    gates = gate_of(matrices.vector(tiles.score.at[slot], COLUMN), program.tau, shape)
  if options.gate == "key_value" and is_list:
    s *= gates
  live = live_pairs(
    Pairs(matrices, shape),
    at.first,
    t,
    is_list=is_list,
    exits=exits,
    enters=enters,
    last=tiles.last.at[slot],
    window_start=program.window_start,
    entered=program.entered,
  )
  if live is not None:
    s = jnp.where(live, s, -jnp.inf)
  new_top = jnp.maximum(top, s.max(axis=1) * options.to_log2)
  decay = jnp.exp2(top - new_top)
  p = jnp.exp2(s * options.to_log2 - by_row(new_top, shape))
  acc *= by_row(decay, acc.shape)
  total = total * decay + p.sum(axis=1)
  weights = (p if gates is None else p * gates).astype(options.dtype)
  matrices.wait(2 * (stages - 1))
  tiles.load_keys(options, at, steps, step + stages)
  return matrices.add_product(acc, weights, tiles.value.at[slot]), new_top, total


def _store(
  program: Program,
  outputs: Outputs,
  scratch: Scratch,
  acc: jax.Array,
  top: jax.Array,
  total: jax.Array,
) -> None:
  """Stores the output and the logsumexp of the queries."""
  options, at, matrices = program.options, program.at, program.options.registers
  seen = total > 0
  total = jnp.where(seen, total, 1.0)
  # A threshold that is NaN must show in the output.
  tau = program.tau
  factor = 1 / total if tau is None else jnp.where(tau == tau, 1 / total, jnp.nan)
  out = (acc * by_row(factor, acc.shape)).astype(options.dtype)
  matrices.store_rows(out, scratch.value.at[0], outputs.out, (at.b, None, at.h), at.query)
  logsumexp = jnp.where(seen, top + jnp.log(total) * LOG2_E, 0.0)
  matrices.store_vector(logsumexp, outputs.logsumexp, (at.b, at.h), at.query)
