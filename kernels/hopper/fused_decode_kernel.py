"""The kernel of fused_decode_layer.py: what its programs and their warpgroups do.

There is one program for each multiprocessor, and all of them run at the same time. The tiles of 16
columns of all products are numbered one after the other; program i computes the tiles i, i +
programs, i + 2 programs, ... A tile is computed in pieces along the sum, see `Plan`.

  all warpgroups but the last, compute         last warpgroup, loads
  -------------------------------------------  -----------------------------------------------------
  for each product:                            for each product, for each piece of each tile:
    if it is not the first:                      wait piece_empty[s]     (s: the piece's stage)
      wait `warpgroups`, grid, `warpgroups`      wait piece_full of the piece DEPTH before
    prepared = its input                         announce the bytes      -> piece_full[s]
    wait `warpgroups` barrier                    copy 16 rows of a matrix (TMA bulk copies, one a
    for each piece of each tile:                   row)                  -> piece_full[s]
      wait piece_full[s]
      multiply by tensor cores                 It never waits for the grid barrier: nobody changes
      arrive piece_empty[s]                    the matrices, so pieces of the next product arrive
      after the tile's last piece:             while its input is not there yet.
        partial_sums[turn][w] = products
        wait `warpgroups` barrier
        warpgroup turn % warpgroups: add them,
          SwiGLU, + residual -> global memory

  barrier                   where           opens when
  piece_full[stages]        shared memory   the loading warpgroup has announced a piece, and its
                                            bytes have come; guards reading it
  piece_empty[stages]       shared memory   every computing warp has arrived: all have read the
                                            piece; guards overwriting it
  grid barrier              counter,        every program has arrived, one lane each: all results of
                            global memory   the product before can be read
  warpgroups                bar.sync 1      all lanes of the computing warpgroups have arrived
  program                   bar.sync 0      all lanes have arrived; once, when the barriers exist

  shared memory    shape                    type      bytes for 1 row, E = 2048, F = 5632
  partial_sums     2, warps, 8, 16          float32     8 KiB   turn alternates from tile to tile
  squares          8, warps                 float32   256 B
  prepared         B, longest row + 32      16 bit     11 KiB
  pieces           stages, 16, piece + 32   16 bit    187 KiB   11 stages of 512 numbers a row
  piece_full       stages, 2                int32      88 B
  piece_empty      stages, 2                int32      88 B
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.hopper.common import axis_index
from sparsek.kernels.hopper.row_preparation import STEP, Preparation, Ref
from sparsek.kernels.hopper.small_batch_matmul import (
  COLUMNS,
  ROWS,
  Lanes,
  Parts,
  add_partial_sums,
  lanes_of,
  store_partial_sums,
)
from sparsek.kernels.hopper.thread_ops import gather, gather_bytes, load_number_in_order, scatter
from sparsek.kernels.hopper.thread_registers import LANES, multiply_add
from sparsek.kernels.hopper.thread_sync import (
  arrive,
  arrive_expecting,
  copy_bytes,
  grid_barrier,
  init_barriers,
  sync_threads,
  wait_barrier,
)

DEPTH = 3  # the most pieces on their way to a program: all other loads wait behind them
OUT, UP, DOWN, NEXT = range(4)  # the products


class Plan(NamedTuple):
  """Division of the work in a program.

  Attributes:
    warpgroups: that compute.
    piece: numbers of each row in a piece of a tile.
    stages: pieces in shared memory.
  """

  warpgroups: int
  piece: int
  stages: int


class Inputs(NamedTuple):
  """Arrays in global memory, see `fused_layer`; x and the parts are flat.

  Attributes:
    matrices: one for each product.
    scales: of the norms before UP and NEXT.
    counter: of the grid barrier; written too.
  """

  mixed: Parts
  x: Ref
  matrices: tuple[Ref, ...]
  scales: tuple[Ref, ...]
  counter: Ref


class Outputs(NamedTuple):
  """Results of the products in global memory, flat."""

  products: tuple[Ref, ...]


class Scratch(NamedTuple):
  """Shared memory, see the drawing above."""

  partial_sums: Ref
  squares: Ref
  prepared: Ref
  pieces: Ref
  piece_full: Ref
  piece_empty: Ref


class Options(NamedTuple):
  """Constants of the kernel; a tuple has an entry for each product.

  Attributes:
    parts: number of parts and heads of the attention.
    rows: of the matrices.
  """

  plan: Plan
  programs: int
  epsilon: float
  dtype: Any
  parts: tuple[int, int]
  preparations: tuple[Preparation, ...]
  rows: tuple[int, ...]

  @property
  def batch(self) -> int:
    return self.preparations[OUT].batch

  @property
  def warps(self) -> int:
    """Warps that compute."""
    return 4 * self.plan.warpgroups

  @property
  def piece_stride(self) -> int:
    """Elements between the rows of a piece, so that they begin in different banks."""
    return self.plan.piece + STEP

  @property
  def tiles(self) -> list[int]:
    return [rows // COLUMNS for rows in self.rows]

  @property
  def pieces(self) -> list[int]:
    """Pieces of a tile."""
    return [preparation.width // self.plan.piece for preparation in self.preparations]

  @property
  def columns(self) -> list[int]:
    """Columns of the results."""
    return [rows // (2 if p == UP else 1) for p, rows in enumerate(self.rows)]


def scratch_of(options: Options) -> Scratch:
  """Returns the shared memory of a program, so much that a multiprocessor runs one program only.

  As there are no more programs than multiprocessors, all run at the same time and can wait for each
  other.
  """
  stages = options.plan.stages
  return Scratch(
    partial_sums=plgpu.SMEM((2 * options.warps * LANES,), jnp.float32),
    squares=plgpu.SMEM((options.warps * ROWS,), jnp.float32),
    prepared=plgpu.SMEM(
      (options.batch * max(y.stride for y in options.preparations),), options.dtype
    ),
    pieces=plgpu.SMEM((stages * COLUMNS * options.piece_stride,), options.dtype),
    piece_full=plgpu.SMEM((2 * stages,), jnp.int32),
    piece_empty=plgpu.SMEM((2 * stages,), jnp.int32),
  )


class Program(NamedTuple):
  """References and coordinates that the roles of a program share.

  Attributes:
    number: of the program.
    x_row: row of x of each lane.
    first_tile: for each product, how many tiles of earlier products this program computes; at the
      end, of all products.
    first_piece: the same of pieces, which a program numbers through all products.
  """

  options: Options
  inputs: Inputs
  outputs: Outputs
  scratch: Scratch
  number: jax.Array
  lanes: Lanes
  x_row: jax.Array
  first_tile: list[jax.Array]
  first_piece: list[jax.Array]

  def stage(self, piece: jax.Array) -> jax.Array:
    """Returns the stage that holds a piece."""
    return lax.rem(piece, jnp.int32(self.options.plan.stages))

  def parity(self, piece: jax.Array) -> jax.Array:
    """Returns the parity of the mbarrier phase of a piece: how often its stage has been used
    before, modulo 2.
    """
    return lax.rem(lax.div(piece, jnp.int32(self.options.plan.stages)), jnp.int32(2))

  def tile_and_part(self, p: int, piece: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the tile of product p that a piece belongs to, and which part of the sum it is.

    It uses no `where`, which may lose the sign of integers: see PARAMS in thread_ops.py.
    """
    options, piece = self.options, piece - self.first_piece[p]
    count = jnp.int32(options.pieces[p])
    tile = (self.first_tile[p] + lax.div(piece, count)) * options.programs + self.number
    return tile - sum(options.tiles[:p]), lax.rem(piece, count)


