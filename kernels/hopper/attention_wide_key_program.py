"""The programs of the kernel for the gradients of keys of heads of 256 (attention_wide_keys.py):
what they read and write, which blocks of keys each computes, and how it loads these and the tiles
of queries.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.hopper.attention_key_program import Inputs, Outputs
from sparsek.kernels.hopper.common import HALF, Ref, Registers, observe_last, read_bounds, slot_of
from sparsek.kernels.hopper.work import ListWork, Work


class Scratch(NamedTuple):
  """Shared memory and barriers, see the drawing in attention_wide_keys.py."""

  key: Any
  value: Any
  query: Any
  cotangent: Any
  products: Any
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
  keys_free: Any
  products_full: Any
  products_free: Any


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
  stages: int  # tiles in the circular buffers
  interpret: object

  @property
  def shape(self) -> tuple[int, int]:
    """Keys by queries of a tile: products are transposed here."""
    return HALF, self.block_q

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
  blocks: Any  # number of its blocks of keys


class Block(NamedTuple):
  """A block of 64 keys, and the tiles of queries that see any of them: see tiles.key_tiles."""

  b: Any  # row of the batch
  block: Any  # its number among those of the row and head
  g: Any  # KV head
  bounds: tuple

  @property
  def tiles(self) -> Any:
    """The number of tiles of queries of a head."""
    return self.bounds[3] - self.bounds[0]


def block_of(program: Program, i: Any) -> Block:
  """Returns the program's i-th block of keys."""
  b, block, g = program.options.work.item(program.index, i)
  row = (b, g) if program.options.is_list else (b,)
  return Block(b, block, g, read_bounds(program.inputs.bounds, *row, block))


def is_written(program: Program, block: Block) -> Any:
  """Returns whether the gradients of a block of keys are written."""
  return jnp.logical_or(block.tiles > 0, block.block < program.options.always)


def load(program: Program) -> None:
  """Loads the blocks of keys and the tiles of queries: the part of the last warpgroup."""
  plgpu.set_max_registers(40, action="decrease")
  options, scratch = program.options, program.scratch

  def load_block(i, carry):
    done, loaded = carry
    block = block_of(program, i)
    steps = options.repeats * block.tiles

    @pl.when(steps > 0)
    def _():
      # The keys' place may still be in use, the place of the first tile less long.
      _load_tile(program, block, 0, done)
      pl.when(loaded > 0)(lambda: plgpu.barrier_wait(scratch.keys_free.at[0]))
      _load_keys(program, block)
      pl.loop(1, steps)(lambda step: _load_tile(program, block, step, done))

    return done + steps, loaded + jnp.where(steps > 0, 1, 0)

  steps, loaded = lax.fori_loop(0, program.blocks, load_block, (jnp.int32(0), jnp.int32(0)))
  observe_last(options.interpret, steps, options.stages, scratch.query_free, scratch.cotangent_free)
  observe_last(options.interpret, loaded, 1, scratch.keys_free)


def _load_keys(program: Program, block: Block) -> None:
  """Loads a block of keys."""
  inputs, scratch = program.inputs, program.scratch
  full = scratch.keys_full.at[0]

  def copy(source, buffer):
    plgpu.copy_gmem_to_smem(source, buffer.at[0], full)

  copy(rows_of(program, inputs.key, block), scratch.key)
  copy(rows_of(program, inputs.value, block), scratch.value)
  copy(_limits_of(program, inputs.first, block), scratch.first)
  copy(_limits_of(program, inputs.last, block), scratch.last)
  if program.options.is_list:
    copy(rows_of(program, inputs.score, block), scratch.score)


def rows_of(program: Program, ref: Ref, block: Block) -> Ref:
  """Returns a block of keys, or of their gradients, in global memory."""
  tokens = pl.ds(block.block * HALF, HALF)
  if program.options.is_list:
    return ref.at[block.b, block.g, tokens]
  return ref.at[block.b, tokens, block.g]


def _limits_of(program: Program, ref: Ref, block: Block) -> Ref:
  """Returns a block of `first` or `last`, which all heads share for the window."""
  if program.options.is_list:
    return rows_of(program, ref, block)
  return ref.at[block.b, pl.ds(block.block * HALF, HALF)]


def _load_tile(program: Program, block: Block, step: Any, done: Any) -> None:
  """Loads the tile of queries of a block's step, when its slot is free; `done` steps of the
  circular buffers were before the block.
  """
  options, inputs, scratch = program.options, program.inputs, program.scratch
  (b, _, g, bounds), block_q = block, options.block_q
  slot, reused = slot_of(done + step, options.stages)
  step += block.tiles - block.tiles  # an array
  h = g * options.repeats + lax.div(step, block.tiles)
  tile = bounds[0] + lax.rem(step, block.tiles)
  tokens = pl.ds(tile * block_q, block_q)
  rows = pl.ds(tile * block_q - options.skip, block_q)

  def copy(source, buffer, full):
    plgpu.copy_gmem_to_smem(source, buffer.at[slot], full.at[slot])

  pl.when(reused)(lambda: plgpu.barrier_wait(scratch.query_free.at[slot]))
  copy(inputs.logsumexp.at[b, h, rows], scratch.logsumexp, scratch.query_full)
  if options.is_list:
    copy(inputs.tau.at[b, g, tokens], scratch.tau, scratch.query_full)
  copy(inputs.query.at[b, rows, h], scratch.query, scratch.query_full)
  pl.when(reused)(lambda: plgpu.barrier_wait(scratch.cotangent_free.at[slot]))
  copy(inputs.delta.at[b, h, rows], scratch.delta, scratch.cotangent_full)
  copy(inputs.cotangent.at[b, rows, h], scratch.cotangent, scratch.cotangent_full)
