"""Small pieces that the Mosaic GPU kernels share."""

import inspect
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK_Q = 128  # queries of a block: 64 for each of the two computing warpgroups
HALF = BLOCK_Q // 2
MULTIPROCESSORS = 132  # of an H100 or H200
LOG2_E = math.log2(math.e)
MATRIX = plgpu.Layout.WGMMA  # of matrices in registers; vectors along their rows and columns:
ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)
_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
# JAX 0.10 wants one, 0.12 takes none
LOAD_INDEX = ((),) if _INDEX is not None and _INDEX.default is inspect.Parameter.empty else ()


def axes(*names: str) -> tuple[str, ...]:
  """Names for the axes of a kernel's grid. A mesh around the kernel must have none of them: JAX
  would take the place on the mesh for that in the grid.
  """
  return tuple(f"sparsek_{name}" for name in names)


def place(*names: str):
  """Where a thread is along the axes of that name."""
  found = tuple(lax.axis_index(name) for name in axes(*names))
  return found if len(found) > 1 else found[0]


def grid_of(**sizes: int) -> dict:
  """Returns what `plgpu.kernel` is told of programs along axes of these sizes.

  CUDA takes 2^31 - 1 programs along x, which is Mosaic's last axis, but only 65,535 along y and z:
  all programs are numbered along x, those of neighbours on the last axis one after the other.
  """
  return {"grid": (math.prod(sizes.values()),), "grid_names": axes("program")}


def place_in(**sizes: int) -> list:
  """Returns where a program is along each axis of its `grid_of`."""
  program, found = place("program"), []
  for size in reversed(sizes.values()):
    found.append(lax.rem(program, jnp.int32(size)))
    program = lax.div(program, jnp.int32(size))
  return found[::-1]


class Tiling(NamedTuple):
  """Sizes of the kernels' tiles, and how many tiles their circular buffers hold.

  forward_keys, query_keys: keys of a tile of the forward and the query kernel. hold_queries: the
    latter keeps its queries in registers.
  key_queries: queries of a tile of the key kernels.
  early: the key kernels begin the product for the values before the gradients of the logits are
    known, which takes registers.
  """

  forward_keys: int
  forward_stages: int
  query_keys: int
  query_stages: int
  hold_queries: bool
  key_queries: int
  key_stages: int
  early: bool


TILINGS = {  # by head_dim
  64: Tiling(
    forward_keys=128,
    forward_stages=2,
    query_keys=64,
    query_stages=3,
    hold_queries=True,
    key_queries=64,
    key_stages=2,
    early=False,
  ),
  128: Tiling(
    forward_keys=128,
    forward_stages=2,
    query_keys=64,
    query_stages=3,
    hold_queries=False,
    key_queries=64,
    key_stages=2,
    early=True,
  ),
}


