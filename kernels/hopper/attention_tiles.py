"""Tiles of keys and values that a block of queries visits: what the forward kernel and the kernel
for the gradients of queries share.

A program's tiles come in steps, through circular buffers:

  step   0            ...  in_window - 1 | in_window  ...  steps - 1
  tile   newest       ...                | begin      ...
         of the window, latest first     | of the list of the block's chunk
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.hopper.common import (
  BLOCK_Q,
  COLUMN,
  HALF,
  LOG2_E,
  ROW,
  Ref,
  Registers,
  axis_index,
  by_column,
  by_row,
  observe_last,
  slot_of,
  split_number,
)


class Listed(NamedTuple):
  """Rows of the tokens in the lists of all chunks, [B, G, places, ...]: arrays or, in a kernel,
  references.

  Attributes:
    key, value: [..., D].
    score: float32.
    last: int32, first query that does not select the token any more.
  """

  key: Any
  value: Any
  score: Any
  last: Any


class Options(NamedTuple):
  """Everything that is known when one of the two kernels is compiled."""

  grid: dict[str, int]
  repeats: int  # query heads of a KV head
  dim: int
  dtype: Any
  gate: str
  scale: float  # of the logits, not negative
  chunk: int  # queries of a list
  slots: int  # of a list
  skip: int  # tokens before the first query, a multiple of BLOCK_Q
  block_kv: int  # keys of a tile
  stages: int  # tiles of the circular buffer of keys
  value_stages: int  # of that of values
  interpret: object  # parameters of the interpreter, or None

  @property
  def shape(self) -> tuple[int, int]:
    """Queries (of a warpgroup) and keys of a tile."""
    return HALF, self.block_kv

  @property
  def own_tiles(self) -> int:
    """Tiles that hold the tokens of a block of queries."""
    return BLOCK_Q // self.block_kv

  @property
  def to_log2(self) -> float:
    """The factor from products of queries and keys to logits to base 2."""
    return self.scale * LOG2_E

  @property
  def registers(self) -> Registers:
    """Operations on registers."""
    return Registers(self.interpret)


def options_of(
  query: jax.Array,
  key: jax.Array,
  listed: Listed,
  *,
  chunk: int,
  stages: int,
  value_stages: int | None = None,
  **others: Any,
) -> Options:
  """Returns the options for these shapes; `others` are the fields that shapes do not give.

  By default values have as many stages as keys.
  """
  (batch, queries, heads, dim), n = query.shape, key.shape[1]
  return Options(
    grid={"batch": batch, "block": queries // BLOCK_Q, "head": heads},
    repeats=heads // key.shape[2],
    dim=dim,
    dtype=query.dtype,
    chunk=chunk,
    slots=listed.key.shape[2] // (n // chunk),
    skip=n - queries,
    stages=stages,
    value_stages=stages if value_stages is None else value_stages,
    **others,
  )


class Position(NamedTuple):
  """The part of the problem that belongs to a warpgroup of a program."""

  b: Any  # row of the batch
  block: Any  # of BLOCK_Q tokens, those of the queries
  h: Any  # query head
  warpgroup: Any
  g: Any  # KV head
  first_row: Any  # first token of the block
  list_start: Any  # first place of the list of the block's chunk


def position(options: Options, number: Any = None) -> Position:
  """Returns which part of the problem belongs to this warpgroup in the place of that number in
  `options.grid`, by default the program's.
  """
  number = axis_index("program") if number is None else number
  (b, block, h), warpgroup = split_number(number, **options.grid), axis_index("warpgroup")
  g = lax.div(h, jnp.array(options.repeats, h.dtype))
  block += options.skip // BLOCK_Q
  first_row = block * BLOCK_Q
  list_start = lax.div(first_row, jnp.array(options.chunk, first_row.dtype)) * options.slots
  return Position(b, block, h, warpgroup, g, first_row, list_start)


def newest_tile(options: Options, at: Position) -> Any:
  """Returns the latest tile of the window, the last one that holds the block's own tokens."""
  return (at.block + 1) * options.own_tiles - 1


class Steps(NamedTuple):
  """The tiles that a program visits, see the drawing above.

  Attributes:
    newest: the latest tile of the window.
    in_window: number of tiles of the window.
    begin: first tile of the list.
    steps: number of all tiles.
  """

  newest: Any
  in_window: Any
  begin: Any
  steps: Any


class Buffers(NamedTuple):
  """Circular buffers of tiles in shared memory, and their barriers.

  A tile's `last` and `score` come with its keys. The scores of a gate that does not need them are
  not loaded.
  """

  key: Ref
  value: Ref
  last: Ref
  score: Ref
  key_full: Ref
  value_full: Ref
  key_free: Ref
  value_free: Ref


