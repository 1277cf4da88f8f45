"""The staircases of kernels/prefix_thresholds.py on GPUs: the tiles that they cross, and the walk
through them, in Pallas Mosaic kernels of single threads.

The plane is tiled twice. The tiles that a staircase crosses are tiled again, in shared memory, so
that walks are short; tiles that it does not cross cost nothing but the sums at their corners.

  kernel  a program for   a lane for     reads, writes
  ...     see hopper/staircase_sums.py   ranks -> events, sums at corners, columns
  walk    tiles, search   event, token   sums, columns, events, tokens -> cuts; passed

A warp of the kernel walk takes a tile: see hopper/staircase_tile.py. The two searches are those of
NEEDS: for the cuts of queries, and for the expiry of tokens.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels import prefix_events, prefix_thresholds
from sparsek.kernels.hopper.staircase_sums import corner_sums
from sparsek.kernels.hopper.staircase_tile import Inner, layout_of
from sparsek.kernels.hopper.thread_ops import block_of, kernel, reader
from sparsek.kernels.hopper.thread_registers import LANES, warp_any
from sparsek.kernels.hopper.thread_sums import WARP, WARPS
from sparsek.kernels.prefix_events import Problem, Tiling
from sparsek.kernels.prefix_thresholds import NEEDS


class Entered(NamedTuple):
  """Results of the kernel enter.

  Attributes:
    tokens: [rows, n, 4] by token: `Located.token`.
    ranks: [rows, n, 4] by rank: the positions of the upper and the lower event of its token, the
      query at which the token enters, and the bits of its score.
    passed: [rows, 2 n] by position: the first query that passes it, n by default.
  """

  tokens: Any
  ranks: Any
  passed: Any


class WalkInputs(NamedTuple):
  """Arrays of the kernel walk.

  Attributes:
    sums: [rows, (blocks + 1)^2, 4] at the corners of tiles, by row and column.
    columns: [rows, searches, blocks + 1] by row: how many columns begin with a position that is
      over, at the last query before the row.
    events: [rows, 2 n, 4] by position: rows of `prefix_events.Read.event`.
    tokens, passed: see Entered.
  """

  tokens: Any
  events: Any
  sums: Any
  columns: Any
  passed: Any


def outer_tiling(problem: Problem) -> Tiling:
  """Returns the tiles that are tiled again."""
  block = 2 * problem.tiling.block
  return Tiling(block, -(-problem.n // block))


def find_cuts(problem: Problem, entered: Entered) -> tuple[jax.Array, jax.Array]:
  """Returns the events, [rows, 2 n, 4] by position, and the cut of each query, [rows, n, 4], as
  `prefix_thresholds.threshold` reads them; writes into `passed` the first query that passes each
  position.
  """
  tiling = outer_tiling(problem)
  events, sums, columns = corner_sums(problem, tiling, entered.ranks)
  inputs = WalkInputs(entered.tokens, events, sums, columns, entered.passed)
  return events, _walk(problem, tiling, inputs)


def _shape(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def _walk(problem, tiling, inputs):
  """Follows the staircase of each search through each tile."""
  rows, n = inputs.tokens.shape[:2]
  programs = -(-tiling.cells // WARPS)  # of a search; those of the longer walks start first

  def body(row, _, lane, inputs, cuts, scratch):
    block = block_of(rows)

    def walk_tile(number, over):
      cell = lane // WARP - number * (programs * WARPS)
      tile = prefix_thresholds.tile_of(tiling, reader(inputs.columns, row, number), cell)

      @pl.when(warp_any(tile.first < tile.end))
      def _walk():
        read = prefix_events.Read(
          token=reader(inputs.tokens, row), event=reader(inputs.events, row)
        )
        inner = Inner(problem, tiling, tile, lane % LANES, scratch, NEEDS[over], read)
        corner = tile.row * (tiling.blocks + 1) + (tile.column + 1)
        inner.add(reader(inputs.sums, row)(corner))
        if over is prefix_thresholds.gates_over:
          inner.walk_and_cut(over, cuts.at[row])
        else:
          inner.walk_and_pass(over, inputs.passed.at[row])

    for number, over in enumerate(NEEDS):
      pl.when(block // programs == number)(functools.partial(walk_tile, number, over))

  (cuts,) = kernel(
    body,
    rows,
    len(NEEDS) * programs * LANES,
    name="walk",
    out_type=[_shape(rows, n, 4)],
    scratch_types=[plgpu.SMEM((WARPS * layout_of(tiling).size,), jnp.int32)],
  )(inputs)
  return cuts
