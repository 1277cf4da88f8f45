"""The attention layer as pure functions, for plain JAX, Equinox, or a library of your own.

  import sparsek.functional as sk

  options = sk.Options(features=512, num_heads=8, k=256, window=256)
  params = sk.init(options, jax.random.key(0))
  y = sk.apply(options, params, x)  # x [batch, n, 512] to y [batch, n, 512]

Parameters are a dict of dicts of float32 arrays: query/kernel [E, H, D], key/kernel and
value/kernel [E, G, D], out/kernel [H, D, E], and those of the scorer. `sparsek.linen` and
`sparsek.nnx` have the same layer and the same parameters as modules.

Options are static: compile with `jax.jit(sk.apply, static_argnums=0)`.

Generation keeps a cache whose size does not grow with the number of tokens:

  cache = sk.init_cache(options, batch_size=1)
  y, cache = sk.prefill(options, params, cache, prompt)  # [1, m, 512]
  y_t, cache = sk.decode(options, params, cache, x_t)  # [1, 512]
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sparsek.config import Count, Index, TransformerConfig, check_fields, check_type
from sparsek.generation import cache as model_cache
from sparsek.generation.cache import Cache
from sparsek.generation.cached_attention import KeysAndValues, SelectionCache, attend_token
from sparsek.generation.cached_chunk import attend_chunk
from sparsek.model.layers import SparseKAttention
from sparsek.model.random_keys import random_keys
from sparsek.model.scorers import scoring_network

Params = dict[str, Any]
# Fields of `Options` that a TransformerConfig has under another name, or not at all.
_TRANSLATED = {
  "features",
  "num_kv_heads",
  "head_dim",
  "rope_theta",
  "use_bias",
  "dtype",
  "layer_index",
}


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of one SPARSEK attention layer.

  No parameter depends on `k`, `window` or `gate`, so that they may change after training.

  Attributes:
    features: width E of input and output.
    num_heads: query heads H.
    k: key/value pairs that are selected for each query.
    window: most recent tokens that each query sees, itself included.
    num_kv_heads: key/value heads G, of which H is a multiple; None: H.
    head_dim: width D of a head, even; None: features / num_heads. In Flax's own attention it is
      qkv_features / num_heads.
    gate: how the selection mask enters attention: "straight_through", "value" or "key_value"; see
      `sparsek.sparsek_attention`.
    scorer: scoring network: "linear", "conv", "random", or a name that
      `sparsek.model.registration.register_scorer` has added.
      With every gate it learns from the loss of the model, without any further term.
    scorer_lookahead, scorer_lookback, scorer_normalize: see `sparsek.TransformerConfig`.
    scorer_init_scale, scorer_init_slope, scorer_init_noise, scorer_init_sink: see there.
    scorer_shared, scorer_noise, scorer_loss_queries, scorer_loss_kind: see there.
    rope_theta: base of the rotary embedding of queries and keys; None: no rotation.
    rope_fraction, rope_scaling: see `sparsek.TransformerConfig`.
    qk_norm: RMSNorm over the head dimension of queries and keys.
    norm_eps: its epsilon.
    use_bias: biases on all four projections. Unlike in Flax's own attention there are none by
      default.
    dtype: of matrix inputs and of the output, float32 or bfloat16; parameters, scores and softmax
      are float32.
    num_layers: layers of the model around this one; the output projection begins with variance
      1 / (2 num_layers fan-in).
    layer_index: the layer's index, from which the fixed noise of the scorer "random" and of
      `scorer_init_noise` derives.
    implementation: of attention: "xla", "mosaic_gpu", "mosaic_mma", "mosaic_tpu" or "reference";
      None chooses the fastest one that can run.

  Raises:
    ValueError: names the option that is wrong, its value and what is allowed.
  """

  features: Count
  num_heads: Count = 8
  k: int = 256
  window: int = 256
  num_kv_heads: Count | None = None
  head_dim: Count | None = None
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
  layer_index: Index = 0
  implementation: str | None = None

  def __post_init__(self):
    check_fields(self)
    if self.head_dim is None and self.features % self.num_heads:
      raise ValueError(
        f"num_heads={self.num_heads} must divide features={self.features}, or head_dim be given"
      )
    try:
      object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
    except TypeError as error:
      raise ValueError(f"dtype={self.dtype!r} is no dtype: {error}") from None
    object.__setattr__(self, "rope_scaling", self.config.rope_scaling)  # a tuple: hashable

  @functools.cached_property
  def config(self) -> TransformerConfig:
    """The configuration of a language model with this layer; its other fields have no meaning."""
    same = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name not in _TRANSLATED
    }
    head_dim = self.features // self.num_heads if self.head_dim is None else self.head_dim
    return TransformerConfig(
      **same,
      embed_dim=self.features,
      num_kv_heads=self.num_heads if self.num_kv_heads is None else self.num_kv_heads,
      head_dim=head_dim,
      positions="learned" if self.rope_theta is None else "rope",
      rope_theta=1.0 if self.rope_theta is None else self.rope_theta,
      use_bias=self.use_bias,
      out_bias=self.use_bias,
      dtype=str(self.dtype),
    )