class Work(NamedTuple):
  """What the programs of a kernel compute: blocks of every head and row of the batch, heads
  innermost, for theirs lie side by side in memory.

  A program computes a few neighbours one after the other, at most `most`, and loads the next one's
  rows while it computes, so that starts and ends cost less.
  """

  batch: int
  blocks: int
  heads: int
  most: int

  @property
  def number(self):
    return self.batch * self.blocks * self.heads

  @property
  def each(self):
    """Of a program: such that the multiprocessors end together."""
    rounds = -(-self.number // (self.most * MULTIPROCESSORS))
    return -(-self.number // (rounds * MULTIPROCESSORS))

  @property
  def programs(self):
    return -(-self.number // self.each)

  def count(self, program):
    """How many a program computes."""
    return jnp.minimum(self.each, self.number - program * self.each)

  def item(self, program, i):
    """(row of the batch, block, head) of its i-th."""
    place = program * self.each + i
    rest, head = lax.div(place, jnp.int32(self.heads)), lax.rem(place, jnp.int32(self.heads))
    return lax.div(rest, jnp.int32(self.blocks)), lax.rem(rest, jnp.int32(self.blocks)), head


class ListWork(NamedTuple):
  """What the programs of a kernel compute of lists: blocks of each, heads innermost.

  The blocks in the middle of a list, between the tokens by increasing last query and those by
  increasing first one, are live longest, and most of the last ones hold no token: programs begin in
  the middle, and each then takes blocks from further outside, turning at the ends.
  """

  batch: int
  chunks: int
  heads: int
  blocks: int  # of a list
  middle: int
  most: int

  @property
  def each(self):
    return min(self.most, self.blocks)

  @property
  def of_list(self):
    """Programs of a list."""
    return -(-self.blocks // self.each)

  @property
  def programs(self):
    return self.batch * self.chunks * self.of_list * self.heads

  def rank(self, program, i):
    """How many blocks of the list come before a program's i-th."""
    place = lax.rem(lax.div(program, jnp.int32(self.heads)), jnp.int32(self.of_list))
    return i * self.of_list + jnp.where(i % 2 == 0, place, self.of_list - 1 - place)

  def count(self, program):
    """How many a program computes."""
    return self.each - jnp.where(self.rank(program, self.each - 1) < self.blocks, 0, 1)

  def item(self, program, i):
    """(row of the batch, block, head) of its i-th; blocks are numbered through all lists."""
    low, high = min(self.middle, self.blocks), max(self.blocks - self.middle, 0)
    pairs, rank = min(low, high), jnp.minimum(self.rank(program, i), self.blocks - 1)
    in_turn = jnp.where(rank % 2 == 0, low + rank // 2, low - 1 - rank // 2)
    block = jnp.where(
      rank < 2 * pairs, in_turn, low + rank - pairs if high > low else low - 1 - rank + pairs
    )
    rest, head = lax.div(program, jnp.int32(self.heads)), lax.rem(program, jnp.int32(self.heads))
    place = lax.div(rest, jnp.int32(self.of_list))
    return (
      lax.div(place, jnp.int32(self.chunks)),
      lax.rem(place, jnp.int32(self.chunks)) * self.blocks + block,
      head,
    )


def by_row(vector, shape):
  """Broadcasts one value per row."""
  return lax.broadcast_in_dim(vector, shape, [0])


def by_column(vector, shape):
  """Broadcasts one value per column."""
  return lax.broadcast_in_dim(vector, shape, [1])


def read_bounds(ref, *row):
  """All entries of ref[row], scalars. The sum is for `jax.shard_map`: what is read varies over its
  axes, but inside a kernel what is computed does not.
  """
  return tuple(ref[(*row, i)] + 0 for i in range(ref.shape[-1]))


class Registers:
  """Operations on registers that the interpreter lacks or does without: it knows no layouts, and
  multiplies matrices in shared memory only.
  """

  def __init__(self, interpret):
    self.interpreted = interpret is not None

  def vector(self, ref, layout):
    """A vector from shared memory, along a matrix's rows or columns."""
    return (
      ref[...] if self.interpreted else plgpu.load(ref, *LOAD_INDEX, layout=layout, optimized=False)
    )

  def matrix(self, ref):
    """A matrix from shared memory."""
    return ref[...] if self.interpreted else plgpu.load(ref, *LOAD_INDEX, layout=MATRIX)

  def full(self, shape, value, layout):
    """A float32 array of one value."""
    x = jnp.full(shape, value, jnp.float32)
    return x if self.interpreted else plgpu.layout_cast(x, layout)

  def index(self, shape, axis):
    """Row or column numbers of a matrix."""
    return (
      lax.broadcasted_iota(jnp.int32, shape, axis)
      if self.interpreted
      else plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)
    )

  def matmul(self, shape, a, b, meanwhile=lambda: None):
    """a @ b.T in float32, both in shared memory; `meanwhile()` runs while the tensor cores work."""
    if self.interpreted:
      product = lax.dot_general(
        a[...], b[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
      )
      meanwhile()
      return product

    def run(accumulator):
      plgpu.wgmma(accumulator, a, b.transpose((1, 0)))
      meanwhile()
      return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))

  def two_matmuls(self, shape, first, second, use):
    """use(a @ b.T, get) for first = a, b and second = c, d in shared memory; get(later) is c @ d.T,
    which is multiplied while the first is used.

    later: how many matmuls were begun since and may go on.
    """
    if self.interpreted:
      return use(self.matmul(shape, *first), lambda later: self.matmul(shape, *second))

    def run(*accumulators):
      for accumulator, (a, b) in zip(accumulators, (first, second)):
        plgpu.wgmma(accumulator, a, b.transpose((1, 0)))
      wait = lambda accumulator, later: lax.optimization_barrier(
        plgpu.wgmma_accumulator_load(accumulator, wait_n=later)
      )
      return use(wait(accumulators[0], 1), lambda later: wait(accumulators[1], later))

    return pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32)] * 2)

  def matmul_add_in_turn(self, accs, a, b, make, d):
    """(acc + a @ b, acc + c @ d, rest) with c, rest = make(), which runs while the first is
    multiplied; a, c in registers, b, d in shared memory.
    """
    if self.interpreted:
      c, rest = make()
      return *self.matmul_add(accs, ((a, b), (c, d))), rest

    def run(*accumulators):
      for accumulator, acc in zip(accumulators, accs):
        accumulator[...] = acc
      plgpu.wgmma(accumulators[0], a, b)
      c, rest = make()
      plgpu.wgmma(accumulators[1], c, d)
      return *(x[...] for x in accumulators), rest

    return pl.run_scoped(run, *(plgpu.ACC(acc.shape, jnp.float32) for acc in accs))

  def matmul_add(self, accs, factors, meanwhile=lambda: None):
    """acc + a @ b for every acc and (a in registers, b in shared memory), issued together;
    `meanwhile()` runs while the tensor cores work.
    """
    if self.interpreted:
      accs = tuple(
        acc + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        for acc, (a, b) in zip(accs, factors)
      )
      meanwhile()
      return accs

    def run(accumulators):
      for accumulator, (a, b) in zip(accumulators, factors):
        plgpu.wgmma(accumulator, a, b)
      meanwhile()

    return pl.run_state(run)(tuple(plgpu.ACC.init(acc) for acc in accs))


def gate_of(scores, tau, shape):
  """clip(u_j - tau_i, 0, 1), scores along the columns and thresholds along the rows."""
  return jnp.clip(by_column(scores, shape) - by_row(tau, shape), 0.0, 1.0)


def matrix_buffer(count, rows, columns, dtype):
  """Shared memory for `count` matrices, tiled and swizzled as the tensor cores want it."""
  return plgpu.SMEM(
    (count, rows, columns),
    dtype,
    transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
  )


def phase_of(step, stages):
  """(slot of a circular buffer, was it used before) at this step."""
  return (
    step % stages if isinstance(step, int) else lax.rem(step, jnp.array(stages, step.dtype))
  ), step >= stages
