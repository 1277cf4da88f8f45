"""Second pass of the scorers' loss on Hopper GPUs: computes the attention again from the sums of
the first pass, and from it the loss and the gradients of the scores.

A program computes every splits-th block of 128 keys of one KV head with three warpgroups. Tiles of
32 queries follow each other in one circular buffer, for each all query heads of the KV head. The
arrays of pairs are transposed, keys by queries: so sums over queries stay in registers.

What the scores expect is, of query i and key j, exp(u_j - top_i - log_total_i). Where all keys of a
block are candidates of all queries of a tile, that is a product of two exponentials, of u_j - ref
and of ref - top_i - log_total_i; with ref, the smallest top_i of the tile, neither overflows.

The same kernel finds the targets of the ranking loss: in place of dscore then is the largest A of
each key.

  warpgroup 2, loads (40 registers a thread)     warpgroups 0 and 1, compute 64 keys each (232)
  ------------------------------------------     ---------------------------------------------------
  for each block of keys:                        for each block of keys:
    wait key_free; load key, score -> key_full     wait key_full
    for each tile of queries with candidates       for each such tile of queries:
    in the block, for each head:                     for each head:
      wait query_free                                  wait query_full
      load query, logsumexp, ... -> query_full         A += exp2(key query^T - logsumexp)
                                                       arrive query_free (*)
                                                     add to dscore and loss, in the one or the
                                                     other form
                                                   arrive key_free; store dscore
                                                 store loss

(*) at the last head after the sums of the tile, which read its vectors.

  barrier (how many)    opens after
  key_full (stages)     the bulk copies (TMA) of both halves of key and score
  query_full (stages)   those of query and of seven vectors of its queries
  key_free (stages)     both computing warpgroups have read key and score of the slot
  query_free (stages)   both have read what query_full guards

  shared memory         shape              type     bytes for D = 128, 2 and 4 stages
  key                   2 stages, 64, D    16 bit   64 KiB
  query                 stages, 32, D      16 bit   32 KiB
  score                 2 stages, 64       float32  1 KiB
  seven vectors         stages, 32         32 bit   512 B each
  row: dscore, loss     2, 64              float32  512 B
"""

import functools
from collections.abc import Callable
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
  MATRIX,
  ROW,
  Registers,
  apply_if,
  axis_index,
  by_column,
  grid_of,
  grid_position,
  matrix_buffer,
  observe_last,
  run_kernel,
  slot_of,
  vector_buffer,
)
from sparsek.kernels.hopper.scorer_loss_pairs import (
  BLOCK,
  SHAPE,
  Pairs,
  add_part,
  add_whole,
  first_key,
  largest_part,
  largest_whole,
)
from sparsek.kernels.hopper.scorer_loss_sums import BLOCK_KV, splits_of

KEY_STAGES, QUERY_STAGES = 2, 4
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


class Queries(NamedTuple):
  """Vectors with a number for each query: arrays, references, or a tile's part in shared memory.

  Attributes:
    logsumexp: [B, H, C] float32 of the logits, to base 2.
    top_score, log_total: [B, G, C] float32, the largest score of a candidate and the logarithm of
      the sum of exp(score - top_score): a sum of both would lose one where the other is large.
    expected: [B, G, C] float32, the weight of a query times its candidates' share of attention.
    weight: [B, C] float32.
    last, start: [B, C] int32, the last and first candidate.
  """

  logsumexp: Any
  top_score: Any
  log_total: Any
  expected: Any
  weight: Any
  last: Any
  start: Any


class Tiles(NamedTuple):
  """Numbers of tiles of queries.

  Attributes:
    start, latest_start, earliest_last, last: [B, C / 32] int32, the smallest and largest `start`
      and `last`.
    top_score: [B, G, C / 32] float32, the smallest `top_score`.
    expected: [B, G, C / 32] float32, the sum of expected_i exp(ref - top_i - log_total_i), with ref
      that smallest one.
  """

  start: Any
  latest_start: Any
  earliest_last: Any
  last: Any
  top_score: Any
  expected: Any


