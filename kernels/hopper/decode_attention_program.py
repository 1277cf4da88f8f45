"""Arrays, constants and coordinates of a team of decode_attention_kernel.py."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.kernels.hopper.common import axis_index
from sparsek.kernels.hopper.decode_eviction import Rows, Token
from sparsek.kernels.hopper.row_preparation import Ref
from sparsek.kernels.hopper.small_batch_matmul import ROWS
from sparsek.kernels.hopper.thread_ops import gather
from sparsek.kernels.hopper.thread_registers import lane_index
from sparsek.kernels.hopper.thread_sync import sync_threads
from sparsek.kernels.sentinels import NOWHERE


class ScorerWeights(NamedTuple):
  """Arrays of Scorer, references in the kernel."""

  scale: Ref
  slope: Ref
  sink: Ref


class Inputs(NamedTuple):
  """Arrays in global memory, see `attend`; the first three are flat. The rows are updated in place;
  positions are among them only where the kernel evicts.
  """

  projected: Ref
  cos: Ref
  sin: Ref
  seen: Ref
  active: Ref
  rows: Rows
  scorer: ScorerWeights | None


class Outputs(NamedTuple):
  """Parts in global memory, flat; or `sums` alone, which then is the attention itself."""

  sums: Ref
  top: Ref | None
  total: Ref | None


class Scratch(NamedTuple):
  """Shared memory, see the drawing in decode_attention_kernel.py."""

  sums: Ref
  top: Ref
  total: Ref
  alive: Ref
  staged: Ref
  worst: Token


class Options(NamedTuple):
  """Constants of the kernel.

  Attributes:
    batch, heads, dim, ring: as in `attend`.
    groups: KV heads.
    length: rows of the cache, `slots` of which hold selected tokens.
    dtype: of keys and values.
    columns: of `projected`.
    scorer: prior and per of Scorer.
    parts: number of parts of the rows, one a team.
    warpgroups: of a team.
    teams: of a program.
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
  teams: int

  @property
  def window(self) -> int:
    return self.length - self.slots

  @property
  def ratio(self) -> int:
    """Query heads of a KV head."""
    return self.heads // self.groups

  @property
  def warps(self) -> int:
    """Warps of a team."""
    return 4 * self.warpgroups

  @property
  def steps(self) -> int:
    """Sets of 32 columns of a key."""
    return self.dim // 32

  @property
  def chunk(self) -> int:
    """Rows that a warp reads at a time: all of its rows where they fit into its registers."""
    rows = self.rows_of_part // self.warps
    return rows if rows * self.dim <= 2048 else 16

  @property
  def rows_of_part(self) -> int:
    return self.length // self.parts

  @property
  def chunks(self) -> int:
    """Chunks that each warp reads."""
    return self.rows_of_part // (self.warps * self.chunk)

  @property
  def is_whole(self) -> bool:
    """True where the kernel returns attention, and not Parts of it, which only a product of a few
    rows can join.
    """
    return self.parts == 1 and self.batch > ROWS

  @property
  def evicts(self) -> bool:
    """True where a team sees all rows, and so can move the token that leaves the window."""
    return self.scorer is not None and self.parts == 1


class Team(NamedTuple):
  """References and coordinates that the steps of a team share.

  Attributes:
    scratch: shared memory of the team.
    key, value: the cache of its batch row and KV head.
    number: of the team in its program.
    b, g, part: batch row, KV head and part of the rows.
    warpgroup: number in the team.
    lane: number of the lane in the warpgroup.
    warp: number of the warp in the team.
    row, column: of the lane in the tensor cores' operands, 0 to 7 and 0 to 3.
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
  number: Any
  b: Any
  g: Any
  part: Any
  warpgroup: Any
  lane: jax.Array
  warp: jax.Array
  row: jax.Array
  column: jax.Array
  seen: jax.Array
  new_row: jax.Array
  lives: jax.Array

  @property
  def zero(self) -> jax.Array:
    """0.0 in every lane."""
    return (self.lane * 0).astype(jnp.float32)

  @property
  def leads(self) -> jax.Array:
    """True where the lane's warp adds the new token: the first one of the first part."""
    return (self.warp == 0) & (self.lane * 0 + self.part == 0)

  def first_row(self, chunk: Any) -> jax.Array:
    """Returns the first row of the part that each warp reads in its chunk of that number."""
    return (self.lane * 0 + chunk * self.options.warps + self.warp) * self.options.chunk

  def of_warps(self, ref: Ref, head: jax.Array) -> list[jax.Array]:
    """Loads what each warp has stored for a head."""
    return [gather(ref, self.lane * 0 + w * 8 + head) for w in range(self.options.warps)]

  def wait(self) -> None:
    """Waits until all lanes of the team have come here; what they wrote to shared memory can be
    read then.
    """
    sync_threads(self.options.warpgroups, self.number + 1 if self.options.teams > 1 else 1)


def team_here(options: Options, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> Team:
  """Returns what the steps of this team share."""
  part, program, warpgroup = axis_index("part", "program", "warpgroup")
  number, warpgroup = (f(warpgroup, jnp.int32(options.warpgroups)) for f in (lax.div, lax.rem))
  head = program * options.teams + number
  b, g = lax.div(head, jnp.int32(options.groups)), lax.rem(head, jnp.int32(options.groups))
  lane = lane_index()
  warp, row, column = warpgroup * 4 + (lane >> 5), (lane >> 2) & 7, lane & 3
  seen = inputs.seen[b]
  key, value = inputs.rows.key.at[b, g], inputs.rows.value.at[b, g]
  new_row = options.slots + lax.rem(seen, jnp.int32(options.window))
  lives = ((lane * 0 + inputs.active[b]) > 0) & (
    (lane * 0 + seen) < (NOWHERE if options.slots or options.ring else options.length)
  )
  memory = options, inputs, outputs, jax.tree.map(lambda ref: ref.at[number], scratch), key, value
  where, lanes = (number, b, g, part, warpgroup), (lane, warp, row, column)
  return Team(*memory, *where, *lanes, seen, new_row, lives)
