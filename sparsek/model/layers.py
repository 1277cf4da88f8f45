"""The layers of the decoder: norms, rotary embedding, MLPs, and attention (SPARSEK, to a sliding
window, or full).
"""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sparsek.attention.api import resolve_window
from sparsek.attention.documents import document_bounds
from sparsek.attention.ranking_loss import ranking_loss
from sparsek.attention.scorer_loss import attention_mass_loss, sample_queries
from sparsek.config import TransformerConfig
from sparsek.kernels.rms_norm import branched_rms_norm, rms_norm
from sparsek.model.head_groups import (
  selecting_attention,
  take_heads,
  window_attention,
  window_implementation,
)
from sparsek.model.projections import project_together, projection
from sparsek.model.scorers import SCORER_FACTORIES, scoring_network
from sparsek.parallel import sequence_parallel
from sparsek.parallel.exchange import own_tokens
from sparsek.parallel.mesh import CONTEXT, axis_size
from sparsek.parallel.sharded_scores import token_positions


def residual_scale(config: TransformerConfig) -> float:
  """Returns the factor on kernels that write to the residual stream, so that its variance at the
  end does not grow with depth.
  """
  return (2 * config.num_layers) ** -0.5


class RMSNorm(nn.Module):
  """RMS norm: x / sqrt(mean(x^2) + epsilon) * scale over the last axis, computed in float32 and
  returned in the dtype of x.
  """

  epsilon: float = 1e-6

  def __call__(self, x: jax.Array) -> jax.Array:
    return rms_norm(x, self._scale(x), self.epsilon)

  def branch(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (x, norm of x), for x [B, N, E] that goes on beside it."""
    return branched_rms_norm(x, self._scale(x), self.epsilon)

  @nn.compact
  def _scale(self, x):
    return self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32)


class LayerNorm(nn.Module):
  """Layer norm: (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias over the last axis, computed
  in float32 and returned in the dtype of x.
  """

  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],), jnp.float32)
    y = x.astype(jnp.float32)
    y -= jnp.mean(y, axis=-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
    return (y * scale + bias).astype(x.dtype)

  def branch(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (x, norm of x), for x that goes on beside it."""
    return x, self(x)


def make_norm(config: TransformerConfig) -> nn.Module:
  """Makes the norm over the residual stream that `config` describes."""
  return {"rms_norm": RMSNorm, "layer_norm": LayerNorm}[config.norm](config.norm_eps)


def rope_frequencies(dim: int, theta: float, scaling: tuple | None = None) -> np.ndarray:
  """Returns the angles per position of the dim / 2 feature pairs, [dim / 2] float64.

  Without scaling they are f_d = theta^(-2d/dim), and with

    ("linear", s): f_d / s, which squeezes positions (Chen et al. 2023, arXiv 2306.15595);
    ("llama3", s, low, high, n): m f_d + (1 - m) f_d / s with m = clip((n f_d / 2 pi - low) /
      (high - low), 0, 1): pairs that turn at least `high` times in the n tokens of the original
      training stay, those that turn at most `low` times are squeezed (Llama 3.1, arXiv 2407.21783,
      and its released code).
  """
  half = dim // 2
  frequency = theta ** (-np.arange(half, dtype=np.float64) / half)
  if scaling is None:
    return frequency
  kind, factor, *bounds = scaling
  if kind == "linear":
    return frequency / factor
  low, high, original = bounds
  stay = np.clip((original * frequency / (2 * np.pi) - low) / (high - low), 0, 1)
  return stay * frequency + (1 - stay) * frequency / factor


def rope_angles(positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
  """Multiplies positions [...] by frequencies [F], modulo a turn: [..., F] float32 from -pi to pi,
  with an error below 6e-7 up to 2^31 positions.

  A float32 product would lose the digits that matter: at 2^20 it is off by up to 2^-4. Turns are
  counted in integers of 2^-32 instead, where whole turns overflow and nothing is lost; the part of
  the frequency below 2^-32 of a turn is added as a float.
  """
  turns = frequencies / (2 * np.pi) % 1 * 2.0**32
  whole = np.floor(turns)
  count = positions[..., None].astype(jnp.uint32) * whole.astype(np.uint32)
  count += (positions[..., None].astype(jnp.float32) * (turns - whole).astype(np.float32)).astype(
    jnp.uint32
  )
  return jax.lax.bitcast_convert_type(count, jnp.int32).astype(jnp.float32) * np.float32(
    2 * np.pi / 2.0**32
  )


def rotary_embedding(
  x_BxNxHxD: jax.Array,
  positions: jax.Array,
  theta: float,
  dim: int | None = None,
  scaling: tuple | None = None,
) -> jax.Array:
  """Rotates feature pairs (d, d + dim/2) by the angle position * f_d, computed in float32 (Su et
  al. 2021, RoFormer, arXiv 2104.09864).

  Args:
    x_BxNxHxD: queries or keys.
    positions: [B, N] or [N] integers, at least 0.
    theta, scaling: see `rope_frequencies`. Longer contexts need a larger theta.
    dim: even; the first `dim` features are rotated, the others stay (as in GPT-NeoX, arXiv
      2204.06745). D by default.
  """
  dim = x_BxNxHxD.shape[-1] if dim is None else dim
  # [..., N, 1, dim/2]
  angle = rope_angles(positions, rope_frequencies(dim, theta, scaling))[..., None, :]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = jnp.split(x_BxNxHxD[..., :dim].astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxNxHxD.dtype)
  return (
    rotated
    if dim == x_BxNxHxD.shape[-1]
    else jnp.concatenate([rotated, x_BxNxHxD[..., dim:]], axis=-1)
  )


class MLP(nn.Module):
  """Two-layer perceptron: down(silu(gate(x)) * up(x)) for mlp="swiglu", else down(gelu(up(x)));
  biases with `mlp_bias`.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(self, x_BxNxE: jax.Array) -> jax.Array:
    cfg = self.config
    dense = lambda features, name, scale=1.0: projection(
      cfg, features, cfg.mlp_bias, scale, name=name
    )
    if cfg.mlp == "swiglu":
      hidden_BxNxF = nn.silu(dense(cfg.mlp_dim, "gate")(x_BxNxE)) * dense(cfg.mlp_dim, "up")(
        x_BxNxE
      )
    else:
      hidden_BxNxF = nn.gelu(dense(cfg.mlp_dim, "up")(x_BxNxE), approximate=cfg.mlp == "gelu_tanh")
    return dense(cfg.embed_dim, "down", residual_scale(cfg))(hidden_BxNxF)


class Tokens(NamedTuple):
  """Tokens that attend to each other: whole rows, or inside `jax.shard_map` over `context` this
  shard's N tokens of each row.

  Attributes:
    x: [B, N, E] normalised hidden states.
    query: [B, N, H, D], rotated.
    key, value: [B, N, G, D]; keys are rotated.
    segment_ids: [B, n] of whole rows, or None.
    layer: index of the layer, the salt of fixed noise.
    row_index: [B] int32, each row's index in the batch of all devices; its noise derives from that.
    scorer_products: [B, N, C] float32, x times the scorer's input matrix, or None where they are
      not known.
    loss_queries: [B, C] int32, positions of the queries of the scorers' loss; None where the layer
      draws them itself.
    score_factor: see `sparsek.model.transformer.Transformer.hidden`.
  """

  x: jax.Array
  query: jax.Array
  key: jax.Array
  value: jax.Array
  segment_ids: jax.Array | None
  layer: jax.Array | int
  row_index: jax.Array
  scorer_products: jax.Array | None = None
  loss_queries: jax.Array | None = None
  score_factor: jax.Array | None = None


class Attention(nn.Module):
  """Projections, rotary embedding and grouped heads; the `mix` of a subclass lets every query
  attend to the keys of its kind.

  Parameters: query/kernel [E, H, D], key/kernel and value/kernel [E, G, D], out/kernel [H, D, E];
  biases [H, D] and [G, D] on the first three with `use_bias`, [E] on the last with `out_bias`;
  adapters beside all four with `lora_rank`; query_norm/scale and key_norm/scale [D] with `qk_norm`.
  Query head h reads KV head h // (H / G).

  Class attributes:
    shardable: True if `mix` can run inside `jax.shard_map` over `context`, on a part of each row.
  """

  config: TransformerConfig

  shardable: ClassVar[bool] = False

  def setup(self) -> None:
    cfg = self.config
    project = lambda heads: projection(cfg, (heads, cfg.head_dim), cfg.use_bias)
    self.query, self.key, self.value = (
      project(cfg.num_heads),
      project(cfg.num_kv_heads),
      project(cfg.num_kv_heads),
    )
    self.out = projection(cfg, cfg.embed_dim, cfg.out_bias, residual_scale(cfg), axis=(-2, -1))
    if cfg.qk_norm:
      self.query_norm, self.key_norm = RMSNorm(cfg.norm_eps), RMSNorm(cfg.norm_eps)

  def __call__(
    self,
    x_BxNxE: jax.Array,
    segment_ids: jax.Array | None = None,
    layer: jax.Array | int = 0,
    row_index: jax.Array | None = None,
    positions: jax.Array | None = None,
    loss_queries: jax.Array | None = None,
    score_factor: jax.Array | None = None,
  ) -> jax.Array:
    """Lets tokens attend to each other: normalised hidden states [B, N, E] to [B, N, E].

    Args:
      x_BxNxE, segment_ids, layer: see `Tokens`.
      row_index: see `Tokens`; 0 .. B - 1 by default.
      positions: [B, N] or [N] integers of the rotary embedding; by default the tokens' positions
        in their documents.
      loss_queries, score_factor: see `Tokens`.

    Raises:
      NotImplementedError: where rows are sharded and the kind is not shardable.
    """
    if axis_size(CONTEXT) > 1 and not self.shardable:
      raise NotImplementedError(f"{type(self).__name__} needs whole rows on one device")
    batch, length, _ = x_BxNxE.shape
    row_index = jnp.arange(batch) if row_index is None else row_index
    if positions is None:
      positions = token_positions(segment_ids, batch, length)
    products, scorer_products = self._products(x_BxNxE)
    query, key, value = self._normed_and_rotated(products, positions)
    rest = segment_ids, layer, row_index, scorer_products, loss_queries, score_factor
    return self.output(self.mix(Tokens(x_BxNxE, query, key, value, *rest)))

  def project(
    self, x_BxNxE: jax.Array, positions: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries [B, N, H, D], keys and values [B, N, G, D], rotated by their positions
    ([B, N] or [N]) with positions="rope".
    """
    products, _ = self._products(x_BxNxE)
    return self._normed_and_rotated(products, positions)

  def _normed_and_rotated(self, products, positions):
    query, key, value = products
    if self.config.qk_norm:
      query, key = self.query_norm(query), self.key_norm(key)
    cfg = self.config
    if cfg.positions == "learned":
      return query, key, value
    scaling = cfg.rope_scaling
    assert not isinstance(scaling, str)  # TransformerConfig has parsed it
    rotate = lambda x: rotary_embedding(x, positions, cfg.rope_theta, cfg.rope_dim, scaling)
    return rotate(query), rotate(key), value

  def _products(self, x_BxNxE):
    modules = (self.query, self.key, self.value)
    if self.is_initializing():
      return tuple(module(x_BxNxE) for module in modules), None
    return project_together(self.config, modules, x_BxNxE, self.scorer_matrix())

  def scorer_matrix(self) -> jax.Array | None:
    """Returns the matrix [E, C] by which the scorer multiplies x, None where it has none."""
    return None

  def mix(self, tokens: Tokens) -> jax.Array:
    """Returns the values that each query attends to, averaged: [B, N, H, D]."""
    raise NotImplementedError

  def output(self, mixed_BxNxHxD: jax.Array) -> jax.Array:
    """Projects [B, N, H, D] to [B, N, E]."""
    return self.out(mixed_BxNxHxD)


def row_keys(key: jax.Array, row_index: jax.Array) -> jax.Array:
  """Returns a random key for each row [B], which depends on neither its device nor its batch."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, row_index)


def sample_loss_queries(config: TransformerConfig, keys: jax.Array, length: int) -> jax.Array:
  """Draws the queries of the scorers' loss, [B, C], in rows of which `length` tokens are here."""
  return sample_queries(keys, config.scorer_loss_queries, axis_size(CONTEXT) * length)


class SparseKAttention(Attention):
  """Attention to the window and to the k best-scored tokens before it; its scoring network reads
  the same input as the projections.

  Applied with mutable=["diagnostics"] it leaves its float32 scores [B, N, G] in that collection as
  `scores`, only those of this shard where rows are sharded. Given rngs={"scorer_noise": key}, it
  adds normal noise of standard deviation `config.scorer_noise` to the scores, so that tokens which
  would be dropped are tried too.

  Applied with mutable=["scorer_loss"] and rngs={"scorer_loss": key}, which draws
  `config.scorer_loss_queries` queries a row, it leaves there, as `attention_mass`, the loss of
  `config.scorer_loss_kind`, from which only the scorer's parameters learn.
  With mutable=["scorer_warmup"] it leaves the same there and attends to the whole document,
  as the dense model does whose scorers are being trained.

  Where KV heads have a k and a window of their own, the loss is the mean over the heads that
  select. Heads with k=0 have scores too, which nothing reads and nothing teaches: so any k can
  follow.

  Example:
    config = sparsek.TransformerConfig(embed_dim=512, num_heads=8, num_kv_heads=8, head_dim=64)
    layer = sparsek.SparseKAttention(dataclasses.replace(config, k=256, window=256))
    y = layer.apply(layer.init(key, x), x)  # x [batch, n, 512]

  `sparsek.linen.SparseKAttention` is this layer without the configuration of a language model.

  Class attributes:
    frozen: True if the scorer learns only by its loss in the warm-up.
  """

  shardable = True
  frozen: ClassVar[bool] = False

  def setup(self) -> None:
    super().setup()
    self.scorer = scoring_network(self.config)

  def scorer_matrix(self) -> jax.Array | None:
    return None if self.config.scorer in SCORER_FACTORIES else self.scorer.input_matrix()

  def mix(self, tokens: Tokens) -> jax.Array:
    x_BxNxE, query, key, value, segment_ids, layer, row_index, scorer_products, *_ = tokens
    cfg = self.config
    products = () if scorer_products is None else (scorer_products,)
    scores_BxNxG = self.scorer(x_BxNxE, segment_ids, layer, *products)
    scores_BxNxG = jax.lax.stop_gradient(scores_BxNxG) if self.frozen else scores_BxNxG
    if not self.is_initializing():  # else they would stay among the variables
      self.sow("diagnostics", "scores", scores_BxNxG)
    if cfg.scorer_noise and self.has_rng("scorer_noise"):
      keys = row_keys(self.make_rng("scorer_noise"), row_index)
      scores_BxNxG += cfg.scorer_noise * self._noise(keys, x_BxNxE.shape[1])
    warmup = self.is_mutable_collection("scorer_warmup") and not self.is_initializing()
    joint = self.is_mutable_collection("scorer_loss") and not self.is_initializing()
    if warmup or (joint and not self.frozen):
      loss = self._scorer_loss(tokens)
      self.sow("scorer_warmup" if warmup else "scorer_loss", "attention_mass", loss)
    if tokens.score_factor is not None:
      scores_BxNxG *= tokens.score_factor
    if warmup:
      return full_attention(cfg, query, key, value, segment_ids)
    return selecting_attention(cfg, query, key, value, scores_BxNxG, segment_ids, cfg.gate)

  def _noise(self, keys, length):
    """Draws the noise of whole rows, [B, n, S], and cuts out this shard's tokens."""
    scores = getattr(self.scorer, "num_scores", self.config.num_kv_heads)
    shape = axis_size(CONTEXT) * length, scores
    return own_tokens(jax.vmap(lambda key: jax.random.normal(key, shape))(keys))

  def _scorer_loss(self, tokens):
    """Returns this shard's part of the scorers' loss, from which only the scorer learns."""
    cfg = self.config
    x_BxNxE, query, key = map(jax.lax.stop_gradient, tokens[:3])
    queries = tokens.loss_queries
    if queries is None:
      keys = row_keys(self.make_rng("scorer_loss"), tokens.row_index)
      queries = sample_loss_queries(cfg, keys, x_BxNxE.shape[1])
    arrays = self.scorer(x_BxNxE, tokens.segment_ids, tokens.layer), query, key
    groups = cfg.selecting_groups
    heads = sum(len(group.heads) for group in groups)
    loss = jnp.zeros(())
    for group in groups:
      of_group = (take_heads(x, group.heads, cfg.num_kv_heads) for x in arrays)
      loss += (len(group.heads) / heads) * self.loss(
        group.config,
        (*of_group, queries),
        window=group.config.window,
        segment_ids=tokens.segment_ids,
        axis=CONTEXT if axis_size(CONTEXT) > 1 else None,
        implementation=cfg.implementation,
      )
    return loss

  def loss(
    self, config: TransformerConfig, arrays: tuple[jax.Array, ...], **attention: Any
  ) -> jax.Array:
    """Computes the loss of the scorer from scores, query, key and positions of queries.

    Args:
      config: of the heads that the arrays are of.
      arrays: see above.
      attention: options of `sparsek.attention.scorer_loss.attention_mass_loss`.
    """
    if config.scorer_loss_kind == "divergence":
      return attention_mass_loss(*arrays, **attention)
    return ranking_loss(*arrays, k=config.k, **attention)


class SlidingWindowAttention(Attention):
  """Attention to the last `window` tokens."""

  shardable = True

  def mix(self, tokens: Tokens) -> jax.Array:
    return window_attention(self.config, *tokens[1:5])


def full_attention(
  config: TransformerConfig,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
) -> jax.Array:
  """Attends, causally, to the whole document."""
  if axis_size(CONTEXT) > 1:
    return sequence_parallel.full_attention(
      query, key, value, segment_ids=segment_ids, implementation=window_implementation(config)
    )
  implementation = resolve_window(window_implementation(config), query, segment_ids)
  if implementation != "xla":  # a window as long as the row, without O(n^2) memory
    return sequence_parallel.sliding_window_attention(
      query,
      key,
      value,
      window=query.shape[1],
      segment_ids=segment_ids,
      implementation=implementation,
    )
  if segment_ids is None:
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)
  # Comparing starts, not ids, keeps two documents of the same id apart.
  start, _ = document_bounds(segment_ids, *segment_ids.shape)
  return jax.nn.dot_product_attention(
    query, key, value, mask=(start[:, :, None] == start[:, None, :])[:, None], is_causal=True
  )


class FullAttention(Attention):
  """Causal attention to the whole document."""

  shardable = True

  def mix(self, tokens: Tokens) -> jax.Array:
    return full_attention(self.config, *tokens[1:5])


ATTENTION_MODULES = {
  "sparsek": SparseKAttention,
  "sliding_window": SlidingWindowAttention,
  "full": FullAttention,
}
