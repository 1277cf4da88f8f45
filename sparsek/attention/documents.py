"""Documents in packed rows: a document is a run of equal segment ids."""

import jax
import jax.numpy as jnp
from jax import lax


def document_bounds(
  segment_ids: jax.Array | None, batch: int, n: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the index of the first token of each token's document, and one past its last, both
  [batch, n] int32.
  """
  if segment_ids is None:
    return jnp.zeros((batch, n), jnp.int32), jnp.full((batch, n), n, jnp.int32)
  index = jnp.arange(n, dtype=jnp.int32)
  changed = jnp.concatenate(
    [jnp.ones((batch, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
  )
  start = lax.cummax(jnp.where(changed, index, 0), axis=1)
  last = jnp.concatenate([changed[:, 1:], jnp.ones((batch, 1), bool)], axis=1)
  end = lax.cummin(jnp.where(last, index + 1, n), axis=1, reverse=True)
  return start, end


def position_in_document(segment_ids: jax.Array | None, batch: int, length: int) -> jax.Array:
  """Counts the tokens of its own document that precede each token: [batch, length] int32."""
  if segment_ids is not None and segment_ids.shape != (batch, length):
    raise ValueError(
      f"segment_ids has shape {segment_ids.shape}, expected {(batch, length)} like the tokens"
    )
  return jnp.arange(length, dtype=jnp.int32) - document_bounds(segment_ids, batch, length)[0]
