"""Sessions on disk: a saved cache with a note about the texts and the parameters."""

import functools
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np

from sparsek.config import TransformerConfig
from sparsek.errors import UsageError
from sparsek.generation import cache_file
from sparsek.generation.cache import Cache
from sparsek.generation.inference import InferenceParams
from sparsek.model.fingerprint import fingerprint


class SavedSession(NamedTuple):
  """The parts of a session that are saved.

  Attributes:
    cache: state of the model.
    length: of texts, to which the sizes of the cache are clipped, or None.
    unfed: for each row the token that has not been fed yet, or none.
    texts: for each row the state of a `TextStream`, or {}.
  """

  cache: Cache
  length: int | None
  unfed: list[list[int]]
  texts: list[dict]


def save(
  path: str, config: TransformerConfig, params: InferenceParams, session: SavedSession
) -> None:
  """Writes a session to a file atomically.

  Raises:
    OSError: where it cannot be written; then the file that was at `path` stays.
  """
  note = {"unfed": session.unfed, "model": fingerprint(params._asdict()), "texts": session.texts}
  cache_file.save(path, config, session.cache, note, session.length)


def load(path: str, config: TransformerConfig, params: InferenceParams) -> SavedSession:
  """Returns the session that `save` wrote.

  Raises:
    UsageError: where it cannot be read, or was saved with another configuration or other
      parameters.
  """
  cache, note, length = cache_file.load(path, config)
  if not isinstance(note, dict) or type(note.get("model")) not in (int, str):
    raise UsageError(f"{path} cannot be read as a cache: it does not say of which model it is")
  is_old = isinstance(note["model"], int)
  if note["model"] != (_checksum(params) if is_old else fingerprint(params._asdict())):
    raise UsageError(
      f"{path} was saved with other parameters: what it holds means nothing to these"
    )
  rows = len(cache.seen)
  unfed = _read_unfed(path, note.get("unfed"), config, rows)
  return SavedSession(cache, length, unfed, _read_texts(path, note.get("texts"), config, rows))


def _checksum(params: InferenceParams) -> int:
  """Returns what older files hold in place of the fingerprint: of parts that training changes."""
  parts = jax.tree.leaves(params.final_norm) + [
    params.layers[-1]["down"]["kernel"][:4],
    params.layers[0]["qkv"]["kernel"][:4],
  ]
  return functools.reduce(lambda sum_, x: zlib.crc32(np.asarray(x).tobytes(), sum_), parts, 0)


def _are_ids(value: Any, vocab_size: int) -> bool:
  return isinstance(value, list) and all(type(i) is int and 0 <= i < vocab_size for i in value)


def _read_unfed(path: str, unfed: Any, config: TransformerConfig, rows: int) -> list[list[int]]:
  """Returns the tokens of a saved session that have not been fed yet, at most one for each row.

  Raises:
    UsageError: where `unfed` holds anything else.
  """
  valid = isinstance(unfed, list) and len(unfed) == rows
  if not valid or not all(_are_ids(ids, config.vocab_size) and len(ids) <= 1 for ids in unfed):
    raise UsageError(
      f"{path} cannot be read as a cache: unfed must hold at most one id below "
      f"{config.vocab_size} of each of its {rows} texts"
    )
  return unfed


def _read_texts(path: str, texts: Any, config: TransformerConfig, rows: int) -> list[dict]:
  """Returns the states of streams that `Session.save` wrote, {} for each row of an older file.

  Raises:
    UsageError: where `texts` holds anything else.
  """

  def is_state(state):
    if not isinstance(state, dict) or set(state) not in (set(), {"before", "unfinished"}):
      return False
    return not state or (
      _are_ids(state["before"], config.vocab_size) and type(state["unfinished"]) is bool
    )

  if texts is None:
    return [{} for _ in range(rows)]
  if not isinstance(texts, list) or len(texts) != rows or not all(map(is_state, texts)):
    raise UsageError(
      f"{path} cannot be read as a cache: texts must hold the last tokens of each "
      f"of its {rows} texts"
    )
  return texts
