"""The transformer's blocks as generation computes them, composed once for all ways of decoding.

x -> project -> attend -> output projection, + x -> MLP, + its residual -> project of the next block
"""

from typing import Any, Generic, TypeVar

import jax

from sparsek.attention.eviction import Kept
from sparsek.config import TransformerConfig
from sparsek.generation import inference
from sparsek.generation.cached_attention import (
  KeysAndValues,
  LayerCache,
  attend_by_groups,
  attend_token,
  map_rows,
  selects,
)
from sparsek.generation.cached_chunk import attend_chunk
from sparsek.generation.cached_eviction import attend_evicting
from sparsek.generation.inference import InferenceParams, Projections
from sparsek.model.scorers import scoring_network

Projected = TypeVar("Projected")  # the input of attention
Mixed = TypeVar("Mixed")  # its output, before the output projection


class Blocks(Generic[Projected, Mixed]):
  """All blocks of a transformer, for new tokens after those of a cache.

  A subclass defines `project`, `attend` and `project_output`, and may replace `finish`.

  Args:
    config: of the model.
    params: its parameters; inside `jax.shard_map` over `fsdp` this device's parts.

  Attributes:
    layers: the whole parameters of the blocks that have been gathered.
  """

  def __init__(self, config: TransformerConfig, params: InferenceParams):
    self.config, self.params = config, params
    self.kinds, self.configs = config.layer_kinds, config.layer_configs
    self.layers: dict[int, dict[str, Any]] = {}

  def gather(self, i: int, x: jax.Array) -> jax.Array:
    """Puts the parameters of block i into `layers`, once its input x is known; returns x."""
    if i not in self.layers and i < self.config.num_layers:
      self.layers[i], x = inference.whole_layer(self.config, self.params, i, x)
    return x

  def project(self, i: int, x: jax.Array) -> Projected:
    """Returns the input of attention in block i for hidden states x."""
    raise NotImplementedError

  def attend(self, i: int, projected: Projected) -> tuple[Mixed, Any]:
    """Returns the output of attention in block i, and the layer's next cache."""
    raise NotImplementedError

  def project_output(self, i: int, mixed: Mixed, x: jax.Array) -> jax.Array:
    """Returns x plus the output projection of attention in block i."""
    raise NotImplementedError

  def finish(self, i: int, x: jax.Array, mixed: Mixed) -> tuple[jax.Array, Projected | None]:
    """Computes the rest of block i, after its attention, and projects for the next block.

    Args:
      i: index of the block.
      x: hidden states before the block.
      mixed: output of its attention.
    Returns:
      The hidden states after the block, and the input of attention in the next block, None after
      the last one.
    """
    y = self.project_output(i, mixed, x)
    x = inference.mlp(self.config, self.layers[i], x if self.config.parallel_residual else y, y)
    x = self.gather(i + 1, x)
    return x, self.project(i + 1, x) if i + 1 < self.config.num_layers else None

  def run(self, x: jax.Array) -> tuple[jax.Array, tuple]:
    """Returns the hidden states after the last block, and the next cache of every layer."""
    x = self.gather(0, x)
    projected: Projected | None = self.project(0, x)
    layers = []
    for i in range(self.config.num_layers):
      assert projected is not None
      mixed, layer = self.attend(i, projected)
      x, projected = self.finish(i, x, mixed)
      layers.append(layer)
    return x, tuple(layers)


class CachedBlocks(Blocks[Projections, jax.Array]):
  """The blocks for new tokens, computed by XLA on any device.

  Args:
    config, params: as in `Blocks`.
    layers: of the cache.
    seen_B: number of tokens that each row has seen before the new ones.
    position_BxC: positions of the new tokens.
    count_B: how many of a row's new tokens exist.
    fresh: True if no row has seen a token before; None for a single token a row, which attends to
      the cache directly.
  """

  def __init__(
    self,
    config: TransformerConfig,
    params: InferenceParams,
    layers: tuple[LayerCache, ...],
    seen_B: jax.Array,
    position_BxC: jax.Array,
    count_B: jax.Array,
    fresh: bool | None,
  ):
    super().__init__(config, params)
    self._layers, self._seen_B, self._position_BxC = layers, seen_B, position_BxC
    self._count_B, self._fresh = count_B, fresh

  def project(self, i: int, x: jax.Array) -> Projections:
    """Returns queries, keys and values of block i."""
    return inference.project(self.config, self.layers[i], x, self._position_BxC)

  def attend(self, i: int, projected: Projections) -> tuple[jax.Array, LayerCache]:
    """Returns attention in block i, [B, C, H, D] or of one token [B, H, D]."""
    layer, scores, config = self._layers[i], None, self.configs[i]
    if selects(layer):
      scores, scorer = self._score(i, projected, layer)
      layer = layer._replace(scorer=scorer)
    query, key, value, *_ = projected
    new = KeysAndValues(key, value)
    return attend_by_groups(self._attend, self.kinds[i], config, layer, query, new, scores)

  def _attend(self, kind, config, layer, query, new, scores):
    """Attends in a layer, or in some heads of it; arguments as in `attend_by_groups`."""
    seen, count = self._seen_B, self._count_B
    if isinstance(layer, Kept):
      return attend_evicting(kind, layer, seen, count, query, new)
    if self._fresh is not None:
      return attend_chunk(kind, config, layer, seen, count, query, new, scores, self._fresh)
    query, new = query[:, 0], map_rows(lambda x: x[:, 0], new)
    scores = None if scores is None else scores[:, 0]
    return attend_token(kind, config, layer, seen, count > 0, query, new, scores)

  def _score(self, i, projected, layer):
    """Returns the scores that become final in block i, and the next state of its scorer."""
    return scoring_network(self.configs[i]).apply(
      {"params": self.layers[i].get("scorer", {})},
      projected.scorer_input,
      layer.scorer,
      self._seen_B,
      i,
      self._count_B,
      projected.scorer_logits,
      method="stream",
    )

  def project_output(self, i: int, mixed: jax.Array, x: jax.Array) -> jax.Array:
    """Returns x plus the output projection of attention in block i."""
    return inference.dense(self.layers[i]["out"], mixed.reshape(*x.shape[:2], -1), x)
