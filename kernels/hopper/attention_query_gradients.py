"""Backward pass of SPARSEK attention on Hopper GPUs: gradients of queries and thresholds.

The kernel computes the softmax again from the logsumexp. A program owns what it writes, without
atomics, so results repeat to the bit. The formulas of the gradients are in gates.py.

A program computes 128 queries of one head with three warpgroups:

  warpgroup 2, loads (40 registers a thread)   warpgroups 0 and 1, compute 64 queries each (232)
  ------------------------------------------   ---------------------------------------------------
                                               load query, cotangent, out, and the queries' vectors
  load the block's own tiles; read bounds      read bounds
                                               wait rows_full; delta = sum(cotangent * out)
  for each tile of either warpgroup:           for each tile:
    wait key_free                                wait key_full, value_full
    load key, last, score -> key_full            S = query key^T,  dP = cotangent value^T
    wait value_free                              arrive value_free
    load value            -> value_full          dS, dtau from S and dP;  dquery += dS key (*)
                                                 arrive key_free (*)
                                               store dquery, delta, dtau

(*) with late products (see Tiling) those of the tile before, issued behind dP, so that the tensor
cores add them while dS is computed; those of the last tile follow after the tiles of the window,
and after those of the list.

Both warpgroups pass all tiles, in the same order; at a tile that only the other one sees, a
warpgroup waits and arrives alone (pass_by).

  barrier (how many)      opens after
  key_full (stages)       the bulk copies (TMA) of key, last and score
  value_full (stages)     the bulk copy of value
  rows_full (2)           the seven copies of a warpgroup's queries
  key_free (stages)       both computing warpgroups have read key, last, score of the slot
  value_free (stages)     both have read value of the slot

  shared memory                shape                type     bytes for D = 128, 3 stages of 64 keys
  query, later dquery          2, 64, D             16 bit    32 KiB
  cotangent, out               2, 64, D             16 bit    32 KiB each
  key, value                   stages, block_kv, D  16 bit    48 KiB each
  last                         stages, block_kv     int32    768 B
  score                        stages, block_kv     float32  768 B
  row: logsumexp, later dtau   2, 64                float32  512 B
  delta, tau                   2, 64                float32  512 B each
  window_start, entered        2, 64                int32    512 B each
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.gates import tile_gradients, tile_weights
from sparsek.kernels.hopper.attention_tiles import (
  Listed,
  Options,
  Position,
  Steps,
  buffers_of,
  live_pairs,
  load_tiles,
  newest_tile,
  options_of,
  position,
)
from sparsek.kernels.hopper.common import (
  COLUMN,
  COMPUTING,
  HALF,
  MATRIX,
  ROW,
  Tiling,
  by_column,
  by_row,
  grid_of,
  in_block,
  joined,
  matrix_buffer,
  opaque_zero,
  pass_by,
  read_bounds,
  run_kernel,
  slot_of,
  vector_buffer,
)


class Inputs(NamedTuple):
  """Arrays in global memory: the arguments of `query_gradients`."""

  query: Any
  key: Any
  value: Any
  cotangent: Any
  out: Any
  logsumexp: Any
  window_start: Any
  entered: Any
  tau: Any
  listed: Listed
  bounds: Any


class Outputs(NamedTuple):
  """Results in global memory."""

  dquery: Any
  delta: Any
  dtau: Any


class Scratch(NamedTuple):
  """Shared memory and barriers, see the drawing above."""

  query: Any
  cotangent: Any
  out: Any
  key: Any
  value: Any
  last: Any
  score: Any
  row: Any
  delta: Any
  tau: Any
  window_start: Any
  entered: Any
  key_full: Any
  value_full: Any
  rows_full: Any
  key_free: Any
  value_free: Any


class Program(NamedTuple):
  """Everything that the roles of a program need."""

  options: Options
  tiling: Tiling
  inputs: Inputs
  outputs: Outputs
  scratch: Scratch
  at: Position


class Visits(NamedTuple):
  """The tiles that the warpgroups of a program visit.

  Attributes:
    bounds: t0, ..., t5 of each computing warpgroup: see tiles.query_bounds.
    tiles: those of either warpgroup.
    end: one past the last tile of the list that either warpgroup visits.
  """

  bounds: list[tuple]
  tiles: Steps
  end: Any


class Rows(NamedTuple):
  """The 64 queries of a computing warpgroup."""

  first: Any  # token of the first one
  places: Any  # slice of them among the queries
  query: Any  # in registers, or None where it stays in shared memory
  logsumexp: jax.Array
  tau: jax.Array
  delta: jax.Array


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

  Args:
    query, key, value, window_start, entered, tau, listed, gate, scale, chunk, tiling, interpret: as
      in `attention_forward.forward`.
    out, logsumexp: its results.
    cotangent: [B, m, H, D] gradient of the output.
    bounds: [B, G, n / 64, 6] int32, of tiles.query_bounds with blocks of 64 queries, those of a
      warpgroup.

  Returns:
    dquery [B, m, H, D]; delta [B, H, m] float32, the products of output and cotangent;
    dtau [B, H, m] float32, of each head.
  """
  batch, queries, heads, _ = query.shape
  listed = Listed(*listed)
  options = options_of(
    query,
    key,
    listed,
    chunk=chunk,
    gate=gate,
    scale=scale,
    block_kv=tiling.query_keys,
    stages=tiling.query_stages,
    interpret=interpret,
  )
  per_query = jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)
  return run_kernel(
    lambda *refs: _kernel(options, tiling, *refs),
    Inputs(
      query, key, value, cotangent, out, logsumexp, window_start, entered, tau, listed, bounds
    ),
    Outputs(jax.ShapeDtypeStruct(query.shape, query.dtype), per_query, per_query),
    _scratch(options),
    **grid_of(**options.grid),
    interpret=interpret,
    kernel_name="sparsek_query_gradients",
  )


