"""The kernel of decode_attention.py: what its programs do.

The k + window rows of a KV head are cut into parts, one a program, whose results the next product
joins (`Parts`). A warp reads 32 rows; a program has 1 to 4 warpgroups, all with the same role:

  every warp w of the program
  -----------------------------------------------------------------------------
  issue the loads of 32 keys and 32 values
  rotate the queries and the new key; round the new value
  in the row of the new token: put its key into the registers and the cache
  logits[32 rows, 8 heads] by tensor cores
  top[w] = largest logit of each head
  wait for `program` barrier
  weights[w] = exp(logits - largest of all warps); total[w] = their sum
  wait for `program` barrier
  in the row of the new token: put its value into the registers and the cache
  sums[w] = values, weighted
  wait for `program` barrier
  -----------------------------------------------------------------------------
  warpgroup 0: sum over the warps -> Parts of this program
  warpgroup 0 of part 0: score of the new token -> pending, moments

  The only barrier is `program`, the hardware barrier bar.sync 0 of all lanes. Programs do not wait
  for each other: each writes its own part of the results, and one of them has the new token's row.

  shared memory    shape                type      bytes for 4 warpgroups, 4 heads of 64 a KV head
  sums             warps, H / G, D      float32   16 KiB
  weights          warps, 32, 8         float32   16 KiB
  top              warps, 8             float32   512 B
  total            warps, 8             float32   512 B
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparsek.kernels.hopper.common import axis_index
from sparsek.kernels.hopper.decode_eviction import Rows
from sparsek.kernels.hopper.row_preparation import Ref
from sparsek.kernels.hopper.thread_ops import floats, gather, gather_bytes, scatter, scatter_bytes
from sparsek.kernels.hopper.thread_registers import (
  LANES,
  lane_index,
  multiply_add,
  narrow,
  shuffle_xor,
  widen,
)
from sparsek.kernels.hopper.thread_sync import sync_threads
from sparsek.kernels.sentinels import LOWEST, NOWHERE


class ScorerWeights(NamedTuple):
  """The arrays of Scorer, references in the kernel."""

  scale: Ref
  slope: Ref
  sink: Ref


class Inputs(NamedTuple):
  """Arrays in global memory, see `attend`; the first three are flat. The rows, without positions,
  are updated in place.
  """

  projected: Ref
  cos: Ref
  sin: Ref
  seen: Ref
  active: Ref
  rows: Rows
  scorer: ScorerWeights | None


class Outputs(NamedTuple):
  """Parts in global memory, flat."""

  sums: Ref
  top: Ref
  total: Ref


class Scratch(NamedTuple):
  """Shared memory, see the drawing above."""

  sums: Ref
  weights: Ref
  top: Ref
  total: Ref


class Options(NamedTuple):
  """Constants of the kernel.

  Attributes:
    batch, heads, dim, ring: as in `attend`.
    groups: KV heads.
    length: rows of the cache, `slots` of which hold selected tokens.
    dtype: of keys and values.
    columns: of `projected`.
    scorer: prior and per of Scorer.
    parts: number of parts of the rows, one a program.
    warpgroups: of a program.
  """

  batch: int
  heads: int
  groups: int
  length: int
  dim: int
  dtype: Any
  columns: int
  slots: int
  ring: bool
  scorer: tuple[float, int] | None
  parts: int
  warpgroups: int

  @property
  def window(self) -> int:
    return self.length - self.slots

  @property
  def ratio(self) -> int:
    """Query heads of a KV head."""
    return self.heads // self.groups

  @property
  def warps(self) -> int:
    return 4 * self.warpgroups

  @property
  def steps(self) -> int:
    """Sets of 32 columns of a key."""
    return self.dim // 32

  @property
  def lanes_of_row(self) -> int:
    """Lanes that read one value together, eight numbers each."""
    return self.dim // 8


class Program(NamedTuple):
  """References and coordinates that the steps of a program share.

  Attributes:
    key, value: the cache of its batch row and KV head.
    b, g, part, warpgroup: its coordinates.
    lane, in_warp: number of the lane in the warpgroup and in the warp.
    warp: number of the warp in the program.
    row, column: of the lane in the tensor cores' operands, 0 to 7 and 0 to 3.
    first_row: first row of the cache that each warp reads.
    seen: tokens before the new one.
    new_row: row of the cache for the new token.
    lives: whether there is a new token.
  """

  options: Options
  inputs: Inputs
  outputs: Outputs
  scratch: Scratch
  key: Ref
  value: Ref
  b: Any
  g: Any
  part: Any
  warpgroup: Any
  lane: jax.Array
  in_warp: jax.Array
  warp: jax.Array
  row: jax.Array
  column: jax.Array
  first_row: jax.Array
  seen: jax.Array
  new_row: jax.Array
  lives: jax.Array

  @property
  def zero(self) -> jax.Array:
    """0.0 in every lane."""
    return (self.lane * 0).astype(jnp.float32)

  def of_warps(self, ref: Ref, head: jax.Array) -> list[jax.Array]:
    """Loads what each warp has stored for a head."""
    return [gather(ref, self.lane * 0 + w * 8 + head) for w in range(self.options.warps)]


def _program(options: Options, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> Program:
  b, g, part, warpgroup = axis_index("row", "head", "part", "warpgroup")
  lane = lane_index()
  in_warp = lane & 31
  warp, row, column = warpgroup * 4 + (lane >> 5), (lane >> 2) & 7, lane & 3
  first_row = part * (options.warps * 32) + warp * 32
  seen = inputs.seen[b]
  key, value = inputs.rows.key.at[b, g], inputs.rows.value.at[b, g]
  new_row = options.slots + lax.rem(seen, jnp.int32(options.window))
  lives = ((lane * 0 + inputs.active[b]) > 0) & (
    (lane * 0 + seen) < (NOWHERE if options.slots or options.ring else options.length)
  )
  where, lanes = (b, g, part, warpgroup), (lane, in_warp, warp, row, column)
  memory = options, inputs, outputs, scratch, key, value
  return Program(*memory, *where, *lanes, first_row, seen, new_row, lives)


def kernel(options: Options, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
  """Attends to the rows of one part: the body of the kernel."""
  program = _program(options, inputs, outputs, scratch)
  # Everything that has to come from memory is loaded first.
  keys, values = _load_keys(program), _load_values(program)
  keys = _hide(program, keys)
  new = _new_token(program, values.column)
  logits = _logits(program, keys, new)
  _softmax(program, keys, logits)
  _weigh_values(program, values, new)

  @pl.when(program.warpgroup == 0)
  def store():
    _store(program)

  if options.scorer is not None:

    @pl.when((program.warpgroup == 0) & (program.part == 0))
    def score():
      _score(program)


class Keys(NamedTuple):
  """Keys of a warp in registers: 2 x 2 sets of eight rows, of each of which a lane holds one row.

  Attributes:
    rows: number in the cache.
    words: eight neighbours of each 32 columns, 16-bit numbers in four int32.
    visible: whether the query sees the row.
  """

  rows: list[list[jax.Array]]
  words: list[list[list[Any]]]
  visible: list[list[jax.Array]]


class Values(NamedTuple):
  """Values of a warp in registers: sets of rows, of which a lane holds eight neighbours from
  `column` on.
  """

  rows: list[jax.Array]
  column: jax.Array
  words: list[Any]


class NewToken(NamedTuple):
  """Words of the rotated queries and the new key, for each 32 columns, and of the new value."""

  query: list[Any]
  key: list[Any]
  value: list[Any]


def _load_keys(program: Program) -> Keys:
  options = program.options
  rows = [
    [program.first_row + m * 16 + half * 8 + program.row for half in range(2)] for m in range(2)
  ]
  words = [
    [
      [
        gather_bytes(program.key, row, program.column * 8 + s * 32, options.dim)
        for s in range(options.steps)
      ]
      for row in pair
    ]
    for pair in rows
  ]
  return Keys(rows, words, [])


def _load_values(program: Program) -> Values:
  dim, lanes_of_row = program.options.dim, program.options.lanes_of_row
  at_once = 32 // lanes_of_row  # rows that a warp reads at the same time
  rows = [
    program.first_row + i * at_once + program.in_warp // lanes_of_row for i in range(lanes_of_row)
  ]
  column = (program.in_warp & (lanes_of_row - 1)) * 8
  return Values(rows, column, [gather_bytes(program.value, row, column, dim) for row in rows])


def _hide(program: Program, keys: Keys) -> Keys:
  """Marks the keys that are visible: those whose row holds a token."""
  rows, score = keys.rows, program.inputs.rows.score
  visible = [[row <= program.options.slots + program.seen for row in pair] for pair in rows]
  if score is not None:
    of_head = lambda row: gather(score.at[program.b, program.g], row)
    visible = [
      [seen & (of_head(row) > -jnp.inf) for seen, row in zip(*pairs)]
      for pairs in zip(visible, rows)
    ]
  return keys._replace(visible=visible)


def _new_token(program: Program, column: jax.Array) -> NewToken:
  """Rotates the queries and the new key, and rounds them and the new value."""
  options, inputs = program.options, program.inputs
  dim, half = options.dim, options.steps // 2
  angles = [
    [floats(ref, program.b * (dim // 2) + s * 32 + program.column * 8, 8) for s in range(half)]
    for ref in (inputs.cos, inputs.sin)
  ]

  def load(head, s):
    index = program.b * options.columns + head * dim + s * 32 + program.column * 8
    return [y.astype(options.dtype).astype(jnp.float32) for y in floats(inputs.projected, index, 8)]

  def rotated(head):
    x = [load(head, s) for s in range(options.steps)]
    low = [[a * c - z * d for a, z, c, d in zip(*columns)] for columns in zip(x, x[half:], *angles)]
    high = [
      [z * c + a * d for a, z, c, d in zip(*columns)] for columns in zip(x, x[half:], *angles)
    ]
    return [narrow(y, options.dtype) for y in low + high]

  ratio = options.ratio
  query = rotated(program.g * ratio + jnp.minimum(program.row, ratio - 1))
  key = rotated(program.lane * 0 + options.heads + program.g)
  first = program.b * options.columns
  index = first + (options.heads + options.groups + program.g) * dim + column
  return NewToken(query, key, narrow(floats(inputs.projected, index, 8), options.dtype))


def _logits(program: Program, keys: Keys, new: NewToken) -> list[list[list[jax.Array]]]:
  """Computes the logits; stores the new key in the cache.

  Returns:
    For each set of eight rows the logits of the heads 2 * column and 2 * column + 1, LOWEST where
    the row is hidden.
  """
  options = program.options
  logits = []
  for m in range(2):
    words = keys.words[m]
    for half in range(2):
      is_new = (keys.rows[m][half] == program.new_row) & program.lives
      words[half] = [
        [jnp.where(is_new, x, y) for x, y in zip(*pair)] for pair in zip(new.key, words[half])
      ]
      for s in range(options.steps):
        column = program.column * 8 + s * 32
        scatter_bytes(program.key, keys.rows[m][half], column, options.dim, new.key[s], is_new)
    products: tuple[jax.Array, ...] = (program.zero,) * 4
    for s in range(options.steps):
      for i in (0, 2):
        operand = [words[half][s][j] for j in (i, i + 1) for half in range(2)]
        products = multiply_add(products, operand, new.query[s][i : i + 2], options.dtype)
    scale = options.dim**-0.5
    logits.append(
      [
        [jnp.where(keys.visible[m][half], products[2 * half + j] * scale, LOWEST) for j in range(2)]
        for half in range(2)
      ]
    )
  return logits


def _over_rows(x: jax.Array, join: Callable) -> jax.Array:
  """Reduces a number over the eight rows of a warp's operand."""
  for distance in (4, 8, 16):
    x = join(x, shuffle_xor(x, distance))
  return x


