import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.attention.exact_product import exact_product
from sparsek.attention.joined_products import joined_products
from tests.helpers import quick_jit

EMBED = 40


def random(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def one_by_one(x, kernels, exact):
  products = tuple(jnp.tensordot(x, kernel.astype(x.dtype), 1) for kernel in kernels)
  return products, None if exact is None else exact_product(x, exact)


@pytest.mark.parametrize("heads", [(4, 2, 2), (1,)])
@pytest.mark.parametrize("columns", [None, 1, 5])
def test_joined_products_are_the_products_and_their_gradients_exact_sums(heads, columns):
  """The gradient of x against float64, to one rounding; sums of rounded products have more."""
  x = random(0, 2, 33, EMBED).astype(jnp.bfloat16)
  kernels = tuple(random(1 + i, EMBED, h, 6) for i, h in enumerate(heads))
  exact = None if columns is None else random(9, EMBED, columns)
  out, vjp = quick_jit(lambda *args: jax.vjp(joined_products, *args))(x, kernels, exact)
  want = quick_jit(one_by_one)(x, kernels, exact)
  jax.tree.map(np.testing.assert_array_equal, out, want)
  d_out = jax.tree.map(lambda y: random(y.size, *y.shape).astype(y.dtype), out)
  d_x, d_kernels, d_exact = vjp(d_out)
  wide = lambda a: np.asarray(a.astype(jnp.float32), np.float64)
  error = lambda a, b: np.max(np.abs(np.asarray(a.astype(jnp.float32)) - b)) / np.max(np.abs(b))
  want_x = 0.0
  for kernel, d_kernel, d in zip(kernels, d_kernels, d_out[0], strict=True):
    want_x += np.einsum("bnhd,ehd->bne", wide(d), wide(kernel.astype(jnp.bfloat16)))
    assert d_kernel.dtype == jnp.float32
    assert error(d_kernel, np.einsum("bne,bnhd->ehd", wide(x), wide(d))) < 1e-6
  if exact is None:
    assert d_exact is None
  else:
    want_x += wide(d_out[1]) @ wide(exact.astype(jnp.bfloat16)).T
    assert error(d_exact, np.einsum("bne,bnc->ec", wide(x), wide(d_out[1]))) < 1e-6
  assert d_x.dtype == jnp.bfloat16 and error(d_x, want_x) < 2**-8


def test_joined_products_are_mapped():
  x = random(0, 3, 2, 5, EMBED).astype(jnp.bfloat16)
  kernels, exact = (random(1, EMBED, 2, 6), random(2, EMBED, 2, 6)), random(3, EMBED, 2)

  def gradient(x):
    products, exact_products = joined_products(x, kernels, exact)
    return sum(jnp.sum(y.astype(jnp.float32) ** 2) for y in (*products, exact_products))

  got = quick_jit(jax.vmap(jax.grad(gradient)))(x)
  want = jnp.stack([quick_jit(jax.grad(gradient))(row) for row in x])
  np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=2**-7)
