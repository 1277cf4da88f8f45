"""Sums the gradients of listed rows per token on Hopper GPUs, in a fixed order and in place."""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

BLOCK = 8                        # tokens of a program; their loads overlap
ROW_LENGTH = 128                 # a warpgroup loads rows of a multiple of this


def sum_rows(dkey, dvalue, rows, lists, *, interpret=None):
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

  def kernel(dk_ref, dv_ref, lk_ref, lv_ref, ls_ref, new_ref, place_ref, begin_ref, count_ref, ds_ref):
    g, block, b = (lax.axis_index(name) for name in ("group", "block", "batch"))
    tokens = [block * BLOCK + t for t in range(BLOCK)]
    new, count = ([ref[b, g, j] for j in tokens] for ref in (new_ref, count_ref))
    touched = [jnp.logical_or(new[t] < places, count[t] > 0) for t in range(BLOCK)]
    anything = touched[0]
    for one in touched[1:]:
      anything = jnp.logical_or(anything, one)

    @pl.when(jnp.logical_not(anything))
    def _():
      for j in tokens:
        ds_ref[b, g, j] = jnp.float32(0)

    @pl.when(anything)
    def _():
      total = []
      for t, j in enumerate(tokens):
        is_new = new[t] < places
        place = jnp.where(is_new, new[t], 0)
        listed = [ref[b, g, place].astype(jnp.float32) for ref in (lk_ref, lv_ref, ls_ref)]
        total.append([jnp.where(jnp.broadcast_to(is_new, row.shape), row, jnp.zeros_like(row)) for row in listed])
      for t, j in enumerate(tokens):
        begin = begin_ref[b, g, j]

        def add(e, sums):
          place = place_ref[b, g, begin + e]
          return tuple(x + ref[b, g, place].astype(jnp.float32) for x, ref in zip(sums, (lk_ref, lv_ref, ls_ref)))
        dk, dv, ds = lax.fori_loop(0, count[t], add, tuple(total[t]))
        dk_ref[b, j, g] = (dk_ref[b, j, g].astype(jnp.float32) + dk).astype(dtype)
        dv_ref[b, j, g] = (dv_ref[b, j, g].astype(jnp.float32) + dv).astype(dtype)
        ds_ref[b, g, j] = ds

  dkey, dvalue = jax.new_ref(dkey), jax.new_ref(dvalue)
  dscores = plgpu.kernel(
      kernel, out_type=jax.ShapeDtypeStruct((batch, groups, n), jnp.float32), grid=(groups, n // BLOCK, batch), grid_names=("group", "block", "batch"),
      interpret=interpret, kernel_name="sparsek_sum_rows",
  )(dkey, dvalue, *rows, lists.new_place, lists.old_place, lists.old_begin, lists.old_count)
  return dkey[...], dvalue[...], dscores
