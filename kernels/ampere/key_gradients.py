"""Backward pass of SPARSEK attention on GPUs since Ampere: gradients of keys, values and scores.

The same kernel serves the window's keys and the listed keys. It computes the softmax again from the
logsumexp. A program owns what it writes, without atomics, so results repeat to the bit. The
formulas of the gradients are in gates.py.

A program computes a block of 64 keys. For each query head of the KV head it visits the tiles of 64
queries that see the block, in steps through circular buffers. Copies are asynchronous, in groups:
the cotangents of step 0, its queries, the cotangents of step 1, and so on.

  cotangents of step j                           queries of step j
  wait for their group, for all warps            wait for their group, for all warps
  begin to copy the queries of j + stages - 1    S = key query^T, P;  dvalue += P cotangent
  dP = value cotangent^T                         wait for all warps
                                                 begin to copy the cotangents of j + stages
                                                 dS;  dkey += dS query

  shared memory       shape              type     bytes for D = 128
  key, value          64, D              16 bit   16 KiB each; the gradients in the end
  query, cotangent    stages, 64, D      16 bit   16 KiB each and stage
  floats              1 + 3 stages, 64   float32  scores of keys; logsumexp, delta, thresholds
  integers            2, 64              int32    first and last
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparsek.kernels.ampere.tiles import matrix_buffer, parts_of, run_kernel, vector_buffer
from sparsek.kernels.ampere.warp_matrices import Matrices
from sparsek.kernels.ampere.warp_products import BLOCK
from sparsek.kernels.gates import tile_gradients, tile_weights
from sparsek.kernels.hopper.attention_key_program import Inputs, Outputs
from sparsek.kernels.hopper.common import (
  COLUMN,
  LOG2_E,
  MATRIX,
  ROW,
  Ref,
  Tiling,
  axes,
  axis_index,
  by_column,
  by_row,
  in_block,
  read_bounds,
)
from sparsek.kernels.hopper.work import ListWork, Work


class Scratch(NamedTuple):
  """Shared memory, see the drawing above."""

  key: Any
  value: Any
  query: Any
  cotangent: Any
  floats: Any
  integers: Any


class Options(NamedTuple):
  """Everything that is known when the kernel is compiled."""

  work: Work | ListWork
  is_list: bool
  repeats: int  # query heads of a KV head
  dim: int
  dtype: Any
  gate: str
  scale: float
  skip: int  # tokens before the first query
  always: int  # blocks of keys, from the first on, that are written though no query sees them
  stages: int
  interpret: object

  @property
  def registers(self) -> Matrices:
    """Operations on matrices."""
    return Matrices(self.interpret)


class Block(NamedTuple):
  """A block of keys, and the tiles of queries that see it.

  Attributes:
    b, block, g: row of the batch, number of the block among those of the row and head, KV head.
    bounds: [b0, b1) tiles partly live, [b1, b2) wholly live, [b2, b3) partly live.
    place: index of the block's keys on the axes of `key`, see `Matrices.copy_rows`.
    limits: index of their `first` and `last`, which all heads share for the window.
    start: the first key of the block.
  """

  b: Any
  block: Any
  g: Any
  bounds: tuple
  place: tuple
  limits: tuple
  start: Any

  @property
  def tiles(self) -> Any:
    """The number of tiles."""
    return self.bounds[3] - self.bounds[0]


class Program(NamedTuple):
  """Everything that the functions of a program need."""

  options: Options
  inputs: Inputs
  scratch: Scratch
  block: Block
  first: Any  # of the keys, in shared memory, as are the next two
  last: Any
  score: Any


def key_gradients(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  cotangent: jax.Array,
  logsumexp: jax.Array,
  delta: jax.Array,
  first: jax.Array,
  last: jax.Array,
  bounds: jax.Array,
  *,
  gate: str,
  scale: float,
  tiling: Tiling,
  tokens: int,
  lists: int = 0,
  middle: int = 0,
  score: jax.Array | None = None,
  tau: jax.Array | None = None,
  interpret: object = None,
) -> list[jax.Array]:
  """Computes the gradients of keys and values, and of listed keys those of the scores.

  Args and results are those of `hopper.attention_key_gradients.key_gradients`, but D is 64 or 128.
  """
  batch, queries, heads, dim = query.shape
  groups, count = key.shape[1:3] if lists else key.shape[2:0:-1]
  blocks, skip = count // BLOCK, tokens - queries
  work: Work | ListWork = Work(batch, blocks, groups, most=1)
  always = skip // BLOCK
  if lists:
    work = ListWork(batch, lists, groups, blocks // lists, -(-middle // BLOCK), most=1)
    always = -(-skip // (tokens // lists)) * (blocks // lists)
  options = Options(
    work=work,
    is_list=bool(lists),
    repeats=heads // groups,
    dim=dim,
    dtype=query.dtype,
    gate=gate,
    scale=scale,
    skip=skip,
    always=always,
    stages=tiling.key_stages,
    interpret=interpret,
  )
  like_key = jax.ShapeDtypeStruct(key.shape, query.dtype)
  dscore = jax.ShapeDtypeStruct((batch, groups, count), jnp.float32) if lists else None
  keys = matrix_buffer(1, BLOCK, dim, query.dtype)
  tile = matrix_buffer(options.stages, BLOCK, dim, query.dtype)
  return run_kernel(
    lambda *refs: _kernel(options, *refs),
    Inputs(query, key, value, cotangent, logsumexp, delta, first, last, bounds, score, tau),
    Outputs(like_key, like_key, dscore),
    Scratch(
      key=keys,
      value=keys,
      query=tile,
      cotangent=tile,
      floats=vector_buffer(1 + 3 * options.stages),
      integers=vector_buffer(2, jnp.int32),
    ),
    grid=(work.programs,),
    grid_names=axes("program"),
    interpret=interpret,
    kernel_name="sparsek_mma_key_gradients",
  )


def _block_of(options: Options, bounds: Ref) -> Block:
  """Returns the program's block of keys."""
  b, block, g = options.work.item(axis_index("program"), jnp.int32(0))
  first = block * BLOCK
  if options.is_list:
    bounds = read_bounds(bounds, b, g, block)
    return Block(b, block, g, bounds, (b, g, None), (b, g), first)
  bounds = read_bounds(bounds, b, block)
  return Block(b, block, g, bounds, (b, None, g), (b,), first)


