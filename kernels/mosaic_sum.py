"""Sums the gradients of listed rows per token on Hopper GPUs, in a fixed order and in place."""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

BLOCK = 8                        # tokens of a program; their loads overlap
ROW_LENGTH = 128                 # a warpgroup loads rows of a multiple of this


def can_sum(dkey):
  """Whether `sum_rows` takes rows of this length; JAX 0.10 cannot write in place from a differentiated function."""
  return dkey.shape[-1] % ROW_LENGTH == 0 and jax.__version_info__ >= (0, 11)


def sum_rows(dkey, dvalue, rows, lists):
  """Adds the rows of listed tokens to those of the window.

  Args:
    dkey, dvalue: [B, n, G, D] 16-bit gradients of the window's keys and values; D a multiple of 128.
    rows: (dkey, dvalue [B, G, places, D], dscore [B, G, places] float32) of listed tokens; places without a token may hold anything.
    lists: tiles.Lists [B, G, ...].

  Returns:
    dkey, dvalue [B, n, G, D] (rounded once more) and dscores [B, G, n] float32.
  """
  batch, n, groups, _ = dkey.shape
  dtype = dkey.dtype
  places = rows[0].shape[2]

  # Most tokens were never selected: a program whose tokens none was ends at once.
  touched = jnp.any(((lists.new_place < places) | (lists.old_count > 0)).reshape(batch, groups, -1, BLOCK), axis=-1).astype(jnp.int32)

  def kernel(dk_ref, dv_ref, ds_ref, lk_ref, lv_ref, ls_ref, touched_ref, new_ref, place_ref, begin_ref, count_ref):
    g, block, b = (lax.axis_index(name) for name in ("group", "block", "batch"))

    @pl.when(touched_ref[b, g, block] > 0)
    def _():
      tokens = [block * BLOCK + t for t in range(BLOCK)]
      new, begin, count = ([ref[b, g, j] for j in tokens] for ref in (new_ref, begin_ref, count_ref))
      total = []
      for t, j in enumerate(tokens):
        is_new = new[t] < places
        place = jnp.where(is_new, new[t], 0)
        listed = [ref[b, g, place].astype(jnp.float32) for ref in (lk_ref, lv_ref, ls_ref)]
        total.append([jnp.where(jnp.broadcast_to(is_new, row.shape), row, jnp.zeros_like(row)) for row in listed])
      for t, j in enumerate(tokens):
        def add(e, sums, begin=begin[t]):
          place = place_ref[b, g, begin + e]
          return tuple(x + ref[b, g, place].astype(jnp.float32) for x, ref in zip(sums, (lk_ref, lv_ref, ls_ref)))
        dk, dv, ds = lax.fori_loop(0, count[t], add, tuple(total[t]))
        dk_ref[b, j, g] = (dk_ref[b, j, g].astype(jnp.float32) + dk).astype(dtype)
        dv_ref[b, j, g] = (dv_ref[b, j, g].astype(jnp.float32) + dv).astype(dtype)
        ds_ref[b, g, j] = ds

  totals = [jax.new_ref(x) for x in (dkey, dvalue, jnp.zeros((batch, groups, n), jnp.float32))]
  plgpu.kernel(
      kernel, grid=(groups, n // BLOCK, batch), grid_names=("group", "block", "batch"), kernel_name="sparsek_sum_rows",
  )(*totals, *rows, touched, lists.new_place, lists.old_place, lists.old_begin, lists.old_count)
  return tuple(total[...] for total in totals)
