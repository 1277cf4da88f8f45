"""Backward pass of SPARSEK attention on Hopper GPUs for heads of 256: gradients of keys, values and
scores.

As in attention_key_gradients.py the same kernel serves the window's keys and the listed keys, and a
program owns what it writes. The gradients of 64 keys take 128 registers a thread, those of their
values as many. So both computing warpgroups serve the same 64 keys, and each multiplies twice a
tile: one for the values, the other one for the keys. The logits' products go from one to the other
through shared memory.

A program computes a few blocks of 64 keys, one after the other (work.py). Query heads of a KV head
and, inside, tiles of queries follow each other in one circular buffer:

  warpgroup 2, loads (40)        warpgroup 0, values (232)        warpgroup 1, keys (232)
  -----------------------------  -------------------------------  -------------------------------
  for each block:                for each block:                  for each block:
    load the first tile            wait keys_full                   wait keys_full
    wait keys_free                 for each head, tile:             for each head, tile:
    load key, value, first, ...      wait query_full                  wait query_full
    for each head, tile:             S = key query^T                  wait cotangent_full
      wait query_free                wait products_free               issue dP = value cotangent^T
      load logsumexp, tau, query     S -> products_full               wait products_full; read S
      wait cotangent_free            P; arrive query_free             arrive products_free
      load delta, cotangent          wait cotangent_full              P; wait for dP; dS
                                     dvalue += P cotangent            arrive cotangent_free
                                     arrive cotangent_free            dkey += dS query
                                                                      arrive query_free
                                   arrive keys_free                 arrive keys_free
                                   store dvalue                     store dkey, dscore

  barrier (how many)        opens after
  query_full (stages)       the bulk copies (TMA) of logsumexp, query and, for lists, tau
  cotangent_full (stages)   the bulk copies of delta and cotangent
  keys_full (1)             those of key, value, first, last and, for lists, score
  query_free (stages)       both computing warpgroups have read what query_full guards
  cotangent_free (stages)   both have read what cotangent_full guards
  keys_free (1)             both have read the block's keys and values
  products_full (1)         warpgroup 0 has written S
  products_free (1)         warpgroup 1 has read it

  shared memory           shape                type      bytes for 2 stages of 64 queries
  key, value              64, D                16 bit    32 KiB each
  query, cotangent        stages, block_q, D   16 bit    64 KiB each
  products                64, block_q          float32   16 KiB
  logsumexp, delta, tau   stages, block_q      float32   512 B each
  first, last             64                   int32     256 B each
  score                   64                   float32   256 B
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.gates import tile_gradients, tile_weights
from sparsek.kernels.hopper.attention_key_program import Inputs, Outputs
from sparsek.kernels.hopper.attention_wide_key_program import (
  Block,
  Options,
  Program,
  Scratch,
  block_of,
  is_written,
  load,
  rows_of,
)
from sparsek.kernels.hopper.common import (
  COLUMN,
  COMPUTING,
  HALF,
  LOG2_E,
  MATRIX,
  ROW,
  Tiling,
  axes,
  axis_index,
  by_column,
  by_row,
  matrix_buffer,
  observe_last,
  run_kernel,
  slot_of,
  vector_buffer,
)
from sparsek.kernels.hopper.work import ListWork, Work

# the most blocks that a program computes, of the window's keys and of lists
MOST, MOST_LISTED = 32, 2
VALUES, KEYS = range(COMPUTING)  # the computing warpgroups


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
  """Computes the gradients of keys and values, and of listed keys those of the scores: arguments
  and results are those of `attention_key_gradients.key_gradients`.
  """
  options = _options(query, key, tokens, lists, middle, gate, scale, tiling, interpret)
  batch, groups, count = key.shape[0], *(key.shape[1:3] if lists else key.shape[2:0:-1])
  dscore = jax.ShapeDtypeStruct((batch, groups, count), jnp.float32) if lists else None
  like_key = jax.ShapeDtypeStruct(key.shape, query.dtype)
  return run_kernel(
    lambda *refs: _kernel(options, *refs),
    Inputs(query, key, value, cotangent, logsumexp, delta, first, last, bounds, score, tau),
    Outputs(like_key, like_key, dscore),
    _scratch(options),
    grid=(options.work.programs,),
    grid_names=axes("program"),
    interpret=interpret,
    kernel_name="sparsek_key_gradients",
  )


def _options(query, key, tokens, lists, middle, gate, scale, tiling, interpret) -> Options:
  batch, queries, heads, dim = query.shape
  groups, count = key.shape[1:3] if lists else key.shape[2:0:-1]
  blocks = count // HALF
  work: Work | ListWork = Work(batch, blocks, groups, most=MOST)
  skip = tokens - queries
  always = skip // HALF
  if lists:
    always = -(-skip // (tokens // lists)) * (blocks // lists)
    work = ListWork(batch, lists, groups, blocks // lists, -(-middle // HALF), MOST_LISTED)
  return Options(
    work=work,
    is_list=bool(lists),
    repeats=heads // groups,
    dim=dim,
    dtype=query.dtype,
    gate=gate,
    scale=scale,
    block_q=tiling.key_queries,
    skip=skip,
    always=always,
    stages=tiling.key_stages,
    interpret=interpret,
  )


def _scratch(options: Options) -> Scratch:
  stages, block_q = options.stages, options.block_q
  keys = matrix_buffer(1, HALF, options.dim, options.dtype)
  queries = matrix_buffer(stages, block_q, options.dim, options.dtype)
  per_query, per_key = vector_buffer(stages, block_q), vector_buffer(1, HALF, jnp.int32)
  free = plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages)
  passed = plgpu.Barrier(num_arrivals=1, num_barriers=1)
  return Scratch(
    key=keys,
    value=keys,
    query=queries,
    cotangent=queries,
    products=matrix_buffer(1, HALF, block_q, jnp.float32),
    logsumexp=per_query,
    delta=per_query,
    tau=per_query,
    first=per_key,
    last=per_key,
    score=vector_buffer(1, HALF),
    query_full=plgpu.Barrier(num_arrivals=3 if options.is_list else 2, num_barriers=stages),
    cotangent_full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    keys_full=plgpu.Barrier(num_arrivals=5 if options.is_list else 4, num_barriers=1),
    query_free=free,
    cotangent_free=free,
    keys_free=plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=1),
    products_full=passed,
    products_free=passed,
  )


def _kernel(options: Options, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
  index, warpgroup = axis_index("program", "warpgroup")
  program = Program(options, inputs, outputs, scratch, index, options.work.blocks_of(index))
  busy: Any = True
  if options.is_list:  # many blocks hold no token
    all_blocks = [block_of(program, jnp.int32(i)) for i in range(options.work.each)]
    busy = functools.reduce(jnp.logical_or, [is_written(program, block) for block in all_blocks])
  for role, run in ((VALUES, _compute_values), (KEYS, _compute_keys), (COMPUTING, load)):
    pl.when(jnp.logical_and(busy, warpgroup == role))(functools.partial(run, program))


def _compute_values(program: Program) -> None:
  """Computes the gradients of the values: the part of the first warpgroup."""
  steps = _compute(program, _add_to_values, _store_values)
  observe_last(program.options.interpret, steps, 1, program.scratch.products_free)


def _compute_keys(program: Program) -> None:
  """Computes the gradients of keys and scores: the part of the second warpgroup."""
  _compute(program, _add_to_keys, _store_keys)


def _compute(program: Program, add: Callable, store: Callable) -> Any:
  """Visits all blocks of keys; returns the number of steps.

  Args:
    program: see Program.
    add: adds the gradients from a tile of queries, as `_add_to_keys`.
    store: stores the gradients of a block, as `_store_keys`.
  """
  plgpu.set_max_registers(232, action="increase")
  options, scratch, registers = program.options, program.scratch, program.options.registers

  def compute_block(i, done):
    block = block_of(program, i)
    steps = options.repeats * block.tiles
    pl.when(steps > 0)(lambda: plgpu.barrier_wait(scratch.keys_full.at[0]))
    score = registers.vector(scratch.score.at[0], ROW) if options.is_list else None

    def add_head(r, carry):
      b0, b1, b2, b3 = block.bounds

      def sweep(masked):
        return lambda t, carry: add(
          program, score, carry, done + r * block.tiles + t - b0, t, masked
        )

      carry = lax.fori_loop(b0, b1, sweep(True), carry)
      carry = lax.fori_loop(b1, b2, sweep(False), carry)
      return lax.fori_loop(b2, b3, sweep(True), carry)

    carry = registers.full((HALF, options.dim), 0, MATRIX), registers.full((HALF,), 0, ROW)
    carry = lax.fori_loop(0, options.repeats, add_head, carry)
    pl.when(steps > 0)(lambda: plgpu.barrier_arrive(scratch.keys_free.at[0]))
    pl.when(is_written(program, block))(lambda: store(program, block, *carry))
    return done + steps

  return lax.fori_loop(0, program.blocks, compute_block, jnp.int32(0))


class Formulas(NamedTuple):
  """Functions of a tile that both computing warpgroups need, see gates.tile_weights."""

  probability: Callable
  distance: Callable | None
  of_queries: Callable  # broadcasts a vector of the tile's queries


def _formulas(program: Program, score: Any, slot: Any, t: Any, masked: bool) -> Formulas:
  """Returns the formulas for the t-th tile of queries; `masked` where some pairs may be dead."""
  options, scratch, registers = program.options, program.scratch, program.options.registers
  shape, to_log2 = options.shape, options.scale * LOG2_E

  def of_queries(buffer):
    return by_column(registers.vector(buffer.at[slot], COLUMN), shape)

  def probability(logits):
    p = jnp.exp2(logits * to_log2 - of_queries(scratch.logsumexp))
    if not masked:
      return p
    index = registers.index(shape, 1) + t * options.block_q
    live = jnp.logical_and(
      by_row(registers.vector(scratch.first.at[0], ROW), shape) <= index,
      index < by_row(registers.vector(scratch.last.at[0], ROW), shape),
    )
    return jnp.where(live, p, 0.0)

  def distance():
    return by_row(score, shape) - of_queries(scratch.tau)

  return Formulas(probability, distance if options.is_list else None, of_queries)


def _add_to_values(
  program: Program, score: Any, carry: tuple, step: Any, t: Any, masked: bool
) -> tuple:
  """Adds to the gradients of the values those from one tile of queries, and passes the logits'
  products on; as `_add_to_keys`, without gradients of scores.
  """
  options, scratch, registers = program.options, program.scratch, program.options.registers
  dvalue, nothing = carry
  slot, _ = slot_of(step, options.stages)
  plgpu.barrier_wait(scratch.query_full.at[slot])
  s = registers.matmul(options.shape, scratch.key.at[0], scratch.query.at[slot])
  pl.when(step > 0)(lambda: plgpu.barrier_wait(scratch.products_free.at[0]))
  scratch.products.at[0][...] = s
  plgpu.barrier_arrive(scratch.products_full.at[0])
  probability, distance, _ = _formulas(program, score, slot, t, masked)
  _, _, weights = tile_weights(s, probability, distance, gate=options.gate)
  weights = weights.astype(options.dtype)
  plgpu.barrier_arrive(scratch.query_free.at[slot])
  plgpu.barrier_wait(scratch.cotangent_full.at[slot])
  (dvalue,) = registers.matmul_add((dvalue,), ((weights, scratch.cotangent.at[slot]),))
  plgpu.barrier_arrive(scratch.cotangent_free.at[slot])
  return dvalue, nothing


def _add_to_keys(
  program: Program, score: Any, carry: tuple, step: Any, t: Any, masked: bool
) -> tuple:
  """Adds to the gradients of keys and scores those from one tile of queries.

  Args:
    program: see Program.
    score: [64] of the keys; None for the window.
    carry: (dkey without the scale [64, D], dscore [64]).
    step: of the circular buffers.
    t: the tile's number.
    masked: whether some pairs may be dead.

  Returns:
    The next carry.
  """
  options, scratch, registers = program.options, program.scratch, program.options.registers
  dkey, dscore = carry
  slot, _ = slot_of(step, options.stages)
  query, cotangent = scratch.query.at[slot], scratch.cotangent.at[slot]
  plgpu.barrier_wait(scratch.query_full.at[slot])
  plgpu.barrier_wait(scratch.cotangent_full.at[slot])
  probability, distance, of_queries = _formulas(program, score, slot, t, masked)

  def weigh():
    plgpu.barrier_wait(scratch.products_full.at[0])
    s = registers.matrix(scratch.products.at[0])
    plgpu.barrier_arrive(scratch.products_free.at[0])
    p, g, _ = tile_weights(s, probability, distance, gate=options.gate)
    return s, p, g

  dp, (s, p, g) = registers.matmul_beside(options.shape, scratch.value.at[0], cotangent, weigh)
  delta = of_queries(scratch.delta)
  ds, of_gates = tile_gradients(
    s, p, g, dp, delta, distance, gate=options.gate, scale=options.scale
  )
  ds = ds.astype(options.dtype)
  plgpu.barrier_arrive(scratch.cotangent_free.at[slot])
  (dkey,) = registers.matmul_add((dkey,), ((ds, query),))
  if of_gates is not None:
    dscore += of_gates().sum(axis=1)  # reads tau, which `query_free` gives back
  plgpu.barrier_arrive(scratch.query_free.at[slot])
  return dkey, dscore


def _store_values(program: Program, block: Block, dvalue: jax.Array, nothing: jax.Array) -> None:
  """Stores the gradients of a block's values."""
  del nothing
  options, outputs = program.options, program.outputs
  options.registers.store(rows_of(program, outputs.dvalue, block), dvalue.astype(options.dtype))


def _store_keys(program: Program, block: Block, dkey: jax.Array, dscore: jax.Array) -> None:
  """Stores the gradients of a block's keys and scores."""
  options, outputs = program.options, program.outputs
  dkey = (dkey * options.scale).astype(options.dtype)
  options.registers.store(rows_of(program, outputs.dkey, block), dkey)
  if options.is_list:
    rows_of(program, outputs.dscore, block)[...] = dscore
