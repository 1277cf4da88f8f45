"""Tokenizers: bytes, and byte-pair encoding through the `tokenizers` library.

Both kinds have the same members:
  name: "byte" or "bpe".
  vocab_size: one more than the largest id.
  eos_id: the id that ends every document.
  bos_ids: the ids that begin every document, such as that of <s>; often none. A loaded tokenizer
    has those of its file; the tokenizer of a run or of token files has those of their documents.
  fingerprint: sha256 in hex of everything that determines the ids; two tokenizers with the same
    fingerprint are interchangeable.
  encode(text, special_tokens=False, continues=False) -> list[int]: without bos and eos.
    special_tokens=True encodes the names of special tokens in the text as these tokens;
    continues=True, for a text that continues another one, leaves out the space that some tokenizers
    put before every text.
  token(id) -> str: its name, for people.
  decode(ids) -> str: drops bos and eos; what is not valid UTF-8 becomes U+FFFD.
  encode_documents(texts) -> list of integer arrays, each beginning with bos and ending with eos.
  save(folder): writes what `load_tokenizer(folder)` needs beside meta.json.
  save_end(folder): writes only what names eos, beside a tokenizer.json that was copied.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparsek.data import document_end
from sparsek.data.document_end import EOS_TOKENS
from sparsek.errors import UsageError
from sparsek.storage.files import read_json_object, write_atomically

if TYPE_CHECKING:
  import tokenizers

TOKENIZER_FILE = "tokenizer.json"

# Far above every vocabulary in use. The time and memory to save a tokenizer grow with its largest
# id, and a model has an embedding for each id.
MAX_ID = 2**24 - 1
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # tokens of SentencePiece's byte fallback


def as_valid_unicode(text: str) -> str:
  """Replaces lone surrogates, which a shell argument or JSON may hold but UTF-8 may not, by "?"."""
  return text.encode("utf-8", "replace").decode("utf-8")


class ByteTokenizer:
  """A tokenizer of bytes: ids 0 to 255 are the bytes of UTF-8, and 256 ends a document."""

  name = "byte"
  vocab_size = 257
  eos_id = 256
  bos_ids: list[int] = []
  fingerprint = hashlib.sha256(b"bytes of UTF-8, 256 = eos").hexdigest()

  def encode(self, text: str, special_tokens: bool = False, continues: bool = False) -> list[int]:
    return list(text.encode("utf-8", "replace"))

  def token(self, id_: int) -> str:
    return "eos" if id_ == self.eos_id else f"byte {id_}"

  def decode(self, ids: Iterable[int]) -> str:
    return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", "replace")

  def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
    ends = [np.array(ids, np.uint16) for ids in (self.bos_ids, [self.eos_id])]
    content = [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16) for text in texts]
    return [np.concatenate([ends[0], ids, ends[1]]) for ids in content]

  def save(self, folder: str) -> None:
    """Writes nothing, since meta.json names this tokenizer."""

  save_end = save


def byte_level() -> tokenizers.Tokenizer:
  """Returns a tokenizer of the library `tokenizers` with the ids of `ByteTokenizer`.

  It is for other programs; `load_tokenizer` knows it again and returns a `ByteTokenizer`.
  """
  import tokenizers

  # Byte-level BPE writes printable bytes of Latin-1 as themselves, the others from U+0100 on.
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = itertools.count(0x100)
  vocab = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  # It adds nothing. transformers writes it where there is none, so that its copies are alike.
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A", pair="$A $B:1")
  tokenizer.add_special_tokens([EOS_TOKENS[0]])
  return tokenizer


class BPETokenizer:
  """A `tokenizers.Tokenizer` with the token that ends a document.

  By default that is the first token of a well-known name, which is added if there is none. Text
  that happens to spell a special token is encoded as ordinary text by default, so that no document
  can contain eos.
  """

  name = "bpe"

  def __init__(self, tokenizer: tokenizers.Tokenizer, eos: str | None = None):
    self._tokenizer = tokenizer
    _check_ids(tokenizer)
    # Turns off settings that would cut or pad documents silently.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    default = document_end.known_name(tokenizer) or EOS_TOKENS[0]
    eos = eos or default
    self._recorded_eos = None if eos == default else eos
    # Makes an ordinary token of this name special, or adds it; otherwise changes nothing.
    tokenizer.add_special_tokens([eos])
    eos_id = tokenizer.token_to_id(eos)
    assert eos_id is not None
    self.eos_id = eos_id
    self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    # The library's format version does not determine the ids; sorted keys make the text canonical.
    content = json.loads(tokenizer.to_str())
    content.pop("version", None)
    if self._recorded_eos:
      content["eos_token"] = self._recorded_eos
    self.fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    self.bos_ids = _beginning(tokenizer)
    self._byte_of, self._written = _byte_tokens(tokenizer, content)

  def encode(self, text: str, special_tokens: bool = False, continues: bool = False) -> list[int]:
    tokenizer = self._continuing if continues else self._tokenizer
    tokenizer.encode_special_tokens = not special_tokens
    try:
      with _library_errors("encode a text"):
        return tokenizer.encode(as_valid_unicode(text), add_special_tokens=False).ids
    finally:
      tokenizer.encode_special_tokens = True

  @functools.cached_property
  def _continuing(self) -> tokenizers.Tokenizer:
    """The tokenizer without the space that it may put before every text."""
    content = json.loads(self._tokenizer.to_str())
    without = {name: _without_prefix(content[name]) for name in ("normalizer", "pre_tokenizer")}
    if all(without[name] == content[name] for name in without):
      return self._tokenizer
    return type(self._tokenizer).from_str(json.dumps(content | without))

  def token(self, id_: int) -> str:
    return str(self._tokenizer.id_to_token(id_))

  def decode(self, ids: Iterable[int]) -> str:
    ids = [int(i) for i in ids]
    if not self._byte_of.keys().isdisjoint(ids):
      ids = self._with_valid_bytes(ids)
    with _library_errors("decode tokens"):
      return self._tokenizer.decode(ids, skip_special_tokens=True)

  def _with_valid_bytes(self, ids: list[int]) -> list[int]:
    """Returns ids whose runs of byte tokens are valid UTF-8, with U+FFFD for invalid bytes.

    The library decodes a run as a whole or not at all, so that one invalid byte would also lose the
    characters before it.
    """
    token_of = {byte: token for token, byte in self._byte_of.items()}
    valid: list[int] = []
    written = (i for i in ids if i in self._written)
    for are_bytes, run in itertools.groupby(written, self._byte_of.__contains__):
      if are_bytes:
        text = bytes(self._byte_of[i] for i in run).decode("utf-8", "replace")
        valid += (token_of[byte] for byte in text.encode("utf-8"))
      else:
        valid += run
    return valid

  def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
    with _library_errors("encode a document"):
      # This uses all cores.
      encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [
      np.array([*self.bos_ids, *encoding.ids, self.eos_id], np.uint32) for encoding in encodings
    ]

  def save(self, folder: str) -> None:
    # The library's own `save` raises a bare Exception where the disk is full.
    write_atomically(os.path.join(folder, TOKENIZER_FILE), self._tokenizer.to_str(pretty=True))
    self.save_end(folder)

  def save_end(self, folder: str) -> None:
    """Records the token that ends a document beside tokenizer.json, unless it is the default."""
    if self._recorded_eos:
      document_end.record(folder, self._recorded_eos)


Tokenizer = ByteTokenizer | BPETokenizer


def _check_ids(tokenizer: tokenizers.Tokenizer) -> None:
  """Raises UsageError if an id is too large for any model."""
  vocabulary = tokenizer.get_vocab(with_added_tokens=True)
  token = max(vocabulary, key=lambda token: vocabulary[token], default="")
  if vocabulary.get(token, 0) > MAX_ID:
    raise UsageError(
      f"the token {token!r} has the id {vocabulary[token]}, expected at most {MAX_ID}"
    )


def _without_prefix(part: dict | None) -> dict | None:
  """Returns a normalizer or pre-tokenizer, as JSON, that puts nothing before a text."""
  if part is None or part["type"] == "Prepend":
    return None
  if part["type"] == "Sequence":
    name = "normalizers" if "normalizers" in part else "pretokenizers"
    return part | {name: [inner for inner in map(_without_prefix, part[name]) if inner is not None]}
  changes = {"add_prefix_space": False, "prepend_scheme": "never"}
  return part | {name: value for name, value in changes.items() if name in part}


def _beginning(tokenizer: tokenizers.Tokenizer) -> list[int]:
  """Returns the ids that the tokenizer's post-processor puts before a text."""
  try:
    plain, whole = (
      tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True)
    )
  except Exception:  # a vocabulary without this letter
    return tokenizer.encode("", add_special_tokens=True).ids
  for i in range(len(whole) - len(plain) + 1):
    if whole[i : i + len(plain)] == plain:
      return whole[:i]
  return []


