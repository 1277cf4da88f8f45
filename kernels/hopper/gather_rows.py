"""Rows of keys and values on Hopper GPUs: gathered into the lists of selected tokens, and the
gradients of listed rows summed per token in a fixed order.

Both kernels are of single threads (thread_ops.py). A lane moves WORD numbers, 16 bytes, of a row.
So for D = 128 a row takes 16 lanes, and a program moves 8 rows at once:

  lane    0    1   ...  15 | 16   17  ...  31 | ...
  row     0                | 1                | ...
  numbers 0-7  8-15 ... 127 | 0-7  8-15 ...    | ...

No barriers, no shared memory: no lane reads what another one writes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparsek.kernels.hopper.thread_ops import (
  block_of,
  contents,
  gather_bytes,
  kernel,
  reader,
  scatter,
  scatter_bytes,
)
from sparsek.kernels.hopper.thread_registers import LANES, lane_index, narrow, widen
from sparsek.kernels.tiles import Lists

WORD = 8  # numbers that a lane moves at once
AT_ONCE = 4  # moves that a lane has in flight
TILE = 128  # places of a list that are gathered together, or not at all


class GatherInputs(NamedTuple):
  """Arrays of the kernel gather_rows."""

  key: Any
  value: Any
  scores: Any
  token: Any
  entered: Any


class GatherOutputs(NamedTuple):
  """Results of the kernel gather_rows."""

  key: Any
  value: Any
  score: Any


class Totals(NamedTuple):
  """Gradients of all tokens, to which the kernel sum_rows adds in place."""

  dkey: Any
  dvalue: Any
  dscore: Any


class Rows(NamedTuple):
  """Gradients of listed tokens, by place."""

  dkey: Any
  dvalue: Any
  dscore: Any


class Places(NamedTuple):
  """The places where each token is listed, see tiles.Lists; [B G, ...]."""

  number: Any
  listed: Any
  new_place: Any
  old_place: Any
  old_begin: Any
  old_count: Any


def _lane_parts(dim):
  """Returns the rows that a program moves at once, which of them is each lane's, and the first
  number of each lane's part of it.
  """
  lane = lane_index()
  per_row = (dim // WORD).bit_length() - 1
  return LANES >> per_row, lane >> per_row, (lane & (dim // WORD - 1)) * WORD


def gather_rows(
  key: jax.Array, value: jax.Array, scores: jax.Array, lists: Lists
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gathers the rows of the lists' tokens: one program for a tile of 128 places.

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

  def body(row, _, lane, inputs, outputs):
    block, b, g = block_of(batch * groups), row // groups, row % groups
    first_slot = block % tiles * TILE
    last_query = (block // tiles + 1) * (n // chunks) - 1  # of the list's chunk

    @pl.when(first_slot < inputs.entered[row, last_query])
    def _gather_tile():
      at_once, own_row, part = _lane_parts(dim)
      token_at = reader(inputs.token, row)
      score = reader(inputs.scores, b, g)(token_at(lane))
      scatter(outputs.score.at[b, g], lane, score, lane >= 0)

      @pl.loop(0, TILE // (at_once * AT_ONCE))
      def _(step):
        places = [block * TILE + (step * AT_ONCE + i) * at_once + own_row for i in range(AT_ONCE)]
        rows = [
          [
            gather_bytes(ref.at[b], token, g * dim + part, groups * dim)
            for ref in (inputs.key, inputs.value)
          ]
          for token in map(token_at, places)
        ]
        for place, pair in zip(places, rows):
          for ref, words in zip((outputs.key, outputs.value), pair):
            scatter_bytes(ref.at[b, g], place, part, dim, words, place >= 0)

  shape = batch, groups, places
  listed = jax.ShapeDtypeStruct((*shape, dim), key.dtype)
  out = GatherOutputs(listed, listed, jax.ShapeDtypeStruct(shape, jnp.float32))
  token, entered = lists.token.reshape(-1, places), lists.entered.reshape(-1, n)
  run = kernel(body, batch * groups, places, name="gather_rows", out_type=[out])
  (rows,) = run(GatherInputs(key, value, scores, token, entered))
  return rows


def sum_rows(
  dkey: jax.Array, dvalue: jax.Array, rows: list[jax.Array], lists: Lists
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Adds the rows of listed tokens to those of the window.

  A program serves a few of the tokens that were ever selected, and sums the rows of each in the
  order of their chunks; the gradients of other tokens stay as they are.

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

  def body(row, _, lane, totals, rows, lists):
    block, b, g = block_of(batch * groups), row // groups, row % groups

    @pl.when(block * tokens < lists.number[row, 0])
    def _sum_tokens():
      _, own_row, part = _lane_parts(dim)
      inside = block * tokens + own_row < lists.number[row, 0]
      token = reader(lists.listed, row)(block * tokens + own_row)
      new, first, times = (
        reader(ref, row)(token) for ref in (lists.new_place, lists.old_begin, lists.old_count)
      )
      old_place = reader(lists.old_place, row)

      def add(place, there, sums):
        """Adds the row of a place in the lanes where `there`. In the others a row is read too, and
        may hold anything.
        """
        place = jnp.where(there, place, 0)
        numbers = [
          x
          for ref in (rows.dkey, rows.dvalue)
          for x in widen(gather_bytes(ref.at[b, g], place, part, dim), dtype)
        ]
        numbers.append(reader(rows.dscore, b, g)(place))
        return tuple(total + jnp.where(there, x, 0.0) for total, x in zip(sums, numbers))

      sums = add(new, new < places, ((token - token).astype(jnp.float32),) * (2 * WORD + 1))
      sums = lax.fori_loop(
        0, jnp.max(times), lambda e, sums: add(old_place(first + e), e < times, sums), sums
      )
      for i, ref in enumerate((totals.dkey, totals.dvalue)):
        where = ref.at[b], token, g * dim + part, groups * dim
        window_part = widen(gather_bytes(*where), dtype)
        total = [x + y for x, y in zip(window_part, sums[i * WORD :])]
        scatter_bytes(*where, narrow(total, dtype), inside)
      scatter(totals.dscore.at[b, g], token, sums[-1], inside & (part == 0))

  dscore = jnp.zeros((batch, groups, n), jnp.float32)
  totals = Totals(*(jax.new_ref(x) for x in (dkey, dvalue, dscore)))
  flat = Places(*(getattr(lists, name).reshape(batch * groups, -1) for name in Places._fields))
  run = kernel(body, batch * groups, -(-n // tokens) * LANES, name="sum_rows")
  run(totals, Rows(*rows), flat)
  dkey, dvalue, dscore = contents(*totals)
  return dkey, dvalue, dscore