def buffers_of(scratch: Any) -> Buffers:
  """Returns the circular buffers among a kernel's shared memory."""
  return Buffers(*(getattr(scratch, name) for name in Buffers._fields))


def load_tiles(
  options: Options,
  at: Position,
  find_tiles: Callable[[], Steps],
  buffers: Buffers,
  key: Ref,
  value: Ref,
  listed: Listed,
  *,
  scores: bool,
  before: Any = 0,
  is_last: bool = True,
) -> Any:
  """Loads all tiles, each as soon as the computing warpgroups have read what lay in its slot.

  Args:
    options, at, buffers: see Options, Position and Buffers.
    find_tiles: reads which tiles, called when the loads of the block's own ones have begun.
    key, value: [B, n, G, D], of all tokens.
    listed: those of the lists.
    scores: whether to load the scores too.
    before: number of tiles that the program has loaded before.
    is_last: whether the program loads no others.

  Returns:
    How many the program has loaded then.
  """

  newest = newest_tile(options, at)

  def load(step, tiles=None):
    slot, reused = slot_of(before + step, options.stages)
    value_slot, value_reused = slot_of(before + step, options.value_stages)
    near = tiles is None or step < tiles.in_window
    far = tiles is not None and step >= tiles.in_window
    tile = newest - step if tiles is None else jnp.maximum(newest - step, 0)
    tokens = pl.ds(tile * options.block_kv, options.block_kv)
    tile = 0 if tiles is None else jnp.where(far, tiles.begin + step - tiles.in_window, 0)
    places = pl.ds(at.list_start + tile * options.block_kv, options.block_kv)

    def load_rows(token_ref, list_ref, buffer, full):
      @pl.when(near)
      def _from_window():
        plgpu.copy_gmem_to_smem(token_ref.at[at.b, tokens, at.g], buffer, full)

      @pl.when(far)
      def _from_list():
        plgpu.copy_gmem_to_smem(list_ref.at[at.b, at.g, places], buffer, full)

    full = buffers.key_full.at[slot]
    pl.when(reused)(lambda: plgpu.barrier_wait(buffers.key_free.at[slot]))
    load_rows(key, listed.key, buffers.key.at[slot], full)
    plgpu.copy_gmem_to_smem(listed.last.at[at.b, at.g, places], buffers.last.at[slot], full)
    if scores:
      plgpu.copy_gmem_to_smem(listed.score.at[at.b, at.g, places], buffers.score.at[slot], full)
    pl.when(value_reused)(lambda: plgpu.barrier_wait(buffers.value_free.at[value_slot]))
    full = buffers.value_full.at[value_slot]
    load_rows(value, listed.value, buffers.value.at[value_slot], full)

  for step in range(options.own_tiles):
    load(step)
  tiles = find_tiles()
  pl.loop(options.own_tiles, tiles.steps)(lambda step: load(step, tiles))
  loaded = before + tiles.steps
  if is_last:
    observe_last(options.interpret, loaded, options.stages, buffers.key_free)
    observe_last(options.interpret, loaded, options.value_stages, buffers.value_free)
  return loaded


class Pairs(NamedTuple):
  """Pairs of queries and keys in registers.

  Attributes:
    registers: operations on registers.
    shape: queries (of a warpgroup) and keys.
  """

  registers: Registers
  shape: tuple[int, int]


def live_pairs(
  options: Options | Pairs,
  first_query: jax.Array,
  tile: jax.Array,
  *,
  is_list: bool,
  exits: bool,
  enters: bool,
  last: Ref,
  window_start: Ref,
  entered: Ref,
) -> jax.Array | None:
  """Returns which pairs of a tile are live, or None where all are.

  Args:
    options: the operations on registers, and the shape of the tile.
    first_query: first query of the warpgroup.
    tile: number among the tiles of the window or, where `is_list`, of the list.
    is_list: whether the tile is of the list.
    exits, enters: whether some pairs may be dead because the token has left, or has not come yet.
    last: of the tile's tokens, in shared memory.
    window_start, entered: of the warpgroup's queries, in shared memory.
  """
  registers, shape = options.registers, options.shape
  live = None
  if is_list and exits:
    live = by_column(registers.vector(last, COLUMN), shape) > (
      registers.index(shape, 0) + first_query
    )
  elif exits:
    column = registers.index(shape, 1)
    live = column >= by_row(registers.vector(window_start, ROW) - tile * shape[1], shape)
  if enters:
    column = registers.index(shape, 1)
    if is_list:
      here = column < by_row(registers.vector(entered, ROW) - tile * shape[1], shape)
    else:
      here = column + tile * shape[1] <= registers.index(shape, 0) + first_query
    live = here if live is None else jnp.logical_and(live, here)
  return live
