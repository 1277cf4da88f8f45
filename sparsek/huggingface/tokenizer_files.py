"""The files of a tokenizer in a model's folder, as transformers reads them."""

import json
import os
import shutil
from typing import Any

from sparsek.data.document_end import EOS_TOKENS, TOKENIZER_CONFIG
from sparsek.data.tokenizer import TOKENIZER_FILE, ByteTokenizer, Tokenizer, byte_level
from sparsek.storage import files

SPECIAL_TOKENS = "special_tokens_map.json"
FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG, SPECIAL_TOKENS, "chat_template.jinja")
PADDING = ("<pad>", "<|pad|>", "[PAD]")  # well-known names


def copy(source: str, target: str) -> None:
  """Copies the tokenizer's files from one folder to another, which is made if necessary."""
  os.makedirs(target, exist_ok=True)
  for name in FILES:
    if os.path.isfile(os.path.join(source, name)):
      shutil.copyfile(os.path.join(source, name), os.path.join(target, name))


def write(folder: str, source: str, tokenizer: Tokenizer, max_length: int) -> None:
  """Writes a tokenizer so that transformers' AutoTokenizer reads it and pads on the left.

  A tokenizer_config.json that names its class is of a model of Hugging Face's, and stays as it is.

  Args:
    folder: of the model.
    source: folder of the tokenizer, or "byte".
    tokenizer: what `load_tokenizer(source)` returned.
    max_length: most tokens of a text that the model is made for.
  """
  copy(source, folder)
  if source == ByteTokenizer.name:
    files.write_atomically(os.path.join(folder, TOKENIZER_FILE), byte_level().to_str(pretty=True))
  path = os.path.join(folder, TOKENIZER_CONFIG)
  config = files.read_json_object(path) if os.path.exists(path) else {}
  if "tokenizer_class" in config:
    return
  path_of_tokens = os.path.join(folder, SPECIAL_TOKENS)
  tokens = files.read_json_object(path_of_tokens) if os.path.exists(path_of_tokens) else {}
  text = json.dumps(_defaults(folder, tokenizer, max_length) | tokens | config, indent=2)
  files.write_atomically(path, text + "\n")


def _defaults(folder: str, tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
  """Returns the fields of a tokenizer_config.json for the tokenizer in a folder."""
  import tokenizers

  library = tokenizers.Tokenizer.from_file(os.path.join(folder, TOKENIZER_FILE))
  special = {token.content for token in library.get_added_tokens_decoder().values()}
  is_byte = isinstance(tokenizer, ByteTokenizer)
  eos = EOS_TOKENS[0] if is_byte else tokenizer.token(tokenizer.eos_id)
  first = {"bos_token": tokenizer.token(tokenizer.bos_ids[0])} if tokenizer.bos_ids else {}
  return {
    "tokenizer_class": "PreTrainedTokenizerFast",
    **first,
    "eos_token": eos,
    "pad_token": next((name for name in PADDING if name in special), eos),
    "padding_side": "left",
    "model_max_length": max_length,
    "model_input_names": ["input_ids", "attention_mask"],
    "clean_up_tokenization_spaces": False,
  }
