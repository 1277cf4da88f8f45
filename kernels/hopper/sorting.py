"""Sorts of the rows of [rows, n] arrays on GPUs, in Pallas Mosaic kernels of single threads.

  kernel      a program for  a lane for  reads      writes
  sort_parts  part of a row  element     the keys   parts in order, with their tokens
  merge       LANES          element     FAN parts  one part in order: an element's index is the
              elements                              number of those before it in each part

Merges follow each other until a row is one part. A part is sorted in shared memory by a bitonic
network; wherever three compared distances follow each other, a lane holds the eight elements that
are compared over these.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.bisection import bisect
from sparsek.kernels.hopper.thread_ops import block_of, gather, kernel, reader, scatter
from sparsek.kernels.hopper.thread_registers import LANES
from sparsek.kernels.hopper.thread_sync import sync_threads

FAN = 4  # parts that are merged at once, at most
SMALLEST, LARGEST = 128, 1024  # elements of a part, powers of two
LAST = 2**31 - 1  # the key of elements that fill the last part


def sort(key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the keys in order and their tokens, by key, then later token first.

  Args:
    key: [rows, n] int32 below 2^31 - 1.
  """
  n = key.shape[1]
  size = min(max(SMALLEST, 1 << (-(-n // FAN) - 1).bit_length()), LARGEST)
  key, token = _sort_parts(size, key)
  if size >= n:
    return key[:, :n], token[:, :n]
  while size < n:
    fan = min(FAN, -(-n // size))
    size, (key, token) = size * fan, _merge(size, fan, n, key, token)
  return key, token


def _shapes(rows, size):
  return [jax.ShapeDtypeStruct((rows, size), jnp.int32)] * 2


def _sort_parts(size, key):
  """Sorts each part of so many elements; the last one is filled."""
  rows, n = key.shape
  parts = -(-n // size)

  def body(row, _, lane, key, keys, tokens, part_keys, part_tokens):
    part = block_of(rows)
    own = lane - part * LANES
    network = functools.partial(_compare, size, own, (part_keys, part_tokens))

    @pl.loop(0, -(-size // LANES))
    def _load(i):
      index = i * LANES + own
      token = part * size + index
      value = reader(key, row)(token)
      scatter(part_keys, _padded(index), jnp.where(token < n, value, LAST), index < size)
      scatter(part_tokens, _padded(index), token, index < size)

    sync_threads()

    def merge_runs(phase, nothing):
      """Merges pairs of runs of 2^(phase - 1) elements."""

      def one(_, last):
        network(phase, last - 1, 1)
        return last - 1

      def three(_, last):
        network(phase, last - 3, 3)
        return last - 3

      last = lax.fori_loop(0, phase % 3, one, phase)
      lax.fori_loop(0, phase // 3, three, last)
      return nothing

    lax.fori_loop(1, size.bit_length(), merge_runs, 0)

    @pl.loop(0, -(-size // LANES))
    def _store(i):
      index = i * LANES + own
      for ref, part_ref in ((keys, part_keys), (tokens, part_tokens)):
        value = gather(part_ref, _padded(jnp.minimum(index, size - 1)))
        scatter(ref.at[row], part * size + index, value, index < size)

  run = kernel(
    body,
    rows,
    parts * LANES,
    name="sort_parts",
    out_type=_shapes(rows, parts * size),
    scratch_types=[plgpu.SMEM((size + size // 32,), jnp.int32)] * 2,
  )
  return run(key)


def _padded(index):
  """Returns where an element lies in shared memory, so that lanes use different banks."""
  return index + (index >> 5)


def _compare(size, own, refs, phase, distance, count):
  """Compares elements 2^(distance + count - 1) apart and exchanges them, then those half as far
  apart, down to 2^distance; their order alternates between runs of 2^phase elements.
  """
  held = 1 << count

  @pl.loop(0, -(-size // (held * LANES)))
  def _(i):
    group = i * LANES + own
    inside = group < size // held
    group = jnp.minimum(group, size // held - 1)
    rest = group >> distance
    first = (rest << (distance + count)) + (group - (rest << distance))
    down = ((first >> phase) & 1) == 1
    places = [_padded(first + (e << distance)) for e in range(held)]
    elements = [tuple(gather(ref, place) for ref in refs) for place in places]
    for bit in reversed(range(count)):
      for e in range(held):
        if not (e >> bit) & 1:
          a, b = elements[e], elements[e + (1 << bit)]
          swap = ((b[0] < a[0]) | ((b[0] == a[0]) & (b[1] > a[1]))) ^ down
          elements[e] = tuple(jnp.where(swap, y, x) for x, y in zip(a, b))
          elements[e + (1 << bit)] = tuple(jnp.where(swap, x, y) for x, y in zip(a, b))
    for place, element in zip(places, elements):
      for ref, value in zip(refs, element):
        scatter(ref, place, value, inside)

  sync_threads()


def _merge(size, fan, n, key, token):
  """Merges every `fan` neighbouring parts of so many elements; elements from n on are left out once
  all are in one part.
  """
  rows, total = key.shape
  kept = n if size * fan >= n else total

  def body(row, _, lane, key, token, keys, tokens):
    value, part = reader(key, row)(lane), lane // size
    first_part = part // fan * fan

    def before(step):
      """Returns the search for how many elements of another part come before."""
      other_part = first_part + (part + step) % fan

      def after(index):
        other = reader(key, row)(other_part * size + index)
        return (other > value) | ((other == value) & (part > other_part))

      return lane - lane, jnp.clip(total - other_part * size, 0, size), after

    rank = sum(bisect(size, *map(before, range(1, fan))), lane - part * size)
    rank += first_part * size
    inside = (lane < total) & (rank < kept)
    scatter(keys.at[row], rank, value, inside)
    scatter(tokens.at[row], rank, reader(token, row)(lane), inside)

  run = kernel(body, rows, total, name="merge", out_type=_shapes(rows, kept))
  return run(key, token)
