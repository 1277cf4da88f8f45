"""Matrices in shared memory and in the registers of four warps, for GPUs since Ampere: copies by
cp.async and products by mma (warp_products.py), inlined into Mosaic kernels of one warpgroup.

The interpreter has no counterpart for these instructions; where it runs a kernel, matrices are
plain arrays.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT, FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from sparsek.kernels.ampere.warp_products import (
  BLOCK,
  CHUNK,
  LANES,
  add_product,
  load_left,
  own_row,
  pair_addresses,
  product,
  row_part,
)
from sparsek.kernels.hopper.common import MATRIX, ROW, Ref, Registers
from sparsek.kernels.hopper.thread_registers import (
  constant,
  extract,
  float_type,
  global_address,
  only_where,
  ptx,
)

SCALAR = plgpu.Layout.WG_SPLAT(())
REF = plgpu.RefType()
Index = Sequence[Any]


class Matrices(Registers):
  """Operations on matrices in shared memory and registers, also for the interpreter."""

  def copy_rows(self, ref: Ref, index: Index, first: Any, count: int, into: Ref) -> None:
    """Starts to copy `count` rows of global memory to shared memory.

    Args:
      ref: [..., D], 16 bits a number.
      index: indices on the leading axes, with None for the axis of the rows.
      first: index of the first row.
      count: number of rows.
      into: [count, D].
    """
    if self.interpreted:
      into[...] = ref[_slices(index, first, count)]
      return
    row, offset, stride = _place(ref, index, first)
    dim = ref.shape[-1]

    @plgpu.inline_mgpu(arg_types=(REF, REF, SCALAR, SCALAR))
    def copy(_, ref, into, row, offset):
      source, target = _lane_part(ref, into, row, offset, stride, dim)
      for i in range(0, count, LANES * CHUNK // dim):
        ptx(
          f"cp.async.cg.shared.global [$0 + {i * dim * 2}], [$1 + {i * stride * 2}], 16;",
          "r,l",
          target,
          source,
        )

    copy(ref, into, row, offset)

  def copy_vector(self, ref: Ref, index: Index, first: Any, into: Ref) -> None:
    """Starts to copy a vector of global memory to shared memory.

    Args:
      ref: [..., length], 32 bits a number.
      index: indices on the leading axes.
      first: index of the first number.
      into: [count], of at most LANES numbers.
    """
    count = into.shape[0]
    if self.interpreted:
      into[...] = ref[_slices((*index, None), first, count)]
      return
    row, stride = _number_of(index, ref.shape), ref.shape[-1]

    @plgpu.inline_mgpu(arg_types=(REF, REF, SCALAR, SCALAR))
    def copy(_, ref, into, row, first):
      lane = _lane()
      with only_where(arith.cmpi(arith.CmpIPredicate.ult, lane.value, (lane * 0 + count).value)):
        source = global_address(ref, _scalar(row).value, (_scalar(first) + lane).value, stride)
        target = _shared(into) + lane * 4
        ptx("cp.async.ca.shared.global [$0], [$1], 4;", "r,l", target.value, source)

    copy(ref, into, row, jnp.int32(first))

  def commit(self) -> None:
    """Makes the copies since the last commit one group."""
    if not self.interpreted:
      _instruction("cp.async.commit_group;")

  def wait(self, groups: int) -> None:
    """Waits until at most so many groups of copies of each lane are on their way, and then until
    all lanes have come here: what was copied can be read, and what was read before overwritten.
    """
    if not self.interpreted:
      _instruction(f"cp.async.wait_group {groups};")
    self.sync()

  def sync(self) -> None:
    """Waits until all lanes have come here."""
    if not self.interpreted:
      _instruction("bar.sync 0;")

  def load(self, ref: Ref) -> jax.Array:
    """Loads a matrix [64, D] from shared memory."""
    if self.interpreted:
      return ref[...]
    shape, dtype = ref.shape, ref.dtype

    @plgpu.inline_mgpu(arg_types=(REF,), return_type=_type(shape, dtype))
    def load(_, ref):
      left = load_left(_Warp(dtype), _shared(ref), shape[1])
      pair = ir.VectorType.get((2,), float_type(dtype))
      words = [word for c in range(shape[1] // 16) for word in left(c)]
      return _matrix([llvm.bitcast(pair, word) for word in words], shape)

    return load(ref)

  def index(self, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Returns the row (axis 0) or column (axis 1) numbers of a matrix."""
    if self.interpreted:
      return super().index(shape, axis)

    @plgpu.inline_mgpu(return_type=_type(shape, jnp.int32))
    def make(_):
      lane = _lane()
      begin = own_row(lane) if axis == 0 else (lane & 3) * 2
      pair = ir.VectorType.get((2,), begin.value.type)
      words = []
      for column in range(0, shape[1], 8):
        for row in (0, 8):
          steps = (row, row) if axis == 0 else (column, column + 1)
          words.append(vector.from_elements(pair, [(begin + step).value for step in steps]))
      return _matrix(words, shape, is_signed=True)

    return make()

  def product(self, a: Any, b: Ref) -> jax.Array:
    """Returns a @ b.T [64, count] in float32, of a [64, D] in shared memory or registers and
    b [count, D] in shared memory.
    """
    if self.interpreted:
      return lax.dot_general(
        a[...], b[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
      )
    (count, dim), dtype = b.shape, b.dtype
    in_registers = isinstance(a, jax.Array)

    @plgpu.inline_mgpu(
      arg_types=(MATRIX if in_registers else REF, REF),
      return_type=_type((BLOCK, count), jnp.float32),
    )
    def multiply(_, a, b):
      warp = _Warp(dtype)
      zero = arith.constant(ir.F32Type.get(), 0.0)  # type: ignore[call-arg, arg-type]
      left = _words(a) if in_registers else load_left(warp, _shared(a), dim)
      return _sums_matrix(product(warp, [zero] * 4, left, _shared(b), count, dim))

    return multiply(a, b)

  def add_product(self, acc: jax.Array, a: jax.Array, b: Ref) -> jax.Array:
    """Returns acc + a @ b [64, D] in float32, of a [64, count] in registers and b [count, D] in
    shared memory.
    """
    if self.interpreted:
      return acc + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    (count, dim), dtype = b.shape, b.dtype

    @plgpu.inline_mgpu(
      arg_types=(MATRIX, MATRIX, REF), return_type=_type((BLOCK, dim), jnp.float32)
    )
    def multiply(_, acc, a, b):
      pairs = acc.registers.reshape(-1, 2)
      sums = [[extract(pair, i) for pair in row for i in range(2)] for row in pairs]
      return _sums_matrix(add_product(_Warp(dtype), sums, _words(a), _shared(b), count, dim))

    return multiply(acc, a, b)

  def store_rows(self, x: jax.Array, buffer: Ref, ref: Ref, index: Index, first: Any) -> None:
    """Stores a matrix [64, D] of 16 bits a number to global memory, through shared memory.

    No lane may read or write the buffer at the same time; it is free after the next `sync`.

    Args:
      x: matrix in registers.
      buffer: [64, D] shared memory.
      ref, index, first: as in `copy_rows`.
    """
    if self.interpreted:
      ref[_slices(index, first, x.shape[0])] = x
      return
    row, offset, stride = _place(ref, index, first)
    dim = ref.shape[-1]

    @plgpu.inline_mgpu(arg_types=(MATRIX, REF))
    def put(_, x, buffer):
      addresses = pair_addresses(_lane(), _shared(buffer), dim)
      words = [llvm.bitcast(ir.IntegerType.get_signless(32), word) for word in x.registers.flat]
      for i, word in enumerate(words):
        second_row = i % 2 * 8 * 2 * dim
        ptx(f"st.shared.b32 [$0 + {second_row}], $1;", "r,r", addresses[i // 2].value, word)

    @plgpu.inline_mgpu(arg_types=(REF, REF, SCALAR, SCALAR))
    def send(_, ref, buffer, row, offset):
      target, source = _lane_part(ref, buffer, row, offset, stride, dim)
      for i in range(0, BLOCK, LANES * CHUNK // dim):
        ptx(
          "{ .reg .b32 a, b, c, d;"
          f" ld.shared.v4.b32 {{a, b, c, d}}, [$0 + {i * dim * 2}];"
          f" st.global.v4.b32 [$1 + {i * stride * 2}], {{a, b, c, d}}; }}",
          "r,l",
          source,
          target,
        )

    put(x, buffer)
    self.sync()
    send(ref, buffer, row, offset)

  def store_vector(self, x: jax.Array, ref: Ref, index: Index, first: Any) -> None:
    """Stores a float32 vector [64], one number a row of a matrix, to global memory.

    Args:
      x: vector in registers.
      ref, index, first: as in `copy_vector`.
    """
    if self.interpreted:
      ref[_slices((*index, None), first, x.shape[0])] = x
      return
    row, stride = _number_of(index, ref.shape), ref.shape[-1]

    @plgpu.inline_mgpu(arg_types=(ROW, REF, SCALAR, SCALAR))
    def put(_, x, ref, row, first):
      lane = _lane()
      begin = _scalar(first) + own_row(lane)
      address = global_address(ref, _scalar(row).value, begin.value, stride)
      numbers = [_number(register) for register in x.registers.flat]
      is_first = arith.cmpi(arith.CmpIPredicate.eq, (lane & 3).value, (lane * 0).value)
      with only_where(is_first):
        for i, number in enumerate(numbers):
          ptx(f"st.global.f32 [$0 + {i * 8 * 4}], $1;", "l,f", address, number)

    put(x, ref, row, jnp.int32(first))


def _type(shape: tuple[int, ...], dtype: Any) -> plgpu.ShapeDtypeStruct:
  return plgpu.ShapeDtypeStruct(shape, dtype, layout=MATRIX)


def _slices(index: Index, first: Any, count: int) -> tuple:
  return tuple(pl.ds(first, count) if i is None else i for i in index)


def _number_of(index: Index, shape: Index) -> jax.Array:
  """Returns the number of a place with that index, where the index on the last axis changes
  fastest; axes behind those of the index do not count.
  """
  number: Any = 0
  for size, i in zip(shape, index):
    number = number * size + i
  return jnp.int32(number)


def _place(ref: Ref, index: Index, first: Any) -> tuple[jax.Array, jax.Array, int]:
  """Returns where rows begin: (row, offset, stride), scalars and a number of elements.

  The first element is row * stride + offset elements behind the beginning of `ref`; `stride` is
  also the distance of rows. So `row` fits 32 bits where a number of elements would not.
  """
  axis = list(index).index(None)
  inner = ref.shape[axis + 1 :]
  row = _number_of((*index[:axis], first), ref.shape)
  offset = _number_of(index[axis + 1 :], inner) * inner[-1]
  return row, offset, math.prod(inner)


def _instruction(text: str) -> None:
  @plgpu.inline_mgpu()
  def run(_):
    ptx(text, "")

  run()


# The rest is for functions that inline instructions.


class _Word:
  """An int32 in a register of each lane, with the operators of integers."""

  def __init__(self, value: ir.Value) -> None:
    self.value = value

  def _with(self, operation: Any, other: Any) -> "_Word":
    other = constant(self.value.type, other) if isinstance(other, int) else other.value
    return _Word(operation(self.value, other))

  def __add__(self, other: Any) -> "_Word":
    return self._with(arith.addi, other)

  def __mul__(self, other: Any) -> "_Word":
    return self._with(arith.muli, other)

  def __and__(self, other: Any) -> "_Word":
    return self._with(arith.andi, other)

  def __xor__(self, other: Any) -> "_Word":
    return self._with(arith.xori, other)

  def __rshift__(self, other: Any) -> "_Word":
    return self._with(arith.shrui, other)


class _Warp:
  """The instructions of the GPU, see warp_products.Machine."""

  def __init__(self, dtype: Any) -> None:
    self.dtype, self.lane = dtype, _lane()

  def load_blocks(self, address: _Word, offset: int, transposed: bool) -> list:
    """Loads by ldmatrix."""
    i32 = ir.IntegerType.get_signless(32)
    # The offset is part of the instruction: as a sum before the loop it would take a register.
    loaded: Any = llvm.inline_asm(
      llvm.StructType.get_literal([i32] * 4),
      [address.value],
      f"ldmatrix.sync.aligned.m8n8.x4{'.trans' if transposed else ''}.shared.b16 "
      f"{{$0, $1, $2, $3}}, [$4 + {offset}];",
      "=r,=r,=r,=r,r",
      has_side_effects=True,  # this keeps it behind the barrier
    )
    return [llvm.extractvalue(i32, loaded, [i]) for i in range(4)]

  def multiply_add(self, sums: list, a: list, b: list) -> list:
    """Multiplies by mma."""
    f32, kind = ir.F32Type.get(), "bf16" if self.dtype == jnp.bfloat16 else "f16"
    result: Any = llvm.inline_asm(
      llvm.StructType.get_literal([f32] * 4),
      [*sums, *a, *b],
      f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
      "{$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, {$4, $5, $6, $7};",
      ",".join(["=f"] * 4 + ["f"] * 4 + ["r"] * 6),
      has_side_effects=False,
    )
    return [llvm.extractvalue(f32, result, [i]) for i in range(4)]


def _lane() -> _Word:
  """Returns the number of the lane, in a way that the compiler does not see through: what is
  computed from it before a loop would take registers.
  """
  i32 = ir.IntegerType.get_signless(32)
  lane: Any = llvm.inline_asm(i32, [], "mov.u32 $0, %tid.x;", "=r", has_side_effects=True)
  return _Word(lane)


def _scalar(x: Any) -> _Word:
  return _Word(x.registers.flat[0])


def _number(register: ir.Value) -> ir.Value:
  return extract(register, 0) if isinstance(register.type, ir.VectorType) else register


def _shared(ref: Ref) -> _Word:
  """Returns the address where shared memory `ref` begins."""
  return _Word(llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref)))


def _lane_part(
  ref: Ref, matrix: Ref, row: Any, offset: Any, stride: int, dim: int
) -> tuple[ir.Value, ir.Value]:
  """Returns the addresses, in global and in shared memory, of the first 16 bytes that a lane
  copies of a matrix (see `row_part`).
  """
  own, chunk, byte = row_part(_lane(), dim)
  begin, column = _scalar(row) + own, _scalar(offset) + chunk * CHUNK
  return global_address(ref, begin.value, column.value, stride), (_shared(matrix) + byte).value


def _words(a: FragmentedArray) -> Any:
  """Returns the left operand of a matrix in registers."""
  words = [llvm.bitcast(ir.IntegerType.get_signless(32), word) for word in a.registers.flat]
  return lambda c: words[4 * c : 4 * c + 4]


def _sums_matrix(sums: list) -> FragmentedArray:
  """Returns the matrix of sums, by blocks of 8 columns."""
  pair = ir.VectorType.get((2,), ir.F32Type.get())
  words = [vector.from_elements(pair, block[i : i + 2]) for block in sums for i in (0, 2)]
  return _matrix(words, (BLOCK, 8 * len(sums)))


def _matrix(words: list, shape: tuple[int, ...], is_signed: bool | None = None) -> FragmentedArray:
  registers = np.asarray(words, dtype=object).reshape(WGMMA_LAYOUT.registers_shape(shape))
  return FragmentedArray(_registers=registers, _layout=WGMMA_LAYOUT, _is_signed=is_signed)
