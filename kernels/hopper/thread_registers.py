"""Values in the registers of single threads, and how instructions are inlined into Mosaic kernels.

A program has one or more warpgroups of LANES threads, called lanes. An array [LANES] has one
element in a register of each lane. Pallas itself computes on such arrays; what it lacks is below.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from sparsek.kernels.hopper.common import Ref

LANES = 128  # threads of a warpgroup
LAYOUT = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)


def per_lane(x: Any) -> jax.Array:
  """Returns x with one element a lane, also where x is a single number."""
  return plgpu.layout_cast(jnp.broadcast_to(x, (LANES,)), LAYOUT)


def lane_index() -> jax.Array:
  """Returns 0 to LANES - 1."""
  return plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=LAYOUT)


def array_of(dtype: Any) -> plgpu.ShapeDtypeStruct:
  """Returns the type of an array with one element a lane."""
  return plgpu.ShapeDtypeStruct((LANES,), dtype, layout=LAYOUT)


def shuffle_xor(x: jax.Array, distance: int) -> jax.Array:
  """Returns the x of the lane whose number is this one's XOR distance; float32 or int32."""

  @plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=array_of(x.dtype))
  def shuffle(_, x):
    signed = None if jnp.issubdtype(dtype, jnp.floating) else True
    return x.foreach(
      lambda *_: utils.shfl_bfly(element(x), distance), create_array=True, is_signed=signed
    )

  dtype = x.dtype
  return shuffle(per_lane(x))


def shuffle_from(x: jax.Array, lane: Any) -> jax.Array:
  """Returns the float32 x of the lane of that number in the warp."""

  @plgpu.inline_mgpu(arg_types=(LAYOUT, LAYOUT), return_type=array_of(jnp.float32))
  def shuffle(_, x, lane):
    number: Any = llvm.inline_asm(
      element(x).type,
      [element(x), element(lane)],
      "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;",
      "=f,f,r",
      has_side_effects=True,
    )
    return x.foreach(lambda *_: number, create_array=True)

  return shuffle(per_lane(x), per_lane(lane))


def warp_prefix_sums(x: jax.Array) -> jax.Array:
  """Returns the sum of x, int32 or float32, of this lane and of the earlier ones of its warp."""
  dtype = x.dtype
  is_float = jnp.issubdtype(dtype, jnp.floating)
  kind, register = ("f32", "f") if is_float else ("s32", "r")

  @plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=array_of(dtype))
  def add(_, x):
    steps = "".join(
      f" shfl.sync.up.b32 other|there, $0, {distance}, 0, 0xffffffff;"
      f" @there add.{kind} $0, $0, other;"
      for distance in (1, 2, 4, 8, 16)
    )
    total = llvm.inline_asm(
      element(x).type,
      [element(x)],
      f"{{ .reg .pred there; .reg .{kind} other; mov.b32 $0, $1;{steps} }}",
      f"=&{register},{register}",
      has_side_effects=True,
    )
    signed = None if is_float else True
    return x.foreach(lambda *_: total, create_array=True, is_signed=signed)

  return add(per_lane(x))


def warp_value(x: jax.Array, lane: int) -> jax.Array:
  """Returns the x, int32 or float32, of the lane of that number in the warp."""
  dtype = x.dtype
  is_float = jnp.issubdtype(dtype, jnp.floating)

  @plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=array_of(dtype))
  def shuffle(_, x):
    register = "f" if is_float else "r"
    word: Any = llvm.inline_asm(
      element(x).type,
      [element(x)],
      f"shfl.sync.idx.b32 $0, $1, {lane}, 31, 0xffffffff;",
      f"={register},{register}",
      has_side_effects=True,
    )
    return x.foreach(lambda *_: word, create_array=True, is_signed=None if is_float else True)

  return shuffle(per_lane(x))


def warp_count(flag: jax.Array) -> jax.Array:
  """Returns in how many lanes of the warp the flag is true, int32."""

  @plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=array_of(jnp.int32))
  def count(_, flag):
    word: Any = llvm.inline_asm(
      ir.IntegerType.get_signless(32),
      [element(flag)],
      "{ .reg .pred own; .reg .b32 all; setp.ne.s32 own, $1, 0;"
      " vote.sync.ballot.b32 all, own, 0xffffffff; popc.b32 $0, all; }",
      "=r,r",
      has_side_effects=True,
    )
    return flag.foreach(lambda *_: word, create_array=True, is_signed=True)

  return count(per_lane(flag.astype(jnp.int32)))


def warp_any(flag: jax.Array) -> jax.Array:
  """Returns a scalar: whether the flag of any lane of the warp is true. A warp may branch by it
  where other warps need not follow.
  """
  scalar = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(()))

  @plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=scalar)
  def vote(_, flag):
    word: Any = llvm.inline_asm(
      ir.IntegerType.get_signless(32),
      [element(flag)],
      "{ .reg .pred own, any; setp.ne.s32 own, $1, 0; vote.sync.any.pred any, own, 0xffffffff;"
      " selp.s32 $0, 1, 0, any; }",
      "=r,r",
      has_side_effects=True,
    )
    return FragmentedArray.splat(word, (), is_signed=True)

  return vote(per_lane(flag.astype(jnp.int32))) > 0


