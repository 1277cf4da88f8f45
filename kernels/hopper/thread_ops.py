"""Mosaic GPU kernels of single threads: each of a program's 128 lanes reads and writes where it
likes.

Pallas itself moves tiles only; the loads and stores below are single instructions inlined into its
kernels. The interpreter has no counterpart for them.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, scf, vector

from sparsek.kernels.hopper.common import grid_of, place, place_in

LANES = 128  # threads of a program
LAYOUT = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
# The other semantics infer layouts, which takes ten times as long and finds the one there is. With
# these, `where` of integers forgets the sign if what it chooses first is one number for all lanes
# (see compile_test.py): write booleans `.astype(int32)` and keep an array first.
PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def gather(ref, index):
  """ref[index] in every lane; `ref` has one axis."""

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), LAYOUT),
    return_type=plgpu.ShapeDtypeStruct((LANES,), ref.dtype, layout=LAYOUT),
  )
  def load(_, ref, index):
    signed = None if jnp.issubdtype(dtype, jnp.floating) else True
    return index.foreach(
      lambda i, _: memref.load(ref, [_index(i)]), create_array=True, is_signed=signed
    )

  dtype = ref.dtype
  return load(ref, _lanes(index))


def gather_row(ref, index):
  """The four int32 of ref[index] in every lane, tuple of arrays."""
  return gather_bytes(ref, index, 0, 4)


def gather_bytes(ref, index, offset, stride):
  """16 bytes in every lane, as four int32, from `offset` + index * stride elements behind where
  `ref` begins; a multiple of 16 bytes.
  """

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), LAYOUT, LAYOUT),
    return_type=(plgpu.ShapeDtypeStruct((LANES,), jnp.int32, layout=LAYOUT),) * 4,
  )
  def load(_, ref, index, offset):
    row = llvm.load(
      _bytes(), _address(ref, _element(index), _element(offset), stride), alignment=16
    )
    part = lambda c: vector.extract(
      row, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([c])
    )
    return tuple(
      index.foreach(lambda *_, c=c: part(c), create_array=True, is_signed=True) for c in range(4)
    )

  return tuple(load(ref, _lanes(index), _lanes(offset)))


def ask_bytes(ref, index, offset, stride, once=False, fresh=False):
  """As `gather_bytes`, of what the kernel does not write, and in the order in which it is asked
  for; `once`: nobody wants the same again; `fresh`: the kernel has written it, in another program,
  so it must not come from the first cache.
  """

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), LAYOUT, LAYOUT),
    return_type=(plgpu.ShapeDtypeStruct((LANES,), jnp.int32, layout=LAYOUT),) * 4,
  )
  def load(_, ref, index, offset):
    i32, hints = (
      ir.IntegerType.get_signless(32),
      ".cg" if fresh else ".nc.L1::no_allocate.L2::128B" if once else ".nc",
    )
    address = llvm.ptrtoint(
      ir.IntegerType.get_signless(64), _address(ref, _element(index), _element(offset), stride)
    )
    # which is what keeps the order
    row = llvm.inline_asm(
      llvm.StructType.get_literal([i32] * 4),
      [address],
      f"ld.global{hints}.v4.b32 {{$0, $1, $2, $3}}, [$4];",
      "=r,=r,=r,=r,l",
      has_side_effects=True,
    )
    return tuple(
      index.foreach(
        lambda *_, c=c: llvm.extractvalue(i32, row, [c]), create_array=True, is_signed=True
      )
      for c in range(4)
    )

  return tuple(load(ref, _lanes(index), _lanes(offset)))


def ask_number(ref, index):
  """ref[index] in every lane, of a 16-bit type; in the order in which it is asked for, and fresh,
  see `ask_bytes`.
  """

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), LAYOUT),
    return_type=plgpu.ShapeDtypeStruct((LANES,), ref.dtype, layout=LAYOUT),
  )
  def load(_, ref, index):
    i = _element(index)
    address = llvm.ptrtoint(
      ir.IntegerType.get_signless(64), _address(ref, i, arith.constant(i.type, 0), 1)
    )
    word = llvm.inline_asm(
      ir.IntegerType.get_signless(16),
      [address],
      "ld.global.cg.b16 $0, [$1];",
      "=h,l",
      has_side_effects=True,
    )
    return index.foreach(lambda *_: llvm.bitcast(_float(dtype), word), create_array=True)

  dtype = ref.dtype
  return load(ref, _lanes(index))


def barriers(ref, where, arrivals):
  """Makes barriers in shared memory, 64 bits each, that open after so many arrivals, and the bytes
  that these announce; a lane whose `where` is true makes that of its number.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT, LAYOUT))
  def make(_, ref, lane, where):
    with ir.InsertionPoint(scf.IfOp(_element(where)).then_block):
      _ptx(f"mbarrier.init.shared::cta.b64 [$0], {arrivals};", "r", _shared(ref, _element(lane), 2))
      scf.yield_([])
    _ptx("fence.mbarrier_init.release.cluster;", "")

  make(ref, _lanes(numbers()), _lanes(where))


