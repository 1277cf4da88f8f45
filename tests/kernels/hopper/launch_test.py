"""The grids of the Mosaic GPU kernels at sizes that no machine here runs: CUDA must take them."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import core
from jax.experimental.pallas import mosaic_gpu as plgpu

import sparsek
from sparsek.kernels import devices, rms_norm
from sparsek.kernels.hopper import (
  decode_attention,
  decode_eviction,
  fused_decode_layer,
  small_batch_matmul,
)

LIMITS = 2**31 - 1, 65535, 65535  # programs along x, y, z


def launched(grid):
  """Returns the programs along x, y, z that Mosaic makes of a grid: its axes, last one first."""
  folded = grid if len(grid) <= 3 else (math.prod(grid[:-2]), *grid[-2:])
  return (*folded[::-1], 1, 1)[:3]


@pytest.fixture
def grids(monkeypatch):
  """Yields the grid of each kernel that is traced, by its name; none is lowered."""
  grids_by_name = {}

  def zeros_like(x):
    return jnp.zeros(x.shape, x.dtype)

  def kernel(body, *, grid, kernel_name, out_type=(), **_):
    grids_by_name[kernel_name] = grid
    return lambda *_: jax.tree.map(zeros_like, out_type)

  monkeypatch.setattr(plgpu, "kernel", kernel)
  monkeypatch.setattr(devices, "SUPPORTED", True)
  for module in (devices, fused_decode_layer):
    monkeypatch.setattr(module, "can_run", lambda: True)
  monkeypatch.setattr(devices, "can_run_portable", lambda: True)
  monkeypatch.setattr(devices, "hopper_refusal", lambda query: None)
  return grids_by_name


def array(*shape, dtype="bfloat16"):
  return jax.ShapeDtypeStruct(shape, dtype)


def check(grids, *names):
  assert set(grids) >= {f"sparsek_{name}" for name in names}
  beyond = {
    name: grid
    for name, grid in grids.items()
    if any(size > limit for size, limit in zip(launched(grid), LIMITS))
  }
  assert not beyond


@pytest.mark.parametrize(
  "batch, n, heads, groups, head_dim, k",
  [
    (1, 2**20, 12, 12, 64, 512),
    (2, 2**21, 64, 64, 128, 512),
    (1, 2**22, 128, 8, 128, 2048),
    (1, 2**23, 8, 1, 128, 512),
    (2**16 + 1, 129, 128, 2, 40, 64),
  ],
)
def test_attention_and_gradients(batch, n, heads, groups, head_dim, k, grids):
  query, key = array(batch, n, heads, head_dim), array(batch, n, groups, head_dim)

  def run(query, key, value, scores, segment_ids):
    attend = functools.partial(
      sparsek.sparsek_attention,
      k=k,
      window=min(512, n - 1),
      gate="value",
      segment_ids=segment_ids,
      implementation="mosaic_gpu",
    )
    out, vjp = jax.vjp(attend, query, key, value, scores)
    return vjp(out)

  jax.eval_shape(run, query, key, key, array(batch, n, groups), array(batch, n, dtype="int32"))
  check(
    grids,
    "sort_parts",
    "merge",
    "enter",
    "sum_columns",
    "add_columns",
    "walk",
    "finish",
    "intervals",
    "shares",
    "segments",
    "gradients",
    "count_members",
    "add_counts",
    "write_lists",
    "bound_tiles",
    "gather_rows",
    "forward",
    "query_gradients",
    "key_gradients",
    "sum_rows",
  )


def test_decoding(grids):
  """At the largest batches, most layers and longest caches that have kernels."""
  batch, layers, heads, groups, dim, window, k = 2**16 + 1, 300, 64, 8, 128, 2048, 2048
  per_head = functools.partial(array, batch, groups)
  floats, integers = (functools.partial(per_head, dtype=dtype) for dtype in ("float32", "int32"))
  rows = decode_attention.Rows(
    per_head(k + window, dim),
    per_head(k + window, dim),
    floats(k + window),
    integers(k),
    floats(window),
    (floats(),) * 4,
  )
  seen = array(batch, dtype="int32")
  jax.eval_shape(decode_eviction.evict, [rows] * layers, seen, seen)
  projected = array(batch, (heads + 2 * groups) * dim + 3 * groups, dtype="float32")
  angles, of_scorer = array(batch, dim // 2, dtype="float32"), array(groups, dtype="float32")

  def attend(projected, angles, rows, of_scorer, seen):
    scorer = decode_attention.Scorer(of_scorer, of_scorer, of_scorer, 1.0, 1)
    return decode_attention.attend(projected, angles, angles, rows, scorer, seen, seen, heads)

  jax.eval_shape(attend, projected, angles, rows, of_scorer, seen)
  jax.eval_shape(small_batch_matmul.product, array(8, 4096), array(2**20, 4096))
  check(grids, "evict", "attend", "small_batch_matmul")


@pytest.mark.parametrize("shape", [(1, 2**30, 256), (2**17, 1, 1536)])
def test_norms(shape, grids):
  def run(x, scale):
    out, vjp = jax.vjp(lambda x, scale: rms_norm.branched_rms_norm(x, scale, 1e-6), x, scale)
    return vjp(out)

  jax.eval_shape(run, array(*shape), array(shape[-1], dtype="float32"))
  check(grids, "rms_norm", "rms_norm_gradients")


@pytest.mark.parametrize("grid", [(5,), (2, 3), (2, 3, 5), (2, 3, 5, 7)])
def test_mosaic_launches_a_grid_in_that_order(grid, monkeypatch):
  """Lowers a kernel up to the point where JAX names the programs along x, y and z."""

  class Launched(Exception):
    pass

  def lower(*_, grid, **__):
    raise Launched(grid)

  monkeypatch.setattr(core, "_lower_as_gpu_kernel", lower)

  def body(out_ref):
    out_ref[...] = jnp.zeros(out_ref.shape, out_ref.dtype)

  kernel = plgpu.kernel(
    body, out_type=array(128, dtype="float32"), grid=grid, grid_names=tuple("abcd"[: len(grid)])
  )
  with pytest.raises(Launched) as raised:
    jax.jit(kernel).trace().lower(lowering_platforms=("cuda",))
  assert raised.value.args[0] == launched(grid)
