"""Forward pass of SPARSEK attention on Hopper GPUs: one online softmax over the tiles of the
window, latest first, then over the tiles of listed tokens.

A program computes blocks of 128 queries of one head, one after the other, by three warpgroups.
Tiles are loaded from contiguous memory only: listed keys and values were gathered before. Logits
are to base 2. The parts of a program: attention_forward_program.py.

  warpgroup 2, loads (40 registers a thread)     warpgroups 0 and 1, compute 64 queries each (232)
  ------------------------------------------     ---------------------------------------------------
  for each block:                                load query, window_start, entered, tau
  load the block's own tile; read bounds         for each block:
                                                 read bounds
                                                 wait query_full, key_full of the first tile
  for each tile:                                 for each tile:
    wait key_free                                  issue S = query key^T; arrive turn, wait turn
    load key, last, score -> key_full              wait for S
                                                   P = softmax of S, and its sums
                                                   arrive key_free (*)
    wait value_free                                arrive turn, wait value_full, wait turn
    load value            -> value_full            acc += P value; wait key_full of the next tile
                                                   arrive value_free
                                                 store out and logsumexp

The first tiles of the next block are loaded while a block is computed, and so are its queries
where shared memory holds those of two blocks (`held`): once the block before is stored from where
they go.

(*) already before the softmax if the tile has no gates: then its scores are not read again.

The computing warpgroups meet at `turn` twice a tile. Warpgroup 1 is half a tile behind: it passes
`turn` once before its first tile, and warpgroup 0 once after its last tile. At the first product of
a block they only wait: they have arrived before they stored the block before. So while one computes
its softmax, the other one's products keep the tensor cores busy, as in FlashAttention-3.

  barrier (how many)      opens after
  key_full (stages)       the bulk copies (TMA) of key, last and, if the gate needs it, score
  value_full (stages)     the bulk copy of value
  query_full (2 held)     the four copies of a warpgroup's queries
  key_free (stages)       both computing warpgroups have read key, last, score of the slot
  value_free (stages)     both have read value of the slot
  turn (1)                both have arrived

  shared memory              shape                type     bytes for D = 128, 2 stages of 128 keys
                                                           and 2 blocks held
  query, later out           2 held, 64, D        16 bit   64 KiB
  key, value                 stages, block_kv, D  16 bit   64 KiB each
  last                       stages, block_kv     int32    1 KiB
  score                      stages, block_kv     float32  1 KiB
  row: tau, later logsumexp  2 held, 64           float32  1 KiB
  window_start, entered      2 held, 64           int32    1 KiB each
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.hopper.attention_forward_program import (
  Inputs,
  Outputs,
  Program,
  Rows,
  Scratch,
  held,
  scratch_of,
  work_of,
)
from sparsek.kernels.hopper.attention_tiles import (
  Listed,
  Options,
  Steps,
  buffers_of,
  live_pairs,
  load_tiles,
  newest_tile,
  options_of,
)
from sparsek.kernels.hopper.common import (
  COLUMN,
  COMPUTING,
  HALF,
  LOG2_E,
  MATRIX,
  ROW,
  Ref,
  Tiling,
  axis_index,
  by_row,
  gate_of,
  grid_of,
  observe_last,
  read_bounds,
  run_kernel,
  slot_of,
)
from sparsek.kernels.sentinels import LOWEST


def forward(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
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
  """Computes attention and the logsumexp of its logits.

  Args:
    query: [B, m, H, D] bfloat16 or float16, of the last m tokens; D 64, 128 or 256.
    key, value: [B, n, G, D]; m and n are multiples of 128.
    window_start: [B, n] int32, first token of each query's window.
    entered: [B, G, n] int32, and `bounds` [B, G, n / 128, 6] int32: see tiles.Lists and
      tiles.query_bounds.
    tau: [B, G, n] float32 thresholds.
    listed: rows of the lists of all chunks.
    gate: as in `sparsek.sparsek_attention`.
    scale: of the logits, not negative.
    chunk: queries per chunk.
    tiling: sizes of the tiles.
    interpret: parameters of the interpreter, or None.

  Returns:
    out [B, m, H, D] in query's dtype; logsumexp [B, H, m] float32 to base 2 (0 for queries that see
    nothing).
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
    block_kv=tiling.forward_keys,
    stages=tiling.forward_stages,
    interpret=interpret,
  )
  return run_kernel(
    lambda *refs: _kernel(options, *refs),
    Inputs(query, key, value, window_start, entered, tau, listed, bounds),
    Outputs(
      out=jax.ShapeDtypeStruct(query.shape, query.dtype),
      logsumexp=jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
    ),
    scratch_of(options, gate != "straight_through"),
    **grid_of(program=work_of(options).programs),
    interpret=interpret,
    kernel_name="sparsek_forward",
  )


