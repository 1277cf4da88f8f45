"""Products of few rows: the kernel run lane by lane in NumPy, and on a GPU beside XLA's; compile_test.py compiles it."""

import threading

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.kernels import mosaic_decode, mosaic_lanes, mosaic_skinny
from sparsek.kernels.mosaic_common import LOWEST
from tests.kernels import mosaic_lanes_test as lanes

CASES = {"plain": (1, 32, 256, {}), "residual": (3, 32, 640, {"residual"}), "norm": (8, 16, 2048, {"scale"}), "swiglu": (2, 64, 768, {"scale", "swiglu"}),
         "more": (1, 32, 1024, {"scale", "more", "float32"}), "parts": (2, 32, 512, {"parts", "residual"})}


def problem(case):
  """(arguments of `product`, the same by jnp)."""
  batch, columns, width, kinds = CASES[case]
  rng = np.random.default_rng(0)
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
  x, matrix, more, scale, residual = make(batch, width), make(columns, width), make(16, width), make(width).astype(jnp.float32), make(batch, columns)
  options = dict(scale=scale, epsilon=1e-6) if "scale" in kinds else {}
  options |= dict(residual=residual) if "residual" in kinds else {}
  options |= dict(swiglu="swiglu" in kinds, dtype=jnp.float32 if "float32" in kinds else None)
  matrices = (matrix, more) if "more" in kinds else (matrix,)
  if "parts" in kinds:
    number, heads = 3, width // 64
    top = jnp.asarray(rng.normal(size=(number, batch, heads)), jnp.float32).at[1].set(LOWEST)
    x = mosaic_skinny.Parts(jnp.asarray(rng.normal(size=(number, batch, width)), jnp.float32), top, jnp.ones(top.shape).at[1].set(0))
  h = (x.joined(jnp.bfloat16) if "parts" in kinds else x).astype(jnp.float32)
  if "scale" in kinds:
    h = (h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6) * scale).astype(jnp.bfloat16).astype(jnp.float32)
  y = jnp.matmul(h, jnp.concatenate(matrices).astype(jnp.float32).T, precision="highest")
  if "swiglu" in kinds:
    gate, up = jnp.split(y.astype(jnp.bfloat16).astype(jnp.float32), 2, axis=-1)
    y = jax.nn.silu(gate) * up
  if "residual" in kinds:
    y = y.astype(jnp.bfloat16).astype(jnp.float32) + residual.astype(jnp.float32)
  return x, matrices, options, y


def multiply_add(sums, a, b, dtype):
  """By the layouts of PTX's mma.m16n8k16."""
  row, column = np.arange(lanes.mosaic_lanes.LANES).reshape(-1, 8, 4) // 4 % 8, np.arange(4)
  pairs = lambda words: np.stack([np.asarray(w).view(dtype).astype(np.float32).reshape(-1, 8, 4, 2) for w in words])          # [word, warp, r, c, 2]
  (a, b), warps = map(pairs, (a, b)), row.shape[0]
  whole_a, whole_b, out = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8)), np.zeros((warps, 16, 8))
  for word in range(4):
    for c in column:
      k = 2 * c + word // 2 * 8
      whole_a[:, word % 2 * 8:word % 2 * 8 + 8, k:k + 2] = a[word, :, :, c]
      if word < 2:
        whole_b[:, 2 * c + 8 * word:2 * c + 8 * word + 2] = np.swapaxes(b[word, :, :, c], 1, 2)
  for i, x in enumerate(sums):
    out[:, i // 2 * 8:i // 2 * 8 + 8, i % 2::2] = np.asarray(x).reshape(-1, 8, 4)
  out += whole_a @ whole_b
  return tuple(jnp.asarray(out[:, i // 2 * 8:i // 2 * 8 + 8, i % 2::2].reshape(-1), jnp.float32) for i in range(4))


def emulate(monkeypatch, module):
  """Runs the kernels of a module lane by lane, every warpgroup in a thread of its own."""
  here = threading.local()

  def kernel(body, *, out_type=(), scratch_types=(), grid, grid_names, num_threads=1, thread_name=None, compiler_params, kernel_name):
    def run(*args):
      out = list(map(lanes.poisoned, out_type))
      args = [x if isinstance(x, lanes.Ref) else lanes.Ref(np.array(x)) for x in args]
      for program in np.ndindex(*grid):
        scratch = list(map(lanes.poisoned, scratch_types))
        barrier, errors = threading.Barrier(num_threads), []

        def work(warpgroup):
          here.place, here.barrier = dict(zip(grid_names, program)) | {thread_name: warpgroup}, barrier
          try:
            body(*args, *out, *scratch)
          except Exception as error:
            errors.append(error)
            barrier.abort()
        threads = [threading.Thread(target=work, args=(i,)) for i in range(num_threads)]
        for thread in threads:
          thread.start()
        for thread in threads:
          thread.join()
        if errors:
          raise errors[0]
      return [jnp.asarray(x.array) for x in out]
    return run
  functions = {f.__name__: f for f in (lanes.gather, lanes.gather_bytes, lanes.scatter, lanes.scatter_bytes, lanes.widen, lanes.narrow, multiply_add)}
  functions |= {"ask_bytes": lambda *args, once=False: lanes.gather_bytes(*args), "numbers": lambda: jnp.arange(mosaic_lanes.LANES, dtype=jnp.int32),
                "from_lane": lambda x, distance: x[jnp.arange(mosaic_lanes.LANES) ^ distance],
                "wait_for_all": lambda: here.barrier.wait()}
  for name, f in functions.items():
    for where in (module, mosaic_lanes, mosaic_skinny):
      monkeypatch.setattr(where, name, f, raising=False)
  for where, name in ((mosaic_skinny, "_product"), (mosaic_decode, "_attend"), (mosaic_decode, "evict")):
    monkeypatch.setattr(where, name, getattr(where, name).__wrapped__)
  monkeypatch.setattr(module.plgpu, "kernel", kernel)
  monkeypatch.setattr(jax.lax, "axis_index", lambda name: here.place[name])
  monkeypatch.setattr(pl, "when", lambda condition: lambda f: f() if condition else None)


@pytest.mark.parametrize("case", CASES)
def test_product_lane_by_lane(case, monkeypatch):
  x, matrices, options, expected = problem(case)
  emulate(monkeypatch, mosaic_skinny)
  found = mosaic_skinny.product(x, *matrices, **options)
  error = jnp.abs(found.astype(jnp.float32) - expected)
  assert jnp.max(error) <= (2e-5 if found.dtype == jnp.float32 else 2**-7) * jnp.max(jnp.abs(expected))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_product(case):
  if not mosaic_lanes.can_run():
    pytest.skip("needs a Hopper GPU")
  x, matrices, options, expected = problem(case)
  found = mosaic_skinny.product(x, *matrices, **options)
  assert jnp.max(jnp.abs(found.astype(jnp.float32) - expected)) <= 2**-7 * jnp.max(jnp.abs(expected))
