"""cuDNN's attention, to a sliding window or to all earlier tokens, for rows of one document."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sparsek.kernels.devices import HOPPER, compute_capability, on_nvidia_gpu, target

LARGEST_HEAD_DIM = 128
WIDE_HEAD_DIM = 256  # on Hopper GPUs
OLDEST_CAPABILITY = 8.0


def refusal(
  query: jax.Array | jax.ShapeDtypeStruct,
  segment_ids: jax.Array | jax.ShapeDtypeStruct | None,
  window: int,
) -> str | None:
  """Returns why cuDNN cannot attend for `query` here, forward and backward, or None."""
  if segment_ids is not None:
    return "rows hold several documents (segment_ids); cuDNN takes rows of one"
  if query.dtype not in (jnp.bfloat16, jnp.float16):
    return f"query has dtype {query.dtype}; cuDNN takes bfloat16 and float16"
  head_dim = query.shape[-1]
  if head_dim % 8 or head_dim > LARGEST_HEAD_DIM and head_dim != WIDE_HEAD_DIM:
    return (
      f"query has head_dim {head_dim}; cuDNN takes multiples of 8 up to {LARGEST_HEAD_DIM} and, on "
      f"Hopper GPUs, {WIDE_HEAD_DIM}"
    )
  if window < 2:
    return f"window={window}; cuDNN takes 2 or more"
  if target():
    return "cuDNN compiles for attached devices only"
  device = jax.devices()[0]
  if not on_nvidia_gpu():
    return f"it needs an NVIDIA GPU; JAX's first device is {device.device_kind!r}"
  capability = compute_capability(device)
  if capability == "unknown" or float(capability) < OLDEST_CAPABILITY:
    return (
      f"it needs a GPU of compute capability {OLDEST_CAPABILITY} or newer; "
      f"{device.device_kind} has {capability}"
    )
  if head_dim > LARGEST_HEAD_DIM and capability != HOPPER:
    return (
      f"query has head_dim {head_dim}, for which cuDNN needs a GPU of compute capability {HOPPER} "
      f"(H100, H200); {device.device_kind} has {capability}"
    )
  return _refusal_of_jax(query, window)


def _refusal_of_jax(query, window):
  """Returns why JAX's wrapper refuses such queries, or None; it knows the version of cuDNN."""
  row = jax.ShapeDtypeStruct(query.shape, query.dtype)
  attend = functools.partial(attention, window=window, scale=1.0)
  try:
    jax.eval_shape(lambda query: jax.vjp(attend, query, query, query)[1](query), row)
  except (NotImplementedError, RuntimeError, ValueError) as error:
    return f"JAX says of cuDNN: {error}"
  return None


def attention(
  query: jax.Array, key: jax.Array, value: jax.Array, *, window: int, scale: float
) -> jax.Array:
  """Attends, causally, to the `window` latest tokens.

  Shapes are as in `sparsek.sliding_window_attention`. JAX computes no gradients for rows of odd
  length: such a row is padded with one token, which no other token sees.
  """
  n = query.shape[1]
  # cuDNN counts the tokens before the query's.
  before = None if window >= n else (window - 1, 0)
  if n % 2:
    query, key, value = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value))
  out = jax.nn.dot_product_attention(
    query, key, value, scale=scale, is_causal=True, local_window_size=before, implementation="cudnn"
  )
  return out[:, :n]


def saveable(primitive: Any, *_: Any, **__: Any) -> bool:
  """Tells `jax.checkpoint`, as a policy, to keep what cuDNN's backward pass needs."""
  return primitive.name.startswith("dot_product_attention_fwd")
