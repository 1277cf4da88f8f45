"""Sampling text from a model, token by token, with memory and time per token that do not grow."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sparsek.cache import decode_step, init_cache, prefill
from sparsek.config import TransformerConfig, check_at_least
from sparsek.model import Params, unstack_layers


def sample(logits: jax.Array, key: jax.Array, temperature: jax.Array | float = 1.0, top_p: jax.Array | float = 1.0) -> jax.Array:
  """Draws token ids [...] from logits [..., vocab_size].

  Args:
    key: PRNG key.
    temperature: divides the logits; 0 takes the largest (the lowest id of equals).
    top_p: draws from the nucleus only: the fewest most probable tokens whose probabilities sum to top_p or more (always at least one).

  Reference: Holtzman et al., The Curious Case of Neural Text Degeneration, arXiv 1904.09751.
  """
  scaled = logits / jnp.where(temperature > 0, temperature, 1)
  order = jnp.argsort(-scaled, axis=-1)
  probability = jax.nn.softmax(jnp.take_along_axis(scaled, order, axis=-1), axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability          # of all more probable tokens
  nucleus = (before < top_p) | (jnp.arange(logits.shape[-1]) == 0)
  drawn = jax.random.categorical(key, jnp.where(nucleus, jnp.log(probability), -jnp.inf), axis=-1)
  drawn = jnp.take_along_axis(order, drawn[..., None], axis=-1)[..., 0]
  return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _next_token(config, params, cache, token, key, temperature, top_p):
  """Feeds token [1] and draws the one after it."""
  key, draw = jax.random.split(key)
  logits, cache = decode_step(config, params, cache, token)
  return sample(logits, draw, temperature, top_p), cache, key


def generate(config: TransformerConfig, params: Params, prompt_tokens: Sequence[int], *, max_new_tokens: int, temperature: float = 1.0,
             top_p: float = 1.0, key: jax.Array | None = None, eos_id: int | Sequence[int] | None = None) -> Iterator[int]:
  """Continues a prompt.

  Args:
    config, params: the model.
    prompt_tokens: at least one token id.
    max_new_tokens: most tokens to draw.
    temperature, top_p: see `sample`; temperature 0 is greedy and needs no key.
    key: PRNG key; the same key gives the same text.
    eos_id: token, or tokens, that end the text; they are not yielded.

  Returns:
    An iterator of token ids; each is yielded as soon as it is known, while the device already works on the next.

  Raises:
    ValueError: at once, for an empty prompt, ids outside the vocabulary, a negative temperature or max_new_tokens, top_p outside (0, 1], more tokens in all
      than max_positions of learned positions, or where a key is missing.

  Example:
    >>> tokens = generate(config, params, tokenizer.encode("def "), max_new_tokens=100, key=jax.random.key(0))
    >>> for text in stream_text(tokenizer, tokens):
    ...   print(text, end="", flush=True)
  """
  prompt = np.asarray(prompt_tokens)
  if prompt.ndim != 1 or not prompt.size:
    raise ValueError(f"prompt_tokens has shape {prompt.shape}, expected [m] with m >= 1; an empty text starts with eos")
  if not np.issubdtype(prompt.dtype, np.integer) or prompt.min() < 0 or prompt.max() >= config.vocab_size:
    raise ValueError(f"prompt_tokens holds {prompt.dtype} values from {prompt.min()} to {prompt.max()}, "
                     f"expected integers from 0 to {config.vocab_size - 1}")
  check_at_least("max_new_tokens", max_new_tokens, 0)
  if config.positions == "learned" and prompt.size + max_new_tokens > config.max_positions:
    raise ValueError(f"max_new_tokens={max_new_tokens} after {prompt.size} prompt tokens: the model has max_positions={config.max_positions}")
  check_at_least("temperature", temperature, 0)
  if not 0 < top_p <= 1:
    raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
  if key is None:
    if temperature > 0:
      raise ValueError(f"key=None: temperature={temperature} draws at random and needs a PRNG key")
    key = jax.random.key(0)
  return _generate(config, params, jnp.asarray(prompt, jnp.int32), max_new_tokens, temperature, top_p, key, np.ravel([] if eos_id is None else eos_id))


def _generate(config, params, prompt, max_new_tokens, temperature, top_p, key, eos_ids):
  if not max_new_tokens:
    return
  params = unstack_layers(config, params)                 # once, not in every step
  config = dataclasses.replace(config, scan_layers=False)
  cache = init_cache(config, 1, max_length=len(prompt) + max_new_tokens)
  key, draw = jax.random.split(key)
  logits, cache = prefill(config, params, cache, prompt[None], last_only=True)
  token = sample(logits[:, 0], draw, temperature, top_p)
  for left in reversed(range(max_new_tokens)):
    known = token
    if left:                                              # dispatched before the token is read: the device does not wait for the host
      token, cache, key = _next_token(config, params, cache, known, key, temperature, top_p)
    known = int(known[0])
    if known in eos_ids:
      return
    yield known


def stream_text(tokenizer, tokens: Iterable[int]) -> Iterator[str]:
  """Turns a stream of tokens into pieces of text that end between characters.

  Tokens may hold parts of a UTF-8 character, and how a token reads may depend on the one before it. So the tokens since the last piece
  are decoded together with that piece, and nothing is yielded while the text ends in U+FFFD, an unfinished character; what is left
  comes with the end of the stream.

  Args:
    tokenizer: an object with decode(ids) -> str that writes U+FFFD for invalid bytes.
  """
  ids, start, read = [], 0, 0                             # ids[start:read] is the last piece
  for token in tokens:
    ids.append(token)
    text = tokenizer.decode(ids[start:])
    if text.endswith("\ufffd"):
      continue
    known = len(tokenizer.decode(ids[start:read]))
    if text[known:]:
      yield text[known:]
      ids = ids[read:]
      start, read = 0, len(ids)
  text = tokenizer.decode(ids[start:])[len(tokenizer.decode(ids[start:read])):]
  if text:
    yield text
