"""The O(n^2) reference: the shared behaviours, and gradients against finite differences in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.kernels import reference, specs
from tests.kernels.attention_base import AttentionTest, problem


class TestReference(AttentionTest):
  implementation = "reference"
  specs = ("plain", "documents")          # it is its own truth: float32 against float64 says little more

  @pytest.mark.parametrize("gate", ("value", "key_value"))
  def test_gradients_match_finite_differences(self, gate):
    spec = specs.Spec("differences", n=24, heads=2, groups=1, head_dim=4, k=4, window=3)
    inputs, cotangent, _ = problem(spec)
    with jax.enable_x64(True):
      inputs = [jnp.asarray(np.asarray(x), jnp.float64) for x in inputs]
      attention = functools.partial(reference.attention, k=spec.k, window=spec.window, gate=gate, scale=.5)
      loss = jax.jit(lambda *x: jnp.sum(jnp.asarray(np.asarray(cotangent), jnp.float64) * attention(*x)))
      grads = jax.grad(loss, argnums=(0, 1, 2, 3))(*inputs)
      rng = np.random.default_rng(0)
      for which, grad in enumerate(grads):
        for _ in range(4):
          direction = jnp.asarray(rng.normal(size=grad.shape))
          shifted = lambda step: loss(*(x + step * direction if a == which else x for a, x in enumerate(inputs)))
          difference = (shifted(1e-6) - shifted(-1e-6)) / 2e-6
          np.testing.assert_allclose(jnp.sum(grad * direction), difference, rtol=1e-5, atol=1e-6)
