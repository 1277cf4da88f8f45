"""The attention layer as a Flax NNX module, without the configuration of a language model."""

from typing import Any

import jax
from flax import nnx

from sparsek import functional
from sparsek.functional import Options, Params
from sparsek.generation.cache import Cache


class SparseKAttention(nnx.Module):
  """Causal attention to the window and to the k best-scored tokens before it, [batch, n,
  in_features] to [batch, n, in_features].

  Parameters are `nnx.Param`s, named as in `sparsek.functional.init`: `layer.query.kernel`,
  `layer.scorer.linear.kernel`. They and `options` are all of its state; generation keeps its cache
  outside.

  Args:
    in_features: width E of input and output.
    num_heads: query heads.
    k: key/value pairs that are selected for each query.
    window: most recent tokens that each query sees, itself included.
    rngs: of which the stream "params" initialises the parameters.
    options: further fields of `sparsek.functional.Options`, such as num_kv_heads, scorer and gate.

  Attributes:
    options: `sparsek.functional.Options`, static; `dataclasses.replace` gives it another k or
      window.

  Raises:
    ValueError: names the option that is wrong, its value and what is allowed.

  Example:
    layer = sparsek.nnx.SparseKAttention(512, num_heads=8, k=256, window=256, rngs=nnx.Rngs(0))
    y = layer(x)  # x [batch, n, 512]
  """

  def __init__(
    self,
    in_features: int,
    num_heads: int = 8,
    *,
    k: int = 256,
    window: int = 256,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    if not hasattr(rngs, "params"):
      raise ValueError(f"rngs={rngs!r} must be streams of random keys, such as nnx.Rngs(0)")
    self.options = Options(in_features, num_heads, k, window, **options)
    params = functional.init(self.options, rngs.params())
    for name, group in params.items():
      setattr(self, name, _module(group))

  @property
  def params(self) -> Params:
    """The parameters as a dict of dicts of arrays, for `sparsek.functional`."""
    return nnx.to_pure_dict(nnx.state(self, nnx.Param))

  def __call__(
    self,
    x: jax.Array,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    *,
    rngs: nnx.Rngs | None = None,
  ) -> jax.Array:
    """Lets tokens attend to each other.

    Args:
      x, segment_ids, positions: as in `sparsek.functional.apply`.
      rngs: in training, whose stream "scorer_noise" draws the noise of that option; None: no noise.

    Returns:
      [batch, n, in_features] in the dtype of the options.

    Raises:
      ValueError: where x or a parameter has another width.
    """
    key = rngs.scorer_noise() if rngs is not None and self.options.scorer_noise else None
    return functional.apply(self.options, self.params, x, segment_ids, positions, noise_key=key)

  def with_scorer_loss(
    self,
    x: jax.Array,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    *,
    rngs: nnx.Rngs,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the output and the scorer's auxiliary loss, which needs a key of "scorer_loss".

    The scorer learns without it, from the loss of the model; see
    `sparsek.functional.apply_with_scorer_loss`.
    """
    return functional.apply_with_scorer_loss(
      self.options, self.params, x, rngs.scorer_loss(), segment_ids, positions
    )

  def init_cache(self, batch_size: int, *, support_size: int | None = None) -> Cache:
    """Returns an empty cache for generation: `sparsek.functional.init_cache`."""
    return functional.init_cache(self.options, batch_size, support_size=support_size)

  def prefill(
    self, cache: Cache, x: jax.Array, lengths: jax.Array | None = None
  ) -> tuple[jax.Array, Cache]:
    """Feeds tokens [batch, m, in_features] after those of the cache: `functional.prefill`."""
    return functional.prefill(self.options, self.params, cache, x, lengths)

  def decode(
    self, cache: Cache, x: jax.Array, active: jax.Array | None = None
  ) -> tuple[jax.Array, Cache]:
    """Feeds one token a row, [batch, in_features]: `functional.decode`."""
    return functional.decode(self.options, self.params, cache, x, active)


def _module(group: Params) -> nnx.Dict:
  """Returns parameters as a module whose attributes are `nnx.Param`s."""
  return nnx.Dict(
    {
      name: _module(value) if isinstance(value, dict) else nnx.Param(value)
      for name, value in group.items()
    }
  )
