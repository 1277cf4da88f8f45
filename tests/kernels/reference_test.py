"""The O(n^2) reference: the shared behaviours, and gradients against finite differences in
float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsek
from sparsek.kernels import reference, specs
from tests.kernels.attention_base import AttentionTest, output_and_gradients, problem


class TestReference(AttentionTest):
  implementation = "reference"
  specs = ("plain", "documents")  # it is its own truth: float32 against float64 says little more

  @pytest.mark.parametrize("gate", ("value", "key_value"))
  def test_gradients_match_finite_differences(self, gate):
    spec = specs.Spec("differences", n=24, heads=2, groups=1, head_dim=4, k=4, window=3)
    inputs, cotangent, _ = problem(spec)
    with jax.enable_x64(True):
      inputs = [jnp.asarray(np.asarray(x), jnp.float64) for x in inputs]
      attention = functools.partial(
        reference.attention, k=spec.k, window=spec.window, gate=gate, scale=0.5
      )
      loss = jax.jit(
        lambda *x: jnp.sum(jnp.asarray(np.asarray(cotangent), jnp.float64) * attention(*x))
      )
      grads = jax.grad(loss, argnums=(0, 1, 2, 3))(*inputs)
      rng = np.random.default_rng(0)
      for which, grad in enumerate(grads):
        for _ in range(4):
          direction = jnp.asarray(rng.normal(size=grad.shape))
          shifted = lambda step: loss(
            *(x + step * direction if a == which else x for a, x in enumerate(inputs))
          )
          difference = (shifted(1e-6) - shifted(-1e-6)) / 2e-6
          np.testing.assert_allclose(jnp.sum(grad * direction), difference, rtol=1e-5, atol=1e-6)


@functools.cache
def padded(implementation, gate):
  """Returns inputs, and output and gradients, compiled, of rows that end in 7 tokens of padding."""
  spec = specs.Spec("padded", n=30, heads=4, groups=2, head_dim=8, k=3, window=3)
  inputs, cotangent, _ = problem(spec)
  attend = functools.partial(
    sparsek.sparsek_attention,
    k=3,
    window=3,
    gate=gate,
    implementation=implementation,
    segment_ids=jnp.where(jnp.arange(30) < 23, 1, 0)[None],
  )
  cotangent = cotangent.at[:, 23:].set(0)
  return inputs, jax.jit(lambda *inputs: output_and_gradients(attend, inputs, cotangent))


@pytest.mark.parametrize(
  "implementation, gate", [("reference", "straight_through"), ("xla", "key_value")]
)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_stays_with_those_that_see_it(implementation, gate, which):
  """Puts NaN and infinity in padding, as memory has that nobody wrote."""
  inputs, compiled = padded(implementation, gate)

  def run(value, other):
    changed = [
      x.at[0, 25, 0].set(value).at[0, 28, 0, 1].set(other) if i == which else x
      for i, x in enumerate(inputs)
    ]
    return list(map(np.asarray, compiled(*changed)))

  spoilt, plain = run(jnp.nan, jnp.inf), run(1.0, 1.0)
  rows = np.flatnonzero(np.isnan(spoilt[0]).any(axis=(0, 2, 3)))
  np.testing.assert_array_equal(rows, [25, 28] if which == 0 else range(25, 30))
  np.testing.assert_array_equal(spoilt[0][:, :25], plain[0][:, :25])
  for x, y in zip(spoilt[1:], plain[1:]):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("k, window", [(5, 2**31 - 1), (2**31, 3)])
def test_k_and_window_beyond_every_integer_are_those_of_the_row(implementation, k, window):
  spec = specs.Spec("row", n=24, heads=2, groups=1, head_dim=8, k=5, window=3)
  inputs = problem(spec)[0]
  attend = functools.partial(sparsek.sparsek_attention, *inputs, implementation=implementation)
  expected = attend(k=min(k, 24), window=min(window, 24))
  np.testing.assert_array_equal(attend(k=k, window=window), expected)
  window_alone = functools.partial(sparsek.sliding_window_attention, *inputs[:3])
  np.testing.assert_array_equal(window_alone(window=window), window_alone(window=min(window, 24)))
