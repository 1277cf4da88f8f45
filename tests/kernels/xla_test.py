"""The linear XLA implementation: the shared behaviours, linear memory, several devices."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import sparsek
from sparsek.kernels import specs
from tests.kernels.attention_base import AttentionTest, dense_attention, problem, relative_error

SHARDED = """
import jax, jax.numpy as jnp, numpy as np, sparsek
from sparsek.kernels import specs
spec = specs.Spec("sharded", n=100, batch=4, heads=4, groups=2, k=8, window=8, documents=(30, 50))
inputs, ids = specs.make_inputs(spec), specs.segment_ids(spec)
mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
part, rows = jax.sharding.PartitionSpec("data", None, "heads"), jax.sharding.PartitionSpec("data")
def loss(ids, *inputs):
  out = sparsek.sparsek_attention(*inputs, k=8, window=8, gate="value", segment_ids=ids)
  return jnp.sum(out ** 2)
grads = jax.grad(loss, argnums=(1, 2, 3, 4))
specs = (rows, part, part, part, part)
sharded = jax.shard_map(grads, mesh=mesh, in_specs=specs, out_specs=part)
sharded = jax.jit(sharded)(ids, *inputs)
for x, y in zip(sharded, jax.jit(grads)(ids, *inputs)):
  np.testing.assert_allclose(x, y, atol=2e-5)
print(len(x.sharding.device_set), "devices agree")
"""


class TestXla(AttentionTest):
  implementation = "xla"
  tolerance_16 = 1e-3 if jax.default_backend() == "cpu" else 5e-3  # a GPU multiplies in TF32

  @pytest.mark.parametrize("backward", (False, True))
  def test_temporary_memory_is_linear(self, backward):
    def temporary_bytes(n):
      f = lambda *x: jnp.sum(
        sparsek.sparsek_attention(*x, k=64, window=64, implementation="xla") ** 2
      )
      f = jax.grad(f, argnums=(0, 1, 2, 3)) if backward else f
      return (
        jax.jit(f)
        .lower(*specs.make_inputs(specs.Spec("memory", n=n, head_dim=32)))
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
      )

    assert temporary_bytes(8192) < 5 * temporary_bytes(2048)

  @pytest.mark.slow
  def test_four_devices(self):
    environment = {
      **os.environ,
      "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4",
      "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
      [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True
    )
    assert "4 devices agree" in done.stdout, done.stderr


def test_sliding_window_matches_dense_attention_with_a_band():
  (q, k, v, _), _, _ = problem(specs.Spec("band", n=200, heads=4, groups=2))
  for window in (1, 30, 200, 500):
    dense = dense_attention(q, k, v, is_causal=True, local_window_size=(window - 1, 0))
    assert relative_error(sparsek.sliding_window_attention(q, k, v, window=window), dense) < 1e-5
