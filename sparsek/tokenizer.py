"""Tokenizers: bytes, and byte-pair encoding through the `tokenizers` library.

Both kinds have the same members:
  name: "byte" or "bpe".
  vocab_size: one more than the largest id.
  eos_id: the id that ends every document.
  fingerprint: sha256 in hex of everything that decides the ids; two tokenizers with one fingerprint are interchangeable.
  encode(text, special_tokens=False) -> list[int]: without eos. special_tokens=True takes the names of special tokens in the text as these tokens, and begins
    with those with which the tokenizer begins a text (such as <s>), as chat prompts want it.
  decode(ids) -> str: drops eos; what is not valid UTF-8 becomes U+FFFD.
  encode_documents(texts) -> list of integer arrays, each ending with eos.
  save(folder): writes what `load_tokenizer(folder)` needs beside meta.json.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence

import numpy as np

from sparsek.errors import UsageError
from sparsek.files import write_atomically

TOKENIZER_FILE = "tokenizer.json"
# Names under which known vocabularies keep their end of document. The first that is present is taken; if none is, the first is added.
EOS_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


def as_valid_unicode(text: str) -> str:
  """Replaces lone surrogates (which a shell argument or JSON may carry, and UTF-8 cannot) by "?"."""
  return text.encode("utf-8", "replace").decode("utf-8")


class ByteTokenizer:
  """Ids 0 to 255 are the bytes of UTF-8; 256 ends a document."""

  name = "byte"
  vocab_size = 257
  eos_id = 256
  fingerprint = hashlib.sha256(b"bytes of UTF-8, 256 = eos").hexdigest()

  def encode(self, text: str, special_tokens: bool = False) -> list[int]:
    return list(text.encode("utf-8", "replace"))

  def decode(self, ids: Iterable[int]) -> str:
    return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", "replace")

  def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
    return [np.append(np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16), np.uint16(self.eos_id)) for text in texts]

  def save(self, folder: str) -> None:
    """Nothing to write: meta.json names this tokenizer."""


class BPETokenizer:
  """A `tokenizers.Tokenizer`, with an end of document found among its tokens or added to them.

  Text that happens to spell a special token is encoded as text unless asked otherwise, so no document can contain an eos of its own.
  """

  name = "bpe"

  def __init__(self, tokenizer):
    self._tokenizer = tokenizer
    # Settings that would cut or pad a document silently.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    eos = next((token for token in EOS_TOKENS if tokenizer.token_to_id(token) is not None), EOS_TOKENS[0])
    tokenizer.add_special_tokens([eos])  # Also makes a token that was an ordinary one special; changes nothing otherwise.
    self.eos_id = tokenizer.token_to_id(eos)
    self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    # The library's own format version says nothing about the ids; sorted keys make the text canonical.
    content = json.loads(tokenizer.to_str())
    content.pop("version", None)
    self.fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

  def encode(self, text: str, special_tokens: bool = False) -> list[int]:
    self._tokenizer.encode_special_tokens = not special_tokens
    try:
      return self._tokenizer.encode(as_valid_unicode(text), add_special_tokens=special_tokens).ids
    finally:
      self._tokenizer.encode_special_tokens = True

  def decode(self, ids: Iterable[int]) -> str:
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

  def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
    encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)  # On all cores.
    return [np.array(encoding.ids + [self.eos_id], np.uint32) for encoding in encodings]

  def save(self, folder: str) -> None:
    # The library's own `save` raises a bare Exception where the disk is full.
    write_atomically(os.path.join(folder, TOKENIZER_FILE), self._tokenizer.to_str(pretty=True))


Tokenizer = ByteTokenizer | BPETokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
  """Trains a byte-level BPE, which can encode any text, and decodes to exactly that text.

  Args:
    texts: the training documents.
    vocab_size: number of ids, the 256 bytes and eos included; a small corpus may yield fewer.

  Raises:
    UsageError: if vocab_size is below 257.
  """
  if vocab_size < 257:
    raise UsageError(f"vocab_size={vocab_size} of a trained BPE must be at least 257: the 256 bytes and the end of document")
  import tokenizers

  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size, special_tokens=[EOS_TOKENS[0]], show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
  tokenizer.train_from_iterator(texts, trainer)
  return BPETokenizer(tokenizer)


def load_tokenizer(source: str) -> Tokenizer:
  """Loads a tokenizer.

  Args:
    source: "byte", the path of a tokenizer.json, or a folder: one with a tokenizer.json, or token files of the byte tokenizer.

  Raises:
    UsageError: if there is no tokenizer there, or it cannot be read.
  """
  if source == ByteTokenizer.name:
    return ByteTokenizer()
  path = source
  if os.path.isdir(source):
    path = os.path.join(source, TOKENIZER_FILE)
    if not os.path.exists(path) and _is_byte_data(source):
      return ByteTokenizer()
  if not os.path.isfile(path):
    raise UsageError(f"tokenizer {source!r}: found no file {path}; give 'byte', a tokenizer.json or a folder that holds one")
  import tokenizers

  try:
    return BPETokenizer(tokenizers.Tokenizer.from_file(path))
  except Exception as error:  # The library raises bare Exception for a file that it cannot read.
    raise UsageError(f"tokenizer file {path} cannot be read: {error}") from error


def _is_byte_data(folder: str) -> bool:
  try:
    with open(os.path.join(folder, "meta.json"), encoding="utf-8") as file:
      return json.load(file)["tokenizer"]["name"] == ByteTokenizer.name
  except (OSError, ValueError, KeyError, TypeError):
    return False
