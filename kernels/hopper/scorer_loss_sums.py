"""First pass of the scorers' loss on Hopper GPUs: for every sampled query the sums of its softmax
over the keys that it sees and over its candidates, and the sum of its candidates' exp(score).

A program computes 128 queries of one head, with every splits-th tile of 128 keys, and three
warpgroups. Logits are to base 2.

  warpgroup 2, loads (40 registers a thread)   warpgroups 0 and 1, compute 64 queries each (232)
  ------------------------------------------   ---------------------------------------------------
                                               load query, last, start; wait query_full
  for each tile that any query sees:           for each tile that one of the 64 queries sees:
    wait key_free                                wait key_full
    load key, score -> key_full                  S = query key^T
                                                 read score; arrive key_free
                                                 add to the sums, online
                                               store the sums

Both computing warpgroups pass all tiles (pass_by).

  barrier (how many)   opens after
  query_full (2)       the bulk copies (TMA) of a warpgroup's query, last and start
  key_full (stages)    those of key and score
  key_free (stages)    both computing warpgroups have read key and score of the slot

  shared memory        shape           type     bytes for D = 128, 3 stages
  query                2, 64, D        16 bit   32 KiB
  key                  stages, 128, D  16 bit   96 KiB
  score                stages, 128     float32  1.5 KiB
  last, start          2, 64           int32    512 B each
  sums                 10, 64          float32  2.5 KiB
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.hopper.common import (
  BLOCK_Q,
  COLUMN,
  COMPUTING,
  HALF,
  LOG2_E,
  MULTIPROCESSORS,
  ROW,
  Registers,
  axis_index,
  by_column,
  by_row,
  grid_of,
  grid_position,
  matrix_buffer,
  observe_last,
  pass_by,
  read_bounds,
  run_kernel,
  slot_of,
  vector_buffer,
)

BLOCK_KV, STAGES = 128, 3
SUMS = 5  # numbers of a query, see `query_sums`
SMALLEST = float(np.finfo(np.float32).min)


class Inputs(NamedTuple):
  """Arrays in global memory, the arguments of `query_sums`."""

  query: Any
  key: Any
  score: Any
  last: Any
  start: Any
  bounds: Any


class Outputs(NamedTuple):
  """Results in global memory."""

  sums: Any


class Scratch(NamedTuple):
  """Shared memory and barriers, see the drawing above."""

  query: Any
  key: Any
  score: Any
  last: Any
  start: Any
  sums: Any
  query_full: Any
  key_full: Any
  key_free: Any


class Options(NamedTuple):
  """Everything that is known when the kernel is compiled."""

  grid: dict[str, int]
  repeats: int  # query heads of a KV head
  tiles: int  # of keys
  window: int
  to_log2: float  # from products of queries and keys to logits to base 2
  interpret: object

  @property
  def splits(self) -> int:
    """Programs that share the keys of a block of queries."""
    return self.grid["split"]

  @property
  def registers(self) -> Registers:
    """Operations on registers."""
    return Registers(self.interpret)


class Program(NamedTuple):
  """Everything that the roles of a program need."""

  options: Options
  inputs: Inputs
  outputs: Outputs
  scratch: Scratch
  b: Any  # row of the batch
  block: Any  # of BLOCK_Q queries
  h: Any  # query head
  split: Any
  warpgroup: Any
  begin: Any  # first tile of the program
  steps: Any  # number of its tiles


def splits_of(units: int, most: int) -> int:
  """Returns how many programs share one of `units` equal pieces of work, at most `most`, so that
  they fill the multiprocessors about once, or as few times as the pieces need.
  """
  rounds = -(-units // MULTIPROCESSORS)
  return max(1, min(most, rounds * MULTIPROCESSORS // units))


def query_sums(
  query: jax.Array,
  key: jax.Array,
  score: jax.Array,
  last: jax.Array,
  start: jax.Array,
  bounds: jax.Array,
  *,
  window: int,
  scale: float,
  interpret: object = None,
) -> jax.Array:
  """Computes the sums of every query, in parts of the keys.

  Args:
    query: [B, C, H, D] bfloat16 or float16; C a multiple of 128, D 64 or 128.
    key: [B, n, G, D]; n a multiple of 128.
    score: [B, G, n] float32.
    last, start: [B, C] int32, the last and first key that a query sees; last < start: none.
    bounds: [B, C / 64, 2] int32, the smallest `start` and the largest `last` of 64 queries.
    window: keys above `last - window` are no candidates.
    scale: of the logits.
    interpret: parameters of the interpreter, or None.

  Returns:
    [B, H, splits, 5, C] float32: the largest logit to base 2; the sums of exp2(logit - largest)
    over seen keys and over candidates; the largest score of a candidate; the sum of
    exp(score - largest). Each split has a part of the keys.
  """
  (batch, count, heads, dim), (n, groups) = query.shape, key.shape[1:3]
  units, tiles = batch * (count // BLOCK_Q) * heads, n // BLOCK_KV
  splits = splits_of(units, tiles)
  options = Options(
    grid={"batch": batch, "block": count // BLOCK_Q, "head": heads, "split": splits},
    repeats=heads // groups,
    tiles=tiles,
    window=window,
    to_log2=scale * LOG2_E,
    interpret=interpret,
  )
  scratch = Scratch(
    query=matrix_buffer(COMPUTING, HALF, dim, query.dtype),
    key=matrix_buffer(STAGES, BLOCK_KV, dim, query.dtype),
    score=vector_buffer(STAGES, BLOCK_KV),
    last=vector_buffer(COMPUTING, HALF, jnp.int32),
    start=vector_buffer(COMPUTING, HALF, jnp.int32),
    sums=vector_buffer(COMPUTING * SUMS, HALF),
    query_full=plgpu.Barrier(num_arrivals=3, num_barriers=COMPUTING),
    key_full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    key_free=plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=STAGES),
  )
  (sums,) = run_kernel(
    lambda *refs: _kernel(options, *refs),
    Inputs(query, key, score, last, start, bounds),
    Outputs(jax.ShapeDtypeStruct((batch, heads, splits, SUMS, count), jnp.float32)),
    scratch,
    **grid_of(**options.grid),
    interpret=interpret,
    kernel_name="sparsek_scorer_loss_sums",
  )
  return sums


def _kernel(options: Options, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
  (b, block, h, split), warpgroup = grid_position(**options.grid), axis_index("warpgroup")
  ranges = [_tiles(options, inputs, b, COMPUTING * block + w) for w in range(COMPUTING)]
  begin = functools.reduce(jnp.minimum, [first for first, _ in ranges]) + split
  end = functools.reduce(jnp.maximum, [end for _, end in ranges])
  steps = _steps(options, end - begin)
  program = Program(options, inputs, outputs, scratch, b, block, h, split, warpgroup, begin, steps)
  pl.when(warpgroup < COMPUTING)(lambda: _compute(program))
  pl.when(warpgroup == COMPUTING)(lambda: _load(program))


def _tiles(options: Options, inputs: Inputs, b: Any, half: Any) -> tuple:
  """Returns the range of tiles that 64 queries see."""
  start, last = read_bounds(inputs.bounds, b, half)
  first = lax.div(jnp.maximum(start, 0), jnp.int32(BLOCK_KV))
  end = lax.div(jnp.maximum(last, -1) + BLOCK_KV, jnp.int32(BLOCK_KV))
  return jnp.minimum(first, options.tiles), jnp.minimum(end, options.tiles)


def _steps(options: Options, tiles: Any) -> Any:
  """Returns how many of a number of tiles are a program's, which starts with the first."""
  return lax.div(jnp.maximum(tiles, 0) + options.splits - 1, jnp.int32(options.splits))


