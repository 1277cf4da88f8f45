"""First pass of the scorers' loss on Hopper GPUs: for every sampled query the sums of its softmax
over the keys that it sees and over its candidates, and the sum of its candidates' exp(score).

A program computes all queries of one head, 64 at a time, with every splits-th tile of 128 keys, and
three warpgroups. Logits are to base 2.

  warpgroup 2, loads (40 registers a thread)   warpgroups 0 and 1, compute (232)
  ------------------------------------------   ---------------------------------------------------
  for each 64 queries:                         for each 64 queries:
    wait query_free                              wait query_full
    load query, span -> query_full           for every other tile, the one or the other half:
    for each tile that any of them sees:           wait key_full
      wait key_free                                S = query key^T
      load key, score -> key_full                  read score; arrive key_free
                                                   add to the sums, online
                                                 arrive query_free; store the sums

In most tiles each query sees all keys or none: masks of rows do there, and the score's part of the
sums is that of the whole tile, which was computed before.

  barrier (how many)   opens after
  query_full (2)       the bulk copies (TMA) of query and span
  key_full (stages)    those of key and score
  query_free (2)       both computing warpgroups have read what query_full guards
  key_free (stages)    the computing warpgroup whose tile it is has read key and score

  shared memory        shape           type     bytes for D = 128, 4 stages
  query                2, 64, D        16 bit   32 KiB
  key                  stages, 128, D  16 bit   128 KiB
  score                stages, 128     float32  2 KiB
  span                 2, 64, 3 times  int32    512 B each
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
  COLUMN,
  COMPUTING,
  HALF,
  LOG2_E,
  MULTIPROCESSORS,
  ROW,
  Registers,
  apply_if,
  axis_index,
  by_column,
  by_row,
  grid_of,
  grid_position,
  matrix_buffer,
  observe_last,
  run_kernel,
  slot_of,
  vector_buffer,
)

BLOCK_KV = 128
MOST_STAGES, WIDE_STAGES = 4, 2  # even: each slot belongs to one computing warpgroup
WIDE = 256  # head_dim from which shared memory holds fewer stages
QUERY_STAGES = 2
SUMS = 5  # numbers of a query, see `query_sums`
SMALLEST = float(np.finfo(np.float32).min)


class Span(NamedTuple):
  """The first and last key that each query sees, and its last candidate: [B, C] int32 arrays or, in
  a kernel, references; a query with start > last sees none.
  """

  start: Any
  last: Any
  candidate: Any


class Inputs(NamedTuple):
  """Arrays in global memory, the arguments of `query_sums`."""

  query: Any
  key: Any
  score: Any
  span: Span
  tiles: "Tiles"


class Tiles(NamedTuple):
  """Numbers of tiles of keys.

  Attributes:
    first, last: [B, C / 64] int32, the first and last key that any of 64 queries sees.
    whole: [B, C / 64, n / 128] int32, 1 where no query sees, or has as candidates, a part of the
      tile, else 0.
    top_score, total_score: [B, G, n / 128] float32, the largest score of a tile and the sum of its
      exp(score - largest).
  """

  first: Any
  last: Any
  whole: Any
  top_score: Any
  total_score: Any


class Outputs(NamedTuple):
  """Results in global memory."""

  sums: Any


class Scratch(NamedTuple):
  """Shared memory and barriers, see the drawing above."""

  query: Any
  key: Any
  score: Any
  span: Span
  sums: Any
  query_full: Any
  key_full: Any
  query_free: Any
  key_free: Any


class Options(NamedTuple):
  """Everything that is known when the kernel is compiled."""

  grid: dict[str, int]
  repeats: int  # query heads of a KV head
  blocks: int  # of HALF queries
  stages: int  # tiles of the circular buffer of keys
  to_log2: float  # from products of queries and keys to logits to base 2, positive
  interpret: object

  @property
  def splits(self) -> int:
    """Programs that share the keys of a head."""
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
  h: Any  # query head
  g: Any  # KV head
  split: Any
  warpgroup: Any


class Block(NamedTuple):
  """The part of a program that belongs to 64 queries."""

  index: Any
  slot: Any  # of the buffer of queries
  begin: Any  # the program's first tile of keys
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
  span: Span,
  tiles: Tiles,
  *,
  scale: float,
  interpret: object = None,
) -> jax.Array:
  """Computes the sums of every query, in parts of the keys.

  Args:
    query: [B, C, H, D] bfloat16 or float16; C a multiple of 64, D 64, 128 or 256.
    key: [B, n, G, D]; n a multiple of 128.
    score: [B, G, n] float32.
    span, tiles: see Span and Tiles.
    scale: of the logits, positive.
    interpret: parameters of the interpreter, or None.

  Returns:
    [B, H, parts, 5, C] float32: the largest logit to base 2; the sums of exp2(logit - largest)
    over seen keys and over candidates; the largest score of a candidate; the sum of
    exp(score - largest). Each part has some of the keys.
  """
  (batch, count, heads, dim), (n, groups) = query.shape, key.shape[1:3]
  splits = splits_of(batch * heads, -(-n // (COMPUTING * BLOCK_KV)))
  options = Options(
    grid={"batch": batch, "head": heads, "split": splits},
    repeats=heads // groups,
    blocks=count // HALF,
    stages=WIDE_STAGES if dim >= WIDE else MOST_STAGES,
    to_log2=scale * LOG2_E,
    interpret=interpret,
  )
  scratch = Scratch(
    query=matrix_buffer(QUERY_STAGES, HALF, dim, query.dtype),
    key=matrix_buffer(options.stages, BLOCK_KV, dim, query.dtype),
    score=vector_buffer(options.stages, BLOCK_KV),
    span=Span(*(vector_buffer(QUERY_STAGES, HALF, jnp.int32),) * 3),
    sums=vector_buffer(COMPUTING * SUMS, HALF),
    query_full=plgpu.Barrier(num_arrivals=1 + len(Span._fields), num_barriers=QUERY_STAGES),
    key_full=plgpu.Barrier(num_arrivals=2, num_barriers=options.stages),
    query_free=plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=QUERY_STAGES),
    key_free=plgpu.Barrier(num_arrivals=1, num_barriers=options.stages),
  )
  (sums,) = run_kernel(
    lambda *refs: _kernel(options, *refs),
    Inputs(query, key, score, span, tiles),
    Outputs(jax.ShapeDtypeStruct((batch, heads, COMPUTING * splits, SUMS, count), jnp.float32)),
    scratch,
    **grid_of(**options.grid),
    interpret=interpret,
    kernel_name="sparsek_scorer_loss_sums",
  )
  return sums


def _kernel(options: Options, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
  (b, h, split), warpgroup = grid_position(**options.grid), axis_index("warpgroup")
  g = lax.div(h, jnp.int32(options.repeats))
  program = Program(options, inputs, outputs, scratch, b, h, g, split, warpgroup)
  pl.when(warpgroup < COMPUTING)(lambda: _compute(program))
  pl.when(warpgroup == COMPUTING)(lambda: _load(program))


def _block(program: Program, index: Any) -> Block:
  """Returns the program's part of the index-th 64 queries."""
  tiles, splits = program.inputs.tiles, program.options.splits
  # adding 0 is for `jax.shard_map`, see read_bounds
  first, last = (x[program.b, index] + 0 for x in (tiles.first, tiles.last))
  begin = lax.div(first, jnp.int32(BLOCK_KV)) + program.split
  end = lax.div(last + BLOCK_KV, jnp.int32(BLOCK_KV))
  steps = lax.div(jnp.maximum(end - begin, 0) + splits - 1, jnp.int32(splits))
  return Block(index, slot_of(index, QUERY_STAGES)[0], begin, steps)


