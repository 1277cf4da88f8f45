"""The kernels of the scorers' loss: the shared behaviours on a Hopper GPU, or interpreted."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.attention.ranking_loss import ranking_loss
from sparsek.attention.scorer_loss import attention_mass_loss
from sparsek.kernels.hopper.common import MULTIPROCESSORS
from sparsek.kernels.hopper.scorer_loss import attention_mass
from sparsek.kernels.hopper.scorer_loss_sums import splits_of
from tests.attention.scorer_loss_base import Case, ScorerLossTest, example

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.mark.gpu
class TestMosaicGpu(ScorerLossTest):
  implementation = "mosaic_gpu"
  dtype = "bfloat16"

  @pytest.mark.parametrize(
    "dtype, head_dim", [("bfloat16", 64), ("float16", 64), ("bfloat16", 256)]
  )
  def test_long_rows_match_xla(self, dtype, head_dim):
    case = Case(n=10_000, heads=8, groups=2, head_dim=head_dim, window=512, queries=200)
    arrays, queries = example(case, dtype)
    run = lambda name: jax.value_and_grad(self.loss(case, implementation=name))(*arrays, queries)
    got, again, want = run("mosaic_gpu"), run("mosaic_gpu"), run("xla")
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-3, atol=1e-8)
    np.testing.assert_array_equal(got[1], again[1])

  def test_is_the_default(self):
    case = Case()
    arrays, queries = example(case, self.dtype)
    default, named = (
      self.loss(case, implementation=name)(*arrays, queries) for name in (None, "mosaic_gpu")
    )
    assert default == named


@pytest.mark.gpu
@pytest.mark.parametrize(
  "case, dtype",
  [
    (Case(n=10_000, heads=8, groups=2, head_dim=64, window=512, queries=200), "bfloat16"),
    (Case(n=5000, heads=2, groups=2, head_dim=256, window=0, queries=100), "float16"),
    (
      Case(n=3000, head_dim=40, window=37, documents=((3, 2000), (0, 300), (5, 700)), queries=99),
      "bfloat16",
    ),
  ],
)
def test_ranking_matches_xla(case, dtype):
  arrays, queries = example(case, dtype)

  def run(implementation):
    options = {"window": case.window, "segment_ids": case.segment_ids}
    loss = functools.partial(ranking_loss, k=100, implementation=implementation, **options)
    return jax.jit(jax.value_and_grad(loss))(*arrays, queries)

  got, again, default, want = map(run, ("mosaic_gpu", "mosaic_gpu", None, "xla"))
  np.testing.assert_allclose(got[0], want[0], rtol=1e-4)
  np.testing.assert_allclose(got[1], want[1], rtol=2e-3, atol=1e-6 * np.max(np.abs(want[1])))
  np.testing.assert_array_equal(got[1], again[1])
  np.testing.assert_array_equal(got[1], default[1])


@pytest.mark.slow
@pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="the interpreter of JAX 0.10 takes minutes"
)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the kernels themselves run on this GPU")
def test_interpreted_kernels_match_the_definition():
  """Runs in a new process: with fewer devices than threads the interpreter waits for itself."""
  environment = {
    **os.environ,
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
    "JAX_PLATFORMS": "cpu",
  }
  command = [sys.executable, "-m", "tests.kernels.hopper.interpreted_scorer_loss"]
  done = subprocess.run(
    command, env=environment, capture_output=True, text=True, timeout=400, cwd=ROOT, check=False
  )
  assert done.returncode == 0, done.stderr
  for name, errors in json.loads(done.stdout).items():
    assert max(errors.values()) < 1e-5, (name, errors)


def test_says_why_it_cannot_run():
  (scores, query, key), queries = example(Case())
  with pytest.raises(NotImplementedError, match="'mosaic_gpu' cannot run here: .*float32"):
    attention_mass_loss(scores, query, key, queries, window=3, implementation="mosaic_gpu")
  with pytest.raises(NotImplementedError, match="'mosaic_gpu' cannot run here: .*float32"):
    ranking_loss(scores, query, key, queries, k=2, window=3, implementation="mosaic_gpu")


@pytest.mark.parametrize("units, most, expected", [(12, 256, 11), (1, 4, 4), (133, 9, 1)])
def test_pieces_fill_the_multiprocessors(units, most, expected):
  assert splits_of(units, most) == expected
  assert units * expected <= -(-units // MULTIPROCESSORS) * MULTIPROCESSORS


def test_traces_inside_shard_map():
  """Checks types only: no GPU is needed."""
  case = Case(n=200, head_dim=64)
  (scores, query, key), queries = example(case, "bfloat16")
  mesh = jax.make_mesh((1, 1), ("rows", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  tokens, rows = jax.sharding.PartitionSpec("rows", "context"), jax.sharding.PartitionSpec("rows")

  def run(scores, query, key, queries):
    ones = jnp.ones(queries.shape, jnp.float32)
    total, gradient = attention_mass(
      scores, query, key, queries, 0 * queries, ones, window=4, scale=1.0, axis="context"
    )
    return total[None], gradient

  traced = jax.jit(
    jax.shard_map(
      run,
      mesh=mesh,
      in_specs=(tokens, rows, tokens, rows),
      out_specs=(rows, tokens),
      check_vma=False,
    )
  ).trace(scores, query, key, queries)
  assert traced.out_info[1].shape == scores.shape
