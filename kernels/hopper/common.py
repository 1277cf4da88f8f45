"""Pieces that the Mosaic GPU kernels share: grids, tilings, operations on registers."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.devices import device_here
from sparsek.kernels.hopper.quick_lowering import quicken

# A reference to global or shared memory inside a kernel, or to its barriers; JAX has no public type
# for them.
Ref = Any

BLOCK_Q = 128  # queries of a block: 64 for each of the two computing warpgroups
HALF = BLOCK_Q // 2
COMPUTING = 2  # warpgroups of a program that compute; the one after them loads
MULTIPROCESSORS = 132  # of an H100 or H200
LOG2_E = math.log2(math.e)
# Layouts of matrices in registers, and of vectors with an element for each row or column of one.
MATRIX = plgpu.Layout.WGMMA
ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)
_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
# plgpu.load of JAX 0.10 requires an index, that of 0.12 has none
LOAD_INDEX = ((),) if _INDEX is not None and _INDEX.default is inspect.Parameter.empty else ()
_STORE = getattr(plgpu, "store", None)  # from JAX 0.12 on


quicken()


def programs_at_once() -> int:
  """Returns how many programs the device runs at the same time if each fills a multiprocessor."""
  return min(getattr(device_here(), "core_count", MULTIPROCESSORS), MULTIPROCESSORS)


def axes(*names: str) -> tuple[str, ...]:
  """Returns names for the axes of a kernel's grid.

  A mesh around the kernel must have no axis of the same name, or JAX would take the index of the
  device for that of the program; hence the prefix.
  """
  return tuple(f"sparsek_{name}" for name in names)


def axis_index(*names: str) -> Any:
  """Returns the index of the program or warpgroup along the axes of these names, one for each."""
  indices = tuple(lax.axis_index(name) for name in axes(*names))
  return indices if len(indices) > 1 else indices[0]


def grid_of(**sizes: int) -> dict[str, Any]:
  """Returns the options of `plgpu.kernel` for programs along axes of these sizes.

  CUDA takes 2^31 - 1 programs along x, which is Mosaic's last axis, but only 65,535 along y and z.
  So all programs are numbered along x; the index on the last of these axes changes fastest.
  """
  return {"grid": (math.prod(sizes.values()),), "grid_names": axes("program")}


def grid_position(**sizes: int) -> list[jax.Array]:
  """Returns the index of the program along each axis of its `grid_of`."""
  return split_number(axis_index("program"), **sizes)


def split_number(number: Any, **sizes: int) -> list[jax.Array]:
  """Returns the index along each of these axes of the number-th of all their places, of which the
  index on the last axis changes fastest.
  """
  indices = []
  for size in reversed(sizes.values()):
    indices.append(lax.rem(number, jnp.int32(size)))
    number = lax.div(number, jnp.int32(size))
  return indices[::-1]


def run_kernel(
  body: Callable, inputs: NamedTuple, outputs: NamedTuple, scratch: NamedTuple, **options: Any
) -> list[jax.Array]:
  """Runs a kernel of two computing warpgroups and a loading one.

  Args:
    body: called with three NamedTuples of references, like `inputs`, `outputs` and `scratch`.
    inputs: NamedTuple of arrays; a field that is None stays None.
    outputs: NamedTuple of jax.ShapeDtypeStruct.
    scratch: NamedTuple of shared memory and barriers.
    options: of `plgpu.kernel`: grid, kernel_name, interpret.

  Returns:
    The outputs, in order.
  """
  kernel = plgpu.kernel(
    with_names(body, inputs, outputs, scratch),
    out_type=jax.tree.leaves(outputs),
    scratch_types=jax.tree.leaves(scratch),
    num_threads=COMPUTING + 1,
    thread_name=axes("warpgroup")[0],
    # rows and columns of matrices are reduced in registers alone
    compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    **options,
  )
  return kernel(*jax.tree.leaves(inputs))


def with_names(body: Callable, *parts: NamedTuple) -> Callable:
  """Returns a function of all references of a kernel, in order, that calls `body` with NamedTuples
  of them, like `parts`.
  """
  flat = [jax.tree.flatten(part) for part in parts]

  def call(*refs):
    named = []
    for leaves, structure in flat:
      named.append(jax.tree.unflatten(structure, refs[: len(leaves)]))
      refs = refs[len(leaves) :]
    body(*named)

  return call


class Tiling(NamedTuple):
  """Sizes of the kernels' tiles, and the number of tiles (stages) in their circular buffers.

  Attributes:
    forward_keys, forward_stages: keys of a tile of the forward kernel, and its stages.
    query_keys, query_stages: the same of the kernel for the gradients of queries.
    hold_queries: that kernel keeps its queries in registers.
    late_products: it adds the gradients from a tile while it computes the next one.
    key_queries, key_stages: queries of a tile of the kernels for the gradients of keys, and stages.
    early: these kernels begin the product for the values' gradients before the gradients of the
      logits are known, which takes registers.
  """

  forward_keys: int
  forward_stages: int
  query_keys: int
  query_stages: int
  hold_queries: bool
  late_products: bool
  key_queries: int
  key_stages: int
  early: bool


TILINGS = {  # by head_dim
  64: Tiling(
    forward_keys=128,
    forward_stages=2,
    query_keys=64,
    query_stages=3,
    hold_queries=True,
    late_products=True,
    key_queries=64,
    key_stages=2,
    early=False,
  ),
  128: Tiling(
    forward_keys=128,
    forward_stages=2,
    query_keys=64,
    query_stages=3,
    hold_queries=False,
    late_products=False,
    key_queries=64,
    key_stages=2,
    early=True,
  ),
  256: Tiling(
    forward_keys=64,
    forward_stages=2,
    query_keys=64,
    query_stages=2,
    hold_queries=False,
    late_products=False,
    key_queries=64,
    key_stages=2,
    early=False,
  ),
}


def by_row(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Broadcasts one value per row."""
  return lax.broadcast_in_dim(vector, shape, [0])


