"""Products of the same hidden states with several matrices, differentiated together.

One by one, the gradient of the hidden states is a sum of as many arrays as there are matrices, each
written, rounded and read again.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sparsek.attention.exact_product import exact_product, parts_of, sum_of_parts

# Columns of the joined gradients come in multiples of this: rows then begin at whole cache lines.
COLUMNS = 64


@jax.custom_vjp
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
  products = tuple(jnp.tensordot(x, kernel.astype(x.dtype), 1) for kernel in kernels)
  return products, None if exact is None else exact_product(x, exact)


def _joined_products_fwd(x, kernels, exact):
  return joined_products(x, kernels, exact), (x, kernels, exact)


def _side_by_side(arrays):
  """Joins arrays [..., n_i] to [..., n], padded with zeros to whole COLUMNS."""
  *leading, _ = arrays[0].shape
  padding = -sum(array.shape[-1] for array in arrays) % COLUMNS
  return jnp.concatenate([*arrays, jnp.zeros((*leading, padding), arrays[0].dtype)], axis=-1)


def _joined_products_bwd(residuals, cotangents):
  (x, kernels, exact), (d_products, d_exact) = residuals, cotangents
  d_outputs = [d.reshape(*x.shape[:-1], -1) for d in d_products]
  matrices = [kernel.reshape(len(kernel), -1).astype(x.dtype) for kernel in kernels]
  if exact is not None:
    d_outputs += parts_of(d_exact)
    matrices += [exact.astype(x.dtype)] * 3
  d_joined = _side_by_side(d_outputs)
  d_x = jnp.matmul(d_joined, _side_by_side(matrices).T)
  d_matrices = jnp.einsum("...e,...c->ec", x, d_joined, preferred_element_type=jnp.float32)
  ends = np.cumsum([matrix.shape[1] for matrix in matrices])
  d_kernels = tuple(
    d_matrices[:, end - kernel[0].size : end].reshape(kernel.shape)
    for kernel, end in zip(kernels, ends)
  )
  d_parts = d_matrices[:, ends[len(kernels) - 1] : ends[-1]]
  return d_x, d_kernels, None if exact is None else sum_of_parts(d_parts)


joined_products.defvjp(_joined_products_fwd, _joined_products_bwd)
