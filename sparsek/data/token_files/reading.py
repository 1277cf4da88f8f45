"""Reading token files, with checks of everything that is read."""

import dataclasses
import hashlib
import itertools
import json
import os

import numpy as np

from sparsek.command_line.invocation import command
from sparsek.config import check_choice
from sparsek.data.token_files.format import (
  DOCUMENTS_FILE,
  INDEX_FILE,
  META_FILE,
  SPLITS,
  TOKENS_FILE,
  UNCOUNTED_FILE,
  check_sha256,
  read_meta,
)
from sparsek.data.tokenizer import (
  TOKENIZER_FILE,
  ByteTokenizer,
  Tokenizer,
  load_tokenizer,
  read_bos,
)
from sparsek.errors import RunError, UsageError
from sparsek.storage.files import check_regular


class TokenSplit:
  """The documents of one side of the split.

  Attributes:
    name: "train" or "heldout".
    starts, lengths: int64 [num_documents], of each document in tokens.bin; a length counts its eos.
    num_tokens, num_documents: totals.
    vocab_size: ids are below this.
    num_counted, num_bytes: number of tokens that the loss counts, and of UTF-8 bytes of their text,
      so that bits per byte = nats per token * num_counted / num_bytes / ln 2. The loss counts all
      tokens, except in documents with marked answers.
    marked: True if there are documents with marked answers.
  """

  def __init__(
    self,
    name: str,
    folder: str,
    tokens: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    num_bytes: int,
    vocab_size: int,
    uncounted: np.ndarray | None = None,
    num_counted: int | None = None,
  ):
    self.name = name
    self._folder = folder
    self.vocab_size = vocab_size
    self.starts = starts
    self.lengths = lengths
    self.num_tokens = int(lengths.sum())
    self.num_documents = len(lengths)
    self.num_bytes = num_bytes
    self.num_counted = self.num_tokens if num_counted is None else num_counted
    self.marked = uncounted is not None
    self._tokens, self._uncounted = tokens, uncounted

  def document(self, i: int) -> np.ndarray:
    """Returns the ids of document i, eos last: a view of the file, which reads nothing yet."""
    start = int(self.starts[i])
    return self._tokens[start : start + int(self.lengths[i])]

  def uncounted(self, i: int) -> np.ndarray:
    """Returns a bool for each id of document i, True where the loss does not count it.

    Only for a split that is `marked`.
    """
    assert self._uncounted is not None, f"the {self.name} split has no marked answers"
    start = int(self.starts[i])
    return self._uncounted[start : start + int(self.lengths[i])]

  def check_ids(self, i: int) -> None:
    """Raises RunError, with file and position, if document i has an id outside the vocabulary."""
    wrong = np.flatnonzero(self.document(i) >= self.vocab_size)
    if len(wrong):
      offset = int(self.starts[i]) + int(wrong[0])
      document = f"document {i} of the {self.name} split"
      document += _name_of(self._folder, int(self.starts[i]))
      raise RunError(
        f"token file {os.path.join(self._folder, TOKENS_FILE)} is damaged: the id "
        f"{self._tokens[offset]} at token {offset} (token {wrong[0]} of {document}) "
        f"is not below the vocabulary's {self.vocab_size}; "
        f"`{command('prepare_data', f'--verify={self._folder}')}` compares all checksums"
      )


@dataclasses.dataclass(frozen=True)
class TokenDataset:
  """Opened token files.

  Attributes:
    folder: where they are.
    tokenizer: the one that made them.
    fingerprint: sha256 in hex of the tokens, the document offsets and the marked answers.
  """

  folder: str
  tokenizer: Tokenizer
  fingerprint: str
  _splits: dict[str, TokenSplit]

  @property
  def vocab_size(self) -> int:
    return self.tokenizer.vocab_size

  def split(self, name: str) -> TokenSplit:
    """Returns the documents of "train" or "heldout"."""
    check_choice("split", name, SPLITS)
    return self._splits[name]


