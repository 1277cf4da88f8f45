"""Attention of one new token on Hopper GPUs: one kernel (decode_attention_kernel.py) for all batch
rows and heads of a layer, which updates the cache in place.

It rotates the queries and the new key, stores the new key, value and score in the cache, and
attends to the cache's rows in parts, which the next product joins (`Parts`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.devices import can_run
from sparsek.kernels.hopper.common import MULTIPROCESSORS, axes
from sparsek.kernels.hopper.decode_attention_kernel import (
  Inputs,
  Options,
  Outputs,
  ScorerWeights,
  Scratch,
  kernel,
)
from sparsek.kernels.hopper.decode_eviction import Rows
from sparsek.kernels.hopper.small_batch_matmul import Parts
from sparsek.kernels.hopper.thread_ops import PARAMS, contents, unfused
from sparsek.kernels.hopper.thread_registers import LANES

ENABLED = True  # False: XLA attends


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


def parts(batch: int, groups: int, length: int) -> tuple[int, int] | None:
  """Returns (parts, warpgroups of a program) for attention to `length` rows of a cache: as many
  parts as run at the same time, LANES rows to a warpgroup; None if the rows cannot be divided so.
  """
  blocks = length // LANES
  fitting = [
    n for n in range(1, 9) if length % LANES == 0 and blocks % n == 0 and 1 <= blocks // n <= 4
  ]
  best = max(
    (n for n in fitting if batch * groups * n <= MULTIPROCESSORS),
    default=min(fitting, default=None),
  )
  return None if best is None else (best, blocks // best)


def supports(key: jax.Array, heads: int) -> bool:
  """Returns whether `attend` can attend to keys [B, G, length, D] with `heads` query heads, on this
  device.
  """
  batch, groups, length, dim = key.shape
  fits = (
    dim in (64, 128)
    and heads // groups <= 8
    and parts(batch, groups, length) is not None
    and key.dtype in (jnp.bfloat16, jnp.float16)
  )
  return ENABLED and fits and can_run()


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
) -> tuple[Parts, Rows]:
  """Stores the new token in the cache, after `evict` has moved the one that leaves the window, and
  attends to the cache.

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
    Parts of [B, H D], and the updated cache.
  """
  weights = None if scorer is None else ScorerWeights(scorer.scale, scorer.slope, scorer.sink)
  constants = None if scorer is None else (scorer.prior, scorer.per)
  return _attend(projected, cos, sin, rows, weights, seen, active, heads, constants, ring)


# Compiled by itself, so that it is traced once for all layers.
@functools.partial(jax.jit, static_argnums=(7, 8, 9))
def _attend(projected, cos, sin, rows, scorer, seen, active, heads, constants, ring):
  batch, groups, length, dim = rows.key.shape
  slots = 0 if scorer is None else rows.position.shape[2]
  split = parts(batch, groups, length)
  assert split is not None, length
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
    *split,
  )
  per_warp = Scratch(sums=options.ratio * dim, weights=32 * 8, top=8, total=8)
  sizes = Outputs(sums=heads * dim, top=heads, total=heads)
  grid = {"part": options.parts, "head": groups, "row": batch}
  run = plgpu.kernel(
    functools.partial(kernel, options),
    out_type=[
      Outputs(*(jax.ShapeDtypeStruct((options.parts * batch * n,), jnp.float32) for n in sizes))
    ],
    scratch_types=[Scratch(*(plgpu.SMEM((options.warps * n,), jnp.float32) for n in per_warp))],
    grid=tuple(grid.values()),
    grid_names=axes(*grid),
    num_threads=options.warpgroups,
    thread_name=axes("warpgroup")[0],
    compiler_params=PARAMS,
    kernel_name="sparsek_attend",
  )
  # The kernel does not read positions; a layer that selects nothing has keys and values only.
  arrays, structure = jax.tree.flatten(rows._replace(position=None))
  refs = list(map(jax.new_ref, arrays))
  projected, cos, sin, seen, active = unfused(
    [projected.reshape(-1), cos.reshape(-1), sin.reshape(-1), seen, active]
  )
  row_refs = jax.tree.unflatten(structure, refs)
  (result,) = unfused(run(Inputs(projected, cos, sin, seen, active, row_refs, scorer)))
  mixed = Parts(
    result.sums.reshape(options.parts, batch, -1),
    result.top.reshape(options.parts, batch, heads),
    result.total.reshape(options.parts, batch, heads),
  )
  new_rows = jax.tree.unflatten(structure, contents(*refs))
  return mixed, new_rows._replace(position=rows.position)
