"""Rows of keys and values on Hopper GPUs: gathered into the lists of selected tokens, and the
gradients of listed rows summed per token in a fixed order.

Both kernels are of single threads (thread_ops.py). A lane moves WORD numbers, 16 bytes, of a row.
So for D = 128 a row takes 16 lanes, and a program moves 8 rows at once:

  lane    0    1   ...  15 | 16   17  ...  31 | ...
  row     0                | 1                | ...
  numbers 0-7  8-15 ... 127 | 0-7  8-15 ...    | ...

No barriers, no shared memory: no lane reads what another one writes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparsek.kernels.hopper.common import MULTIPROCESSORS
from sparsek.kernels.hopper.thread_ops import (
  block_of,
  contents,
  gather_bytes,
  kernel,
  reader,
  scatter,
  scatter_bytes,
)
from sparsek.kernels.hopper.thread_registers import LANES, lane_index, narrow, warp_any, widen
from sparsek.kernels.tiles import Lists

WORD = 8  # numbers that a lane moves at once
AT_ONCE = 4  # moves that a lane has in flight
SUMMED = 3  # rows that a lane adds at once
PROGRAMS = 4 * MULTIPROCESSORS  # that sum rows, at most about so many: they run at once
TILE = 128  # places of a list that are all written where one of them holds a token


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
  """Gathers the rows of the lists' tokens. The programs of a list take its places in turn.

  Args:
    key, value: [B, n, G, D], 16 bits a number, D a power of two from 32.
    scores: [B, G, n] float32.
    lists: tiles.Lists [B, G, ...].

  Returns:
    Keys and values [B, G, places, D] and scores [B, G, places]; tiles of places that hold no token
    are not written.
  """
  batch, n, groups, dim = key.shape
  chunks, slots = lists.token.shape[2:]
  places, programs = chunks * slots, slots // TILE  # of a list

  def body(row, _, lane, inputs, outputs):
    block, b, g = block_of(batch * groups), row // groups, row % groups
    chunk, first_step = block // programs, block % programs
    at_once, own_row, part = _lane_parts(dim)
    unit, own = at_once * AT_ONCE, lane - block * LANES
    used = inputs.entered[row, (chunk + 1) * (n // chunks) - 1]  # by the list's last query
    steps = (used + (TILE - 1)) // TILE * (TILE // unit)
    token_at = reader(inputs.token, row)

    @pl.loop(0, (steps - first_step + (programs - 1)) // programs)
    def _gather(i):
      first = chunk * slots + (first_step + i * programs) * unit
      places = [first + j * at_once + own_row for j in range(AT_ONCE)]
      tokens = [token_at(place) for place in [*places, first + own]]
      rows = [
        [
          gather_bytes(ref.at[b], token, g * dim + part, groups * dim)
          for ref in (inputs.key, inputs.value)
        ]
        for token in tokens[:-1]
      ]
      score = reader(inputs.scores, b, g)(tokens[-1])
      for place, pair in zip(places, rows):
        for ref, words in zip((outputs.key, outputs.value), pair):
          scatter_bytes(ref.at[b, g], place, part, dim, words, place >= 0)
      scatter(outputs.score.at[b, g], first + own, score, own < unit)

  shape = batch, groups, places
  listed = jax.ShapeDtypeStruct((*shape, dim), key.dtype)
  out = GatherOutputs(listed, listed, jax.ShapeDtypeStruct(shape, jnp.float32))
  token, entered = lists.token.reshape(-1, places), lists.entered.reshape(-1, n)
  run = kernel(body, batch * groups, chunks * programs * LANES, name="gather_rows", out_type=[out])
  (rows,) = run(GatherInputs(key, value, scores, token, entered))
  return rows


def sum_rows(
  dkey: jax.Array, dvalue: jax.Array, rows: list[jax.Array], lists: Lists
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Adds the rows of listed tokens to those of the window.

  The programs of a head take the tokens that were ever selected in turn, a few at once, and sum the
  rows of each in the order of their chunks; the gradients of other tokens stay as they are.

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
  dtype, places_number = dkey.dtype, rows[0].shape[2]
  tokens = LANES * WORD // dim  # that a program serves at once
  programs = min(-(-n // tokens), -(-PROGRAMS // (batch * groups)))  # of a head

  def body(row, _, lane, totals, rows, lists):
    program, b, g = block_of(batch * groups), row // groups, row % groups
    number = lists.number[row, 0]
    _, own_row, part = _lane_parts(dim)
    old_place = reader(lists.old_place, row)

    # What a block of tokens needs is loaded in turn, while the blocks before it are summed.

    def index_of(i):
      return (program + i * programs) * tokens + own_row

    def load_token(i):
      return reader(lists.listed, row)(index_of(i))

    def load_counts(token):
      refs = lists.new_place, lists.old_begin, lists.old_count
      return (token, *(reader(ref, row)(token) for ref in refs))

    def load_places(counts):
      return *counts, tuple(old_place(counts[2] + j) for j in range(SUMMED))

    def load_row(place, there):
      """Loads the row of a place in the lanes where `there`. In the others a row is read too, and
      may hold anything.
      """
      place = jnp.where(there, place, 0)
      words = [gather_bytes(ref.at[b, g], place, part, dim) for ref in rows[:2]]
      return there, words, reader(rows.dscore, b, g)(place)

    def add(sums, loaded):
      there, words, score = loaded
      numbers = [*widen(words[0], dtype), *widen(words[1], dtype), score]
      return tuple(total + jnp.where(there, x, 0.0) for total, x in zip(sums, numbers))

    def add_old(first, times, begin, places, sums):
      loaded = [load_row(place, begin + j < times) for j, place in enumerate(places)]
      begin += SUMMED
      later = tuple(old_place(first + (begin + j)) for j in range(SUMMED))
      return begin, later, functools.reduce(add, loaded, sums)

    def sum_block(i, state):
      (token, new, first, times, places), counts, next_token = state
      state = load_places(counts), load_counts(next_token), load_token(i + 3)
      inside = index_of(i) < number
      where = [(ref.at[b], token, g * dim + part, groups * dim) for ref in totals[:2]]
      window_part = [gather_bytes(*at) for at in where]
      zeros = ((token - token).astype(jnp.float32),) * (2 * WORD + 1)
      sums = add(zeros, load_row(new, new < places_number))
      old = add_old(first, times, token - token, places, sums)
      *_, sums = lax.while_loop(
        lambda old: warp_any(old[0] < times), lambda old: add_old(first, times, *old), old
      )
      for k, (at, words) in enumerate(zip(where, window_part)):
        total = [x + y for x, y in zip(widen(words, dtype), sums[k * WORD :])]
        scatter_bytes(*at, narrow(total, dtype), inside)
      scatter(totals.dscore.at[b, g], token, sums[-1], inside & (part == 0))
      return state

    blocks = ((number + (tokens - 1)) // tokens - program + (programs - 1)) // programs

    @pl.when(blocks > 0)
    def _sum_blocks():
      state = load_places(load_counts(load_token(0))), load_counts(load_token(1)), load_token(2)
      lax.fori_loop(0, blocks, sum_block, state)

  dscore = jnp.zeros((batch, groups, n), jnp.float32)
  totals = Totals(*(jax.new_ref(x) for x in (dkey, dvalue, dscore)))
  flat = Places(*(getattr(lists, name).reshape(batch * groups, -1) for name in Places._fields))
  run = kernel(body, batch * groups, programs * LANES, name="sum_rows")
  run(totals, Rows(*rows), flat)
  dkey, dvalue, dscore = contents(*totals)
  return dkey, dvalue, dscore
