"""One token's selection and attention on Hopper GPUs, for all rows and heads at once, in the
cache's own memory.

What leaves the windows is known before the token is: one kernel moves it to its slots, in all
layers. Of a layer's attention a kernel does the rest: rotations, the new row, the new score, and
attention to the rows in parts, one a program, that the product after it joins.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.hopper.common import LOWEST, MULTIPROCESSORS, axes, axis_index
from sparsek.kernels.hopper.small_batch_matmul import Parts
from sparsek.kernels.hopper.thread_ops import (
  PARAMS,
  can_run,
  contents,
  floats,
  gather,
  gather_bytes,
  kernel,
  scatter,
  scatter_bytes,
  unfused,
)
from sparsek.kernels.hopper.thread_registers import (
  LANES,
  lane_index,
  multiply_add,
  narrow,
  shuffle_xor,
  widen,
)
from sparsek.kernels.hopper.thread_sync import sync_threads

ENABLED = True  # False: XLA does it
NOWHERE = jnp.iinfo(jnp.int32).max  # index or position later than any


class Rows(NamedTuple):
  """A layer's cache: keys and values [B, G, k + window, D]; score [B, G, k + window], position [B,
  G, k] and pending [B, G, window] of the tokens in them, and moments, four of [B, G]: mean,
  deviation and their rests. These four are None for a layer that selects nothing, where k is 0.
  """

  key: jax.Array
  value: jax.Array
  score: jax.Array | None = None
  position: jax.Array | None = None
  pending: jax.Array | None = None
  moments: tuple | None = None


class Scorer(NamedTuple):
  """Of a linear scoring network, [G] float32 each: scale, slope and extra score of the first token;
  PRIOR_COUNT and SLOPE_TOKENS of sparsek/attention/scoring.py.
  """

  scale: jax.Array
  slope: jax.Array
  sink: jax.Array
  prior: float
  per: int


def parts(batch: int, groups: int, length: int) -> tuple[int, int] | None:
  """(parts, warpgroups of a program) for attention to `length` rows: as many parts as the
  multiprocessors take at once; None if none are right.
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


def takes(key: jax.Array, heads: int) -> bool:
  """Whether `attend` can attend to keys [B, G, length, D] with so many heads, on this device."""
  batch, groups, length, dim = key.shape
  fits = (
    dim in (64, 128)
    and heads // groups <= 8
    and parts(batch, groups, length) is not None
    and key.dtype in (jnp.bfloat16, jnp.float16)
  )
  return ENABLED and fits and can_run()


