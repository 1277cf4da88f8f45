"""Earlier kinds of sparse and linear attention with the signature of SPARSEK's: the baselines that
it has to beat at the same budget of k + window keys per query.

Only two kinds add parameters: "linear" those of its decay, as many as a linear scorer has, and
"kvzap" a scorer's.
"""

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from sparsek.attention.api import sliding_window_attention
from sparsek.attention.documents import document_bounds
from sparsek.attention.eviction import evicting_attention
from sparsek.attention.scorer_loss import max_attention_loss
from sparsek.config import TransformerConfig
from sparsek.kernels.sentinels import LOWEST
from sparsek.model import layers
from sparsek.model.head_groups import selecting_attention, window_attention, window_implementation
from sparsek.model.layers import Attention, SparseKAttention, Tokens
from sparsek.model.scorers import SCORER_FACTORIES, scoring_network
from sparsek.parallel.exchange import first_token, own_tokens
from sparsek.parallel.mesh import CONTEXT, axis_size
from sparsek.parallel.sharded_scores import token_positions

CHUNK = 128  # queries at a time
BLOCK = 64  # keys of a block of block_topk
SLOWEST = 16.0  # the linear kind's decay per token is sigmoid(.) ** (1 / SLOWEST)


def context_refusal(config: TransformerConfig) -> str:
  """Returns why rows of a model cannot be sharded over `context`, "" where they can."""
  kinds = [k for k in dict.fromkeys(config.layer_kinds) if not ATTENTION_MODULES[k].shardable]
  if kinds:
    names = " and ".join(map(repr, kinds))
    return f"attention {names} needs whole rows on one device; use --context=1 or other kinds"
  if config.has_scorers and config.scorer in SCORER_FACTORIES:
    return (
      f"scorer {config.scorer!r} needs whole rows on one device; use --context=1 or a scorer of "
      "the library"
    )
  return "--implementation=reference takes whole rows" * (config.implementation == "reference")


class FixedSelection(Attention):
  """The window and k earlier tokens whose choice is not learned: SPARSEK attention with fixed
  scores, by the same kernels.

  `sparsek.config.layer_patterns.SETTINGS` sets the scorer of most kinds.
  """

  shardable = True

  def mix(self, tokens: Tokens) -> jax.Array:
    x_BxNxE, query, key, value, segment_ids, layer, *_ = tokens
    cfg, (batch, length) = self.config, x_BxNxE.shape[:2]
    scores = jnp.broadcast_to(self.scores(tokens), (batch, length, cfg.num_kv_heads))
    return selecting_attention(cfg, query, key, value, scores, segment_ids)

  def scores(self, tokens: Tokens) -> jax.Array:
    """Returns the scores of tokens: [B, N, G], or [B, N, 1] for all heads."""
    scores = scoring_network(self.config).apply({}, tokens.x, tokens.segment_ids, tokens.layer)
    assert isinstance(scores, jax.Array)
    return scores


class RandomAttention(FixedSelection):
  """The window and k tokens before it, drawn uniformly at random for each head."""


class RandomSinkAttention(FixedSelection):
  """The window, the first token of the document, and k - 1 random ones before the window."""


class AttentionSinks(FixedSelection):
  """The window and the first k tokens of the document (Xiao et al. 2023, arXiv 2309.17453, with k
  sinks).
  """


