"""cuDNN's attention to a sliding window or to everything before, for rows of one document."""

import functools

import jax
import jax.numpy as jnp

LARGEST_HEAD_DIM = 128
OLDEST_CAPABILITY = 8.0


def on_nvidia_gpu() -> bool:
  """Whether that is JAX's first device."""
  device = jax.devices()[0]
  return device.platform == "gpu" and "cuda" in device.client.platform_version.lower()


def refusal(query: jax.Array, segment_ids: jax.Array | None, window: int) -> str | None:
  """Why cuDNN cannot attend for `query` here, forward and backward, or None."""
  if segment_ids is not None:
    return "rows hold several documents (segment_ids); cuDNN takes rows of one"
  if query.dtype not in (jnp.bfloat16, jnp.float16):
    return f"query has dtype {query.dtype}; cuDNN takes bfloat16 and float16"
  if query.shape[-1] > LARGEST_HEAD_DIM or query.shape[-1] % 8:
    return (
      f"query has head_dim {query.shape[-1]}; cuDNN takes multiples of 8 up to {LARGEST_HEAD_DIM}"
    )
  if window < 2:
    return f"window={window}; cuDNN takes 2 or more"
  if not on_nvidia_gpu():
    return f"it needs an NVIDIA GPU; JAX's first device is {jax.devices()[0].device_kind!r}"
  capability = str(getattr(jax.devices()[0], "compute_capability", "unknown"))
  if capability == "unknown" or float(capability) < OLDEST_CAPABILITY:
    return (
      f"it needs a GPU of compute capability {OLDEST_CAPABILITY} or newer; "
      f"{jax.devices()[0].device_kind} has {capability}"
    )
  return _refusal_of_jax(query, window)


def _refusal_of_jax(query, window):
  """Why JAX's wrapper refuses such queries, or None; it knows the version of cuDNN."""
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
  """Returns causal attention to the `window` latest tokens.

  Shapes are as in `sparsek.sliding_window_attention`. JAX takes no gradients of rows of odd length:
  such a row gets one more token at its end, which none of the others sees.
  """
  n = query.shape[1]
  # cuDNN is told the tokens before the query's own.
  before = None if window >= n else (window - 1, 0)
  if n % 2:
    query, key, value = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value))
  out = jax.nn.dot_product_attention(
    query, key, value, scale=scale, is_causal=True, local_window_size=before, implementation="cudnn"
  )
  return out[:, :n]


def saveable(primitive, *_, **__) -> bool:
  """A policy for `jax.checkpoint` that keeps what its backward pass needs."""
  return primitive.name.startswith("dot_product_attention_fwd")
