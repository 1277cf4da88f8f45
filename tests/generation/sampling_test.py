import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.generation.sampling import sample
from tests.helpers import quick_jit


@pytest.mark.parametrize("options", [dict(), dict(top_p=0.9), dict(top_k=3)])
@pytest.mark.parametrize("temperature", [1e-45, 1e-39, 1e-38, 1e-37, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature, options):
  logits = jnp.asarray([20.0, 60.0, 40.0, -20.0, -jnp.inf])
  assert sample(logits, jax.random.key(0), temperature, **options) == 1
  assert sample(logits[::-1], jax.random.key(1), temperature, **options) == 3


def test_extreme_numbers_mean_what_they_say():
  logits = jnp.log(jnp.asarray([0.1, 0.5, 0.4]))

  def draw(**options):
    drawn = sample(jnp.broadcast_to(logits, (3000, 3)), jax.random.key(0), **options)
    return np.bincount(drawn, minlength=3) / 3000

  for temperature in (1e38, 1e300, np.inf):
    np.testing.assert_allclose(draw(temperature=temperature), 1 / 3, atol=0.04)
  assert draw(top_p=1e-45)[1] == 1
  np.testing.assert_allclose(draw(top_p=1 - 1e-9), [0.1, 0.5, 0.4], atol=0.04)


def test_sample_draws_from_the_nucleus():
  probability = np.asarray([0.1, 0.5, 0.3, 0.06, 0.04])
  logits = jnp.log(jnp.asarray(probability)) + 3
  draw = quick_jit(
    lambda *options: sample(jnp.broadcast_to(logits, (20000, 5)), jax.random.key(0), *options)
  )
  share = lambda *args: np.bincount(draw(*args), minlength=5) / 20000
  np.testing.assert_allclose(share(1.0, 1.0), probability, atol=0.015)
  np.testing.assert_allclose(share(1.0, 0.7), [0, 0.625, 0.375, 0, 0], atol=0.015)
  np.testing.assert_allclose(share(0.5, 1.0), probability**2 / np.sum(probability**2), atol=0.015)
  np.testing.assert_array_equal(share(0.0, 1.0), [0, 1, 0, 0, 0])
  np.testing.assert_array_equal(share(1.0, 0.01), [0, 1, 0, 0, 0])
  np.testing.assert_allclose(share(1.0, 1.0, 2), [0, 0.625, 0.375, 0, 0], atol=0.015)
  np.testing.assert_array_equal(share(1.0, 0.6, 2), [0, 1, 0, 0, 0])
