"""The scoring network: one float32 score per token and KV head, from hidden states alone, in parallel over a row or streamed."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sparsek.config import SCORERS, check_at_least, check_choice
from sparsek.operator import document_bounds

CHANNELS = 32              # width of the conv scorer: a few directions of the hidden state are enough to judge a token
PRIOR_COUNT = 8.0          # pseudo-tokens of variance 1: they keep the first tokens of a document tame
SLOPE_TOKENS = 1024        # the slope is a score per this many tokens
HIGHEST = jax.lax.Precision.HIGHEST


def position_in_document(segment_ids: jax.Array | None, batch: int, length: int) -> jax.Array:
  """[batch, length] int32: how many tokens of its own document (a run of equal ids) precede each token."""
  if segment_ids is not None and segment_ids.shape != (batch, length):
    raise ValueError(f"segment_ids has shape {segment_ids.shape}, expected {(batch, length)} like the tokens")
  return jnp.arange(length, dtype=jnp.int32) - document_bounds(segment_ids, batch, length)[0]


class Moments(NamedTuple):
  """Statistics of a set of logits: how many, their mean, and the sum of squared deviations from it."""
  count: jax.Array
  mean: jax.Array
  deviation: jax.Array


def merge_moments(a: Moments, b: Moments) -> Moments:
  """Moments of the union (Chan, Golub and LeVeque 1979): never a difference of large sums, so a common offset costs no digits."""
  count = a.count + b.count
  share = b.count / jnp.maximum(count, 1)
  delta = b.mean - a.mean
  return Moments(count, a.mean + delta * share, a.deviation + b.deviation + delta**2 * a.count * share)


def running_sums(x: jax.Array, start: jax.Array, block: int = 32) -> jax.Array:
  """Sums over the tokens start_i..i, [..., n]; x is [..., n] and start [..., n] never decreases along a row and broadcasts to x.

  Sums inside blocks, to which each adds what the blocks before it hold of its document: three levels for 32768 tokens, where a scan by doubling would take 15.
  """
  n = x.shape[-1]
  block, padding = min(block, n), [(0, 0)] * (x.ndim - 1)
  size = -(-n // block)
  blocks = lambda x, **kwargs: jnp.pad(x, (*padding[:x.ndim - 1], (0, size * block - n)), **kwargs).reshape(*x.shape[:-1], size, block)
  x, start = blocks(x), blocks(start, mode="edge")
  token = jnp.arange(size * block, dtype=jnp.int32).reshape(size, block)
  summed = (token[:, None, :] <= token[:, :, None]) & (token[:, None, :] >= start[..., None])
  sums = jnp.sum(jnp.where(summed, x[..., None, :], 0), axis=-1)
  if size > 1:
    before = running_sums(sums[..., -1], start[..., -1] // block, block)
    before = jnp.pad(before[..., :-1], (*padding, (1, 0)))
    sums += jnp.where(start < token[:, :1], before[..., None], 0)
  return sums.reshape(*sums.shape[:-2], -1)[..., :n]


def running_moments(logits_BxNxG: jax.Array, counted_BxN: jax.Array, start_BxN: jax.Array) -> Moments:
  """Moments of the counted logits from token `start` up to each token, itself included: [B, N, 1 or G] each.

  Sums of deviations from the document's first logit, then of squared deviations from the mean so far (Welford 1962): a common offset costs no digits.
  """
  heads_first, start_Bx1xN = lambda x: jnp.swapaxes(x, 1, 2), start_BxN[:, None]
  counted = heads_first(counted_BxN[..., None].astype(jnp.float32))
  first = jax.lax.stop_gradient(jnp.take_along_axis(logits_BxNxG, start_BxN[..., None], axis=1))    # moments about it do not depend on it
  offset = heads_first(logits_BxNxG - first) * counted
  count = running_sums(counted, start_Bx1xN)
  mean = running_sums(offset, start_Bx1xN) / jnp.maximum(count, 1)
  # With m before token j and m' after it, (x - m) (x - m') = (x - m')^2 count / (count - 1): 0 at the first.
  square = (offset - mean) ** 2 * counted * jnp.where(count > 1, count / jnp.maximum(count - 1, 1), 0)
  return Moments(*map(heads_first, (count, mean + heads_first(first), running_sums(square, start_Bx1xN))))


def fixed_noise(layer: jax.Array | int, positions_BxN: jax.Array, num_heads: int) -> jax.Array:
  """[B, N, G] standard normal noise, a hash of layer, head and position: the same in every run, batch and process."""
  def mix(bits):                                              # the finaliser of MurmurHash3
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
  salt = mix(jnp.asarray(layer).astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + jnp.uint32(1))
  salt_G = mix(salt + jnp.arange(num_heads, dtype=jnp.uint32) * jnp.uint32(0x7F4A7C15))
  bits = mix(mix(positions_BxN.astype(jnp.uint32))[..., None] ^ salt_G)
  uniform = ((bits >> 9).astype(jnp.float32) + 0.5) / 2**23   # 24 significant bits: exact, and never 0 or 1
  return jax.scipy.special.ndtri(uniform)


class ScorerState(NamedTuple):
  """What a stream of chunks carries; its size depends on the configuration only.

  Attributes:
    linear: [B, L, G] linear logits of the last L = lookahead tokens, whose scores are not final yet.
    channels: [B, lookback + L, CHANNELS] inputs of the convolution.
    mean, deviation: [B, G] moments of the final logits so far.
  """
  linear: jax.Array
  channels: jax.Array
  mean: jax.Array
  deviation: jax.Array


class ScoringNetwork(nn.Module):
  """Scores u[b, j, g] of tokens from their hidden states, in float32.

  Logits r_j:
    "linear": r = x W, as in the paper.
    "conv": r = x W + silu(conv(x P)) V; the convolution sees `lookback` tokens before and `lookahead` tokens after its own, within the
      document. Lookahead keeps the model causal as long as it is at most the attention window, because a token is judged only when it
      leaves the window.
    "random": fixed noise, no parameters: the control that a learned scorer has to beat.
  Scores: u_j = scale_g z_j + slope_g position_j / 1024, with position counted within the document and z_j = (r_j - mean_j) / std_j, where
    mean_j is that of r_0..r_j of the document and std_j^2 = (sum of squared deviations + 8) / (j + 1 + 8), as if 8 more tokens had
    variance 1. A constant added to all r changes nothing. Without `normalize`, z = r. `scale` and `slope` are learned per head.
    With `init_noise` above 0 the score has one more term, amplitude_g e_j, of fixed normal noise e, that of "random": without it tokens that look alike have
    the same score, and a new scorer keeps many of a few kinds and none of the others. The amplitude is learned too, and the noise is the same in generation.
    With `init_sink` other than 0 the first token of a document has one more term, sink_g, which is learned: its z is 0 whatever its hidden state, but
    pretrained models leave much attention there (Xiao et al. 2023, arXiv 2309.17453), and break where it is dropped.
    The spread acts as a temperature: at std .1 all gates of SPARSEK are mush, at 10 they are 0 or 1. The default scale of 4 starts
    with .95 of the gate mass on the top k (.94 for "random"; n = 512, k = 64, random hidden states; tests/sparsek/scoring_test.py).
    The slope bounds how far back a new scorer reaches: about 12,000 tokens at slope 1, scale 4 and k = 512, however long the context, and all of it at slope 0
    (experiments/results/scorer_reach.json).

  Attributes:
    num_heads: KV heads G.
    kind: "linear", "conv" or "random".
    lookback, lookahead: reach of the conv scorer in tokens, unused by the others.
    normalize: normalise logits causally over time.
    shared: one score per token for all heads.
    init_scale, init_slope: initial values of scale and slope (fixed ones for "random").
    init_noise: initial amplitude of the fixed noise; 0 for none. Not of "random", which has nothing else.
    init_sink: initial extra score of a document's first token; 0 for none. Not of "random".

  Raises:
    ValueError: for an unknown kind or a negative reach.
  """
  num_heads: int
  kind: str = "linear"
  lookback: int = 3
  lookahead: int = 4
  normalize: bool = True
  init_scale: float = 4.0
  init_slope: float = 1.0
  shared: bool = False
  init_noise: float = 0.0
  init_sink: float = 0.0

  def setup(self):
    check_choice("scorer", self.kind, SCORERS)
    check_at_least("scorer_lookback", self.lookback, 0)
    check_at_least("scorer_lookahead", self.lookahead, 0)
    if self.kind == "random":
      return
    dense = lambda features: nn.Dense(features, use_bias=False, dtype=jnp.float32, precision=HIGHEST)
    self.linear = dense(self.num_scores)
    if self.kind == "conv":
      self.conv_in, self.conv, self.conv_out = dense(CHANNELS), dense(CHANNELS), dense(self.num_scores)
    self.scale = self.param("scale", nn.initializers.constant(self.init_scale), (self.num_scores,), jnp.float32)
    self.slope = self.param("slope", nn.initializers.constant(self.init_slope), (self.num_scores,), jnp.float32)
    if self.init_noise:
      self.amplitude = self.param("amplitude", nn.initializers.constant(self.init_noise), (self.num_scores,), jnp.float32)
    if self.init_sink:
      self.sink = self.param("sink", nn.initializers.constant(self.init_sink), (self.num_scores,), jnp.float32)

  @property
  def num_scores(self) -> int:
    """Different scores of a token."""
    return 1 if self.shared else self.num_heads

  @property
  def delay(self) -> int:
    """Tokens that must follow a token before its score is final."""
    return self.lookahead if self.kind == "conv" else 0

  def __call__(self, x_BxNxE: jax.Array, segment_ids: jax.Array | None = None, layer: jax.Array | int = 0) -> jax.Array:
    """Scores of whole rows.

    Args:
      x_BxNxE: hidden states of any floating dtype.
      segment_ids: [B, N] or None; everything restarts where the id changes.
      layer: index of the layer, the salt of the fixed noise.
    Returns:
      [B, N, G] float32. The last `delay` tokens of a row see zeros ahead; they are no candidates yet where window >= delay.
    """
    batch, length, _ = x_BxNxE.shape
    position_BxN = position_in_document(segment_ids, batch, length)
    if self.kind == "random":
      return self._random_scores(layer, position_BxN)
    x_BxNxE, start_BxN = x_BxNxE.astype(jnp.float32), jnp.arange(length, dtype=jnp.int32) - position_BxN
    logits_BxNxG = self.linear(x_BxNxE)
    if self.kind == "conv":
      pad = ((0, 0), (self.lookback, self.lookahead))
      channels = jnp.pad(self.conv_in(x_BxNxE), (*pad, (0, 0)))
      start = jnp.pad(start_BxN, pad, constant_values=-1)
      same_BxNxT = self._taps(start, length) == start_BxN[..., None]
      logits_BxNxG += self._convolve(self._taps(channels, length) * same_BxNxT[..., None])
    if not self.normalize:
      return self._scores(logits_BxNxG, position_BxN, layer)
    return self._scores(logits_BxNxG, position_BxN, layer, running_moments(logits_BxNxG, jnp.ones_like(position_BxN), start_BxN))

  def stream(self, x_BxCxE: jax.Array, state: ScorerState, seen: jax.Array, layer: jax.Array | int = 0) -> tuple[jax.Array, ScorerState]:
    """Scores that become final with a chunk of C further tokens of one endless document.

    Args:
      x_BxCxE: hidden states of the tokens at positions seen .. seen + C - 1.
      state: what the previous call returned; `initial_state` at first.
      seen: int32 scalar, tokens before this chunk.
    Returns:
      [B, C, G] float32 scores of positions seen - delay .. seen - delay + C - 1 (meaningless where negative), and the next state.
    """
    batch, length, _ = x_BxCxE.shape
    position_BxC = jnp.broadcast_to(seen - self.delay + jnp.arange(length, dtype=jnp.int32), (batch, length))
    if self.kind == "random":
      return self._random_scores(layer, position_BxC), state
    x_BxCxE = x_BxCxE.astype(jnp.float32)
    linear = jnp.concatenate([state.linear, self.linear(x_BxCxE)], axis=1)
    logits_BxCxG, state = linear[:, :length], state._replace(linear=linear[:, length:])
    if self.kind == "conv":
      channels = jnp.concatenate([state.channels, self.conv_in(x_BxCxE)], axis=1)
      logits_BxCxG += self._convolve(self._taps(channels, length))
      state = state._replace(channels=channels[:, length:])
    if not self.normalize:
      return self._scores(logits_BxCxG, position_BxC, layer), state
    before = Moments(jnp.maximum(seen - self.delay, 0).astype(jnp.float32), state.mean[:, None], state.deviation[:, None])
    chunk = running_moments(logits_BxCxG, position_BxC >= 0, jnp.zeros_like(position_BxC))
    moments = merge_moments(before, chunk)
    return self._scores(logits_BxCxG, position_BxC, layer, moments), state._replace(mean=moments.mean[:, -1], deviation=moments.deviation[:, -1])

  def initial_state(self, batch_size: int) -> ScorerState:
    """The state before the first token."""
    conv = self.kind == "conv"
    zeros = lambda *shape: jnp.zeros((batch_size, *shape), jnp.float32)
    return ScorerState(zeros(self.delay, self.num_scores), zeros(self.lookback + self.lookahead if conv else 0, CHANNELS),
                       zeros(self.num_scores), zeros(self.num_scores))

  def _random_scores(self, layer, position_BxN):
    noise = fixed_noise(layer, position_BxN, self.num_scores)
    return self._for_heads(self.init_scale * noise + self.init_slope * position_BxN[..., None] / SLOPE_TOKENS)

  def _for_heads(self, scores):
    return jnp.broadcast_to(scores, (*scores.shape[:2], self.num_heads))

  def _taps(self, padded, length):
    """[B, length + lookback + lookahead, ...] -> [B, length, taps, ...]: what each token sees around itself."""
    return jnp.stack([padded[:, t:t + length] for t in range(self.lookback + self.lookahead + 1)], axis=2)

  def _convolve(self, taps_BxNxTxC):
    return self.conv_out(nn.silu(self.conv(taps_BxNxTxC.reshape(*taps_BxNxTxC.shape[:2], -1))))

  def _scores(self, logits_BxNxG, position_BxN, layer, moments: Moments | None = None):
    if moments is not None:
      variance = (moments.deviation + PRIOR_COUNT) / (moments.count + PRIOR_COUNT)
      logits_BxNxG = (logits_BxNxG - moments.mean) * jax.lax.rsqrt(variance)
    scores_BxNxS = self.scale * logits_BxNxG + self.slope * (position_BxN[..., None] / SLOPE_TOKENS)
    if self.init_noise:
      scores_BxNxS += self.amplitude * fixed_noise(layer, position_BxN, self.num_scores)
    if self.init_sink:
      scores_BxNxS += self.sink * (position_BxN == 0)[..., None]
    return self._for_heads(scores_BxNxS)
