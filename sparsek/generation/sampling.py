"""Drawing of tokens from logits."""

import jax
import jax.numpy as jnp


def sample(
  logits: jax.Array,
  key: jax.Array,
  temperature: jax.Array | float = 1.0,
  top_p: jax.Array | float = 1.0,
  top_k: jax.Array | int = 0,
) -> jax.Array:
  """Draws token ids [...] from logits [..., vocab_size].

  Args:
    logits: of the next token.
    key: PRNG key.
    temperature: divides the logits; 0 takes the largest (the lowest id among equal logits). Any
      number, however small or large.
    top_p: draws from the nucleus only: the fewest most probable tokens whose probabilities sum to
      top_p or more (always at least one).
    top_k: draws from this number of most probable tokens only; top_p then applies to these. 0: no
      limit.

  Reference: Holtzman et al., The Curious Case of Neural Text Degeneration, arXiv 1904.09751.
  """
  scaled = _divide(logits, temperature)
  order = jnp.argsort(-scaled, axis=-1)
  rank = jnp.arange(logits.shape[-1])
  kept = jnp.where(
    (top_k == 0) | (rank < top_k), jnp.take_along_axis(scaled, order, axis=-1), -jnp.inf
  )
  probability = jax.nn.softmax(kept, axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability  # of all more probable tokens
  nucleus = (before < top_p) | (rank == 0)
  drawn = jax.random.categorical(key, jnp.where(nucleus, jnp.log(probability), -jnp.inf), axis=-1)
  drawn = jnp.take_along_axis(order, drawn[..., None], axis=-1)[..., 0]
  return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1))


def _divide(logits, temperature):
  """Returns (logits - their maximum) / temperature, finite or -inf for every temperature.

  Without the maximum the quotient could overflow.
  """
  limits = jnp.finfo(jnp.float32)
  temperature = jnp.clip(temperature, limits.tiny, limits.max)
  return (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature


def method_of(temperature: float, top_p: float, top_k: int) -> str:
  """Returns the method of `draw` for these numbers."""
  return "greedy" if temperature == 0 else "all" if top_p == 1 and top_k == 0 else "some"


def draw(
  method: str,
  logits: jax.Array,
  keys: jax.Array,
  number: jax.Array,
  temperature: jax.Array | float,
  top_p: jax.Array | float,
  top_k: jax.Array | int,
) -> jax.Array:
  """Draws the `number`-th token of every row [B]; it depends on the row's key and logits only.

  Args:
    method: "greedy" takes the largest logit, and needs no keys; "all" draws from all tokens, and
      needs no sorting; "some" is `sample`.
    logits: [B, vocab_size].
    keys: [B] PRNG keys.
    number: of the token.
    temperature, top_p, top_k: as in `sample`.
  """
  if method == "greedy":
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
  if method == "all":
    drawn = jax.vmap(jax.random.categorical)(keys, _divide(logits, temperature))
  else:
    drawn = jax.vmap(sample, (0, 0, None, None, None))(logits, keys, temperature, top_p, top_k)
  return drawn.astype(jnp.int32)
