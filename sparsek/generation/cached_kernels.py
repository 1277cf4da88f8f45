"""One token through all layers by the decode kernels of Hopper GPUs (kernels/hopper), with which
`sparsek.generation.cache` makes a step where a model is of the common kind: RMSNorm, rotations of
whole heads, no biases, a linear scorer and the gate "straight_through".

A layer takes two kernels, or five where fused_decode_layer.py does not support it; two more come
before the first layer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsek.attention.scoring import PRIOR_COUNT, SLOPE_TOKENS, ScorerState
from sparsek.config import TransformerConfig
from sparsek.generation import inference
from sparsek.generation.cached_attention import KeysAndValues, SelectionCache, needs_support
from sparsek.generation.inference import InferenceParams
from sparsek.kernels.hopper import decode_attention, decode_eviction, fused_decode_layer
from sparsek.model.layers import rope_angles, rope_frequencies


def supports(config: TransformerConfig, params: InferenceParams, layers: tuple) -> bool:
  """Returns whether `step` can compute a step of this model, on this device."""
  selects = (
    config.scorer == "linear"
    and config.scorer_normalize
    and not config.scorer_init_noise
    and not config.scorer_shared
    and not needs_support(config.gate)
    and all(layer_config.window > 0 for layer_config in config.layer_configs)
  )
  plain = (
    config.norm == "rms_norm"
    and config.positions == "rope"
    and config.rope_dim == config.head_dim
    and not config.qk_norm
  )

  def fits(kind, params_of_layer, layer):
    has_kernel = kind in ("full", "sliding_window") or (
      kind == "sparsek" and selects and "scorer_rows" in params_of_layer
    )
    return (
      has_kernel
      and "bias" not in params_of_layer["qkv"]
      and decode_attention.supports(_rows(layer).key, config.num_heads)
    )

  return plain and all(map(fits, config.layer_kinds, params.layers, layers))


class Layer(NamedTuple):
  """Parameters of a layer, and the rows of the scorer that are multiplied with its queries' and
  keys' kernel: one matrix, or none.
  """

  params: dict[str, Any]
  scorer_rows: list[jax.Array]


def step(
  config: TransformerConfig,
  params: InferenceParams,
  layers: tuple,
  seen: jax.Array,
  token: jax.Array,
  active: jax.Array,
) -> tuple[jax.Array, tuple]:
  """Computes a step.

  Args:
    layers: of the cache.
    seen, token: [B] integers.
    active: [B] bool.

  Returns:
    Hidden states [B, E] before the last norm, and the next layers of the cache.
  """
  kinds = config.layer_kinds
  position, alive = jnp.where(active, seen, 0), active.astype(jnp.int32)
  x_BxE = inference.embed(config, params, token[:, None], position[:, None])[:, 0]
  scaling = config.rope_scaling
  assert not isinstance(scaling, str)
  angle = rope_angles(position, rope_frequencies(config.rope_dim, config.rope_theta, scaling))
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  rows = _evict(kinds, list(map(_rows, layers)), seen, alive)
  blocks = [
    Layer(block, [block["scorer_rows"]] if kind == "sparsek" else [])
    for kind, block in zip(kinds, params.layers)
  ]
  projected: jax.Array | None = inference.projected(
    config, blocks[0].params, x_BxE, blocks[0].scorer_rows
  )
  counter = jnp.zeros(1, jnp.int32)
  for i, (kind, block, following) in enumerate(zip(kinds, blocks, [*blocks[1:], None])):
    scorer = _scorer(block.params["scorer"]) if kind == "sparsek" else None
    assert projected is not None  # it is None after the last layer
    mixed, rows[i] = decode_attention.attend(
      projected, cos, sin, rows[i], scorer, seen, alive, config.num_heads, kind == "sliding_window"
    )
    if _is_fused(config, x_BxE, block, following):
      x_BxE, projected, counter = _fused_layer(config, mixed, x_BxE, block, following, counter)
      continue
    y_BxE = inference.dense(block.params["out"], mixed, x_BxE)
    mlp_input = x_BxE if config.parallel_residual else y_BxE
    x_BxE = inference.mlp(config, block.params, mlp_input, y_BxE)
    projected = following and inference.projected(
      config, following.params, x_BxE, following.scorer_rows
    )
  return x_BxE, tuple(map(_layer, layers, rows))


def _evict(
  kinds: tuple[str, ...], rows: list[decode_attention.Rows], seen: jax.Array, active: jax.Array
) -> list[decode_attention.Rows]:
  """Returns the rows of all layers, where those that select have made room for the new token."""
  selecting = [i for i, kind in enumerate(kinds) if kind == "sparsek"]
  if selecting:
    moved = decode_eviction.evict([rows[i] for i in selecting], seen, active)
    for i, new in zip(selecting, moved):
      rows[i] = new
  return rows


def _matrices(block: Layer, following: Layer | None) -> tuple[list[jax.Array], list[jax.Array]]:
  """Returns the matrices out, up and down of a layer, and those of the next one's projection."""
  after = [following.params["qkv"]["kernel"], *following.scorer_rows] if following else []
  return [block.params[name]["kernel"] for name in ("out", "up", "down")], after


def _is_fused(
  config: TransformerConfig, x: jax.Array, block: Layer, following: Layer | None
) -> bool:
  """Returns whether one kernel can compute all from a layer's attention to the next one's."""
  plain = (
    config.mlp == "swiglu"
    and not config.parallel_residual
    and not any("bias" in block.params[name] for name in ("out", "up", "down"))
  )
  matrices, after = _matrices(block, following)
  return plain and fused_decode_layer.supports(x, *matrices, *after)


def _fused_layer(
  config: TransformerConfig,
  mixed: fused_decode_layer.Parts,
  x: jax.Array,
  block: Layer,
  following: Layer | None,
  counter: jax.Array,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
  (out, up, down), after = _matrices(block, following)
  return fused_decode_layer.fused_layer(
    mixed,
    x,
    out,
    block.params["mlp_norm"]["scale"],
    up,
    down,
    following.params["attention_norm"]["scale"] if following else None,
    after,
    counter,
    config.norm_eps,
  )


def _scorer(params: dict[str, jax.Array]) -> decode_attention.Scorer:
  return decode_attention.Scorer(
    params["scale"],
    params["slope"],
    params.get("sink", jnp.zeros_like(params["scale"])),
    PRIOR_COUNT,
    SLOPE_TOKENS,
  )


def _rows(layer: SelectionCache | KeysAndValues) -> decode_attention.Rows:
  if not isinstance(layer, SelectionCache):
    return decode_attention.Rows(*layer)
  return decode_attention.Rows(
    *layer.rows, layer.score, layer.position, layer.pending, tuple(layer.scorer[2:])
  )


def _layer(
  before: SelectionCache | KeysAndValues, rows: decode_attention.Rows
) -> SelectionCache | KeysAndValues:
  """Returns a layer of the cache with new rows."""
  keys_and_values = KeysAndValues(rows.key, rows.value)
  if not isinstance(before, SelectionCache):
    return keys_and_values
  assert rows.score is not None and rows.position is not None
  assert rows.pending is not None and rows.moments is not None
  return before._replace(
    rows=keys_and_values,
    score=rows.score,
    position=rows.position,
    pending=rows.pending,
    scorer=ScorerState(*before.scorer[:2], *rows.moments),
  )
