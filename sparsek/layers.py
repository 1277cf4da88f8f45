"""The layers of the decoder: RMSNorm, rotary embedding, SwiGLU and the three attention modules."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from sparsek.attention import resolve_window, sliding_window_attention, sparsek_attention
from sparsek.config import TransformerConfig
from sparsek.operator import document_bounds
from sparsek.scoring import ScoringNetwork, position_in_document


def fan_in_init(scale: float = 1.0):
  """Normal with standard deviation scale / sqrt(fan-in)."""
  return nn.initializers.variance_scaling(scale**2, "fan_in", "normal")


def residual_scale(config: TransformerConfig) -> float:
  """Factor on kernels that write to the residual stream, so that its variance at the end does not grow with depth."""
  return (2 * config.num_layers) ** -0.5


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, computed in float32 and returned in the dtype of x."""
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32)
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
    return (y * scale).astype(x.dtype)


def rotary_embedding(x_BxNxHxD: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
  """Rotates feature pairs (d, d + D/2) by the angle position * theta^(-2d/D), computed in float32.

  Args:
    x_BxNxHxD: queries or keys; D even.
    positions: [B, N] or [N] integers.
    theta: base; longer contexts want a larger one.
  """
  half = x_BxNxHxD.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions[..., None, None].astype(jnp.float32) * frequency           # [..., N, 1, D/2]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = jnp.split(x_BxNxHxD.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxNxHxD.dtype)


class SwiGLU(nn.Module):
  """down(silu(gate(x)) * up(x)), without biases."""
  config: TransformerConfig

  @nn.compact
  def __call__(self, x_BxNxE: jax.Array) -> jax.Array:
    cfg = self.config
    dense = lambda features, name, scale=1.0: nn.Dense(
        features, use_bias=False, dtype=cfg.activation_dtype, kernel_init=fan_in_init(scale), name=name)
    hidden_BxNxF = nn.silu(dense(cfg.mlp_dim, "gate")(x_BxNxE)) * dense(cfg.mlp_dim, "up")(x_BxNxE)
    return dense(cfg.embed_dim, "down", residual_scale(cfg))(hidden_BxNxF)


class Attention(nn.Module):
  """Projections, rotary embedding and grouped heads; subclasses say which keys a query attends to.

  Parameters: query/kernel [E, H, D], key/kernel and value/kernel [E, G, D], out/kernel [H, D, E]; biases [H, D] and [G, D] on the
  first three with `use_bias`; query_norm/scale and key_norm/scale [D] with `qk_norm`. Query head h reads KV head h // (H / G).
  """
  config: TransformerConfig

  def setup(self):
    cfg = self.config
    project = lambda heads: nn.DenseGeneral(
        (heads, cfg.head_dim), use_bias=cfg.use_bias, dtype=cfg.activation_dtype, kernel_init=fan_in_init())
    self.query, self.key, self.value = project(cfg.num_heads), project(cfg.num_kv_heads), project(cfg.num_kv_heads)
    self.out = nn.DenseGeneral(cfg.embed_dim, axis=(-2, -1), use_bias=False, dtype=cfg.activation_dtype,
                               kernel_init=fan_in_init(residual_scale(cfg)))
    if cfg.qk_norm:
      self.query_norm, self.key_norm = RMSNorm(cfg.norm_eps), RMSNorm(cfg.norm_eps)

  def __call__(self, x_BxNxE: jax.Array, segment_ids: jax.Array | None = None, layer: jax.Array | int = 0) -> jax.Array:
    """[B, N, E] normalised hidden states -> [B, N, E]; segment_ids [B, N] or None; `layer`, its index, salts the random scorer."""
    positions = position_in_document(segment_ids, *x_BxNxE.shape[:2])
    return self.output(self.mix(x_BxNxE, *self.project(x_BxNxE, positions), segment_ids, layer))

  def project(self, x_BxNxE: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, N, H, D], keys and values [B, N, G, D], rotated by their positions ([B, N] or [N])."""
    query, key, value = self.query(x_BxNxE), self.key(x_BxNxE), self.value(x_BxNxE)
    if self.config.qk_norm:
      query, key = self.query_norm(query), self.key_norm(key)
    theta = self.config.rope_theta
    return rotary_embedding(query, positions, theta), rotary_embedding(key, positions, theta), value

  def output(self, mixed_BxNxHxD: jax.Array) -> jax.Array:
    """[B, N, H, D] -> [B, N, E]."""
    return self.out(mixed_BxNxHxD)


def scoring_network(config: TransformerConfig) -> ScoringNetwork:
  """The scoring network that `config` describes."""
  return ScoringNetwork(config.num_kv_heads, config.scorer, config.scorer_lookback, config.scorer_lookahead, config.scorer_normalize,
                        config.scorer_init_scale, config.scorer_init_slope, config.scorer_shared, config.scorer_init_noise)


class SparseKAttention(Attention):
  """Attention to the window and to the k best-scored tokens before it; its scoring network reads the same input as the projections.

  Applied with mutable=["diagnostics"] it leaves its float32 scores [B, N, G] in that collection as `scores`. Given random numbers, rngs={"scorer_noise": key},
  it adds normal noise of standard deviation `config.scorer_noise` to them, so that tokens are tried which would be dropped.

  Applied with mutable=["scorer_loss"] it leaves there, as `unread`, the sum over tokens of what a scorer should make small: the attention that falls on keys
  in so far as they are not kept, sum_j softmax_j(q_i . k_j) (1 - p_ij) over the visible keys, averaged over heads. Only the scorer's parameters learn from it:
  the gradient of gate p_ij is minus the attention that key j receives from query i, which is also that of KL(sparse attention || full attention) = constant -
  log sum_j p_ij exp(q_i . k_j) at gates of 1, and the threshold takes from all keys of the support what it gives to some. It costs a second pass of attention.

  Example:
    layer = sparsek.SparseKAttention(sparsek.TransformerConfig(embed_dim=512, num_heads=8, num_kv_heads=8, head_dim=64, k=256, window=256))
    y = layer.apply(layer.init(key, x), x)                  # x [batch, n, 512]
  """

  def setup(self):
    super().setup()
    self.scorer = scoring_network(self.config)

  def mix(self, x_BxNxE, query, key, value, segment_ids, layer):
    cfg = self.config
    scores_BxNxG = self.scorer(x_BxNxE, segment_ids, layer)
    self.sow("diagnostics", "scores", scores_BxNxG)
    if cfg.scorer_noise and self.has_rng("scorer_noise"):
      noise_BxNxS = jax.random.normal(self.make_rng("scorer_noise"), (*scores_BxNxG.shape[:2], self.scorer.num_scores))
      scores_BxNxG += cfg.scorer_noise * noise_BxNxS
    attend = functools.partial(sparsek_attention, k=cfg.k, window=cfg.window, segment_ids=segment_ids, implementation=cfg.implementation)
    if self.is_mutable_collection("scorer_loss") and not self.is_initializing():
      fixed_x, fixed_query, fixed_key = map(jax.lax.stop_gradient, (x_BxNxE, query, key))
      kept_BxNxH = attend(fixed_query, fixed_key, jnp.ones_like(value), self.scorer(fixed_x, segment_ids, layer), gate="value")[..., 0].astype(jnp.float32)
      counted_BxN = jnp.ones(x_BxNxE.shape[:2]) if segment_ids is None else segment_ids != 0
      self.sow("scorer_loss", "unread", jnp.sum((1 - jnp.mean(kept_BxNxH, axis=-1)) * counted_BxN))
    return attend(query, key, value, scores_BxNxG, gate=cfg.gate)


def window_implementation(config: TransformerConfig) -> str | None:
  """What `config.implementation` means for a sliding window, which has no reference and no TPU kernels of its own."""
  return "xla" if config.implementation in ("reference", "mosaic_tpu") else config.implementation


class SlidingWindowAttention(Attention):
  """Attention to the last `window` tokens."""

  def mix(self, x_BxNxE, query, key, value, segment_ids, layer):
    return sliding_window_attention(query, key, value, window=self.config.window, segment_ids=segment_ids, implementation=window_implementation(self.config))


class FullAttention(Attention):
  """Causal attention to the whole document."""

  def mix(self, x_BxNxE, query, key, value, segment_ids, layer):
    implementation = resolve_window(window_implementation(self.config), query, segment_ids)
    if implementation != "xla":                                # a window that is never full, and no O(n^2) memory
      return sliding_window_attention(query, key, value, window=query.shape[1], segment_ids=segment_ids, implementation=implementation)
    if segment_ids is None:
      return jax.nn.dot_product_attention(query, key, value, is_causal=True)
    # A document starts at a place of its own; comparing starts (not ids) keeps runs of the same id apart.
    start, _ = document_bounds(segment_ids, *segment_ids.shape)
    return jax.nn.dot_product_attention(query, key, value, mask=(start[:, :, None] == start[:, None, :])[:, None], is_causal=True)


ATTENTION_MODULES = {"sparsek": SparseKAttention, "sliding_window": SlidingWindowAttention, "full": FullAttention}
