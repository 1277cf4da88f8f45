"""Everything between the attention of one layer and that of the next, for a few rows on Hopper
GPUs, in one kernel (fused_decode_kernel.py): four products with the norms and residuals around
them.

  OUT   y         = x + attention out^T           attention is joined from its parts
  UP    hidden    = silu(gate) * up               of norm(y), matrix [2 F, E]
  DOWN  x         = y + hidden down^T
  NEXT  projected = norm(x) next^T                queries, keys, values of the next layer

Each product needs all of the one before it, so all programs meet at a grid barrier before each.
Meanwhile memory stays busy, because one warpgroup of each program loads the matrices ahead.
"""

import functools
import os

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.devices import can_run
from sparsek.kernels.hopper.common import axes, programs_at_once
from sparsek.kernels.hopper.fused_decode_kernel import (
  DEPTH,
  NEXT,
  Inputs,
  Options,
  Outputs,
  Plan,
  kernel,
  scratch_of,
)
from sparsek.kernels.hopper.row_preparation import STEP, Preparation
from sparsek.kernels.hopper.small_batch_matmul import COLUMNS, ROWS, Parts
from sparsek.kernels.hopper.thread_ops import PARAMS, contents, unfused
from sparsek.kernels.hopper.thread_registers import LANES

ENABLED = True  # False: a kernel for every product
MOST_ROWS = 4  # of x: the more rows, the less shared memory is left for pieces
SHARED = 216 * 2**10  # bytes of shared memory that a program takes at most


def plan(batch: int, *widths: int) -> Plan | None:
  """Returns the plan for products of rows of these widths; None if there is none."""
  groups = next((n for n in (2, 1) if all(width % (4 * n * STEP) == 0 for width in widths)), None)
  if groups is None:
    return None
  smallest = 4 * groups * STEP
  other_bytes = 2 * batch * (max(widths) + STEP) + 4 * 4 * groups * (2 * LANES + ROWS)
  pieces = [
    n for n in range(smallest, min(widths) + 1, smallest) if all(width % n == 0 for width in widths)
  ]
  for piece in reversed(pieces):
    stages = min((SHARED - other_bytes) // (2 * COLUMNS * (piece + STEP) + 16), LANES)
    if stages > DEPTH:
      return Plan(groups, piece, stages)
  return None


def supports(x: jax.Array, *matrices: jax.Array) -> bool:
  """Returns whether `fused_layer` can compute with x [B, E] and these matrices, on this device."""
  same = x.dtype in (jnp.bfloat16, jnp.float16) and all(
    y.dtype == x.dtype and len(y) % COLUMNS == 0 for y in matrices
  )
  fits = same and len(x) <= MOST_ROWS and plan(len(x), *(y.shape[1] for y in matrices)) is not None
  return ENABLED and fits and can_run() and not processes_share_device()


def processes_share_device() -> bool:
  """Returns whether kernels of several processes may run on a device at the same time, by CUDA's
  multi-process service: two such kernels, each on a part of the multiprocessors, would wait for
  the rest of them forever.
  """
  return os.path.exists(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))


def fused_layer(
  mixed: Parts,
  x: jax.Array,
  out: jax.Array,
  mlp_scale: jax.Array,
  up: jax.Array,
  down: jax.Array,
  next_scale: jax.Array | None,
  next_matrix: jax.Array | None,
  counter: jax.Array,
  epsilon: float,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
  """Computes everything between one layer's attention and the next one's, rounded as by a call of
  `small_batch_matmul.product` for each product.

  Args:
    mixed: attention [B, H D], at most MOST_ROWS rows.
    x: [B, E], the layer's input, of the matrices' type, 16 bits.
    out: [E, H D], whose product with the joined parts is added to x: y.
    mlp_scale: [E] float32, of the RMSNorm that is applied to y before `up`, with `epsilon`.
    up: [2 F, E], the rows of gate and up.
    down: [E, F], whose product is added to y: the next layer's input.
    next_scale: [E] float32, of the norm that is applied to this; None if there is no next layer.
    next_matrix: [N, E], what that is multiplied with, or None.
    counter: [1] int32, zero for the first kernel, for others what the one before returned. Two
      kernels must not use it at the same time.

  Returns:
    The next layer's input, the products [B, N] float32 or None, the counter for the next kernel.
  """
  scales = (mlp_scale,) if next_scale is None else (mlp_scale, next_scale)
  x, *projected, counter = _fused_layer(
    mixed,
    x,
    (out, up, down) if next_matrix is None else (out, up, down, next_matrix),
    scales,
    counter,
    # one that waits for another that cannot begin before it ends would wait forever
    programs_at_once(),
    epsilon,
  )
  return x, projected[0] if projected else None, counter


def _options(mixed, x, matrices, programs, epsilon) -> Options:
  widths = [matrix.shape[1] for matrix in matrices]
  of_program = plan(len(x), *widths)
  assert of_program is not None, widths
  return Options(
    of_program,
    programs,
    epsilon,
    x.dtype,
    (mixed.top.shape[0], mixed.top.shape[2]),
    tuple(Preparation(len(x), width, x.dtype, of_program.warpgroups) for width in widths),
    rows=tuple(map(len, matrices)),
  )


# Compiled by itself, so that it is traced once for all layers.
@functools.partial(jax.jit, static_argnums=(5, 6))
def _fused_layer(mixed, x, matrices, scales, counter, programs, epsilon):
  options = _options(mixed, x, matrices, programs, epsilon)
  batch, embed = x.shape
  products = tuple(
    jax.ShapeDtypeStruct((batch * count,), jnp.float32 if p == NEXT else x.dtype)
    for p, count in enumerate(options.columns)
  )
  run = plgpu.kernel(
    functools.partial(kernel, options),
    out_type=[Outputs(products)],
    scratch_types=[scratch_of(options)],
    grid=(programs,),
    grid_names=axes("program"),
    num_threads=options.plan.warpgroups + 1,
    thread_name=axes("warpgroup")[0],
    compiler_params=PARAMS,
    kernel_name="sparsek_fused_decode_layer",
  )
  counter = jax.new_ref(counter)
  mixed, x = unfused((jax.tree.map(lambda y: y.reshape(-1), mixed), x.reshape(-1)))
  (outputs,) = unfused(run(Inputs(mixed, x, matrices, scales, counter)))
  _, _, x, *projected = outputs.products
  return x.reshape(batch, embed), *(y.reshape(batch, -1) for y in projected), *contents(counter)