def open_token_files(folder: str) -> TokenDataset:
  """Opens a folder of token files.

  Checks sizes and all small files, but not the checksum of the tokens; see `verify_token_files`.

  Raises:
    UsageError: naming the file, what was expected and what was found.
  """
  meta = _read_meta(folder)
  index = _read_index(folder, meta)
  tokens_path = os.path.join(folder, TOKENS_FILE)
  dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])
  try:
    size = os.path.getsize(tokens_path)
    if size != meta["num_tokens"] * dtype.itemsize:
      raise UsageError(
        f"token file {tokens_path} is damaged: expected "
        f"{meta['num_tokens'] * dtype.itemsize} bytes "
        f"({meta['num_tokens']} tokens of {meta['dtype']}), found {size}"
      )
    # A plain array, since slicing a memmap is several times slower.
    tokens = np.memmap(tokens_path, dtype, mode="r").view(np.ndarray)
  except OSError as error:
    raise UsageError(f"token file {tokens_path} cannot be read: {error.strerror}") from error
  uncounted = _open_uncounted(folder, meta) if UNCOUNTED_FILE in meta["sha256"] else None
  held_out = np.zeros(meta["num_documents"], bool)
  held_out[meta["heldout"]] = True
  starts, lengths = index[:-1], np.diff(index)
  splits = {
    name: TokenSplit(
      name,
      folder,
      tokens,
      starts[in_split],
      lengths[in_split],
      meta["num_bytes"][name],
      meta["vocab_size"],
      uncounted,
      meta["num_counted"].get(name),
    )
    for name, in_split in (("train", ~held_out), ("heldout", held_out))
  }
  checksums = (meta["sha256"].get(name, "") for name in (TOKENS_FILE, INDEX_FILE, UNCOUNTED_FILE))
  fingerprint = hashlib.sha256("".join(checksums).encode()).hexdigest()
  return TokenDataset(folder, _read_tokenizer(folder, meta), fingerprint, splits)


def _name_of(folder: str, start: int) -> str:
  """Returns ", NAME" of the document that starts at this token, or "" if it is not known."""
  try:
    number = np.flatnonzero(np.load(os.path.join(folder, INDEX_FILE)) == start)[0]
    check_regular(path := os.path.join(folder, DOCUMENTS_FILE))
    with open(path, "rb") as file:
      return f", {json.loads(next(itertools.islice(file, number, None)))['name']!r}"
  except (OSError, ValueError, LookupError, StopIteration):  # older folders have no such file
    return ""


def _open_uncounted(folder: str, meta: dict) -> np.ndarray:
  path = os.path.join(folder, UNCOUNTED_FILE)
  try:
    if (size := os.path.getsize(path)) != meta["num_tokens"]:
      raise UsageError(f"file {path} is damaged: expected {meta['num_tokens']} bytes, found {size}")
    return np.memmap(path, bool, mode="r").view(np.ndarray)
  except OSError as error:
    raise UsageError(f"file {path} cannot be read: {error.strerror}") from error


def verify_token_files(folder: str) -> TokenDataset:
  """Opens a folder of token files and compares the checksums of all files.

  Raises:
    UsageError: naming the file, what was expected and what was found.
  """
  dataset = open_token_files(folder)
  for name, expected in _read_meta(folder)["sha256"].items():
    check_sha256(os.path.join(folder, name), expected)
  return dataset


def check_same(folder: str, expected_path: str) -> None:
  """Compares the tokens, the tokenizer and the split of two token files by their meta.json.

  Args:
    folder: of the token files.
    expected_path: the meta.json of the others.
  Raises:
    RunError: naming what differs, and the versions that made both.
    UsageError: if `expected_path` cannot be read or is no meta.json.
  """
  actual, expected = _read_meta(folder), read_meta(expected_path)
  actual_values, expected_values = _compared_values(actual), _compared_values(expected)
  differing = [
    key
    for key in sorted({*actual_values, *expected_values})
    if actual_values.get(key) != expected_values.get(key)
  ]
  if differing:
    raise RunError(
      f"{folder} differs from {expected_path} in {', '.join(differing)}; made with "
      f"{actual.get('versions')}, there {expected.get('versions')}"
    )


