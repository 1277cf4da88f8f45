"""Scores of tokens, and positions, where the tokens of a row lie on several devices."""

import jax
import jax.numpy as jnp
from jax import lax

from sparsek.attention.documents import document_bounds, position_in_document
from sparsek.attention.scoring import ScorerState, ScoringNetwork
from sparsek.kernels.saved import saved
from sparsek.parallel.exchange import (
  first_token,
  own_tokens,
  to_own_tokens,
  to_whole_rows,
  tokens_after,
  tokens_at,
  tokens_before,
)
from sparsek.parallel.mesh import CONTEXT, axis_size


def token_positions(segment_ids: jax.Array | None, batch: int, length: int) -> jax.Array:
  """Counts the tokens of its own document that precede each token of this shard.

  Args:
    segment_ids: [batch, n] of whole rows, or None.
    batch: number of rows.
    length: number of tokens of this shard; of the row, outside a `jax.shard_map` over `context`.

  Returns:
    [batch, length] int32.

  Raises:
    ValueError: where segment_ids has another shape.
  """
  return own_tokens(position_in_document(segment_ids, batch, axis_size(CONTEXT) * length))


class ShardedScoringNetwork(ScoringNetwork):
  """The scoring network on a shard of each row, inside `jax.shard_map` over `context`.

  Its parameters are those of `ScoringNetwork`, and its scores [B, L, G] are this shard's part of
  what that returns for whole rows, given segment_ids of whole rows [B, n]. The convolution gets its
  inputs from the neighbouring shards. Moments are those of whole rows: logits travel to where a
  head has its whole row, and return normalised.
  """

  def state_after(self, x_BxNxE: jax.Array, count: jax.Array) -> ScorerState:
    """Returns the state of a stream that has scored the first tokens of rows of one document.

    Args:
      x_BxNxE: hidden states of this shard's tokens.
      count: [B], how many tokens of the whole row the stream has read, at least 1.

    Returns:
      The whole state on every shard, as `stream` returns it, to rounding.
    """
    batch, length, _ = x_BxNxE.shape
    state = self.initial_state(batch)
    if self.kind == "random":
      return state
    last = lambda x, number: tokens_at(x, count[:, None] + jnp.arange(-number, 0))
    state = state._replace(linear=last(self.linear(x_BxNxE), self.delay))
    if self.kind == "conv":
      reach = self.lookback + self.lookahead
      state = state._replace(channels=last(self.conv_in(x_BxNxE), reach))
    if not self.normalize:
      return state
    start, _ = document_bounds(None, batch, self._row_length(length))
    logits_BxNxG = self._logits(x_BxNxE, start)
    final = (count - self.delay)[:, None]
    is_final = (first_token(length) + jnp.arange(length) < final)[..., None]
    total = lambda x: lax.psum(jnp.sum(jnp.where(is_final, x, 0), axis=1, keepdims=True), CONTEXT)
    # The difference from one of them: an offset common to all logits costs no digits.
    first = tokens_at(logits_BxNxG, jnp.zeros((batch, 1), jnp.int32))
    number = jnp.maximum(final, 1)[..., None]
    mean = jnp.where(final[..., None] > 0, first, 0) + total(logits_BxNxG - first) / number
    deviation = total((logits_BxNxG - mean) ** 2)
    return state._replace(mean=mean[:, 0], deviation=deviation[:, 0])

  def _row_length(self, length):
    return axis_size(CONTEXT) * length

  def _cut(self, whole, length, count):
    return lax.dynamic_slice_in_dim(whole, first_token(length), count, axis=1)

  def _with_neighbours(self, x_BxNxC):
    before, after = saved(
      tokens_before(x_BxNxC, self.lookback), tokens_after(x_BxNxC, self.lookahead)
    )
    return jnp.concatenate([before, x_BxNxC, after], axis=1)

  def _normalized(self, logits_BxNxG, start_BxR, end_BxR):
    (whole,) = saved(to_whole_rows(logits_BxNxG))
    whole = super()._normalized(whole, start_BxR, end_BxR)
    (own,) = saved(to_own_tokens(whole, logits_BxNxG.shape[2]))
    return own