def multiply_add(
  sums: Sequence[jax.Array], a: Sequence[jax.Array], b: Sequence[jax.Array], dtype: Any
) -> tuple[jax.Array, ...]:
  """Returns sums + A B of each warp, by tensor cores (mma.m16n8k16).

  A [16, 16] and B [16, 8] are of a 16-bit `dtype`, two neighbours along the summed axis (a pair) in
  an int32; the sums [16, 8] are float32. Lane 4 r + c of a warp holds

    of A      row r: pair c; row r + 8: pair c; row r: pair c + 4; row r + 8: pair c + 4
    of B      column r: pair c; column r: pair c + 4
    of sums   (r, 2 c); (r, 2 c + 1); (r + 8, 2 c); (r + 8, 2 c + 1)
  """

  @plgpu.inline_mgpu(arg_types=(LAYOUT,) * 10, return_type=(array_of(jnp.float32),) * 4)
  def multiply(_, *operands):
    f32, kind = ir.F32Type.get(), "bf16" if dtype == jnp.bfloat16 else "f16"
    instruction = (
      f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
      "{$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, {$4, $5, $6, $7};"
    )
    result = llvm.inline_asm(
      llvm.StructType.get_literal([f32] * 4),
      [element(x) for x in operands],
      instruction,
      ",".join(["=f"] * 4 + ["f"] * 4 + ["r"] * 6),
    )
    return split_struct(operands[0], result, f32, 4)

  return tuple(multiply(*sums, *a, *b))


def widen(words: Sequence[jax.Array], dtype: Any) -> list[jax.Array]:
  """Returns the numbers of a 16-bit `dtype` that int32 words hold, two each, as float32."""

  @plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=(array_of(jnp.float32),) * 2)
  def convert(_, word):
    pair = arith.extf(
      ir.VectorType.get((2,), ir.F32Type.get()),
      llvm.bitcast(ir.VectorType.get((2,), float_type(dtype)), element(word)),
    )
    return tuple(
      word.foreach(lambda *_, c=c: extract(pair, c), create_array=True) for c in range(2)
    )

  return [number for word in words for number in convert(word)]


def narrow(numbers: Sequence[jax.Array], dtype: Any) -> list[jax.Array]:
  """Returns numbers, rounded to a 16-bit `dtype`, two in an int32: the reverse of `widen`."""

  @plgpu.inline_mgpu(arg_types=(LAYOUT, LAYOUT), return_type=array_of(jnp.int32))
  def convert(_, a, b):
    pair = vector.from_elements(ir.VectorType.get((2,), ir.F32Type.get()), [element(a), element(b)])
    word = llvm.bitcast(
      ir.IntegerType.get_signless(32),
      arith.truncf(ir.VectorType.get((2,), float_type(dtype)), pair),
    )
    return a.foreach(lambda *_: word, create_array=True, is_signed=True)

  return [convert(*numbers[i : i + 2]) for i in range(0, len(numbers), 2)]


# The rest is for functions that inline instructions; x is a FragmentedArray of one register there.


def element(x: Any) -> ir.Value:
  """Returns the lane's element of x."""
  register = x.registers.flat[0]
  return extract(register, 0) if isinstance(register.type, ir.VectorType) else register


def extract(x: ir.Value, i: int) -> ir.Value:
  """Returns the i-th element of a vector."""
  return vector.extract(x, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def split_struct(like: Any, struct: Any, kind: ir.Type, count: int) -> tuple:
  """Returns the `count` numbers of type `kind` in a struct, as arrays with the layout of `like`."""
  signed = None if isinstance(kind, ir.F32Type) else True
  return tuple(
    like.foreach(
      lambda *_, c=c: llvm.extractvalue(kind, struct, [c]), create_array=True, is_signed=signed
    )
    for c in range(count)
  )


def float_type(dtype: Any) -> ir.Type:
  """Returns the type of the numbers of a 16-bit `dtype`."""
  return ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get()


def four_words() -> ir.Type:
  """Returns the type of 16 bytes, four int32."""
  return ir.VectorType.get((4,), ir.IntegerType.get_signless(32))


def constant(kind: ir.Type, value: int) -> ir.Value:
  """Returns a constant of an integer type."""
  return arith.constant(kind, value)  # type: ignore[call-arg, arg-type]  # the hints lack it


@contextlib.contextmanager
def only_where(condition: ir.Value) -> Iterator[None]:
  """Lets only lanes whose condition is true execute the body."""
  branch: Any = scf.IfOp(condition)  # type: ignore[call-arg, arg-type]  # the hints lack it
  with ir.InsertionPoint(branch.then_block):
    yield
    scf.yield_([])


def ptx(instructions: str, constraints: str, *arguments: ir.Value) -> None:
  """Inlines instructions that read or write memory and return nothing."""
  constraints = ",".join(filter(None, [constraints, "~{memory}"]))
  nothing = ir.Type.parse("!llvm.void")
  llvm.inline_asm(nothing, arguments, instructions, constraints, has_side_effects=True)


def address_of(ref: Ref, index: ir.Value, offset: ir.Value, stride: int) -> ir.Value:
  """Returns the address of the element index * stride + offset behind the beginning of `ref`,
  computed in 64 bits.
  """
  i64 = ir.IntegerType.get_signless(64)
  wide_index = arith.extsi(i64, index)
  position = arith.addi(arith.muli(wide_index, constant(i64, stride)), arith.extsi(i64, offset))
  return utils.getelementptr(
    utils.memref_ptr(ref), [position], ir.MemRefType(ref.type).element_type
  )


def global_address(ref: Ref, index: ir.Value, offset: ir.Value, stride: int) -> ir.Value:
  """Returns the same address as a number, as inlined instructions take it."""
  return llvm.ptrtoint(ir.IntegerType.get_signless(64), address_of(ref, index, offset, stride))


def shared_address(ref: Ref, index: ir.Value, stride: int) -> ir.Value:
  """Returns the address of the element index * stride behind the beginning of shared memory `ref`,
  as a number, as inlined instructions take it.
  """
  zero = constant(index.type, 0)
  return llvm.ptrtoint(ir.IntegerType.get_signless(32), address_of(ref, index, zero, stride))
