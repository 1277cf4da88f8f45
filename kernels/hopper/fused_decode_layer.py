"""What lies between a layer's attention and the next one's, for a few rows on Hopper GPUs, in one
kernel: the product that joins the heads, the MLP's two and the next layer's for queries, keys and
values, with the norms and residuals around them.

Every product needs all of the one before it, so the programs meet three times. Memory does not rest
meanwhile: one warpgroup of a program does nothing but ask for pieces of the matrices, which nobody
changes, into shared memory, as many as it holds, also those of products whose other input is not
there yet. The others compute tiles of 16 columns of a result, one after the other, as
small_batch_matmul does: their warps share the sums. Tiles of all products are dealt out in turn,
those of the next product from where the last one's ended.
"""

import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.hopper.common import MULTIPROCESSORS, axes, axis_index
from sparsek.kernels.hopper.small_batch_matmul import (
  COLUMNS,
  ROWS,
  STEP,
  Parts,
  Share,
  put_sums,
  result,
)
from sparsek.kernels.hopper.thread_ops import (
  PARAMS,
  can_run,
  contents,
  device_here,
  gather,
  gather_bytes,
  load_in_order,
  load_number_in_order,
  scatter,
  scatter_bytes,
  unfused,
)
from sparsek.kernels.hopper.thread_registers import LANES, lane_index, multiply_add
from sparsek.kernels.hopper.thread_sync import (
  arrive,
  arrive_expecting,
  copy_bytes,
  grid_barrier,
  init_barriers,
  sync_threads,
  wait_barrier,
)

ENABLED = True  # False: a kernel for every product
MOST_ROWS = 4  # of x: the more there are of it, the less shared memory is left for pieces
DEPTH = 3  # pieces on their way to a program at most: all else that is asked for waits behind them
SHARED = 216 * 2**10  # bytes of shared memory that a program takes at most
OUT, UP, DOWN, NEXT = range(4)  # the products


class Plan(NamedTuple):
  """Warpgroups of a program that compute; numbers of each row in a piece of a tile, and pieces in
  shared memory.
  """

  warpgroups: int
  piece: int
  stages: int