def _softmax(program: Program, keys: Keys, logits: list[list[list[jax.Array]]]) -> None:
  """Computes the largest logit, the weights and their sum, in shared memory."""
  scratch, row, column = program.scratch, program.row, program.column
  for j in range(2):
    top = jnp.maximum(*(jnp.maximum(*(logits[m][half][j] for half in range(2))) for m in range(2)))
    scatter(scratch.top, program.warp * 8 + column * 2 + j, _over_rows(top, jnp.maximum), row == 0)
  sync_threads()
  for j in range(2):
    top = _fold(jnp.maximum, program.of_warps(scratch.top, column * 2 + j))
    total = program.zero
    for m in range(2):
      for half in range(2):
        weight = jnp.where(keys.visible[m][half], jnp.exp(logits[m][half][j] - top), 0.0)
        total = total + weight
        index = (program.warp * 32 + m * 16 + half * 8 + row) * 8 + column * 2 + j
        scatter(scratch.weights, index, weight, program.lane >= 0)
    scatter(scratch.total, program.warp * 8 + column * 2 + j, _over_rows(total, jnp.add), row == 0)
  sync_threads()


def _weigh_values(program: Program, values: Values, new: NewToken) -> None:
  """Computes the weighted sums of the values, in shared memory; stores the new value in the
  cache.
  """
  options, scratch, column = program.options, program.scratch, values.column
  ratio, dim = options.ratio, options.dim
  sums = [[program.zero] * 8 for _ in range(ratio)]
  for row, words in zip(values.rows, values.words):
    is_new = (row == program.new_row) & program.lives
    scatter_bytes(program.value, row, column, dim, new.value, is_new)
    x = widen([jnp.where(is_new, y, z) for y, z in zip(new.value, words)], options.dtype)
    weights = [
      w
      for i in range(0, -(-ratio // 4) * 4, 4)
      for w in floats(scratch.weights, (program.warp * 32 + row - program.first_row) * 8 + i, 4)
    ]
    sums = [[y + w * z for y, z in zip(total, x)] for total, w in zip(sums, weights)]
  for h in range(ratio):
    for i in range(8):
      total, distance = sums[h][i], options.lanes_of_row
      while distance < 32:
        total, distance = total + shuffle_xor(total, distance), 2 * distance
      index = (program.warp * ratio + h) * dim + column + i
      scatter(scratch.sums, index, total, program.in_warp < options.lanes_of_row)
  sync_threads()


def _store(program: Program) -> None:
  """Adds the sums of all warps, and stores them: the role of the first warpgroup."""
  options, scratch, lane = program.options, program.scratch, program.lane
  ratio, dim, heads = options.ratio, options.dim, options.heads
  for start in range(0, ratio * dim, LANES):
    total = _fold(
      jnp.add, [gather(scratch.sums, w * ratio * dim + start + lane) for w in range(options.warps)]
    )
    row = program.part * options.batch + program.b
    index = row * (heads * dim) + program.g * (ratio * dim) + start + lane
    scatter(program.outputs.sums, index, total, lane >= 0)
  head = jnp.minimum(lane, ratio - 1)
  row = program.part * options.batch + program.b
  index = row * heads + program.g * ratio + head
  total = _fold(jnp.add, program.of_warps(scratch.total, head))
  if options.scorer is None and not options.ring:
    # A token beyond the last row makes the output NaN, not silently wrong.
    total = jnp.where(lane * 0 + program.seen < options.length, total, jnp.nan)
  top = _fold(jnp.maximum, program.of_warps(scratch.top, head))
  scatter(program.outputs.top, index, top, lane < ratio)
  scatter(program.outputs.total, index, total, lane < ratio)


def _score(program: Program) -> None:
  """Computes the score of the new token and the next moments: the role of the first warpgroup of
  the first part.

  These are the formulas of ScoringNetwork.stream, without the terms that are 0 or 1 for one token.
  """
  options, inputs, lane = program.options, program.inputs, program.lane
  rows, weights, b, g, seen = inputs.rows, inputs.scorer, program.b, program.g, program.seen
  assert options.scorer is not None and weights is not None
  assert rows.moments is not None and rows.pending is not None
  prior, per = options.scorer

  def load(ref, index):
    return gather(ref, lane * 0 + index)

  first = (options.heads + 2 * options.groups) * options.dim
  logit = _fold(
    jnp.add,
    [
      load(inputs.projected, b * options.columns + first + i * options.groups + g) for i in range(3)
    ],
  )
  mean, deviation, *rests = (load(ref.at[b], g) for ref in rows.moments)
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
  writes = program.lives & (lane == 0)
  index = lane * 0 + lax.rem(seen, jnp.int32(options.window))
  scatter(rows.pending.at[b, g], index, score, writes)
  for ref, x in zip(rows.moments, (*after, *rests)):
    scatter(ref.at[b], lane * 0 + g, x, writes)


def _fold(join: Callable, terms: Sequence[jax.Array]) -> jax.Array:
  total, *rest = terms
  for x in rest:
    total = join(total, x)
  return total
