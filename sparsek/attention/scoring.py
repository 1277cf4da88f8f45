"""The scoring network: one float32 score per token and KV head, from hidden states alone, in
parallel over a row or streamed.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sparsek.attention.documents import document_bounds, position_in_document
from sparsek.attention.exact_product import exact_product
from sparsek.attention.running_moments import Moments, moments_added, running_moments
from sparsek.config import check_at_least, check_choice

KINDS = ("linear", "conv", "random")
# width of the conv scorer: a few directions of the hidden state are enough to judge a token
CHANNELS = 32
PRIOR_COUNT = 8.0  # pseudo-tokens of variance 1, which keep a document's first scores moderate
SLOPE_TOKENS = 1024  # the slope is a score per this many tokens
HIGHEST = jax.lax.Precision.HIGHEST


def fixed_noise(layer: jax.Array | int, positions_BxN: jax.Array, num_heads: int) -> jax.Array:
  """Returns [B, N, G] standard normal noise, a hash of layer, head and position: the same in every
  run, batch and process.
  """

  def mix(bits):
    """Applies the finaliser of MurmurHash3."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)

  salt = mix(jnp.asarray(layer).astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + jnp.uint32(1))
  salt_G = mix(salt + jnp.arange(num_heads, dtype=jnp.uint32) * jnp.uint32(0x7F4A7C15))
  bits = mix(mix(positions_BxN.astype(jnp.uint32))[..., None] ^ salt_G)
  # 24 significant bits: exact, and never 0 or 1
  uniform = ((bits >> 9).astype(jnp.float32) + 0.5) / 2**23
  return jax.scipy.special.ndtri(uniform)


def _standardized(logits, moments: Moments):
  """Returns logits minus their mean, over a standard deviation that PRIOR_COUNT tokens moderate."""
  variance = (moments.deviation + PRIOR_COUNT) / (moments.count + PRIOR_COUNT)
  return (logits - moments.mean) * jax.lax.rsqrt(variance)


class Linear(nn.Module):
  """A product x W in float32, of W [E, features]."""

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param(
      "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), jnp.float32
    )
    if x.dtype == jnp.bfloat16:
      return exact_product(x, kernel)
    return jnp.matmul(x.astype(jnp.float32), kernel, precision=HIGHEST)


def slice_rows(x: jax.Array, start: jax.Array, length: int) -> jax.Array:
  """Slices x [B, N, ...] to [B, length, ...]: of each row start [B] .. start + length - 1."""
  if x.shape[1] == length + 1:  # a single token: cheaper to choose than to slice
    return jnp.where(start.reshape(-1, *[1] * (x.ndim - 1)) > 0, x[:, 1:], x[:, :-1])
  return jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, length))(x, start)


class ScorerState(NamedTuple):
  """The state of a stream of chunks; its size depends on the configuration only.

  Attributes:
    linear: [B, L, G] linear logits of the last L = lookahead tokens, whose scores are not final
      yet.
    channels: [B, lookback + L, CHANNELS] inputs of the convolution.
    mean, deviation: [B, G] moments of the final logits so far.
    mean_rest, deviation_rest: [B, G] rounding errors of these sums (Kahan 1965), which are added
      back; without them a score would be off by 10^-5 after 10^6 single tokens.
  """

  linear: jax.Array
  channels: jax.Array
  mean: jax.Array
  deviation: jax.Array
  mean_rest: jax.Array
  deviation_rest: jax.Array