def copy_bytes(ref, row, offset, size, into, place, barriers, number, where):
  """Copies `size` bytes, from `offset` elements behind the beginning of a row of a matrix, to
  into[place...] in shared memory, in every lane whose `where` is true; nobody waits, but the
  barrier of that number counts them. All in multiples of 16 bytes.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3 + (LAYOUT,) * 5)
  def copy(_, ref, into, barriers, row, offset, place, number, where):
    with ir.InsertionPoint(scf.IfOp(_element(where)).then_block):
      source = llvm.ptrtoint(
        ir.IntegerType.get_signless(64), _address(ref, _element(row), _element(offset), width)
      )
      _ptx(
        (
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], "
          f"[$1], {size}, [$2];"
        ),
        "r,l,r",
        _shared(into, _element(place), 1),
        source,
        _shared(barriers, _element(number), 2),
      )
      scf.yield_([])

  width = ref.shape[1]
  copy(ref, into, barriers, *map(_lanes, (row, offset, place, number, where)))


def announce(barriers, number, size, where):
  """Arrives at the barrier of that number, which then opens when `size` bytes have come to it; one
  lane's `where` must be true.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT, LAYOUT))
  def arrive(_, barriers, number, where):
    with ir.InsertionPoint(scf.IfOp(_element(where)).then_block):
      _ptx(
        f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {size};",
        "r",
        _shared(barriers, _element(number), 2),
      )
      scf.yield_([])

  arrive(barriers, _lanes(number), _lanes(where))


def arrive(barriers, number):
  """At the barrier of that number, every warp once, when all its lanes have come here: what they
  read before may be overwritten.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT, LAYOUT))
  def arrive(_, barriers, number, where):
    _ptx("bar.warp.sync 0xffffffff;", "")
    with ir.InsertionPoint(scf.IfOp(_element(where)).then_block):
      _ptx("mbarrier.arrive.shared::cta.b64 _, [$0];", "r", _shared(barriers, _element(number), 2))
      scf.yield_([])

  arrive(barriers, _lanes(number), _lanes((numbers() & 31) == 0))


def wait_for(barriers, number, parity):
  """Waits until the barrier of that number has opened once (parity 0), once more (1), ... ; at a
  new one does not wait for parity 1. What was copied can be read then.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT, LAYOUT))
  def wait(_, barriers, number, parity):
    _ptx(
      (
        "{ .reg .pred opened; again: mbarrier.try_wait.parity.shared::cta.b64 opened, "
        "[$0], $1; @!opened bra again; }"
      ),
      "r,r",
      _shared(barriers, _element(number), 2),
      _element(parity),
    )

  wait(barriers, _lanes(number), _lanes(parity))


