"""Matrices in shared memory and in the registers of four warps, for GPUs since Ampere: copies by
cp.async and products by mma.m16n8k16, inlined into Mosaic kernels of one warpgroup.

A matrix in shared memory has rows of 64 or 128 numbers of 16 bits. Its 16-byte chunks are permuted
within 128 bytes, so that eight rows of one column lie in different banks:

  byte of (row, column) = row * pitch + 16 * (column / 8 XOR row % 8)

A matrix in registers has the layout MATRIX: warp w holds rows 16 w to 16 w + 15 of 64, and lane
4 r + c of a warp, of each block of 8 columns, (r, 2 c), (r, 2 c + 1), (r + 8, 2 c),
(r + 8, 2 c + 1). This is the layout of sums of mma, and that of its left operand: what one product
gives is the next one's operand.

The interpreter has no counterpart for these instructions; where it runs a kernel, matrices are
plain arrays.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT, FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from sparsek.kernels.hopper.common import MATRIX, Ref, Registers
from sparsek.kernels.hopper.thread_registers import (
  LANES,
  constant,
  extract,
  float_type,
  four_words,
  global_address,
  only_where,
  ptx,
)

BLOCK = 64  # rows of a matrix in registers
PART = 32  # keys or queries of a tile whose gradients are computed at once, to save registers
CHUNK = 8  # numbers of 16 bytes
SCALAR = plgpu.Layout.WG_SPLAT(())


class Matrices(Registers):
  """Operations on matrices in shared memory and registers, also for the interpreter."""

  def copy_rows(self, ref: Ref, index: Any, first: Any, count: int, into: Ref) -> None:
    """Starts to copy `count` rows of global memory to shared memory.

    Args:
      ref: [..., D], 16 bits a number.
      index: indices on the leading axes, with None for the axis of the rows.
      first: index of the first row.
      count: number of rows.
      into: [count, D].
    """
    if self.interpreted:
      at = tuple(_slice(first, count) if i is None else i for i in index)
      into[...] = ref[at]
      return
    row, offset, stride = _place(ref, index, first)
    dim = ref.shape[-1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR, SCALAR))
    def copy(_, ref, into, row, offset):
      source, target = _lane_part(ref, into, row, offset, stride, dim)
      step = LANES * CHUNK // dim  # rows that the lanes copy at once
      for i in range(0, count, step):
        ptx(
          f"cp.async.cg.shared.global [$0 + {i * dim * 2}], [$1 + {i * stride * 2}], 16;",
          "r,l",
          target,
          source,
        )

    copy(ref, into, row, offset)

  def copy_vector(self, ref: Ref, index: Any, first: Any, into: Ref) -> None:
    """Starts to copy a vector of global memory to shared memory.

    Args:
      ref: [..., length], 32 bits a number.
      index: indices on the leading axes.
      first: index of the first number.
      into: [count], of at most LANES numbers.
    """
    count = into.shape[0]
    if self.interpreted:
      into[...] = ref[(*index, _slice(first, count))]
      return
    row, offset, stride = _place(ref, (*index, None), first)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR, SCALAR))
    def copy(_, ref, into, row, offset):
      lane, begin = _lane(), _shared(into)
      with only_where(arith.cmpi(arith.CmpIPredicate.ult, lane, constant(lane.type, count))):
        position = arith.addi(_scalar(offset), lane)
        source = global_address(ref, _scalar(row), position, stride)
        target = arith.addi(begin, arith.muli(lane, constant(lane.type, 4)))
        ptx("cp.async.ca.shared.global [$0], [$1], 4;", "r,l", target, source)

    copy(ref, into, row, offset)

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
      _instruction("bar.sync 0;")

  def sync(self) -> None:
    """Waits until all lanes have come here."""
    if not self.interpreted:
      _instruction("bar.sync 0;")

  def load(self, ref: Ref) -> jax.Array:
    """Loads a matrix [64, D] from shared memory."""
    if self.interpreted:
      return ref[...]
    shape, dtype = ref.shape, ref.dtype

    @plgpu.inline_mgpu(
      arg_types=(plgpu.RefType(),),
      return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=MATRIX),
    )
    def load(_, ref):
      a = _left_operand(ref, shape[1])
      words = np.concatenate([a(c) for c in range(shape[1] // 16)])
      pair = ir.VectorType.get((2,), float_type(dtype))
      return _matrix([llvm.bitcast(pair, word) for word in words], shape)

    return load(ref)

  def index(self, shape: tuple[int, int], axis: int) -> jax.Array:
    """Returns the row (axis 0) or column (axis 1) numbers of a matrix."""
    if self.interpreted:
      return super().index(shape, axis)

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=MATRIX))
    def make(_):
      lane = _lane()
      rows = _add(_times(_bits(lane, 5, 3), 16), _bits(lane, 2, 7))
      columns = _times(_bits(lane, 0, 3), 2)
      pair = ir.VectorType.get((2,), lane.type)
      words = []
      for block in range(shape[1] // 8):
        for half in range(2):
          numbers = [rows if axis == 0 else columns] * 2
          steps = [8 * half] * 2 if axis == 0 else [8 * block, 8 * block + 1]
          numbers = [_add(x, constant(lane.type, step)) for x, step in zip(numbers, steps)]
          words.append(vector.from_elements(pair, numbers))
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
    in_registers = not _is_ref(a)

    @plgpu.inline_mgpu(
      arg_types=(MATRIX if in_registers else plgpu.RefType(), plgpu.RefType()),
      return_type=plgpu.ShapeDtypeStruct((BLOCK, count), jnp.float32, layout=MATRIX),
    )
    def multiply(_, a, b):
      left = _words(a) if in_registers else _left_operand(a, dim)
      right = _Addresses(b, dim, rows_first=True)
      zero = constant_float(0.0)
      sums = [[zero] * 4 for _ in range(count // 8)]
      for c in range(dim // 16):
        operand = left(c)
        for j in range(count // 16):
          words = right.load(16 * j, c, transposed=False)
          for half in range(2):
            n = 2 * j + half
            sums[n] = _mma(sums[n], operand, words[2 * half : 2 * half + 2], dtype)
      return _sums_matrix(sums)

    return multiply(a, b)

  def add_product(self, acc: jax.Array, a: jax.Array, b: Ref) -> jax.Array:
    """Returns acc + a @ b [64, D] in float32, of a [64, count] in registers and b [count, D] in
    shared memory.
    """
    if self.interpreted:
      return acc + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    (count, dim), dtype = b.shape, b.dtype

    @plgpu.inline_mgpu(
      arg_types=(MATRIX, MATRIX, plgpu.RefType()),
      return_type=plgpu.ShapeDtypeStruct((BLOCK, dim), jnp.float32, layout=MATRIX),
    )
    def multiply(_, acc, a, b):
      left = _words(a)
      right = _Addresses(b, dim, rows_first=False)
      pairs = acc.registers.reshape(-1, 2)
      sums = [[extract(pair, i) for pair in row for i in range(2)] for row in pairs]
      for j in range(count // 16):
        operand = left(j)
        for c in range(dim // 16):
          words = right.load(16 * j, c, transposed=True)
          for half in range(2):
            n = 2 * c + half
            sums[n] = _mma(sums[n], operand, words[2 * half : 2 * half + 2], dtype)
      return _sums_matrix(sums)

    return multiply(acc, a, b)

  def store_rows(self, x: jax.Array, buffer: Ref, ref: Ref, index: Any, first: Any) -> None:
    """Stores a matrix [64, D] of 16 bits a number to global memory, through shared memory.

    No lane may read or write the buffer at the same time; it is free after the next `sync`.

    Args:
      x: matrix in registers.
      buffer: [64, D] shared memory.
      ref, index, first: as in `copy_rows`.
    """
    if self.interpreted:
      at = tuple(_slice(first, x.shape[0]) if i is None else i for i in index)
      ref[at] = x
      return
    row, offset, stride = _place(ref, index, first)
    dim = ref.shape[-1]

    @plgpu.inline_mgpu(arg_types=(MATRIX, plgpu.RefType()))
    def put(_, x, buffer):
      i32 = ir.IntegerType.get_signless(32)
      lane = _lane()
      r, c = _bits(lane, 2, 7), _bits(lane, 0, 3)
      own_row = _add(_times(_bits(lane, 5, 3), 16), r)
      begin = _add(_shared(buffer), _add(_times(own_row, dim * 2), _times(c, 4)))
      swizzle = _times(r, 16)
      words = [llvm.bitcast(i32, word) for word in x.registers.flat]
      for i in range(dim // 8):
        chunk = arith.xori(swizzle, constant(i32, 16 * (i % 8)))
        address = _add(begin, chunk)
        for half in range(2):
          ptx(
            f"st.shared.b32 [$0 + {(i // 8) * 128 + half * 8 * dim * 2}], $1;",
            "r,r",
            address,
            words[2 * i + half],
          )

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR, SCALAR))
    def send(_, ref, buffer, row, offset):
      target, source = _lane_part(ref, buffer, row, offset, stride, dim)
      step = LANES * CHUNK // dim
      for i in range(0, BLOCK, step):
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

  def store_vector(self, x: jax.Array, ref: Ref, index: Any, first: Any) -> None:
    """Stores a float32 vector [64], one number a row of a matrix, to global memory.

    Args:
      x: vector in registers, layout ROW.
      ref, index, first: as in `copy_vector`.
    """
    if self.interpreted:
      ref[(*index, _slice(first, x.shape[0]))] = x
      return
    row, offset, stride = _place(ref, (*index, None), first)

    @plgpu.inline_mgpu(arg_types=(MATRIX.reduce(1), plgpu.RefType(), SCALAR, SCALAR))
    def put(_, x, ref, row, offset):
      lane = _lane()
      own_row = _add(_times(_bits(lane, 5, 3), 16), _bits(lane, 2, 7))
      position = _add(_scalar(offset), own_row)
      address = global_address(ref, _scalar(row), position, stride)
      first_lane = arith.cmpi(
        arith.CmpIPredicate.eq, _bits(lane, 0, 3), constant(lane.type, 0)
      )
      numbers = [_number(word) for word in x.registers.flat]
      with only_where(first_lane):
        for half in range(2):
          ptx(f"st.global.f32 [$0 + {half * 32}], $1;", "l,f", address, numbers[half])

    put(x, ref, row, offset)


# The rest is for functions that inline instructions.


def _slice(first: Any, count: int) -> Any:
  from jax.experimental import pallas as pl

  return pl.ds(first, count)


def _is_ref(x: Any) -> bool:
  return not isinstance(x, jax.Array)


def _place(ref: Ref, index: Any, first: Any) -> tuple[Any, Any, int]:
  """Returns where the rows begin: (row, offset, stride), scalars and a number of elements.

  The first element is row * stride + offset elements behind the beginning of `ref`; `stride` is
  also the distance of rows. An index on the axis of the rows and those before it counts rows, so
  that it fits 32 bits where a number of elements would not.
  """
  axis = index.index(None)
  row: Any = 0
  for size, i in zip(ref.shape, index[: axis + 1]):
    row = row * size + (first if i is None else i)
  offset: Any = 0
  for size, i in zip(ref.shape[axis + 1 :], (*index[axis + 1 :], 0)):
    offset = offset * size + i
  stride = int(np.prod(ref.shape[axis + 1 :], dtype=np.int64))
  if axis + 1 == len(ref.shape):  # a vector
    row, offset, stride = row - first, first, 1
  return jnp.int32(row), jnp.int32(offset), stride


def _instruction(text: str) -> None:
  @plgpu.inline_mgpu()
  def run(_):
    ptx(text, "")

  run()


def _lane() -> ir.Value:
  """Returns the number of the lane, in a way that the compiler does not see through: what is
  computed from it before a loop would take registers.
  """
  i32 = ir.IntegerType.get_signless(32)
  lane: Any = llvm.inline_asm(i32, [], "mov.u32 $0, %tid.x;", "=r", has_side_effects=True)
  return lane


def _scalar(x: Any) -> ir.Value:
  return x.registers.flat[0]


def constant_float(value: float) -> ir.Value:
  """Returns a float32 constant."""
  return arith.constant(ir.F32Type.get(), value)  # type: ignore[call-arg, arg-type]


def _number(register: ir.Value) -> ir.Value:
  return extract(register, 0) if isinstance(register.type, ir.VectorType) else register


def _add(a: ir.Value, b: ir.Value) -> ir.Value:
  return arith.addi(a, b)


def _times(a: ir.Value, factor: int) -> ir.Value:
  return arith.muli(a, constant(a.type, factor))


def _bits(x: ir.Value, shift: int, mask: int) -> ir.Value:
  """Returns (x >> shift) & mask."""
  return arith.andi(arith.shrui(x, constant(x.type, shift)), constant(x.type, mask))


def _shared(ref: Ref) -> ir.Value:
  """Returns the address where shared memory `ref` begins, as a number."""
  return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def _lane_part(
  ref: Ref, matrix: Ref, row: Any, offset: Any, stride: int, dim: int
) -> tuple[ir.Value, ir.Value]:
  """Returns the addresses, in global and in shared memory, of the first 16 bytes that a lane copies
  of a matrix. It copies the same column of every (LANES * CHUNK / dim)-th row, a multiple of 8.
  """
  lane = _lane()
  per_row = dim // CHUNK
  shift = per_row.bit_length() - 1
  own_row, chunk = _bits(lane, shift, LANES // per_row - 1), _bits(lane, 0, per_row - 1)
  begin = _add(_scalar(row), own_row)
  column = _add(_scalar(offset), _times(chunk, CHUNK))
  swizzled = arith.xori(chunk, _bits(own_row, 0, 7))
  inside = _add(_times(own_row, dim * 2), _times(swizzled, 16))
  return global_address(ref, begin, column, stride), _add(_shared(matrix), inside)


class _Addresses:
  """The addresses that a lane gives to ldmatrix, which loads 16 rows of 16 columns as four matrices
  of 8 rows of 8 columns.

  Lane 8 m + r gives row r of the m-th of them: they are in the order of rows, or of columns, first.
  """

  def __init__(self, ref: Ref, dim: int, *, rows_first: bool) -> None:
    lane = _lane()
    low, high = _bits(lane, 3, 1), _bits(lane, 4, 1)
    second_rows, second_columns = (high, low) if rows_first else (low, high)
    r = _bits(lane, 0, 7)
    row = _add(_times(second_rows, 8), r)
    begin = _add(_shared(ref), _times(row, dim * 2))
    self.pitch = dim * 2
    self.columns = [
      _add(
        begin,
        _times(arith.xori(arith.xori(second_columns, r), constant(lane.type, 2 * q)), 16),
      )
      for q in range(4)
    ]

  def load(self, row: int, c: int, *, transposed: bool) -> list[ir.Value]:
    """Loads the block from that row on, of columns 16 c to 16 c + 15, as four words."""
    i32 = ir.IntegerType.get_signless(32)
    # The offset is part of the instruction: as a sum before the loop it would take a register.
    loaded = llvm.inline_asm(
      llvm.StructType.get_literal([i32] * 4),
      [self.columns[c % 4]],
      f"ldmatrix.sync.aligned.m8n8.x4{'.trans' if transposed else ''}.shared.b16 "
      f"{{$0, $1, $2, $3}}, [$4 + {row * self.pitch + c // 4 * 128}];",
      "=r,=r,=r,=r,r",
      has_side_effects=True,  # this keeps it behind the barrier
    )
    return [llvm.extractvalue(i32, loaded, [i]) for i in range(4)]


def _left_operand(ref: Ref, dim: int) -> Callable[[int], list[ir.Value]]:
  """Returns a function that loads the warp's 16 rows of the c-th 16 columns, the left operand."""
  addresses = _Addresses(ref, dim, rows_first=False)
  first = _times(_bits(_lane(), 5, 3), 16)
  addresses.columns = [_add(x, _times(first, dim * 2)) for x in addresses.columns]
  return lambda c: addresses.load(0, c, transposed=False)


