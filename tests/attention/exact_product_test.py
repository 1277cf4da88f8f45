import jax
import jax.numpy as jnp
import numpy as np

from sparsek.attention.exact_product import exact_product, scorer_logits, scorer_rows
from tests.helpers import quick_jit


def test_exact_product_is_one_of_float32():
  keys = jax.random.split(jax.random.key(4), 3)
  x, kernel, cotangent = (
    jax.random.normal(key, shape) for key, shape in zip(keys, ((2, 300, 40), (40, 3), (2, 300, 3)))
  )
  x = x.astype(jnp.bfloat16)
  out, vjp = quick_jit(lambda x, kernel: jax.vjp(exact_product, x, kernel))(x, kernel)
  d_x, d_kernel = vjp(cotangent)
  wide = lambda *arrays: (np.asarray(a.astype(jnp.float32), np.float64) for a in arrays)
  error = lambda a, b: np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(b))
  x64, kernel64, cotangent64 = wide(x, kernel, cotangent)
  assert out.dtype == d_kernel.dtype == jnp.float32 and d_x.dtype == jnp.bfloat16
  assert (
    error(out, x64 @ kernel64) < 1e-6
    and error(d_kernel, np.einsum("bne,bnc->ec", x64, cotangent64)) < 1e-6
  )
  assert error(d_x.astype(jnp.float32), cotangent64 @ kernel64.T) < 2**-8


def test_rows_of_parts_give_the_same_product():
  keys = jax.random.split(jax.random.key(5), 2)
  x, kernel = jax.random.normal(keys[0], (9, 40)), jax.random.normal(keys[1], (40, 3))
  x, rows = x.astype(jnp.bfloat16), scorer_rows(kernel, 8)
  assert rows.shape == (16, 40) and rows.dtype == jnp.bfloat16
  products = jnp.matmul(x, rows.T, preferred_element_type=jnp.float32)
  np.testing.assert_allclose(scorer_logits(products, 3), exact_product(x, kernel), rtol=1e-6)