def _kernel(options: Options, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
  program, warpgroup = Program(options, inputs, outputs, scratch), axis_index("warpgroup")
  pl.when(warpgroup < COMPUTING)(lambda: _compute(program, warpgroup))
  pl.when(warpgroup == COMPUTING)(lambda: _load(program))


def _find_tiles(block: Program) -> tuple[tuple, Steps]:
  """Reads t0, ..., t5, see tiles.query_bounds, and returns them and the tiles."""
  at = block.at
  bounds = read_bounds(block.inputs.bounds, at.b, at.g, at.block)
  t0, _, _, t3, t4, _ = bounds
  newest = newest_tile(block.options, at)
  in_window = newest - t4 + 1
  return bounds, Steps(newest, in_window, t0, in_window + t3 - t0)


def _load(program: Program) -> None:
  """Loads the tiles of keys and values: the part of the last warpgroup."""
  plgpu.set_max_registers(40, action="decrease")
  options, inputs = program.options, program.inputs
  buffers = buffers_of(program.scratch)

  def load(i, before):
    block = program.block(i)
    return load_tiles(
      options,
      block.at,
      lambda: _find_tiles(block)[1],
      buffers,
      inputs.key,
      inputs.value,
      inputs.listed,
      scores=program.gated,
      before=before,
      is_last=False,
    )

  steps = lax.fori_loop(0, program.rounds, load, jnp.int32(0))
  observe_last(options.interpret, steps, options.stages, buffers.key_free, buffers.value_free)


def _compute(program: Program, warpgroup: Any) -> None:
  """Computes attention of 64 queries of each block: the part of the first two warpgroups."""
  plgpu.set_max_registers(232, action="increase")
  turn, rounds = program.scratch.turn, program.rounds
  _load_rows(program.block(0))
  pl.when(warpgroup == 1)(lambda: _take_turns(turn))
  plgpu.barrier_arrive(turn)

  def load_next(i):
    if held(program.options) > 1:

      @pl.when(i + 1 < rounds)
      def _():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        _load_rows(program.block(i + 1))

  def compute(i, before):
    block = program.block(i)
    end, *rest = _compute_block(block, before, lambda: load_next(i))
    pl.when((i + 1 < rounds) | (warpgroup == 0))(lambda: plgpu.barrier_arrive(turn))
    _store(block, *rest)
    return end

  lax.fori_loop(0, rounds, compute, jnp.int32(0))
  pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn))
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _compute_block(program: Program, before: Any, load_next: Callable[[], None]) -> tuple:
  """Computes attention of 64 queries of a block.

  Args:
    program: the block.
    before: number of tiles of earlier blocks.
    load_next: called when the block's own tiles are done.

  Returns:
    The number of tiles up to this block; and the last arguments of `_store`.
  """
  registers, scratch = program.options.registers, program.scratch
  (t0, t1, t2, t3, _, t5), tiles = _find_tiles(program)  # while the loads run
  rows = _rows(program)
  slot, _ = slot_of(before, program.options.stages)
  plgpu.barrier_wait(scratch.key_full.at[slot])
  carry = (
    registers.full((HALF, program.options.dim), 0, MATRIX),
    registers.full((HALF,), LOWEST, ROW),
    registers.full((HALF,), 0, ROW),
  )
  end = before + tiles.steps

  def near(**kind):
    return lambda step, carry: _tile(
      program, rows, carry, before + step, end, tiles.newest - step, is_list=False, **kind
    )

  def far(**kind):
    first = before + tiles.in_window - tiles.begin
    return lambda t, carry: _tile(program, rows, carry, first + t, end, t, is_list=True, **kind)

  own_tiles = program.options.own_tiles
  carry = lax.fori_loop(0, own_tiles, near(exits=True, enters=True, begin=before), carry)
  load_next()
  carry = lax.fori_loop(own_tiles, tiles.newest - t5 + 1, near(), carry)
  carry = lax.fori_loop(tiles.newest - t5 + 1, tiles.in_window, near(exits=True), carry)
  carry = lax.fori_loop(t0, t1, far(exits=True), carry)
  carry = lax.fori_loop(t1, t2, far(), carry)
  carry = lax.fori_loop(t2, t3, far(exits=True, enters=True), carry)
  return end, rows, *carry


def _take_turns(turn: Ref) -> None:
  """Lets the other computing warpgroup multiply, and waits until it lets this one."""
  plgpu.barrier_arrive(turn)
  plgpu.barrier_wait(turn)


def _first_token(program: Program) -> Any:
  return program.at.first_row + program.at.warpgroup * HALF


def _places(program: Program) -> Any:
  """Returns the slice of the queries that are this warpgroup's."""
  return pl.ds(_first_token(program) - program.options.skip, HALF)


