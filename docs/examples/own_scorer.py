"""Registers a scorer, a small network on each token, and fills a cache."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparsek import TransformerConfig
from sparsek import functional as sk
from sparsek.model.registration import register_scorer


class MLPScorer(nn.Module):
  config: TransformerConfig

  @nn.compact
  def __call__(self, x, segment_ids=None, layer=0):
    return nn.Dense(self.config.num_kv_heads)(nn.gelu(nn.Dense(16)(x)))

  def initial_state(self, batch_size):  # for generation, like stream
    return ()  # a score depends on its token alone

  def stream(self, x, state, seen, layer=0, count=None, linear=None):
    return self(x), state


register_scorer("mlp", MLPScorer)
options = sk.Options(features=32, num_heads=4, k=8, window=8, scorer="mlp")
params = sk.init(options, jax.random.key(0))
x = jnp.sin(jnp.arange(40.0 * 32).reshape(1, 40, 32))
y, cache = sk.prefill(options, params, sk.init_cache(options, 1), x)
