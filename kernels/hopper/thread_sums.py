"""Sums over the lanes of a program of single threads, and the shared memory that they need."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sparsek.kernels.hopper.common import Ref
from sparsek.kernels.hopper.thread_ops import gather, scatter
from sparsek.kernels.hopper.thread_registers import LANES, warp_prefix_sums
from sparsek.kernels.hopper.thread_sync import sync_threads

WARP = 32
WARPS = LANES // WARP


def clear(ref: Ref, own: jax.Array) -> None:
  """Sets shared memory, int32, to 0; `own` is the lane's number in the program."""
  (size,) = ref.shape

  @pl.loop(0, -(-size // LANES))
  def _(i):
    index = i * LANES + own
    scatter(ref, jnp.minimum(index, size - 1), 0, index < size)


def prefix_sums(x: jax.Array, own: jax.Array, totals: Ref) -> tuple[jax.Array, jax.Array]:
  """Returns the sum of x over this lane and the earlier ones of the program, and over all lanes.

  Args:
    x: int32 or float32.
    own: the lane's number in the program.
    totals: [WARPS] of the same dtype in shared memory.
  """
  sums = warp_prefix_sums(x)
  scatter(totals, own // WARP, sums, own % WARP == WARP - 1)
  sync_threads()
  by_warp = [gather(totals, own - own + warp) for warp in range(WARPS)]
  sync_threads()
  for warp in range(WARPS - 1):
    sums += jnp.where(own >= WARP * (warp + 1), by_warp[warp], 0)
  return sums, sum(by_warp[1:], by_warp[0])