def _load(program: Program) -> None:
  """Loads the queries and the tiles of keys: the part of the last warpgroup."""
  plgpu.set_max_registers(40, action="decrease")
  options, inputs, scratch, b = program.options, program.inputs, program.scratch, program.b

  def load_block(index, done):
    block, (slot, reused) = _block(program, index), slot_of(index, QUERY_STAGES)
    places, full = pl.ds(index * HALF, HALF), scratch.query_full.at[slot]
    pl.when(reused)(lambda: plgpu.barrier_wait(scratch.query_free.at[slot]))
    query = inputs.query.at[b, places, program.h]
    plgpu.copy_gmem_to_smem(query, scratch.query.at[slot], full)
    for source, buffer in zip(inputs.span, scratch.span):
      plgpu.copy_gmem_to_smem(source.at[b, places], buffer.at[slot], full)
    pl.loop(0, block.steps)(
      lambda i: _load_tile(program, block.begin + i * options.splits, done + i)
    )
    return done + block.steps

  steps = lax.fori_loop(0, options.blocks, load_block, jnp.int32(0))
  observe_last(options.interpret, options.blocks, QUERY_STAGES, scratch.query_free)
  observe_last(options.interpret, steps, options.stages, scratch.key_free)


def _load_tile(program: Program, tile: Any, step: Any) -> None:
  """Loads a tile of keys, when its slot is free."""
  inputs, scratch = program.inputs, program.scratch
  slot, reused = slot_of(step, program.options.stages)
  tokens, full = pl.ds(tile * BLOCK_KV, BLOCK_KV), scratch.key_full.at[slot]
  pl.when(reused)(lambda: plgpu.barrier_wait(scratch.key_free.at[slot]))
  key, score = inputs.key.at[program.b, tokens, program.g], inputs.score
  plgpu.copy_gmem_to_smem(key, scratch.key.at[slot], full)
  plgpu.copy_gmem_to_smem(score.at[program.b, program.g, tokens], scratch.score.at[slot], full)