def _scratch(options: Options) -> Scratch:
  block_kv, stages = options.block_kv, options.stages
  rows = matrix_buffer(COMPUTING, HALF, options.dim, options.dtype)
  tile = matrix_buffer(stages, block_kv, options.dim, options.dtype)
  floats, integers = vector_buffer(COMPUTING, HALF), vector_buffer(COMPUTING, HALF, jnp.int32)
  return Scratch(
    query=rows,
    cotangent=rows,
    out=rows,
    key=tile,
    value=tile,
    last=vector_buffer(stages, block_kv, jnp.int32),
    score=vector_buffer(stages, block_kv),
    row=floats,
    delta=floats,
    tau=floats,
    window_start=integers,
    entered=integers,
    key_full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
    value_full=plgpu.Barrier(num_arrivals=1, num_barriers=stages),
    rows_full=plgpu.Barrier(num_arrivals=7, num_barriers=COMPUTING),
    key_free=plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages),
    value_free=plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages),
  )


def _kernel(
  options: Options, tiling: Tiling, inputs: Inputs, outputs: Outputs, scratch: Scratch
) -> None:
  program = Program(options, tiling, inputs, outputs, scratch, position(options))
  pl.when(program.at.warpgroup < COMPUTING)(lambda: _compute(program))
  pl.when(program.at.warpgroup == COMPUTING)(lambda: _load(program))


def _find_tiles(program: Program) -> Visits:
  """Reads which tiles the warpgroups visit."""
  options, at, ref = program.options, program.at, program.inputs.bounds
  bounds = [read_bounds(ref, at.b, at.g, COMPUTING * at.block + i) for i in range(COMPUTING)]
  newest = newest_tile(options, at)
  begin, end = joined(*((t0, t3) for t0, _, _, t3, _, _ in bounds))
  in_window = newest - bounds[0][4] + 1  # the first warpgroup sees the most of the past
  return Visits(bounds, Steps(newest, in_window, begin, in_window + end - begin), end)


def _load(program: Program) -> None:
  """Loads the tiles of keys and values: the part of the last warpgroup."""
  plgpu.set_max_registers(40, action="decrease")
  options, inputs = program.options, program.inputs
  load_tiles(
    options,
    program.at,
    lambda: _find_tiles(program).tiles,
    buffers_of(program.scratch),
    inputs.key,
    inputs.value,
    inputs.listed,
    scores=True,
  )


