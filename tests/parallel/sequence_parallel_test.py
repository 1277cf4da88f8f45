"""Attention of rows whose tokens are sharded, against one device, on 8 simulated devices."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

import sparsek
from sparsek.kernels import specs
from sparsek.parallel import sequence_parallel
from sparsek.parallel.mesh import CONTEXT
from tests.commands import run_forked
from tests.parallel.sharded_attention import CASES, HEAD_DIM, PACKED, WINDOWS

TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  """Results of all cases, from one process."""
  folder = tmp_path_factory.mktemp("sharded")
  done = run_forked(["tests.parallel.sharded_attention"], folder, folder)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_those_of_one_device(results, name):
  errors = results["attention"][name]
  assert len(errors) == 5 and max(errors.values()) < TOLERANCE, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.rows == PACKED])
def test_thresholds_and_expiry_equal_those_of_one_device_to_the_bit(results, name):
  assert results["selection"][name] == {"threshold": True, "expiry": True}


@pytest.mark.slow
@pytest.mark.parametrize("name", WINDOWS)
def test_window_and_full_attention_equal_those_of_one_device(results, name):
  errors = results["window"][name]
  assert len(errors) == 4 and max(errors.values()) < TOLERANCE, errors


def received(traffic, *kinds):
  return sum(traffic[kind][1] for kind in kinds or traffic)


@pytest.mark.slow
def test_few_collectives_receive_few_bytes(results):
  """The formula of the design: 4 shards, k = 16, window 17, 4 groups of 32, float32."""
  shards, k, window, groups, row_bytes, length = 4, 16, 17, 4, 2 * 4 * 32 * 4, 128 // 4
  formula = (
    ((shards - 1) * k + window - 1) * row_bytes
    + (1 - 1 / shards) * 12 * length * groups
    + 4 * shards * k * groups
  )
  row = results["traffic"]["row"]
  assert received(row) < 1.05 * formula
  assert {kind: number for kind, (number, *_) in row.items()} == {
    "collective-permute": 1,
    "all-to-all": 2,
    "all-gather": 1,
    "reduce-scatter": 1,
  }


@pytest.mark.slow
def test_longer_rows_receive_as_many_bytes_of_keys(results):
  row, longer = (results["traffic"][name] for name in ("row", "row of twice the length"))
  keys = "collective-permute", "reduce-scatter", "all-gather"
  assert received(row, *keys) == received(longer, *keys)
  assert received(longer, "all-to-all") == 2 * received(row, "all-to-all")


@pytest.mark.slow
def test_gradients_receive_as_many_bytes_as_the_forward_pass(results):
  """Nothing is sent a second time for a block that is computed again in the backward pass."""
  row, both = (results["traffic"][name] for name in ("row", "gradients"))
  assert received(both) < 2 * received(row)


def arguments():
  spec = specs.Spec("x", n=16, heads=2, head_dim=HEAD_DIM)
  return specs.make_inputs(spec)


def test_on_one_device_it_is_the_public_function():
  query, key, value, scores = arguments()
  for module in (sequence_parallel, sparsek):
    outs = (
      module.sparsek_attention(
        query, key, value, scores, k=2, window=3, implementation="reference"
      ),
      module.sliding_window_attention(query, key, value, window=3),
    )
    if module is sequence_parallel:
      ours = outs
  for x, y in zip(ours, outs):
    assert jnp.array_equal(x, y)
  dense = jax.nn.dot_product_attention(query, key, value, is_causal=True)
  assert jnp.allclose(sequence_parallel.full_attention(query, key, value), dense, atol=1e-6)


@pytest.mark.parametrize(
  "change, error, words",
  [
    (dict(implementation="reference"), NotImplementedError, "takes whole rows"),
    (dict(segment_ids=jnp.zeros((1, 16), jnp.int32)), ValueError, r"whole rows, shape \(1, 32\)"),
    (dict(window=-1), ValueError, "window=-1"),
    (dict(gate="soft"), ValueError, "gate='soft'"),
  ],
)
def test_bad_arguments(change, error, words):
  """Traces only, for a mesh of two devices that are not here."""
  mesh = jax.sharding.AbstractMesh((2,), (CONTEXT,), axis_types=(AxisType.Auto,))
  attend = lambda *x: sequence_parallel.sparsek_attention(*x, **{"k": 2, "window": 3, **change})
  part = PartitionSpec(None, CONTEXT)
  f = jax.shard_map(attend, mesh=mesh, in_specs=part, out_specs=part, check_vma=False)
  shapes = [jax.ShapeDtypeStruct((1, 32, *x.shape[2:]), x.dtype) for x in arguments()]
  with pytest.raises(error, match=words):
    jax.eval_shape(f, *shapes)
