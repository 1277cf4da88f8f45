"""The programs of the kernel for the gradients of keys (attention_key_gradients.py): what they read
and write, which blocks of keys each computes, and how it loads these and the tiles of queries.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.hopper.common import (
  COMPUTING,
  HALF,
  Ref,
  Registers,
  joined,
  observe_last,
  read_bounds,
  slot_of,
)
from sparsek.kernels.hopper.work import ListWork, Work

BLOCK_KV = COMPUTING * HALF  # keys of a block


class Inputs(NamedTuple):
  """Arrays in global memory, the arguments of `key_gradients`; score and tau are None for the
  window.
  """

  query: Any
  key: Any
  value: Any
  cotangent: Any
  logsumexp: Any
  delta: Any
  first: Any
  last: Any
  bounds: Any
  score: Any
  tau: Any


class Outputs(NamedTuple):
  """Results in global memory; dscore is None for the window."""

  dkey: Any
  dvalue: Any
  dscore: Any


class Scratch(NamedTuple):
  """Shared memory and barriers, see the drawing in attention_key_gradients.py."""

  key: Any
  value: Any
  query: Any
  cotangent: Any
  logsumexp: Any
  delta: Any
  tau: Any
  first: Any
  last: Any
  score: Any
  query_full: Any
  cotangent_full: Any
  keys_full: Any
  query_free: Any
  cotangent_free: Any


class Options(NamedTuple):
  """Everything that is known when the kernel is compiled."""

  work: Work | ListWork
  is_list: bool
  repeats: int  # query heads of a KV head
  dim: int
  dtype: Any
  gate: str
  scale: float
  block_q: int  # queries of a tile
  skip: int  # tokens before the first query
  always: int  # blocks of keys, from the first on, that are written though no query sees them
  stages: int  # tiles in the circular buffer
  early: bool  # see Tiling
  interpret: object

  @property
  def shape(self) -> tuple[int, int]:
    """Keys (of a warpgroup) by queries of a tile: products are transposed here."""
    return HALF, self.block_q

  @property
  def depth(self) -> int:
    """Blocks of keys in shared memory."""
    return min(2, self.work.each)

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
  index: Any  # of the program
  warpgroup: Any
  blocks: Any  # number of its blocks of keys


class Block(NamedTuple):
  """A block of keys, and the range of tiles of queries that see any of them."""

  b: Any  # row of the batch
  block: Any  # its number among those of the row and head
  g: Any  # KV head
  begin: Any
  end: Any


class Keys(NamedTuple):
  """The 64 keys of a computing warpgroup."""

  slot: Any  # of key and value in shared memory
  first: Ref
  last: Ref
  score: Any  # in registers; None for the window


def bounds_of(program: Program, b: Any, block: Any, g: Any, warpgroup: Any) -> tuple:
  """Reads which tiles of queries see the warpgroup's part of a block: see tiles.key_tiles."""
  row = (b, g) if program.options.is_list else (b,)
  return read_bounds(program.inputs.bounds, *row, COMPUTING * block + warpgroup)


def block_of(program: Program, i: Any) -> Block:
  """Returns the program's i-th block of keys."""
  b, block, g = program.options.work.item(program.index, i)
  ranges = (
    (b0, b3) for b0, _, _, b3 in (bounds_of(program, b, block, g, w) for w in range(COMPUTING))
  )
  return Block(b, block, g, *joined(*ranges))


def is_written(program: Program, block: Block) -> Any:
  """Returns whether the gradients of a block of keys are written."""
  seen = block.end > block.begin
  if not program.options.always:
    return seen
  return jnp.logical_or(seen, block.block < program.options.always)


def load_queries(program: Program) -> None:
  """Loads the tiles of queries: the part of the last warpgroup."""
  plgpu.set_max_registers(40, action="decrease")
  options, scratch = program.options, program.scratch

  def load_for_block(i, done):
    block = block_of(program, i)
    tiles = block.end - block.begin

    def load_head(r, _carry):
      h = block.g * options.repeats + r

      @pl.loop(0, tiles)
      def _(t):
        slot, reused = slot_of(done + r * tiles + t, options.stages)
        _load_tile(program, block, h, block.begin + t, slot, reused)

    if options.repeats > 1:
      lax.fori_loop(0, options.repeats, load_head, None)
    else:
      load_head(0, None)
    return done + options.repeats * tiles

  steps = lax.fori_loop(0, program.blocks, load_for_block, jnp.int32(0))
  observe_last(options.interpret, steps, options.stages, scratch.query_free, scratch.cotangent_free)


def _load_tile(program: Program, block: Block, h: Any, tile: Any, slot: Any, reused: Any) -> None:
  """Loads one tile of queries of head h, when its slot is free."""
  inputs, scratch, b, g = program.inputs, program.scratch, block.b, block.g
  block_q = program.options.block_q
  tokens = pl.ds(tile * block_q, block_q)
  rows = pl.ds(tile * block_q - program.options.skip, block_q)

  def copy(source, buffer, full):
    plgpu.copy_gmem_to_smem(source, buffer.at[slot], full.at[slot])

  pl.when(reused)(lambda: plgpu.barrier_wait(scratch.query_free.at[slot]))
  copy(inputs.logsumexp.at[b, h, rows], scratch.logsumexp, scratch.query_full)
  if program.options.is_list:
    copy(inputs.tau.at[b, g, tokens], scratch.tau, scratch.query_full)
  copy(inputs.query.at[b, rows, h], scratch.query, scratch.query_full)
  pl.when(reused)(lambda: plgpu.barrier_wait(scratch.cotangent_free.at[slot]))
  copy(inputs.delta.at[b, h, rows], scratch.delta, scratch.cotangent_full)
  copy(inputs.cotangent.at[b, rows, h], scratch.cotangent, scratch.cotangent_full)


def keys_slot(program: Program, i: Any) -> Any:
  """Returns the slot in shared memory of this warpgroup's part of the i-th block."""
  if program.options.depth == 1:
    return program.warpgroup
  return COMPUTING * slot_of(i, program.options.depth)[0] + program.warpgroup


def rows_of(program: Program, ref: Ref, block: Block) -> Ref:
  """Returns this warpgroup's part of a block of keys, or of their gradients, in global memory."""
  tokens = pl.ds(block.block * BLOCK_KV + program.warpgroup * HALF, HALF)
  if program.options.is_list:
    return ref.at[block.b, block.g, tokens]
  return ref.at[block.b, tokens, block.g]


def limits_of(program: Program, ref: Ref, block: Block) -> Ref:
  """Returns this warpgroup's part of `first` or `last`, which all heads share for the window."""
  tokens = pl.ds(block.block * BLOCK_KV + program.warpgroup * HALF, HALF)
  if program.options.is_list:
    return ref.at[block.b, block.g, tokens]
  return ref.at[block.b, tokens]


def load_keys(program: Program, i: Any) -> None:
  """Loads this warpgroup's part of the i-th block of keys, if any query sees the block."""
  inputs, scratch = program.inputs, program.scratch
  block = block_of(program, i)

  @pl.when(block.end > block.begin)
  def _():
    slot = keys_slot(program, i)
    full = scratch.keys_full.at[slot]

    def copy(source, buffer):
      plgpu.copy_gmem_to_smem(source, buffer.at[slot], full)

    copy(rows_of(program, inputs.key, block), scratch.key)
    copy(rows_of(program, inputs.value, block), scratch.value)
    copy(limits_of(program, inputs.first, block), scratch.first)
    copy(limits_of(program, inputs.last, block), scratch.last)
    if program.options.is_list:
      copy(rows_of(program, inputs.score, block), scratch.score)
