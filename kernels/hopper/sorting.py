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
from sparsek.kernels.sort_keys import Coding

FAN = 4  # parts that are merged at once, at most
SMALLEST, LARGEST = 128, 1024  # elements of a part, powers of two
LAST = 2**31 - 1  # the key of elements that fill the last part


@functools.partial(jax.jit, static_argnums=0)
def sort(coding: Coding, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the numbers [rows, n] in order, decoded, and their tokens: by key, then later token
  first.
  """
  n = x.shape[1]
  size = min(max(SMALLEST, 1 << (-(-n // FAN) - 1).bit_length()), LARGEST)
  key, token = _sort_parts(size, x, coding)
  if size >= n:
    return key[:, :n], token[:, :n]
  while size < n:
    fan = min(FAN, -(-n // size))
    size, (key, token) = size * fan, _merge(size, fan, n, key, token, coding)
  return key, token


def _shapes(rows, size, coding, is_last):
  """Returns the types of keys, or of what stands for them in the result, and of tokens."""
  dtypes = coding.dtype if is_last else jnp.int32, jnp.int32
  return [jax.ShapeDtypeStruct((rows, size), dtype) for dtype in dtypes]


def _sort_parts(size, x, coding):
  """Sorts each part of so many elements; the last one is filled."""
  rows, n = x.shape
  parts = -(-n // size)

  def body(row, _, lane, x, keys, tokens, part_keys, part_tokens):
    part = block_of(rows)
    own = lane - part * LANES
    network = functools.partial(_compare, size, own, (part_keys, part_tokens))

    @pl.loop(0, -(-size // LANES))
    def _load(i):
      index = i * LANES + own
      token = part * size + index
      value = coding.encode(reader(x, row)(token))
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
      key, token = (
        gather(ref, _padded(jnp.minimum(index, size - 1))) for ref in (part_keys, part_tokens)
      )
      key = coding.decode(key) if parts == 1 else key
      for ref, value in ((keys, key), (tokens, token)):
        scatter(ref.at[row], part * size + index, value, index < size)

  run = kernel(
    body,
    rows,
    parts * LANES,
    name="sort_parts",
    out_type=_shapes(rows, parts * size, coding, parts == 1),
    scratch_types=[plgpu.SMEM((size + size // 32,), jnp.int32)] * 2,
  )
  return run(x)


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


def _merge(size, fan, n, key, token, coding):
  """Merges every `fan` neighbouring parts of so many elements; elements from n on are left out once
  all are in one part.
  """
  rows, total = key.shape
  is_last = size * fan >= n
  kept = n if is_last else total

  def body(row, _, lane, key, token, keys, tokens):
    value, part = reader(key, row)(lane), lane // size
    first_part = part // fan * fan

    def before(step):
      """Returns the search for how many elements of another part come before."""
      other_part = first_part + (part + step) % fan
      least = value + (part < other_part).astype(jnp.int32)  # of keys that come after

      def after(index):
        return reader(key, row)(other_part * size + index) >= least

      return lane - lane, jnp.clip(total - other_part * size, 0, size), after

    rank = sum(bisect(size, *map(before, range(1, fan))), lane - part * size)
    rank += first_part * size
    inside = (lane < total) & (rank < kept)
    scatter(keys.at[row], rank, coding.decode(value) if is_last else value, inside)
    scatter(tokens.at[row], rank, reader(token, row)(lane), inside)

  run = kernel(body, rows, total, name="merge", out_type=_shapes(rows, kept, coding, is_last))
  return run(key, token)
