"""Synchronisation of single threads (lanes): mbarriers in shared memory, bulk copies (TMA) that
arrive at them, barriers of a program and of the whole grid.

An mbarrier takes 64 bits of a reference to int32, and is addressed by its number there. A circular
buffer takes two for each slot:

  loading lane                                       computing warps
  wait_barrier(empty, slot, ...)                     wait_barrier(full, slot, ...)
  arrive_expecting(full, slot, bytes)                read the slot
  copy_bytes(..., full, slot): opens `full` when     arrive(empty, slot): opens `empty` when the
    its bytes have come                                last warp has come
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import gpu

from sparsek.kernels.hopper.common import Ref
from sparsek.kernels.hopper.thread_registers import (
  LANES,
  LAYOUT,
  constant,
  element,
  global_address,
  lane_index,
  only_where,
  per_lane,
  ptx,
  shared_address,
)


def init_barriers(ref: Ref, where: jax.Array, arrivals: int) -> None:
  """Initialises mbarriers, each by the lane of its number, if the lane's `where` is true.

  A phase of a barrier ends (the barrier opens) after so many arrivals, once the bytes that these
  announced have come.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT, LAYOUT))
  def make(_, ref, lane, where):
    with only_where(element(where)):
      ptx(
        f"mbarrier.init.shared::cta.b64 [$0], {arrivals};",
        "r",
        shared_address(ref, element(lane), 2),
      )
    ptx("fence.mbarrier_init.release.cluster;", "")

  make(ref, per_lane(lane_index()), per_lane(where))


def copy_bytes(
  ref: Ref,
  row: Any,
  offset: Any,
  size: int,
  into: Ref,
  index: Any,
  barriers: Ref,
  number: Any,
  where: Any,
) -> None:
  """Starts a bulk copy to shared memory in each lane whose `where` is true.

  All sizes and offsets are multiples of 16 bytes.

  Args:
    ref, row, offset: matrix in global memory, row, and element of the row where the source begins.
    size: bytes.
    into, index: shared memory, and the element where the target begins.
    barriers, number: the barrier that counts the bytes when they have come.
    where: see above.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3 + (LAYOUT,) * 5)
  def copy(_, ref, into, barriers, row, offset, index, number, where):
    with only_where(element(where)):
      source = global_address(ref, element(row), element(offset), width)
      ptx(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        f"[$0], [$1], {size}, [$2];",
        "r,l,r",
        shared_address(into, element(index), 1),
        source,
        shared_address(barriers, element(number), 2),
      )

  width = ref.shape[1]
  copy(ref, into, barriers, *map(per_lane, (row, offset, index, number, where)))


def arrive_expecting(barriers: Ref, number: Any, size: int, where: Any) -> None:
  """Arrives at the barrier of that number, which then opens when `size` bytes have come to it; one
  lane's `where` must be true.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT, LAYOUT))
  def arrive(_, barriers, number, where):
    with only_where(element(where)):
      ptx(
        f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {size};",
        "r",
        shared_address(barriers, element(number), 2),
      )

  arrive(barriers, per_lane(number), per_lane(where))


def arrive(barriers: Ref, number: Any) -> None:
  """Arrives at the barrier of that number, once for each warp, when all lanes of the warp have come
  here: what they have read may then be overwritten.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT, LAYOUT))
  def arrive(_, barriers, number, where):
    ptx("bar.warp.sync 0xffffffff;", "")
    with only_where(element(where)):
      ptx(
        "mbarrier.arrive.shared::cta.b64 _, [$0];",
        "r",
        shared_address(barriers, element(number), 2),
      )

  arrive(barriers, per_lane(number), per_lane((lane_index() & 31) == 0))


def wait_barrier(barriers: Ref, number: Any, parity: Any) -> None:
  """Waits for the end of the phase of that parity at the barrier of that number.

  The first phase has parity 0, the next one 1, and so on in turn; a wait for parity 1 at a new
  barrier passes at once. After the wait, what was copied can be read.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT, LAYOUT))
  def wait(_, barriers, number, parity):
    ptx(
      "{ .reg .pred opened;"
      " again: mbarrier.try_wait.parity.shared::cta.b64 opened, [$0], $1;"
      " @!opened bra again; }",
      "r,r",
      shared_address(barriers, element(number), 2),
      element(parity),
    )

  wait(barriers, per_lane(number), per_lane(parity))


def sync_threads(warpgroups: int | None = None, barrier: Any = 1) -> None:
  """Waits until all lanes of a program, or of `warpgroups` that share the hardware barrier of that
  number, have come here; what they wrote to shared memory can be read then.
  """

  @plgpu.inline_mgpu(arg_types=(LAYOUT,))
  def wait(_, barrier):
    if warpgroups is None:
      gpu.barrier()
    else:
      ptx(f"bar.sync $0, {warpgroups * LANES};", "r", element(barrier))

  wait(per_lane(jnp.int32(barrier)))


def sync_warp() -> None:
  """Waits until all lanes of a warp have come here; what they wrote can be read then."""

  @plgpu.inline_mgpu()
  def wait(_):
    ptx("bar.warp.sync 0xffffffff;", "")

  wait()


def grid_barrier(ref: Ref, adds: Any, before: Any, where: Any) -> None:
  """Waits, in the one lane whose `where` is true, until all programs have come here.

  The lane adds a number to ref[0], int32 in global memory, and waits until its sign differs from
  that of `before`, its value before the first program came. What all programs add must come to
  2^31: then the last one changes the sign, and nothing else, so that the counter serves again. What
  programs wrote before they came can be read by those that go on.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT, LAYOUT, LAYOUT))
  def wait(_, ref, adds, before, where):
    with only_where(element(where)):
      adds = element(adds)
      zero = constant(adds.type, 0)
      address = global_address(ref, zero, zero, 1)
      ptx(
        "{ .reg .pred same; .reg .b32 now;"
        " red.release.gpu.global.add.u32 [$0], $1;"
        " again: ld.acquire.gpu.global.b32 now, [$0];"
        " xor.b32 now, now, $2; setp.ge.s32 same, now, 0; @same bra again; }",
        "l,r,r",
        address,
        adds,
        element(before),
      )

  wait(ref, *map(per_lane, (adds, before, where)))