def plan(batch: int, *widths: int) -> Plan | None:
  """For products of rows of these widths; None where there is none."""
  groups = next((n for n in (2, 1) if all(width % (4 * n * STEP) == 0 for width in widths)), None)
  if groups is None:
    return None
  least, own = (
    4 * groups * STEP,
    2 * batch * (max(widths) + STEP) + 4 * 4 * groups * (2 * LANES + ROWS),
  )
  pieces = [
    n for n in range(least, min(widths) + 1, least) if all(width % n == 0 for width in widths)
  ]
  stages = {n: min((SHARED - own) // (2 * COLUMNS * (n + STEP) + 16), LANES) for n in pieces}
  return next((Plan(groups, n, stages[n]) for n in reversed(pieces) if stages[n] > DEPTH), None)


def takes(x: jax.Array, *matrices: jax.Array) -> bool:
  """Whether `chain` computes with x [B, E] and these matrices, here."""
  same = x.dtype in (jnp.bfloat16, jnp.float16) and all(
    y.dtype == x.dtype and len(y) % COLUMNS == 0 for y in matrices
  )
  fits = same and len(x) <= MOST_ROWS and plan(len(x), *(y.shape[1] for y in matrices)) is not None
  return ENABLED and fits and can_run() and not processes_share_it()


def processes_share_it() -> bool:
  """Whether kernels of several processes run on a device at once here, by CUDA's multi-process
  service: two such kernels, each on a part of the device, would wait for the rest of it forever.
  """
  return os.path.exists(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))


def programs() -> int:
  """As many as the device runs at once. A program that waits for another one that cannot begin
  before it ends would wait forever.
  """
  return min(getattr(device_here(), "core_count", MULTIPROCESSORS), MULTIPROCESSORS)


def chain(
  mixed: Parts,
  x: jax.Array,
  out: jax.Array,
  mlp_scale: jax.Array,
  up: jax.Array,
  down: jax.Array,
  next_scale: jax.Array | None,
  following: list[jax.Array],
  counter: jax.Array,
  epsilon: float,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
  """From one layer's attention to the next one's. Rounds where `small_batch_matmul.product` does,
  one call for each product.

  Args:
    mixed: of [B, H D], at most MOST_ROWS rows.
    x: [B, E], what the layer began with, of the matrices' type, 16 bits.
    out: [E, H D], whose product with the joined parts is added to x: y.
    mlp_scale: [E] float32, of the RMSNorm that y passes before `up`, with `epsilon`.
    up: [2 F, E], the rows of gate and up.
    down: [E, F], whose product is added to y: the next x.
    next_scale: [E] float32, of the norm that this passes; or None, if there is no next layer.
    following: what is multiplied with that: no matrix, one [N, E], or two, of which the second
      one's products stand behind those of the first.
    counter: [1] int32, zero for the first kernel; for others what the one before returned. No two
      kernels must use it at once.

  Returns:
    The next x, products [B, N] float32 or None, the counter for the next kernel.
  """
  scales = (mlp_scale,) if next_scale is None else (mlp_scale, next_scale)
  x, *projected, counter = _chain(
    mixed,
    x,
    (out, up, down, *following[:1]),
    tuple(following[1:]),
    scales,
    counter,
    programs(),
    epsilon,
  )
  return x, *(projected or [None]), counter


# Compiled by itself, so that it is traced once for all layers.
@functools.partial(jax.jit, static_argnums=(6, 7))
def _chain(mixed, x, matrices, more, scales, counter, programs, epsilon):
  batch, embed = x.shape
  kind, widths = x.dtype, [matrix.shape[1] for matrix in matrices]
  groups, piece, stages = plan(batch, *widths)
  warps, steps, piece_stride = 4 * groups, piece // (4 * groups * STEP), piece + STEP
  shares = [Share(batch, width, kind, groups) for width in widths]
  pieces = [width // piece for width in widths]  # of a tile
  lengths = [len(matrix) for matrix in matrices]
  lengths[-1] += sum(map(len, more))
  tiles = [length // COLUMNS for length in lengths]
  begins = [sum(tiles[:p]) for p in range(len(tiles) + 1)]  # first tiles of the products, of all
  columns = [length // (2 if p == UP else 1) for p, length in enumerate(lengths)]

  def body(*refs):
    parts_refs, (x_ref, *refs) = refs[:3], refs[3:]
    matrix_refs, refs = refs[: len(matrices)], refs[len(matrices) :]
    more_refs, refs = refs[: len(more)], refs[len(more) :]
    scale_refs, (counter_ref, *refs) = refs[: len(scales)], refs[len(scales) :]
    out_refs, (sums_ref, squares_ref, ready_ref, pieces_ref, full_ref, empty_ref) = (
      refs[: len(matrices)],
      refs[len(matrices) :],
    )
    program, warpgroup = axis_index("program", "warpgroup")
    lane = lane_index()
    warp, row, part = warpgroup * 4 + (lane >> 5), (lane >> 2) & 7, lane & 3
    own = jnp.minimum(row, batch - 1)  # rows of x beyond the last repeat it, and are not written
    # Tiles and pieces of this program have numbers, which count through all products: of the first
    # tile, and first piece, of each.
    first_tile = [
      lax.div(jnp.int32(begin + programs - 1) - program, jnp.int32(programs)) for begin in begins
    ]
    first = [jnp.int32(0)]
    for p in range(len(matrices)):
      first.append(first[p] + (first_tile[p + 1] - first_tile[p]) * pieces[p])

    def turn(number):
      """Of the stage that holds the piece of that number: how often it has been used before, the
      last bit of it.
      """
      return lax.rem(lax.div(number, jnp.int32(stages)), jnp.int32(2))

    def where(p, number):
      """(tile, piece) of a product that a number means; selects nothing: see thread_ops about
      integers.
      """
      number = number - first[p]
      return (first_tile[p] + lax.div(number, jnp.int32(pieces[p]))) * programs + program - begins[
        p
      ], lax.rem(number, jnp.int32(pieces[p]))

    def ask(p, number, state):
      """For the piece of that number, once its stage is free; a warp copies row after row."""
      stage, rows, row = (
        lax.rem(number, jnp.int32(stages)),
        (lane & 31) < COLUMNS // 4,
        (lane >> 5) * (COLUMNS // 4) + (lane & (COLUMNS // 4 - 1)),
      )
      tile, k = where(p, number)
      wait_barrier(empty_ref, stage, 1 - turn(number))
      # of the piece that must have come, two turns on: before the first turn nobody waits
      arrived = number + (2 * stages - DEPTH)
      wait_barrier(full_ref, lax.rem(arrived, jnp.int32(stages)), turn(arrived))
      arrive_expecting(full_ref, stage, COLUMNS * piece * kind.itemsize, lane == 0)
      # Where a product is of two halves, a tile has eight rows of each.
      begin, of_tile = (
        (tile * 8, (row & 7) + (row >> 3) * (lengths[p] // 2)) if p == UP else (tile * COLUMNS, row)
      )
      take = lambda ref, begin: copy_bytes(
        ref,
        begin + of_tile,
        k * piece,
        piece * kind.itemsize,
        pieces_ref,
        (stage * COLUMNS + row) * piece_stride,
        full_ref,
        stage,
        rows,
      )
      if p == NEXT and more:
        its = len(matrices[p])
        pl.when(begin < its)(lambda: take(matrix_refs[p], begin))
        pl.when(begin >= its)(lambda: take(more_refs[0], begin - its))
      else:
        take(matrix_refs[p], begin)
      return state

    def copy(x_ref, share):
      every = [
        (b, k, there, load_in_order(x_ref, k * 0 + b, k, share.width, fresh=True))
        for k, there in share.pieces(warpgroup)
        for b in range(batch)
      ]
      for b, k, there, words in every:
        scatter_bytes(ready_ref, k * 0 + b, k, share.stride, words, there)
      sync_threads(groups)

    def prepare(p):
      """The input of a product, in shared memory."""
      if p == OUT:
        shares[p].join(*mixed.top.shape[::2], *parts_refs, ready_ref, warpgroup)()
      elif p == DOWN:
        copy(out_refs[UP], shares[p])
      else:
        shares[p].normalise(
          out_refs[p - 1],
          scale_refs[p // 2],
          epsilon,
          ready_ref,
          squares_ref,
          warpgroup,
          hold=True,
          fresh=True,
        )()

    def product(p):
      each, stride = COLUMNS // (2 if p == UP else 1), shares[p].stride
      # of a tile's result, what the lanes of one warpgroup write
      n, column, there = (lane // each, lane % each, lane < batch * each)
      place_of = lambda tile: jnp.where(there, n * columns[p] + tile * each + column, 0)
      residual = {
        OUT: lambda at: gather(x_ref, at),
        DOWN: lambda at: load_number_in_order(out_refs[OUT], at),
      }.get(p)
      early = None
      # a program has one tile, or none: what is added to it need not be waited for
      if residual and tiles[p] <= programs:
        early = residual(jnp.minimum(place_of(where(p, first[p])[0]), batch * columns[p] - 1))

      def multiply(number, sums):
        stage, (tile, k) = lax.rem(number, jnp.int32(stages)), where(p, number)
        sums = [[jnp.where(lane * 0 + k == 0, 0.0, x) for x in half] for half in sums]
        wait_barrier(full_ref, stage, turn(number))
        for i in range(steps):
          at = (warp * steps + i) * STEP + part * 8
          a, b = (
            gather_bytes(pieces_ref, stage * COLUMNS + row + m, at, piece_stride) for m in (0, 8)
          )
          c = gather_bytes(ready_ref, own, k * piece + at, stride)
          for j in (0, 2):
            sums[i % 2] = multiply_add(
              sums[i % 2], (a[j], b[j], a[j + 1], b[j + 1]), c[j : j + 2], kind
            )
        arrive(empty_ref, stage)

        @pl.when(k == pieces[p] - 1)
        def _():
          # Tiles take turns, in where their sums are kept and in who adds these: the next one's
          # warps need not wait.
          which = lax.rem(lax.div(tile, jnp.int32(programs)), jnp.int32(2))
          put_sums(sums_ref, which * warps + warp, [x + y for x, y in zip(*sums)])
          sync_threads(groups)

          @pl.when(warpgroup == lax.rem(which, jnp.int32(groups)))
          def _():
            value, at = result(sums_ref, which * warps, warps, p == UP, kind), place_of(tile)
            if residual:
              value = value.astype(kind).astype(jnp.float32) + (
                residual(at) if early is None else early
              ).astype(jnp.float32)
            scatter(out_refs[p], at, value.astype(out_refs[p].dtype), there)

        return tuple(map(tuple, sums))

      # two that need not wait for each other
      lax.fori_loop(first[p], first[p + 1], multiply, (((lane * 0).astype(jnp.float32),) * 4,) * 2)

    @pl.when(warpgroup == 0)
    def _():
      init_barriers(full_ref, lane < stages, 1)
      init_barriers(empty_ref, lane < stages, warps)

    sync_threads()

    @pl.when(warpgroup == groups)
    def _():
      for p in range(len(matrices)):
        lax.fori_loop(first[p], first[p + 1], functools.partial(ask, p), ())

    @pl.when(warpgroup < groups)
    def _():
      before = gather(counter_ref, lane * 0)
      # all of them together: 2^31
      adds = 1 + (lane * 0 + program == 0).astype(jnp.int32) * (2**31 - programs)
      for p in range(len(matrices)):
        if p != OUT:
          sync_threads(groups)
          grid_barrier(
            counter_ref,
            adds,
            before if p % 2 else ~before,
            (lane == 0) & (lane * 0 + warpgroup == 0),
          )
          sync_threads(groups)
        prepare(p)
        product(p)

  out = [
    jax.ShapeDtypeStruct((batch * count,), jnp.float32 if p == NEXT else kind)
    for p, count in enumerate(columns)
  ]
  # With so much of it a multiprocessor runs one program, and there are no more programs than
  # multiprocessors: all of them run at once, and can wait for others.
  shared = [
    plgpu.SMEM((2 * warps * LANES,), jnp.float32),
    plgpu.SMEM((warps * ROWS,), jnp.float32),
    plgpu.SMEM((batch * max(s.stride for s in shares),), kind),
    plgpu.SMEM((stages * COLUMNS * piece_stride,), kind),
    *[plgpu.SMEM((2 * stages,), jnp.int32)] * 2,
  ]
  run = plgpu.kernel(
    body,
    out_type=out,
    scratch_types=shared,
    grid=(programs,),
    grid_names=axes("program"),
    num_threads=groups + 1,
    thread_name=axes("warpgroup")[0],
    compiler_params=PARAMS,
    kernel_name="sparsek_chain",
  )
  counter = jax.new_ref(counter)
  _, _, x, *projected = unfused(
    run(
      *unfused([*(y.reshape(-1) for y in mixed), x.reshape(-1)]), *matrices, *more, *scales, counter
    )
  )
  return x.reshape(batch, embed), *(y.reshape(batch, -1) for y in projected), *contents(counter)
