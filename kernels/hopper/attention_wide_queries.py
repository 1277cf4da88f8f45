"""Backward pass of SPARSEK attention on Hopper GPUs for heads of 256: gradients of queries and
thresholds.

As in attention_query_gradients.py a program computes 128 queries of one head, and owns what it
writes. The gradients of 64 queries take 128 registers a thread, and the rows of 128 queries and
their cotangents 128 KiB of shared memory. So there is room for two tiles of keys and one of values:

  warpgroup 2, loads (40 registers a thread)   warpgroups 0 and 1, compute 64 queries each (232)
  ------------------------------------------   ---------------------------------------------------
                                               load query, cotangent
  load the block's own tiles; read bounds      read bounds; wait rows_full
  for each tile of either warpgroup:           for each tile:
    wait key_free                                wait key_full; issue S = query key^T
    load key, last, score -> key_full            wait value_full; issue dP = cotangent value^T
    wait value_free                              wait for S, then for dP; arrive value_free
    load value            -> value_full          dS, dtau from S and dP
                                                 dquery += dS key; arrive key_free
                                               store dquery, dtau

Values are read early in a tile, keys until its end: so the next values arrive while dS and the
products with keys are computed. Vectors of queries are read from global memory, those of masks in
the tiles that need them.

Both warpgroups pass all tiles, in the same order; at a tile that only the other one sees, a
warpgroup waits and arrives alone.

  barrier (how many)   opens after
  key_full (2)         the bulk copies (TMA) of key, last and score
  value_full (1)       the bulk copy of value
  rows_full (2)        the copies of a warpgroup's query and cotangent
  key_free (2)         both computing warpgroups have read key, last, score of the slot
  value_free (1)       both have read value

  shared memory           shape      type     bytes
  query, later dquery     2, 64, D   16 bit   64 KiB
  cotangent               2, 64, D   16 bit   64 KiB
  key                     2, 64, D   16 bit   64 KiB
  value                   1, 64, D   16 bit   32 KiB
  last                    2, 64      int32    512 B
  score                   2, 64      float32  512 B
"""

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
  joined,
  matrix_buffer,
  opaque_zero,
  read_bounds,
  run_kernel,
  slot_of,
  vector_buffer,
)

VALUE_STAGES = 1


class Inputs(NamedTuple):
  """Arrays in global memory: the arguments of `query_gradients`, with delta instead of out."""

  query: Any
  key: Any
  value: Any
  cotangent: Any
  logsumexp: Any
  delta: Any
  window_start: Any
  entered: Any
  tau: Any
  listed: Listed
  bounds: Any


class Outputs(NamedTuple):
  """Results in global memory."""

  dquery: Any
  dtau: Any


class Scratch(NamedTuple):
  """Shared memory and barriers, see the drawing above."""

  query: Any
  cotangent: Any
  key: Any
  value: Any
  last: Any
  score: Any
  key_full: Any
  value_full: Any
  rows_full: Any
  key_free: Any
  value_free: Any


