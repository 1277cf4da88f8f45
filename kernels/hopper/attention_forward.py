"""Forward pass of SPARSEK attention on Hopper GPUs: one online softmax over tiles of the window,
latest first, then over tiles of listed tokens.

Two warpgroups compute on 64 queries each and a third loads tiles by TMA. While one computes its
softmax the other multiplies (FlashAttention-3's ping-pong). Tiles are loaded from contiguous memory
only: the listed keys and values were gathered before. Scores of the softmax are powers of 2.
"""

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
  MATRIX,
  ROW,
  Registers,
  axes,
  by_column,
  by_row,
  gate_of,
  grid_of,
  matrix_buffer,
  phase_of,
  place,
  place_in,
  read_bounds,
)
from sparsek.kernels.sentinels import LOWEST


def forward(
  query,
  key,
  value,
  left,
  entered,
  tau,
  listed,
  bounds,
  *,
  gate,
  scale,
  chunk,
  tiling,
  interpret=None,
):
  """Attention output and logsumexp.

  Args:
    query: [B, n, H, D] bfloat16 or float16, n a multiple of 128, D 64 or 128.
    key, value: [B, n, G, D].
    left: [B, n] int32, first token of each query's window.
    entered: [B, G, n] int32, and `bounds` [B, G, n / 128, 6] int32: see tiles.Lists and
      tiles.query_bounds.
    tau: [B, G, n] float32 thresholds.
    listed: (key, value [B, G, places, D], score [B, G, places] float32, last [B, G, places] int32)
      of the lists of all chunks.
    gate: as in `sparsek.sparsek_attention`. scale: of the logits, not negative. chunk: queries per
      chunk. tiling: see Tiling.

  Returns:
    out [B, n, H, D] in query's dtype; logsumexp [B, H, n] float32 to base 2 (0 for queries that see
    nothing).
  """
  batch, n, heads, dim = query.shape
  groups = key.shape[2]
  dtype = query.dtype
  slots = listed[0].shape[2] // (n // chunk)
  gated = gate != "straight_through"  # else there are no scores to load
  block_kv, stages = tiling.forward_keys, tiling.forward_stages
  shape = (HALF, block_kv)
  to_log2 = scale * LOG2_E
  registers = Registers(interpret)
  sizes = {"batch": batch, "block": n // BLOCK_Q, "head": heads}

  def kernel(
    q_ref,
    k_ref,
    v_ref,
    left_ref,
    entered_ref,
    tau_ref,
    lk_ref,
    lv_ref,
    score_ref,
    last_ref,
    bounds_ref,
    out_ref,
    lse_ref,
    q_smem,
    k_smem,
    v_smem,
    last_smem,
    score_smem,
    row_smem,
    left_smem,
    entered_smem,
    k_full,
    v_full,
    q_full,
    k_free,
    v_free,
    turn,
  ):
    (b, block, h), warpgroup = place_in(**sizes), place("warpgroup")
    g = lax.div(h, jnp.array(heads // groups, h.dtype))
    first_row = block * BLOCK_Q
    list_start = lax.div(first_row, jnp.array(chunk, first_row.dtype)) * slots
    t0, t1, t2, t3, t4, t5 = read_bounds(bounds_ref, b, g, block)
    in_window = block - t4 + 1  # so many tiles
    steps = in_window + t3 - t0

    def take_turns():
      plgpu.barrier_arrive(turn)
      plgpu.barrier_wait(turn)

    @pl.when(warpgroup < 2)
    def _compute():
      plgpu.set_max_registers(232, action="increase")
      base = first_row + warpgroup * HALF
      rows = pl.ds(base, HALF)
      q, loaded = q_smem.at[warpgroup], q_full.at[warpgroup]
      plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h], q, loaded)
      plgpu.copy_gmem_to_smem(left_ref.at[b, rows], left_smem.at[warpgroup], loaded)
      plgpu.copy_gmem_to_smem(entered_ref.at[b, g, rows], entered_smem.at[warpgroup], loaded)
      plgpu.copy_gmem_to_smem(tau_ref.at[b, g, rows], row_smem.at[warpgroup], loaded)
      plgpu.barrier_wait(loaded)
      tau = registers.vector(row_smem.at[warpgroup], ROW) if gated else None
      plgpu.barrier_wait(k_full.at[0])
      pl.when(warpgroup == 1)(take_turns)
      column = lambda: registers.index(shape, 1)
      query_index = lambda: registers.index(shape, 0) + base

      def tile(step, t, carry, *, listed, exits=False, enters=False):
        """One tile; exits, enters: some of its pairs may be dead because the token left, or has not
        come yet.
        """
        acc, top, total = carry
        slot, _ = phase_of(step, stages)
        s = registers.matmul(shape, q, k_smem.at[slot], take_turns)
        if gate == "key_value" and listed:
          s *= gate_of(registers.vector(score_smem.at[slot], COLUMN), tau, shape)
        live = None
        if listed and exits:
          live = by_column(registers.vector(last_smem.at[slot], COLUMN), shape) > query_index()
        elif exits:
          live = column() >= by_row(
            registers.vector(left_smem.at[warpgroup], ROW) - t * block_kv, shape
          )
        if enters:
          here = (
            column()
            < by_row(registers.vector(entered_smem.at[warpgroup], ROW) - t * block_kv, shape)
            if listed
            else column() + t * block_kv <= query_index()
          )
          live = here if live is None else jnp.logical_and(live, here)
        if live is not None:
          s = jnp.where(live, s, -jnp.inf)
        if not (gated and listed):
          plgpu.barrier_arrive(k_free.at[slot])
        new_top = jnp.maximum(top, s.max(axis=1) * to_log2)
        decay = jnp.exp2(top - new_top)
        p = jnp.exp2(s * to_log2 - by_row(new_top, shape))
        acc *= by_row(decay, acc.shape)
        total *= decay
        if gated and listed:
          # the scores are loaded late (again), to save registers
          p, total = lax.optimization_barrier((p, total))
          weights = (p * gate_of(registers.vector(score_smem.at[slot], COLUMN), tau, shape)).astype(
            dtype
          )
          plgpu.barrier_arrive(k_free.at[slot])
        else:
          weights = p.astype(dtype)
        total += p.sum(axis=1)
        acc, total, new_top, weights = lax.optimization_barrier((acc, total, new_top, weights))
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_full.at[slot])
        plgpu.barrier_wait(turn)

        def wait_for_next_keys():
          following, _ = phase_of(step + 1, stages)
          pl.when(step + 1 < steps)(lambda: plgpu.barrier_wait(k_full.at[following]))

        (acc,) = registers.matmul_add((acc,), ((weights, v_smem.at[slot]),), wait_for_next_keys)
        plgpu.barrier_arrive(v_free.at[slot])
        return acc, new_top, total

      carry = (
        registers.full((HALF, dim), 0, MATRIX),
        registers.full((HALF,), LOWEST, ROW),
        registers.full((HALF,), 0, ROW),
      )
      near = lambda **kind: (
        lambda step, carry: tile(step, block - step, carry, listed=False, **kind)
      )
      far = lambda **kind: lambda t, carry: tile(in_window + t - t0, t, carry, listed=True, **kind)
      carry = lax.fori_loop(0, 1, near(exits=True, enters=True), carry)
      carry = lax.fori_loop(1, block - t5 + 1, near(), carry)
      carry = lax.fori_loop(block - t5 + 1, in_window, near(exits=True), carry)
      carry = lax.fori_loop(t0, t1, far(exits=True), carry)
      carry = lax.fori_loop(t1, t2, far(), carry)
      acc, top, total = lax.fori_loop(t2, t3, far(exits=True, enters=True), carry)
      pl.when(warpgroup == 0)(take_turns)
      seen = total > 0
      total = jnp.where(seen, total, 1.0)
      # a threshold of NaN shows
      factor = jnp.where(tau == tau, 1 / total, jnp.nan) if gated else 1 / total
      q[...] = (acc * by_row(factor, acc.shape)).astype(dtype)
      row_smem.at[warpgroup][...] = jnp.where(seen, top + jnp.log(total) * LOG2_E, 0.0)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(q, out_ref.at[b, rows, h])
      plgpu.copy_smem_to_gmem(row_smem.at[warpgroup], lse_ref.at[b, h, rows])
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == 2)
    def _load():
      plgpu.set_max_registers(40, action="decrease")

      def load(step, own=False):
        """One tile; the block's own waits for no bounds."""
        slot, reused = phase_of(step, stages)
        near, far = own or step < in_window, not own and step >= in_window
        tokens = pl.ds((block if own else jnp.maximum(block - step, 0)) * block_kv, block_kv)
        places = pl.ds(
          list_start + (0 if own else jnp.where(far, t0 + step - in_window, 0)) * block_kv, block_kv
        )

        def load_rows(token_ref, list_ref, buffer, full):
          pl.when(near)(
            lambda: plgpu.copy_gmem_to_smem(
              token_ref.at[b, tokens, g], buffer.at[slot], full.at[slot]
            )
          )
          pl.when(far)(
            lambda: plgpu.copy_gmem_to_smem(
              list_ref.at[b, g, places], buffer.at[slot], full.at[slot]
            )
          )

        pl.when(reused)(lambda: plgpu.barrier_wait(k_free.at[slot]))
        load_rows(k_ref, lk_ref, k_smem, k_full)
        plgpu.copy_gmem_to_smem(last_ref.at[b, g, places], last_smem.at[slot], k_full.at[slot])
        if gated:
          plgpu.copy_gmem_to_smem(score_ref.at[b, g, places], score_smem.at[slot], k_full.at[slot])
        pl.when(reused)(lambda: plgpu.barrier_wait(v_free.at[slot]))
        load_rows(v_ref, lv_ref, v_smem, v_full)

      load(0, own=True)
      pl.loop(1, steps)(load)

      if interpret is not None:  # the interpreter insists that every phase be observed

        @pl.loop(jnp.maximum(steps - stages, 0), steps)
        def _(step):
          slot, _ = phase_of(step, stages)
          plgpu.barrier_wait(k_free.at[slot])
          plgpu.barrier_wait(v_free.at[slot])

  vector = lambda rows, length, kind=jnp.float32: plgpu.SMEM((rows, length), kind)
  scratch = [
    matrix_buffer(2, HALF, dim, dtype),
    matrix_buffer(stages, block_kv, dim, dtype),
    matrix_buffer(stages, block_kv, dim, dtype),
    vector(stages, block_kv, jnp.int32),
    vector(stages, block_kv),
    vector(2, HALF),
    vector(2, HALF, jnp.int32),
    vector(2, HALF, jnp.int32),
    plgpu.Barrier(num_arrivals=3 if gated else 2, num_barriers=stages),
    plgpu.Barrier(num_arrivals=1, num_barriers=stages),
    plgpu.Barrier(num_arrivals=4, num_barriers=2),
    plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    plgpu.Barrier(num_arrivals=2),
  ]
  return plgpu.kernel(
    kernel,
    out_type=[
      jax.ShapeDtypeStruct(query.shape, dtype),
      jax.ShapeDtypeStruct((batch, heads, n), jnp.float32),
    ],
    scratch_types=scratch,
    **grid_of(**sizes),
    num_threads=3,
    thread_name=axes("warpgroup")[0],
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
    kernel_name="sparsek_forward",
  )(query, key, value, left, entered, tau, *listed, bounds)