def _load(program: Program) -> None:
  """Loads the tiles of keys: the part of the last warpgroup."""
  plgpu.set_max_registers(40, action="decrease")
  options, inputs, scratch = program.options, program.inputs, program.scratch
  g = lax.div(program.h, jnp.int32(options.repeats))

  @pl.loop(0, program.steps)
  def _(step):
    slot, reused = slot_of(step, STAGES)
    tokens = pl.ds((program.begin + step * options.splits) * BLOCK_KV, BLOCK_KV)
    full = scratch.key_full.at[slot]
    pl.when(reused)(lambda: plgpu.barrier_wait(scratch.key_free.at[slot]))
    plgpu.copy_gmem_to_smem(inputs.key.at[program.b, tokens, g], scratch.key.at[slot], full)
    plgpu.copy_gmem_to_smem(inputs.score.at[program.b, g, tokens], scratch.score.at[slot], full)

  observe_last(options.interpret, program.steps, STAGES, scratch.key_free)


def _compute(program: Program) -> None:
  """Computes the sums of 64 queries: the part of the first two warpgroups."""
  plgpu.set_max_registers(232, action="increase")
  options, inputs, scratch = program.options, program.inputs, program.scratch
  registers, warpgroup = options.registers, program.warpgroup
  places = pl.ds(program.block * BLOCK_Q + warpgroup * HALF, HALF)
  full = scratch.query_full.at[warpgroup]
  for source, buffer in (
    (inputs.query.at[program.b, places, program.h], scratch.query),
    (inputs.last.at[program.b, places], scratch.last),
    (inputs.start.at[program.b, places], scratch.start),
  ):
    plgpu.copy_gmem_to_smem(source, buffer.at[warpgroup], full)
  plgpu.barrier_wait(full)

  first, end = _tiles(options, inputs, program.b, COMPUTING * program.block + warpgroup)
  from_begin = lambda tile: jnp.minimum(_steps(options, tile - program.begin), program.steps)
  first_step = from_begin(first)
  last_step = jnp.maximum(from_begin(end), first_step)
  skip = functools.partial(
    pass_by, stages=STAGES, full=(scratch.key_full,), free=(scratch.key_free,)
  )
  sums = tuple(registers.full((HALF,), x, ROW) for x in (SMALLEST, 0.0, 0.0, SMALLEST, 0.0))
  skip(0, first_step)
  sums = lax.fori_loop(first_step, last_step, functools.partial(_tile, program), sums)
  skip(last_step, program.steps)
  for i, x in enumerate(sums):
    scratch.sums.at[warpgroup * SUMS + i][...] = x
  plgpu.commit_smem()
  for i in range(SUMS):
    plgpu.copy_smem_to_gmem(
      scratch.sums.at[warpgroup * SUMS + i],
      program.outputs.sums.at[program.b, program.h, program.split, i, places],
    )
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _tile(program: Program, step: Any, sums: tuple) -> tuple:
  """Adds a tile of keys to the sums (see `query_sums`) of 64 queries."""
  options, scratch, shape = program.options, program.scratch, (HALF, BLOCK_KV)
  registers, warpgroup = options.registers, program.warpgroup
  top, total, candidates, top_score, total_score = sums
  slot, _ = slot_of(step, STAGES)
  base = (program.begin + step * options.splits) * BLOCK_KV
  plgpu.barrier_wait(scratch.key_full.at[slot])
  s = registers.matmul(shape, scratch.query.at[warpgroup], scratch.key.at[slot]) * options.to_log2

  column = registers.index(shape, 1)
  last = registers.vector(scratch.last.at[warpgroup], ROW) - base
  start = registers.vector(scratch.start.at[warpgroup], ROW) - base
  seen = jnp.logical_and(column <= by_row(last, shape), column >= by_row(start, shape))
  candidate = jnp.logical_and(seen, column <= by_row(last - options.window, shape))
  u = by_column(registers.vector(scratch.score.at[slot], COLUMN), shape)
  u = jnp.where(candidate, u, -jnp.inf)
  s = jnp.where(seen, s, -jnp.inf)
  plgpu.barrier_arrive(scratch.key_free.at[slot])

  new_top = jnp.maximum(top, s.max(axis=1))
  decay = jnp.exp2(top - new_top)
  p = jnp.exp2(s - by_row(new_top, shape))
  total = total * decay + p.sum(axis=1)
  candidates = candidates * decay + jnp.where(candidate, p, 0.0).sum(axis=1)
  new_score = jnp.maximum(top_score, u.max(axis=1))
  e = jnp.exp2((u - by_row(new_score, shape)) * LOG2_E)
  total_score = total_score * jnp.exp2((top_score - new_score) * LOG2_E) + e.sum(axis=1)
  return new_top, total, candidates, new_score, total_score