def _compute(program: Program) -> None:
  """Computes sums over every other tile of keys: the part of the first two warpgroups."""
  plgpu.set_max_registers(232, action="increase")
  compute_block = functools.partial(_compute_block, program)
  lax.fori_loop(0, program.options.blocks, compute_block, jnp.int32(0))
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _compute_block(program: Program, index: Any, done: Any) -> Any:
  """Computes the sums of 64 queries.

  Args:
    program: see Program.
    index: number of the 64 queries.
    done: steps of the circular buffer of keys that the queries before took.

  Returns:
    `done` for the next queries.
  """
  scratch, warpgroup, block = program.scratch, program.warpgroup, _block(program, index)
  mine = lax.rem(done + warpgroup, jnp.int32(COMPUTING))  # the first of the steps that is
  count = lax.div(jnp.maximum(block.steps - mine, 0) + COMPUTING - 1, jnp.int32(COMPUTING))
  plgpu.barrier_wait(scratch.query_full.at[block.slot])

  def add(i, sums):
    return _add_tile(program, block, done, mine + i * COMPUTING, sums)

  full = functools.partial(program.options.registers.full, (HALF,), layout=ROW)
  sums = lax.fori_loop(0, count, add, tuple(map(full, (SMALLEST, 0.0, 0.0, SMALLEST, 0.0))))
  plgpu.barrier_arrive(scratch.query_free.at[block.slot])
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  for i, x in enumerate(sums):
    scratch.sums.at[warpgroup * SUMS + i][...] = x
  plgpu.commit_smem()
  part, places = COMPUTING * program.split + warpgroup, pl.ds(index * HALF, HALF)
  for i in range(SUMS):
    target = program.outputs.sums.at[program.b, program.h, part, i, places]
    plgpu.copy_smem_to_gmem(scratch.sums.at[warpgroup * SUMS + i], target)
  return done + block.steps


