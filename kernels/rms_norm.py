"""RMS norms of the residual stream: a pass forward and one backward where there are kernels."""

import functools

import jax
import jax.numpy as jnp

from sparsek.kernels import devices
from sparsek.kernels.varying import over_batch


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """Returns x / sqrt(mean(x^2) + epsilon) * scale over the last axis, computed in float32, in the
  dtype of x.
  """
  y = x.astype(jnp.float32)
  y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
  return (y * scale).astype(x.dtype)


def branched_rms_norm(
  x: jax.Array, scale: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array]:
  """Returns (x, rms_norm(x)), for a residual stream that goes on as x.

  On Hopper GPUs the gradients of both then come together in one pass over the memory.

  Args:
    x: [B, n, E].
    scale: [E] float32.
    epsilon: added to the mean of squares.
  """
  if not _has_kernels(x):
    return x, rms_norm(x, scale, epsilon)
  return _branched(epsilon, x, scale)


def _has_kernels(x):
  if x.dtype not in (jnp.bfloat16, jnp.float16) or x.ndim != 3 or not devices.can_run():
    return False
  from sparsek.kernels.hopper.rms_norm import MAX_WIDTH, MULTIPLE

  return x.shape[-1] % MULTIPLE == 0 and x.shape[-1] <= MAX_WIDTH


@functools.partial(jax.jit, static_argnums=0)
def _forward(epsilon, x, scale):
  from sparsek.kernels.hopper import rms_norm as hopper

  return over_batch(functools.partial(hopper.rms_norm, epsilon=epsilon), x, scale)


@functools.partial(jax.jit, static_argnums=0)
def _backward(epsilon, *arrays):
  from sparsek.kernels.hopper import rms_norm as hopper

  return over_batch(functools.partial(hopper.rms_norm_gradients, epsilon=epsilon), *arrays)


def _of_rows(scale, x):
  """Repeats scale for each row of the batch."""
  return jnp.broadcast_to(scale, (x.shape[0], x.shape[-1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _branched(epsilon, x, scale):
  return x, _forward(epsilon, x, _of_rows(scale, x))


def _branched_fwd(epsilon, x, scale):
  return _branched(epsilon, x, scale), (x, scale)


def _branched_bwd(epsilon, residuals, cotangents):
  x, scale = residuals
  d_x, d_scale_BxE = _backward(epsilon, x, _of_rows(scale, x), *cotangents)
  return d_x, jnp.sum(d_scale_BxE, axis=0)


_branched.defvjp(_branched_fwd, _branched_bwd)
