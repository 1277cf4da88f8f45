"""Backward pass of SPARSEK attention on Hopper GPUs: gradients of keys, values and scores.

The same kernel serves the window's keys and the listed keys. It computes the softmax again from the
logsumexp. A program owns what it writes, without atomics, so results repeat to the bit. The
formulas of the gradients are in gates.py.

A program computes a few blocks of 128 keys, one after the other (work.py), with three warpgroups.
Query heads of a KV head and, inside, tiles of queries follow each other in one circular buffer:

  warpgroup 2, loads (40 registers a thread)   warpgroups 0 and 1, compute 64 keys each (232)
  ------------------------------------------   -------------------------------------------------
                                               load the first block's key, value, first, last, score
  for each block, head, tile of queries:       for each block:
    wait query_free                              wait keys_full
    load logsumexp, tau, query -> query_full     for each head, tile of queries:
    wait cotangent_free                            wait query_full, cotangent_full
    load delta, cotangent -> cotangent_full        S = key query^T,  dP = value cotangent^T
                                                   P, dS;  dvalue += P cotangent,  dkey += dS query
                                                   arrive cotangent_free, query_free
                                                   in the first head, before its wholly live tiles:
                                                     load the next block's key, value, ...
                                                 store dkey, dvalue, dscore

Both computing warpgroups pass all tiles, in the same order; at a tile that only the other one sees,
a warpgroup waits and arrives alone (pass_by).

  barrier (how many)        opens after
  query_full (stages)       the bulk copies (TMA) of logsumexp, query and, for lists, tau
  cotangent_full (stages)   the bulk copies of delta and cotangent
  keys_full (2 depth)       those of a warpgroup's key, value, first, last and, for lists, score
  query_free (stages)       both computing warpgroups have read what query_full guards
  cotangent_free (stages)   both have read what cotangent_full guards

depth: blocks of keys in shared memory, 2 where a program has more than one.

  shared memory             shape                type     bytes for D = 128, 2 stages of 64, depth 2
  key, later dkey           2 depth, 64, D       16 bit   64 KiB
  value, later dvalue       2 depth, 64, D       16 bit   64 KiB
  query, cotangent          stages, block_q, D   16 bit   32 KiB each
  logsumexp, delta, tau     stages, block_q      float32  512 B each
  first, last               2 depth, 64          int32    1 KiB each
  score, later dscore       2 depth, 64          float32  1 KiB
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.gates import tile_gradients, tile_weights
from sparsek.kernels.hopper.attention_key_program import (
  BLOCK_KV,
  Block,
  Inputs,
  Keys,
  Options,
  Outputs,
  Program,
  Scratch,
  block_of,
  bounds_of,
  is_written,
  keys_slot,
  load_keys,
  load_queries,
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
  in_block,
  matrix_buffer,
  opaque_zero,
  pass_by,
  run_kernel,
  slot_of,
  vector_buffer,
)
from sparsek.kernels.hopper.work import ListWork, Work

# the most blocks that a program computes, of the window's keys and of lists
MOST, MOST_LISTED = 16, 2


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

  Blocks that no query sees are zeros where tokens before the first query see them, and not written
  elsewhere.

  Args:
    query, cotangent, logsumexp, delta, gate, scale, tiling, interpret: as in `query_gradients`.
    key, value: [B, n, G, D] for the window, [B, G, places, D] for lists.
    first, last: int32, a key is live for queries first <= i < last;
      [B, n] for the window, [B, G, places] for lists.
    bounds: int32 of tiles.key_tiles with blocks of tiling.key_queries queries and 64 keys, those of
      a warpgroup; [B, n / 64, 4] or [B, G, places / 64, 4].
    tokens: n, those of a row.
    lists: number of lists in a row; 0 for the window.
    middle: number of places of a list that may be live at its first query.
    score, tau: [B, G, places] and [B, G, n] float32, of lists only.

  Returns:
    dkey and dvalue of the shape of `key`; for lists also dscore [B, G, places] float32, the
    gradients of the gates summed over queries.
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
  blocks = count // BLOCK_KV
  work: Work | ListWork = Work(batch, blocks, groups, most=MOST)
  skip = tokens - queries
  always = skip // BLOCK_KV
  if lists:
    always = -(-skip // (tokens // lists)) * (blocks // lists)
    work = ListWork(batch, lists, groups, blocks // lists, -(-middle // BLOCK_KV), MOST_LISTED)
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
    early=tiling.early and gate != "key_value",  # whose gradients need the registers
    interpret=interpret,
  )


def _scratch(options: Options) -> Scratch:
  slots, stages = COMPUTING * options.depth, options.stages
  keys = matrix_buffer(slots, HALF, options.dim, options.dtype)
  queries = matrix_buffer(stages, options.block_q, options.dim, options.dtype)
  per_query, per_key = vector_buffer(stages, options.block_q), vector_buffer(slots, HALF, jnp.int32)
  free = plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages)
  return Scratch(
    key=keys,
    value=keys,
    query=queries,
    cotangent=queries,
    logsumexp=per_query,
    delta=per_query,
    tau=per_query,
    first=per_key,
    last=per_key,
    score=vector_buffer(slots, HALF),
    query_full=plgpu.Barrier(num_arrivals=3 if options.is_list else 2, num_barriers=stages),
    cotangent_full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    keys_full=plgpu.Barrier(num_arrivals=5 if options.is_list else 4, num_barriers=slots),
    query_free=free,
    cotangent_free=free,
  )


def _kernel(options: Options, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
  index, warpgroup = axis_index("program", "warpgroup")
  blocks = options.work.blocks_of(index)
  program = Program(options, inputs, outputs, scratch, index, warpgroup, blocks)
  busy: Any = True
  if options.is_list:  # many blocks hold no token
    all_blocks = [block_of(program, jnp.int32(i)) for i in range(options.work.each)]
    busy = functools.reduce(jnp.logical_or, [is_written(program, block) for block in all_blocks])
  pl.when(jnp.logical_and(busy, warpgroup < COMPUTING))(lambda: _compute(program))
  pl.when(jnp.logical_and(busy, warpgroup == COMPUTING))(lambda: load_queries(program))


def _compute(program: Program) -> None:
  """Computes the gradients of 64 keys of each block: the part of the first two warpgroups."""
  plgpu.set_max_registers(232, action="increase")
  load_keys(program, jnp.int32(0))
  compute_block = functools.partial(_compute_block, program)
  lax.fori_loop(0, program.blocks, compute_block, jnp.int32(0))
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _compute_block(program: Program, i: Any, done: Any) -> Any:
  """Computes the gradients of this warpgroup's part of the i-th block of keys.

  Args:
    program: see Program.
    i: number of the block.
    done: steps of the circular buffer that the blocks before it took.

  Returns:
    `done` for the next block.
  """
  options, scratch, registers = program.options, program.scratch, program.options.registers
  block = block_of(program, i)
  tiles, slot = block.end - block.begin, keys_slot(program, i)
  pl.when(tiles > 0)(lambda: plgpu.barrier_wait(scratch.keys_full.at[slot]))
  score = registers.vector(scratch.score.at[slot], ROW) if options.is_list else None
  keys = Keys(slot, scratch.first.at[slot], scratch.last.at[slot], score)
  bounds = [
    jnp.clip(x, block.begin, block.end)
    for x in bounds_of(program, block.b, block.block, block.g, program.warpgroup)
  ]

  def add_head(r, carry):
    return _add_head(program, i, block, keys, bounds, done, r, carry)

  carry = (
    registers.full((HALF, options.dim), 0, MATRIX),
    registers.full((HALF, options.dim), 0, MATRIX),
    registers.full((HALF,), 0, ROW),
  )
  if options.repeats > 1:
    carry = lax.fori_loop(0, options.repeats, add_head, carry)
  else:
    carry = add_head(0, carry)
  pl.when(is_written(program, block))(lambda: _store(program, block, slot, *carry))
  return done + options.repeats * tiles


def _add_head(
  program: Program, i: Any, block: Block, keys: Keys, bounds: list, done: Any, r: Any, carry: tuple
) -> tuple:
  """Adds the gradients from all tiles of queries of a head.

  Args:
    program, block, keys: see Program, Block and Keys.
    i: number of the block.
    bounds: [b0, b1) tiles partly live, [b1, b2) wholly live, [b2, b3) partly live.
    done: steps of the circular buffer that the blocks before took.
    r: the head's number among those of the KV head.
    carry: (dkey without the scale, dvalue [64, D], dscore [64]).

  Returns:
    The next carry.
  """
  options, scratch = program.options, program.scratch
  tiles = block.end - block.begin
  b0, b1, b2, b3 = bounds
  skip = functools.partial(
    pass_by,
    stages=options.stages,
    full=(scratch.query_full, scratch.cotangent_full),
    free=(scratch.cotangent_free, scratch.query_free),
  )

  def step(t):
    return done + r * tiles + t - block.begin

  def sweep(masked):
    return lambda t, carry: _tile(program, keys, carry, step(t), t, masked)

  skip(step(block.begin), step(b0))
  carry = lax.fori_loop(b0, b1, sweep(True), carry)
  if options.depth > 1:

    @pl.when(jnp.logical_and(r == 0, i + 1 < program.blocks))
    def _load_next_keys():
      # Their slot must be free: the gradients of the block before have been stored from there.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      load_keys(program, i + 1)

  carry = lax.fori_loop(b1, b2, sweep(False), carry)
  carry = lax.fori_loop(b2, b3, sweep(True), carry)
  skip(step(b3), step(block.end))
  return carry


def _tile(program: Program, keys: Keys, carry: tuple, step: Any, t: Any, masked: bool) -> tuple:
  """Adds the gradients from one tile of queries.

  Args:
    program, keys: see Program and Keys.
    carry: as in `_add_head`.
    step: of the circular buffer.
    t: the tile's number.
    masked: whether some pairs may be dead.

  Returns:
    The next carry.
  """
  options, scratch = program.options, program.scratch
  registers, shape, to_log2 = options.registers, options.shape, options.scale * LOG2_E
  dkey, dvalue, dscore = carry
  slot, _ = slot_of(step, options.stages)
  query, cotangent = scratch.query.at[slot], scratch.cotangent.at[slot]
  keys_slot = keys.slot + opaque_zero(t)
  key, value = scratch.key.at[keys_slot], scratch.value.at[keys_slot]
  plgpu.barrier_wait(scratch.query_full.at[slot])
  plgpu.barrier_wait(scratch.cotangent_full.at[slot])

  def of_queries(buffer):
    return by_column(registers.vector(buffer.at[slot], COLUMN), shape)

  def probability(logits):
    p = jnp.exp2(logits * to_log2 - of_queries(scratch.logsumexp))
    if not masked:
      return p
    index = registers.index(shape, 1) + t * options.block_q
    live = jnp.logical_and(
      by_row(registers.vector(keys.first, ROW), shape) <= index,
      index < by_row(registers.vector(keys.last, ROW), shape),
    )
    return jnp.where(live, p, 0.0)

  def load_distance():
    return by_row(keys.score, shape) - of_queries(scratch.tau)

  distance = load_distance if options.is_list else None

  def gradients(s, dp):
    p, g, weights = tile_weights(s, probability, distance, gate=options.gate)

    def of_logits(later):
      product, delta = dp(later), of_queries(scratch.delta)
      ds, of_gates = tile_gradients(
        s, p, g, product, delta, distance, gate=options.gate, scale=options.scale
      )
      add = None if of_gates is None else lambda dscore: dscore + of_gates().sum(axis=1)
      return ds.astype(options.dtype), add

    def in_turn():
      ds, add = of_logits(1)
      return ds, lambda: dscore if add is None else in_block(t, add, dscore)

    weights = weights.astype(options.dtype)
    if options.early:
      return registers.matmul_add_in_turn((dvalue, dkey), weights, cotangent, in_turn, query)
    ds, add = of_logits(0)
    return weights, ds, dscore if add is None else add(dscore)

  *products, dscore = registers.two_matmuls(shape, (key, query), (value, cotangent), gradients)
  if options.early:
    dvalue, dkey = products
  else:
    weights, ds = products
    dvalue, dkey = registers.matmul_add((dvalue, dkey), ((weights, cotangent), (ds, query)))
  plgpu.barrier_arrive(scratch.cotangent_free.at[slot])
  plgpu.barrier_arrive(scratch.query_free.at[slot])
  return dkey, dvalue, dscore


def _store(
  program: Program, block: Block, slot: Any, dkey: jax.Array, dvalue: jax.Array, dscore: jax.Array
) -> None:
  """Stores the gradients of this warpgroup's keys, through the shared memory that held the keys;
  does not wait.
  """
  options, scratch, outputs = program.options, program.scratch, program.outputs
  key, value, score = (x.at[slot] for x in (scratch.key, scratch.value, scratch.score))
  key[...] = (dkey * options.scale).astype(options.dtype)
  value[...] = dvalue.astype(options.dtype)
  if options.is_list:
    score[...] = dscore
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(key, rows_of(program, outputs.dkey, block))
  plgpu.copy_smem_to_gmem(value, rows_of(program, outputs.dvalue, block))
  if options.is_list:
    plgpu.copy_smem_to_gmem(score, rows_of(program, outputs.dscore, block))
