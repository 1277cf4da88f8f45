"""Mosaic GPU kernels of single threads (lanes), each of which loads and stores at its own address.

Pallas itself moves tiles only; the loads and stores below are single instructions inlined into its
kernels. The interpreter has no counterpart for them. See also thread_registers.py (arithmetic that
Pallas lacks) and thread_sync.py (barriers).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from sparsek.kernels.hopper.common import Ref, axis_index, grid_of, grid_position
from sparsek.kernels.hopper.thread_registers import (
  LANES,
  LAYOUT,
  address_of,
  array_of,
  constant,
  element,
  extract,
  float_type,
  four_words,
  global_address,
  lane_index,
  only_where,
  per_lane,
  split_struct,
)

# Warpgroup semantics would infer layouts, which takes ten times as long; here there is only one.
# With lane semantics `where` of integers forgets their sign if its first choice is a scalar (see
# tests/kernels/hopper/compile_test.py): write booleans `.astype(int32)`, and put an array first.
PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def gather(ref: Ref, index: Any) -> jax.Array:
  """Returns ref[index] in each lane; `ref` has one axis."""

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT), return_type=array_of(ref.dtype))
  def load(_, ref, index):
    signed = None if jnp.issubdtype(dtype, jnp.floating) else True
    return index.foreach(
      lambda i, _: memref.load(ref, [_memref_index(i)]), create_array=True, is_signed=signed
    )

  dtype = ref.dtype
  return load(ref, per_lane(index))


def gather_row(ref: Ref, index: Any) -> tuple[jax.Array, ...]:
  """Returns the four int32 of ref[index] in each lane."""
  return gather_bytes(ref, index, 0, 4)


def gather_bytes(ref: Ref, index: Any, offset: Any, stride: int) -> tuple[jax.Array, ...]:
  """Returns 16 bytes in each lane, as four int32.

  They begin index * stride + offset elements behind the beginning of `ref`, a multiple of 16 bytes.
  """

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), LAYOUT, LAYOUT), return_type=(array_of(jnp.int32),) * 4
  )
  def load(_, ref, index, offset):
    address = address_of(ref, element(index), element(offset), stride)
    row = llvm.load(four_words(), address, alignment=16)
    return tuple(
      index.foreach(lambda *_, c=c: extract(row, c), create_array=True, is_signed=True)
      for c in range(4)
    )

  return tuple(load(ref, per_lane(index), per_lane(offset)))


def load_in_order(
  ref: Ref, index: Any, offset: Any, stride: int, once: bool = False, fresh: bool = False
) -> tuple[jax.Array, ...]:
  """Returns the same as `gather_bytes`, by loads that the compiler keeps in this order.

  Args:
    ref, index, offset, stride: as in `gather_bytes`. The kernel must not write there, unless
      `fresh`.
    once: the bytes are not needed again, and need not stay in the caches.
    fresh: another program of this kernel has written them, so they must not come from the L1 cache.
  """

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), LAYOUT, LAYOUT), return_type=(array_of(jnp.int32),) * 4
  )
  def load(_, ref, index, offset):
    i32 = ir.IntegerType.get_signless(32)
    hints = ".cg" if fresh else ".nc.L1::no_allocate.L2::128B" if once else ".nc"
    address = global_address(ref, element(index), element(offset), stride)
    row = llvm.inline_asm(
      llvm.StructType.get_literal([i32] * 4),
      [address],
      f"ld.global{hints}.v4.b32 {{$0, $1, $2, $3}}, [$4];",
      "=r,=r,=r,=r,l",
      has_side_effects=True,  # this keeps the order
    )
    return split_struct(index, row, i32, 4)

  return tuple(load(ref, per_lane(index), per_lane(offset)))


def load_number_in_order(ref: Ref, index: Any) -> jax.Array:
  """Returns ref[index] of a 16-bit type in each lane; ordered and fresh, see `load_in_order`."""

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT), return_type=array_of(ref.dtype))
  def load(_, ref, index):
    i = element(index)
    address = global_address(ref, i, constant(i.type, 0), 1)
    word: Any = llvm.inline_asm(
      ir.IntegerType.get_signless(16),
      [address],
      "ld.global.cg.b16 $0, [$1];",
      "=h,l",
      has_side_effects=True,
    )
    return index.foreach(lambda *_: llvm.bitcast(float_type(dtype), word), create_array=True)

  dtype = ref.dtype
  return load(ref, per_lane(index))


def scatter(ref: Ref, index: Any, value: Any, where: Any, atomic: str | None = None) -> None:
  """Stores ref[index] = value in the lanes where `where`; `ref` has one axis.

  With `atomic` "add" or "min" it adds the value to ref[index], or takes the smaller one of both,
  atomically.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT, LAYOUT, LAYOUT))
  def store(_, ref, index, value, where):
    index, value, where = map(element, (index, value, where))
    with only_where(where):
      if atomic:
        begin, i64 = utils.memref_ptr(ref), ir.IntegerType.get_signless(64)
        address = utils.getelementptr(begin, [arith.extsi(i64, index)], value.type)
        _atomic(getattr(llvm.AtomicBinOp, atomic), address, value)
      else:
        memref.store(value, ref, [_memref_index(index)])

  store(ref, per_lane(index), per_lane(jnp.asarray(value, ref.dtype)), per_lane(where))


