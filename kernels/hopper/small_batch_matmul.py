"""Products of a few rows with a matrix on NVIDIA GPUs (GEMV), where generation spends its time;
what surrounds a product in a decoder layer (RMSNorm, SwiGLU, residual, the join of attention that
was computed in parts) is fused into it.

A program computes a tile of 16 columns of the result, which are 16 rows of the matrix. It has 1, 2
or 4 warpgroups, all with the same role: their warps split the sum over K (split-K).

  every warp w of the program
  ---------------------------------------------------------------------------
  issue the loads of what prepares x: x and scale, or the parts of attention
  issue the loads of K / warps numbers of each of the 16 rows of the matrix
  if x is normalised:
    squares[row, w] = sum of squares
    wait for `warpgroups` barrier
  if x is normalised or joined:
    prepared = x, rounded
    wait for `warpgroups` barrier
    read prepared
  multiply by tensor cores, 16 x 8 x 16 at a time
  partial_sums[w] = products
  wait for `program` barrier
  ---------------------------------------------------------------------------
  warpgroup 0: add the partial sums of all warps, SwiGLU, + residual -> out

  barrier       hardware barrier    opens when all these have arrived
  warpgroups    bar.sync 1          all lanes of the warpgroups that compute
  program       bar.sync 0          all lanes of the program

  shared memory    shape              type       bytes for 2 rows of 2048, 2 warpgroups
  partial_sums     warps, 8, 16       float32     4 KiB
  squares          8, warps           float32   256 B
  prepared         B, K + 32          16 bit    8320 B; one row, unused, if x needs no preparation

The loads of the matrix are issued before any wait, so all of it is on its way while x is prepared.
The sum over K may be taken in any order. So a lane loads eight neighbours of a row, 16 bytes, and
passes them to the tensor cores as two pairs of one product and two pairs of the next; it does the
same with x.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels import devices
from sparsek.kernels.hopper.common import axes, axis_index
from sparsek.kernels.hopper.row_preparation import STEP, Preparation, Ref
from sparsek.kernels.hopper.thread_ops import PARAMS, gather, gather_bytes, load_in_order, scatter
from sparsek.kernels.hopper.thread_registers import LANES, lane_index, multiply_add
from sparsek.kernels.hopper.thread_sync import sync_threads

ENABLED = True  # False: XLA multiplies
ROWS = 8  # the most rows of x, which are columns of a tensor core's product
COLUMNS = 16  # of the result that a program computes, which are rows of a tensor core's product
MAX_STEPS = 12  # of a warp: each takes registers for 16 bytes of x and 32 of the matrix a lane


class Parts(NamedTuple):
  """Attention of one token, its keys in S parts, all float32.

  Attributes:
    sums: [S, B, H D], values weighted by exp(logit - top).
    top: [S, B, H], the largest logit of a part; LOWEST where it has none.
    total: [S, B, H], sum of the weights.
  """

  sums: jax.Array
  top: jax.Array
  total: jax.Array

  def joined(self, dtype: Any) -> jax.Array:
    """Returns the attention over all parts, [B, H D]."""
    weight = jnp.exp(self.top - jnp.max(self.top, axis=0))
    factor = weight / jnp.sum(weight * self.total, axis=0)
    return jnp.sum(
      (self.sums.reshape(*self.top.shape, -1) * factor[..., None]).reshape(self.sums.shape), axis=0
    ).astype(dtype)


class Lanes(NamedTuple):
  """Coordinates of the lanes of a warpgroup.

  Attributes:
    warpgroup: number in the program.
    lane: number in the warpgroup.
    warp: number in the program.
    row: of the tensor cores' operands, 0 to 7; the matrix's operand has row + 8 too.
    part: which eight numbers of a STEP the lane holds, 0 to 3.
  """

  warpgroup: jax.Array
  lane: jax.Array
  warp: jax.Array
  row: jax.Array
  part: jax.Array


def lanes_of(warpgroup: jax.Array) -> Lanes:
  """Returns the coordinates of a warpgroup's lanes."""
  lane = lane_index()
  return Lanes(warpgroup, lane, warpgroup * 4 + (lane >> 5), (lane >> 2) & 7, lane & 3)


def store_partial_sums(partial_sums: Ref, warp: jax.Array, sums: Sequence[jax.Array]) -> None:
  """Stores the products of a warp, as `multiply_add` returns them, for `add_partial_sums`."""
  row, part = (lane_index() >> 2) & 7, lane_index() & 3
  for i, value in enumerate(sums):
    index = warp * LANES + (part * 2 + i % 2) * COLUMNS + row + i // 2 * 8
    scatter(partial_sums, index, value, row >= 0)


