import dataclasses

import jax
import numpy as np
import pytest

from sparsek.attention import eviction
from sparsek.config import TransformerConfig
from sparsek.generation import cache_sizes
from sparsek.generation.cache import init_cache

CONFIG = TransformerConfig(
  vocab_size=31,
  num_layers=2,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=16,
  attention="sparsek,full",
)
CASES = {
  "hybrid, thresholds": dict(gate="value"),
  "no thresholds": dict(attention="sparsek"),
  "layers of their own k and window": dict(
    gate="value", attention="sliding_window:w4,sparsek:k9:w2,sparsek", num_layers=3
  ),
  "evictors": dict(attention="tova,attention_sinks"),
  "heads of their own k and window": dict(
    gate="value", attention="sparsek:k9:h0:w50,sparsek:w5:h1:k0:w60"
  ),
}


def test_full_layers_grow_by_steps_and_keep_what_they_have():
  cache = init_cache(CONFIG, 1, max_length=128)
  cache = cache._replace(layers=(cache.layers[0], jax.tree.map(lambda x: x + 1, cache.layers[1])))
  same, wider = cache_sizes.with_room(CONFIG, cache, 128), cache_sizes.with_room(CONFIG, cache, 129)
  assert same.layers[1].key.shape[2] == 128 and wider.layers[1].value.shape[2] == 256
  assert all((x[:, :, :128] == 1).all() and (x[:, :, 128:] == 0).all() for x in wider.layers[1])


@pytest.mark.parametrize("name", CASES)
def test_an_empty_cache_is_resized_to_an_empty_cache(name, monkeypatch):
  # Borders are as far apart for every clipped size.
  assert eviction.block_size(cache_sizes.UNCLIPPED, 0) == eviction.MAX_BLOCK
  monkeypatch.setattr(eviction, "MAX_BLOCK", 2)
  monkeypatch.setattr(cache_sizes, "UNCLIPPED", 8)
  config = dataclasses.replace(CONFIG, k=40, window=70, **CASES[name])
  sizes = [cache_sizes.clip_sizes(config, length) for length in (5, 20, 33, 100, 10**12)]
  assert [size.window for size in sizes] == [16, 32, 64, 70, 70]
  assert [size.k for size in sizes] == [16, 32, 40, 40, 40] and sizes[-1] == config
  cache = init_cache(sizes[0], 2, max_length=9)
  for before, after in zip(sizes, sizes[1:]):
    cache = cache_sizes.resize(before, after, cache)
    jax.tree.map(np.testing.assert_array_equal, cache, init_cache(after, 2, max_length=9))