class ScoringNetwork(nn.Module):
  """A network that scores tokens, u[b, j, g], from their hidden states, in float32.

  Logits r_j:
    "linear": r = x W, as in the paper.
    "conv": r = x W + silu(conv(x P)) V; the convolution sees `lookback` tokens before and
      `lookahead` tokens after its own, within the document. Lookahead keeps the model causal as
      long as it is at most the attention window, because a token is judged only when it leaves the
      window.
    "random": fixed noise, no parameters: the control that a learned scorer has to beat. Its scale,
      slope and sink are `init_scale`, `init_slope` and `init_sink`.

  Scores: u_j = scale_g z_j + slope_g position_j / 1024, with the position counted within the
  document and z_j = (r_j - mean_j) / std_j, where mean_j is that of r_0..r_j of the document and
  std_j^2 = (sum of squared deviations + 8) / (j + 1 + 8), as if 8 more tokens had variance 1. A
  constant added to all r changes nothing. Without `normalize`, z = r. `scale` and `slope` are
  learned per head.

  With `init_noise` above 0 the score has one more term, amplitude_g e_j, with the fixed noise e of
  "random": without it tokens that look alike have the same score, and a new scorer keeps many of a
  few kinds and none of the others. The amplitude is learned too, and the noise is the same in
  generation.

  With `init_sink` other than 0 the first token of a document has one more term, sink_g, which is
  learned: its z is 0 whatever its hidden state, but pretrained models leave much attention there
  (Xiao et al. 2023, arXiv 2309.17453), and break where it is dropped.

  The spread of the scores acts as a temperature: at a standard deviation of .1 nearly all gates are
  fractional, at 10 they are 0 or 1. The default scale of 1 starts with .80 of the gate mass on the
  top k, 4 with .95 (n = 512, k = 64, random hidden states; tests/attention/scoring_test.py). A
  slope bounds how far back a new scorer reaches: about 12,000 tokens at slope 1, scale 4 and
  k = 512, however long the context, and all of it at the default of 0
  (experiments/results/scorer_reach.json).

  `sparsek.parallel.sharded_scores.ShardedScoringNetwork` is the same network over rows whose tokens
  lie on several devices.

  Attributes:
    num_heads: KV heads G.
    kind: "linear", "conv" or "random".
    lookback, lookahead: reach of the conv scorer in tokens, unused by the others.
    normalize: whether to normalise logits causally over time.
    shared: whether all heads share one score per token.
    init_scale, init_slope: initial values of scale and slope (fixed ones for "random").
    init_noise: initial amplitude of the fixed noise; 0 for none. Unused by "random", which is that
      noise alone.
    init_sink: initial extra score of a document's first token (a fixed one for "random"); 0 for
      none.

  Raises:
    ValueError: for an unknown kind or a negative reach.
  """

  num_heads: int
  kind: str = "linear"
  lookback: int = 3
  lookahead: int = 4
  normalize: bool = True
  init_scale: float = 1.0
  init_slope: float = 0.0
  shared: bool = False
  init_noise: float = 0.0
  init_sink: float = 0.0

  def setup(self) -> None:
    check_choice("scorer", self.kind, KINDS)
    check_at_least("scorer_lookback", self.lookback, 0)
    check_at_least("scorer_lookahead", self.lookahead, 0)
    if self.kind == "random":
      return
    self.linear = Linear(self.num_scores)
    if self.kind == "conv":
      self.conv_in, self.conv, self.conv_out = (
        Linear(CHANNELS),
        Linear(CHANNELS),
        Linear(self.num_scores),
      )
    self.scale = self.param(
      "scale", nn.initializers.constant(self.init_scale), (self.num_scores,), jnp.float32
    )
    self.slope = self.param(
      "slope", nn.initializers.constant(self.init_slope), (self.num_scores,), jnp.float32
    )
    if self.init_noise:
      self.amplitude = self.param(
        "amplitude", nn.initializers.constant(self.init_noise), (self.num_scores,), jnp.float32
      )
    if self.init_sink:
      self.sink = self.param(
        "sink", nn.initializers.constant(self.init_sink), (self.num_scores,), jnp.float32
      )

  @property
  def num_scores(self) -> int:
    """Number of different scores of a token."""
    return 1 if self.shared else self.num_heads

  @property
  def delay(self) -> int:
    """Number of tokens that must follow a token before its score is final."""
    return self.lookahead if self.kind == "conv" else 0

  def input_matrix(self) -> jax.Array | None:
    """Returns the matrix [E, C] that hidden states are multiplied by; None for "random".

    The parameters must exist.
    """
    if self.kind == "random":
      return None
    inputs = [self.linear, self.conv_in] if self.kind == "conv" else [self.linear]
    return jnp.concatenate([module.get_variable("params", "kernel") for module in inputs], axis=1)

  def __call__(
    self,
    x_BxNxE: jax.Array,
    segment_ids: jax.Array | None = None,
    layer: jax.Array | int = 0,
    products_BxNxC: jax.Array | None = None,
  ) -> jax.Array:
    """Scores whole rows.

    Args:
      x_BxNxE: hidden states of any floating dtype.
      segment_ids: [B, N] or None; everything restarts where the id changes.
      layer: index of the layer, the salt of the fixed noise.
      products_BxNxC: float32, x times `input_matrix`, if they are known. Only the shape of x is
        then used.

    Returns:
      [B, N, G] float32. The last `delay` tokens of a row see zeros ahead; they are no candidates
      yet where window >= delay.
    """
    batch, length, _ = x_BxNxE.shape
    row = self._row_length(length)
    position_BxN = self._cut(position_in_document(segment_ids, batch, row), length, length)
    if self.kind == "random":
      return self._random_scores(layer, position_BxN)
    start_BxR, end_BxR = document_bounds(segment_ids, batch, row)
    logits_BxNxG = self._logits(x_BxNxE, start_BxR, products_BxNxC)
    if self.normalize:
      logits_BxNxG = self._normalized(logits_BxNxG, start_BxR, end_BxR)
    return self._scores(logits_BxNxG, position_BxN, layer)

  def _logits(self, x_BxNxE, start_BxR, products_BxNxC=None):
    """Returns logits, given the start of each token's document in whole rows."""
    length = x_BxNxE.shape[1]
    if products_BxNxC is None:
      logits_BxNxG = self.linear(x_BxNxE)
    else:
      logits_BxNxG = products_BxNxC[..., : self.num_scores]
    if self.kind != "conv":
      return logits_BxNxG
    if products_BxNxC is None:
      channels_BxNxC = self.conv_in(x_BxNxE)
    else:
      channels_BxNxC = products_BxNxC[..., self.num_scores :]
    channels = self._with_neighbours(channels_BxNxC)
    reach = ((0, 0), (self.lookback, self.lookahead))
    start = self._cut(jnp.pad(start_BxR, reach, constant_values=-1), length, channels.shape[1])
    same_BxNxT = self._taps(start, length) == self._cut(start_BxR, length, length)[..., None]
    return logits_BxNxG + self._convolve(self._taps(channels, length) * same_BxNxT[..., None])

  def stream(
    self,
    x_BxCxE: jax.Array,
    state: ScorerState,
    seen: jax.Array,
    layer: jax.Array | int = 0,
    count: jax.Array | None = None,
    linear_BxCxG: jax.Array | None = None,
  ) -> tuple[jax.Array, ScorerState]:
    """Scores the tokens whose scores become final with a chunk of C further tokens of one endless
    document.

    Args:
      x_BxCxE: hidden states of the tokens at positions seen .. seen + C - 1.
      state: what the previous call returned; `initial_state` at first.
      seen: int32 [B], or a scalar for all rows, tokens before this chunk.
      layer: index of the layer, the salt of the fixed noise.
      count: int32 [B], how many of a row's C tokens are real, all by default; those behind them are
        not read.
      linear_BxCxG: x W, if it is known. A linear scorer then uses only the shape of x.

    Returns:
      [B, C, G] float32 scores of positions seen - delay .. seen - delay + C - 1 (meaningless where
      negative, and beyond `count`), and the next state.
    """
    batch, length, _ = x_BxCxE.shape
    before_Bx1 = jnp.reshape(seen, (-1, 1)) - self.delay
    position_BxC = jnp.broadcast_to(
      before_Bx1 + jnp.arange(length, dtype=jnp.int32), (batch, length)
    )
    if self.kind == "random":
      return self._random_scores(layer, position_BxC), state
    count = jnp.full(batch, length) if count is None else count
    x_BxCxE = x_BxCxE.astype(jnp.float32)
    linear = jnp.concatenate(
      [state.linear, self.linear(x_BxCxE) if linear_BxCxG is None else linear_BxCxG], axis=1
    )
    logits_BxCxG, state = (
      linear[:, :length],
      state._replace(linear=slice_rows(linear, count, self.delay)),
    )
    if self.kind == "conv":
      channels = jnp.concatenate([state.channels, self.conv_in(x_BxCxE)], axis=1)
      logits_BxCxG += self._convolve(self._taps(channels, length))
      state = state._replace(channels=slice_rows(channels, count, self.lookback + self.lookahead))
    if not self.normalize:
      return self._scores(logits_BxCxG, position_BxC, layer), state
    before = Moments(
      jnp.maximum(before_Bx1, 0).astype(jnp.float32)[..., None],
      state.mean[:, None],
      state.deviation[:, None],
    )
    chunk = running_moments(
      logits_BxCxG,
      position_BxC >= 0,
      jnp.zeros_like(position_BxC),
      jnp.full_like(position_BxC, length),
    )
    added = moments_added(before, chunk)
    moments, ends = Moments(before.count + chunk.count, before.mean, before.deviation), {}
    for name in ("mean", "deviation"):
      old, rest = getattr(before, name), getattr(state, name + "_rest")[:, None]
      step = getattr(added, name) + rest
      new = old + step
      moments = moments._replace(**{name: new})
      for field, start, values in ((name, old, new), (name + "_rest", rest, step - (new - old))):
        ends[field] = slice_rows(jnp.concatenate([start, values], axis=1), count, 1)[:, 0]
    z_BxCxG = _standardized(logits_BxCxG, moments)
    return self._scores(z_BxCxG, position_BxC, layer), state._replace(**ends)

  def initial_state(self, batch_size: int) -> ScorerState:
    """Returns the state before the first token."""
    conv = self.kind == "conv"
    zeros = lambda *shape: jnp.zeros((batch_size, *shape), jnp.float32)
    return ScorerState(
      zeros(self.delay, self.num_scores),
      zeros(self.lookback + self.lookahead if conv else 0, CHANNELS),
      *(zeros(self.num_scores) for _ in range(4)),
    )

  def _row_length(self, length):
    """Returns the tokens of a row of which `length` are here."""
    return length

  def _cut(self, whole, length, count):
    """Slices `count` tokens of whole rows, from the first of the `length` that are here."""
    return whole

  def _with_neighbours(self, x_BxNxC):
    """Adds the `lookback` tokens before those that are here and the `lookahead` after them, zeros
    outside the row.
    """
    return jnp.pad(x_BxNxC, ((0, 0), (self.lookback, self.lookahead), (0, 0)))

  def _normalized(self, logits_BxNxG, start_BxR, end_BxR):
    """Normalises logits causally over their document, given bounds of whole rows."""
    counted = jnp.ones_like(start_BxR)
    return _standardized(logits_BxNxG, running_moments(logits_BxNxG, counted, start_BxR, end_BxR))

  def _random_scores(self, layer, position_BxN):
    position_BxNx1 = position_BxN[..., None]
    scores = self.init_scale * fixed_noise(layer, position_BxN, self.num_scores)
    scores += self.init_slope * position_BxNx1 / SLOPE_TOKENS
    return self._for_heads(scores + self.init_sink * (position_BxNx1 == 0))

  def _for_heads(self, scores):
    return jnp.broadcast_to(scores, (*scores.shape[:2], self.num_heads))

  def _taps(self, padded, length):
    """Collects what each token sees around itself: [B, length + lookback + lookahead, ...] ->
    [B, length, taps, ...].
    """
    return jnp.stack(
      [padded[:, t : t + length] for t in range(self.lookback + self.lookahead + 1)], axis=2
    )

  def _convolve(self, taps_BxNxTxC):
    batch, length, taps, channels = taps_BxNxTxC.shape
    return self.conv_out(nn.silu(self.conv(taps_BxNxTxC.reshape(batch, length, taps * channels))))

  def _scores(self, logits_BxNxG, position_BxN, layer):
    scores_BxNxS = self.scale * logits_BxNxG + self.slope * (position_BxN[..., None] / SLOPE_TOKENS)
    if self.init_noise:
      scores_BxNxS += self.amplitude * fixed_noise(layer, position_BxN, self.num_scores)
    if self.init_sink:
      scores_BxNxS += self.sink * (position_BxN == 0)[..., None]
    return self._for_heads(scores_BxNxS)
