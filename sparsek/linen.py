"""The attention layer as a Flax Linen module, without the configuration of a language model."""

import dataclasses

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from sparsek import functional
from sparsek.functional import Options, Params, check_hidden_states, check_inputs, check_x
from sparsek.generation.cache import Cache
from sparsek.model import layers


class SparseKAttention(nn.Module):
  """Causal attention to the window and to the k best-scored tokens before it, [batch, n, features]
  to [batch, n, features].

  The fields are those of `sparsek.functional.Options`, where they are described, without the width
  `features`, which the first input determines. `num_heads`, `use_bias` and `dtype` are named as in
  Flax's own MultiHeadDotProductAttention. Parameters are those of `sparsek.functional.init`.

  The scorer learns from the loss of the model. Its auxiliary loss is sown on request, and so are
  the scores:

    y, sown = layer.apply(variables, x, mutable=["scorer_loss", "diagnostics"],
                          rngs={"scorer_loss": key})
    (loss,), (scores,) = sown["scorer_loss"]["attention_mass"], sown["diagnostics"]["scores"]

  Given rngs={"scorer_noise": key}, noise of standard deviation `scorer_noise` is added to scores.

  Example:
    layer = sparsek.linen.SparseKAttention(num_heads=8, k=256, window=256)
    variables = layer.init(jax.random.key(0), x)  # x [batch, n, 512]
    y = layer.apply(variables, x)
  """

  num_heads: int = 8
  k: int = 256
  window: int = 256
  num_kv_heads: int | None = None
  head_dim: int | None = None
  gate: str = "straight_through"
  scorer: str = "linear"
  scorer_lookahead: int = 4
  scorer_lookback: int = 3
  scorer_normalize: bool = True
  scorer_init_scale: float = 1.0
  scorer_init_slope: float = 0.0
  scorer_shared: bool = False
  scorer_init_noise: float = 0.0
  scorer_init_sink: float = 0.0
  scorer_noise: float = 0.0
  scorer_loss_queries: int = 128
  scorer_loss_kind: str = "divergence"
  rope_theta: float | None = 10000.0
  rope_fraction: float = 1.0
  rope_scaling: str | tuple | None = None
  qk_norm: bool = False
  norm_eps: float = 1e-6
  use_bias: bool = False
  dtype: DTypeLike = "float32"
  num_layers: int = 1
  layer_index: int = 0
  implementation: str | None = None

  @nn.compact
  def __call__(
    self, x: jax.Array, segment_ids: jax.Array | None = None, positions: jax.Array | None = None
  ) -> jax.Array:
    """Lets tokens attend to each other.

    Args:
      x, segment_ids, positions: as in `sparsek.functional.apply`.

    Returns:
      [batch, n, features] in `dtype`.

    Raises:
      ValueError: where x has another width than the parameters, or an option is wrong.
    """
    check_x(x)
    params = dict(self.variables.get("params", {}))
    options = self.options(params["query"]["kernel"].shape[0] if params else x.shape[-1])
    if self.is_initializing():
      check_hidden_states(options, x, positions=positions)
    else:
      check_inputs(options, params, x, positions=positions)
    attention = layers.SparseKAttention(options.config)
    nn.share_scope(self, attention)
    return attention(x, segment_ids, options.layer_index, positions=positions)

  @nn.nowrap
  def options(self, features: int) -> Options:
    """Returns the options of this layer for inputs of that width."""
    names = {field.name for field in dataclasses.fields(Options)} - {"features"}
    return Options(features, **{name: getattr(self, name) for name in names})

  @nn.nowrap
  def init_cache(self, features: int, batch_size: int, *, support_size: int | None = None) -> Cache:
    """Returns an empty cache for generation with inputs of that width.

    See `sparsek.functional.init_cache`.
    """
    return functional.init_cache(self.options(features), batch_size, support_size=support_size)

  @nn.nowrap
  def prefill(
    self, params: Params, cache: Cache, x: jax.Array, lengths: jax.Array | None = None
  ) -> tuple[jax.Array, Cache]:
    """Feeds tokens [batch, m, features] after those of the cache: `sparsek.functional.prefill`.

    Like `decode` it needs no `apply`: `layer.prefill(variables["params"], cache, x)`.
    """
    check_x(x)
    return functional.prefill(self.options(x.shape[-1]), params, cache, x, lengths)

  @nn.nowrap
  def decode(
    self, params: Params, cache: Cache, x: jax.Array, active: jax.Array | None = None
  ) -> tuple[jax.Array, Cache]:
    """Feeds one token a row, [batch, features]: `sparsek.functional.decode`."""
    check_x(x, 2)
    return functional.decode(self.options(x.shape[-1]), params, cache, x, active)
