"""One decoding step through all layers, by kernels for NVIDIA GPUs since Ampere (kernels/hopper).

`sparsek.generation.cache` uses it for models of the common kind: RMSNorm, rotations of whole heads,
no biases, a linear scorer and the gate "straight_through". A layer takes two kernels, or five where
fused_decode_layer.py does not support it, as on all GPUs but Hopper's; two more come before the
first layer, or one where the rows of the batch are so many that the attention kernel itself makes
room for the new token.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sparsek.attention.scoring import PRIOR_COUNT, SLOPE_TOKENS, ScorerState
from sparsek.config import TransformerConfig
from sparsek.generation import inference
from sparsek.generation.block import Blocks
from sparsek.generation.cached_attention import (
  GroupedCache,
  KeysAndValues,
  SelectionCache,
  needs_support,
)
from sparsek.generation.inference import InferenceParams
from sparsek.kernels.hopper import (
  decode_attention,
  decode_eviction,
  fused_decode_layer,
  small_batch_matmul,
)
from sparsek.kernels.hopper.small_batch_matmul import Parts
from sparsek.model.layers import rope_angles, rope_frequencies

Mixed = Parts | jax.Array  # attention, or parts of it


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
    if isinstance(layer, GroupedCache):  # a kernel's heads have one k and window
      return False
    has_kernel = kind in ("full", "sliding_window") or (
      kind == "sparsek" and selects and inference.has_scorer_rows(config, params_of_layer)
    )
    return (
      has_kernel
      and "bias" not in params_of_layer["qkv"]
      and decode_attention.supports(_rows(layer).key, config.num_heads)
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
  """Computes one decoding step.

  Args:
    config, params: of the model.
    layers: of the cache.
    seen, token: [B] integers.
    active: [B] bool.
  Returns:
    Hidden states [B, E] before the last norm, and the next layers of the cache.
  """
  position = jnp.where(active, seen, 0)
  alive = active.astype(jnp.int32)
  x_BxE = inference.embed(config, params, token[:, None], position[:, None])[:, 0]
  blocks = KernelBlocks(config, params, layers, seen, position, alive)
  return blocks.run(x_BxE)


class KernelBlocks(Blocks[jax.Array, Mixed]):
  """The blocks for one token, computed by the decoding kernels.

  `project` makes only the products with the matrices of queries, keys and values and of the scorer;
  the attention kernel rotates queries and keys, and turns the scorer's product into a score.

  Args:
    config, params: as in `Blocks`.
    layers: of the cache.
    seen: [B] tokens before this one.
    position: [B], of the token.
    alive: [B] int32, 1 in active rows.
  """

  def __init__(
    self,
    config: TransformerConfig,
    params: InferenceParams,
    layers: tuple,
    seen: jax.Array,
    position: jax.Array,
    alive: jax.Array,
  ):
    super().__init__(config, params)
    scaling = config.rope_scaling
    assert not isinstance(scaling, str)  # parsed
    angle = rope_angles(position, rope_frequencies(config.rope_dim, config.rope_theta, scaling))
    self._cos, self._sin = jnp.cos(angle), jnp.sin(angle)
    self._layers, self._seen, self._alive = layers, seen, alive
    self._rows = _evict(self.kinds, list(map(_rows, layers)), seen, alive)
    self._counter = jnp.zeros(1, jnp.int32)  # of the fused kernels' grid barriers

  def project(self, i: int, x: jax.Array) -> jax.Array:
    """Returns the products of block i, [B, N] float32."""
    return inference.project_rows(self.config, self.layers[i], x)

  def attend(self, i: int, projected: jax.Array) -> tuple[Mixed, KeysAndValues | SelectionCache]:
    """Returns attention in block i."""
    is_sparsek = self.kinds[i] == "sparsek"
    mixed, rows = decode_attention.attend(
      projected,
      self._cos,
      self._sin,
      self._rows[i],
      _scorer(self.layers[i]["scorer"]) if is_sparsek else None,
      self._seen,
      self._alive,
      self.config.num_heads,
      self.kinds[i] == "sliding_window",
    )
    return mixed, _layer(self._layers[i], rows)

  def project_output(self, i: int, mixed: Mixed, x: jax.Array) -> jax.Array:
    """Returns x plus the output projection of attention in block i."""
    params = self.layers[i]["out"]
    if "bias" not in params and small_batch_matmul.supports(len(x), params["kernel"], x.dtype):
      return small_batch_matmul.product(mixed, params["kernel"], residual=x)
    whole = mixed.joined(x.dtype) if isinstance(mixed, Parts) else mixed
    return inference.dense(params, whole, x)

  def finish(self, i: int, x: jax.Array, mixed: Mixed) -> tuple[jax.Array, jax.Array | None]:
    """Computes the rest of block i, as `Blocks.finish`, in one kernel where one fits its sizes."""
    x = self.gather(i + 1, x)
    block, scale, following = self.layers[i], None, None
    if i + 1 < self.config.num_layers:
      after = self.layers[i + 1]
      scale = after["attention_norm"]["scale"]
      following = after["qkv"]["kernel"]
    if not isinstance(mixed, Parts) or not _is_fused(self.config, x, block, following):
      return super().finish(i, x, mixed)
    x, projected, self._counter = fused_decode_layer.fused_layer(
      mixed,
      x,
      block["out"]["kernel"],
      block["mlp_norm"]["scale"],
      block["up"]["kernel"],
      block["down"]["kernel"],
      scale,
      following,
      self._counter,
      self.config.norm_eps,
    )
    return x, projected


def _evict(
  kinds: tuple[str, ...], rows: list[decode_attention.Rows], seen: jax.Array, active: jax.Array
) -> list[decode_attention.Rows]:
  """Returns the rows of all layers, after sparsek layers have made room for the new token, except
  for those whose attention makes it.
  """
  selecting = [
    i
    for i, kind in enumerate(kinds)
    if kind == "sparsek" and not decode_attention.evicts(rows[i].key)
  ]
  if selecting:
    moved = decode_eviction.evict([rows[i] for i in selecting], seen, active)
    for i, new in zip(selecting, moved):
      rows[i] = new
  return rows


def _is_fused(
  config: TransformerConfig, x: jax.Array, block: dict[str, Any], following: jax.Array | None
) -> bool:
  """Returns whether one kernel can compute all between a block's attention and the next block's.

  Args:
    block: parameters of the block.
    following: the matrix of the next block's projection.
  """
  parts = [block[name] for name in ("out", "up", "down")]
  plain = (
    config.mlp == "swiglu"
    and not config.parallel_residual
    and not any("bias" in params for params in parts)
  )
  matrices = [*(params["kernel"] for params in parts), following]
  return plain and fused_decode_layer.supports(x, *(y for y in matrices if y is not None))


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
