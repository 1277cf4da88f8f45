"""Losses with one changed layer against models of that pattern, and patterns."""

import dataclasses

import jax
import numpy as np
import pytest

from sparsek.config import TransformerConfig, parse_layer_pattern
from sparsek.evaluation import layer_reach
from sparsek.model.transformer import init_params, unstack_layers
from sparsek.training.loss import cut_targets
from sparsek.training.objective import summed_losses

CONFIG = TransformerConfig(
  vocab_size=19,
  num_layers=3,
  embed_dim=8,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=8,
  attention="full",
  tie_embeddings=False,
)


@pytest.mark.parametrize(
  "fields", [{}, {"positions": "learned", "scan_layers": True}], ids=["rope", "learned, scanned"]
)
def test_losses_are_those_of_models_with_one_short_layer(fields):
  config = dataclasses.replace(CONFIG, **fields)
  params = jax.tree.map(lambda x: 3 * x, init_params(config, jax.random.key(0)))
  rng = np.random.default_rng(0)
  batches = [
    {
      "tokens": rng.integers(0, 19, (2, 41)).astype(np.int32),
      "segment_ids": np.repeat([[1, 2], [1, 0]], [30, 11], axis=1).astype(np.int32),
    }
    for _ in range(2)
  ]
  changes = layer_reach.of_layers(config, "sliding_window:w3")
  dense, short = layer_reach.losses(config, params, batches, changes, loss_chunk=7)
  counted = sum(29 * 2 + 10 for _ in batches)

  def loss(*terms):
    whole = dataclasses.replace(config, attention=terms, scan_layers=False)
    return (
      float(
        sum(
          summed_losses(whole, unstack_layers(config, params), cut_targets(batch), 7).cross_entropy
          for batch in batches
        )
      )
      / counted
    )

  assert dense == pytest.approx(loss("full"), rel=1e-5)
  for i in range(3):
    assert short[i] == pytest.approx(
      loss(*("sliding_window:w3" if j == i else "full" for j in range(3))), rel=1e-5
    )
  assert len({round(x, 5) for x in [dense, *short]}) == 4


def test_pattern_has_the_budget_in_the_mean_and_most_of_it_where_the_loss_rises():
  rises = [[0.0], [0.3], [0.1], [0.2], [0.0], [0.0]]
  pattern = layer_reach.pattern(rises, long=2, k=16, window=100, budget=200)
  assert (
    pattern
    == "sparsek:k16:w100,sparsek:k268:w100,sparsek:k16:w100,sparsek:k268:w100,sparsek:k16:w100*2"
  )
  assert len(parse_layer_pattern(pattern)) == 6 and (4 * 116 + 2 * 368) / 6 == 200
  assert layer_reach.pattern([[1.0], [2.0]], 2, 4, 6, 10) == "sparsek:k4:w6*2"
  assert layer_reach.pattern([[1.0], [2.0]], 1, 0, 6, 10) == "sliding_window:w6,sparsek:k8:w6"
  with pytest.raises(ValueError, match="budget=9 must be at least 10, .* in every layer"):
    layer_reach.pattern([[1.0], [2.0]], 1, 4, 6, 9)


@pytest.mark.parametrize("k", [16, 0])
def test_pattern_of_heads_has_the_budget_in_the_mean(k):
  rises = [[0.3, 0.0, 0.4, 0.1], [0.0, 0.1, 0.1, 0.0], [0.9, 0.9, 0.9, 0.9]]
  pattern = layer_reach.pattern(rises, long=6, k=k, window=100, budget=200)
  far = (12 * 100 - 6 * k) // 6
  assert pattern == ",".join(
    [f"sparsek:k16:w100:h0.2:k{far}", "sparsek:k16:w100", f"sparsek:k{far}:w100"]
    if k
    else [f"sparsek:k{far}:w100:h1.3:k0", "sliding_window:w100", f"sparsek:k{far}:w100"]
  )
  config = dataclasses.replace(CONFIG, num_heads=4, num_kv_heads=4, attention=pattern)
  keys = [
    len(group.heads) * (group.config.window + (group.config.k if group.kind == "sparsek" else 0))
    for layer in config.layer_configs
    for group in layer.head_groups
  ]
  assert sum(keys) / 12 == 200
  with pytest.raises(ValueError, match=f"budget=100 must be at least {100 + max(k, 1)}, .* head"):
    layer_reach.pattern(rises, long=6, k=k, window=100, budget=100)


def test_losses_are_those_of_models_with_one_short_head():
  """The other heads of the layer see everything, as those of the other layers do."""
  config = dataclasses.replace(CONFIG, num_layers=2, num_kv_heads=2, positions="learned")
  params = jax.tree.map(lambda x: 3 * x, init_params(config, jax.random.key(0)))
  rng = np.random.default_rng(0)
  ids = np.repeat([[1, 2], [1, 1]], [30, 11], axis=1).astype(np.int32)
  batch = {"tokens": rng.integers(0, 19, (2, 41)).astype(np.int32), "segment_ids": ids}
  changes = layer_reach.of_heads(config, "attention_sinks:k1:w3", 40)
  dense, short = layer_reach.losses(config, params, [batch], changes)

  def loss(params):
    found = summed_losses(config, params, cut_targets(batch), 7)
    return float(found.cross_entropy) / (29 + 10 + 40)

  assert dense == pytest.approx(loss(params), rel=1e-5) and len({*map(str, short)}) == 4
  # Without a head's part of the output matrix its keys do not matter.
  for place, (layer, head) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
    out = params[f"layers_{layer}"]["attention"]["out"]["kernel"]
    kernel = out.at[head].set(0)
    silent = jax.tree.map(lambda x: kernel if x is out else x, params)
    _, again = layer_reach.losses(config, silent, [batch], [changes[place]])
    assert again[0] == pytest.approx(loss(silent), rel=1e-5)
    assert short[place] != pytest.approx(dense, rel=1e-5)