def _kernel(options: Options, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
  block = _block_of(options, inputs.bounds)
  is_written = block.tiles > 0
  if options.always:
    is_written = jnp.logical_or(is_written, block.block < options.always)
  pl.when(is_written)(lambda: _compute(options, inputs, outputs, scratch, block))


def _compute(
  options: Options, inputs: Inputs, outputs: Outputs, scratch: Scratch, block: Block
) -> None:
  matrices, stages = options.registers, options.stages
  key, value = scratch.key.at[0], scratch.value.at[0]
  first, last, score = scratch.integers.at[0], scratch.integers.at[1], scratch.floats.at[0]
  matrices.copy_rows(inputs.key, block.place, block.start, BLOCK, key)
  matrices.copy_rows(inputs.value, block.place, block.start, BLOCK, value)
  matrices.copy_vector(inputs.first, block.limits, block.start, first)
  matrices.copy_vector(inputs.last, block.limits, block.start, last)
  if options.is_list:
    matrices.copy_vector(inputs.score, block.limits, block.start, score)
  program = Program(options, inputs, scratch, block, first, last, score)
  for step in range(stages):
    _load_cotangents(program, jnp.int32(step))
    if step < stages - 1:
      _load_queries(program, jnp.int32(step))

  def add_head(r, carry):
    b0, b1, b2, b3 = block.bounds

    def sweep(masked):
      return lambda t, carry: _tile(program, carry, r * block.tiles + t - b0, t, masked)

    carry = lax.fori_loop(b0, b1, sweep(True), carry)
    carry = lax.fori_loop(b1, b2, sweep(False), carry)
    return lax.fori_loop(b2, b3, sweep(True), carry)

  carry = (
    matrices.full((BLOCK, options.dim), 0, MATRIX),
    matrices.full((BLOCK, options.dim), 0, MATRIX),
    matrices.full((BLOCK,), 0, ROW),
  )
  if options.repeats > 1:
    dkey, dvalue, dscore = lax.fori_loop(0, options.repeats, add_head, carry)
  else:
    dkey, dvalue, dscore = add_head(0, carry)
  # A block that no query sees has waited for no copies yet, and the gradients go where they land.
  matrices.wait(0)
  dkey = (dkey * options.scale).astype(options.dtype)
  matrices.store_rows(dkey, key, outputs.dkey, block.place, block.start)
  matrices.store_rows(dvalue.astype(options.dtype), value, outputs.dvalue, block.place, block.start)
  if options.is_list:
    matrices.store_vector(dscore, outputs.dscore, block.limits, block.start)


def _load(program: Program, step: Any, load: Any) -> None:
  """Calls load(slot, head, tile) for a step, if there is such a step, and ends the group."""
  options, block = program.options, program.block
  tiles = block.tiles

  @pl.when(step < options.repeats * tiles)
  def _():
    r = lax.div(step, tiles) if options.repeats > 1 else jnp.int32(0)
    tile = block.bounds[0] + step - r * tiles
    load(lax.rem(step, jnp.int32(options.stages)), block.g * options.repeats + r, tile)

  options.registers.commit()


def _load_queries(program: Program, step: Any) -> None:
  """Starts to copy the queries of a step."""
  options, inputs, scratch, block = program[:4]
  matrices, floats = options.registers, scratch.floats.at[1:]

  def load(slot, h, tile):
    first = tile * BLOCK - options.skip
    matrices.copy_rows(inputs.query, (block.b, None, h), first, BLOCK, scratch.query.at[slot])
    matrices.copy_vector(inputs.logsumexp, (block.b, h), first, floats.at[3 * slot])
    if options.is_list:
      matrices.copy_vector(inputs.tau, (block.b, block.g), tile * BLOCK, floats.at[3 * slot + 1])

  _load(program, step, load)


def _load_cotangents(program: Program, step: Any) -> None:
  """Starts to copy the cotangents of a step."""
  options, inputs, scratch, block = program[:4]
  matrices, floats = options.registers, scratch.floats.at[1:]

  def load(slot, h, tile):
    first = tile * BLOCK - options.skip
    into = scratch.cotangent.at[slot]
    matrices.copy_rows(inputs.cotangent, (block.b, None, h), first, BLOCK, into)
    matrices.copy_vector(inputs.delta, (block.b, h), first, floats.at[3 * slot + 2])

  _load(program, step, load)


def _tile(program: Program, carry: tuple, step: Any, t: Any, masked: bool) -> tuple:
  """Adds the gradients from one tile of queries.

  Args:
    program: see Program.
    carry: (dkey without the scale, dvalue [64, D], dscore [64]).
    step: of the circular buffers.
    t: the tile's number.
    masked: whether some pairs may be dead.

  Returns:
    The next carry.
  """
  options, scratch = program.options, program.scratch
  matrices, stages = options.registers, options.stages
  dkey, dvalue, dscore = carry
  slot = lax.rem(step, jnp.int32(stages))
  parts = parts_of(options.gate, options.is_list)
  matrices.wait(2 * (stages - 1))
  _load_queries(program, step + (stages - 1))
  gradients = []

  def add_keys(dkey, part, ds):
    query = scratch.query.at[slot, part]
    return in_block(t, lambda x: matrices.add_product(x, ds, query), dkey)

  for i, part in enumerate(parts):
    dp = matrices.product(scratch.value.at[0], scratch.cotangent.at[slot, part])
    if i == 0:
      matrices.wait(2 * (stages - 1))
    s = matrices.product(scratch.key.at[0], scratch.query.at[slot, part])
    first_query = t * BLOCK + part.start if masked else None
    vectors = [scratch.floats.at[1 + 3 * slot + j, part] for j in range(3)]
    weights, ds, of_gates = _logit_gradients(program, s, dp, vectors, first_query)
    if of_gates is not None:
      dscore = in_block(t, lambda x, f=of_gates: x + f().sum(axis=1), dscore)
    dvalue = in_block(
      t,
      lambda x, w=weights, c=scratch.cotangent.at[slot, part]: matrices.add_product(x, w, c),
      dvalue,
    )
    if len(parts) > 2:  # with gates there are no registers to keep them
      dkey = add_keys(dkey, part, ds)
    else:
      gradients.append((part, ds))
  matrices.sync()
  _load_cotangents(program, step + stages)
  for part, ds in gradients:
    dkey = add_keys(dkey, part, ds)
  return dkey, dvalue, dscore


def _logit_gradients(
  program: Program, s: jax.Array, dp: jax.Array, vectors: list[Ref], first_query: Any
) -> tuple:
  """Computes the weights of a part of a tile, the gradients of its logits, and a function for those
  of its gates (see gates.tile_gradients).

  Args:
    program: see Program.
    s, dp: products of keys and queries, of values and cotangents.
    vectors: logsumexp, thresholds and delta of the queries, in shared memory.
    first_query: the first one, or None where all pairs are live.
  """
  options, shape, matrices = program.options, s.shape, program.options.registers
  logsumexp, tau, delta = vectors

  def of_queries(ref):
    return by_column(matrices.vector(ref, COLUMN), shape)

  def of_keys(ref):
    return by_row(matrices.vector(ref, ROW), shape)

  def probability(logits):
    p = jnp.exp2(logits * (options.scale * LOG2_E) - of_queries(logsumexp))
    if first_query is None:
      return p
    index = matrices.index(shape, 1) + first_query
    live = jnp.logical_and(of_keys(program.first) <= index, index < of_keys(program.last))
    return jnp.where(live, p, 0.0)

  def load_distance():
    return of_keys(program.score) - of_queries(tau)

  distance = load_distance if options.is_list else None
  p, g, weights = tile_weights(s, probability, distance, gate=options.gate)
  ds, of_gates = tile_gradients(
    s, p, g, dp, of_queries(delta), distance, gate=options.gate, scale=options.scale
  )
  # The compiler must not put off the rounding, which halves the registers.
  weights, ds = lax.optimization_barrier((weights.astype(options.dtype), ds.astype(options.dtype)))
  return weights, ds, of_gates
