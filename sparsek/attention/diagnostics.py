"""Statistics that tell whether a scoring network selects, and what it selects."""

import jax
import jax.numpy as jnp

from sparsek.attention.documents import document_bounds
from sparsek.attention.operator import causal_sparsek

OLD = 1024  # tokens; a key older than this counts as long-range


def selection_statistics(
  scores: jax.Array,
  k: int,
  window: int,
  segment_ids: jax.Array | None = None,
  *,
  num_queries: int = 64,
) -> dict[str, jax.Array]:
  """Averages over `num_queries` evenly spaced queries of each row and head.

  Args:
    scores: [batch, n, heads] float.
    k, window, segment_ids: as in `sparsek.sparsek_attention`.
    num_queries: number of queries of a row; time and memory are O(num_queries n).

  Returns:
    Float32 scalars:
      gate_mass: share of sum_j p_ij that the k selected keys hold, over queries with more than k
        candidates (1 if there is none). Near 1 the operator is a hard top-k; well below, the
        gradient spreads over keys that nobody attends to.
      support_size: candidates with p_ij > 0 per query.
      share_older_than_1k: share of the selected keys more than 1024 tokens before their query.
      mean_age: tokens between query and selected key, on average.
      score_std: standard deviation of the scores over time, averaged over heads.
  """
  batch, n, _ = scores.shape
  scores = scores.astype(jnp.float32)
  tau, expiry = causal_sparsek(scores, k, delay=window, segment_ids=segment_ids)
  start, _ = document_bounds(segment_ids, batch, n)
  queries = jnp.unique(
    jnp.linspace(0, n - 1, num_queries).round().astype(jnp.int32),
    size=min(n, num_queries),
    fill_value=n - 1,
  )
  i, j = queries[:, None, None], jnp.arange(n)[:, None]  # [queries, n, heads]
  candidate = (
    (j >= start[:, queries][..., None, None]) & (j + window <= i) & (scores > -jnp.inf)[:, None]
  )
  selected = candidate & (i < expiry[:, None])
  gate = jnp.where(candidate, jnp.clip(scores[:, None] - tau[:, queries][:, :, None], 0, 1), 0)
  total, kept, number = (
    jnp.sum(x, axis=2, dtype=jnp.float32) for x in (gate, jnp.where(selected, gate, 0), selected)
  )
  chosen = jnp.sum(candidate, axis=2) > k
  ratio = lambda a, b, empty=0.0: jnp.where(
    jnp.sum(b) > 0, jnp.sum(a) / jnp.maximum(jnp.sum(b), 1), empty
  )
  return {
    "gate_mass": ratio(jnp.where(chosen, kept, 0), jnp.where(chosen, total, 0), 1.0),
    "support_size": jnp.mean(jnp.sum(gate > 0, axis=2, dtype=jnp.float32)),
    "share_older_than_1k": ratio(jnp.sum(selected & (i - j > OLD), axis=2), number),
    "mean_age": ratio(jnp.sum(jnp.where(selected, i - j, 0), axis=2, dtype=jnp.float32), number),
    "score_std": jnp.mean(jnp.std(jnp.where(jnp.isfinite(scores), scores, 0), axis=1)),
  }
