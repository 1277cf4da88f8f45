"""Chunk lists against a direct enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsek
from sparsek.kernels.compaction import chunk_lists, chunk_size


@pytest.mark.parametrize(
  "n, k, window, chunk",
  [(97, 7, 5, 16), (97, 7, 0, 64), (40, 100, 3, 8), (64, 1, 1, 64), (30, 4, 90, 8), (1, 1, 0, 1)],
)
@pytest.mark.parametrize("family", ("normal", "rising", "falling"))
def test_every_chunk_lists_exactly_its_tokens(n, k, window, chunk, family):
  noise = jax.random.normal(jax.random.key(n), (1, n, 1))
  scores = {
    "normal": noise,
    "rising": jnp.arange(n)[None, :, None] + noise,
    "falling": noise - jnp.arange(n)[None, :, None],
  }[family]
  expiry = sparsek.causal_sparsek(scores, k, delay=window).expiry[0, :, 0]
  lists = np.asarray(chunk_lists(expiry, min(k, n), window, chunk))
  assert lists.shape == (-(-n // chunk), min(min(k, n) + chunk, n))
  for c, row in enumerate(lists):
    alive = [j for j in range(n) if max(j + window, c * chunk) < min(expiry[j], (c + 1) * chunk)]
    np.testing.assert_array_equal(row[: len(alive)], alive)
    assert np.all(row[len(alive) :] >= n) and len(set(row)) == len(row)


def test_no_budget_no_lists():
  assert chunk_lists(jnp.zeros(50, jnp.int32), 0, 5, 16).shape == (4, 0)


@pytest.mark.parametrize(
  "n, k, window", [(1, 1, 0), (50, 8, 8), (10**6, 512, 512), (10**6, 4096, 0)]
)
def test_chunk_size_is_within_the_length(n, k, window):
  assert 2 <= chunk_size(n, k, window) <= max(n, 2)