def kernel(options: Options, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
  """Computes the products: the body of the kernel."""
  number, warpgroup = axis_index("program", "warpgroup")
  lanes = lanes_of(warpgroup)
  # Rows of x beyond the last repeat it, and are not written.
  x_row = jnp.minimum(lanes.row, options.batch - 1)
  count = len(options.rows)
  first_tile = [
    lax.div(
      jnp.int32(sum(options.tiles[:p]) + options.programs - 1) - number, jnp.int32(options.programs)
    )
    for p in range(count + 1)
  ]
  first_piece = [jnp.int32(0)]
  for p in range(count):
    first_piece.append(first_piece[p] + (first_tile[p + 1] - first_tile[p]) * options.pieces[p])
  program = Program(
    options, inputs, outputs, scratch, number, lanes, x_row, first_tile, first_piece
  )

  @pl.when(warpgroup == 0)
  def make_barriers():
    init_barriers(scratch.piece_full, lanes.lane < options.plan.stages, 1)
    init_barriers(scratch.piece_empty, lanes.lane < options.plan.stages, options.warps)

  sync_threads()
  pl.when(warpgroup == options.plan.warpgroups)(lambda: _load(program))
  pl.when(warpgroup < options.plan.warpgroups)(lambda: _compute(program))


def _load(program: Program) -> None:
  """Copies all pieces to shared memory: the role of the last warpgroup."""
  for p in range(len(program.options.rows)):
    lax.fori_loop(
      program.first_piece[p],
      program.first_piece[p + 1],
      functools.partial(_load_piece, program, p),
      (),
    )


def _load_piece(program: Program, p: int, piece: jax.Array, state: tuple) -> tuple:
  """Copies a piece once its stage is free; a warp copies a quarter of its rows, one a lane."""
  options, inputs, scratch = program.options, program.inputs, program.scratch
  (_, size, stages), lane = options.plan, program.lanes.lane
  rows_of_warp = COLUMNS // 4
  stage = program.stage(piece)
  copies = (lane & 31) < rows_of_warp
  row = (lane >> 5) * rows_of_warp + (lane & (rows_of_warp - 1))
  tile, part = program.tile_and_part(p, piece)
  wait_barrier(scratch.piece_empty, stage, 1 - program.parity(piece))
  # The piece DEPTH before this one: adding 2 * stages changes neither its stage nor its parity. For
  # the first pieces there is none, and the wait passes at once.
  arrived = piece + (2 * stages - DEPTH)
  wait_barrier(scratch.piece_full, program.stage(arrived), program.parity(arrived))
  arrive_expecting(scratch.piece_full, stage, COLUMNS * size * options.dtype.itemsize, lane == 0)
  if p == UP:  # eight rows of gate and eight of up
    begin, row_of_tile = tile * 8, (row & 7) + (row >> 3) * (options.rows[p] // 2)
  else:
    begin, row_of_tile = tile * COLUMNS, row

  copy_bytes(
    inputs.matrices[p],
    begin + row_of_tile,
    part * size,
    size * options.dtype.itemsize,
    scratch.pieces,
    (stage * COLUMNS + row) * options.piece_stride,
    scratch.piece_full,
    stage,
    copies,
  )
  return state


def _compute(program: Program) -> None:
  """Computes the products one after the other: the role of all warpgroups but the last."""
  options, lane = program.options, program.lanes.lane
  before = gather(program.inputs.counter, lane * 0)
  # What all programs add must come to 2^31, see `grid_barrier`.
  is_first = (lane * 0 + program.number == 0).astype(jnp.int32)
  adds = 1 + is_first * (2**31 - options.programs)
  for p in range(len(options.rows)):
    if p != OUT:
      _wait_for_all_programs(program, p, adds, before)
    _prepare(program, p)
    _multiply(program, p)


def _wait_for_all_programs(program: Program, p: int, adds: jax.Array, before: jax.Array) -> None:
  """Waits at the grid barrier before product p; before and after that the computing warpgroups of
  the program wait for each other. The sign of the counter changes every time.
  """
  warpgroups, lane = program.options.plan.warpgroups, program.lanes.lane
  sync_threads(warpgroups)
  last = before if p % 2 else ~before
  is_first_lane = (lane == 0) & (lane * 0 + program.lanes.warpgroup == 0)
  grid_barrier(program.inputs.counter, adds, last, is_first_lane)
  sync_threads(warpgroups)


def _prepare(program: Program, p: int) -> None:
  """Prepares the input of product p in shared memory."""
  options, inputs, scratch = program.options, program.inputs, program.scratch
  preparation, warpgroup = options.preparations[p], program.lanes.warpgroup
  results = program.outputs.products
  if p == OUT:
    finish = preparation.start_join(*options.parts, inputs.mixed, scratch.prepared, warpgroup)
  elif p == DOWN:
    finish = preparation.start_copy(results[UP], scratch.prepared, warpgroup)
  else:
    finish = preparation.start_norm(
      results[p - 1],
      inputs.scales[p // 2],
      options.epsilon,
      scratch.prepared,
      scratch.squares,
      warpgroup,
      hold=True,
      fresh=True,
    )
  finish()


class Target(NamedTuple):
  """Elements of a product's result that the lanes of one warpgroup write, and their residual.

  Attributes:
    n, column: row of the result, column in the tile.
    inside: whether the lane writes any.
    early: the residual, loaded before the products, if a program has one tile at most; or None.
  """

  program: Program
  p: int
  n: jax.Array
  column: jax.Array
  inside: jax.Array
  early: jax.Array | None = None

  @property
  def columns_of_tile(self) -> int:
    return COLUMNS // (2 if self.p == UP else 1)

  def element(self, tile: jax.Array) -> jax.Array:
    """Returns the element of each lane."""
    columns = self.program.options.columns[self.p]
    return jnp.where(self.inside, self.n * columns + tile * self.columns_of_tile + self.column, 0)

  def residual(self, index: jax.Array) -> jax.Array | None:
    """Loads what is added to the elements; None if nothing is."""
    if self.early is not None:
      return self.early
    if self.p == OUT:
      return gather(self.program.inputs.x, index)
    if self.p == DOWN:
      return load_number_in_order(self.program.outputs.products[OUT], index)
    return None


def _target(program: Program, p: int) -> Target:
  options, lane = program.options, program.lanes.lane
  columns = COLUMNS // (2 if p == UP else 1)
  target = Target(program, p, lane // columns, lane % columns, lane < options.batch * columns)
  if p in (OUT, DOWN) and options.tiles[p] <= options.programs:
    tile, _ = program.tile_and_part(p, program.first_piece[p])
    # A program without a tile loads an element that exists.
    index = jnp.minimum(target.element(tile), options.batch * options.columns[p] - 1)
    return target._replace(early=target.residual(index))
  return target


def _multiply(program: Program, p: int) -> None:
  """Multiplies the pieces of product p that belong to this program, and stores its tiles."""
  target = _target(program, p)
  zeros = ((program.lanes.lane * 0).astype(jnp.float32),) * 4
  lax.fori_loop(
    program.first_piece[p],
    program.first_piece[p + 1],
    functools.partial(_multiply_piece, program, p, target),
    (zeros,) * 2,  # two sums, which do not wait for each other
  )


def _multiply_piece(
  program: Program, p: int, target: Target, piece: jax.Array, sums: tuple
) -> tuple:
  """Adds the products of a piece to the sums, and stores the tile after its last piece."""
  options, scratch, lanes = program.options, program.scratch, program.lanes
  steps, preparation = options.plan.piece // (options.warps * STEP), options.preparations[p]
  stage = program.stage(piece)
  tile, part = program.tile_and_part(p, piece)
  new_sums = [tuple(jnp.where(lanes.lane * 0 + part == 0, 0.0, x) for x in half) for half in sums]
  wait_barrier(scratch.piece_full, stage, program.parity(piece))
  for i in range(steps):
    k = (lanes.warp * steps + i) * STEP + lanes.part * 8
    a, b = (
      gather_bytes(scratch.pieces, stage * COLUMNS + lanes.row + m, k, options.piece_stride)
      for m in (0, 8)
    )
    c = gather_bytes(
      scratch.prepared, program.x_row, part * options.plan.piece + k, preparation.stride
    )
    for j in (0, 2):
      new_sums[i % 2] = multiply_add(
        new_sums[i % 2], (a[j], b[j], a[j + 1], b[j + 1]), c[j : j + 2], options.dtype
      )
  arrive(scratch.piece_empty, stage)
  pl.when(part == options.pieces[p] - 1)(lambda: _store_tile(program, p, target, tile, new_sums))
  return tuple(map(tuple, new_sums))


def _store_tile(program: Program, p: int, target: Target, tile: jax.Array, sums: list) -> None:
  """Adds the sums of all warps and stores a tile.

  Neighbouring tiles use different halves of `partial_sums`, which different warpgroups add, so that
  no warp waits before the next tile.
  """
  options, scratch, warps = program.options, program.scratch, program.options.warps
  turn = lax.rem(lax.div(tile, jnp.int32(options.programs)), jnp.int32(2))
  store_partial_sums(
    scratch.partial_sums, turn * warps + program.lanes.warp, [x + y for x, y in zip(*sums)]
  )
  sync_threads(options.plan.warpgroups)

  @pl.when(program.lanes.warpgroup == lax.rem(turn, jnp.int32(options.plan.warpgroups)))
  def store():
    value = add_partial_sums(scratch.partial_sums, turn * warps, warps, p == UP, options.dtype)
    index, result = target.element(tile), program.outputs.products[p]
    residual = target.residual(index)
    if residual is not None:
      value = value.astype(options.dtype).astype(jnp.float32) + residual.astype(jnp.float32)
    scatter(result, index, value.astype(result.dtype), target.inside)
