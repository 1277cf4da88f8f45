"""RMS norms on Hopper GPUs: each pass reads its inputs once.

Both kernels are of single threads (thread_ops.py). A warp computes a row, of which each lane holds
every 32nd word of 16 bytes, eight numbers:

  word    0    1   ...  31 | 32   33  ...  63 | ...
  lane    0    1   ...  31 | 0    1   ...  31 | ...

So a row's sums take five shuffles and no shared memory. Each warp takes every W-th row of W warps,
and in the backward pass sums the gradients of the scales of its rows in registers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels.hopper.common import MULTIPROCESSORS, Ref
from sparsek.kernels.hopper.thread_ops import block_of, floats, gather_bytes, kernel, scatter_bytes
from sparsek.kernels.hopper.thread_registers import LANES, lane_index, narrow, shuffle_xor, widen

WARP = 32  # lanes
WORD = 8  # numbers that a lane moves at once
MULTIPLE = WARP * WORD  # widths are multiples of this
MAX_WIDTH = 1536  # wider rows do not fit the registers
PROGRAMS = 4  # at least as many of a multiprocessor


def _warps(batch, n):
  """Returns how many warps a row of the batch gets: a multiple of a program's, 4."""
  programs = max(1, PROGRAMS * MULTIPROCESSORS // batch)
  return min(programs, -(-n * WARP // LANES)) * LANES // WARP


def _row_sum(x):
  """Returns the sum of the x of all lanes of a warp."""
  for distance in (16, 8, 4, 2, 1):
    x = x + shuffle_xor(x, distance)
  return x


class _Lane:
  """The words of a lane: a warp's index, its number of rows, and reads and writes."""

  def __init__(self, batch: int, warps: int, n: int, width: int):
    self.n, self.width, self.warps = n, width, warps
    lane = lane_index()
    self.warp = block_of(batch) * (LANES // WARP) + lane // WARP
    self.offsets = [(lane % WARP + i * WARP) * WORD for i in range(width // MULTIPLE)]
    self.rounds = -(-n // warps)

  def row(self, i: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the i-th row of each lane's warp, and whether there is one."""
    row = self.warp + i * self.warps
    return jnp.minimum(row, self.n - 1), row < self.n

  def read(self, ref: Ref, row: jax.Array) -> list[tuple[jax.Array, ...]]:
    """Returns the lane's words of a row."""
    return [gather_bytes(ref, row, offset, self.width) for offset in self.offsets]

  def scales(self, ref: Ref) -> list[jax.Array]:
    """Returns the lane's scales, as many as numbers of a row."""
    return [x for offset in self.offsets for x in floats(ref, offset, WORD)]

  def write(self, ref: Ref, row: jax.Array, numbers: list[jax.Array], where: jax.Array) -> None:
    """Writes the lane's numbers of a row where there is one."""
    for i, offset in enumerate(self.offsets):
      words = narrow(numbers[i * WORD : (i + 1) * WORD], ref.dtype)
      scatter_bytes(ref, row, offset, self.width, words, where)


def _numbers(words, dtype):
  return [x for word in words for x in widen(word, dtype)]


def _inverse(numbers, width, epsilon):
  """Returns 1 / sqrt(mean of the row's squares + epsilon)."""
  squares = sum(x * x for x in numbers)
  return lax.rsqrt(_row_sum(squares) * (1 / width) + epsilon)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """Returns x / sqrt(mean(x^2) + epsilon) * scale.

  Args:
    x: [B, n, E] 16-bit; E a multiple of MULTIPLE, at most MAX_WIDTH.
    scale: [B, E] float32.
  """
  batch, n, width = x.shape
  warps = _warps(batch, n)

  def body(b, _, __, x, scale, out):
    lane = _Lane(batch, warps, n, width)

    def row(i, nothing):
      row, inside = lane.row(i)
      numbers = _numbers(lane.read(x.at[b], row), x.dtype)
      inverse = _inverse(numbers, width, epsilon)
      scaled = [number * inverse * s for number, s in zip(numbers, lane.scales(scale.at[b]))]
      lane.write(out.at[b], row, scaled, inside)
      return nothing

    lax.fori_loop(0, lane.rounds, row, jnp.int32(0))

  out = jax.ShapeDtypeStruct(x.shape, x.dtype)
  (normed,) = kernel(body, batch, warps * WARP, name="rms_norm", out_type=[out])(x, scale)
  return normed


def rms_norm_gradients(
  x: jax.Array, scale: jax.Array, d_x: jax.Array, d_normed: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array]:
  """Returns d_x + the gradient of `rms_norm` in x, and that in scale.

  With r = 1 / sqrt(mean(x^2) + epsilon) and d the gradient of the result, they are
  d_x + r (d scale) - x r^3 mean(d scale x) and the sum over rows of d x r.

  Args:
    x, scale: as in `rms_norm`.
    d_x: gradient of x from elsewhere, of the same shape and dtype.
    d_normed: gradient of the result, likewise.
  """
  batch, n, width = x.shape
  warps = _warps(batch, n)

  def body(b, _, __, x, scale, d_x, d_normed, out, sums):
    lane = _Lane(batch, warps, n, width)

    def row(i, totals):
      row, inside = lane.row(i)
      words = [lane.read(ref.at[b], row) for ref in (x, d_normed, d_x)]
      numbers, d_numbers, others = (_numbers(w, x.dtype) for w in words)
      inverse = _inverse(numbers, width, epsilon)
      scaled = [d * s for d, s in zip(d_numbers, lane.scales(scale.at[b]))]
      product = _row_sum(sum(a * c for a, c in zip(scaled, numbers)))
      back = product * inverse * inverse * inverse * (1 / width)
      total = [o + inverse * a - back * c for o, a, c in zip(others, scaled, numbers)]
      lane.write(out.at[b], row, total, inside)
      counted = jnp.where(inside, inverse, 0.0)
      return tuple(t + d * c * counted for t, d, c in zip(totals, d_numbers, numbers))

    zero = (lane.warp - lane.warp).astype(jnp.float32)
    totals = lax.fori_loop(0, lane.rounds, row, (zero,) * (width // WARP))
    for i, offset in enumerate(lane.offsets):
      for half in (0, 4):
        four = totals[i * WORD + half : i * WORD + half + 4]
        words = [lax.bitcast_convert_type(t, jnp.int32) for t in four]
        scatter_bytes(sums.at[b], lane.warp, offset + half, width, words, lane.warp >= 0)

  out = [
    jax.ShapeDtypeStruct(x.shape, x.dtype),
    jax.ShapeDtypeStruct((batch, warps, width), jnp.float32),
  ]
  run = kernel(body, batch, warps * WARP, name="rms_norm_gradients", out_type=out)
  d_x, sums = run(x, scale, d_x, d_normed)
  return d_x, jnp.sum(sums, axis=1)
