"""The token that ends a document, as the files beside a tokenizer.json name it.

tokenizer_config.json and special_tokens_map.json name a token; config.json and
generation_config.json, of a model's folder, give its id. If none of them does, the first of some
well-known names that is in the vocabulary is used.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from sparsek.errors import UsageError
from sparsek.storage import files

if TYPE_CHECKING:
  import tokenizers

# Names of the end of a document in well-known vocabularies; the first that is present is used.
EOS_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
TOKENIZER_CONFIG = "tokenizer_config.json"
NAMED_IN = (TOKENIZER_CONFIG, "special_tokens_map.json")
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"


def known_name(tokenizer: tokenizers.Tokenizer) -> str | None:
  """Returns the first of EOS_TOKENS that a `tokenizers.Tokenizer` has."""
  return next((name for name in EOS_TOKENS if tokenizer.token_to_id(name) is not None), None)


def find(tokenizer: tokenizers.Tokenizer, folder: str) -> str | None:
  """Returns the token that ends a document according to the files of a folder.

  Args:
    tokenizer: a `tokenizers.Tokenizer`, of the folder's tokenizer.json.
    folder: of a model or of a tokenizer.
  Returns:
    the token; None if the files name none and the folder is not a model's, so that a token may be
    added.
  Raises:
    UsageError: for a file that cannot be understood, a token that the tokenizer does not have, and
      a model's folder that names none, since the model has no trained embedding for an added token.
  """
  for name in NAMED_IN:
    path = os.path.join(folder, name)
    token = _read(path).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is None:
      continue
    if not isinstance(token, str) or not token:
      raise UsageError(f"{path}: eos_token={files.shown(token)} is no token")
    if not _is_text(token) or tokenizer.token_to_id(token) is None:
      raise UsageError(f"{path}: eos_token={files.shown(token)} is no token of its tokenizer.json")
    return token
  special = tokenizer.get_added_tokens_decoder()
  ids = [i for name in (CONFIG, GENERATION_CONFIG) for i in ids_in(folder, name)]
  # An id of ordinary text belongs to another tokenizer, or is a default value.
  token = next((special[i].content for i in ids if i in special), None) or known_name(tokenizer)
  if token is None and "model_type" in _read(os.path.join(folder, CONFIG)):
    raise UsageError(
      f"{folder} does not name the token that ends a document: give its "
      f'{TOKENIZER_CONFIG} an "eos_token" of tokenizer.json'
    )
  return token


def ids_in(folder: str, name: str) -> list[int]:
  """Returns the eos_token_id of config.json or generation_config.json as a list; [] without one.

  Raises:
    UsageError: if the file cannot be understood, or eos_token_id is not an id or a list of ids.
  """
  path = os.path.join(folder, name)
  value = _read(path).get("eos_token_id")
  ids = value if isinstance(value, list) else [] if value is None else [value]
  if not all(type(i) is int and i < 2**31 for i in ids):
    raise UsageError(
      f"{path}: eos_token_id={files.shown(value)} is no token id and no list of them"
    )
  return [i for i in ids if i >= 0]  # some write -1 for none


def record(folder: str, token: str) -> None:
  """Writes the token's name to a folder's tokenizer_config.json, and keeps what else it holds."""
  path = os.path.join(folder, TOKENIZER_CONFIG)
  files.write_atomically(path, json.dumps({**_read(path), "eos_token": token}, indent=2) + "\n")


def _read(path: str) -> dict:
  return files.read_json_object(path) if os.path.lexists(path) else {}


def _is_text(token: str) -> bool:
  return token.encode("utf-8", "replace").decode("utf-8") == token