class StridedAttention(FixedSelection):
  """The window and the last of every `stride` tokens (Child et al. 2019, arXiv 1904.10509, the
  fixed pattern); the stride leaves at most k of a row's tokens.
  """

  def scores(self, tokens: Tokens) -> jax.Array:
    batch, length, _ = tokens.x.shape
    position = token_positions(tokens.segment_ids, batch, length)[..., None]
    stride = -(-axis_size(CONTEXT) * length // self.config.k)
    return jnp.where(position % stride == stride - 1, 0.0, -jnp.inf)


class LSHAttention(Attention):
  """The k + window latest tokens whose keys have the same hash as the key of the query's token
  (Kitaev et al. 2020, Reformer, arXiv 2001.04451).

  A hash is two numbers: the indices of the random directions nearest to the key before its
  rotation, in two sets of directions. The sets are so large that a query reaches a whole bucket of
  average size. Unlike in Reformer, queries have a projection of their own, and a query's reach does
  not depend on later tokens.
  """

  def mix(self, tokens: Tokens) -> jax.Array:
    x_BxNxE, query, key, value, segment_ids, layer, *_ = tokens
    cfg, (batch, length) = self.config, x_BxNxE.shape[:2]
    reach, groups = cfg.k + cfg.window, cfg.num_kv_heads
    content_BxNxGxD = self.key_norm(self.key(x_BxNxE)) if cfg.qk_norm else self.key(x_BxNxE)
    size = self.directions(length)
    directions = jax.random.normal(
      jax.random.fold_in(jax.random.key(0), layer), (2, groups, cfg.head_dim, size // 2)
    )
    nearness = jnp.einsum("bngd,sgdr->sbngr", content_BxNxGxD.astype(jnp.float32), directions)
    major, minor = jnp.argmax(jnp.concatenate([nearness, -nearness], axis=-1), axis=-1)
    bucket_BxNxG = major * size + minor
    start_BxN, _ = document_bounds(segment_ids, batch, length)
    by_head = lambda x: jnp.swapaxes(x, 1, 2)
    # [B, G, N]: tokens by document, then by bucket; the sort is stable
    order = jax.vmap(jax.vmap(lambda bucket, start: jnp.lexsort((bucket, start)), (0, None)))(
      by_head(bucket_BxNxG), start_BxN
    )

    def arranged(x_BxNxHxD):
      """Sorts the rows of [B, N, H, D] by `order`: [B * G, N, heads of a group, D]."""
      heads = x_BxNxHxD.shape[2] // groups
      x = x_BxNxHxD.reshape(batch, length, groups, heads, cfg.head_dim).transpose(0, 2, 1, 3, 4)
      x = jnp.take_along_axis(x, order[..., None, None], axis=2)
      return x.reshape(batch * groups, length, heads, cfg.head_dim)

    names = start_BxN[:, None] * size**2 + by_head(bucket_BxNxG)
    names = jnp.take_along_axis(names, order, axis=2).reshape(batch * groups, length)
    implementation = window_implementation(cfg)
    out = sliding_window_attention(
      arranged(query),
      arranged(key),
      arranged(value),
      window=reach,
      segment_ids=names,
      implementation=implementation,
    )
    back = jnp.argsort(order, axis=-1)
    out = out.reshape(batch, groups, length, cfg.num_heads // groups, cfg.head_dim)
    out = jnp.take_along_axis(out, back[..., None, None], axis=2)
    return out.transpose(0, 2, 1, 3, 4).reshape(query.shape)

  def directions(self, length: int) -> int:
    """Returns the number of directions of a set, which holds the opposite of each."""
    return 2 * max(1, math.ceil(math.sqrt(length / (self.config.k + self.config.window)) / 2))


class BlockTopKAttention(Attention):
  """The window and those k / 64 blocks of 64 tokens whose mean key has the largest product with the
  query (MoBA, arXiv 2502.13189; NSA, arXiv 2502.11089).

  The heads of a group choose together. Blocks begin at multiples of 64 (of k, if k is smaller) of
  the row, and those that begin before the query's document are left out. Memory is O(n); choosing
  takes O(n^2 / 64) operations.
  """

  def mix(self, tokens: Tokens) -> jax.Array:
    x_BxNxE, query, key, value, segment_ids, *_ = tokens
    cfg, (batch, length) = self.config, x_BxNxE.shape[:2]
    groups, dim, window = cfg.num_kv_heads, cfg.head_dim, min(cfg.window, length)
    size = min(BLOCK, cfg.k)
    chunks, blocks = -(-length // CHUNK), -(-length // size)
    start_BxN, _ = document_bounds(segment_ids, batch, length)
    pad = lambda x, to, **kwargs: jnp.pad(
      x, ((0, 0), (0, to - length), *[(0, 0)] * (x.ndim - 2)), **kwargs
    )
    # [B, G, blocks, size, D]
    cut = lambda x: jnp.moveaxis(
      pad(x, blocks * size).reshape(batch, blocks, size, groups, dim), 3, 1
    )
    key_blocks, value_blocks = cut(key), cut(value)
    mean_BxGxKxD = jnp.mean(key_blocks.astype(jnp.float32), axis=3)
    first = jnp.arange(blocks) * size
    chosen = min(cfg.k // size, blocks)
    near = lambda x: jnp.pad(pad(x, chunks * CHUNK), ((0, 0), (window, 0), (0, 0), (0, 0)))
    near_key, near_value = near(key), near(value)

    @jax.checkpoint
    def chunk(c, query_BxCxGxRxD, start_BxC):
      i = c * CHUNK + jnp.arange(CHUNK)
      score = jnp.einsum("bcgrd,bgkd->bgck", query_BxCxGxRxD.astype(jnp.float32), mean_BxGxKxD)
      last_far = i[:, None] - window  # the last token before the window
      may = (
        (first <= last_far)
        & (first + size - 1 <= i[:, None])
        & (first >= start_BxC[:, None, :, None])
      )
      # [B, G, C, chosen]
      best, block = jax.lax.top_k(jnp.where(may, jax.lax.stop_gradient(score), -jnp.inf), chosen)
      pick = lambda x: _blocks_of(x, block).reshape(batch, groups, CHUNK, chosen * size, dim)
      far = block[..., None] * size + jnp.arange(size)
      far_seen = ((best > -jnp.inf)[..., None] & (far <= last_far[..., None])).reshape(
        batch, groups, CHUNK, chosen * size
      )
      band = lambda x: jax.lax.dynamic_slice_in_dim(x, c * CHUNK, CHUNK + window, axis=1)
      j = c * CHUNK - window + jnp.arange(CHUNK + window)
      band_seen = (
        (j <= i[:, None]) & (j > last_far) & (j >= start_BxC[..., None])
      )  # [B, C, window + C]
      logits = lambda keys, what: (
        jnp.einsum(what, query_BxCxGxRxD, keys, preferred_element_type=jnp.float32) * dim**-0.5
      )
      far_logits = jnp.where(
        far_seen[:, :, None], logits(pick(key_blocks), "bcgrd,bgcjd->bgrcj"), LOWEST
      )
      band_logits = jnp.where(
        band_seen[:, None, None], logits(band(near_key), "bcgrd,bjgd->bgrcj"), LOWEST
      )
      weight = jax.nn.softmax(jnp.concatenate([far_logits, band_logits], axis=-1), axis=-1).astype(
        value.dtype
      )
      out = jnp.einsum("bgrcj,bgcjd->bcgrd", weight[..., : chosen * size], pick(value_blocks))
      return out + jnp.einsum("bgrcj,bjgd->bcgrd", weight[..., chosen * size :], band(near_value))

    in_chunks = lambda x: jnp.moveaxis(x.reshape(batch, chunks, CHUNK, *x.shape[2:]), 1, 0)
    queries = pad(query, chunks * CHUNK)
    queries = queries.reshape(batch, chunks * CHUNK, groups, cfg.num_heads // groups, dim)
    starts = pad(start_BxN, chunks * CHUNK, mode="edge")
    out = jax.lax.map(
      lambda args: chunk(*args), (jnp.arange(chunks), in_chunks(queries), in_chunks(starts))
    )
    out = jnp.moveaxis(out, 0, 1).reshape(batch, chunks * CHUNK, cfg.num_heads, dim)
    return out[:, :length].astype(query.dtype)


@jax.custom_vjp
def _blocks_of(x: jax.Array, block: jax.Array) -> jax.Array:
  """Gathers blocks of x [B, G, blocks, size, D] by block [B, G, C, chosen].

  Returns:
    [B, G, C, chosen, size, D].
  """
  return jax.vmap(jax.vmap(lambda x, block: x[block]))(x, block)


def _blocks_of_backward(residuals, d_picked):
  """Sums the gradients of each block by a product with zeros and ones.

  A scatter-add of 16-bit rows takes a GPU several times as long, and rounds after each addition.
  """
  x, block = residuals
  batch, groups, blocks, size, dim = x.shape
  picks = math.prod(block.shape[2:])
  taken = jax.nn.one_hot(block.reshape(batch, groups, picks), blocks, dtype=d_picked.dtype)
  d_picked = d_picked.reshape(batch, groups, picks, size * dim)
  sums = jnp.einsum(
    "bgmk,bgmx->bgkx",
    taken,
    d_picked,
    preferred_element_type=jnp.float32,
    precision=jax.lax.Precision.HIGHEST,
  )
  return sums.astype(x.dtype).reshape(batch, groups, blocks, size, dim), None


_blocks_of.defvjp(lambda x, block: (_blocks_of(x, block), (x, block)), _blocks_of_backward)


def _state_before(key_BxNxGxD, value_BxNxGxD, log_decay_BxNxG, start_BxN):
  """Returns the state [B, G, D, D] of the linear kind before this shard's first token.

  Each shard sends what its own tokens leave of the document at its end, and the decay of what
  comes from before it, which is 0 where that document begins inside it.
  """
  length, last_Bx1 = start_BxN.shape[1], start_BxN[:, -1:]
  in_document_BxNx1 = (first_token(length) + jnp.arange(length) >= last_Bx1)[..., None]
  # summed from the end, where the terms that matter are small
  until_end_BxNxG = lax.cumsum(log_decay_BxNxG, axis=1, reverse=True)
  later_BxNxG = jnp.pad(until_end_BxNxG[:, 1:], ((0, 0), (0, 1), (0, 0)))
  fade = jnp.where(in_document_BxNx1, jnp.exp(later_BxNxG), 0)
  left = jnp.einsum("bjg,bjgd,bjge->bgde", fade, key_BxNxGxD, value_BxNxGxD, optimize="optimal")
  crosses = last_Bx1 < first_token(length)
  decay = jnp.where(crosses, jnp.exp(until_end_BxNxG[:, 0]), 0)[..., None, None]
  after = lambda state, shard: (shard[0] + shard[1] * state, state)
  _, before = lax.scan(after, jnp.zeros_like(left), lax.all_gather((left, decay), CONTEXT))
  return lax.dynamic_index_in_dim(before, lax.axis_index(CONTEXT), keepdims=False)


class LinearAttention(Attention):
  """Gated linear attention over the whole past (Yang et al. 2023, arXiv 2312.06635, one decay per
  head), normalised, plus attention to the window.

  Within a document

    S_i = a_i S_(i-1) + k_i v_i^T,  a_i = sigmoid(w x_i + 4)^(1/16)
    out_i = rms_norm(S_i^T q_i) + window_i

  A state takes the memory of head_dim keys. Where rows are sharded, each shard gathers what all
  shards leave of a state at their ends, and computes its first state from that.
  """

  shardable = True

  def setup(self) -> None:
    super().setup()
    self.decay = nn.Dense(
      self.config.num_kv_heads, dtype=jnp.float32, bias_init=nn.initializers.constant(4.0)
    )

  def mix(self, tokens: Tokens) -> jax.Array:
    x_BxNxE, query, key, value, segment_ids, *_ = tokens
    cfg, (batch, length) = self.config, x_BxNxE.shape[:2]
    near = window_attention(cfg, query, key, value, segment_ids)
    groups, dim, chunks = cfg.num_kv_heads, cfg.head_dim, -(-length // CHUNK)
    log_decay_BxNxG = jax.nn.log_sigmoid(self.decay(x_BxNxE.astype(jnp.float32))) / SLOWEST
    first = first_token(length)
    start_BxN = own_tokens(document_bounds(segment_ids, batch, axis_size(CONTEXT) * length)[0])
    in_chunks = lambda x, **kwargs: jnp.moveaxis(
      jnp.pad(
        x, ((0, 0), (0, chunks * CHUNK - length), *[(0, 0)] * (x.ndim - 2)), **kwargs
      ).reshape(batch, chunks, CHUNK, *x.shape[2:]),
      1,
      0,
    )

    @jax.checkpoint
    def chunk(state_BxGxDxD, args):
      c, query_BxCxGxRxD, key_BxCxGxD, value_BxCxGxD, log_decay_BxCxG, start_BxC = args
      i = c + jnp.arange(CHUNK)
      total_BxCxG = jnp.cumsum(log_decay_BxCxG, axis=1)
      old_BxCx1 = (start_BxC < c)[..., None]  # the state is of the query's document
      since = jnp.where(old_BxCx1, jnp.exp(total_BxCxG), 0)
      out = jnp.einsum("bcgrd,bgde,bcg->bcgre", query_BxCxGxRxD, state_BxGxDxD, since)
      seen = (i <= i[:, None]) & (i >= start_BxC[..., None])  # [B, C, C]
      fade = jnp.exp(
        jnp.where(seen[..., None], total_BxCxG[:, :, None] - total_BxCxG[:, None], -jnp.inf)
      )
      out += jnp.einsum(
        "bcgrd,bjgd,bcjg,bjge->bcgre",
        query_BxCxGxRxD,
        key_BxCxGxD,
        fade,
        value_BxCxGxD,
        optimize="optimal",
      )
      state_BxGxDxD = jnp.einsum("bg,bgde->bgde", since[:, -1], state_BxGxDxD) + jnp.einsum(
        "bjg,bjgd,bjge->bgde", fade[:, -1], key_BxCxGxD, value_BxCxGxD
      )
      return state_BxGxDxD, out

    wide = lambda x: x.astype(jnp.float32)
    queries = wide(query).reshape(batch, length, groups, cfg.num_heads // groups, dim)
    args = (
      first + CHUNK * jnp.arange(chunks),
      in_chunks(queries),
      in_chunks(wide(key)),
      in_chunks(wide(value)),
      in_chunks(log_decay_BxNxG),
      in_chunks(start_BxN, mode="edge"),
    )
    state = jnp.zeros((batch, groups, dim, dim))
    if axis_size(CONTEXT) > 1:
      state = _state_before(wide(key), wide(value), log_decay_BxNxG, start_BxN)
    _, out = lax.scan(chunk, state, args)
    far = jnp.moveaxis(out, 0, 1).reshape(batch, chunks * CHUNK, cfg.num_heads, dim)[:, :length]
    far *= jax.lax.rsqrt(jnp.mean(far**2, axis=-1, keepdims=True) + cfg.norm_eps)
    return near + far.astype(near.dtype)


class EvictingAttention(Attention):
  """The window and k slots, from which the keys with the least attention are evicted; see
  `sparsek.attention.eviction`.
  """

  rule: ClassVar[str]

  def mix(self, tokens: Tokens) -> jax.Array:
    cfg = self.config
    return evicting_attention(
      tokens.query,
      tokens.key,
      tokens.value,
      rule=self.rule,
      k=cfg.k,
      window=cfg.window,
      segment_ids=tokens.segment_ids,
      implementation=window_implementation(cfg),
    )


class TOVAAttention(EvictingAttention):
  """Eviction by the attention of the latest query (Oren et al. 2024, arXiv 2401.06104)."""

  rule = "tova"


class H2OAttention(EvictingAttention):
  """Eviction by the sum of all attention so far (Zhang et al. 2023, arXiv 2306.14048)."""

  rule = "h2o"


class SnapKVAttention(EvictingAttention):
  """Eviction by the pooled attention of the latest queries (Li et al. 2024, arXiv 2404.14469)."""

  rule = "snapkv"


class KVzapAttention(SparseKAttention):
  """The window and the k earlier tokens of which a frozen scorer expects the most attention (KVzap,
  arXiv 2601.07891).

  The warm-up of scorers teaches it the logarithm of the largest attention that a later query pays a
  token. Nothing else changes it: no gradient of the model's loss reaches it.
  """

  frozen = True

  def loss(
    self, config: TransformerConfig, arrays: tuple[jax.Array, ...], **attention: Any
  ) -> jax.Array:
    """Computes the loss of the scorer from scores, query, key and positions of queries."""
    return max_attention_loss(*arrays, **attention)


BASELINES = {
  "random": RandomAttention,
  "attention_sinks": AttentionSinks,
  "strided": StridedAttention,
  "lsh": LSHAttention,
  "block_topk": BlockTopKAttention,
  "linear": LinearAttention,
  "tova": TOVAAttention,
  "h2o": H2OAttention,
  "snapkv": SnapKVAttention,
  "random_sink": RandomSinkAttention,
  "kvzap": KVzapAttention,
}
ATTENTION_MODULES: dict[str, type[Attention]] = {**layers.ATTENTION_MODULES, **BASELINES}
