"""Mean and squared deviations of a scorer's logits over each causal prefix of a document.

Moments of parts are joined by the rule of Chan, Golub and LeVeque (1979), never by a difference of
large sums, so that an offset common to all logits costs no digits.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Moments(NamedTuple):
  """Statistics of a set of logits.

  Attributes:
    count: how many they are.
    mean: their mean.
    deviation: sum of their squared deviations from it.
  """

  count: jax.Array  # type: ignore[assignment]  # tuple.count is not used
  mean: jax.Array
  deviation: jax.Array


def moments_added(a: Moments, b: Moments) -> Moments:
  """Returns what to add to the moments a to get those of the union with b."""
  share = b.count / jnp.maximum(a.count + b.count, 1)
  delta = b.mean - a.mean
  return Moments(b.count, delta * share, b.deviation + delta**2 * a.count * share)


def merge_moments(a: Moments, b: Moments) -> Moments:
  """Returns the moments of the union."""
  added = moments_added(a, b)
  return Moments(*(x + y for x, y in zip(a, added)))


Arrays = tuple[jax.Array, ...]


# Tokens of a block, and blocks of a larger one, which are few. On a GPU XLA gives each token a
# thread in blocks of 12, but a warp in blocks of 8, 16 or 32, which takes three times as long.
BLOCK, BLOCKS = 12, 64


def _prefixes(
  arrays: Arrays, start: jax.Array, join: Callable[[Arrays, Arrays], Arrays], block: int = BLOCK
) -> Arrays:
  """Joins, for each token i, the tokens start_i to i in order.

  Joins inside blocks first; then each block adds what the blocks before it hold of its document.
  That takes three levels for 32768 tokens, where a scan by doubling would take 15.

  Args:
    arrays: tuple of float32 [..., n].
    start: [..., n], broadcasts to them; never decreases along a row.
    join: makes one such tuple of two, the earlier first; associative, with zeros as its neutral
      element.
    block: tokens of a block.
  """
  n = arrays[0].shape[-1]
  block, padding = min(block, n), [(0, 0)] * (arrays[0].ndim - 1)
  size = -(-n // block)
  blocks = lambda x, **kwargs: jnp.pad(
    x, (*padding[: x.ndim - 1], (0, size * block - n)), **kwargs
  ).reshape(*x.shape[:-1], size, block)
  arrays, start = tuple(map(blocks, arrays)), blocks(start, mode="edge")
  token = jnp.arange(size * block, dtype=jnp.int32).reshape(size, block)
  joined = (token[:, None, :] <= token[:, :, None]) & (token[:, None, :] >= start[..., None])
  masked = tuple(jnp.where(joined, x[..., None, :], 0) for x in arrays)
  inside = tuple(lax.reduce(masked, (0.0,) * len(arrays), join, (masked[0].ndim - 1,)))
  if size > 1:
    before = _prefixes(
      tuple(x[..., -1] for x in inside), lax.div(start[..., -1], block), join, BLOCKS
    )
    shifted = (jnp.pad(x[..., :-1], (*padding, (1, 0)))[..., None] for x in before)
    inside = join(tuple(jnp.where(start < token[:, :1], x, 0) for x in shifted), inside)
  return tuple(x.reshape(*x.shape[:-2], size * block)[..., :n] for x in inside)


@jax.custom_vjp
def running_moments(
  logits_BxNxG: jax.Array, counted_BxN: jax.Array, start_BxN: jax.Array, end_BxN: jax.Array
) -> Moments:
  """Returns the moments of the counted logits from the document's first token up to each token,
  itself included: [B, N, G] each.

  Deviations from the document's first logit are joined by `merge_moments`.

  Args:
    logits_BxNxG: float32.
    counted_BxN: which tokens count.
    start_BxN, end_BxN: results of `document_bounds`.
  """
  return _running_moments_fwd(logits_BxNxG, counted_BxN, start_BxN, end_BxN)[0]


def _running_moments_fwd(logits_BxNxG, counted_BxN, start_BxN, end_BxN):
  logits_BxGxN, start_Bx1xN = jnp.swapaxes(logits_BxNxG, 1, 2), start_BxN[:, None]
  counted_BxGxN = jnp.broadcast_to(counted_BxN[:, None].astype(jnp.float32), logits_BxGxN.shape)
  first_BxGxN = jnp.take_along_axis(logits_BxGxN, start_Bx1xN, axis=-1)
  offset_BxGxN = (logits_BxGxN - first_BxGxN) * counted_BxGxN
  count, mean, deviation = _prefixes(
    (counted_BxGxN, offset_BxGxN, jnp.zeros_like(offset_BxGxN)),
    start_Bx1xN,
    lambda a, b: tuple(merge_moments(Moments(*a), Moments(*b))),
  )
  moments = Moments(*(jnp.swapaxes(x, 1, 2) for x in (count, mean + first_BxGxN, deviation)))
  return moments, (offset_BxGxN, counted_BxGxN, count, mean, end_BxN)


def _running_moments_bwd(residuals, cotangent):
  """Sums the cotangents of all later prefixes of the document.

  With m_i the mean of c_i logits: dm_i / dx_j = 1 / c_i, and the deviation's derivative is
  2 (x_j - m_i), for counted j of the document up to i. So dx_j = sum over i >= j of
  (dmean_i / c_i - 2 ddev_i m_i) + x_j sum of 2 ddev_i: two sums from the end on, with x and m
  taken relative to the document's first logit.
  """
  offset, counted, count, mean, end_BxN = residuals
  of_mean, of_deviation = (jnp.swapaxes(c, 1, 2) for c in (cotangent.mean, 2 * cotangent.deviation))
  sums = of_mean / jnp.maximum(count, 1) - of_deviation * mean, of_deviation
  from_end = (offset.shape[-1] - end_BxN)[:, None, ::-1]
  constant, slope = (
    x[..., ::-1]
    for x in _prefixes(
      tuple(x[..., ::-1] for x in sums), from_end, lambda a, b: tuple(map(jnp.add, a, b))
    )
  )
  return jnp.swapaxes(counted * (constant + offset * slope), 1, 2), None, None, None


running_moments.defvjp(_running_moments_fwd, _running_moments_bwd)