def _words(a: FragmentedArray) -> Callable[[int], list[ir.Value]]:
  """Returns a function that gives the left operand of the c-th 16 columns of a matrix."""
  i32 = ir.IntegerType.get_signless(32)
  words = [llvm.bitcast(i32, word) for word in a.registers.flat]
  return lambda c: words[4 * c : 4 * c + 4]


def _mma(sums: list, a: list, b: list, dtype: Any) -> list:
  """Returns sums [16, 8] + a [16, 16] b [16, 8] of a warp."""
  f32, kind = ir.F32Type.get(), "bf16" if dtype == jnp.bfloat16 else "f16"
  result = llvm.inline_asm(
    llvm.StructType.get_literal([f32] * 4),
    [*sums, *a, *b],
    f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
    "{$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, {$4, $5, $6, $7};",
    ",".join(["=f"] * 4 + ["f"] * 4 + ["r"] * 6),
    has_side_effects=False,
  )
  return [llvm.extractvalue(f32, result, [i]) for i in range(4)]


def _sums_matrix(sums: list) -> FragmentedArray:
  """Returns the matrix of the sums of mma, by blocks of 8 columns."""
  pair = ir.VectorType.get((2,), ir.F32Type.get())
  words = [vector.from_elements(pair, block[i : i + 2]) for block in sums for i in (0, 2)]
  return _matrix(words, (BLOCK, 8 * len(sums)))


def _matrix(words: list, shape: tuple[int, int], is_signed: bool | None = None) -> FragmentedArray:
  registers = np.asarray(words, dtype=object).reshape(WGMMA_LAYOUT.registers_shape(shape))
  return FragmentedArray(_registers=registers, _layout=WGMMA_LAYOUT, _is_signed=is_signed)
