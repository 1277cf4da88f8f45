"""Steps of decode_attention_kernel.py for the new token: its queries and its key are rotated, it is
scored, the token that it replaces is chosen, and it is written to the cache.

Nothing is written that another warp may still have to read:

  before the loop over the rows   score, position of the token that leaves the window -> its slot;
                                  score of the new token -> pending, moments
  after it                        key, value of the token that leaves the window -> its slot;
                                  of the new token -> its row
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels.hopper.decode_attention_program import Team
from sparsek.kernels.hopper.decode_eviction import worst_of_all, worst_slot
from sparsek.kernels.hopper.row_preparation import Ref
from sparsek.kernels.hopper.thread_ops import floats, gather, gather_bytes, scatter, scatter_bytes
from sparsek.kernels.hopper.thread_registers import LANES, narrow


class NewToken(NamedTuple):
  """The rotated queries and the new key, words of eight columns for each 32, and the new value,
  words of eight columns for each 64.
  """

  query: list[Any]
  key: list[Any]
  value: list[Any]


class Change(NamedTuple):
  """The change of a cache by the new token.

  Attributes:
    hidden: row that is not attended to: of the token that is given up, or of none.
    slot: where the token that leaves the window goes.
    enters: whether it goes there.
  """

  hidden: jax.Array
  slot: jax.Array
  enters: jax.Array


def new_token(team: Team) -> NewToken:
  """Rotates the queries and the new key, and rounds them and the new value."""
  options, inputs = team.options, team.inputs
  dim, half = options.dim, options.steps // 2
  angles = [
    [floats(ref, team.b * (dim // 2) + s * 32 + team.column * 8, 8) for s in range(half)]
    for ref in (inputs.cos, inputs.sin)
  ]

  def load(head, s):
    index = team.b * options.columns + head * dim + s * 32 + team.column * 8
    return [y.astype(options.dtype).astype(jnp.float32) for y in floats(inputs.projected, index, 8)]

  def rotated(head):
    x = [load(head, s) for s in range(options.steps)]
    low = [[a * c - z * d for a, z, c, d in zip(*columns)] for columns in zip(x, x[half:], *angles)]
    high = [
      [z * c + a * d for a, z, c, d in zip(*columns)] for columns in zip(x, x[half:], *angles)
    ]
    return [narrow(y, options.dtype) for y in low + high]

  ratio = options.ratio
  query = rotated(team.g * ratio + jnp.minimum(team.row, ratio - 1))
  key = rotated(team.lane * 0 + options.heads + team.g)
  first = team.b * options.columns + (options.heads + options.groups + team.g) * dim
  value = [
    narrow(floats(inputs.projected, first + i * 64 + team.row * 8, 8), options.dtype)
    for i in range(dim // 64)
  ]
  return NewToken(query, key, value)


def update_scores(team: Team, new: NewToken) -> Change:
  """Scores the new token, lets the token that leaves the window enter the slots, and marks the rows
  that hold a token in shared memory.
  """
  options, rows, lane = team.options, team.inputs.rows, team.lane
  new_row = lane * 0 + team.new_row
  _stage(team, new)
  if options.scorer is None:
    return Change(new_row, new_row, lane < 0)
  store_score = _score(team)
  _mark_alive(team)
  change = Change(new_row, new_row, lane < 0)
  if options.evicts:
    assert rows.score is not None and rows.position is not None and rows.pending is not None
    score, position = (ref.at[team.b, team.g] for ref in (rows.score, rows.position))
    arriving = gather(rows.pending.at[team.b, team.g], new_row - options.slots)
    may_enter = team.lives & (lane * 0 + team.seen >= options.window)
    arriving = jnp.where(may_enter, arriving, -jnp.inf)
    first = team.warpgroup * LANES + lane
    worst = worst_slot(score, position, options.slots, first, options.warpgroups * LANES)
    worst = worst_of_all(team.scratch.worst, worst, first, options.warps, team.wait)
    enters = arriving > worst.score
    change = Change(jnp.where(enters, worst.slot, new_row), worst.slot, enters)
    writes = enters & (first == 0)
    scatter(score, worst.slot, arriving, writes)
    scatter(position, worst.slot, lane * 0 + (team.seen - options.window), writes)
  else:
    team.wait()
  store_score()
  return change


def _stage(team: Team, new: NewToken) -> None:
  """Puts what `update_rows` writes into shared memory: key and value of the token that leaves the
  window, then of the new token.
  """
  options, staged, lane = team.options, team.scratch.staged, team.lane
  column, dim = team.column, options.dim
  writes = team.leads & (team.row == 0)
  for s in range(options.steps):
    scatter_bytes(staged, lane * 0 + 2, column * 8 + s * 32, dim, new.key[s], writes)
  writes = team.leads & (column == 0)
  for i, words in enumerate(new.value):
    scatter_bytes(staged, lane * 0 + 3, team.row * 8 + i * 64, dim, words, writes)
  if options.evicts:
    part = (lane & (dim // 8 - 1)) * 8
    writes = (team.warpgroup * LANES + lane) < dim // 8
    for i, ref in enumerate((team.key, team.value)):
      words = gather_bytes(ref, lane * 0 + team.new_row, part, dim)
      scatter_bytes(staged, lane * 0 + i, part, dim, words, writes)


def update_rows(team: Team, change: Change) -> None:
  """Writes keys and values to the cache, once no warp of the program reads it any more: the role of
  the first warpgroup of the first part.
  """
  options, lane = team.options, team.lane
  pieces = options.dim // 8
  which, part = lane // pieces, (lane & (pieces - 1)) * 8
  words = gather_bytes(team.scratch.staged, which & 3, part, options.dim)
  row = jnp.where(which < 2, change.slot, lane * 0 + team.new_row)
  writes = (team.lives & (which >= 2)) | (change.enters & (which < 2))
  for i, ref in enumerate((team.key, team.value)):
    scatter_bytes(ref, row, part, options.dim, words, writes & (which < 4) & ((which & 1) == i))


def _mark_alive(team: Team) -> None:
  """Writes 1 for each row of the part that holds a token, in the order in which `alive_rows` reads
  them, 0 for others.
  """
  options, scores = team.options, team.inputs.rows.score
  assert scores is not None
  score = scores.at[team.b, team.g]
  for start in range(0, options.rows_of_part, options.warpgroups * LANES):
    row = start + team.warpgroup * LANES + team.lane
    in_cache = team.part * options.rows_of_part + row
    lives = (in_cache <= options.slots + team.seen) & (gather(score, in_cache) > -jnp.inf)
    inner = row & (options.chunk - 1)
    place = ((inner >> 1) & 3) * (options.chunk // 4) + (inner >> 3) * 2 + (inner & 1)
    scatter(team.scratch.alive, row - inner + place, lives.astype(jnp.float32), row >= 0)


def visible_rows(team: Team, chunk: Any, hidden: jax.Array) -> list[jax.Array]:
  """Returns whether the query sees the rows 2 * column and 2 * column + 1 of every eight rows of a
  chunk.
  """
  options, first = team.options, team.first_row(chunk)
  count = options.chunk // 4
  inner = [8 * (i // 2) + i % 2 for i in range(count)]
  rows = [team.part * options.rows_of_part + first + 2 * team.column + place for place in inner]
  if options.scorer is None:
    return [(row <= team.seen) & (row != hidden) for row in rows]
  alive = floats(team.scratch.alive, first + team.column * count, count)
  return [(x > 0) & (row != hidden) for x, row in zip(alive, rows)]


def _score(team: Team) -> Callable[[], None]:
  """Computes the score of the new token and the next moments; returns the function that stores
  them, in one lane of the first part.

  These are the formulas of ScoringNetwork.stream, without the terms that are 0 or 1 for one token.
  """
  options, inputs, lane = team.options, team.inputs, team.lane
  rows, weights, b, g, seen = inputs.rows, inputs.scorer, team.b, team.g, team.seen
  assert options.scorer is not None and weights is not None
  assert rows.moments is not None and rows.pending is not None
  moments, pending = rows.moments, rows.pending
  prior, per = options.scorer

  def load(ref: Ref, index: Any) -> jax.Array:
    return gather(ref, lane * 0 + index)

  first = b * options.columns + (options.heads + 2 * options.groups) * options.dim + g
  logit, *others = (load(inputs.projected, first + i * options.groups) for i in range(3))
  for x in others:
    logit = logit + x
  mean, deviation, *rests = (load(ref.at[b], g) for ref in moments)
  before = (lane * 0 + seen).astype(jnp.float32)
  delta, share = logit - mean, 1 / (before + 1)
  steps = delta * share + rests[0], delta * delta * before * share + rests[1]
  after = mean + steps[0], deviation + steps[1]
  rests = [step - (x - old) for step, x, old in zip(steps, after, (mean, deviation))]
  scaled = (logit - after[0]) * lax.rsqrt((after[1] + prior) / (before + 1 + prior))
  score = (
    load(weights.scale, g) * scaled
    + load(weights.slope, g) * (before / per)
    + jnp.where(lane * 0 + seen == 0, load(weights.sink, g), 0.0)
  )
  writes = team.lives & team.leads & (lane == 0)

  def store():
    index = lane * 0 + lax.rem(seen, jnp.int32(options.window))
    scatter(pending.at[b, g], index, score, writes)
    for ref, x in zip(moments, (*after, *rests)):
      scatter(ref.at[b], lane * 0 + g, x, writes)

  return store
