"""Tiles of keys and values that a block of 64 queries visits: what the forward kernel and the
kernel for the gradients of queries share.

A program is one warpgroup. Its tiles come in steps, through circular buffers:

  step   0            ...  in_window - 1 | in_window  ...  steps - 1
  tile   newest       ...                | begin      ...
         of the window, latest first     | of the list of the block's chunk

Copies are asynchronous (cp.async), in groups: the keys of step 0, its values, the keys of step 1,
and so on. With `stages` slots of keys and of values, 2 stages - 1 groups are on their way:

  keys of step j                               values of step j
  wait for their group, for all warps          wait for their group, for all warps
  begin to copy the values of j + stages - 1   begin to copy the keys of j + stages
  compute                                      compute

Each copy goes where all warps have read before the wait.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.ampere.warp_matrices import Matrices
from sparsek.kernels.ampere.warp_products import BLOCK
from sparsek.kernels.hopper.attention_tiles import Listed
from sparsek.kernels.hopper.common import (
  LOG2_E,
  Ref,
  axis_index,
  read_bounds,
  split_number,
  with_names,
)


def parts_of(gate: str, is_list: bool) -> list[Any]:
  """Returns the slices of a tile's keys or queries whose gradients are computed at once. They are
  short to save registers, of which gates take more.
  """
  size = 16 if is_list and gate != "straight_through" else 32
  return [pl.ds(i, size) for i in range(0, BLOCK, size)]


class Options(NamedTuple):
  """Everything that is known when one of the kernels is compiled."""

  grid: dict[str, int]
  repeats: int  # query heads of a KV head
  dim: int
  dtype: Any
  gate: str
  scale: float  # of the logits, not negative
  chunk: int  # queries of a list
  slots: int  # of a list
  skip: int  # tokens before the first query, a multiple of BLOCK
  stages: int  # slots of the circular buffers
  interpret: object  # parameters of the interpreter, or None

  @property
  def shape(self) -> tuple[int, int]:
    """Queries and keys of a tile."""
    return BLOCK, BLOCK

  @property
  def to_log2(self) -> float:
    """The factor from products of queries and keys to logits to base 2."""
    return self.scale * LOG2_E

  @property
  def registers(self) -> Matrices:
    """Operations on matrices."""
    return Matrices(self.interpret)


def options_of(query: jax.Array, key: jax.Array, listed: Listed, **others: Any) -> Options:
  """Returns the options for these shapes; `others` are the fields that shapes do not give."""
  (batch, queries, heads, dim), n = query.shape, key.shape[1]
  return Options(
    grid={"batch": batch, "block": queries // BLOCK, "head": heads},
    repeats=heads // key.shape[2],
    dim=dim,
    dtype=query.dtype,
    slots=listed.key.shape[2] // (n // others["chunk"]),
    skip=n - queries,
    **others,
  )


def run_kernel(
  body: Any, inputs: NamedTuple, outputs: NamedTuple, scratch: NamedTuple, **options: Any
) -> list[jax.Array]:
  """Runs a kernel of one warpgroup.

  Args:
    body: called with three NamedTuples of references, like `inputs`, `outputs` and `scratch`.
    inputs: NamedTuple of arrays; a field that is None stays None.
    outputs: NamedTuple of jax.ShapeDtypeStruct.
    scratch: NamedTuple of shared memory.
    options: of `plgpu.kernel`: grid, kernel_name, interpret.

  Returns:
    The outputs, in order.
  """
  kernel = plgpu.kernel(
    with_names(body, inputs, outputs, scratch),
    out_type=jax.tree.leaves(outputs),
    scratch_types=jax.tree.leaves(scratch),
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      reduction_scratch_bytes=0,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
      unsafe_no_auto_barriers=True,
    ),
    **options,
  )
  return kernel(*jax.tree.leaves(inputs))


class Position(NamedTuple):
  """The part of the problem that belongs to a program."""

  b: Any  # row of the batch
  block: Any  # of BLOCK tokens, those of the queries
  h: Any  # query head
  g: Any  # KV head
  first: Any  # first token of the block
  query: Any  # number of that token among the queries
  list_start: Any  # first place of the list of the block's chunk


def position(options: Options) -> Position:
  """Returns which part of the problem belongs to this program."""
  b, block, h = split_number(axis_index("program"), **options.grid)
  g = lax.div(h, jnp.int32(options.repeats))
  query = block * BLOCK
  block += options.skip // BLOCK
  first = block * BLOCK
  list_start = lax.div(first, jnp.int32(options.chunk)) * options.slots
  return Position(b, block, h, g, first, query, list_start)


class Steps(NamedTuple):
  """The tiles that a program visits, see the drawing above.

  Attributes:
    bounds: t0, ..., t5, see tiles.query_bounds.
    newest: the latest tile of the window, which holds the block's own tokens.
    in_window: number of tiles of the window.
    steps: number of all tiles.
  """

  bounds: tuple
  newest: Any
  in_window: Any
  steps: Any


def find_steps(at: Position, bounds: Ref) -> Steps:
  """Reads which tiles the program visits."""
  bounds = read_bounds(bounds, at.b, at.g, at.block)
  t0, _, _, t3, t4, _ = bounds
  in_window = at.block - t4 + 1
  return Steps(bounds, at.block, in_window, in_window + t3 - t0)


def visit(steps: Steps, tile: Callable, carry: tuple) -> tuple:
  """Visits all tiles, in the order of the steps.

  Args:
    steps: see Steps.
    tile: function (carry, step, t, is_list, exits, enters) -> carry; t is the tile's number among
      those of the window or the list, for the others see `live_pairs`.
    carry: the first one.

  Returns:
    The last carry.
  """
  t0, t1, t2, t3, _, t5 = steps.bounds

  def near(exits=False, enters=False):
    return lambda step, carry: tile(carry, step, steps.newest - step, False, exits, enters)

  def far(exits=False, enters=False):
    return lambda t, carry: tile(carry, steps.in_window + t - t0, t, True, exits, enters)

  carry = near(exits=True, enters=True)(jnp.int32(0), carry)
  carry = lax.fori_loop(1, steps.newest - t5 + 1, near(), carry)
  carry = lax.fori_loop(steps.newest - t5 + 1, steps.in_window, near(exits=True), carry)
  carry = lax.fori_loop(t0, t1, far(exits=True), carry)
  carry = lax.fori_loop(t1, t2, far(), carry)
  return lax.fori_loop(t2, t3, far(exits=True, enters=True), carry)


class Scratch(NamedTuple):
  """Shared memory of a program.

  Attributes:
    key, value: [stages, 64, D].
    floats: [vectors + stages, 64] float32: `vectors` of the queries, then scores of keys.
    integers: [2 + stages, 64] int32: window_start and entered of the queries, then `last` of keys.
  """

  key: Ref
  value: Ref
  floats: Ref
  integers: Ref


def scratch_of(options: Options, vectors: int) -> Scratch:
  """Returns the shared memory of a program with so many float vectors of queries."""
  tile = matrix_buffer(options.stages, BLOCK, options.dim, options.dtype)
  return Scratch(
    key=tile,
    value=tile,
    floats=vector_buffer(vectors + options.stages),
    integers=vector_buffer(2 + options.stages, jnp.int32),
  )


class Tiles(NamedTuple):
  """Circular buffers of tiles in shared memory, and what is copied there.

  Attributes:
    key, value: [stages, 64, D].
    last: [stages, 64] int32, of listed keys.
    score: [stages, 64] float32, of listed keys.
    of_tokens: keys and values of all tokens, [B, n, G, D] in global memory.
    listed: those of the lists.
    scores: whether the scores are needed.
  """

  key: Ref
  value: Ref
  last: Ref
  score: Ref
  of_tokens: tuple[Ref, Ref]
  listed: Listed
  scores: bool

  def load_keys(self, options: Options, at: Position, steps: Steps, step: Any) -> None:
    """Starts to copy the keys of a step, if there is such a step."""
    slot, matrices = lax.rem(step, jnp.int32(options.stages)), options.registers

    def from_list(first):
      matrices.copy_rows(self.listed.key, (at.b, at.g, None), first, BLOCK, self.key.at[slot])
      matrices.copy_vector(self.listed.last, (at.b, at.g), first, self.last.at[slot])
      if self.scores:
        matrices.copy_vector(self.listed.score, (at.b, at.g), first, self.score.at[slot])

    def from_window(first):
      matrices.copy_rows(self.of_tokens[0], (at.b, None, at.g), first, BLOCK, self.key.at[slot])

    _load(at, steps, step, from_window, from_list)
    matrices.commit()

  def load_values(self, options: Options, at: Position, steps: Steps, step: Any) -> None:
    """Starts to copy the values of a step, if there is such a step."""
    slot, matrices = lax.rem(step, jnp.int32(options.stages)), options.registers
    into = self.value.at[slot]
    _load(
      at,
      steps,
      step,
      lambda first: matrices.copy_rows(self.of_tokens[1], (at.b, None, at.g), first, BLOCK, into),
      lambda first: matrices.copy_rows(self.listed.value, (at.b, at.g, None), first, BLOCK, into),
    )
    matrices.commit()


def _load(at: Position, steps: Steps, step: Any, from_window: Any, from_list: Any) -> None:
  in_list = step - steps.in_window
  pl.when(in_list < 0)(lambda: from_window((steps.newest - step) * BLOCK))
  pl.when(jnp.logical_and(in_list >= 0, step < steps.steps))(
    lambda: from_list(at.list_start + (steps.bounds[0] + in_list) * BLOCK)
  )


def matrix_buffer(count: int, rows: int, columns: int, dtype: Any) -> Any:
  """Returns shared memory for `count` matrices."""
  return plgpu.SMEM((count, rows, columns), dtype)


def vector_buffer(count: int, dtype: Any = jnp.float32) -> Any:
  """Returns shared memory for `count` vectors."""
  return plgpu.SMEM((count, BLOCK), dtype)
