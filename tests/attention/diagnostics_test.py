"""Selection diagnostics on scores whose answers are known, and against brute force."""

import jax
import jax.numpy as jnp
import numpy as np

from sparsek.attention.diagnostics import selection_statistics
from tests.attention import brute_force


def test_falling_scores_keep_the_first_tokens():
  n, k = 3000, 10
  stats = selection_statistics(-3.0 * jnp.arange(n, dtype=jnp.float32)[None, :, None], k, 5)
  assert stats["gate_mass"] == 1
  assert stats["share_older_than_1k"] > 0.6 and stats["mean_age"] > 1400


def test_rising_scores_keep_the_last_tokens():
  n, k, window = 3000, 10, 5
  stats = selection_statistics(3.0 * jnp.arange(n, dtype=jnp.float32)[None, :, None], k, window)
  assert stats["share_older_than_1k"] == 0
  np.testing.assert_allclose(stats["mean_age"], window + (k - 1) / 2, rtol=1e-2)


def test_equal_scores_are_mush():
  n, k = 400, 20
  stats = selection_statistics(jnp.ones((1, n, 1)), k, 0, num_queries=n)
  candidates = np.arange(1, n + 1)
  many = candidates > k
  np.testing.assert_allclose(stats["gate_mass"], np.mean(k / candidates[many]), rtol=1e-4)
  np.testing.assert_allclose(stats["support_size"], candidates.mean(), rtol=1e-6)
  assert stats["score_std"] == 0


def test_matches_brute_force_with_documents():
  n, k, window = 120, 6, 4
  u = np.asarray(jax.random.normal(jax.random.key(0), (n,))) * 1.5
  ids = np.repeat([1, 2], [50, 70])
  stats = selection_statistics(
    jnp.asarray(u)[None, :, None], k, window, jnp.asarray(ids)[None], num_queries=n
  )
  gates, selected = brute_force.causal_gates(u, k, window, ids)
  np.testing.assert_allclose(stats["support_size"], (gates > 0).sum(1).mean(), rtol=1e-5)
  ages = [i - j for i in range(n) for j in selected[i]]
  np.testing.assert_allclose(stats["mean_age"], np.mean(ages), rtol=1e-5)
  full = [i for i in range(n) if i - window - (50 if i >= 50 else 0) + 1 > k]
  kept = sum(gates[i, list(selected[i])].sum() for i in full)
  np.testing.assert_allclose(stats["gate_mass"], kept / gates[full].sum(), rtol=1e-5)


def test_shorter_than_the_budget():
  stats = selection_statistics(jnp.zeros((1, 1, 1)), 5, 3)
  assert stats["gate_mass"] == 1 and stats["mean_age"] == 0 and stats["support_size"] == 0
