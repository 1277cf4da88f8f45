"""Products with float32 matrices that are exact in float32, at the speed of bfloat16 products.

A float32 matrix is the sum of three bfloat16 matrices; products of two bfloat16 numbers are exact
in float32, in which they are summed (Henry, Tang and Heinecke 2019, arXiv 1904.06376).
"""

import jax
import jax.numpy as jnp

from sparsek.kernels.varying import cast_varying


def parts_of(x: jax.Array) -> list[jax.Array]:
  """Splits a float32 array into three bfloat16 ones that sum to it, within 2^-24 of it.

  A compiler may drop a rounding by `astype`, and the differences would be 0.
  """
  parts = []
  for _ in range(3):
    parts.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16))
    x = x - parts[-1].astype(jnp.float32)
  return parts


def sum_of_parts(product: jax.Array) -> jax.Array:
  """Sums the products with the three parts of a matrix, side by side: [..., 3 C] -> [..., C]."""
  return jnp.sum(product.reshape(*product.shape[:-1], 3, product.shape[-1] // 3), axis=-2)


def scorer_rows(kernel: jax.Array, multiple: int) -> jax.Array:
  """Returns the parts of W [E, G] as bfloat16 rows [M, E], M being 3 G padded to a multiple.

  `scorer_logits` turns the products of x with these rows into x W, as exact as `exact_product`.
  """
  rows = jnp.concatenate(parts_of(kernel), axis=-1).T
  return jnp.pad(rows, ((0, -len(rows) % multiple), (0, 0)))


def scorer_logits(products: jax.Array, features: int) -> jax.Array:
  """Sums the products with the rows of `scorer_rows`: [..., M] float32 -> [..., G]."""
  return sum_of_parts(products[..., : 3 * features])


def exact_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Multiplies x [..., E] bfloat16 by W [E, C] float32, as exactly as in float32.

  The gradient of W is as exact; that of x uses W rounded to bfloat16, as in other products.
  """
  return _exact_product(x, cast_varying(kernel, x))


@jax.custom_vjp
def _exact_product(x, kernel):
  return sum_of_parts(
    jnp.matmul(x, jnp.concatenate(parts_of(kernel), axis=-1), preferred_element_type=jnp.float32)
  )


def _exact_product_fwd(x, kernel):
  return _exact_product(x, kernel), (x, kernel)


def _exact_product_bwd(residuals, d_out):
  x, kernel = residuals
  d_parts = jnp.concatenate(parts_of(d_out), axis=-1)
  d_kernel = sum_of_parts(
    jnp.einsum("...e,...c->ec", x, d_parts, preferred_element_type=jnp.float32)
  )
  d_x = jnp.matmul(
    d_parts, jnp.tile(kernel.astype(x.dtype), 3).T, preferred_element_type=jnp.float32
  )
  return d_x.astype(x.dtype), d_kernel


_exact_product.defvjp(_exact_product_fwd, _exact_product_bwd)