class Inputs(NamedTuple):
  """Arrays in global memory, the arguments of `score_gradients`."""

  query: Any
  key: Any
  score: Any
  queries: Queries
  tiles: Tiles


class Outputs(NamedTuple):
  """Results in global memory."""

  dscore: Any
  loss: Any


class Scratch(NamedTuple):
  """Shared memory and barriers, see the drawing above."""

  key: Any
  score: Any
  query: Any
  queries: Queries
  row: Any
  key_full: Any
  key_free: Any
  query_full: Any
  query_free: Any


class Options(NamedTuple):
  """Everything that is known when the kernel is compiled."""

  grid: dict[str, int]
  repeats: int  # query heads of a KV head
  blocks: int  # of keys
  tiles: int  # of queries
  to_log2: float  # from products of queries and keys to logits to base 2
  largest: bool  # the largest attention in place of gradients
  interpret: object

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
  g: Any  # KV head
  split: Any
  warpgroup: Any
  count: Any  # number of the program's blocks of keys


def score_gradients(
  query: jax.Array,
  key: jax.Array,
  score: jax.Array,
  queries: Queries,
  tiles: Tiles,
  *,
  scale: float,
  largest: bool = False,
  interpret: object = None,
) -> list[jax.Array]:
  """Computes the gradients of the scores, and the loss in parts.

  Args:
    query, key, score, scale, interpret: as in `scorer_loss_sums.query_sums`.
    queries, tiles: see Queries and Tiles.
    largest: compute, in place of the gradients, the largest attention that a query pays each key,
      over the queries that have it as a candidate, or 0; neither scores nor the loss mean anything.

  Returns:
    dscore [B, G, n] and the loss [B, G, parts, 64], to be summed over the last two axes: the sum of
    `weight A (log A - score + top_score + log_total)` over the pairs; float32.
  """
  (batch, count, heads, dim), (n, groups) = query.shape, key.shape[1:3]
  blocks = n // BLOCK_KV
  splits = splits_of(batch * groups, blocks)
  options = Options(
    grid={"batch": batch, "group": groups, "split": splits},
    repeats=heads // groups,
    blocks=blocks,
    tiles=count // BLOCK,
    to_log2=scale * LOG2_E,
    largest=largest,
    interpret=interpret,
  )
  numbers = vector_buffer(QUERY_STAGES, BLOCK)
  places = vector_buffer(QUERY_STAGES, BLOCK, jnp.int32)
  scratch = Scratch(
    key=matrix_buffer(COMPUTING * KEY_STAGES, HALF, dim, query.dtype),
    score=vector_buffer(COMPUTING * KEY_STAGES, HALF),
    query=matrix_buffer(QUERY_STAGES, BLOCK, dim, query.dtype),
    queries=Queries(*(numbers,) * 5, places, places),
    row=vector_buffer(COMPUTING, HALF),
    key_full=plgpu.Barrier(num_arrivals=2 * COMPUTING, num_barriers=KEY_STAGES),
    key_free=plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=KEY_STAGES),
    query_full=plgpu.Barrier(num_arrivals=1 + len(Queries._fields), num_barriers=QUERY_STAGES),
    query_free=plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=QUERY_STAGES),
  )
  return run_kernel(
    lambda *refs: _kernel(options, *refs),
    Inputs(query, key, score, queries, tiles),
    Outputs(
      dscore=jax.ShapeDtypeStruct(score.shape, jnp.float32),
      loss=jax.ShapeDtypeStruct((batch, groups, COMPUTING * splits, HALF), jnp.float32),
    ),
    scratch,
    **grid_of(**options.grid),
    interpret=interpret,
    kernel_name=f"sparsek_scorer_loss_{'targets' if largest else 'gradients'}",
  )