def meet(ref, adds, before, where):
  """Adds a number to ref[0], int32 in global memory, in the one lane whose `where` is true, which
  then waits until its sign is another one than that of `before`, what was there before the first
  one came.

  What all programs add must come to 2^31, so that the last to come changes the sign, and the next
  time finds all as it was but for that. What programs wrote before they came can be read by those
  that go on.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT, LAYOUT, LAYOUT))
  def wait(_, ref, adds, before, where):
    with ir.InsertionPoint(scf.IfOp(_element(where)).then_block):
      adds = _element(adds)
      zero = arith.constant(adds.type, 0)
      address = llvm.ptrtoint(ir.IntegerType.get_signless(64), _address(ref, zero, zero, 1))
      _ptx(
        "{ .reg .pred same; .reg .b32 now; red.release.gpu.global.add.u32 [$0], $1; again: "
        "ld.acquire.gpu.global.b32 now, [$0]; "
        "xor.b32 now, now, $2; setp.ge.s32 same, now, 0; @same bra again; }",
        "l,r,r",
        address,
        adds,
        _element(before),
      )
      scf.yield_([])

  wait(ref, *map(_lanes, (adds, before, where)))


def multiply_add(sums, a, b, dtype):
  """sums + A B of each warp, A [16, 16] and B [16, 8] of a 16-bit `dtype`: its lane 4 r + c holds
  of A, in int32, the pairs (r, c), (r + 8, c), (r, c + 4) and (r + 8, c + 4), of B the pairs c and
  c + 4 in column r, and of the float32 sums [16, 8] what is at (r, 2 c), (r, 2 c + 1), (r + 8, 2
  c), (r + 8, 2 c + 1).
  """

  @plgpu.inline_mgpu(
    arg_types=(LAYOUT,) * 10,
    return_type=(plgpu.ShapeDtypeStruct((LANES,), jnp.float32, layout=LAYOUT),) * 4,
  )
  def multiply(_, *numbers):
    f32, kind = ir.F32Type.get(), "bf16" if dtype == jnp.bfloat16 else "f16"
    text = (
      f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, {{$8, "
      f"$9, $10, $11}}, {{$12, $13}}, {{$4, $5, $6, $7}};"
    )
    found = llvm.inline_asm(
      llvm.StructType.get_literal([f32] * 4),
      [_element(x) for x in numbers],
      text,
      ",".join(["=f"] * 4 + ["f"] * 4 + ["r"] * 6),
    )
    return tuple(
      numbers[0].foreach(lambda *_, c=c: llvm.extractvalue(f32, found, [c]), create_array=True)
      for c in range(4)
    )

  return tuple(multiply(*sums, *a, *b))


def from_lane(x, distance):
  """What lane (own number XOR distance) of the warp has as its x, float32 or int32."""

  @plgpu.inline_mgpu(
    arg_types=(LAYOUT,), return_type=plgpu.ShapeDtypeStruct((LANES,), x.dtype, layout=LAYOUT)
  )
  def shuffle(_, x):
    signed = None if jnp.issubdtype(dtype, jnp.floating) else True
    return x.foreach(
      lambda *_: utils.shfl_bfly(_element(x), distance), create_array=True, is_signed=signed
    )

  dtype = x.dtype
  return shuffle(_lanes(x))


def wait_for_all(warpgroups=None):
  """A barrier of all lanes of a program, or of its first warpgroups, that many; what they wrote to
  shared memory before can be read after it.
  """

  @plgpu.inline_mgpu()
  def wait(_):
    if warpgroups is None:
      gpu.barrier()
    else:
      _ptx(f"bar.sync 1, {warpgroups * LANES};", "")

  wait()


def scatter(ref, index, value, where, atomic=None):
  """ref[index] = value in the lanes where `where`, or atomically "add" it or take the "min" of
  both; `ref` has one axis.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT, LAYOUT, LAYOUT))
  def store(_, ref, index, value, where):
    index, value, where = map(_element, (index, value, where))
    with ir.InsertionPoint(scf.IfOp(where).then_block):
      if atomic:
        address = utils.getelementptr(
          utils.memref_ptr(ref), [arith.extsi(ir.IntegerType.get_signless(64), index)], value.type
        )
        llvm.atomicrmw(
          getattr(llvm.AtomicBinOp, atomic),
          address,
          value,
          llvm.AtomicOrdering.monotonic,
          syncscope="device",
        )
      else:
        memref.store(value, ref, [_index(index)])
      scf.yield_([])

  store(ref, _lanes(index), _lanes(jnp.asarray(value, ref.dtype)), _lanes(where))