def _compute(program: Program) -> None:
  """Computes the gradients of 64 queries: the part of the first two warpgroups."""
  plgpu.set_max_registers(232, action="increase")
  options, scratch, registers = program.options, program.scratch, program.options.registers
  _load_rows(program)
  both_bounds, (newest, in_window, begin, steps), end = _find_tiles(program)  # while the loads run
  rows = _rows(program)

  skip = functools.partial(
    pass_by,
    stages=options.stages,
    full=(scratch.key_full, scratch.value_full),
    free=(scratch.key_free, scratch.value_free),
  )
  bounds = [jnp.where(program.at.warpgroup == 0, x, y) for x, y in zip(*both_bounds)]
  # The bounds of a warpgroup that sees nothing of the list may lie anywhere.
  t0, t1, t2, t3 = [jnp.clip(t, begin, end) for t in bounds[:4]]
  t4, t5 = bounds[4:]
  diagonal = options.own_tiles - 1 - program.at.warpgroup * HALF // options.block_kv
  nothing = None
  if program.tiling.late_products:
    nothing = registers.full(options.shape, 0, MATRIX).astype(options.dtype)

  def near(**kind):
    return lambda step, carry: _tile(
      program, rows, carry, step, newest - step, step > diagonal, is_list=False, **kind
    )

  def far(**kind):
    return lambda t, carry: _tile(
      program, rows, carry, in_window + t - begin, t, t > t0, is_list=True, **kind
    )

  carry = (registers.full((HALF, options.dim), 0, MATRIX), registers.full((HALF,), 0, ROW), nothing)
  skip(0, diagonal)
  carry = lax.fori_loop(diagonal, diagonal + 1, near(exits=True, enters=True), carry)
  carry = lax.fori_loop(diagonal + 1, newest - t5 + 1, near(), carry)
  carry = lax.fori_loop(newest - t5 + 1, newest - t4 + 1, near(exits=True), carry)
  if program.tiling.late_products:
    carry = *_add_last_tile(program, carry, newest - t4), nothing
  skip(newest - t4 + 1, in_window + t0 - begin)
  carry = lax.fori_loop(t0, t1, far(exits=True), carry)
  carry = lax.fori_loop(t1, t2, far(), carry)
  carry = lax.fori_loop(t2, t3, far(exits=True, enters=True), carry)

  def add_last(_, carry):
    return *_add_last_tile(program, carry, in_window + t3 - 1 - begin), nothing

  if program.tiling.late_products:
    carry = lax.fori_loop(0, jnp.where(t3 > t0, 1, 0), add_last, carry)
  skip(in_window + t3 - begin, steps)
  _store(program, rows, *carry[:2])


def _first_token(program: Program) -> Any:
  return program.at.first_row + program.at.warpgroup * HALF


def _places(program: Program) -> Any:
  """Returns the slice of the queries that are this warpgroup's."""
  return pl.ds(_first_token(program) - program.options.skip, HALF)


def _load_rows(program: Program) -> None:
  """Loads what belongs to the warpgroup's queries."""
  inputs, scratch = program.inputs, program.scratch
  b, _, h, warpgroup, g, _, _ = program.at
  tokens, places = pl.ds(_first_token(program), HALF), _places(program)
  full = scratch.rows_full.at[warpgroup]
  for source, buffer in (
    (inputs.query.at[b, places, h], scratch.query),
    (inputs.cotangent.at[b, places, h], scratch.cotangent),
    (inputs.logsumexp.at[b, h, places], scratch.row),
    (inputs.out.at[b, places, h], scratch.out),
    (inputs.window_start.at[b, tokens], scratch.window_start),
    (inputs.entered.at[b, g, tokens], scratch.entered),
    (inputs.tau.at[b, g, tokens], scratch.tau),
  ):
    plgpu.copy_gmem_to_smem(source, buffer.at[warpgroup], full)


def _rows(program: Program) -> Rows:
  """Waits for what belongs to the warpgroup's queries, and computes delta."""
  scratch, registers = program.scratch, program.options.registers
  warpgroup = program.at.warpgroup
  plgpu.barrier_wait(scratch.rows_full.at[warpgroup])
  logsumexp, tau = [registers.vector(x.at[warpgroup], ROW) for x in (scratch.row, scratch.tau)]
  cotangent, out = scratch.cotangent.at[warpgroup], scratch.out.at[warpgroup]
  delta = (
    registers.matrix(cotangent).astype(jnp.float32) * registers.matrix(out).astype(jnp.float32)
  ).sum(axis=1)
  hold = program.tiling.hold_queries
  held = registers.matrix(scratch.query.at[warpgroup]) if hold else None
  return Rows(_first_token(program), _places(program), held, logsumexp, tau, delta)


