"""STUB (being replaced): sparsek_attention through the reference."""
from sparsek.kernels import reference

def sparsek_attention(query, key, value, scores, *, k, window, gate="straight_through", scale=None, segment_ids=None, implementation=None):
  return reference.attention(query, key, value, scores, k=k, window=window, gate=gate, scale=query.shape[-1] ** -0.5 if scale is None else scale, segment_ids=segment_ids)

def sliding_window_attention(query, key, value, *, window, scale=None, segment_ids=None):
  import jax.numpy as jnp
  b, n, g, _ = key.shape
  return sparsek_attention(query, key, value, jnp.full((b, n, g), -jnp.inf), k=1, window=window, gate="straight_through", scale=scale, segment_ids=segment_ids)
