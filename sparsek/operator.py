"""STUB (being replaced): O(n^2) causal_sparsek."""
from typing import NamedTuple
import jax, jax.numpy as jnp
from sparsek.kernels import reference

class CausalSelection(NamedTuple):
  threshold: jax.Array
  expiry: jax.Array

def causal_sparsek(scores, k, *, delay=0, segment_ids=None):
  b, n, g = scores.shape
  gate, sel, _ = reference.selection(scores, k, delay, segment_ids)
  i = jnp.arange(n)[:, None]
  expiry = jnp.max(jnp.where(sel, i + 1, 0), axis=2)
  u = jnp.swapaxes(scores, 1, 2)[:, :, None, :]
  frac = (gate > 0) & (gate < 1)
  tau = jnp.sum(jnp.where(frac, u - gate, 0), -1) / jnp.maximum(frac.sum(-1), 1)
  tau = jnp.where(frac.any(-1), tau, jnp.max(jnp.where((gate == 0) & (u > -jnp.inf) & (jnp.arange(n)[None] + delay <= i), u, -jnp.inf), -1))
  return CausalSelection(jnp.swapaxes(tau, 1, 2), jnp.swapaxes(expiry, 1, 2))