def _add_tile(program: Program, block: Block, done: Any, i: Any, sums: tuple) -> tuple:
  """Adds the block's i-th tile of keys to the sums (see `query_sums`) of its queries."""
  numbers, tile = program.inputs.tiles, block.begin + i * program.options.splits
  whole = numbers.whole[program.b, block.index, tile] + 0
  slot, _ = slot_of(done + i, program.options.stages)
  plgpu.barrier_wait(program.scratch.key_full.at[slot])
  for condition, add in ((whole == 1, _add_whole), (whole == 0, _add_part)):
    sums = apply_if(condition, functools.partial(add, program, block, tile, slot), sums)
  return sums


def _span(program: Program, block: Block, tile: Any) -> Span:
  """Loads the span of each query, counted from the first key of the tile."""
  vector = functools.partial(program.options.registers.vector, layout=ROW)
  return Span(*(vector(x.at[block.slot]) - tile * BLOCK_KV for x in program.scratch.span))


def _add_whole(program: Program, block: Block, tile: Any, slot: Any, sums: tuple) -> tuple:
  """Adds a tile of which each query sees all keys or none, and the same for candidates."""
  options, inputs, scratch, shape = (
    program.options,
    program.inputs,
    program.scratch,
    (HALF, BLOCK_KV),
  )
  top, total, candidates, top_score, total_score = sums
  tile_top, tile_total = (
    x[program.b, program.g, tile] + 0 for x in (inputs.tiles.top_score, inputs.tiles.total_score)
  )
  s = options.registers.matmul(shape, scratch.query.at[block.slot], scratch.key.at[slot])
  plgpu.barrier_arrive(scratch.key_free.at[slot])
  span = _span(program, block, tile)
  seen = jnp.logical_and(span.start <= 0, span.last >= 0)
  candidate = jnp.logical_and(span.start <= 0, span.candidate >= 0)
  new_top = jnp.maximum(top, jnp.where(seen, s.max(axis=1) * options.to_log2, SMALLEST))
  decay = jnp.exp2(top - new_top)
  p = jnp.exp2(s * options.to_log2 - by_row(new_top, shape)).sum(axis=1)
  total = total * decay + jnp.where(seen, p, 0.0)
  candidates = candidates * decay + jnp.where(candidate, p, 0.0)
  new_score = jnp.where(candidate, jnp.maximum(top_score, tile_top), top_score)
  total_score *= jnp.exp2((top_score - new_score) * LOG2_E)
  more = jnp.exp2((tile_top - new_score) * LOG2_E) * tile_total
  return new_top, total, candidates, new_score, total_score + jnp.where(candidate, more, 0.0)


def _add_part(program: Program, block: Block, tile: Any, slot: Any, sums: tuple) -> tuple:
  """Adds a tile of which some queries see a part, or have a part as candidates."""
  options, scratch, shape = program.options, program.scratch, (HALF, BLOCK_KV)
  registers = options.registers
  top, total, candidates, top_score, total_score = sums
  s = registers.matmul(shape, scratch.query.at[block.slot], scratch.key.at[slot])
  column, span = registers.index(shape, 1), _span(program, block, tile)
  here = column >= by_row(span.start, shape)
  seen = jnp.logical_and(here, column <= by_row(span.last, shape))
  candidate = jnp.logical_and(here, column <= by_row(span.candidate, shape))
  u = by_column(registers.vector(scratch.score.at[slot], COLUMN), shape)
  u = jnp.where(candidate, u, -jnp.inf)
  s = jnp.where(seen, s, -jnp.inf)
  plgpu.barrier_arrive(scratch.key_free.at[slot])

  new_top = jnp.maximum(top, s.max(axis=1) * options.to_log2)
  decay = jnp.exp2(top - new_top)
  p = jnp.exp2(s * options.to_log2 - by_row(new_top, shape))
  total = total * decay + p.sum(axis=1)
  candidates = candidates * decay + jnp.where(candidate, p, 0.0).sum(axis=1)
  new_score = jnp.maximum(top_score, u.max(axis=1))
  e = jnp.exp2((u - by_row(new_score, shape)) * LOG2_E)
  total_score = total_score * jnp.exp2((top_score - new_score) * LOG2_E) + e.sum(axis=1)
  return new_top, total, candidates, new_score, total_score
