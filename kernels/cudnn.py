"""cuDNN's attention to a sliding window or to everything before, for rows of one document."""

import jax
import jax.numpy as jnp

LARGEST_HEAD_DIM = 128
OLDEST_CAPABILITY = 8.0


def on_nvidia_gpu() -> bool:
  """Whether that is JAX's first device."""
  device = jax.devices()[0]
  return device.platform == "gpu" and "cuda" in device.client.platform_version.lower()


def refusal(query: jax.Array, segment_ids: jax.Array | None) -> str | None:
  """Why cuDNN cannot attend for `query` here, or None."""
  if segment_ids is not None:
    return "rows hold several documents (segment_ids); cuDNN takes rows of one"
  if query.dtype not in (jnp.bfloat16, jnp.float16):
    return f"query has dtype {query.dtype}; cuDNN takes bfloat16 and float16"
  if query.shape[-1] > LARGEST_HEAD_DIM or query.shape[-1] % 8:
    return f"query has head_dim {query.shape[-1]}; cuDNN takes multiples of 8 up to {LARGEST_HEAD_DIM}"
  if not on_nvidia_gpu():
    return f"it needs an NVIDIA GPU; JAX's first device is {jax.devices()[0].device_kind!r}"
  capability = str(getattr(jax.devices()[0], "compute_capability", "unknown"))
  if capability == "unknown" or float(capability) < OLDEST_CAPABILITY:
    return f"it needs a GPU of compute capability {OLDEST_CAPABILITY} or newer; {jax.devices()[0].device_kind} has {capability}"
  return None


def attention(query: jax.Array, key: jax.Array, value: jax.Array, *, window: int, scale: float) -> jax.Array:
  """Causal attention to the `window` latest tokens; shapes as in `sparsek.sliding_window_attention`."""
  before = None if window >= query.shape[1] else (window - 1, 0)        # cuDNN is told the tokens before the query's own
  return jax.nn.dot_product_attention(query, key, value, scale=scale, is_causal=True, local_window_size=before, implementation="cudnn")


def saveable(primitive, *_, **__) -> bool:
  """A policy for `jax.checkpoint` that keeps what its backward pass needs."""
  return primitive.name.startswith("dot_product_attention_fwd")
