"""Preparation of the input of a product with a few rows: it is copied, normalised or joined from
parts of attention, rounded, and put into shared memory for all warps of a program.

  each computing warpgroup                      global memory -> registers -> prepared
  -------------------------------------------------------------------------------------------
  start   issue the loads of eight neighbours of a row, 16 bytes, in each lane
  finish  norm only: squares[row, warp] = sum of squares
                     wait for `warpgroups` barrier (bar.sync 1 of the computing warpgroups)
          compute, round, write to prepared
          wait for `warpgroups` barrier: all of prepared can be read

`prepared` and `squares` lie in shared memory; their shapes are in the drawings of
small_batch_matmul.py and fused_decode_kernel.py, whose kernels call this.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels.hopper.thread_ops import (
  floats,
  gather,
  gather_bytes,
  load_in_order,
  scatter,
  scatter_bytes,
)
from sparsek.kernels.hopper.thread_registers import LANES, lane_index, narrow, shuffle_xor, widen
from sparsek.kernels.hopper.thread_sync import sync_threads

Ref = Any  # a reference to memory inside a kernel
STEP = 32  # numbers of each row that a warp multiplies at once: four lanes' eight neighbours


class Preparation(NamedTuple):
  """Preparation of the input of a product in shared memory, split among a program's warpgroups.

  The input is [batch, width] of `dtype`, in shared memory with rows `stride` apart. Methods named
  `start_` issue the loads and return the function that does the rest.
  """

  batch: int
  width: int
  dtype: jnp.dtype
  warpgroups: int

  @property
  def stride(self) -> int:
    """Elements between rows, so that neighbouring rows begin in different banks."""
    return self.width + STEP

  def chunks(self, warpgroup: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Returns which eight neighbours of a row each lane prepares, for each of the rounds that the
    width takes: (the first of them, whether they are inside the row).
    """
    first = [
      (warpgroup * LANES + lane_index() + i * self.warpgroups * LANES) * 8
      for i in range(-(-self.width // (8 * self.warpgroups * LANES)))
    ]
    return [(jnp.where(k < self.width, k, 0), k < self.width) for k in first]

  def start_copy(self, x: Ref, prepared: Ref, warpgroup: jax.Array) -> Callable[[], None]:
    """Copies x, which other programs have just written."""
    loads = [
      (b, k, inside, load_in_order(x, k * 0 + b, k, self.width, fresh=True))
      for k, inside in self.chunks(warpgroup)
      for b in range(self.batch)
    ]

    def finish():
      for b, k, inside, words in loads:
        scatter_bytes(prepared, k * 0 + b, k, self.stride, words, inside)
      sync_threads(self.warpgroups)

    return finish

  def start_join(
    self, count: int, heads: int, parts: Any, prepared: Ref, warpgroup: jax.Array
  ) -> Callable[[], None]:
    """Joins attention that was computed in `count` parts; `parts` are references, see `Parts`."""
    batch, width, loads = self.batch, self.width, []
    for k, inside in self.chunks(warpgroup):
      for b in range(batch):
        top, total = (
          [gather(ref, (i * batch + b) * heads + k // (width // heads)) for i in range(count)]
          for ref in (parts.top, parts.total)
        )
        sums = [
          floats(parts.sums, (i * batch + b) * width + k, 8, load_in_order) for i in range(count)
        ]
        loads.append((b, k, inside, top, total, sums))

    def finish():
      for b, k, inside, top, total, sums in loads:
        highest = functools.reduce(jnp.maximum, top)
        weight = [jnp.exp(y - highest) for y in top]
        factor = 1 / sum(w * y for w, y in zip(weight, total))
        values = [sum(w * y for w, y in zip(weight, column)) * factor for column in zip(*sums)]
        words = narrow(values, self.dtype)
        scatter_bytes(prepared, k * 0 + b, k, self.stride, words, inside)
      sync_threads(self.warpgroups)

    return finish

  def start_norm(
    self,
    x: Ref,
    scale: Ref,
    epsilon: float,
    prepared: Ref,
    squares: Ref,
    warpgroup: jax.Array,
    hold: bool,
    fresh: bool = False,
  ) -> Callable[[], None]:
    """Computes the RMSNorm of x.

    Args:
      hold: keep x in registers; otherwise it is read twice.
      fresh: other programs have just written x, see `load_in_order`.
    """
    lane, warps = lane_index(), 4 * self.warpgroups
    warp = warpgroup * 4 + (lane >> 5)
    chunks, inside = zip(*self.chunks(warpgroup))
    words = [
      [load_in_order(x, lane * 0 + b, k, self.width, fresh=fresh) for k in chunks]
      for b in range(self.batch)
    ]
    scales = [floats(scale, k, 8, load_in_order) for k in chunks]

    def finish():
      for b in range(self.batch):
        total: Any = sum(
          jnp.where(is_inside, sum(y * y for y in widen(chunk, self.dtype)), 0.0)
          for chunk, is_inside in zip(words[b], inside)
        )
        for distance in (16, 8, 4, 2, 1):
          total = total + shuffle_xor(total, distance)
        scatter(squares, b * warps + warp, total, (lane & 31) == 0)
      sync_threads(self.warpgroups)
      for b in range(self.batch):
        mean = sum(gather(squares, lane * 0 + b * warps + w) for w in range(warps)) * (
          1 / self.width
        )
        factor = lax.rsqrt(mean + epsilon)
        again = words[b] if hold else [gather_bytes(x, lane * 0 + b, k, self.width) for k in chunks]
        for chunk, k, of_scale, is_inside in zip(again, chunks, scales, inside):
          values = [y * factor * s for y, s in zip(widen(chunk, self.dtype), of_scale)]
          normed = narrow(values, self.dtype)
          scatter_bytes(prepared, lane * 0 + b, k, self.stride, normed, is_inside)
      sync_threads(self.warpgroups)

    return finish