def _load_rows(program: Program) -> None:
  """Loads what belongs to the warpgroup's queries."""
  inputs, scratch, at = program.inputs, program.scratch, program.at
  tokens, places = pl.ds(_first_token(program), HALF), _places(program)
  full = scratch.query_full.at[program.part]
  for source, buffer in (
    (inputs.query.at[at.b, places, at.h], scratch.query),
    (inputs.window_start.at[at.b, tokens], scratch.window_start),
    (inputs.entered.at[at.b, at.g, tokens], scratch.entered),
    (inputs.tau.at[at.b, at.g, tokens], scratch.row),
  ):
    plgpu.copy_gmem_to_smem(source, buffer.at[program.part], full)


def _rows(program: Program) -> Rows:
  """Waits for what belongs to the warpgroup's queries."""
  scratch = program.scratch
  plgpu.barrier_wait(scratch.query_full.at[program.part])
  tau = None
  if program.gated:
    tau = program.options.registers.vector(scratch.row.at[program.part], ROW)
  return Rows(_first_token(program), _places(program), tau)


def _tile(
  program: Program,
  rows: Rows,
  carry: tuple,
  step: Any,
  end: Any,
  t: Any,
  *,
  is_list: bool,
  exits: bool = False,
  enters: bool = False,
  begin: Any = None,
) -> tuple:
  """Adds one tile to the online softmax.

  Args:
    program, rows: see Program and Rows.
    carry: (acc [64, D], top [64], total [64]): sums of weighted values, the largest logit so far,
      and the sum of exp2(logit - top).
    step: of the circular buffers.
    end: the step after the block's last one.
    t: the tile's number among those of the window or the list.
    is_list, exits, enters: see `live_pairs`.
    begin: the block's first step, if this may be it: there the warpgroup has arrived at `turn`.

  Returns:
    The next carry.
  """
  options, scratch = program.options, program.scratch
  registers, shape = options.registers, options.shape
  acc, top, total = carry
  slot, _ = slot_of(step, options.stages)
  query, score = scratch.query.at[program.part], scratch.score.at[slot]
  has_gate = program.gated and is_list

  def wait_for_turn():
    pl.when(True if begin is None else step > begin)(lambda: plgpu.barrier_arrive(scratch.turn))
    plgpu.barrier_wait(scratch.turn)

  s = registers.matmul(shape, query, scratch.key.at[slot], wait_for_turn)
  if options.gate == "key_value" and is_list:
    s *= gate_of(registers.vector(score, COLUMN), rows.tau, shape)
  live = live_pairs(
    options,
    rows.first,
    t,
    is_list=is_list,
    exits=exits,
    enters=enters,
    last=scratch.last.at[slot],
    window_start=scratch.window_start.at[program.part],
    entered=scratch.entered.at[program.part],
  )
  if live is not None:
    s = jnp.where(live, s, -jnp.inf)
  if not has_gate:
    plgpu.barrier_arrive(scratch.key_free.at[slot])

  new_top = jnp.maximum(top, s.max(axis=1) * options.to_log2)
  decay = jnp.exp2(top - new_top)
  p = jnp.exp2(s * options.to_log2 - by_row(new_top, shape))
  acc *= by_row(decay, acc.shape)
  total *= decay
  if has_gate:
    # The scores are loaded late (again), to save registers.
    p, total = lax.optimization_barrier((p, total))
    gates = gate_of(registers.vector(score, COLUMN), rows.tau, shape)
    weights = (p * gates).astype(options.dtype)
    plgpu.barrier_arrive(scratch.key_free.at[slot])
  else:
    weights = p.astype(options.dtype)
  total += p.sum(axis=1)
  acc, total, new_top, weights = lax.optimization_barrier((acc, total, new_top, weights))
  plgpu.barrier_arrive(scratch.turn)
  plgpu.barrier_wait(scratch.value_full.at[slot])
  plgpu.barrier_wait(scratch.turn)

  def wait_for_next_keys():
    following, _ = slot_of(step + 1, options.stages)
    pl.when(step + 1 < end)(lambda: plgpu.barrier_wait(scratch.key_full.at[following]))

  (acc,) = registers.matmul_add((acc,), ((weights, scratch.value.at[slot]),), wait_for_next_keys)
  plgpu.barrier_arrive(scratch.value_free.at[slot])
  return acc, new_top, total


def _store(program: Program, rows: Rows, acc: jax.Array, top: jax.Array, total: jax.Array) -> None:
  """Stores the output and the logsumexp of the warpgroup's queries, through shared memory."""
  at, scratch, outputs = program.at, program.scratch, program.outputs
  query, row = scratch.query.at[program.part], scratch.row.at[program.part]
  seen = total > 0
  total = jnp.where(seen, total, 1.0)
  # A threshold that is NaN must show in the output.
  factor = 1 / total if rows.tau is None else jnp.where(rows.tau == rows.tau, 1 / total, jnp.nan)
  query[...] = (acc * by_row(factor, acc.shape)).astype(program.options.dtype)
  row[...] = jnp.where(seen, top + jnp.log(total) * LOG2_E, 0.0)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(query, outputs.out.at[at.b, rows.places, at.h])
  plgpu.copy_smem_to_gmem(row, outputs.logsumexp.at[at.b, at.h, rows.places])
