"""Texts that a model writes after prompts, in batches of similar lengths and constant memory."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sparsek.config import TransformerConfig
from sparsek.data.tokenizer import Tokenizer
from sparsek.evaluation.likelihoods import warn_of_lost
from sparsek.generation.cache import pad_length
from sparsek.generation.inference import InferenceParams, inference_params
from sparsek.generation.prompts import text_pieces
from sparsek.generation.rows import without_context
from sparsek.generation.session import Session
from sparsek.generation.text_stream import TextStream
from sparsek.model.transformer import Params


@dataclasses.dataclass(frozen=True)
class Writing:
  """The way in which texts are continued.

  Attributes:
    max_new_tokens: most tokens to write.
    temperature, top_p, top_k: as `Session.generate` takes them; temperature 0 is greedy.
    stop: strings that end a text and are left out of it.
    end_ids: tokens that end a text and are left out of it.
  """

  max_new_tokens: int
  temperature: float = 0.0
  top_p: float = 1.0
  top_k: int = 0
  stop: tuple[str, ...] = ()
  end_ids: tuple[int, ...] = ()


def completions(
  config: TransformerConfig,
  params: Params | InferenceParams,
  tokenizer: Tokenizer,
  prompts: Sequence[Sequence[int]],
  writing: Writing,
  keys: Sequence[jax.Array],
  batch_size: int = 1,
  mesh: Mesh | None = None,
) -> Iterator[tuple[int, str]]:
  """Yields (index of a prompt, the text that the model writes after it), the longest prompts first.

  Args:
    config, params, tokenizer: the model.
    prompts: token ids, of at least one token each.
    writing: how the texts go on.
    keys: a PRNG key for each prompt; its text depends on no other prompt.
    batch_size: texts that are written at the same time, over all devices.
    mesh: devices, as `Session` takes them.
  Raises:
    ValueError: as `Session.generate`.
  """
  params = inference_params(config, params, without_context(mesh))
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
  for first in range(0, len(order), batch_size):
    part = order[first : first + batch_size]
    # Always a whole batch, for which all is compiled: copies of the first text end when it does.
    rows = part + part[:1] * (batch_size - len(part))
    longest = len(prompts[part[0]])
    session = Session(config, params, batch_size, mesh, pad_to=_few_lengths(longest))
    turn = session.generate(
      [prompts[i] for i in rows],
      max_new_tokens=writing.max_new_tokens,
      temperature=writing.temperature,
      top_p=writing.top_p,
      top_k=writing.top_k,
      keys=jnp.stack([keys[i] for i in rows]),
      eos_id=writing.end_ids,
    )
    streams = [TextStream(tokenizer, writing.stop, before=prompts[i]) for i in rows]
    texts = [""] * batch_size
    for pieces in text_pieces(session, turn, streams):
      for row, text in pieces:
        texts[row] += text
    warn_of_lost(session.lost_scores)
    yield from ((i, texts[row] + streams[row].finish()) for row, i in enumerate(part))


def _few_lengths(length: int) -> int:
  """Returns a length of at least this one, of which there are four between powers of two.

  So few programs are compiled where full layers have room for all tokens.
  """
  step = pad_length(length) // 8
  return -(-length // step) * step
