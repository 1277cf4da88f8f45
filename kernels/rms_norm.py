"""RMS norms of the residual stream: a pass forward and one backward where there are kernels."""

import functools

import jax
import jax.numpy as jnp

from sparsek.kernels import devices
from sparsek.kernels.varying import cast_varying, over_batch, varying_like


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
  if not has_kernels(x):
    return x, rms_norm(x, scale, epsilon)
  scale_BxE = jnp.broadcast_to(scale, (x.shape[0], x.shape[-1]))
  return _branched(epsilon, x, cast_varying(scale_BxE, x))


def has_kernels(x: jax.Array | jax.ShapeDtypeStruct) -> bool:
  """Tells whether kernels compute the norm of x and its gradients here: on NVIDIA GPUs since
  Ampere, of 16-bit numbers, where the width suits them.
  """
  if x.dtype not in (jnp.bfloat16, jnp.float16) or x.ndim != 3 or not devices.can_run_portable():
    return False
  from sparsek.kernels.hopper.rms_norm import MAX_WIDTH, MULTIPLE

  return x.shape[-1] % MULTIPLE == 0 and x.shape[-1] <= MAX_WIDTH


@functools.partial(jax.jit, static_argnums=0)
def _forward(epsilon, x, scale_BxE):
  from sparsek.kernels.hopper import rms_norm as hopper

  return over_batch(functools.partial(hopper.rms_norm, epsilon=epsilon), x, scale_BxE)


@functools.partial(jax.jit, static_argnums=0)
def _backward(epsilon, *arrays):
  from sparsek.kernels.hopper import rms_norm as hopper

  return over_batch(functools.partial(hopper.rms_norm_gradients, epsilon=epsilon), *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _branched(epsilon, x, scale_BxE):
  return x, varying_like(_forward(epsilon, x, scale_BxE), x)


def _branched_fwd(epsilon, x, scale_BxE):
  return _branched(epsilon, x, scale_BxE), (x, scale_BxE)


def _branched_bwd(epsilon, residuals, cotangents):
  gradients = _backward(epsilon, *residuals, *cotangents)
  return tuple(varying_like(gradient, residuals[0]) for gradient in gradients)


_branched.defvjp(_branched_fwd, _branched_bwd)