def scatter_row(ref, index, values, where):
  """ref[index] = values, four int32, in the lanes where `where`."""
  scatter_bytes(ref, index, 0, 4, values, where)


def scatter_bytes(ref, index, offset, stride, values, where):
  """Stores 16 bytes, four int32, where `gather_bytes` would read them, in the lanes where
  `where`.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[LAYOUT] * 7))
  def store(_, ref, index, offset, where, *values):
    index, offset, where, *values = map(_element, (index, offset, where, *values))
    with ir.InsertionPoint(scf.IfOp(where).then_block):
      llvm.store(
        vector.from_elements(_bytes(), values), _address(ref, index, offset, stride), alignment=16
      )
      scf.yield_([])

  store(ref, _lanes(index), _lanes(offset), _lanes(where), *map(_lanes, values))


def add_row(ref, index, values, where):
  """Adds four int32 to ref[index], atomically, in the lanes where `where`: as two numbers of 64
  bits, see `sums_of`.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[LAYOUT] * 6))
  def add(_, ref, index, where, *values):
    index, where, *values = map(_element, (index, where, *values))
    i64 = ir.IntegerType.get_signless(64)
    with ir.InsertionPoint(scf.IfOp(where).then_block):
      for part in (0, 2):
        low, high = (arith.extsi(i64, x) for x in values[part : part + 2])
        value = arith.addi(arith.shli(high, arith.constant(i64, 32)), low)
        address = _address(ref, index, arith.constant(index.type, part), 4)
        llvm.atomicrmw(
          llvm.AtomicBinOp.add, address, value, llvm.AtomicOrdering.monotonic, syncscope="device"
        )
      scf.yield_([])

  add(ref, _lanes(index), _lanes(where), *map(_lanes, values))


def sums_of(row):
  """The four sums in a row that `add_row` added to; the first and the third must fit 32 bits, the
  others may wrap.
  """
  carried = lambda low, high: (low, high + (low < 0).astype(jnp.int32))
  return *carried(*row[:2]), *carried(*row[2:])


def widen(words, dtype):
  """The eight numbers in 16 bytes of a 16-bit `dtype`, float32."""

  @plgpu.inline_mgpu(
    arg_types=(LAYOUT,),
    return_type=(plgpu.ShapeDtypeStruct((LANES,), jnp.float32, layout=LAYOUT),) * 2,
  )
  def convert(_, word):
    pair = arith.extf(
      ir.VectorType.get((2,), ir.F32Type.get()),
      llvm.bitcast(ir.VectorType.get((2,), _float(dtype)), _element(word)),
    )
    part = lambda c: vector.extract(
      pair, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([c])
    )
    return tuple(word.foreach(lambda *_, c=c: part(c), create_array=True) for c in range(2))

  return [number for word in words for number in convert(word)]


def narrow(numbers, dtype):
  """The reverse of `widen`, rounding."""

  @plgpu.inline_mgpu(
    arg_types=(LAYOUT, LAYOUT),
    return_type=plgpu.ShapeDtypeStruct((LANES,), jnp.int32, layout=LAYOUT),
  )
  def convert(_, a, b):
    pair = vector.from_elements(
      ir.VectorType.get((2,), ir.F32Type.get()), [_element(a), _element(b)]
    )
    word = llvm.bitcast(
      ir.IntegerType.get_signless(32), arith.truncf(ir.VectorType.get((2,), _float(dtype)), pair)
    )
    return a.foreach(lambda *_: word, create_array=True, is_signed=True)

  return [convert(*numbers[i : i + 2]) for i in range(0, 8, 2)]


