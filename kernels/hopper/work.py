"""The work of the programs of attention kernels: which program computes which blocks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels.hopper.common import MULTIPROCESSORS


class Work(NamedTuple):
  """Blocks of the window's keys, of all heads and rows of the batch, dealt out to programs.

  Blocks are numbered with the head as the last axis: heads lie side by side in memory. A program
  computes a few neighbours one after the other, at most `most`, and loads the next one's rows while
  it computes, so that starts and ends cost less.
  """

  batch: int
  blocks: int
  heads: int
  most: int

  @property
  def number(self) -> int:
    """The number of all blocks."""
    return self.batch * self.blocks * self.heads

  @property
  def each(self) -> int:
    """The blocks of a program, so many that all multiprocessors end at about the same time."""
    rounds = -(-self.number // (self.most * MULTIPROCESSORS))
    return -(-self.number // (rounds * MULTIPROCESSORS))

  @property
  def programs(self) -> int:
    """The number of programs."""
    return -(-self.number // self.each)

  def blocks_of(self, program: Any) -> jax.Array:
    """Returns the number of blocks that a program computes."""
    return jnp.minimum(self.each, self.number - program * self.each)

  def item(self, program: Any, i: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (row of the batch, block, head) of a program's i-th block."""
    index = program * self.each + i
    rest, head = lax.div(index, jnp.int32(self.heads)), lax.rem(index, jnp.int32(self.heads))
    return lax.div(rest, jnp.int32(self.blocks)), lax.rem(rest, jnp.int32(self.blocks)), head


class ListWork(NamedTuple):
  """Blocks of the lists of selected tokens, dealt out to programs.

  The blocks in the middle of a list, between the tokens by increasing last query and those by
  increasing first query, are live longest, and most of the last ones hold no token. So the blocks
  are ranked from the middle outwards, and the programs of a list take them by rank, in turn: one
  each, first program to last, then another one each, last program to first, and so on.

      block    0  1  2  3  4  5  6  7  8       of a list of 9 with middle = 4
      rank     7  5  3  1  0  2  4  6  8
      program  2  4  3  1  0  2  4  3  1       of 5 programs, at most 2 blocks each
  """

  batch: int
  chunks: int
  heads: int
  blocks: int  # of a list
  middle: int
  most: int

  @property
  def each(self) -> int:
    """The blocks of a program, at most."""
    return min(self.most, self.blocks)

  @property
  def of_list(self) -> int:
    """The number of programs for a list."""
    return -(-self.blocks // self.each)

  @property
  def programs(self) -> int:
    """The number of programs."""
    return self.batch * self.chunks * self.of_list * self.heads

  def rank(self, program: Any, i: Any) -> Any:
    """Returns the rank of a program's i-th block among those of its list."""
    index = lax.rem(lax.div(program, jnp.int32(self.heads)), jnp.int32(self.of_list))
    return i * self.of_list + jnp.where(i % 2 == 0, index, self.of_list - 1 - index)

  def blocks_of(self, program: Any) -> jax.Array:
    """Returns the number of blocks that a program computes."""
    return self.each - jnp.where(self.rank(program, self.each - 1) < self.blocks, 0, 1)

  def item(self, program: Any, i: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (row of the batch, block, head) of a program's i-th block; blocks are numbered
    through all lists of a row.
    """
    low, high = min(self.middle, self.blocks), max(self.blocks - self.middle, 0)
    pairs, rank = min(low, high), jnp.minimum(self.rank(program, i), self.blocks - 1)
    in_turn = jnp.where(rank % 2 == 0, low + rank // 2, low - 1 - rank // 2)
    block = jnp.where(
      rank < 2 * pairs, in_turn, low + rank - pairs if high > low else low - 1 - rank + pairs
    )
    rest, head = lax.div(program, jnp.int32(self.heads)), lax.rem(program, jnp.int32(self.heads))
    index = lax.div(rest, jnp.int32(self.of_list))
    return (
      lax.div(index, jnp.int32(self.chunks)),
      lax.rem(index, jnp.int32(self.chunks)) * self.blocks + block,
      head,
    )


class QueryWork(NamedTuple):
  """Blocks of queries, of all heads and rows of the batch, dealt out to programs that run at once.

  The first blocks of a row visit few tiles. So programs take blocks from the last one on, in turn,
  and in every other round in reverse order:

      block    8  7  6  5  4  3  2  1  0       of 9
      program  0  1  2  3  3  2  1  0  0       of 4
  """

  number: int
  programs: int

  def blocks_of(self, program: Any) -> jax.Array:
    """Returns the number of blocks that a program computes."""
    rounds = -(-self.number // self.programs)
    return rounds - jnp.where(self.item(program, rounds - 1) < 0, 1, 0)

  def item(self, program: Any, i: Any) -> jax.Array:
    """Returns the number of a program's i-th block, negative if there is none."""
    in_round = jnp.where(i % 2 == 0, program, self.programs - 1 - program)
    return self.number - 1 - (i * self.programs + in_round)
