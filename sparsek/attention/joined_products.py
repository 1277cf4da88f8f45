"""Products of the same hidden states with several matrices, differentiated together.

One by one, the gradient of the hidden states is a sum of as many arrays as there are matrices, each
written, rounded and read again.
"""

import jax
import jax.numpy as jnp

from sparsek.attention.exact_product import exact_product, parts_of, sum_of_parts
from sparsek.kernels.varying import cast_varying

# Columns of the joined gradients come in multiples of this: rows then begin at whole cache lines.
COLUMNS = 64


def joined_products(
  x: jax.Array, kernels: tuple[jax.Array, ...], exact: jax.Array | None
) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
  """Multiplies hidden states by several matrices.

  The gradient of x is one product of all outputs' gradients, side by side, and is rounded once;
  those of the matrices are another, summed in float32 and not rounded.

  Args:
    x: [..., E] bfloat16.
    kernels: float32 [E, *features], rounded to bfloat16 for their products.
    exact: float32 [E, C], for `exact_product`, or None.

  Returns:
    x times each kernel, [..., *features] bfloat16, and x times `exact`, [..., C] float32, or
    None.
  """
  return _joined_products(x, *cast_varying((kernels, exact), x))


@jax.custom_vjp
def _joined_products(x, kernels, exact):
  return _joined_products_fwd(x, kernels, exact)[0]


def _joined_products_fwd(x, kernels, exact):
  products = tuple(jnp.tensordot(x, kernel.astype(x.dtype), 1) for kernel in kernels)
  exact_products = None if exact is None else exact_product(x, exact)
  return (products, exact_products), (x, kernels, exact)


def _side_by_side(wide, narrow):
  """Joins arrays [..., n_i] to [..., n], padded with zeros to whole COLUMNS.

  XLA joins at most four arrays at the speed of the memory, so the narrow ones are joined before.
  """
  *leading, _ = wide[0].shape
  padding = -sum(array.shape[-1] for array in (*wide, *narrow)) % COLUMNS
  if padding:
    narrow = [*narrow, jnp.zeros((*leading, padding), wide[0].dtype)]
  if narrow:
    wide = [*wide, jax.lax.optimization_barrier(jnp.concatenate(narrow, axis=-1))]
  return jnp.concatenate(wide, axis=-1)


def _joined_products_bwd(residuals, cotangents):
  (x, kernels, exact), (d_products, d_exact) = residuals, cotangents
  d_wide = [d.reshape(*x.shape[:-1], -1) for d in d_products]
  wide = [kernel.reshape(len(kernel), -1).astype(x.dtype) for kernel in kernels]
  d_narrow, narrow = ([], []) if exact is None else (parts_of(d_exact), [exact.astype(x.dtype)] * 3)
  d_joined = _side_by_side(d_wide, d_narrow)
  d_x = jnp.matmul(d_joined, _side_by_side(wide, narrow).T)
  d_matrices = jnp.einsum("...e,...c->ec", x, d_joined, preferred_element_type=jnp.float32)
  d_kernels, end = [], 0
  for kernel in kernels:
    start, end = end, end + kernel[0].size
    d_kernels.append(d_matrices[:, start:end].reshape(kernel.shape))
  if exact is None:
    return d_x, tuple(d_kernels), None
  return d_x, tuple(d_kernels), sum_of_parts(d_matrices[:, end : end + 3 * exact.shape[1]])


_joined_products.defvjp(_joined_products_fwd, _joined_products_bwd)