def _ptx(text, constraints, *arguments):
  """An instruction that reads or writes memory, and returns nothing."""
  clobbered = ",".join(filter(None, [constraints, "~{memory}"]))
  llvm.inline_asm(ir.Type.parse("!llvm.void"), arguments, text, clobbered, has_side_effects=True)


def _shared(ref, index, stride):
  """Of the element index * stride behind where a reference to shared memory begins: what its
  instructions take for an address.
  """
  return llvm.ptrtoint(
    ir.IntegerType.get_signless(32), _address(ref, index, arith.constant(index.type, 0), stride)
  )


def _element(x):
  register = x.registers.flat[0]
  if not isinstance(register.type, ir.VectorType):
    return register
  return vector.extract(
    register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0])
  )


def _index(i):
  return arith.index_cast(ir.IndexType.get(), i)


def _lanes(x):
  """x, one element a lane, also where all are equal."""
  return plgpu.layout_cast(jnp.broadcast_to(x, (LANES,)), LAYOUT)


def _float(dtype):
  return ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get()


def _bytes():
  return ir.VectorType.get((4,), ir.IntegerType.get_signless(32))


def _address(ref, index, offset, stride):
  """Of the element that many behind where `ref` begins, in 64 bits."""
  i64 = ir.IntegerType.get_signless(64)
  wide = lambda x: arith.extsi(i64, x)
  place = arith.addi(arith.muli(wide(index), arith.constant(i64, stride)), wide(offset))
  return utils.getelementptr(utils.memref_ptr(ref), [place], ir.MemRefType(ref.type).element_type)


def floats(ref, index, count, load=None):
  """The `count` float32 from ref[index] on, a multiple of four both, in every lane."""
  words = [word for i in range(0, count, 4) for word in (load or gather_bytes)(ref, index, i, 1)]
  return [lax.bitcast_convert_type(word, jnp.float32) for word in words]


def numbers():
  """0 to LANES - 1."""
  return plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=LAYOUT)


def reader(ref, *row):
  """index -> ref[row, index], or the four elements of that row."""
  if ref.ndim == len(row) + 1:
    return lambda index: gather(ref.at[row], jnp.clip(index, 0, ref.shape[-1] - 1))
  return lambda index: gather_row(ref.at[row], jnp.clip(index, 0, ref.shape[-2] - 1))


def kernel(body, rows, size, *extra, name, **options):
  """Runs body(row, extra, lanes, *refs) for every row, every number below `extra` and lanes up to
  `size` and beyond.
  """
  sizes = {"block": -(-size // LANES), "row": rows, "extra": extra[0] if extra else 1}

  def run(*refs):
    block, row, number = place_in(**sizes)
    body(row, number, block * LANES + numbers(), *refs)

  run = plgpu.kernel(
    run, **grid_of(**sizes), compiler_params=PARAMS, kernel_name=f"sparsek_{name}", **options
  )
  is_array = lambda x: isinstance(jax.typeof(x), jax.core.ShapedArray)  # not a ref
  return lambda *args: apart(run(*(apart(x) if is_array(x) else x for x in args)))


def block_of(rows):
  """Returns the number of a program's lanes, LANES together, in a `kernel` of so many rows."""
  return lax.div(place("program"), jnp.int32(rows))


def contents(*refs):
  """What is in them after the kernels that wrote them; a list."""
  return apart([ref[...] for ref in refs])


def apart(arrays):
  """The same arrays, which XLA must not fuse with their kernel.

  In the body of a scan it makes one of a kernel and the slices that the kernel reads, or the update
  of the loop's stacked results with what it returns, and forgets of that fusion that the kernel
  writes in place: what it wrote is lost, and refs that begin alike become one (JAX 0.11.2: dynamic
  slice fusion).
  """
  return lax.optimization_barrier(arrays)