@jax.jit
def evict(layers: list[Rows], seen: jax.Array, active: jax.Array) -> list[Rows]:
  """The layers, where what leaves each window has gone to the slot of the worst selected token if
  it scores higher, as in `cached_attention.select_token`.

  seen, active: [B] int32.
  """
  batch, groups, _, dim = layers[0].key.shape

  def body(row, number, lane, *refs):
    (seen_ref, active_ref, *refs), found_refs = refs[:-3], refs[-3:]
    b, g = row // groups, row % groups

    def move(key, value, score, position, pending):
      seen, slots, window = seen_ref[b], position.shape[2], pending.shape[2]
      arriving = gather(pending.at[b, g], lane * 0 + lax.rem(seen, jnp.int32(window)))
      # Of integers that are chosen between, an array comes first: see thread_ops.
      lives = ((lane * 0 + active_ref[b]) > 0) & ((lane * 0 + seen) >= window)
      arriving = jnp.where(lives, arriving, -jnp.inf)
      worst = None
      for start in range(0, slots, LANES):
        index = jnp.minimum(lane + start, slots - 1)  # lanes beyond the last slot repeat it
        own = gather(score.at[b, g], index), gather(position.at[b, g], index), index
        worst = own if worst is None else _worse(worst, own)
      for distance in (16, 8, 4, 2, 1):
        worst = _worse(worst, tuple(shuffle_xor(x, distance) for x in worst))
      for ref, x in zip(found_refs, worst):
        scatter(ref, lane >> 5, x, (lane & 31) == 0)
      sync_threads()
      found = [tuple(gather(ref, lane * 0 + warp) for ref in found_refs) for warp in range(4)]
      least, _, slot = _worse(_worse(*found[:2]), _worse(*found[2:]))
      enters, part = arriving > least, (lane & (dim // 8 - 1)) * 8
      for ref in (key, value):
        words = gather_bytes(
          ref.at[b, g], lane * 0 + (slots + lax.rem(seen, jnp.int32(window))), part, dim
        )
        scatter_bytes(ref.at[b, g], slot, part, dim, words, enters & (lane < dim // 8))
      scatter(score.at[b, g], slot, arriving, enters & (lane == 0))
      scatter(position.at[b, g], slot, lane * 0 + (seen - window), enters & (lane == 0))

    for i in range(len(layers)):
      pl.when(number == i)(lambda i=i: move(*refs[5 * i : 5 * i + 5]))

  refs = [jax.new_ref(x) for layer in layers for x in layer[:5]]
  found = [plgpu.SMEM((4,), dtype) for dtype in (jnp.float32, jnp.int32, jnp.int32)]
  kernel(body, batch * groups, LANES, len(layers), name="evict", scratch_types=found)(
    seen, active, *refs
  )
  arrays = contents(*refs)
  return [Rows(*arrays[5 * i : 5 * i + 5], layer.moments) for i, layer in enumerate(layers)]


def _worse(a, b):
  """The one of two (score, position, index) to give up first: the lowest score, of equals the
  latest position, then the first index.
  """
  first = (a[0] < b[0]) | ((a[0] == b[0]) & ((a[1] > b[1]) | ((a[1] == b[1]) & (a[2] < b[2]))))
  return tuple(jnp.where(first, x, y) for x, y in zip(a, b))


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
  """Puts the new token into the rows, after those that `evict` moved, and attends to them.

  Args:
    projected: [B, (H + 2 G) D + ...] float32: queries, keys and values, not yet rounded, and of a
      layer that selects the scorer's three products [3 G].
    cos, sin: [B, D / 2] float32 of the angles by which queries and keys are turned.
    rows: see `takes`; their memory is used again.
    scorer: its parameters, None for a layer that selects nothing.
    seen, active: [B] int32; rows that are not active stay as they are.
    heads: H.
    ring: whether rows without slots are a window's, where token t lies at t modulo their number;
      else they are all there can be.

  Returns:
    Parts of [B, H D], and the next rows.
  """
  arrays, constants = (None, None) if scorer is None else (scorer[:3], scorer[3:])
  return _attend(projected, cos, sin, rows, arrays, seen, active, heads, constants, ring)


# Compiled by itself, so that it is traced once for all layers.
@functools.partial(jax.jit, static_argnums=(7, 8, 9))
def _attend(projected, cos, sin, rows, scorer, seen, active, heads, constants, ring):
  prior, per = constants or (None, None)
  batch, groups, length, dim = rows.key.shape
  kind, count = rows.key.dtype, projected.shape[1]
  slots = 0 if scorer is None else rows.position.shape[2]
  window, ratio = length - slots, heads // groups
  split, warpgroups = parts(batch, groups, length)
  warps, steps, wide = 4 * warpgroups, dim // 32, dim // 8
  at_once = 32 // wide  # rows of which a warp reads the values at once

  def body(*refs):
    every, cos_ref, sin_ref, seen_ref, active_ref, *refs = refs
    key_ref, value_ref, *refs = refs
    if scorer is not None:
      score_ref, pending_ref, *moment_refs = refs[:6]
      scale_ref, slope_ref, sink_ref, *refs = refs[6:]
    out_ref, out_top_ref, out_total_ref, sums_smem, weights_smem, top_smem, total_smem = refs
    b, g, number, warpgroup = axis_index("row", "head", "part", "warpgroup")
    lane = lane_index()
    in_warp = lane & 31
    warp, r, part = warpgroup * 4 + (lane >> 5), (lane >> 2) & 7, lane & 3
    begin = number * (warps * 32) + warp * 32  # first row of the warp
    seen, key, value = seen_ref[b], key_ref.at[b, g], value_ref.at[b, g]
    new = slots + lax.rem(seen, jnp.int32(window))  # where the new token goes
    lives = ((lane * 0 + active_ref[b]) > 0) & (
      (lane * 0 + seen) < (NOWHERE if slots or ring else length)
    )

    # Everything that has to come from memory is asked for first.
    key_rows = [[begin + m * 16 + half * 8 + r for half in range(2)] for m in range(2)]
    keys = [
      [[gather_bytes(key, row, part * 8 + s * 32, dim) for s in range(steps)] for row in pair]
      for pair in key_rows
    ]
    value_rows = [begin + i * at_once + in_warp // wide for i in range(32 // at_once)]
    column = (in_warp & (wide - 1)) * 8
    values = [gather_bytes(value, row, column, dim) for row in value_rows]
    shown = [[row <= slots + seen for row in pair] for pair in key_rows]
    if scorer is not None:
      shown = [
        [there & (gather(score_ref.at[b, g], row) > -jnp.inf) for there, row in zip(*pairs)]
        for pairs in zip(shown, key_rows)
      ]

    rounded = lambda x: x.astype(kind).astype(jnp.float32)
    angles = [
      [floats(ref, b * (dim // 2) + s * 32 + part * 8, 8) for s in range(steps // 2)]
      for ref in (cos_ref, sin_ref)
    ]

    def turned(head):
      """Words of the rotated query or key that is the head-th of those projected, of the columns of
      this lane.
      """
      x = [
        [rounded(y) for y in floats(every, b * count + head * dim + s * 32 + part * 8, 8)]
        for s in range(steps)
      ]
      low = [
        [a * c - z * d for a, z, c, d in zip(*them)] for them in zip(x, x[steps // 2 :], *angles)
      ]
      high = [
        [z * c + a * d for a, z, c, d in zip(*them)] for them in zip(x, x[steps // 2 :], *angles)
      ]
      return [narrow(y, kind) for y in low + high]

    query, new_key = turned(g * ratio + jnp.minimum(r, ratio - 1)), turned(lane * 0 + heads + g)
    new_value = narrow(floats(every, b * count + (heads + groups + g) * dim + column, 8), kind)

    logits = []
    for m in range(2):
      for half in range(2):
        own = (key_rows[m][half] == new) & lives
        keys[m][half] = [
          [jnp.where(own, x, y) for x, y in zip(*pair)] for pair in zip(new_key, keys[m][half])
        ]
        for s in range(steps):
          scatter_bytes(key, key_rows[m][half], part * 8 + s * 32, dim, new_key[s], own)
      found = ((lane * 0).astype(jnp.float32),) * 4
      for s in range(steps):
        for i in (0, 2):
          found = multiply_add(
            found,
            [keys[m][half][s][j] for j in (i, i + 1) for half in range(2)],
            query[s][i : i + 2],
            kind,
          )
      logits.append(
        [
          [jnp.where(shown[m][half], found[2 * half + j] * dim**-0.5, LOWEST) for j in range(2)]
          for half in range(2)
        ]
      )

    def over_rows(numbers, join):
      for distance in (4, 8, 16):
        numbers = join(numbers, shuffle_xor(numbers, distance))
      return numbers

    every_warp = lambda ref, head: [gather(ref, lane * 0 + w * 8 + head) for w in range(warps)]
    tops = []
    for j in range(2):
      top = jnp.maximum(
        *(jnp.maximum(*(logits[m][half][j] for half in range(2))) for m in range(2))
      )
      scatter(top_smem, warp * 8 + part * 2 + j, over_rows(top, jnp.maximum), r == 0)
    sync_threads()
    for j in range(2):
      tops.append(_fold(jnp.maximum, every_warp(top_smem, part * 2 + j)))
      total = (lane * 0).astype(jnp.float32)
      for m in range(2):
        for half in range(2):
          weight = jnp.where(shown[m][half], jnp.exp(logits[m][half][j] - tops[j]), 0.0)
          total = total + weight
          scatter(
            weights_smem, (warp * 32 + m * 16 + half * 8 + r) * 8 + part * 2 + j, weight, lane >= 0
          )
      scatter(total_smem, warp * 8 + part * 2 + j, over_rows(total, jnp.add), r == 0)
    sync_threads()

    sums = [[(lane * 0).astype(jnp.float32)] * 8 for _ in range(ratio)]
    for row, words in zip(value_rows, values):
      own = (row == new) & lives
      scatter_bytes(value, row, column, dim, new_value, own)
      x = widen([jnp.where(own, y, z) for y, z in zip(new_value, words)], kind)
      weight = [
        w
        for i in range(0, -(-ratio // 4) * 4, 4)
        for w in floats(weights_smem, (warp * 32 + row - begin) * 8 + i, 4)
      ]
      sums = [[y + w * z for y, z in zip(total, x)] for total, w in zip(sums, weight)]
    for h in range(ratio):
      for i in range(8):
        total, distance = sums[h][i], wide
        while distance < 32:
          total, distance = total + shuffle_xor(total, distance), 2 * distance
        scatter(sums_smem, (warp * ratio + h) * dim + column + i, total, in_warp < wide)
    sync_threads()

    # Of what the warps found, the first warpgroup makes one.
    @pl.when(warpgroup == 0)
    def _():
      for start in range(0, ratio * dim, LANES):
        total = _fold(
          jnp.add, [gather(sums_smem, w * ratio * dim + start + lane) for w in range(warps)]
        )
        scatter(
          out_ref,
          (number * batch + b) * (heads * dim) + g * (ratio * dim) + start + lane,
          total,
          lane >= 0,
        )
      head = jnp.minimum(lane, ratio - 1)
      at = (number * batch + b) * heads + g * ratio + head
      total = _fold(jnp.add, every_warp(total_smem, head))
      if scorer is None and not ring:
        # beyond the last row: loud, not wrong
        total = jnp.where(lane * 0 + seen < length, total, jnp.nan)
      scatter(out_top_ref, at, _fold(jnp.maximum, every_warp(top_smem, head)), lane < ratio)
      scatter(out_total_ref, at, total, lane < ratio)

    if scorer is not None:

      @pl.when((warpgroup == 0) & (number == 0))
      def _():
        # As ScoringNetwork.stream with one token, but for all that is 0 or 1 then.
        one = lambda ref, index: gather(ref, lane * 0 + index)
        logit = _fold(
          jnp.add,
          [one(every, b * count + (heads + 2 * groups) * dim + i * groups + g) for i in range(3)],
        )
        mean, deviation, *rests = (one(ref.at[b], g) for ref in moment_refs)
        before = (lane * 0 + seen).astype(jnp.float32)
        delta, share = logit - mean, 1 / (before + 1)
        steps = delta * share + rests[0], delta * delta * before * share + rests[1]
        after = mean + steps[0], deviation + steps[1]
        rests = [step - (x - old) for step, x, old in zip(steps, after, (mean, deviation))]
        scaled = (logit - after[0]) * lax.rsqrt((after[1] + prior) / (before + 1 + prior))
        score = (
          one(scale_ref, g) * scaled
          + one(slope_ref, g) * (before / per)
          + jnp.where(lane * 0 + seen == 0, one(sink_ref, g), 0.0)
        )
        writes = lives & (lane == 0)
        scatter(pending_ref.at[b, g], lane * 0 + lax.rem(seen, jnp.int32(window)), score, writes)
        for ref, x in zip(moment_refs, (*after, *rests)):
          scatter(ref.at[b], lane * 0 + g, x, writes)

  state = [rows.key, rows.value] + (
    [] if scorer is None else [rows.score, rows.pending, *rows.moments]
  )
  refs = list(map(jax.new_ref, state))
  out = [
    jax.ShapeDtypeStruct((split * batch * n,), jnp.float32) for n in (heads * dim, heads, heads)
  ]
  shared = [plgpu.SMEM((warps * n,), jnp.float32) for n in (ratio * dim, 32 * 8, 8, 8)]
  grid = {"part": split, "head": groups, "row": batch}
  run = plgpu.kernel(
    body,
    out_type=out,
    scratch_types=shared,
    grid=tuple(grid.values()),
    grid_names=axes(*grid),
    num_threads=warpgroups,
    thread_name=axes("warpgroup")[0],
    compiler_params=PARAMS,
    kernel_name="sparsek_attend",
  )
  inputs = unfused([projected.reshape(-1), cos.reshape(-1), sin.reshape(-1), seen, active])
  sums, top, total = unfused(run(*inputs, *refs, *(scorer or [])))
  found = Parts(
    sums.reshape(split, batch, -1),
    top.reshape(split, batch, heads),
    total.reshape(split, batch, heads),
  )
  key, value, *rest = contents(*refs)
  return found, rows._replace(key=key, value=value) if scorer is None else Rows(
    key, value, rest[0], rows.position, rest[1], tuple(rest[2:])
  )


def _fold(join, numbers):
  total, *rest = numbers
  for x in rest:
    total = join(total, x)
  return total
