"""The linear XLA implementation: the shared behaviours, linear memory, several devices."""

import jax
import jax.numpy as jnp
import pytest

import sparsek
from sparsek.kernels import specs
from tests.commands import Forked, simulated
from tests.kernels.attention_base import AttentionTest, dense_attention, problem, relative_error


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
  def test_four_devices(self, tmp_path):
    process = Forked(["tests.kernels.four_devices"], tmp_path, tmp_path, simulated(4))
    out, err = process.communicate()
    assert process.returncode == 0 and out == "4 devices agree\n", err


def test_sliding_window_matches_dense_attention_with_a_band():
  (q, k, v, _), _, _ = problem(specs.Spec("band", n=200, heads=4, groups=2))
  for window in (1, 30, 200, 500):
    dense = dense_attention(q, k, v, is_causal=True, local_window_size=(window - 1, 0))
    assert relative_error(sparsek.sliding_window_attention(q, k, v, window=window), dense) < 1e-5