def _compared_values(meta: dict) -> dict:
  sizes = {key: meta[key] for key in ("num_documents", "num_tokens", "heldout")}
  # documents.jsonl is not compared: it holds the names of files, which may differ.
  return {**sizes, **meta["sha256"], DOCUMENTS_FILE: None}


def _read_meta(folder: str) -> dict:
  path = os.path.join(folder, META_FILE)
  if os.path.isfile(folder):
    make = command("prepare_data", f"--sources={folder}", "--output=FOLDER")
    raise UsageError(f"data {folder!r} is a file; `{make}` makes a folder of token files from it")
  if not os.path.isdir(folder):
    raise UsageError(
      f"data {folder!r}: no such folder; make it with `{command('prepare_data')}`, or use 'stdlib'"
    )
  return read_meta(path)


def _read_index(folder: str, meta: dict) -> np.ndarray:
  path = os.path.join(folder, INDEX_FILE)
  check_sha256(path, meta["sha256"][INDEX_FILE])
  try:
    index = np.load(path, allow_pickle=False)
  except OSError as error:
    raise UsageError(f"file {path} cannot be read: {error.strerror or error}") from error
  except (ValueError, EOFError) as error:
    raise UsageError(f"file {path} is damaged: expected an array, found: {error}") from error
  expected = (meta["num_documents"] + 1,)
  if index.dtype != np.int64 or index.shape != expected:
    raise UsageError(
      f"file {path} is damaged: expected int64 of shape {expected}, found "
      f"{index.dtype} of shape {index.shape}"
    )
  if (
    len(index) < 2
    or index[0] != 0
    or index[-1] != meta["num_tokens"]
    or not np.all(np.diff(index) > 0)
  ):
    raise UsageError(
      f"file {path} is damaged: expected rising offsets from 0 to {meta['num_tokens']}, "
      f"found {index[0]} to {index[-1]}"
    )
  return index


def _read_tokenizer(folder: str, meta: dict) -> Tokenizer:
  tokenizer: Tokenizer
  if meta["tokenizer"]["name"] == ByteTokenizer.name:
    tokenizer = ByteTokenizer()
    if tokenizer.fingerprint != meta["tokenizer"]["fingerprint"]:
      raise UsageError(
        f"file {os.path.join(folder, META_FILE)}: made with another byte tokenizer (fingerprint "
        f"{meta['tokenizer']['fingerprint']}) than this version's ({tokenizer.fingerprint})"
      )
  else:
    # Compares the checksum of the file, not the fingerprint, which another version of the
    # tokenizers library could compute differently.
    path = os.path.join(folder, TOKENIZER_FILE)
    check_sha256(path, meta["sha256"].get(TOKENIZER_FILE, "of meta.json, which has none"))
    tokenizer = load_tokenizer(path)
  ending = meta["tokenizer"].get("eos_id", tokenizer.eos_id)  # not in older files
  if tokenizer.eos_id != ending:
    raise UsageError(
      f"folder {folder}: its documents end with token {ending}, and the files "
      f"beside {TOKENIZER_FILE} name {tokenizer.eos_id}"
    )
  if tokenizer.vocab_size != meta["vocab_size"]:
    raise UsageError(
      f"folder {folder}: expected a tokenizer with {meta['vocab_size']} ids, found "
      f"{tokenizer.vocab_size}"
    )
  tokenizer.bos_ids = read_bos(meta["tokenizer"], tokenizer, os.path.join(folder, META_FILE))
  return tokenizer