def _tile(
  program: Program,
  rows: Rows,
  carry: tuple,
  step: Any,
  t: Any,
  follows: Any,
  *,
  is_list: bool,
  exits: bool = False,
  enters: bool = False,
) -> tuple:
  """Computes the gradients of the logits of one tile, and adds them to the gradients of the queries
  or, with late products, those of the tile before.

  Args:
    program, rows: see Program and Rows.
    carry: (dquery [64, D] without the scale, gradient of the gates [64] summed over keys, gradients
      of the logits of the tile before [64, block_kv] if they are not added yet, else None).
    step: of the circular buffers.
    t: the tile's number among those of the window or the list.
    follows: whether there is a tile before; if not, its gradients must be zeros.
    is_list, exits, enters: see `live_pairs`.

  Returns:
    The next carry.
  """
  options, scratch = program.options, program.scratch
  registers, shape, warpgroup = options.registers, options.shape, program.at.warpgroup
  dquery, dgate, ds = carry
  slot, _ = slot_of(step, options.stages)
  plgpu.barrier_wait(scratch.key_full.at[slot])
  plgpu.barrier_wait(scratch.value_full.at[slot])
  live = live_pairs(
    options,
    rows.first,
    t,
    is_list=is_list,
    exits=exits,
    enters=enters,
    last=scratch.last.at[slot],
    window_start=scratch.window_start.at[warpgroup],
    entered=scratch.entered.at[warpgroup],
  )

  def probability(logits):
    p = jnp.exp2(logits * options.to_log2 - by_row(rows.logsumexp, shape))
    return p if live is None else jnp.where(live, p, 0.0)

  def load_distance():
    score = registers.vector(scratch.score.at[slot], COLUMN)
    return by_column(score, shape) - by_row(rows.tau, shape)

  distance = load_distance if is_list else None

  def gradients(s, dp):
    p, g, _ = tile_weights(s, probability, distance, gate=options.gate)
    product = dp(1 if program.tiling.late_products else 0)
    plgpu.barrier_arrive(scratch.value_free.at[slot])
    delta = by_row(rows.delta, shape)
    ds, of_gates = tile_gradients(
      s, p, g, product, delta, distance, gate=options.gate, scale=options.scale
    )

    def add(dgate):
      return dgate if of_gates is None else dgate + of_gates().sum(axis=1)

    if program.tiling.late_products:
      return lax.optimization_barrier((ds, add(dgate)))
    finish = (lambda: in_block(t, add, dgate)) if is_list else (lambda: dgate)
    return registers.matmul_add_beside(dquery, ds.astype(options.dtype), key, finish)

  key, own = scratch.key.at[slot], warpgroup + opaque_zero(t)
  query = rows.query if program.tiling.hold_queries else scratch.query.at[own]
  first, second = (query, key), (scratch.cotangent.at[own], scratch.value.at[slot])
  if not program.tiling.late_products:
    dquery, dgate = registers.two_matmuls(shape, first, second, gradients)
    plgpu.barrier_arrive(scratch.key_free.at[slot])
    return dquery, dgate, None
  before, _ = slot_of(jnp.where(follows, step - 1, step), options.stages)
  dquery, (new_ds, dgate) = registers.two_matmuls_during_add(
    shape, first, second, dquery, (ds, scratch.key.at[before]), gradients
  )
  pl.when(follows)(lambda: plgpu.barrier_arrive(scratch.key_free.at[before]))
  # The tensor cores read the old gradients until now: the new ones must not take their registers.
  dquery, new_ds = lax.optimization_barrier((dquery, new_ds))
  return dquery, dgate, new_ds.astype(options.dtype)


def _add_last_tile(program: Program, carry: tuple, step: Any) -> tuple:
  """Adds to the gradients of the queries those of the tile of this step; returns them and the
  gradient of the gates.
  """
  scratch, (dquery, dgate, ds) = program.scratch, carry
  slot, _ = slot_of(step, program.options.stages)
  (dquery,) = program.options.registers.matmul_add((dquery,), ((ds, scratch.key.at[slot]),))
  plgpu.barrier_arrive(scratch.key_free.at[slot])
  return dquery, dgate


def _store(program: Program, rows: Rows, dquery: jax.Array, dgate: jax.Array) -> None:
  """Stores the gradients of the warpgroup's queries, through shared memory."""
  scratch, outputs = program.scratch, program.outputs
  b, h, warpgroup = program.at.b, program.at.h, program.at.warpgroup
  query, delta, row = (x.at[warpgroup] for x in (scratch.query, scratch.delta, scratch.row))
  query[...] = (dquery * program.options.scale).astype(program.options.dtype)
  delta[...] = rows.delta
  row[...] = -dgate
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(query, outputs.dquery.at[b, rows.places, h])
  plgpu.copy_smem_to_gmem(delta, outputs.delta.at[b, h, rows.places])
  plgpu.copy_smem_to_gmem(row, outputs.dtau.at[b, h, rows.places])
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
