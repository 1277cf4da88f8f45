"""Products of a few rows with a matrix on Hopper GPUs, which generation spends its time on, with
the small things around them inside.

A program computes 16 columns of the result, by tensor cores, whose rows are the matrix's and whose
columns are those of x. Its warps share the sum; every lane asks for all that it needs of the matrix
at once, before it does anything else. In which order a warp sums does not matter: a lane takes
eight neighbours of its row of the matrix, and of x, for what the tensor cores take for two pairs of
one product and two of the next.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.hopper.common import axes, axis_index
from sparsek.kernels.hopper.thread_ops import (
  PARAMS,
  can_run,
  floats,
  gather,
  gather_bytes,
  load_in_order,
  scatter,
  scatter_bytes,
)
from sparsek.kernels.hopper.thread_registers import (
  LANES,
  lane_index,
  multiply_add,
  narrow,
  shuffle_xor,
  widen,
)
from sparsek.kernels.hopper.thread_sync import sync_threads

ENABLED = True  # False: XLA multiplies
ROWS = 8  # of x, at most: the columns that a tensor core computes at once
COLUMNS = 16  # of the result, of a program
STEP = 32  # numbers of each row that a warp multiplies at once
STEPS = 12  # most of a warp: their registers are those of 16 bytes of x and 32 of the matrix


class Parts(NamedTuple):
  """Attention of one token, its keys in S parts: sums [S, B, H D] of values weighted by exp(logit -
  top), and [S, B, H] the largest logit `top` (LOWEST where there is none) and the sum `total` of
  these weights, all float32.
  """

  sums: jax.Array
  top: jax.Array
  total: jax.Array

  def joined(self, dtype):
    """[B, H D]."""
    weight = jnp.exp(self.top - jnp.max(self.top, axis=0))
    share = weight / jnp.sum(weight * self.total, axis=0)
    return jnp.sum(
      (self.sums.reshape(*self.top.shape, -1) * share[..., None]).reshape(self.sums.shape), axis=0
    ).astype(dtype)


class Share(NamedTuple):
  """How the warpgroups of a program share what is to be prepared of x, in shared memory: [batch,
  width] numbers of the type `kind`, rows `stride` apart.

  What does it asks for all that it needs, and returns what does the rest.
  """

  batch: int
  width: int
  kind: jnp.dtype
  warpgroups: int

  @property
  def stride(self):
    return self.width + STEP  # neighbouring rows in different banks

  def pieces(self, warpgroup):
    """Which eight neighbours of a row of x a lane is to prepare: [(first, are they there)]."""
    first = [
      (warpgroup * LANES + lane_index() + i * self.warpgroups * LANES) * 8
      for i in range(-(-self.width // (8 * self.warpgroups * LANES)))
    ]
    return [(jnp.where(k < self.width, k, 0), k < self.width) for k in first]

  def join(self, count, heads, sums_ref, top_ref, total_ref, ready_ref, warpgroup):
    """Of x in `count` parts, see Parts, every lane of the program writes some."""
    batch, width, asked = self.batch, self.width, []
    for k, there in self.pieces(warpgroup):
      for b in range(batch):
        top, total = (
          [gather(ref, (i * batch + b) * heads + k // (width // heads)) for i in range(count)]
          for ref in (top_ref, total_ref)
        )
        asked.append(
          (
            b,
            k,
            there,
            top,
            total,
            [floats(sums_ref, (i * batch + b) * width + k, 8, load_in_order) for i in range(count)],
          )
        )

    def rest():
      for b, k, there, top, total, values in asked:
        highest = functools.reduce(jnp.maximum, top)
        weight = [jnp.exp(y - highest) for y in top]
        factor = 1 / sum(w * y for w, y in zip(weight, total))
        values = narrow(
          [sum(w * y for w, y in zip(weight, column)) * factor for column in zip(*values)],
          self.kind,
        )
        scatter_bytes(ready_ref, k * 0 + b, k, self.stride, values, there)
      sync_threads(self.warpgroups)

    return rest

  def normalise(
    self, x_ref, scale_ref, epsilon, ready_ref, squares_ref, warpgroup, hold, fresh=False
  ):
    """Of the norm of x every lane of the program writes some; `hold`: in registers, else x is read
    twice; `fresh`: see `load_in_order`.
    """
    lane, warps, kind = lane_index(), 4 * self.warpgroups, self.kind
    warp = warpgroup * 4 + (lane >> 5)
    pieces, there = zip(*self.pieces(warpgroup))
    words = [
      [load_in_order(x_ref, lane * 0 + b, k, self.width, fresh=fresh) for k in pieces]
      for b in range(self.batch)
    ]
    scales = [floats(scale_ref, k, 8, load_in_order) for k in pieces]

    def rest():
      for b in range(self.batch):
        total = sum(
          jnp.where(inside, sum(y * y for y in widen(piece, kind)), 0.0)
          for piece, inside in zip(words[b], there)
        )
        for distance in (16, 8, 4, 2, 1):
          total = total + shuffle_xor(total, distance)
        scatter(squares_ref, b * warps + warp, total, (lane & 31) == 0)
      sync_threads(self.warpgroups)
      for b in range(self.batch):
        factor = lax.rsqrt(
          sum(gather(squares_ref, lane * 0 + b * warps + w) for w in range(warps))
          * (1 / self.width)
          + epsilon
        )
        again = (
          words[b] if hold else [gather_bytes(x_ref, lane * 0 + b, k, self.width) for k in pieces]
        )
        for piece, k, scale, inside in zip(again, pieces, scales, there):
          values = narrow([y * factor * s for y, s in zip(widen(piece, kind), scale)], kind)
          scatter_bytes(ready_ref, lane * 0 + b, k, self.stride, values, inside)
      sync_threads(self.warpgroups)

    return rest


def put_sums(sums_ref, warp, sums):
  """Stores what `multiply_add` gave a warp, for `result`."""
  row, part = (lane_index() >> 2) & 7, lane_index() & 3
  for i, value in enumerate(sums):
    scatter(
      sums_ref, warp * LANES + (part * 2 + i % 2) * COLUMNS + row + i // 2 * 8, value, row >= 0
    )


def result(sums_ref, first, warps, swiglu, kind):
  """float32 that a tile's sums, of so many warps from the `first` on, come to: COLUMNS numbers of
  every row of x, one a lane, or with swiglu half as many.
  """
  lane = lane_index()
  total = lambda at: sum(gather(sums_ref, (first + w) * LANES + at) for w in range(warps))
  if not swiglu:
    return total(lane)
  place = jnp.minimum(lane // 8, ROWS - 1) * COLUMNS + lane % 8
  gate, up = (total(place + i).astype(kind).astype(jnp.float32) for i in (0, 8))
  return gate / (1 + jnp.exp(-gate)) * up


def warpgroups(width: int) -> int | None:
  """Of a program, that share sums over `width`: the fewest that each have at most STEPS; None where
  none do.
  """
  return next(
    (n for n in (1, 2, 4) if width % (4 * n * STEP) == 0 and width <= 4 * n * STEP * STEPS), None
  )


def takes(batch: int, matrix: jax.Array, dtype) -> bool:
  """Whether x [batch, K] of that dtype and the matrix [N, K] are of sizes and types that `product`
  multiplies, and this is the device for it.
  """
  fits = batch <= ROWS and len(matrix) % COLUMNS == 0 and warpgroups(matrix.shape[1]) is not None
  return (
    ENABLED
    and fits
    and dtype == matrix.dtype
    and dtype in (jnp.bfloat16, jnp.float16)
    and can_run()
  )


def product(
  x: jax.Array | Parts,
  matrix: jax.Array,
  *more: jax.Array,
  scale: jax.Array | None = None,
  epsilon: float = 0.0,
  residual: jax.Array | None = None,
  swiglu: bool = False,
  dtype=None,
) -> jax.Array:
  """x times the transpose of the matrix, summed in float32.

  Args:
    x: [B, K], at most ROWS rows of a 16-bit type; or Parts that are to be joined and rounded to the
      matrix's type.
    matrix: [N, K], N a multiple of COLUMNS, K one for which `warpgroups` is something.
    more: at most one more such matrix, whose products stand behind those of the first.
    scale: [K] float32, of an RMSNorm that x passes before, with `epsilon`.
    residual: [B, N], added to the rounded products.
    swiglu: the matrix holds the rows of gate and up, [2 F, K]; the result is [B, F], silu(gate) *
      up.
    dtype: of the result; default: of x.

  Returns:
    [B, N].
  """
  return _product(x, matrix, more, scale, residual, epsilon, swiglu, dtype)


# Compiled by itself, so that it is traced once for all layers.
@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _product(x, matrix, more, scale, residual, epsilon, swiglu, dtype):
  parts = isinstance(x, Parts)
  batch, width = (x.sums if parts else x).shape[-2:]
  kind, groups = matrix.dtype, warpgroups(width)
  dtype, warps = dtype or kind, 4 * groups
  steps, tiles = width // (warps * STEP), len(matrix) // COLUMNS
  every = tiles + sum(map(len, more)) // COLUMNS
  columns = (every * COLUMNS) // (2 if swiglu else 1)
  each = COLUMNS // (2 if swiglu else 1)  # columns of the result, of a program
  share = Share(batch, width, kind, groups)
  stride = share.stride
  below = len(matrix) // 2 if swiglu else 8  # from a row that a lane reads to the other one
  prepared = parts or scale is not None  # x in shared memory
  xs = [y.reshape(-1) for y in x] if parts else [x]

  def body(*refs):
    x_refs, (matrix_ref, *refs) = refs[: len(xs)], refs[len(xs) :]
    more_ref = refs.pop(0) if more else None
    scale_ref = refs.pop(0) if scale is not None else None
    residual_ref = refs.pop(0) if residual is not None else None
    out_ref, sums_ref, squares_ref, ready_ref = refs
    tile, warpgroup = axis_index("tile", "warpgroup")
    lane = lane_index()
    warp, row, part = warpgroup * 4 + (lane >> 5), (lane >> 2) & 7, lane & 3
    first = [(warp * steps + i) * STEP + part * 8 for i in range(steps)]
    own = jnp.minimum(row, batch - 1)  # rows of x beyond the last repeat it, and are not written

    def run(ref, tile):
      at = tile * each + row
      # of the result, what the lanes of the first warpgroup write
      n, column = (lane // each, lane % each)
      there = lane < batch * each
      target = jnp.where(there, n * columns + tile_all * each + column, 0)
      added = None if residual is None else gather(residual_ref, target)
      # What prepares x comes from near, and must not wait behind the matrix.
      if parts:
        rest = share.join(x.top.shape[0], x.top.shape[2], *x_refs, ready_ref, warpgroup)
      elif scale is not None:
        # registers are few
        rest = share.normalise(
          *x_refs, scale_ref, epsilon, ready_ref, squares_ref, warpgroup, batch <= 2
        )
      else:
        rows = [load_in_order(x_refs[0], own, k, width) for k in first]
      weights = [
        (
          load_in_order(ref, at, k, width, once=True),
          load_in_order(ref, at + below, k, width, once=True),
        )
        for k in first
      ]
      if prepared:
        rest()
        rows = [gather_bytes(ready_ref, own, k, stride) for k in first]
      sums = ((lane * 0).astype(jnp.float32),) * 4
      for (a, b), c in zip(weights, rows):
        for i in (0, 2):
          sums = multiply_add(sums, (a[i], b[i], a[i + 1], b[i + 1]), c[i : i + 2], kind)
      put_sums(sums_ref, warp, sums)
      sync_threads()

      @pl.when(warpgroup == 0)
      def _():
        value = result(sums_ref, 0, warps, swiglu, kind)
        if residual is not None:
          value = value.astype(kind).astype(jnp.float32) + added.astype(jnp.float32)
        scatter(out_ref, target, value.astype(dtype), there)

    tile_all = tile
    if more:
      pl.when(tile < tiles)(lambda: run(matrix_ref, tile))
      pl.when(tile >= tiles)(lambda: run(more_ref, tile - tiles))
    else:
      run(matrix_ref, tile)

  arrays = [*xs, matrix, *more] + [
    y for y in (scale, None if residual is None else residual.reshape(-1)) if y is not None
  ]
  shared = [
    plgpu.SMEM((warps * LANES,), jnp.float32),
    plgpu.SMEM((warps * ROWS,), jnp.float32),
    plgpu.SMEM((batch if prepared else 1, stride), kind),
  ]
  (out,) = plgpu.kernel(
    body,
    out_type=[jax.ShapeDtypeStruct((batch * columns,), dtype)],
    scratch_types=shared,
    grid=(every,),
    grid_names=axes("tile"),
    num_threads=groups,
    thread_name=axes("warpgroup")[0],
    compiler_params=PARAMS,
    kernel_name="sparsek_skinny",
  )(*arrays)
  return out.reshape(batch, columns)