def by_column(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Broadcasts one value per column."""
  return lax.broadcast_in_dim(vector, shape, [1])


def apply_if(condition: Any, f: Callable, carry: Any) -> Any:
  """Returns f(carry) where a scalar condition holds, and `carry` where it does not."""
  return lax.fori_loop(0, jnp.where(condition, 1, 0), lambda _, carry: f(carry), carry)


def in_block(index: Any, f: Callable, carry: Any) -> Any:
  """Returns f(carry), computed in a basic block of its own, for an index that is not negative.

  After a product was issued, this keeps ptxas from spreading the instructions of f between those of
  the product, which would hold up the tensor cores.
  """
  return apply_if(index >= 0, f, carry)


def opaque_zero(index: Any) -> Any:
  """Returns 0, of an index that is not negative, in a way that the compiler does not see through.

  Added to the slot of a matrix that all steps of a loop multiply, it keeps the tensor cores'
  descriptors of its parts from being computed before the loop: there they take two registers each.
  """
  return jnp.minimum(index, 0)


def read_bounds(ref: Ref, *row: jax.Array) -> tuple[jax.Array, ...]:
  """Reads all entries of ref[row], scalars.

  Adding 0 is for `jax.shard_map`: a value that is read has a type that varies over the mesh's axes,
  a value that is computed inside a kernel has not.
  """
  return tuple(ref[(*row, i)] + 0 for i in range(ref.shape[-1]))


class Registers:
  """Operations on registers, also for the interpreter, which knows no layouts and multiplies only
  matrices in shared memory.
  """

  def __init__(self, interpret: object) -> None:
    self.interpreted = interpret is not None

  def vector(self, ref: Ref, layout: Any) -> jax.Array:
    """Loads a vector from shared memory, along a matrix's rows or columns."""
    if self.interpreted:
      return ref[...]
    return plgpu.load(ref, *LOAD_INDEX, layout=layout, optimized=False)

  def matrix(self, ref: Ref) -> jax.Array:
    """Loads a matrix from shared memory."""
    return ref[...] if self.interpreted else plgpu.load(ref, *LOAD_INDEX, layout=MATRIX)

  def store(self, ref: Ref, matrix: jax.Array) -> None:
    """Stores a matrix of 16 bit in global memory, straight from registers.

    A row's 8 columns, which 4 threads hold, are half of a sector of global memory. JAX 0.12 takes
    that for a mistake unless told otherwise; earlier ones always store so.
    """
    if self.interpreted or _STORE is None:
      ref[...] = matrix
    else:
      _STORE(ref, matrix, optimized=False)

  def full(self, shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    """Returns a float32 array of one value."""
    x = jnp.full(shape, value, jnp.float32)
    return x if self.interpreted else plgpu.layout_cast(x, layout)

  def index(self, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Returns the row (axis 0) or column (axis 1) numbers of a matrix."""
    if self.interpreted:
      return lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)

  def matmul(
    self, shape: tuple[int, int], a: Ref, b: Ref, meanwhile: Callable = lambda: None
  ) -> jax.Array:
    """Returns a @ b.T in float32, of matrices in shared memory; `meanwhile()` runs while the tensor
    cores work.
    """
    return self.matmul_beside(shape, a, b, meanwhile)[0]

  def matmul_beside(self, shape: tuple[int, int], a: Ref, b: Ref, make: Callable) -> tuple:
    """Returns a @ b.T, as `matmul`, and make(), which runs while the tensor cores work."""
    if self.interpreted:
      product = lax.dot_general(
        a[...], b[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
      )
      return product, make()

    def run(accumulator):
      plgpu.wgmma(accumulator, a, b.transpose((1, 0)))
      made = make()
      return accumulator[...], made

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))

  def two_matmuls(
    self,
    shape: tuple[int, int],
    first: tuple,
    second: tuple,
    use: Callable,
    between: Callable = lambda: None,
  ) -> tuple:
    """Multiplies twice, the second time while the first product is used.

    Args:
      shape: of both products.
      first, second: (a, b) and (c, d), matrices in shared memory (a may be in registers).
      use: called with a @ b.T and a function that waits for c @ d.T and returns it. That function's
        argument is the number of later matmuls that may still be running.
      between: called before the second multiplication begins.

    Returns:
      The result of `use`.
    """
    if self.interpreted:
      a, b = first
      return use(self.matmul(shape, a, b, between), lambda later: self.matmul(shape, *second))

    def run(*accumulators):
      for accumulator, (a, b), before in zip(
        accumulators, (first, second), (lambda: None, between)
      ):
        before()
        plgpu.wgmma(accumulator, a, b.transpose((1, 0)))

      def wait(accumulator, later):
        return lax.optimization_barrier(plgpu.wgmma_accumulator_load(accumulator, wait_n=later))

      return use(wait(accumulators[0], 1), functools.partial(wait, accumulators[1]))

    return pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32)] * 2)

  def two_matmuls_during_add(
    self,
    shape: tuple[int, int],
    first: tuple,
    second: tuple,
    acc: jax.Array,
    third: tuple,
    use: Callable,
  ) -> tuple:
    """Multiplies and adds while the two products are used.

    Args:
      shape, first, second, use: as in `two_matmuls`; the sum may still be running.
      acc: accumulator.
      third: (e, f), e in registers and f in shared memory.

    Returns:
      acc + e @ f, and the result of `use`.
    """
    if self.interpreted:
      used = use(self.matmul(shape, *first), lambda later: self.matmul(shape, *second))
      return *self.matmul_add((acc,), (third,)), used

    def run(product, other_product, accumulator):
      accumulator[...] = acc
      for into, (a, b) in ((product, first), (other_product, second)):
        plgpu.wgmma(into, a, b.transpose((1, 0)))
      plgpu.wgmma(accumulator, *third)

      def wait(accumulator, later):
        return lax.optimization_barrier(plgpu.wgmma_accumulator_load(accumulator, wait_n=later))

      used = use(wait(product, 2), functools.partial(wait, other_product))
      return accumulator[...], used

    shapes = shape, shape, (acc.shape[0], acc.shape[1])
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

  def matmul_add_in_turn(
    self, accs: tuple[jax.Array, jax.Array], a: jax.Array, b: Ref, make: Callable, d: Ref
  ) -> tuple:
    """Returns (acc_0 + a @ b, acc_1 + c @ d, last()) with c, last = make(), which runs while a @ b
    is computed, and last() while c @ d is; a and c are in registers, b and d in shared memory.
    """
    if self.interpreted:
      c, last = make()
      return *self.matmul_add(accs, ((a, b), (c, d))), last()

    def run(*accumulators):
      for accumulator, acc in zip(accumulators, accs):
        accumulator[...] = acc
      plgpu.wgmma(accumulators[0], a, b)
      c, last = make()
      plgpu.wgmma(accumulators[1], c, d)
      made = last()
      return *(x[...] for x in accumulators), made

    shapes = [(acc.shape[0], acc.shape[1]) for acc in accs]
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

  def matmul_add_beside(self, acc: jax.Array, a: jax.Array, b: Ref, make: Callable) -> tuple:
    """Returns acc + a @ b, a in registers and b in shared memory, and make(), which runs while the
    tensor cores work.
    """
    if self.interpreted:
      return *self.matmul_add((acc,), ((a, b),)), make()

    def run(accumulator):
      accumulator[...] = acc
      plgpu.wgmma(accumulator, a, b)
      made = make()
      return accumulator[...], made

    return pl.run_scoped(run, plgpu.ACC((acc.shape[0], acc.shape[1]), jnp.float32))

  def matmul_add(
    self, accs: tuple[jax.Array, ...], factors: tuple, meanwhile: Callable = lambda: None
  ) -> tuple[jax.Array, ...]:
    """Returns acc + a @ b for each acc and (a in registers, b in shared memory), issued together;
    `meanwhile()` runs while the tensor cores work.
    """
    if self.interpreted:
      accs = tuple(
        acc + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        for acc, (a, b) in zip(accs, factors)
      )
      meanwhile()
      return accs

    def run(accumulators):
      for accumulator, (a, b) in zip(accumulators, factors):
        plgpu.wgmma(accumulator, a, b)
      meanwhile()

    return pl.run_state(run)(tuple(plgpu.ACC.init(acc) for acc in accs))


def gate_of(scores: jax.Array, tau: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Returns clip(u_j - tau_i, 0, 1), scores along the columns and thresholds along the rows."""
  return jnp.clip(by_column(scores, shape) - by_row(tau, shape), 0.0, 1.0)


def matrix_buffer(count: int, rows: int, columns: int, dtype: Any) -> Any:
  """Returns shared memory for `count` matrices, tiled and swizzled for the tensor cores or, of 32
  bits, for registers.
  """
  # JAX 0.11 declares these classes abstract.
  tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]
  swizzle = plgpu.SwizzleTransform(128)  # type: ignore[abstract]
  return plgpu.SMEM((count, rows, columns), dtype, transforms=(tiling, swizzle))


def vector_buffer(count: int, length: int, dtype: Any = jnp.float32) -> Any:
  """Returns shared memory for `count` vectors."""
  return plgpu.SMEM((count, length), dtype)


def slot_of(step: Any, stages: int) -> tuple[Any, Any]:
  """Returns the slot of a circular buffer at this step, and whether it was used before."""
  slot = step % stages if isinstance(step, int) else lax.rem(step, jnp.array(stages, step.dtype))
  return slot, step >= stages


def pass_by(first: Any, last: Any, *, stages: int, full: tuple[Ref, ...], free: tuple) -> None:
  """Passes the steps [first, last) of a circular buffer, whose tiles only the other computing
  warpgroup uses: waits until each tile is full, and arrives as if this warpgroup had read it.
  """

  @pl.loop(first, last)
  def _(step):
    slot, _ = slot_of(step, stages)
    for barrier in full:
      plgpu.barrier_wait(barrier.at[slot])
    for barrier in free:
      plgpu.barrier_arrive(barrier.at[slot])


def observe_last(interpret: object, steps: Any, stages: int, *free: Ref) -> None:
  """Waits for the last tiles to be read, when interpreted: the interpreter insists that each phase
  of a barrier be observed.
  """
  if interpret is None:
    return

  @pl.loop(jnp.maximum(steps - stages, 0), steps)
  def _(step):
    slot, _ = slot_of(step, stages)
    for barrier in free:
      plgpu.barrier_wait(barrier.at[slot])


def joined(a: tuple, b: tuple) -> tuple:
  """Returns the smallest range [first, end) that holds both; an empty range does not count."""

  def is_empty(range):
    return range[0] >= range[1]

  def either(f, x, y):
    return jnp.where(is_empty(a), y, jnp.where(is_empty(b), x, f(x, y)))

  return either(jnp.minimum, a[0], b[0]), either(jnp.maximum, a[1], b[1])