def add_partial_sums(
  partial_sums: Ref, first: jax.Array | int, warps: int, swiglu: bool, dtype: Any
) -> jax.Array:
  """Returns a tile of the result, float32: COLUMNS numbers of every row of x, one a lane, or half
  as many with swiglu.

  Args:
    first: the first warp whose sums belong to the tile.
    warps: number of these warps.
    swiglu: the columns are eight of gate and eight of up, which are rounded to `dtype`.
  """
  lane = lane_index()

  def total(index):
    return sum(gather(partial_sums, (first + w) * LANES + index) for w in range(warps))

  if not swiglu:
    return total(lane)
  index = jnp.minimum(lane // 8, ROWS - 1) * COLUMNS + lane % 8
  gate, up = (total(index + i).astype(dtype).astype(jnp.float32) for i in (0, 8))
  return gate / (1 + jnp.exp(-gate)) * up


def warpgroups_for(width: int) -> int | None:
  """Returns the number of warpgroups of a program that share a sum over `width`: the fewest whose
  warps have at most MAX_STEPS each; None if no number fits.
  """
  for count in (1, 2, 4):
    if width % (4 * count * STEP) == 0 and width <= 4 * count * STEP * MAX_STEPS:
      return count
  return None


def supports(batch: int, matrix: jax.Array, dtype: Any) -> bool:
  """Returns whether `product` can multiply x [batch, K] of that dtype with the matrix [N, K], on
  this device.
  """
  groups = warpgroups_for(matrix.shape[1])
  if batch > ROWS or len(matrix) % COLUMNS or groups is None:
    return False
  # partial sums and squares of each warp, and rows that are prepared
  shared = 4 * 4 * groups * (LANES + ROWS) + 2 * batch * (matrix.shape[1] + STEP)
  return (
    ENABLED
    and shared <= devices.shared_bytes()
    and dtype == matrix.dtype
    and dtype in (jnp.bfloat16, jnp.float16)
    and devices.can_run_portable()
  )


def product(
  x: jax.Array | Parts,
  matrix: jax.Array,
  *,
  scale: jax.Array | None = None,
  epsilon: float = 0.0,
  residual: jax.Array | None = None,
  swiglu: bool = False,
  dtype: Any = None,
) -> jax.Array:
  """Multiplies x with the transpose of the matrix, summing in float32.

  Args:
    x: [B, K], at most ROWS rows of a 16-bit type; or Parts, which are joined and rounded to the
      matrix's type.
    matrix: [N, K], N a multiple of COLUMNS, K one that `warpgroups_for` accepts.
    scale: [K] float32, of an RMSNorm that is applied to x first, with `epsilon`.
    residual: [B, N], added to the rounded products.
    swiglu: the matrix holds the rows of gate and up, [2 F, K]; the result is [B, F], silu(gate) *
      up.
    dtype: of the result; x's by default.

  Returns:
    [B, N].
  """
  return _product(x, matrix, scale, residual, epsilon, swiglu, dtype)


class Inputs(NamedTuple):
  """Arrays in global memory, see `product`; Parts and residual are flat."""

  x: Ref  # or Parts
  matrix: Ref
  scale: Ref | None
  residual: Ref | None


class Outputs(NamedTuple):
  """The result in global memory, flat."""

  out: Ref


class Scratch(NamedTuple):
  """Shared memory, see the drawing above."""

  partial_sums: Ref
  squares: Ref
  prepared: Ref


class Options(NamedTuple):
  """Constants of a product's kernel.

  Attributes:
    preparation: of x.
    parts: number of parts and heads, if x is Parts.
    columns: of the result.
    columns_of_tile: of the result that a program computes.
    row_distance: between the two rows of the matrix that a lane reads.
  """

  preparation: Preparation
  parts: tuple[int, int] | None
  epsilon: float
  swiglu: bool
  dtype: Any
  columns: int
  columns_of_tile: int
  row_distance: int

  @property
  def warps(self) -> int:
    return 4 * self.preparation.warpgroups


# Compiled by itself, so that it is traced once for all layers.
@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _product(x, matrix, scale, residual, epsilon, swiglu, dtype):
  in_parts = isinstance(x, Parts)
  batch, width = (x.sums if in_parts else x).shape[-2:]
  warpgroups = warpgroups_for(width)
  assert warpgroups is not None, width
  preparation = Preparation(batch, width, matrix.dtype, warpgroups)
  halves = 2 if swiglu else 1
  options = Options(
    preparation,
    (x.top.shape[0], x.top.shape[2]) if in_parts else None,
    epsilon,
    swiglu,
    dtype or matrix.dtype,
    columns=len(matrix) // halves,
    columns_of_tile=COLUMNS // halves,
    row_distance=len(matrix) // 2 if swiglu else 8,
  )
  is_prepared = in_parts or scale is not None
  scratch = Scratch(
    partial_sums=plgpu.SMEM((options.warps * LANES,), jnp.float32),
    squares=plgpu.SMEM((options.warps * ROWS,), jnp.float32),
    prepared=plgpu.SMEM((batch if is_prepared else 1, preparation.stride), matrix.dtype),
  )
  (outputs,) = plgpu.kernel(
    functools.partial(_kernel, options),
    out_type=[Outputs(jax.ShapeDtypeStruct((batch * options.columns,), options.dtype))],
    scratch_types=[scratch],
    grid=(len(matrix) // COLUMNS,),
    grid_names=axes("tile"),
    num_threads=warpgroups,
    thread_name=axes("warpgroup")[0],
    compiler_params=PARAMS,
    kernel_name="sparsek_small_batch_matmul",
  )(
    Inputs(
      Parts(*(y.reshape(-1) for y in x)) if in_parts else x,
      matrix,
      scale,
      None if residual is None else residual.reshape(-1),
    )
  )
  return outputs.out.reshape(batch, options.columns)


def _kernel(options: Options, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
  tile, warpgroup = axis_index("tile", "warpgroup")
  lanes, (batch, width, _, warpgroups) = lanes_of(warpgroup), options.preparation
  steps = width // (4 * warpgroups * STEP)
  # The first of eight neighbours that a lane multiplies, for each step of the sum.
  first = [(lanes.warp * steps + i) * STEP + lanes.part * 8 for i in range(steps)]
  # Rows of x beyond the last repeat it, and are not written.
  x_row = jnp.minimum(lanes.row, batch - 1)
  preparation, lane, columns = options.preparation, lanes.lane, options.columns_of_tile
  matrix_row = tile * columns + lanes.row
  # Elements of the result that the lanes of the first warpgroup write.
  n, column = lane // columns, lane % columns
  inside = lane < preparation.batch * columns
  target = jnp.where(inside, n * options.columns + tile * columns + column, 0)
  residual = None if inputs.residual is None else gather(inputs.residual, target)
  # These loads are short; they must not wait behind those of the matrix.
  finish_preparation = _start_preparation(options, inputs, scratch, lanes.warpgroup)
  x_words = []
  if finish_preparation is None:
    x_words = [load_in_order(inputs.x, x_row, k, preparation.width) for k in first]
  matrix_words = [
    (
      load_in_order(inputs.matrix, matrix_row, k, preparation.width, once=True),
      load_in_order(
        inputs.matrix, matrix_row + options.row_distance, k, preparation.width, once=True
      ),
    )
    for k in first
  ]
  if finish_preparation is not None:
    finish_preparation()
    x_words = [gather_bytes(scratch.prepared, x_row, k, preparation.stride) for k in first]
  sums: tuple[jax.Array, ...] = ((lane * 0).astype(jnp.float32),) * 4
  for (a, b), c in zip(matrix_words, x_words):
    for i in (0, 2):
      operand = a[i], b[i], a[i + 1], b[i + 1]
      sums = multiply_add(sums, operand, c[i : i + 2], preparation.dtype)
  store_partial_sums(scratch.partial_sums, lanes.warp, sums)
  sync_threads()

  @pl.when(lanes.warpgroup == 0)
  def store():
    value = add_partial_sums(
      scratch.partial_sums, 0, options.warps, options.swiglu, preparation.dtype
    )
    if residual is not None:
      value = value.astype(preparation.dtype).astype(jnp.float32) + residual.astype(jnp.float32)
    scatter(outputs.out, target, value.astype(options.dtype), inside)


def _start_preparation(
  options: Options, inputs: Inputs, scratch: Scratch, warpgroup: jax.Array
) -> Callable[[], None] | None:
  """Starts the preparation of x in shared memory, and returns the function that finishes it; None
  if x is multiplied as it is.
  """
  preparation = options.preparation
  if options.parts is not None:
    return preparation.start_join(*options.parts, inputs.x, scratch.prepared, warpgroup)
  if inputs.scale is None:
    return None
  return preparation.start_norm(
    inputs.x,
    inputs.scale,
    options.epsilon,
    scratch.prepared,
    scratch.squares,
    warpgroup,
    hold=preparation.batch <= 2,  # registers are few
  )
