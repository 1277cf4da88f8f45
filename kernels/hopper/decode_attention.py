"""Attention of one new token on NVIDIA GPUs: one kernel (decode_attention_kernel.py) for all batch
rows and heads of a layer, which updates the cache in place.

It rotates the queries and the new key, stores the new key, value and score in the cache, moves the
token that leaves the window where one program sees all rows (`evicts`), and attends to the cache's
rows in parts, which the next product joins (`Parts`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels import devices
from sparsek.kernels.hopper.common import MULTIPROCESSORS, axes
from sparsek.kernels.hopper.decode_attention_kernel import kernel
from sparsek.kernels.hopper.decode_attention_program import (
  Inputs,
  Options,
  Outputs,
  ScorerWeights,
  Scratch,
)
from sparsek.kernels.hopper.decode_eviction import Rows, Token
from sparsek.kernels.hopper.small_batch_matmul import Parts
from sparsek.kernels.hopper.thread_ops import PARAMS, contents, unfused
from sparsek.kernels.hopper.thread_registers import LANES

ENABLED = True  # False: XLA attends
MOST_PARTS = 8
MOST_BLOCKS = 4  # of LANES rows in a part, were there as many parts as possible
REGISTERS = 256  # over D: warpgroups of a program, whose registers this bounds


class Scorer(NamedTuple):
  """A linear scoring network.

  Attributes:
    scale, slope, sink: [G] float32; sink is the extra score of the first token.
    prior, per: PRIOR_COUNT and SLOPE_TOKENS of sparsek/attention/scoring.py.
  """

  scale: jax.Array
  slope: jax.Array
  sink: jax.Array
  prior: float
  per: int


class Split(NamedTuple):
  """Division of the work.

  Attributes:
    parts: of the rows of a KV head, one a team.
    warpgroups: of a team.
    teams: of a program.
  """

  parts: int
  warpgroups: int
  teams: int


def split(key: jax.Array) -> Split | None:
  """Returns how attention to keys [B, G, length, D] is divided: the fewest parts that keep the
  multiprocessors about as busy as any number of them would, and programs that fill one each; None
  if the rows cannot be divided so.
  """
  batch, groups, length, dim = key.shape
  heads, blocks, most = batch * groups, length // LANES, REGISTERS // dim
  counts = [n for n in range(1, MOST_PARTS + 1) if blocks % n == 0]
  if length % LANES or not 1 <= blocks // counts[-1] <= MOST_BLOCKS:
    return None
  time = {n: -(-heads * n // MULTIPROCESSORS) / n for n in counts}
  parts = min(n for n in counts if time[n] <= 1.2 * min(time.values()))
  to_each = heads * parts / MULTIPROCESSORS  # teams that a multiprocessor gets
  warpgroups = max(
    n for n in range(1, most + 1) if blocks // parts % n == 0 and n <= max(1, round(most / to_each))
  )
  teams = min(most // warpgroups, max(1, round(to_each)))
  return Split(parts, warpgroups, max(n for n in range(1, teams + 1) if heads % n == 0))


def evicts(key: jax.Array) -> bool:
  """Returns whether `attend` moves the token that leaves the window of a layer that selects, whose
  keys are these; otherwise `evict` must have moved it before.
  """
  division = split(key)
  return division is not None and division.parts == 1


def supports(key: jax.Array, heads: int) -> bool:
  """Returns whether `attend` can attend to keys [B, G, length, D] with `heads` query heads, on this
  device.
  """
  _, groups, length, dim = key.shape
  division, ratio = split(key), heads // groups
  if division is None or ratio > 8 or dim not in (64, 128):
    return False
  # of a warp: its sums, their tops and totals, its worst token; of a team: gates and staged rows
  of_warp = 4 * (ratio * dim + 2 * 8 + 3)
  of_team = 4 * division.warpgroups * of_warp + 4 * (length // division.parts) + 2 * 4 * dim
  fits = division.teams * of_team <= devices.shared_bytes()
  is_narrow = key.dtype in (jnp.bfloat16, jnp.float16)
  return ENABLED and fits and is_narrow and devices.can_run_portable()


def attend(
  projected: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
  rows: Rows,
  scorer: Scorer | None,
  seen: jax.Array,
  active: jax.Array,
  heads: int,
  ring: bool = False,
) -> tuple[Parts | jax.Array, Rows]:
  """Stores the new token in the cache, and attends to the cache. Of a layer that selects the token
  that leaves the window is moved to a slot; unless it `evicts`, `evict` must have done that.

  Args:
    projected: [B, (H + 2 G) D + ...] float32: queries, keys and values, not yet rounded, and then,
      of a layer that selects, the scorer's three products [3 G].
    cos, sin: [B, D / 2] float32 of the angles by which queries and keys are rotated.
    rows: the cache, of a size that `supports` accepts; updated in place.
    scorer: its parameters, None for a layer that selects nothing.
    seen, active: [B] int32: tokens before the new one; 0 for batch rows that stay as they are.
    heads: H.
    ring: whether a cache without slots holds a sliding window, token t in row t modulo length;
      otherwise it must have room for all tokens.

  Returns:
    Attention [B, H D], or with few rows Parts of it, and the updated cache.
  """
  weights = None if scorer is None else ScorerWeights(scorer.scale, scorer.slope, scorer.sink)
  constants = None if scorer is None else (scorer.prior, scorer.per)
  return _attend(projected, cos, sin, rows, weights, seen, active, heads, constants, ring)


# Compiled by itself, so that it is traced once for all layers.
@functools.partial(jax.jit, static_argnums=(7, 8, 9))
def _attend(projected, cos, sin, rows, scorer, seen, active, heads, constants, ring):
  batch, groups, length, dim = rows.key.shape
  slots = 0 if scorer is None else rows.position.shape[2]
  division = split(rows.key)
  assert division is not None, length
  options = Options(
    batch,
    heads,
    groups,
    length,
    dim,
    rows.key.dtype,
    projected.shape[1],
    slots,
    ring,
    constants,
    *division,
  )
  warps = options.warps

  def shared(size, dtype=jnp.float32):
    return plgpu.SMEM((options.teams, size), dtype)

  scratch = Scratch(
    sums=shared(warps * options.ratio * dim),
    top=shared(warps * 8),
    total=shared(warps * 8),
    alive=shared(options.rows_of_part if slots else 4),
    staged=shared(4 * dim, options.dtype),
    worst=Token(shared(warps), shared(warps, jnp.int32), shared(warps, jnp.int32)),
  )
  count = options.parts * batch
  shape = lambda size, dtype=jnp.float32: jax.ShapeDtypeStruct((count * size,), dtype)
  outputs = (
    Outputs(shape(heads * dim, options.dtype), None, None)
    if options.is_whole
    else Outputs(shape(heads * dim), shape(heads), shape(heads))
  )
  grid = {"part": options.parts, "program": batch * groups // options.teams}
  run = plgpu.kernel(
    functools.partial(kernel, options),
    out_type=[outputs],
    scratch_types=[scratch],
    grid=tuple(grid.values()),
    grid_names=axes(*grid),
    num_threads=options.teams * options.warpgroups,
    thread_name=axes("warpgroup")[0],
    compiler_params=PARAMS,
    kernel_name="sparsek_attend",
  )
  # A layer that selects nothing has keys and values only.
  arrays, structure = jax.tree.flatten(rows if options.evicts else rows._replace(position=None))
  refs = list(map(jax.new_ref, arrays))
  projected, cos, sin, seen, active = unfused(
    [projected.reshape(-1), cos.reshape(-1), sin.reshape(-1), seen, active]
  )
  row_refs = jax.tree.unflatten(structure, refs)
  (result,) = unfused(run(Inputs(projected, cos, sin, seen, active, row_refs, scorer)))
  mixed: Parts | jax.Array
  if options.is_whole:
    mixed = result.sums.reshape(batch, -1)
  else:
    of_parts = (options.parts, batch, -1)
    mixed = Parts(*(y.reshape(of_parts) for y in (result.sums, result.top, result.total)))
  new_rows = jax.tree.unflatten(structure, contents(*refs))
  return mixed, new_rows if options.evicts else new_rows._replace(position=rows.position)
