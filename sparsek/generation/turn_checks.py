"""Checks of what a turn of generation is given, made before any long work."""

from collections.abc import Sequence

import jax
import numpy as np

from sparsek.config import (
  PositiveShare,
  TransformerConfig,
  UnboundedIndex,
  Weight,
  check_config,
  check_number,
)
from sparsek.generation.cache_sizes import check_memory, clip_sizes
from sparsek.kernels.sentinels import NOWHERE
from sparsek.model.random_keys import random_keys
from sparsek.model.transformer import check_ids
from sparsek.storage.files import shown


def _check_prompt(prompt: Sequence[int], has_text: bool, vocab_size: int) -> None:
  """Raises ValueError unless a prompt holds ids of the vocabulary, one or more for a new text."""
  if isinstance(prompt, str):
    raise ValueError(f"prompt_tokens={shown(prompt)} must be token ids: tokenizer.encode(text)")
  ids = np.asarray(prompt) if len(prompt) else np.zeros(0, np.int32)
  if ids.ndim != 1 or not (ids.size or has_text):
    raise ValueError(
      f"prompt_tokens has shape {ids.shape}, expected [m] with m >= 1; "
      "an empty text starts with eos"
    )
  if not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(
      f"prompt_tokens holds {ids.dtype} values, expected integers from 0 to {vocab_size - 1}"
    )
  check_ids("prompt_tokens", ids, vocab_size)


def check_turn(
  config: TransformerConfig,
  prompts: Sequence[Sequence[int]],
  seen: Sequence[int],
  unfed: list[list[int]],
  *,
  max_new_tokens: int,
  temperature: float,
  top_p: float,
  top_k: int,
  keys: jax.Array | None,
  ahead: int,
) -> jax.Array:
  """Raises ValueError for bad arguments of `Session.generate`; returns the keys."""
  check_config(config)
  longest = 0
  for prompt, begun, before in zip(prompts, unfed, seen):
    _check_prompt(prompt, bool(begun), config.vocab_size)
    longest = max(longest, int(before) + len(begun) + len(prompt))
  for name, value in (("max_new_tokens", max_new_tokens), ("top_k", top_k), ("ahead", ahead)):
    check_number(name, value, UnboundedIndex)
  check_number("temperature", temperature, Weight)
  check_number("top_p", top_p, PositiveShare)
  length = longest + max_new_tokens
  asked = f"max_new_tokens={max_new_tokens} after {longest} prompt tokens"
  if length > NOWHERE:
    raise ValueError(f"{asked}: positions are counted up to {NOWHERE}")
  check_memory(clip_sizes(config, length), len(prompts), length, asked)
  if config.positions == "learned" and length > config.max_positions:
    raise ValueError(f"{asked}: the model has max_positions={config.max_positions}")
  if keys is None and temperature > 0:
    example = f"jax.random.split(jax.random.key(0), {len(prompts)})"
    raise ValueError(
      f"temperature={temperature} draws at random: give keys={example}, or "
      "key=jax.random.key(0) to `generate`; temperature=0 needs none"
    )
  keys = jax.random.split(jax.random.key(0), len(prompts)) if keys is None else keys
  return random_keys("keys", keys, (len(prompts),))
