"""Tests of the kernel between two layers' attention: run lane by lane in NumPy, all programs at the
same time, and on a GPU, compared with separate products.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.kernels import devices
from sparsek.kernels.hopper import fused_decode_layer, small_batch_matmul
from sparsek.kernels.sentinels import LOWEST
from tests.kernels.hopper.small_batch_matmul_test import emulate
from tests.kernels.hopper.thread_ops_test import Ref

EPSILON = 1e-6
# Rows, H D, E, F and columns of the next product; programs and bytes of shared memory of the
# emulation.
CASES = {
  "one_row": (1, 256, 256, 512, 160, 3, 2**16),
  "three_rows": (3, 512, 256, 768, 96, 5, 2**16),
  "four_rows": (4, 256, 512, 256, 48, 5, 2**17),
  "last": (3, 256, 256, 256, 0, 4, 2**16),
  "narrow": (2, 128, 384, 640, 80, 2, 2**15),
  "alone": (1, 256, 256, 256, 48, 1, 2**16),
  "few_tiles": (2, 128, 128, 256, 48, 9, 2**15),
}


def problem(case):
  """Returns the arguments of `fused_layer` but for the counter and epsilon."""
  batch, width, embed, hidden, columns, *_ = CASES[case]
  rng = np.random.default_rng(0)
  make = lambda *shape: jnp.asarray(rng.normal(size=shape) * shape[-1] ** -0.5, jnp.bfloat16)
  scale = lambda: jnp.asarray(rng.normal(size=embed), jnp.float32)
  number, heads = 3, width // 64
  top = jnp.asarray(rng.normal(size=(number, batch, heads)), jnp.float32).at[1].set(LOWEST)
  mixed = small_batch_matmul.Parts(
    jnp.asarray(rng.normal(size=(number, batch, width)), jnp.float32),
    top,
    jnp.ones(top.shape).at[1].set(0),
  )
  x = make(batch, embed) * embed**0.5
  return (
    mixed,
    x,
    make(embed, width),
    scale(),
    make(2 * hidden, embed),
    make(embed, hidden),
    scale() if columns else None,
    make(columns, embed) if columns else None,
  )


def separately(mixed, x, out, mlp_scale, up, down, next_scale, following):
  """Computes the four products in float64, rounded where the kernel rounds."""
  rounded = lambda y: np.asarray(jnp.asarray(y, x.dtype), np.float64)
  times = lambda y, matrix: y @ np.asarray(matrix, np.float64).T
  norm = lambda y, scale: rounded(
    y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + EPSILON) * np.asarray(scale, np.float64)
  )
  y = rounded(
    rounded(times(np.asarray(mixed.joined(x.dtype), np.float64), out)) + np.asarray(x, np.float64)
  )
  gate, value = np.split(rounded(times(norm(y, mlp_scale), up)), 2, axis=-1)
  y = rounded(rounded(times(rounded(gate / (1 + np.exp(-gate)) * value), down)) + y)
  return y, None if following is None else times(norm(y, next_scale), following)


def check(results, expected):
  for x, y in zip(results, expected):
    assert (x is None) == (y is None)
    if y is not None:
      x = np.asarray(x, np.float64)
      assert (
        x.shape == y.shape
        and np.max(np.abs(x - y)) <= 2**-6 * np.max(np.abs(y))
        and np.sqrt(np.mean((x - y) ** 2)) <= 2**-9 * np.std(y)
      )


@pytest.mark.parametrize("case", CASES)
def test_fused_layer_lane_by_lane(case, monkeypatch):
  """Runs one case twice with the same counter, as two layers do."""
  arguments = problem(case)
  expected = separately(*arguments)
  programs, shared = CASES[case][-2:]
  emulate(monkeypatch)
  monkeypatch.setattr(fused_decode_layer, "programs_at_once", lambda: programs)
  monkeypatch.setattr(fused_decode_layer, "SHARED", shared)
  monkeypatch.setattr(fused_decode_layer, "can_run", lambda: True)
  mixed, x, *rest = arguments
  assert fused_decode_layer.supports(x, *(rest[i] for i in (0, 2, 3, 5) if rest[i] is not None))
  monkeypatch.setattr(jax, "new_ref", lambda x: Ref(np.array(x)))
  typeof = jax.typeof
  monkeypatch.setattr(jax, "typeof", lambda x: None if isinstance(x, Ref) else typeof(x))
  counter = jnp.zeros(1, jnp.int32)
  for _ in range(2 if case == "one_row" else 1):
    *results, counter = fused_decode_layer.fused_layer(*arguments, counter, EPSILON)
    check(results, expected)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_plan(batch):
  """Checks the plan of the model in the benchmarks, and widths that have none."""
  groups, piece, stages = fused_decode_layer.plan(batch, 2048, 2048, 5632, 2048)
  assert (groups, piece) == (2, 512) and stages >= 7
  assert (
    fused_decode_layer.plan(batch, 2048, 2000) is None
    and fused_decode_layer.plan(4, 2048, 32768) is None
  )


def test_not_where_processes_share_the_device(tmp_path, monkeypatch):
  monkeypatch.setattr(fused_decode_layer, "can_run", lambda: True)
  x, matrix = jnp.zeros((1, 256), jnp.bfloat16), jnp.zeros((256, 256), jnp.bfloat16)
  monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "none"))
  assert fused_decode_layer.supports(x, matrix) and not fused_decode_layer.supports(
    jnp.zeros((fused_decode_layer.MOST_ROWS + 1, 256), jnp.bfloat16), matrix
  )
  monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
  assert not fused_decode_layer.supports(x, matrix)


@pytest.mark.gpu
@pytest.mark.parametrize(
  "sizes", [(1, 2048, 2048, 5632, 3104), (4, 2048, 2048, 5632, 3072), (3, 2048, 2048, 5632, 0)]
)
def test_fused_layer(sizes, monkeypatch):
  """Runs the kernel twenty times, each with the counter of the one before."""
  if not devices.can_run():
    pytest.skip("needs a Hopper GPU")
  monkeypatch.setitem(CASES, "card", sizes)
  arguments = problem("card")
  expected, counter = separately(*arguments), jnp.zeros(1, jnp.int32)
  for _ in range(20):
    *results, counter = fused_decode_layer.fused_layer(*arguments, counter, EPSILON)
    check(results, expected)