class Program(NamedTuple):
  """Everything that the roles of a program need."""

  options: Options
  inputs: Inputs
  outputs: Outputs
  scratch: Scratch
  at: Position

  @property
  def first(self) -> Any:
    """The first query of the warpgroup."""
    return self.at.first_row + self.at.warpgroup * HALF

  @property
  def tokens(self) -> Any:
    """The warpgroup's slice of all tokens."""
    return pl.ds(self.first, HALF)

  @property
  def places(self) -> Any:
    """The warpgroup's slice of the queries."""
    return pl.ds(self.first - self.options.skip, HALF)


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
  """Vectors of the 64 queries of a computing warpgroup, in registers."""

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
  """Computes the gradients of queries and thresholds: arguments and results are those of
  `attention_query_gradients.query_gradients`.
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
    value_stages=VALUE_STAGES,
    interpret=interpret,
  )
  delta = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=3)
  delta = jnp.swapaxes(delta, 1, 2)
  dquery, dtau = run_kernel(
    lambda *refs: _kernel(options, *refs),
    Inputs(
      query, key, value, cotangent, logsumexp, delta, window_start, entered, tau, listed, bounds
    ),
    Outputs(
      jax.ShapeDtypeStruct(query.shape, query.dtype),
      jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
    ),
    _scratch(options),
    **grid_of(**options.grid),
    interpret=interpret,
    kernel_name="sparsek_query_gradients",
  )
  return [dquery, delta, dtau]


def _scratch(options: Options) -> Scratch:
  block_kv, stages, value_stages = options.block_kv, options.stages, options.value_stages
  rows = matrix_buffer(COMPUTING, HALF, options.dim, options.dtype)
  return Scratch(
    query=rows,
    cotangent=rows,
    key=matrix_buffer(stages, block_kv, options.dim, options.dtype),
    value=matrix_buffer(value_stages, block_kv, options.dim, options.dtype),
    last=vector_buffer(stages, block_kv, jnp.int32),
    score=vector_buffer(stages, block_kv),
    key_full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
    value_full=plgpu.Barrier(num_arrivals=1, num_barriers=value_stages),
    rows_full=plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTING),
    key_free=plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages),
    value_free=plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=value_stages),
  )


def _kernel(options: Options, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
  program = Program(options, inputs, outputs, scratch, position(options))
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
  inputs = program.inputs
  load_tiles(
    program.options,
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
  options, at, registers = program.options, program.at, program.options.registers
  _load_rows(program)
  both_bounds, (newest, in_window, begin, steps), end = _find_tiles(program)  # while the loads run
  rows = _rows(program)
  bounds = [jnp.where(at.warpgroup == 0, x, y) for x, y in zip(*both_bounds)]
  # The bounds of a warpgroup that sees nothing of the list may lie anywhere.
  t0, t1, t2, t3 = [jnp.clip(t, begin, end) for t in bounds[:4]]
  t4, t5 = bounds[4:]
  diagonal = options.own_tiles - 1 - at.warpgroup * HALF // options.block_kv

  def near(**kind):
    return lambda step, carry: _tile(
      program, rows, carry, step, newest - step, is_list=False, **kind
    )

  def far(**kind):
    return lambda t, carry: _tile(
      program, rows, carry, in_window + t - begin, t, is_list=True, **kind
    )

  carry = registers.full((HALF, options.dim), 0, MATRIX), registers.full((HALF,), 0, ROW)
  _skip(program, 0, diagonal)
  carry = lax.fori_loop(diagonal, diagonal + 1, near(exits=True, enters=True), carry)
  carry = lax.fori_loop(diagonal + 1, newest - t5 + 1, near(), carry)
  carry = lax.fori_loop(newest - t5 + 1, newest - t4 + 1, near(exits=True), carry)
  _skip(program, newest - t4 + 1, in_window + t0 - begin)
  carry = lax.fori_loop(t0, t1, far(exits=True), carry)
  carry = lax.fori_loop(t1, t2, far(), carry)
  carry = lax.fori_loop(t2, t3, far(exits=True, enters=True), carry)
  _skip(program, in_window + t3 - begin, steps)
  _store(program, *carry)


def _skip(program: Program, first: Any, last: Any) -> None:
  """Passes the steps [first, last), whose tiles only the other computing warpgroup uses."""
  options, scratch = program.options, program.scratch
  buffers = (
    (options.stages, scratch.key_full, scratch.key_free),
    (options.value_stages, scratch.value_full, scratch.value_free),
  )

  @pl.loop(first, last)
  def _(step):
    for stages, full, free in buffers:
      slot, _ = slot_of(step, stages)
      plgpu.barrier_wait(full.at[slot])
      plgpu.barrier_arrive(free.at[slot])


def _load_rows(program: Program) -> None:
  """Loads the rows of the warpgroup's queries."""
  inputs, scratch, at = program.inputs, program.scratch, program.at
  full = scratch.rows_full.at[at.warpgroup]
  for source, buffer in ((inputs.query, scratch.query), (inputs.cotangent, scratch.cotangent)):
    rows = source.at[at.b, program.places, at.h]
    plgpu.copy_gmem_to_smem(rows, buffer.at[at.warpgroup], full)