def init(options: Options, key: jax.Array) -> Params:
  """Draws initial float32 parameters from a random key, such as `jax.random.key(0)`."""
  _check_options(options)
  return _init(options, random_keys("key", key))


@functools.partial(jax.jit, static_argnums=0)
def _init(options, key):
  # The reference is traced fastest, and its output is not computed.
  config = dataclasses.replace(options.config, implementation="reference")
  x = jnp.zeros((1, 2, options.features))
  return SparseKAttention(config, parent=None).init(key, x)["params"]


@functools.lru_cache(maxsize=64)
def _shapes(options: Options) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of all parameters by their names, such as "query/kernel"."""
  return _named_shapes(jax.eval_shape(functools.partial(_init, options), jax.random.key(0)))


def _named_shapes(params):
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): getattr(x, "shape", type(x).__name__)
    for path, x in leaves
  }


def _check_options(options: Options) -> None:
  if not isinstance(options, Options):
    raise ValueError(
      f"options is of type {type(options).__name__}, it must be sparsek.functional.Options, which "
      "jax.jit must not trace: jax.jit(functools.partial(apply, options))"
    )


def check_x(x: jax.Array, ndim: int = 3) -> None:
  """Raises ValueError unless x is hidden states of so many axes."""
  axes = "[batch, n, features] with n >= 1" if ndim == 3 else "[batch, features]"
  check_type("x", x, (jax.Array, np.ndarray), f"an array of floats {axes}")
  is_empty = ndim == 3 == x.ndim and not x.shape[1]
  if x.ndim != ndim or not jnp.issubdtype(x.dtype, jnp.floating) or is_empty:
    raise ValueError(f"x must be floats {axes}, got {x.dtype} {x.shape}")


def check_hidden_states(
  options: Options, x: jax.Array, ndim: int = 3, positions: jax.Array | None = None
) -> None:
  """Raises ValueError unless x and its positions fit the options.

  Args:
    options: of the layer.
    x: hidden states, whose last axis is the width.
    ndim: number of axes that x must have.
    positions: as in `apply`, or in `decode` where x has two axes.
  """
  _check_options(options)
  check_x(x, ndim)
  batch, *tokens = x.shape[:-1]
  allowed = [(batch, *tokens), (1, *tokens)] + [tuple(tokens)] * bool(tokens)
  if positions is not None and jnp.shape(positions) not in allowed:
    shapes = " or ".join(map(str, dict.fromkeys(allowed)))
    raise ValueError(f"positions must have shape {shapes}, got {jnp.shape(positions)}")
  if x.shape[-1] != options.features:
    raise ValueError(f"x has width {x.shape[-1]}, but the layer has features={options.features}")


def check_inputs(
  options: Options, params: Params, x: jax.Array, ndim: int = 3, positions: jax.Array | None = None
) -> None:
  """Raises ValueError unless the parameters, x and its positions fit the options.

  Args:
    options: of the layer.
    params: its parameters.
    x, ndim, positions: as in `check_hidden_states`.
  """
  check_hidden_states(options, x, ndim, positions)
  check_type("params", params, Mapping, "a dict of arrays, such as sparsek.functional.init returns")
  got, needed = _named_shapes(params), _shapes(options)
  if got != needed:
    names = [name for name in {**needed, **got} if got.get(name) != needed.get(name)]
    differ = [
      f"{name} {got.get(name, 'is missing')} (needed: {needed.get(name, 'none')})" for name in names
    ]
    raise ValueError(f"parameters do not fit the options: {', '.join(differ)}")


def apply(
  options: Options,
  params: Params,
  x: jax.Array,
  segment_ids: jax.Array | None = None,
  positions: jax.Array | None = None,
  *,
  noise_key: jax.Array | None = None,
) -> jax.Array:
  """Lets tokens attend, causally, to the window and to the k best-scored tokens before it.

  Args:
    options: of the layer; static under `jax.jit`.
    params: from `init`.
    x: hidden states [batch, n, features], n >= 1, normalised if the model normalises before
      attention.
    segment_ids: [batch, n] integers or None; a run of equal ids is a document, and attention,
      scores and positions restart at each.
    positions: [batch, n], [1, n] or [n] integers for the rotary embedding; by default the tokens'
      positions in their documents. The window and the order of tokens do not depend on them.
    noise_key: random key, in training, of the noise on scores that `scorer_noise` asks for; None:
      no noise.

  Returns:
    [batch, n, features] in the dtype of the options.

  Raises:
    ValueError: where x, segment_ids, positions or the parameters have another width or shape.
  """
  check_inputs(options, params, x, positions=positions)
  rngs = None if noise_key is None else {"scorer_noise": random_keys("noise_key", noise_key)}
  y = _call(options, params, x, segment_ids, positions, rngs=rngs)
  assert isinstance(y, jax.Array)
  return y


def apply_with_scorer_loss(
  options: Options,
  params: Params,
  x: jax.Array,
  key: jax.Array,
  segment_ids: jax.Array | None = None,
  positions: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns what `apply` returns, and the scorer's auxiliary loss, a scalar.

  Args:
    options, params, x, segment_ids, positions: as in `apply`.
    key: random key, from which `scorer_loss_queries` queries a row and the noise of `scorer_noise`
      are drawn.

  Returns:
    The output, and the loss of the scorer, which `scorer_loss_kind` names: how badly the scores
    tell what full attention would read. Only the scorer's parameters learn from it.
  """
  check_inputs(options, params, x, positions=positions)
  loss_key, noise_key = jax.random.split(random_keys("key", key))
  rngs = {"scorer_loss": loss_key, "scorer_noise": noise_key}
  y, sown = _call(options, params, x, segment_ids, positions, rngs=rngs, mutable=["scorer_loss"])
  return y, sown["scorer_loss"]["attention_mass"][0]


