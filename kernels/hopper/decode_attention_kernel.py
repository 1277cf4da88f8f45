"""Kernel of decode_attention.py: what its programs do.

A team of 1 to 4 warpgroups, all with the same role, attends to the rows of one KV head, or to a
part of them where there are too few heads for the machine; the next product joins the parts
(`Parts`). A program has as many teams as fill a multiprocessor; they share nothing.

  every warp w of a team
  -----------------------------------------------------------------------------
  issue the loads of the first chunk: 16 or 32 keys and values
  rotate the queries and the new key; score the new token; choose the token that
    it replaces: decode_new_token.py
  wait for `team` barrier
  for each chunk:
    logits = queries times keys, by tensor cores; issue the next loads of keys
    top = largest logit so far; weights = exp(logits - top), rounded
    sums = sums, scaled, + values times weights, by tensor cores; issue the next
      loads of values
  top[w] = top
  wait for `team` barrier
  total[w], sums[w] = both, relative to the largest logit of all warps
  wait for `team` barrier
  -----------------------------------------------------------------------------
  warpgroup 0: sum over the warps -> attention, or Parts of it
  warpgroup 0 of part 0: keys and values that move -> cache

  The only barriers are `team`, the hardware barriers bar.sync 1 to 4, one a team. Teams do not wait
  for each other: each writes its own part of the results. The first warp of part 0 begins with the
  new token, whose row of the cache holds another token until the end.

  shared memory    shape                type      bytes for 4 teams of 1 warpgroup, 1024 rows,
                                                  4 heads of 64
  sums             warps, H / G, D      float32   16 KiB
  top, total       warps, 8             float32   512 B each
  alive            teams, rows          float32   16 KiB; whether a row of the part holds a token
  staged           teams, 4, D          16 bit    2 KiB; keys and values that move
  worst            warps                float32, int32, int32   192 B; score, position and index
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparsek.kernels.hopper.decode_attention_program import (
  Inputs,
  Options,
  Outputs,
  Scratch,
  Team,
  team_here,
)
from sparsek.kernels.hopper.decode_new_token import (
  NewToken,
  new_token,
  update_rows,
  update_scores,
  visible_rows,
)
from sparsek.kernels.hopper.thread_ops import gather, gather_bytes, scatter, scatter_bytes
from sparsek.kernels.hopper.thread_registers import (
  LANES,
  multiply_add,
  narrow,
  shuffle_from,
  shuffle_xor,
  widen,
)
from sparsek.kernels.sentinels import LOWEST


class State(NamedTuple):
  """State of a warp's loop over its chunks.

  Attributes:
    keys: words of the chunk's keys: for each eight rows, of which a lane holds one, and each 32
      columns eight neighbours, 16-bit numbers in four int32.
    values: for each 16 rows, of which a lane holds four, and each 64 columns eight neighbours.
    top: the largest logit so far of the lane's head, which is its `row`.
    total: sum of the weights of the lane's rows.
    sums: values, weighted: for each 64 columns four results of `multiply_add`, which hold of the
      columns 8 * row + 2 i and 8 * row + 2 i + 1 those of the heads 2 * column and 2 * column + 1.
  """

  keys: list[list[tuple]]
  values: list[list[list[tuple]]]
  top: jax.Array
  total: jax.Array
  sums: list[list[tuple]]


def kernel(options: Options, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
  """Attends to the rows of one part: the body of the kernel."""
  team = team_here(options, inputs, outputs, scratch)
  # What has to come from memory is loaded first.
  keys, values = _load_keys(team, 0), _load_values(team, 0)
  new = new_token(team)
  change = update_scores(team, new)
  state = _with_new_token(team, new, keys, values)
  attend = functools.partial(_attend, team, new.query, change.hidden)
  last = options.chunks - 1
  if last:
    state = lax.fori_loop(0, last, functools.partial(attend, False), state)
  _join_warps(team, attend(True, last, state))

  @pl.when(team.warpgroup == 0)
  def store():
    _store(team)

  @pl.when((team.warpgroup == 0) & (team.part == 0))
  def update():
    update_rows(team, change)


def _load_keys(team: Team, chunk: Any) -> list[list[tuple]]:
  options, column = team.options, team.column * 8
  first = team.part * options.rows_of_part + team.first_row(chunk) + team.row
  return [
    [
      gather_bytes(team.key, first + start, column + s * 32, options.dim)
      for s in range(options.steps)
    ]
    for start in range(0, options.chunk, 8)
  ]


def _load_values(team: Team, chunk: Any) -> list[list[list[tuple]]]:
  options, column = team.options, team.row * 8
  first = team.part * options.rows_of_part + team.first_row(chunk) + team.column * 2
  return [
    [
      [
        gather_bytes(team.value, first + start + place, column + i, options.dim)
        for place in (0, 1, 8, 9)
      ]
      for i in range(0, options.dim, 64)
    ]
    for start in range(0, options.chunk, 16)
  ]


def _times_queries(team: Team, query: list[Any], words: list[tuple]) -> tuple:
  """Returns the products of eight keys with the queries, as `multiply_add` does: of head `row`
  those with the keys 2 * column and 2 * column + 1.
  """
  none = team.lane * 0
  products: tuple[jax.Array, ...] = (team.zero,) * 4
  for s in range(team.options.steps):
    for i in (0, 2):
      operand = query[s][i], none, query[s][i + 1], none
      products = multiply_add(products, operand, words[s][i : i + 2], team.options.dtype)
  return products


def _with_new_token(team: Team, new: NewToken, keys: list, values: list) -> State:
  """Returns the state before the first chunk: of the new token in the warp that leads, of none in
  others.
  """
  options, leads, zero = team.options, team.leads, team.zero
  logit = _times_queries(team, new.query, new.key)[0] * options.dim**-0.5
  sums = []
  for words in new.value:
    x = [jnp.where(leads, y, 0.0) for y in widen(words, options.dtype)]
    sums.append([(x[i], x[i], x[i + 1], x[i + 1]) for i in range(0, 8, 2)])
  total = jnp.where(leads & (team.column == 0), 1.0, zero)
  return State(keys, values, jnp.where(leads, logit, LOWEST), total, sums)


def _attend(
  team: Team, query: list[Any], hidden: jax.Array, is_last: bool, chunk: Any, state: State
) -> State:
  """Adds a chunk to the sums, and loads the next one."""
  options = team.options
  visible = visible_rows(team, chunk, hidden)
  products = [x for words in state.keys for x in _times_queries(team, query, words)[:2]]
  scale = options.dim**-0.5
  logits = [jnp.where(sees, x * scale, LOWEST) for sees, x in zip(visible, products)]
  keys = state.keys if is_last else _load_keys(team, chunk + 1)
  top = _fold(jnp.maximum, [state.top, *logits])
  for distance in (1, 2):
    top = jnp.maximum(top, shuffle_xor(top, distance))
  # A warp that has seen no row yet sums rows that are hidden; its next top, or that of another
  # warp, makes this 0.
  weights, shrink = [jnp.exp(x - top) for x in logits], jnp.exp(state.top - top)
  words = narrow(weights, options.dtype)
  sums = _scaled(team, state.sums, shrink)
  for i, rows in enumerate(state.values):
    for columns, of_rows in zip(sums, rows):
      for c, x in enumerate(columns):
        of = [row[c] for row in of_rows]
        operand = [_pair(of[j], of[j + 1], half) for j in (0, 2) for half in range(2)]
        columns[c] = multiply_add(x, operand, words[2 * i : 2 * i + 2], options.dtype)
  values = state.values if is_last else _load_values(team, chunk + 1)
  return State(keys, values, top, _fold(jnp.add, [state.total * shrink, *weights]), sums)


def _scaled(team: Team, sums: list[list[tuple]], factor: jax.Array) -> list[list[tuple]]:
  """Returns the sums times the factor, which each lane has for the head `row`."""
  a, b = (shuffle_from(factor, team.column * 8 + 4 * i) for i in range(2))
  return [[(w * a, x * b, y * a, z * b) for w, x, y, z in columns] for columns in sums]


def _pair(a: jax.Array, b: jax.Array, half: int) -> jax.Array:
  """Returns the low or high 16 bits of a, and above them those of b."""
  return (((a >> 16) & 0xFFFF) | (b & -65536)) if half else ((a & 0xFFFF) | (b << 16))


def _join_warps(team: Team, state: State) -> None:
  """Puts the largest logit of each warp, its sums and the sum of its weights into shared memory,
  both relative to the largest logit of all warps.
  """
  options, scratch, row = team.options, team.scratch, team.row
  place, is_first = team.warp * 8 + row, team.column == 0
  scatter(scratch.top, place, state.top, is_first)
  team.wait()
  shrink = jnp.exp(state.top - _fold(jnp.maximum, team.of_warps(scratch.top, row)))
  total = state.total * shrink
  for distance in (1, 2):
    total = total + shuffle_xor(total, distance)
  scatter(scratch.total, place, total, is_first)
  for i, columns in enumerate(_scaled(team, state.sums, shrink)):
    for j in range(2):
      head = 2 * team.column + j
      index = team.warp * options.ratio + jnp.minimum(head, options.ratio - 1)
      for c in (0, 2):
        words = [
          lax.bitcast_convert_type(x, jnp.int32)
          for column in columns[c : c + 2]
          for x in column[j::2]
        ]
        at = row * 8 + i * 64 + c * 2
        scatter_bytes(scratch.sums, index, at, options.dim, words, head < options.ratio)
  team.wait()


def _store(team: Team) -> None:
  """Adds the sums of all warps, and stores them: the role of the first warpgroup."""
  options, scratch, outputs, lane = team.options, team.scratch, team.outputs, team.lane
  ratio, dim, heads = options.ratio, options.dim, options.heads
  row, size = team.part * options.batch + team.b, ratio * dim

  def total_of(head):
    total = _fold(jnp.add, team.of_warps(scratch.total, head))
    if options.scorer is not None or options.ring:
      return total
    # A token beyond the last row makes the output NaN, not silently wrong.
    return jnp.where(lane * 0 + team.seen < options.length, total, jnp.nan)

  for start in range(0, size, LANES):
    inside = jnp.minimum(lane + start, size - 1)
    value = _fold(jnp.add, [gather(scratch.sums, w * size + inside) for w in range(options.warps)])
    if options.is_whole:
      value = (value / total_of(inside // dim)).astype(options.dtype)
    index = row * (heads * dim) + team.g * size + inside
    scatter(outputs.sums, index, value, lane + start < size)
  if outputs.top is not None:
    head = jnp.minimum(lane, ratio - 1)
    index = row * heads + team.g * ratio + head
    top = _fold(jnp.maximum, team.of_warps(scratch.top, head))
    scatter(outputs.top, index, top, lane < ratio)
    scatter(outputs.total, index, total_of(head), lane < ratio)


def _fold(join: Callable, terms: Sequence[jax.Array]) -> jax.Array:
  total, *rest = terms
  for x in rest:
    total = join(total, x)
  return total