def _byte_tokens(
  tokenizer: tokenizers.Tokenizer, content: dict
) -> tuple[dict[int, int], frozenset[int]]:
  """Returns {id: byte} of the tokens of single bytes, and all ids that have text when decoded.

  Both are empty unless the tokenizer has SentencePiece's byte fallback.
  """
  byte_of: dict[int, int] = {}
  for byte, token in enumerate(_BYTES):
    id_ = tokenizer.token_to_id(token)
    if id_ is None:
      return {}, frozenset()
    byte_of[id_] = byte
  if "ByteFallback" not in json.dumps(content["decoder"]):
    return {}, frozenset()
  special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
  return byte_of, frozenset(tokenizer.get_vocab(with_added_tokens=True).values()) - special


@contextlib.contextmanager
def _library_errors(action: str) -> Iterator[None]:
  """Turns errors of the library, and its panics, which are no Exceptions, into a UsageError."""
  try:
    yield
  except BaseException as error:
    is_library_error = isinstance(error, Exception) or type(error).__name__ == "PanicException"
    if isinstance(error, UsageError) or not is_library_error:
      raise
    reason = " ".join(str(error).split())
    raise UsageError(f"the tokenizer cannot {action}: {reason:.300}") from None


@contextlib.contextmanager
def _silent_panics() -> Iterator[None]:
  """Hides the process's stderr, to which the library would write the backtrace of a panic."""
  try:
    stderr = os.dup(2)
  except OSError:  # closed
    yield
    return
  try:
    with open(os.devnull, "wb") as nothing:
      os.dup2(nothing.fileno(), 2)
    yield
  finally:
    os.dup2(stderr, 2)
    os.close(stderr)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
  """Trains a byte-level BPE, which can encode any text, and decodes to exactly that text.

  Args:
    texts: the training documents.
    vocab_size: number of ids, the 256 bytes and eos included; a small corpus may yield fewer.
  Raises:
    UsageError: if vocab_size is below 257.
  """
  if vocab_size < 257:
    raise UsageError(
      f"vocab_size={vocab_size} of a trained BPE must be at least 257: the 256 "
      "bytes and the end of document"
    )
  import tokenizers

  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[EOS_TOKENS[0]],
    show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  tokenizer.train_from_iterator(texts, trainer)
  return BPETokenizer(tokenizer)


