import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.attention.running_moments import Moments, running_moments
from tests.helpers import quick_jit


def document(n, starts):
  """(start, end) of each token's document."""
  which = np.searchsorted(starts, np.arange(n), side="right") - 1
  return np.array(starts)[which], np.array([*starts[1:], n])[which]


@pytest.mark.parametrize("offset", [0, 4096])
@pytest.mark.parametrize(
  "n, starts", [(1, [0]), (31, [0, 1]), (33, [0, 31, 32]), (2500, [0, 5, 64, 1100, 1101])]
)
def test_moments_of_every_prefix(n, starts, offset):
  """An offset costs no digits: numbers of 10 bits after the point stay exact beside 4096."""
  random = np.random.default_rng(n)
  logits, counted = (
    np.round(random.normal(size=(2, n, 3)) * 1024) / 1024,
    random.random((2, n)) < 0.9,
  )
  counted[0] = True
  start, end = (np.stack([x, x]).astype(np.int32) for x in document(n, starts))
  got = quick_jit(running_moments)((logits + offset).astype(np.float32), counted, start, end)
  for b in range(2):
    for j in random.permutation(n)[:50]:
      past = logits[b, start[b, j] : j + 1][counted[b, start[b, j] : j + 1]]
      np.testing.assert_array_equal(got.count[b, j], len(past))
      if len(past):
        np.testing.assert_allclose(
          got.mean[b, j] - np.float32(offset), past.mean(0), atol=1e-3 if offset else 1e-5
        )
        np.testing.assert_allclose(
          got.deviation[b, j], past.var(0) * len(past), rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("offset", [0, 4096])
def test_gradient_of_moments(offset):
  """Against autodiff of the definition in float64; the rows' offset costs the gradient no digits
  either.
  """
  n, starts = 130, [0, 5, 64, 65]
  random = np.random.default_rng(3)
  logits, d_mean, d_deviation = (np.round(random.normal(size=(3, 2, n, 2)) * 1024) / 1024).astype(
    np.float32
  )
  counted = random.random((2, n)) < 0.9
  start, end = (np.stack([x, x]).astype(np.int32) for x in document(n, starts))
  summed = lambda moments: jnp.sum(moments.mean * d_mean) + jnp.sum(moments.deviation * d_deviation)
  got = quick_jit(jax.grad(lambda x: summed(running_moments(x, counted, start, end))))(
    (logits + offset).astype(np.float32)
  )
  with jax.enable_x64(True):
    seen = jnp.asarray(
      (np.arange(n) <= np.arange(n)[:, None])
      & (np.arange(n) >= start[0][:, None])
      & counted[:, None]
    )[..., None]  # [B, N, N, 1]

    def definition(x):
      count = jnp.sum(seen, axis=2)
      mean = jnp.sum(jnp.where(seen, x[:, None], 0), axis=2) / jnp.maximum(count, 1)
      return Moments(
        count, mean, jnp.sum(jnp.where(seen, (x[:, None] - mean[:, :, None]) ** 2, 0), axis=2)
      )

    want = jax.grad(lambda x: summed(definition(x)))(jnp.asarray(logits, jnp.float64))
  got, want = np.asarray(got, np.float64), np.asarray(want)
  assert np.max(np.abs(got - want)) < (1e-3 if offset else 1e-5) * np.max(np.abs(want))
