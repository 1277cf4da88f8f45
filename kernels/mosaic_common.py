"""Small pieces that the Mosaic GPU kernels share."""

import inspect
import math

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

BLOCK_Q = 128                    # queries of a block: 64 for each of the two computing warpgroups
LOG2_E = math.log2(math.e)
LOWEST = -1e30                   # below every logit, and finite: differences with -inf stay defined
MATRIX = plgpu.Layout.WGMMA      # of matrices in registers; vectors along their rows and columns:
ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)
_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
LOAD_INDEX = ((),) if _INDEX is not None and _INDEX.default is inspect.Parameter.empty else ()    # JAX 0.10 wants one, 0.12 takes none


def by_row(vector, shape):
  """Broadcasts one value per row."""
  return lax.broadcast_in_dim(vector, shape, [0])


def by_column(vector, shape):
  """Broadcasts one value per column."""
  return lax.broadcast_in_dim(vector, shape, [1])


def read_bounds(ref, *row):
  """All entries of ref[row], scalars. The sum is for `jax.shard_map`: what is read varies over its axes, but inside a kernel what is computed does not."""
  return tuple(ref[(*row, i)] + 0 for i in range(ref.shape[-1]))


class Registers:
  """Operations on registers that the interpreter lacks or does without: it knows no layouts, and multiplies matrices in shared memory only."""

  def __init__(self, interpret):
    self.interpreted = interpret is not None

  def vector(self, ref, layout):
    """A vector from shared memory, along a matrix's rows or columns."""
    return ref[...] if self.interpreted else plgpu.load(ref, *LOAD_INDEX, layout=layout, optimized=False)

  def matrix(self, ref):
    """A matrix from shared memory."""
    return ref[...] if self.interpreted else plgpu.load(ref, *LOAD_INDEX, layout=MATRIX)

  def full(self, shape, value, layout):
    """A float32 array of one value."""
    x = jnp.full(shape, value, jnp.float32)
    return x if self.interpreted else plgpu.layout_cast(x, layout)

  def index(self, shape, axis):
    """Row or column numbers of a matrix."""
    return lax.broadcasted_iota(jnp.int32, shape, axis) if self.interpreted else plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)

  def matmul(self, shape, a, b, meanwhile=lambda: None):
    """a @ b.T in float32, both in shared memory; `meanwhile()` runs while the tensor cores work."""
    if self.interpreted:
      product = lax.dot_general(a[...], b[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
      meanwhile()
      return product
    def run(accumulator):
      plgpu.wgmma(accumulator, a, b.transpose((1, 0)))
      meanwhile()
      return accumulator[...]
    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))

  def matmul_add(self, accs, factors, meanwhile=lambda: None):
    """acc + a @ b for every acc and (a in registers, b in shared memory), issued together; `meanwhile()` runs while the tensor cores work."""
    if self.interpreted:
      accs = tuple(acc + jnp.dot(a, b[...], preferred_element_type=jnp.float32) for acc, (a, b) in zip(accs, factors))
      meanwhile()
      return accs
    def run(accumulators):
      for accumulator, (a, b) in zip(accumulators, factors):
        plgpu.wgmma(accumulator, a, b)
      meanwhile()
    return pl.run_state(run)(tuple(plgpu.ACC.init(acc) for acc in accs))


def gate_of(scores, tau, shape):
  """clip(u_j - tau_i, 0, 1), scores along the columns and thresholds along the rows."""
  return jnp.clip(by_column(scores, shape) - by_row(tau, shape), 0., 1.)


def matrix_buffer(count, rows, columns, dtype):
  """Shared memory for `count` matrices, tiled and swizzled as the tensor cores want it."""
  return plgpu.SMEM((count, rows, columns), dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def phase_of(step, stages):
  """(slot of a circular buffer, was it used before) at this step."""
  return lax.rem(step, jnp.array(stages, step.dtype)), step >= stages
