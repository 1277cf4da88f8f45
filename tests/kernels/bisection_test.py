import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.kernels.bisection import bisect, bisect_near
from sparsek.kernels.fixed_point import fixed_point, lower_breakpoint, minus_one, next_below


@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000])
def test_bisect_is_searchsorted(n):
  rng = np.random.default_rng(n)
  x, values = np.sort(rng.integers(0, n, n)), jnp.asarray(rng.integers(-1, n + 1, 200))
  array = jnp.asarray(x)
  at = lambda i: array[jnp.clip(i, 0, n - 1)]
  ends = jnp.zeros_like(values), jnp.full_like(values, n)
  searches = (*ends, lambda i: at(i) >= values), (*ends, lambda i: at(i) > values)
  first, last = jax.jit(lambda: bisect(n, *searches))()
  np.testing.assert_array_equal(first, np.searchsorted(x, values, "left"))
  np.testing.assert_array_equal(last, np.searchsorted(x, values, "right"))
  for wrong in (0, 1):  # with right guesses, and with one that is wrong
    guesses = first.at[0].add(jnp.where(first[0] < n, wrong, -wrong)), last
    near = bisect_near(n, guesses, jnp.any, *searches)
    np.testing.assert_array_equal(jnp.stack(near), jnp.stack([first, last]))


def test_fixed_point_keeps_the_order():
  rng = np.random.default_rng(0)
  sizes = 10.0 ** rng.uniform(-6, 30, 2000)
  x = np.sort(np.concatenate([rng.normal(size=2000), sizes, -sizes]).astype(np.float32))
  whole, fraction = (np.asarray(part, np.int64) for part in fixed_point(jnp.asarray(x), 12))
  assert np.all(np.diff(whole * 2**24 + fraction) >= 0)
  near = np.abs(x) < 100
  error = x[near].astype(np.float64) - (whole + fraction / 2**24)[near]
  assert np.max(np.abs(error)) <= 2**-24


def test_breakpoints_of_floats_wider_than_one():
  x = jnp.asarray([2.5, -0.0, 2.0**24, -(2.0**30)], jnp.float32)
  below = np.nextafter(np.asarray(x), np.float32(-np.inf))
  np.testing.assert_array_equal(next_below(x), below)
  np.testing.assert_array_equal(minus_one(x), [1.5, -1, *below[2:]])
  np.testing.assert_array_equal(lower_breakpoint(x), [1.5, -1, *x[2:]])