def load_tokenizer(source: str, fingerprint: str | None = None) -> Tokenizer:
  """Loads a tokenizer.

  Args:
    source: "byte", the path of a tokenizer.json, or a folder: one with a tokenizer.json, or token
      files of the byte tokenizer. A tokenizer.json of `byte_level` gives bytes too. The files
      beside a tokenizer.json say which token ends a document; see `sparsek.data.document_end`.
    fingerprint: if it is that of tokenizer.json alone, the files beside it are ignored, as older
      versions did when they imported models.
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
    raise UsageError(
      f"tokenizer {source!r}: found no file {path}; give 'byte', a tokenizer.json "
      "or a folder that holds one"
    )
  import tokenizers

  with _reading(path):
    tokenizer = tokenizers.Tokenizer.from_file(path)
    if fingerprint is not None:
      alone = BPETokenizer(tokenizers.Tokenizer.from_file(path))
      if alone.fingerprint == fingerprint:
        return alone
  eos = document_end.find(tokenizer, os.path.dirname(path))
  with _reading(path):
    loaded = BPETokenizer(tokenizer, eos)
  if loaded.vocab_size == ByteTokenizer.vocab_size and (
    loaded.fingerprint == BPETokenizer(byte_level()).fingerprint
  ):
    return ByteTokenizer()
  return loaded


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
  """Turns all errors of reading a tokenizer file into UsageErrors that name it."""
  try:
    with _silent_panics(), _library_errors("be used"):
      yield
  except UsageError as error:
    raise UsageError(f"tokenizer file {path} cannot be read: {error}") from None


def read_bos(record: dict, tokenizer: Tokenizer, path: str) -> list[int]:
  """Returns the ids that documents begin with, as meta.json and model.json record them.

  Args:
    record: the section "tokenizer" of either; in older files it has no "bos_ids", and documents
      begin with none.
    tokenizer: of the documents.
    path: of the file, for messages.
  Raises:
    UsageError: if these are no ids of the tokenizer.
  """
  ids = record.get("bos_ids", [])
  is_id = lambda i: type(i) is int and 0 <= i < tokenizer.vocab_size
  if not isinstance(ids, list) or not all(map(is_id, ids)):
    raise UsageError(
      f"{path}: bos_ids must be a list of ids from 0 to {tokenizer.vocab_size - 1}, "
      f"found {ids!r:.100}"
    )
  return ids


def describe_documents(tokenizer: Tokenizer, end: str | None = None) -> str:
  """Returns a sentence for people, such as "each document begins with <s> and ends with </s>".

  Args:
    tokenizer: of the documents.
    end: what ends them, by default the tokenizer's token.
  """
  begin = " ".join(map(tokenizer.token, tokenizer.bos_ids)) or "its text"
  end = end or tokenizer.token(tokenizer.eos_id)
  return f"each document begins with {begin} and ends with {end}"


def _is_byte_data(folder: str) -> bool:
  try:
    meta = read_json_object(os.path.join(folder, "meta.json"), max_bytes=1 << 30)
    return meta["tokenizer"]["name"] == ByteTokenizer.name
  except (UsageError, KeyError, TypeError):
    return False
