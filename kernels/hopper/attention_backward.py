"""Backward pass of SPARSEK attention on Hopper GPUs: one kernel for the queries, one for listed
keys, one for the window's keys.

Every kernel recomputes the softmax from the logsumexp and owns what it writes, so there are no
atomics and results repeat to the bit. What gates do: gates.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsek.kernels.gates import tile_gradients, tile_weights
from sparsek.kernels.hopper.common import (
  BLOCK_Q,
  COLUMN,
  HALF,
  LOG2_E,
  MATRIX,
  ROW,
  ListWork,
  Registers,
  Work,
  axes,
  by_column,
  by_row,
  grid_of,
  matrix_buffer,
  phase_of,
  place,
  place_in,
  read_bounds,
)

# blocks of the window's keys, or of lists, that a program computes one after the other
MOST, MOST_LISTED = (16, 2)
KEY_BLOCK_KV = 128  # keys of a block: 64 for each of the two computing warpgroups


def joined(a, b):
  """[first, end) of two ranges together, of which either may be empty, wherever it begins."""
  empty = lambda range: range[0] >= range[1]
  either = lambda f, x, y: jnp.where(empty(a), y, jnp.where(empty(b), x, f(x, y)))
  return either(jnp.minimum, a[0], b[0]), either(jnp.maximum, a[1], b[1])


def pass_by(first, last, *, stages, full, free):
  """Steps [first, last) at tiles that only the other warpgroup sees."""

  @pl.loop(first, last)
  def _(step):
    slot, _ = phase_of(step, stages)
    for barrier in full:
      plgpu.barrier_wait(barrier.at[slot])
    for barrier in free:
      plgpu.barrier_arrive(barrier.at[slot])


def query_gradients(
  query,
  key,
  value,
  cotangent,
  out,
  logsumexp,
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
  """dquery [B, n, H, D]; delta [B, H, n] float32; dtau [B, H, n] float32, of each head.

  Args:
    query, key, value, left, entered, tau, listed, gate, scale, chunk, tiling: as of
      `attention_forward.forward`; out, logsumexp: its results.
    cotangent: [B, n, H, D] gradient of the output.
    bounds: [B, G, n / 64, 6] int32, of tiles.query_bounds with blocks of 64 queries, those of a
      warpgroup.
  """
  batch, n, heads, dim = query.shape
  groups = key.shape[2]
  dtype = query.dtype
  slots = listed[0].shape[2] // (n // chunk)
  block_kv, stages = tiling.query_keys, tiling.query_stages
  shape = (HALF, block_kv)
  to_log2 = scale * LOG2_E
  registers = Registers(interpret)
  sizes = {"batch": batch, "block": n // BLOCK_Q, "head": heads}

  def kernel(
    q_ref,
    k_ref,
    v_ref,
    do_ref,
    out_ref,
    lse_ref,
    left_ref,
    entered_ref,
    tau_ref,
    lk_ref,
    lv_ref,
    score_ref,
    last_ref,
    bounds_ref,
    dq_ref,
    delta_ref,
    dtau_ref,
    q_smem,
    do_smem,
    out_smem,
    k_smem,
    v_smem,
    last_smem,
    score_smem,
    lse_smem,
    delta_smem,
    tau_smem,
    left_smem,
    entered_smem,
    k_full,
    v_full,
    rows_full,
    k_free,
    v_free,
  ):
    (b, block, h), warpgroup = place_in(**sizes), place("warpgroup")
    g = lax.div(h, jnp.array(heads // groups, h.dtype))
    first_row = block * BLOCK_Q
    list_start = lax.div(first_row, jnp.array(chunk, first_row.dtype)) * slots
    own_tiles = BLOCK_Q // block_kv
    newest = block * own_tiles + own_tiles - 1
    of_both = [read_bounds(bounds_ref, b, g, 2 * block + i) for i in range(2)]
    begin, end = joined(*((t0, t3) for t0, _, _, t3, _, _ in of_both))
    in_window = newest - of_both[0][4] + 1  # so many tiles
    steps = in_window + end - begin

    @pl.when(warpgroup < 2)
    def _compute():
      plgpu.set_max_registers(232, action="increase")
      base = first_row + warpgroup * HALF
      rows = pl.ds(base, HALF)
      q, do, loaded = q_smem.at[warpgroup], do_smem.at[warpgroup], rows_full.at[warpgroup]
      plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h], q, loaded)
      plgpu.copy_gmem_to_smem(do_ref.at[b, rows, h], do, loaded)
      plgpu.copy_gmem_to_smem(lse_ref.at[b, h, rows], lse_smem.at[warpgroup], loaded)
      plgpu.copy_gmem_to_smem(out_ref.at[b, rows, h], out_smem.at[warpgroup], loaded)
      plgpu.copy_gmem_to_smem(left_ref.at[b, rows], left_smem.at[warpgroup], loaded)
      plgpu.copy_gmem_to_smem(entered_ref.at[b, g, rows], entered_smem.at[warpgroup], loaded)
      plgpu.copy_gmem_to_smem(tau_ref.at[b, g, rows], tau_smem.at[warpgroup], loaded)
      plgpu.barrier_wait(loaded)
      lse, tau = (registers.vector(x.at[warpgroup], ROW) for x in (lse_smem, tau_smem))
      delta = (
        registers.matrix(do).astype(jnp.float32)
        * registers.matrix(out_smem.at[warpgroup]).astype(jnp.float32)
      ).sum(axis=1)
      column = lambda: registers.index(shape, 1)
      query_index = lambda: registers.index(shape, 0) + base
      held = registers.matrix(q) if tiling.hold_queries else q

      def tile(step, t, carry, *, is_list, exits=False, enters=False):
        acc, dgate = carry
        slot, _ = phase_of(step, stages)
        plgpu.barrier_wait(k_full.at[slot])
        plgpu.barrier_wait(v_full.at[slot])
        live = None
        if is_list and exits:
          live = by_column(registers.vector(last_smem.at[slot], COLUMN), shape) > query_index()
        elif exits:
          live = column() >= by_row(
            registers.vector(left_smem.at[warpgroup], ROW) - t * block_kv, shape
          )
        if enters:
          here = (
            column()
            < by_row(registers.vector(entered_smem.at[warpgroup], ROW) - t * block_kv, shape)
            if is_list
            else column() + t * block_kv <= query_index()
          )
          live = here if live is None else jnp.logical_and(live, here)

        def probability(logits):
          p = jnp.exp2(logits * to_log2 - by_row(lse, shape))
          return p if live is None else jnp.where(live, p, 0.0)

        distance = (
          (
            lambda: (
              by_column(registers.vector(score_smem.at[slot], COLUMN), shape) - by_row(tau, shape)
            )
          )
          if is_list
          else None
        )

        def gradients(s, dp):
          p, g, _ = tile_weights(s, probability, distance, gate=gate)
          product = dp(0)
          plgpu.barrier_arrive(v_free.at[slot])
          ds, new = tile_gradients(
            s, p, g, product, by_row(delta, shape), distance, gate=gate, scale=scale
          )
          return ds.astype(dtype), None if new is None else new.sum(axis=1)

        ds, new = registers.two_matmuls(
          shape, (held, k_smem.at[slot]), (do, v_smem.at[slot]), gradients
        )
        if is_list:
          dgate += new
        (acc,) = registers.matmul_add((acc,), ((ds, k_smem.at[slot]),))
        plgpu.barrier_arrive(k_free.at[slot])
        return acc, dgate

      carry = registers.full((HALF, dim), 0, MATRIX), registers.full((HALF,), 0, ROW)
      near = lambda **kind: (
        lambda step, carry: tile(step, newest - step, carry, is_list=False, **kind)
      )
      far = lambda **kind: (
        lambda t, carry: tile(in_window + t - begin, t, carry, is_list=True, **kind)
      )

      skip = functools.partial(pass_by, stages=stages, full=(k_full, v_full), free=(k_free, v_free))
      t0, t1, t2, t3, t4, t5 = (jnp.where(warpgroup == 0, *both) for both in zip(*of_both))
      # anywhere if none is live
      t0, t1, t2, t3 = (jnp.clip(t, begin, end) for t in (t0, t1, t2, t3))
      diagonal = own_tiles - 1 - warpgroup * HALF // block_kv
      skip(0, diagonal)
      carry = lax.fori_loop(diagonal, diagonal + 1, near(exits=True, enters=True), carry)
      carry = lax.fori_loop(diagonal + 1, newest - t5 + 1, near(), carry)
      carry = lax.fori_loop(newest - t5 + 1, newest - t4 + 1, near(exits=True), carry)
      skip(newest - t4 + 1, in_window + t0 - begin)
      carry = lax.fori_loop(t0, t1, far(exits=True), carry)
      carry = lax.fori_loop(t1, t2, far(), carry)
      acc, dgate = lax.fori_loop(t2, t3, far(exits=True, enters=True), carry)
      skip(in_window + t3 - begin, steps)
      q[...] = (acc * scale).astype(dtype)
      delta_smem.at[warpgroup][...] = delta
      lse_smem.at[warpgroup][...] = -dgate
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(q, dq_ref.at[b, rows, h])
      plgpu.copy_smem_to_gmem(delta_smem.at[warpgroup], delta_ref.at[b, h, rows])
      plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], dtau_ref.at[b, h, rows])
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == 2)
    def _load():
      plgpu.set_max_registers(40, action="decrease")

      def load(step, own=False):
        """One tile; the block's own wait for no bounds."""
        slot, reused = phase_of(step, stages)
        near, far = own or step < in_window, not own and step >= in_window
        tokens = pl.ds(
          (newest - step if own else jnp.maximum(newest - step, 0)) * block_kv, block_kv
        )
        places = pl.ds(
          list_start + (0 if own else jnp.where(far, begin + step - in_window, 0)) * block_kv,
          block_kv,
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
        plgpu.copy_gmem_to_smem(score_ref.at[b, g, places], score_smem.at[slot], k_full.at[slot])
        pl.when(reused)(lambda: plgpu.barrier_wait(v_free.at[slot]))
        load_rows(v_ref, lv_ref, v_smem, v_full)

      for step in range(own_tiles):
        load(step, own=True)
      pl.loop(own_tiles, steps)(load)

      if interpret is not None:  # the interpreter insists that every phase be observed

        @pl.loop(jnp.maximum(steps - stages, 0), steps)
        def _(step):
          slot, _ = phase_of(step, stages)
          plgpu.barrier_wait(k_free.at[slot])
          plgpu.barrier_wait(v_free.at[slot])

  vector = lambda rows, length, kind=jnp.float32: plgpu.SMEM((rows, length), kind)
  scratch = [
    *(matrix_buffer(2, HALF, dim, dtype) for _ in range(3)),
    matrix_buffer(stages, block_kv, dim, dtype),
    matrix_buffer(stages, block_kv, dim, dtype),
    vector(stages, block_kv, jnp.int32),
    vector(stages, block_kv),
    vector(2, HALF),
    vector(2, HALF),
    vector(2, HALF),
    vector(2, HALF, jnp.int32),
    vector(2, HALF, jnp.int32),
    plgpu.Barrier(num_arrivals=3, num_barriers=stages),
    plgpu.Barrier(num_arrivals=1, num_barriers=stages),
    plgpu.Barrier(num_arrivals=7, num_barriers=2),
    plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    plgpu.Barrier(num_arrivals=2, num_barriers=stages),
  ]
  return plgpu.kernel(
    kernel,
    out_type=[
      jax.ShapeDtypeStruct(query.shape, dtype),
      *[jax.ShapeDtypeStruct((batch, heads, n), jnp.float32)] * 2,
    ],
    scratch_types=scratch,
    **grid_of(**sizes),
    num_threads=3,
    thread_name=axes("warpgroup")[0],
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
    kernel_name="sparsek_query_gradients",
  )(query, key, value, cotangent, out, logsumexp, left, entered, tau, *listed, bounds)


def key_gradients(
  query,
  keys,
  values,
  cotangent,
  logsumexp,
  delta,
  first,
  last,
  bounds,
  *,
  gate,
  scale,
  tiling,
  lists=0,
  middle=0,
  score=None,
  tau=None,
  interpret=None,
):
  """(dkey, dvalue) of the shape of `keys`, and of listed keys the gates' gradient summed over
  queries, [B, G, places] float32, which is dscore.

  Blocks that no query sees are not written.

  Args:
    query, cotangent, logsumexp, delta, gate, scale, tiling: as of `query_gradients`.
    keys, values: [B, n, G, D] for the window, [B, G, places, D] for lists.
    first, last: int32, a key is live for queries first <= i < last; [B, n] for the window, [B, G,
      places] for lists.
    bounds: int32 of tiles.key_tiles with blocks of tiling.key_queries queries and 64 keys, those of
      a warpgroup; [B, n / 64, 4] or [B, G, places / 64, 4].
    lists: how many there are in a row; 0 for the window. middle: places of a list that may be live
    at its first query. Of lists only:
    score, tau: [B, G, places] and [B, G, n] float32.
  """
  batch, n, heads, dim = query.shape
  groups, count = keys.shape[1:3] if lists else keys.shape[2:0:-1]
  repeats = heads // groups
  dtype = query.dtype
  block_q, stages = tiling.key_queries, tiling.key_stages
  early = tiling.early and gate != "key_value"  # which needs the registers
  shape = (HALF, block_q)  # keys by queries: transposed
  to_log2 = scale * LOG2_E
  registers = Registers(interpret)
  blocks = count // KEY_BLOCK_KV
  work = (
    ListWork(batch, lists, groups, blocks // lists, -(-middle // KEY_BLOCK_KV), most=MOST_LISTED)
    if lists
    else Work(batch, blocks, groups, most=MOST)
  )
  depth = min(2, work.each)  # items whose keys are in shared memory

  def kernel(
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, first_ref, last_ref, bounds_ref, *refs
  ):
    if lists:
      score_ref, tau_ref, dk_ref, dv_ref, dscore_ref, *refs = refs
    else:
      dk_ref, dv_ref, *refs = refs
    (
      k_smem,
      v_smem,
      q_smem,
      do_smem,
      lse_smem,
      delta_smem,
      tau_smem,
      first_smem,
      last_smem,
      score_smem,
      q_full,
      do_full,
      keys_full,
      q_free,
      do_free,
    ) = refs
    program, warpgroup = place("program", "warpgroup")
    number = work.count(program)

    def bounds_of(b, block, g, warpgroup):
      return read_bounds(bounds_ref, *((b, g) if lists else (b,)), 2 * block + warpgroup)

    def item(i):
      """Row of the batch, block, head; [first, end) block of queries that sees it."""
      b, block, g = work.item(program, i)
      begin, end = joined(
        *((b0, b3) for b0, _, _, b3 in (bounds_of(b, block, g, half) for half in range(2)))
      )
      return b, block, g, begin, end

    busy = True
    if lists:  # many hold no token
      ranges = [item(jnp.int32(i))[3:] for i in range(work.each)]
      busy = functools.reduce(jnp.logical_or, [end > begin for begin, end in ranges])

    @pl.when(jnp.logical_and(busy, warpgroup < 2))
    def _compute():
      plgpu.set_max_registers(232, action="increase")
      slot_of = lambda i: 2 * phase_of(i, depth)[0] + warpgroup if depth > 1 else warpgroup
      keys_of = lambda block: pl.ds(block * KEY_BLOCK_KV + warpgroup * HALF, HALF)
      at = lambda ref, b, block, g: (
        ref.at[b, g, keys_of(block)] if lists else ref.at[b, keys_of(block), g]
      )
      bounds_at = lambda ref, b, block, g: (
        ref.at[b, g, keys_of(block)] if lists else ref.at[b, keys_of(block)]
      )

      def load_keys(i):
        *where, begin, end = item(i)

        @pl.when(end > begin)
        def _():
          slot = slot_of(i)
          loaded = keys_full.at[slot]
          plgpu.copy_gmem_to_smem(at(k_ref, *where), k_smem.at[slot], loaded)
          plgpu.copy_gmem_to_smem(at(v_ref, *where), v_smem.at[slot], loaded)
          plgpu.copy_gmem_to_smem(bounds_at(first_ref, *where), first_smem.at[slot], loaded)
          plgpu.copy_gmem_to_smem(bounds_at(last_ref, *where), last_smem.at[slot], loaded)
          if lists:
            plgpu.copy_gmem_to_smem(at(score_ref, *where), score_smem.at[slot], loaded)

      def compute(i, done):
        b, block, g, begin, end = item(i)
        blocks, own = end - begin, slot_of(i)
        k, v, first, last = k_smem.at[own], v_smem.at[own], first_smem.at[own], last_smem.at[own]
        pl.when(blocks > 0)(lambda: plgpu.barrier_wait(keys_full.at[own]))
        score = registers.vector(score_smem.at[own], ROW) if lists else None

        def tile(step, block_of_queries, carry, masked):
          dk, dv, dscore = carry
          slot, _ = phase_of(step, stages)
          plgpu.barrier_wait(q_full.at[slot])
          plgpu.barrier_wait(do_full.at[slot])

          def probability(logits):
            p = jnp.exp2(
              logits * to_log2 - by_column(registers.vector(lse_smem.at[slot], COLUMN), shape)
            )
            if not masked:
              return p
            query_index = registers.index(shape, 1) + block_of_queries * block_q
            live = jnp.logical_and(
              by_row(registers.vector(first, ROW), shape) <= query_index,
              query_index < by_row(registers.vector(last, ROW), shape),
            )
            return jnp.where(live, p, 0.0)

          distance = (
            (
              lambda: (
                by_row(score, shape) - by_column(registers.vector(tau_smem.at[slot], COLUMN), shape)
              )
            )
            if lists
            else None
          )
          delta = lambda: by_column(registers.vector(delta_smem.at[slot], COLUMN), shape)

          def gradients(s, dp):
            p, g, weights = tile_weights(s, probability, distance, gate=gate)

            def rest(later):
              ds, new = tile_gradients(
                s, p, g, dp(later), delta(), distance, gate=gate, scale=scale
              )
              return ds.astype(dtype), None if new is None else new.sum(axis=1)

            if early:
              return registers.matmul_add_in_turn(
                (dv, dk),
                weights.astype(dtype),
                do_smem.at[slot],
                functools.partial(rest, 1),
                q_smem.at[slot],
              )
            return weights.astype(dtype), *rest(0)

          *products, new = registers.two_matmuls(
            shape, (k, q_smem.at[slot]), (v, do_smem.at[slot]), gradients
          )
          if not early:
            weights, ds = products
            products = registers.matmul_add(
              (dv, dk), ((weights, do_smem.at[slot]), (ds, q_smem.at[slot]))
            )
          dv, dk = products
          if lists:
            dscore += new
          plgpu.barrier_arrive(do_free.at[slot])
          plgpu.barrier_arrive(q_free.at[slot])
          return dk, dv, dscore

        skip = functools.partial(
          pass_by, stages=stages, full=(q_full, do_full), free=(do_free, q_free)
        )
        b0, b1, b2, b3 = (jnp.clip(x, begin, end) for x in bounds_of(b, block, g, warpgroup))

        def head(r, carry):
          step = lambda t: done + r * blocks + t - begin
          sweep = lambda masked: lambda t, carry: tile(step(t), t, carry, masked)
          skip(step(begin), step(b0))
          carry = lax.fori_loop(b0, b1, sweep(True), carry)

          if depth > 1:

            @pl.when(jnp.logical_and(r == 0, i + 1 < number))
            def _():
              # the item before has been stored from there
              plgpu.wait_smem_to_gmem(0, wait_read_only=True)
              load_keys(i + 1)

          carry = lax.fori_loop(b1, b2, sweep(False), carry)
          carry = lax.fori_loop(b2, b3, sweep(True), carry)
          skip(step(b3), step(end))
          return carry

        carry = (
          registers.full((HALF, dim), 0, MATRIX),
          registers.full((HALF, dim), 0, MATRIX),
          registers.full((HALF,), 0, ROW),
        )
        dk, dv, dscore = lax.fori_loop(0, repeats, head, carry) if repeats > 1 else head(0, carry)

        @pl.when(blocks > 0)
        def _():
          k[...] = (dk * scale).astype(dtype)
          v[...] = dv.astype(dtype)
          if lists:
            score_smem.at[own][...] = dscore
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(k, at(dk_ref, b, block, g))
          plgpu.copy_smem_to_gmem(v, at(dv_ref, b, block, g))
          if lists:
            plgpu.copy_smem_to_gmem(score_smem.at[own], at(dscore_ref, b, block, g))

        return done + repeats * blocks

      load_keys(jnp.int32(0))
      lax.fori_loop(0, number, compute, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(jnp.logical_and(busy, warpgroup == 2))
    def _load():
      plgpu.set_max_registers(40, action="decrease")

      def load_tiles(i, done):
        b, _, g, begin, end = item(i)
        blocks = end - begin

        def head(r, _):
          h = g * repeats + r

          @pl.loop(0, blocks)
          def _(t):
            slot, reused = phase_of(done + r * blocks + t, stages)
            rows = pl.ds((begin + t) * block_q, block_q)
            pl.when(reused)(lambda: plgpu.barrier_wait(q_free.at[slot]))
            plgpu.copy_gmem_to_smem(lse_ref.at[b, h, rows], lse_smem.at[slot], q_full.at[slot])
            if lists:
              plgpu.copy_gmem_to_smem(tau_ref.at[b, g, rows], tau_smem.at[slot], q_full.at[slot])
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h], q_smem.at[slot], q_full.at[slot])
            pl.when(reused)(lambda: plgpu.barrier_wait(do_free.at[slot]))
            plgpu.copy_gmem_to_smem(delta_ref.at[b, h, rows], delta_smem.at[slot], do_full.at[slot])
            plgpu.copy_gmem_to_smem(do_ref.at[b, rows, h], do_smem.at[slot], do_full.at[slot])

        if repeats > 1:
          lax.fori_loop(0, repeats, head, None)
        else:
          head(0, None)
        return done + repeats * blocks

      steps = lax.fori_loop(0, number, load_tiles, jnp.int32(0))

      if interpret is not None:  # the interpreter insists that every phase be observed

        @pl.loop(jnp.maximum(steps - stages, 0), steps)
        def _(step):
          slot, _ = phase_of(step, stages)
          plgpu.barrier_wait(q_free.at[slot])
          plgpu.barrier_wait(do_free.at[slot])

  vector = lambda rows, length, kind=jnp.float32: plgpu.SMEM((rows, length), kind)
  scratch = [
    matrix_buffer(2 * depth, HALF, dim, dtype),
    matrix_buffer(2 * depth, HALF, dim, dtype),
    matrix_buffer(stages, block_q, dim, dtype),
    matrix_buffer(stages, block_q, dim, dtype),
    vector(stages, block_q),
    vector(stages, block_q),
    vector(stages, block_q),
    vector(2 * depth, HALF, jnp.int32),
    vector(2 * depth, HALF, jnp.int32),
    vector(2 * depth, HALF),
    plgpu.Barrier(num_arrivals=3 if lists else 2, num_barriers=stages),
    plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    plgpu.Barrier(num_arrivals=5 if lists else 4, num_barriers=2 * depth),
    plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    plgpu.Barrier(num_arrivals=2, num_barriers=stages),
  ]
  out_type = [jax.ShapeDtypeStruct(keys.shape, dtype)] * 2 + [
    jax.ShapeDtypeStruct((batch, groups, count), jnp.float32)
  ] * bool(lists)
  return plgpu.kernel(
    kernel,
    out_type=out_type,
    scratch_types=scratch,
    grid=(work.programs,),
    grid_names=axes("program"),
    num_threads=3,
    thread_name=axes("warpgroup")[0],
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
    kernel_name="sparsek_key_gradients",
  )(
    query,
    keys,
    values,
    cotangent,
    logsumexp,
    delta,
    first,
    last,
    bounds,
    *((score, tau) if lists else ()),
  )
