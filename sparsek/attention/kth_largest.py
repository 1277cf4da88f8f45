"""The k-th largest number of each of many ranges of a row, by one sort of the row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.attention.prefix_selection import in_order
from sparsek.kernels.sort_keys import SCORES


class SortedRows(NamedTuple):
  """Rows in ascending order, in about sqrt(n) parts of equal size.

  Attributes:
    value: [B, G, parts, size] float32.
    token: [B, G, parts, size] int32, where in the row the numbers stood.
  """

  value: jax.Array
  token: jax.Array

  def kth_largest(self, first: jax.Array, end: jax.Array, k: int) -> jax.Array:
    """Returns the k-th largest number of the tokens `first <= j < end`, where equal numbers count
    one by one.

    The numbers of the range's tokens in each part tell which part holds it, and those inside that
    part tell its place: O(C n).

    Args:
      first, end: [B, C] int32.
      k: at least 1.

    Returns:
      [B, G, C] float32; anything for a range with fewer than k tokens.
    """

    def number_inside(token_BxGx_xN):
      """Counts tokens inside of ranges, over the last axis."""
      edges = (jnp.expand_dims(edge, (1, 3, 4)) for edge in (first, end))
      before = ((token_BxGx_xN < edge).astype(jnp.float32) for edge in edges)
      # XLA for GPUs takes minutes to compile sums of integers; those of a part are exact as floats.
      before_first, before_end = sums(*before, axis=-1)
      return (before_end - before_first).astype(jnp.int32)

    in_parts_BxGxCxP = number_inside(self.token[:, :, None])
    part_BxGxC, behind_BxGxC = _place_of(in_parts_BxGxCxP, jnp.int32(k))
    of_part = lambda x: jnp.take_along_axis(x, part_BxGxC[..., None], axis=2)
    inside_BxGxCxW = number_inside(of_part(self.token)[..., None])
    index_BxGxC, _ = _place_of(inside_BxGxCxW, k - behind_BxGxC)
    return jnp.take_along_axis(of_part(self.value), index_BxGxC[..., None], axis=3)[..., 0]


def sums(*x: jax.Array, axis: int) -> tuple[jax.Array, ...]:
  """Sums float32 arrays in one reduction, for which compilers form what is summed once."""
  add = lambda a, b: tuple(map(jnp.add, a, b))
  x = tuple(jnp.broadcast_arrays(*x))
  return lax.reduce(x, (jnp.float32(0),) * len(x), add, (axis % x[0].ndim,))


def sorted_rows(x: jax.Array, *, kernels: bool = False) -> SortedRows:
  """Sorts rows.

  Args:
    x: [B, G, n] float32; NaN and -inf come first, and infinity counts as the largest finite number.
    kernels: whether to sort by the kernels for Hopper GPUs.
  """
  batch, groups, n = x.shape
  size = 2 ** (((n - 1).bit_length() + 1) // 2)
  # What fills up the last part has tokens behind the row, which are in no range.
  x = jnp.pad(x, ((0, 0), (0, 0), (0, -n % size)), constant_values=-jnp.inf)
  return SortedRows(*(y.reshape(batch, groups, -1, size) for y in in_order(x, SCORES, kernels)))


def _place_of(counts: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the last index from which on counts sum to at least k, or 0, and their sum behind it.

  Args:
    counts: [..., P] int32, at least 0.
    k: [...] or a scalar, at least 1.
  """
  from_here = lax.cumsum(counts, axis=counts.ndim - 1, reverse=True)
  index = jnp.maximum(jnp.sum(from_here >= k[..., None], axis=-1, dtype=jnp.int32) - 1, 0)
  behind = jnp.take_along_axis(from_here - counts, index[..., None], axis=-1)[..., 0]
  return index, behind
