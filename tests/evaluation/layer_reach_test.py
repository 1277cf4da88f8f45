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
  dense, short = layer_reach.losses(config, params, batches, "sliding_window:w3", loss_chunk=7)
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
  pattern = layer_reach.pattern(
    [0.0, 0.3, 0.1, 0.2, 0.0, 0.0], long_layers=2, k=16, window=100, budget=200
  )
  assert (
    pattern
    == "sparsek:k16:w100,sparsek:k268:w100,sparsek:k16:w100,sparsek:k268:w100,sparsek:k16:w100*2"
  )
  assert len(parse_layer_pattern(pattern)) == 6 and (4 * 116 + 2 * 368) / 6 == 200
  assert layer_reach.pattern([1.0, 2.0], 2, 4, 6, 10) == "sparsek:k4:w6*2"
  with pytest.raises(ValueError, match="budget=9 must be at least 10"):
    layer_reach.pattern([1.0, 2.0], 1, 4, 6, 9)
