"""Registers a kind of attention, to the window and the latest tokens before it, for a model."""

import jax
import jax.numpy as jnp

import sparsek
from sparsek.model.layers import Attention, Tokens
from sparsek.model.registration import register_attention


class Latest(Attention):
  def mix(self, tokens: Tokens) -> jax.Array:
    cfg, (batch, length) = self.config, tokens.x.shape[:2]
    recency = jnp.arange(length, dtype=jnp.float32)[:, None]
    scores = jnp.broadcast_to(recency, (batch, length, cfg.num_kv_heads))
    rows = tokens.query, tokens.key, tokens.value, scores
    ids = tokens.segment_ids
    return sparsek.sparsek_attention(*rows, k=cfg.k, window=cfg.window, segment_ids=ids)


register_attention("latest", Latest)
config = sparsek.TransformerConfig(num_layers=2, embed_dim=32, k=8, attention="latest,sparsek")
params = sparsek.init_params(config, jax.random.key(0))
tokens = jnp.arange(40)[None]
logits = sparsek.Transformer(config).apply({"params": params}, tokens)