def _rows(program: Program) -> Rows:
  """Reads the vectors of the warpgroup's queries, and waits for their rows."""
  inputs, at, registers = program.inputs, program.at, program.options.registers
  rows = Rows(
    registers.vector(inputs.logsumexp.at[at.b, at.h, program.places], ROW),
    registers.vector(inputs.tau.at[at.b, at.g, program.tokens], ROW),
    registers.vector(inputs.delta.at[at.b, at.h, program.places], ROW),
  )
  plgpu.barrier_wait(program.scratch.rows_full.at[at.warpgroup])
  return rows


def _tile(
  program: Program,
  rows: Rows,
  carry: tuple,
  step: Any,
  t: Any,
  *,
  is_list: bool,
  exits: bool = False,
  enters: bool = False,
) -> tuple:
  """Adds the gradients from one tile of keys.

  Args:
    program, rows: see Program and Rows.
    carry: (dquery [64, D] without the scale, gradient of the gates [64] summed over keys).
    step: of the circular buffers.
    t: the tile's number among those of the window or the list.
    is_list, exits, enters: see `live_pairs`.

  Returns:
    The next carry.
  """
  options, scratch, at = program.options, program.scratch, program.at
  registers, shape = options.registers, options.shape
  dquery, dgate = carry
  slot, _ = slot_of(step, options.stages)
  zero = opaque_zero(step)
  value_slot, own = slot_of(step, options.value_stages)[0] + zero, at.warpgroup + zero
  key, value = scratch.key.at[slot], scratch.value.at[value_slot]
  plgpu.barrier_wait(scratch.key_full.at[slot])

  def probability(logits):
    live = live_pairs(
      options,
      program.first,
      t,
      is_list=is_list,
      exits=exits,
      enters=enters,
      last=scratch.last.at[slot],
      window_start=program.inputs.window_start.at[at.b, program.tokens],
      entered=program.inputs.entered.at[at.b, at.g, program.tokens],
    )
    p = jnp.exp2(logits * options.to_log2 - by_row(rows.logsumexp, shape))
    return p if live is None else jnp.where(live, p, 0.0)

  def load_distance():
    score = registers.vector(scratch.score.at[slot], COLUMN)
    return by_column(score, shape) - by_row(rows.tau, shape)

  distance = load_distance if is_list else None

  def gradients(s, dp):
    p, g, _ = tile_weights(s, probability, distance, gate=options.gate)
    product = dp(0)
    plgpu.barrier_arrive(scratch.value_free.at[value_slot])
    delta = by_row(rows.delta, shape)
    ds, of_gates = tile_gradients(
      s, p, g, product, delta, distance, gate=options.gate, scale=options.scale
    )
    new = dgate if of_gates is None else dgate + of_gates().sum(axis=1)
    return ds.astype(options.dtype), new

  ds, dgate = registers.two_matmuls(
    shape,
    (scratch.query.at[own], key),
    (scratch.cotangent.at[own], value),
    gradients,
    between=lambda: plgpu.barrier_wait(scratch.value_full.at[value_slot]),
  )
  (dquery,) = registers.matmul_add((dquery,), ((ds, key),))
  plgpu.barrier_arrive(scratch.key_free.at[slot])
  return dquery, dgate


def _store(program: Program, dquery: jax.Array, dgate: jax.Array) -> None:
  """Stores the gradients of the warpgroup's queries, their rows through shared memory."""
  outputs, at = program.outputs, program.at
  query = program.scratch.query.at[at.warpgroup]
  query[...] = (dquery * program.options.scale).astype(program.options.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(query, outputs.dquery.at[at.b, program.places, at.h])
  outputs.dtau.at[at.b, at.h, program.places][...] = -dgate
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
