"""A program of the forward kernel of attention_forward.py: what it reads and writes, its shared
memory, and which blocks of queries it computes.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.hopper.attention_tiles import Listed, Options, position
from sparsek.kernels.hopper.common import (
  COMPUTING,
  HALF,
  axis_index,
  matrix_buffer,
  programs_at_once,
  vector_buffer,
)
from sparsek.kernels.hopper.work import QueryWork


class Inputs(NamedTuple):
  """Arrays in global memory: the arguments of `forward`."""

  query: Any
  key: Any
  value: Any
  window_start: Any
  entered: Any
  tau: Any
  listed: Listed
  bounds: Any


class Outputs(NamedTuple):
  """Results in global memory."""

  out: Any
  logsumexp: Any


class Scratch(NamedTuple):
  """Shared memory and barriers, see the drawing in attention_forward.py."""

  query: Any
  key: Any
  value: Any
  last: Any
  score: Any
  row: Any
  window_start: Any
  entered: Any
  key_full: Any
  value_full: Any
  query_full: Any
  key_free: Any
  value_free: Any
  turn: Any


class Program(NamedTuple):
  """Everything that the roles of a program need.

  Attributes:
    at, part: the block of queries, and where the warpgroup's are in the buffers of queries.
  """

  options: Options
  inputs: Inputs
  outputs: Outputs
  scratch: Scratch
  at: Any = None
  part: Any = None

  @property
  def gated(self) -> bool:
    """True if the output depends on the gates, and so on the scores."""
    return self.options.gate != "straight_through"

  @property
  def rounds(self) -> jax.Array:
    """The number of blocks that the program computes."""
    return work_of(self.options).blocks_of(axis_index("program"))

  def block(self, i: Any) -> "Program":
    """Returns the same for the i-th block."""
    at = position(self.options, work_of(self.options).item(axis_index("program"), i))
    return self._replace(at=at, part=at.warpgroup + COMPUTING * (i % held(self.options)))


class Rows(NamedTuple):
  """The 64 queries of a computing warpgroup."""

  first: Any  # token of the first one
  places: Any  # slice of them among the queries
  tau: Any  # None where the gate does not need it


def held(options: Options) -> int:
  """Returns how many blocks of queries shared memory holds: the next one too, if there is room."""
  return 2 if options.dim <= 128 else 1


def work_of(options: Options) -> QueryWork:
  """Returns the work of the programs: of one block each, if that is all that they hold."""
  blocks = math.prod(options.grid.values())
  return QueryWork(blocks, min(blocks, programs_at_once()) if held(options) > 1 else blocks)


def scratch_of(options: Options, gated: bool) -> Scratch:
  """Returns the types of a program's shared memory."""
  block_kv, stages, parts = options.block_kv, options.stages, COMPUTING * held(options)
  return Scratch(
    query=matrix_buffer(parts, HALF, options.dim, options.dtype),
    key=matrix_buffer(stages, block_kv, options.dim, options.dtype),
    value=matrix_buffer(stages, block_kv, options.dim, options.dtype),
    last=vector_buffer(stages, block_kv, jnp.int32),
    score=vector_buffer(stages, block_kv),
    row=vector_buffer(parts, HALF),
    window_start=vector_buffer(parts, HALF, jnp.int32),
    entered=vector_buffer(parts, HALF, jnp.int32),
    key_full=plgpu.Barrier(num_arrivals=3 if gated else 2, num_barriers=stages),
    value_full=plgpu.Barrier(num_arrivals=1, num_barriers=stages),
    query_full=plgpu.Barrier(num_arrivals=4, num_barriers=parts),
    key_free=plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages),
    value_free=plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages),
    turn=plgpu.Barrier(num_arrivals=COMPUTING),
  )
