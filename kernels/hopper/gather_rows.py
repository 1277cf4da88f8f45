"""Rows of keys and values on Hopper GPUs: gathered into the lists of selected tokens, and the
gradients of listed rows summed per token in a fixed order.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparsek.kernels.hopper.thread_ops import (
  LANES,
  block_of,
  contents,
  gather_bytes,
  kernel,
  narrow,
  numbers,
  reader,
  scatter,
  scatter_bytes,
  widen,
)

WORD = 8  # numbers that a lane moves at once
AT_ONCE = 4  # moves that it has under way
TILE = 128  # places of a list that are gathered together, or not at all


def _lane_parts(dim):
  """(rows that a program moves at once, which of them is each lane's, first number of each lane's
  part).
  """
  lane = numbers()
  per_row = (dim // WORD).bit_length() - 1
  return LANES >> per_row, lane >> per_row, (lane & (dim // WORD - 1)) * WORD


def gather_rows(key, value, scores, lists):
  """What the lists hold.

  Args:
    key, value: [B, n, G, D], 16 bits a number, D a power of two from 8.
    scores: [B, G, n] float32.
    lists: tiles.Lists [B, G, ...].

  Returns:
    Keys and values [B, G, places, D] and scores [B, G, places]; tiles of places that hold no token
    are not written.
  """
  batch, n, groups, dim = key.shape
  chunks, slots = lists.token.shape[2:]
  places, tiles = chunks * slots, slots // TILE
  token, entered = lists.token.reshape(-1, places), lists.entered.reshape(-1, n)

  def body(
    row, _, lane, key, value, scores, token, entered, listed_key, listed_value, listed_score
  ):
    block, b, g = block_of(batch * groups), row // groups, row % groups

    @pl.when(
      block % tiles * TILE < entered[row, (block // tiles + 1) * (n // chunks) - 1]
    )  # as many tokens has the list
    def _():
      at_once, own_row, part = _lane_parts(dim)
      own = reader(token, row)
      score = reader(scores, b, g)(own(lane))
      scatter(listed_score.at[b, g], lane, score, lane >= 0)

      @pl.loop(0, TILE // (at_once * AT_ONCE))
      def _(step):
        place = [block * TILE + (step * AT_ONCE + i) * at_once + own_row for i in range(AT_ONCE)]
        rows = [
          [gather_bytes(ref.at[b], j, g * dim + part, groups * dim) for ref in (key, value)]
          for j in map(own, place)
        ]
        for at, pair in zip(place, rows):
          for ref, words in zip((listed_key, listed_value), pair):
            scatter_bytes(ref.at[b, g], at, part, dim, words, at >= 0)

  shape = batch, groups, places
  out = [jax.ShapeDtypeStruct((*shape, dim), key.dtype)] * 2 + [
    jax.ShapeDtypeStruct(shape, jnp.float32)
  ]
  return kernel(body, batch * groups, places, name="gather_rows", out_type=out)(
    key, value, scores, token, entered
  )


def sum_rows(dkey, dvalue, rows, lists):
  """Adds the rows of listed tokens to those of the window.

  Args:
    dkey, dvalue: [B, n, G, D] 16-bit gradients of the window's keys and values; D a power of two
      from 8 to 1024.
    rows: (dkey, dvalue [B, G, places, D], dscore [B, G, places] float32) of listed tokens; places
      without a token may hold anything.
    lists: tiles.Lists [B, G, ...].

  Returns:
    dkey, dvalue [B, n, G, D] (rounded once more) and dscores [B, G, n] float32.
  """
  batch, n, groups, dim = dkey.shape
  dtype, places = dkey.dtype, rows[0].shape[2]
  tokens = LANES * WORD // dim  # of a program
  flat = lambda x: x.reshape(batch * groups, -1)
  arrays = map(
    flat,
    (
      lists.number,
      lists.listed,
      lists.new_place,
      lists.old_place,
      lists.old_begin,
      lists.old_count,
    ),
  )

  def body(
    row,
    _,
    lane,
    dk_ref,
    dv_ref,
    ds_ref,
    lk_ref,
    lv_ref,
    ls_ref,
    number,
    listed,
    new_place,
    old_place,
    begin,
    count,
  ):
    block, b, g = block_of(batch * groups), row // groups, row % groups

    @pl.when(
      block * tokens < number[row, 0]
    )  # the gradients of tokens that were never selected stay as they are
    def _():
      _, own_row, part = _lane_parts(dim)
      inside = block * tokens + own_row < number[row, 0]
      token = reader(listed, row)(block * tokens + own_row)
      new, first, times = (reader(ref, row)(token) for ref in (new_place, begin, count))

      def add(place, there, sums):
        """Rows that are not there are read too, and may hold anything."""
        place = jnp.where(there, place, 0)
        numbers = [
          x
          for ref in (lk_ref, lv_ref)
          for x in widen(gather_bytes(ref.at[b, g], place, part, dim), dtype)
        ]
        return tuple(
          total + jnp.where(there, x, 0.0)
          for total, x in zip(sums, [*numbers, reader(ls_ref, b, g)(place)])
        )

      sums = add(new, new < places, ((token - token).astype(jnp.float32),) * (2 * WORD + 1))
      sums = lax.fori_loop(
        0,
        jnp.max(times),
        lambda e, sums: add(reader(old_place, row)(first + e), e < times, sums),
        sums,
      )
      for i, ref in enumerate((dk_ref, dv_ref)):
        where = ref.at[b], token, g * dim + part, groups * dim
        scatter_bytes(
          *where,
          narrow(
            [x + y for x, y in zip(widen(gather_bytes(*where), dtype), sums[i * WORD :])], dtype
          ),
          inside,
        )
      scatter(ds_ref.at[b, g], token, sums[-1], inside & (part == 0))

  totals = [jax.new_ref(x) for x in (dkey, dvalue, jnp.zeros((batch, groups, n), jnp.float32))]
  kernel(body, batch * groups, -(-n // tokens) * LANES, name="sum_rows")(*totals, *rows, *arrays)
  return tuple(contents(*totals))
