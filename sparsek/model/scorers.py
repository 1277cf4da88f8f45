"""The scoring network of a model's layers, the library's or one that a user has registered."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from sparsek.attention.scoring import ScoringNetwork
from sparsek.config import TransformerConfig
from sparsek.parallel.mesh import CONTEXT, axis_size
from sparsek.parallel.sharded_scores import ShardedScoringNetwork

# Scorers of `sparsek.model.registration.register_scorer`: the functions that make their modules.
SCORER_FACTORIES: dict[str, Callable[[TransformerConfig], nn.Module]] = {}


def scoring_network(config: TransformerConfig) -> Any:
  """Makes the scoring network that `config` describes, for whole rows or for this shard of them: a
  `ScoringNetwork`, or what a registered factory makes.

  Raises:
    NotImplementedError: where rows are sharded, for a registered scorer.
  """
  if config.scorer in SCORER_FACTORIES:
    if axis_size(CONTEXT) > 1:
      raise NotImplementedError(f"scorer {config.scorer!r} needs whole rows on one device")
    return SCORER_FACTORIES[config.scorer](config)
  network = ScoringNetwork if axis_size(CONTEXT) == 1 else ShardedScoringNetwork
  return network(
    config.num_kv_heads,
    config.scorer,
    config.scorer_lookback,
    config.scorer_lookahead,
    config.scorer_normalize,
    config.scorer_init_scale,
    config.scorer_init_slope,
    config.scorer_shared,
    config.scorer_init_noise,
    config.scorer_init_sink,
    parent=None,  # the layer that it is assigned to, if any, becomes its parent
  )


def scorer_delay(config: TransformerConfig) -> int:
  """Returns the number of tokens that must follow a token before its score is final."""
  return getattr(scoring_network(config), "delay", 0)