def _kernel(options: Options, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
  (b, g, split), warpgroup = grid_position(**options.grid), axis_index("warpgroup")
  splits = options.grid["split"]
  count = lax.div(options.blocks - split + splits - 1, jnp.int32(splits))
  program = Program(options, inputs, outputs, scratch, b, g, split, warpgroup, count)
  pl.when(warpgroup < COMPUTING)(lambda: _compute(program))
  pl.when(warpgroup == COMPUTING)(lambda: _load(program))


def _candidates(program: Program, i: Any, tile: Any) -> tuple:
  """Returns whether any key of the program's i-th block may be a candidate of a tile of queries,
  and whether all keys are candidates of all of them.
  """
  tiles, first = program.inputs.tiles, first_key(program, i)
  # adding 0 is for `jax.shard_map`, see read_bounds
  start, latest_start, earliest_last, last = (x[program.b, tile] + 0 for x in tiles[:4])
  live = jnp.logical_and(last >= first, start < first + BLOCK_KV)
  return live, jnp.logical_and(latest_start <= first, earliest_last >= first + BLOCK_KV - 1)


def _load(program: Program) -> None:
  """Loads the blocks of keys and the tiles of queries: the part of the last warpgroup."""
  plgpu.set_max_registers(40, action="decrease")
  options, scratch = program.options, program.scratch

  def load_block(i, step):
    _load_keys(program, i)

    def load_tile(tile, step):
      heads = jnp.where(_candidates(program, i, tile)[0], options.repeats, 0)
      pl.loop(0, heads)(lambda r: _load_queries(program, tile, r, step + r))
      return step + heads

    return lax.fori_loop(0, options.tiles, load_tile, step)

  steps = lax.fori_loop(0, program.count, load_block, jnp.int32(0))
  observe_last(options.interpret, program.count, KEY_STAGES, scratch.key_free)
  observe_last(options.interpret, steps, QUERY_STAGES, scratch.query_free)


def _load_keys(program: Program, i: Any) -> None:
  """Loads the program's i-th block of keys, when its slot is free."""
  inputs, scratch = program.inputs, program.scratch
  slot, reused = slot_of(i, KEY_STAGES)
  full = scratch.key_full.at[slot]
  pl.when(reused)(lambda: plgpu.barrier_wait(scratch.key_free.at[slot]))
  for half in range(COMPUTING):
    tokens, part = pl.ds(first_key(program, i) + half * HALF, HALF), COMPUTING * slot + half
    key, score = inputs.key.at[program.b, tokens, program.g], inputs.score
    plgpu.copy_gmem_to_smem(key, scratch.key.at[part], full)
    plgpu.copy_gmem_to_smem(score.at[program.b, program.g, tokens], scratch.score.at[part], full)


def _load_queries(program: Program, tile: Any, r: Any, step: Any) -> None:
  """Loads a tile of queries of the r-th head of the KV head, when its slot is free."""
  inputs, scratch, b, g = program.inputs, program.scratch, program.b, program.g
  slot, reused = slot_of(step, QUERY_STAGES)
  h, places = g * program.options.repeats + r, pl.ds(tile * BLOCK, BLOCK)
  full = scratch.query_full.at[slot]
  pl.when(reused)(lambda: plgpu.barrier_wait(scratch.query_free.at[slot]))
  plgpu.copy_gmem_to_smem(inputs.query.at[b, places, h], scratch.query.at[slot], full)
  rows = Queries((b, h), (b, g), (b, g), (b, g), (b,), (b,), (b,))
  for source, row, buffer in zip(inputs.queries, rows, scratch.queries):
    plgpu.copy_gmem_to_smem(source.at[(*row, places)], buffer.at[slot], full)


def _compute(program: Program) -> None:
  """Computes the gradients of 64 keys of each block: the part of the first two warpgroups."""
  plgpu.set_max_registers(232, action="increase")
  registers, scratch = program.options.registers, program.scratch
  zero = registers.full((HALF,), 0, ROW)
  carry = jnp.int32(0), zero
  _, loss = lax.fori_loop(0, program.count, functools.partial(_compute_block, program), carry)
  row, part = scratch.row.at[program.warpgroup], COMPUTING * program.split + program.warpgroup
  _store(row, loss, program.outputs.loss.at[program.b, program.g, part])
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store(row: Any, x: jax.Array, target: Any) -> None:
  """Stores 64 numbers through shared memory, and does not wait."""
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  row[...] = x
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(row, target)


def _compute_block(program: Program, i: Any, carry: tuple) -> tuple:
  """Computes the gradients of this warpgroup's part of the i-th block of keys.

  Args:
    program: see Program.
    i: number of the block.
    carry: (steps of the circular buffer of queries so far, loss [64]).

  Returns:
    The next carry.
  """
  options, scratch, warpgroup = program.options, program.scratch, program.warpgroup
  slot, _ = slot_of(i, KEY_STAGES)
  part = COMPUTING * slot + warpgroup
  plgpu.barrier_wait(scratch.key_full.at[slot])
  step, loss = carry
  carry = step, loss, options.registers.full((HALF,), 0, ROW)

  def visit(tile, carry):
    live, whole = _candidates(program, i, tile)
    partly = jnp.logical_and(live, jnp.logical_not(whole))
    forms = (largest_whole, largest_part) if options.largest else (add_whole, add_part)
    for condition, add in zip((whole, partly), forms):
      carry = apply_if(condition, lambda carry: _tile(program, i, part, tile, add, carry), carry)
    return carry

  step, loss, dscore = lax.fori_loop(0, options.tiles, visit, carry)
  plgpu.barrier_arrive(scratch.key_free.at[slot])
  tokens = pl.ds(first_key(program, i) + warpgroup * HALF, HALF)
  target = program.outputs.dscore.at[program.b, program.g, tokens]
  _store(scratch.row.at[warpgroup], dscore, target)
  return step, loss


def _tile(program: Program, i: Any, part: Any, tile: Any, add: Callable, carry: tuple) -> tuple:
  """Adds a tile of queries to the gradients and the loss.

  Args:
    program: see Program.
    i: number of the block of keys.
    part: of the buffers of keys and scores that belongs to this warpgroup.
    tile: number of the tile of queries.
    add: a function of scorer_loss_pairs.
    carry: (step of the circular buffer, loss [64], dscore [64]).

  Returns:
    The next carry.
  """
  options, scratch, registers = program.options, program.scratch, program.options.registers
  (step, *sums), last_head = carry, options.repeats - 1

  def of_head(r):
    """Returns the logarithm to base 2 of the attention of the r-th head."""
    slot, _ = slot_of(step + r, QUERY_STAGES)
    plgpu.barrier_wait(scratch.query_full.at[slot])
    s = registers.matmul(SHAPE, scratch.key.at[part], scratch.query.at[slot])
    logsumexp = registers.vector(scratch.queries.logsumexp.at[slot], COLUMN)
    return s * options.to_log2 - by_column(logsumexp, SHAPE)

  def add_head(r, attention):
    attention += jnp.exp2(of_head(r))
    slot, _ = slot_of(step + r, QUERY_STAGES)
    pl.when(r < last_head)(lambda: plgpu.barrier_arrive(scratch.query_free.at[slot]))
    return attention

  if options.repeats > 1:
    attention = lax.fori_loop(0, options.repeats, add_head, registers.full(SHAPE, 0, MATRIX))
    attention *= 1 / options.repeats
    log2_attention = jnp.log2(jnp.maximum(attention, SMALLEST_NORMAL))
  else:
    log2_attention = of_head(0)
    attention = jnp.exp2(log2_attention)
  slot, _ = slot_of(step + last_head, QUERY_STAGES)
  score = registers.vector(scratch.score.at[part], ROW)
  pairs = Pairs(program, i, tile, slot, score, attention, log2_attention)
  loss, dscore = add(pairs, *sums)
  plgpu.barrier_arrive(scratch.query_free.at[slot])
  return step + options.repeats, loss, dscore