def scores(
  options: Options, params: Params, x: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
  """Returns the scorer's scores of all tokens, [batch, n, num_kv_heads] float32.

  `sparsek.CausalSelection` and `sparsek.selection_statistics` tell from them what is selected.
  """
  check_inputs(options, params, x)
  variables = {"params": params.get("scorer", {})}
  result = scoring_network(options.config).apply(variables, x, segment_ids, options.layer_index)
  assert isinstance(result, jax.Array)
  return result


def _call(options, params, x, segment_ids, positions, **flax_arguments):
  layer = SparseKAttention(options.config, parent=None)  # also inside a Linen module
  return layer.apply(
    {"params": params}, x, segment_ids, options.layer_index, positions=positions, **flax_arguments
  )


def init_cache(options: Options, batch_size: int, *, support_size: int | None = None) -> Cache:
  """Returns an empty cache, whose size depends on k and window and not on any number of tokens.

  Args:
    options: of the layer.
    batch_size: rows that are fed together.
    support_size: see `sparsek.init_cache`, which makes the same for a whole model.

  Raises:
    ValueError: for sizes below 1 (support_size below 0).
    NotImplementedError: for a registered scorer that cannot stream.
  """
  _check_options(options)
  return model_cache.init_cache(_alone(options), batch_size, support_size=support_size)


def _alone(options: Options) -> TransformerConfig:
  return dataclasses.replace(options.config, num_layers=1)


def prefill(
  options: Options,
  params: Params,
  cache: Cache,
  x: jax.Array,
  lengths: jax.Array | None = None,
  positions: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
  """Feeds tokens after those that the cache has seen.

  Args:
    options, params: as in `apply`.
    cache: from `init_cache`, `prefill` or `decode`.
    x: hidden states [batch, m, features]; each row is one document. A long prompt can be fed in
      parts.
    lengths: [batch] integers from 0 to m: only the first lengths[b] tokens of row b are fed. None:
      all m tokens of every row.
    positions: [batch, m] integers for the rotary embedding; by default the number of tokens before.

  Returns:
    [batch, m, features], equal to those of `apply` on all tokens so far, meaningless beyond
    `lengths`; and the cache after these tokens.

  Raises:
    ValueError: for bad shapes, or a cache made for other options or another batch.
  """
  check_inputs(options, params, x, positions=positions)
  batch, length, _ = x.shape
  count = jnp.full(batch, length) if lengths is None else jnp.asarray(lengths)
  if count.shape != (batch,) or not jnp.issubdtype(count.dtype, jnp.integer):
    raise ValueError(
      f"lengths must be integers of shape {(batch,)}, got {count.dtype} {count.shape}"
    )
  if not isinstance(count, jax.core.Tracer) and np.any((count < 0) | (count > length)):
    raise ValueError(f"lengths={count.tolist()} must be from 0 to {length}, the tokens given")
  model_cache.check_sizes(_alone(options), cache, batch)
  fresh = not isinstance(cache.seen, jax.core.Tracer) and not np.any(cache.seen)
  return _feed(options, params, cache, x, count.astype(jnp.int32), positions, fresh)


def decode(
  options: Options,
  params: Params,
  cache: Cache,
  x: jax.Array,
  active: jax.Array | None = None,
  positions: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
  """Feeds one token a row, in time and memory that do not depend on the number of tokens before it.

  In a loop, compile it with the cache donated, so that the cache is updated in place:

    step = jax.jit(functools.partial(sk.decode, options), donate_argnums=1)

  Args:
    options, params, cache: as in `prefill`.
    x: hidden states [batch, features] of the tokens.
    active: [batch] bool; rows where it is False stay as they are, and their output means nothing.
      None: all advance.
    positions: [batch] integers for the rotary embedding; by default the number of tokens before.

  Returns:
    [batch, features], equal to what `apply` returns at this token; and the next cache.

  Raises:
    ValueError: as `prefill`.
  """
  check_inputs(options, params, x, 2, positions)
  model_cache.check_sizes(_alone(options), cache, len(x))
  active = jnp.ones(len(x), bool) if active is None else jnp.asarray(active)
  if active.shape != (len(x),) or active.dtype != bool:
    raise ValueError(
      f"active must be booleans of shape {(len(x),)}, got {active.dtype} {active.shape}"
    )
  count = active.astype(jnp.int32)
  positions = None if positions is None else jnp.asarray(positions)[:, None]
  y, cache = _feed(options, params, cache, x[:, None], count, positions, None)
  return y[:, 0], cache


def _feed(options, params, cache, x_BxCxE, count_B, positions, fresh):
  """Feeds tokens, of which each row has the first `count`; fresh=None attends from one token a row,
  fresh=True says that no row has seen a token.
  """
  config = _alone(options)
  (layer,), seen = cache.layers, cache.seen
  assert isinstance(layer, SelectionCache)
  if positions is None:
    positions = seen[:, None] + jnp.arange(x_BxCxE.shape[1])
  module, variables = SparseKAttention(config, parent=None), {"params": params}
  projected: Any = module.apply(variables, x_BxCxE, positions, method="project")
  query, key, value = projected
  scores_BxCxG, scorer = scoring_network(config).apply(
    {"params": params.get("scorer", {})},
    x_BxCxE,
    layer.scorer,
    seen,
    options.layer_index,
    count_B,
    None,
    method="stream",
  )
  layer = layer._replace(scorer=scorer)
  if fresh is None:
    new = KeysAndValues(key[:, 0], value[:, 0])
    mixed, layer = attend_token(
      "sparsek", config, layer, seen, count_B > 0, query[:, 0], new, scores_BxCxG[:, 0]
    )
    mixed = mixed[:, None]
  else:
    mixed, layer = attend_chunk(
      "sparsek", config, layer, seen, count_B, query, KeysAndValues(key, value), scores_BxCxG, fresh
    )
  y = module.apply(variables, mixed, method="output")
  return y, Cache(seen + count_B, (layer,))
