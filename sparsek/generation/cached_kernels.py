"""One token through all layers by the kernels in kernels/decode_attention.py and what it imports:
on Hopper GPUs what `sparsek.generation.cache` takes a step with, where a model is of the common
kind: RMSNorm, rotations of whole heads, no biases, a linear scorer and the gate "straight_through".
Two kernels a layer, or five where fused_decode_layer.py does not take it, and two before them all.
"""

import jax
import jax.numpy as jnp

from sparsek.attention.scoring import PRIOR_COUNT, SLOPE_TOKENS, ScorerState
from sparsek.config import TransformerConfig
from sparsek.generation import inference
from sparsek.generation.cached_attention import KeysAndValues, SelectionCache, needs_support
from sparsek.generation.inference import InferenceParams
from sparsek.kernels.hopper import decode_attention, fused_decode_layer
from sparsek.model.layers import rope_angles, rope_frequencies


def takes(config: TransformerConfig, params: InferenceParams, layers: tuple) -> bool:
  """Whether `step` does what the other way would, here."""
  selects = (
    config.scorer == "linear"
    and config.scorer_normalize
    and not config.scorer_init_noise
    and not config.scorer_shared
  )
  selects = selects and not needs_support(config.gate)
  selects = selects and all(own.window > 0 for own in config.layer_configs)
  plain = (
    config.norm == "rms_norm"
    and config.positions == "rope"
    and config.rope_dim == config.head_dim
    and not config.qk_norm
  )

  def fits(kind, block, layer):
    own = kind in ("full", "sliding_window") or (
      kind == "sparsek" and selects and "scorer_rows" in block
    )
    return (
      own
      and "bias" not in block["qkv"]
      and decode_attention.takes(_rows(layer).key, config.num_heads)
    )

  return plain and all(map(fits, config.layer_kinds, params.layers, layers))


def step(
  config: TransformerConfig,
  params: InferenceParams,
  layers: tuple,
  seen: jax.Array,
  token: jax.Array,
  active: jax.Array,
) -> tuple[jax.Array, tuple]:
  """Hidden states [B, E] before the last norm, and the next layers of the cache; token, seen [B]
  integers, active [B] bool.
  """
  heads, kinds = config.num_heads, config.layer_kinds
  position, alive = jnp.where(active, seen, 0), active.astype(jnp.int32)
  x_BxE = inference.embed(config, params, token[:, None], position[:, None])[:, 0]
  angle = rope_angles(
    position, rope_frequencies(config.rope_dim, config.rope_theta, config.rope_scaling)
  )
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  every = [_rows(layer) for layer in layers]
  moved = [rows for kind, rows in zip(kinds, every) if kind == "sparsek"]
  moved = iter(decode_attention.evict(moved, seen, alive) if moved else [])
  every = [next(moved) if kind == "sparsek" else rows for kind, rows in zip(kinds, every)]
  blocks = [
    (block, [block["scorer_rows"]] if kind == "sparsek" else [])
    for kind, block in zip(kinds, params.layers)
  ]
  projected, counter = (
    inference.projected(config, blocks[0][0], x_BxE, blocks[0][1]),
    jnp.zeros(1, jnp.int32),
  )
  for i, (kind, (block, _), after) in enumerate(zip(kinds, blocks, [*blocks[1:], None])):
    scorer = _scorer(block["scorer"]) if kind == "sparsek" else None
    mixed, every[i] = decode_attention.attend(
      projected, cos, sin, every[i], scorer, seen, alive, heads, kind == "sliding_window"
    )
    if _chains(config, x_BxE, block, after):
      scale, following = (
        (after[0]["attention_norm"]["scale"], [after[0]["qkv"]["kernel"], *after[1]])
        if after
        else (None, [])
      )
      out, up, down = (block[name]["kernel"] for name in ("out", "up", "down"))
      x_BxE, projected, counter = fused_decode_layer.chain(
        mixed,
        x_BxE,
        out,
        block["mlp_norm"]["scale"],
        up,
        down,
        scale,
        following,
        counter,
        config.norm_eps,
      )
      continue
    y_BxE = inference.dense(block["out"], mixed, x_BxE)
    x_BxE = inference.mlp(config, block, x_BxE if config.parallel_residual else y_BxE, y_BxE)
    projected = inference.projected(config, after[0], x_BxE, after[1]) if after else None
  return x_BxE, tuple(map(_layer, layers, every))


def _chains(config, x, block, after):
  """Whether one kernel takes what follows a layer's attention, up to the next one's."""
  own = [block[name] for name in ("out", "up", "down")]
  plain = (
    config.mlp == "swiglu"
    and not config.parallel_residual
    and not any("bias" in params for params in own)
  )
  following = [after[0]["qkv"]["kernel"], *after[1]] if after else []
  return plain and fused_decode_layer.takes(x, *(params["kernel"] for params in own), *following)


def _scorer(params):
  return decode_attention.Scorer(
    params["scale"],
    params["slope"],
    params.get("sink", jnp.zeros_like(params["scale"])),
    PRIOR_COUNT,
    SLOPE_TOKENS,
  )


def _rows(layer):
  if not isinstance(layer, SelectionCache):
    return decode_attention.Rows(*layer)
  return decode_attention.Rows(
    *layer.rows, layer.score, layer.position, layer.pending, tuple(layer.scorer[2:])
  )


def _layer(before, rows):
  kept = KeysAndValues(rows.key, rows.value)
  if not isinstance(before, SelectionCache):
    return kept
  return before._replace(
    rows=kept,
    score=rows.score,
    position=rows.position,
    pending=rows.pending,
    scorer=ScorerState(*before.scorer[:2], *rows.moments),
  )