def scatter_row(ref: Ref, index: Any, values: Sequence, where: Any) -> None:
  """Stores ref[index] = values, four int32, in the lanes where `where`."""
  scatter_bytes(ref, index, 0, 4, values, where)


def scatter_bytes(
  ref: Ref, index: Any, offset: Any, stride: int, values: Sequence, where: Any
) -> None:
  """Stores 16 bytes, four int32, where `gather_bytes` would read them, in the lanes where
  `where`.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[LAYOUT] * 7))
  def store(_, ref, index, offset, where, *values):
    index, offset, where, *words = map(element, (index, offset, where, *values))
    with only_where(where):
      row = vector.from_elements(four_words(), words)
      llvm.store(row, address_of(ref, index, offset, stride), alignment=16)

  store(ref, per_lane(index), per_lane(offset), per_lane(where), *map(per_lane, values))


def floats(ref: Ref, index: Any, count: int, load: Callable | None = None) -> list[jax.Array]:
  """Returns `count` float32 from ref[index] on in each lane; both numbers are multiples of four."""
  words = [word for i in range(0, count, 4) for word in (load or gather_bytes)(ref, index, i, 1)]
  return [lax.bitcast_convert_type(word, jnp.float32) for word in words]


def reader(ref: Ref, *row: Any) -> Callable:
  """Returns a function of an index that reads ref[row, index], or the four elements of that row;
  an index outside reads the first or last one.
  """
  if ref.ndim == len(row) + 1:
    return lambda index: gather(ref.at[row], jnp.clip(index, 0, ref.shape[-1] - 1))
  return lambda index: gather_row(ref.at[row], jnp.clip(index, 0, ref.shape[-2] - 1))


def kernel(
  body: Callable, rows: int, size: int, *extra: int, name: str, out_type: Any = (), **options: Any
) -> Callable:
  """Returns a function that runs a kernel of single threads.

  A program has LANES lanes. For each of `rows` rows, and each of `extra` numbers (1 by default),
  there are enough programs for `size` lanes.

  Args:
    body: called with (row, number, lane, *inputs, *outputs, *scratch): the row, the number below
      `extra`, the array of the lanes' numbers in the row, and references. An input or output that
      is a NamedTuple of arrays is one argument, a NamedTuple of references.
    rows, size, extra: see above.
    name: for traces.
    out_type: list of outputs, jax.ShapeDtypeStruct or NamedTuples of them.
    options: of `plgpu.kernel`.

  Returns:
    Function of the inputs, arrays and references (jax.Ref), whose result is like `out_type`.
  """
  sizes = {"block": -(-size // LANES), "row": rows, "extra": extra[0] if extra else 1}
  out_leaves, out_structure = jax.tree.flatten(list(out_type))

  def run(*args):
    leaves, structure = jax.tree.flatten(args)

    def with_names(*refs):
      block, row, number = grid_position(**sizes)
      outputs_end = len(leaves) + len(out_leaves)
      body(
        row,
        number,
        block * LANES + lane_index(),
        *jax.tree.unflatten(structure, refs[: len(leaves)]),
        *jax.tree.unflatten(out_structure, refs[len(leaves) : outputs_end]),
        *refs[outputs_end:],
      )

    run = plgpu.kernel(
      with_names,
      out_type=out_leaves,
      **grid_of(**sizes),
      compiler_params=PARAMS,
      kernel_name=f"sparsek_{name}",
      **options,
    )
    results = unfused(run(*(unfused(x) if _is_array(x) else x for x in leaves)))
    return jax.tree.unflatten(out_structure, results)

  return run


def block_of(rows: int) -> jax.Array:
  """Returns which block of LANES lanes of its row a program has, in a `kernel` without `extra`."""
  return lax.div(axis_index("program"), jnp.int32(rows))


def contents(*refs: Ref) -> list[jax.Array]:
  """Returns what is in the references after the kernels that wrote them."""
  return unfused([ref[...] for ref in refs])


def unfused(arrays: Any) -> Any:
  """Returns the same arrays, which XLA must not fuse with their kernel.

  In the body of a scan XLA fuses a kernel with the slices that the kernel reads, or with the update
  of the loop's stacked results by what it returns (dynamic slice fusion). Such a fusion forgets
  that the kernel writes in place: what it wrote is lost, and references with equal initial contents
  become one (JAX 0.11.2).
  """
  return lax.optimization_barrier(arrays)


def _is_array(x: Any) -> bool:
  """Returns whether x is an array, not a reference."""
  return isinstance(jax.typeof(x), jax.core.ShapedArray)


def _memref_index(i: ir.Value) -> ir.Value:
  return arith.index_cast(ir.IndexType.get(), i)


def _atomic(operation: Any, address: ir.Value, value: ir.Value) -> None:
  order = llvm.AtomicOrdering.monotonic
  llvm.atomicrmw(operation, address, value, order, syncscope="device")
