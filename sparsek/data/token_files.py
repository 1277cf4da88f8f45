"""Token files: a folder with tokenised documents, which is all that training needs.

tokens.bin      the ids of all documents one after the other, each ending with eos, and beginning
                with bos where meta.json says so; uint16, or uint32 if the vocabulary needs it
index.npy       int64 [num_documents + 1]: where each document starts in tokens.bin, in tokens
meta.json       format version, dtype, sizes, tokenizer, which documents are held out, checksums,
                sources
tokenizer.json  of a BPE; the byte tokenizer needs no file
documents.jsonl name, sha256, UTF-8 bytes and tokens of every document, in order, and whether it is
                held out; for people
uncounted.bin   a byte per token, 1 where the loss does not count it; only where documents have
                marked answers
"""

import array
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sparsek.config import check_choice
from sparsek.data.corpus import Document
from sparsek.data.tokenizer import (
  TOKENIZER_FILE,
  ByteTokenizer,
  Tokenizer,
  load_tokenizer,
  read_bos,
)
from sparsek.errors import RunError, UsageError
from sparsek.storage.files import check_regular, read_json_object, reason_of
from sparsek.storage.new_folder import new_folder

FORMAT = "sparsek-tokens"
FORMAT_VERSION = 1
TOKENS_FILE, INDEX_FILE, META_FILE, DOCUMENTS_FILE, UNCOUNTED_FILE = (
  "tokens.bin",
  "index.npy",
  "meta.json",
  "documents.jsonl",
  "uncounted.bin",
)
SPLITS = ("train", "heldout")
_META_TYPES = {
  "dtype": str,
  "num_tokens": int,
  "num_documents": int,
  "num_bytes": dict,
  "num_counted": dict,
  "vocab_size": int,
  "tokenizer": dict,
  "heldout": list,
  "sha256": dict,
}
_META_CHECKSUM = "meta_sha256"
_MAX_META_BYTES = 1 << 30  # it lists the held-out documents, up to some 10^8 of them
_CHARACTERS_AT_ONCE = 1 << 22


class TokenSplit:
  """The documents of one side of the split.

  Attributes:
    name: "train" or "heldout".
    starts, lengths: int64 [num_documents], of each document in tokens.bin; a length counts its eos.
    num_tokens, num_documents: totals.
    vocab_size: ids are below this.
    num_counted, num_bytes: tokens that the loss counts and the UTF-8 bytes of their text, so that
      bits per byte = nats per token * num_counted / num_bytes / ln 2. All tokens and texts, but for
      documents with marked answers.
    marked: there are such documents.
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
    """The ids of document i, eos last: a view of the file, which reads nothing yet."""
    start = int(self.starts[i])
    return self._tokens[start : start + int(self.lengths[i])]

  def uncounted(self, i: int) -> np.ndarray:
    """For each id of document i, whether the loss leaves it out; bool; only where the split is
    `marked`.
    """
    start = int(self.starts[i])
    return self._uncounted[start : start + int(self.lengths[i])]

  def check_ids(self, i: int) -> None:
    """Raises RunError, naming file and place, where document i has an id beyond the vocabulary."""
    wrong = np.flatnonzero(self.document(i) >= self.vocab_size)
    if len(wrong):
      offset = int(self.starts[i]) + int(wrong[0])
      document = f"document {i} of the {self.name} split"
      document += _name_of(self._folder, int(self.starts[i]))
      raise RunError(
        f"token file {os.path.join(self._folder, TOKENS_FILE)} is damaged: the id "
        f"{self._tokens[offset]} at token {offset} (token {wrong[0]} of {document}) "
        f"is not below the vocabulary's {self.vocab_size}; `python -m "
        f"experiments.prepare_data --verify={self._folder}` compares all checksums"
      )


@dataclasses.dataclass(frozen=True)
class TokenDataset:
  """Opened token files.

  Attributes:
    folder: where they are.
    tokenizer: with which they were made.
    fingerprint: sha256 of the tokens, the document offsets and what the loss leaves out, in hex.
  """

  folder: str
  tokenizer: Tokenizer
  fingerprint: str
  _splits: dict[str, TokenSplit]

  @property
  def vocab_size(self) -> int:
    return self.tokenizer.vocab_size

  def split(self, name: str) -> TokenSplit:
    """The documents of "train" or "heldout"."""
    check_choice("split", name, SPLITS)
    return self._splits[name]


def write_token_files(
  folder: str, documents: Iterable[Document], tokenizer: Tokenizer, sources: Sequence[str] = ()
) -> None:
  """Tokenises documents into a new folder, which appears complete or not at all.

  Args:
    folder: to be made; its parents too.
    documents: at least one.
    tokenizer: encodes them.
    sources: recorded in meta.json.

  Raises:
    UsageError: if the folder is there already, or there is no document.
    RunError: if it cannot be written.
  """
  check_new(folder)
  with new_folder(folder, alone=False) as unfinished:
    _write(unfinished, documents, tokenizer, sources)


def check_new(folder: str) -> None:
  """Raises UsageError if there is something at this path."""
  if os.path.lexists(folder):
    raise UsageError(f"folder {folder} is there already; remove it or name another one")


def check_can_make(folder: str) -> None:
  """Raises UsageError unless a new folder can be made at this path; makes nothing that stays."""
  check_new(folder)
  parent = os.path.dirname(os.path.abspath(folder))
  while not os.path.lexists(parent):
    parent = os.path.dirname(parent)
  try:
    with tempfile.TemporaryFile(dir=parent):  # without a name, which a kill would leave
      pass
  except OSError as error:
    raise UsageError(
      f"folder {folder} cannot be written: {reason_of(error)} (in {parent})"
    ) from None


def _write(
  folder: str, documents: Iterable[Document], tokenizer: Tokenizer, sources: Sequence[str]
) -> None:
  dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
  offsets, held_out, marked = array.array("q", [0]), array.array("b"), False
  # of tokens that the loss counts, of bytes of their text
  sums = {name: np.zeros(2, np.int64) for name in SPLITS}
  tokens_path, documents_path, uncounted_path = (
    os.path.join(folder, name) for name in (TOKENS_FILE, DOCUMENTS_FILE, UNCOUNTED_FILE)
  )
  with (
    open(tokens_path, "wb") as file,
    open(documents_path, "w", encoding="utf-8") as listed,
    open(uncounted_path, "wb") as marks,
  ):
    for group in _groups(documents):
      whole = iter(
        tokenizer.encode_documents(
          [document.text for document in group if document.answers is None]
        )
      )
      for document in group:
        content = document.text.encode("utf-8")
        if document.answers is None:
          ids, counted_bytes = next(whole), len(content)
          num_counted = len(ids) - len(tokenizer.bos_ids)  # nothing predicts them
        else:
          ids, uncounted, counted_bytes = _encode_marked(document, tokenizer)
          num_counted, marked = len(ids) - np.count_nonzero(uncounted), True
          marks.seek(offsets[-1])  # what is skipped reads as zeros
          marks.write(uncounted.data)
        file.write(ids.astype(dtype).data)
        offsets.append(offsets[-1] + len(ids))
        held_out.append(document.held_out)
        sums[SPLITS[document.held_out]] += num_counted, counted_bytes
        listed.write(
          json.dumps(
            {
              "name": document.name,
              "sha256": hashlib.sha256(content).hexdigest(),
              "bytes": len(content),
              "tokens": len(ids),
              "held_out": document.held_out,
            }
          )
          + "\n"
        )
    marks.truncate(offsets[-1])
  if not held_out:
    raise UsageError("no documents to write")
  if not marked:
    os.remove(uncounted_path)
  np.save(os.path.join(folder, INDEX_FILE), np.array(offsets, np.int64))
  tokenizer.save(folder)
  meta = {
    "format": FORMAT,
    "format_version": FORMAT_VERSION,
    "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
    "num_tokens": offsets[-1],
    "num_documents": len(held_out),
    **{
      name: {split: int(sums[split][i]) for split in SPLITS}
      for i, name in enumerate(("num_counted", "num_bytes"))
    },
    "vocab_size": tokenizer.vocab_size,
    "tokenizer": {
      "name": tokenizer.name,
      "fingerprint": tokenizer.fingerprint,
      "bos_ids": tokenizer.bos_ids,
      "eos_id": tokenizer.eos_id,
    },
    "sources": list(sources),
    "versions": {
      "python": platform.python_version(),
      "tokenizers": importlib.metadata.version("tokenizers"),
    },
    "heldout": np.flatnonzero(held_out).tolist(),
    "sha256": {name: _sha256(os.path.join(folder, name)) for name in sorted(os.listdir(folder))},
  }
  meta[_META_CHECKSUM] = _meta_digest(meta)
  with open(os.path.join(folder, META_FILE), "w", encoding="utf-8") as file:
    json.dump(meta, file, indent=1)
    file.write("\n")


def _encode_marked(document: Document, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, int]:
  """Its ids, which of them the loss leaves out, and the bytes of the others; no token reaches over
  the border of an answer.
  """
  ids, counted_bytes, at = list(tokenizer.bos_ids), 0, 0
  uncounted = [True] * len(ids)
  for begin, end in document.answers + ((len(document.text),) * 2,):
    for piece, is_answer in ((document.text[at:begin], False), (document.text[begin:end], True)):
      found = tokenizer.encode(piece, continues=len(ids) > len(tokenizer.bos_ids))
      ids += found
      uncounted += [not is_answer] * len(found)
      counted_bytes += is_answer * len(piece.encode("utf-8"))
    at = end
  return np.array(ids + [tokenizer.eos_id]), np.array(uncounted + [True]), counted_bytes


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
  """Lists of documents of a few million characters, which a tokenizer can encode in parallel."""
  group, characters = [], 0
  for document in documents:
    group.append(document)
    characters += len(document.text)
    if characters >= _CHARACTERS_AT_ONCE:
      yield group
      group, characters = [], 0
  if group:
    yield group


def _sha256(path: str) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def open_token_files(folder: str) -> TokenDataset:
  """Opens a folder of token files; checks sizes and everything small, but not the checksum of the
  tokens (see `verify_token_files`).

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
    # As a plain array, since slicing a memmap is several times slower.
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
      starts[chosen],
      lengths[chosen],
      meta["num_bytes"][name],
      meta["vocab_size"],
      uncounted,
      meta["num_counted"].get(name),
    )
    for name, chosen in (("train", ~held_out), ("heldout", held_out))
  }
  checksums = (meta["sha256"].get(name, "") for name in (TOKENS_FILE, INDEX_FILE, UNCOUNTED_FILE))
  fingerprint = hashlib.sha256("".join(checksums).encode()).hexdigest()
  return TokenDataset(folder, _read_tokenizer(folder, meta), fingerprint, splits)


def _name_of(folder: str, start: int) -> str:
  """Returns the name of the document that starts there, for a message, or "" if not known."""
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
  """Opens a folder, reads every file through and compares the checksums.

  Raises:
    UsageError: naming the file, what was expected and what was found.
  """
  dataset = open_token_files(folder)
  for name, expected in _read_meta(folder)["sha256"].items():
    _check_sha256(os.path.join(folder, name), expected)
  return dataset


def check_same(folder: str, expected_path: str) -> None:
  """Compares the tokens, the tokenizer and the split of token files with those of other ones, by
  the meta.json of each.

  Raises:
    RunError: naming what differs, and the versions that made both.
    UsageError: if `expected_path` cannot be read or is no meta.json.
  """
  found, expected = _read_meta(folder), read_meta(expected_path)
  flat = lambda meta: {
    **{key: meta[key] for key in ("num_documents", "num_tokens", "heldout")},
    **meta["sha256"],
    DOCUMENTS_FILE: None,
  }
  found_values, expected_values = flat(found), flat(expected)
  differing = [
    key
    for key in sorted({*found_values, *expected_values})
    if found_values.get(key) != expected_values.get(key)
  ]
  if differing:
    raise RunError(
      f"{folder} differs from {expected_path} in {', '.join(differing)}; made with "
      f"{found.get('versions')}, there {expected.get('versions')}"
    )


def _check_sha256(path: str, expected: str) -> None:
  check_regular(path)
  try:
    found = _sha256(path)
  except OSError as error:
    raise UsageError(f"file {path} cannot be read: {error.strerror}") from error
  if found != expected:
    raise UsageError(f"file {path} is damaged: expected sha256 {expected}, found {found}")


def _read_meta(folder: str) -> dict:
  path = os.path.join(folder, META_FILE)
  if not os.path.isdir(folder):
    raise UsageError(
      f"data {folder!r}: no such folder; make it with `python -m "
      "experiments.prepare_data`, or use 'stdlib'"
    )
  return read_meta(path)


def read_meta(path: str) -> dict:
  """Returns what a meta.json holds. Raises UsageError where it cannot be read or is damaged."""
  try:
    meta = read_json_object(path, _MAX_META_BYTES)
  except UsageError as error:
    raise UsageError(f"{error}; is it of a folder that experiments.prepare_data wrote?") from None
  found = (meta.get("format"), meta.get("format_version"))
  if found != (FORMAT, FORMAT_VERSION):
    raise UsageError(
      f"file {path}: expected format {FORMAT} version {FORMAT_VERSION}, found "
      f"format {found[0]!r:.50} version {found[1]!r:.50}"
    )
  meta.setdefault("num_counted", {})  # not in older files, where all tokens count
  damage = _damage_of(meta)
  if damage:
    raise UsageError(f"file {path} is damaged: expected {damage}")
  return meta


def _damage_of(meta: dict) -> str:
  """Returns what is expected and what is found where they differ, and "" of a good meta.json."""
  for key, kind in _META_TYPES.items():
    if type(meta.get(key)) is not kind:
      return f"{key!r} of type {kind.__name__}, found {meta.get(key)!r:.50}"
  named = {
    "num_bytes": SPLITS,
    "sha256": (TOKENS_FILE, INDEX_FILE),
    "tokenizer": ("name", "fingerprint"),
  }
  for key, names in named.items():
    if not set(names) <= set(meta[key]):
      return f"{', '.join(names)} in {key!r}, found {', '.join(map(ascii, meta[key])) or 'nothing'}"
  for key, kind in {"num_bytes": int, "num_counted": int, "sha256": str, "tokenizer": str}.items():
    names = named["tokenizer"] if key == "tokenizer" else meta[key]
    wrong = next((name for name in names if type(meta[key][name]) is not kind), None)
    if wrong is not None:
      return f"{kind.__name__} in {key!r}, found {meta[key][wrong]!r:.50} as {wrong!r:.50}"
  sizes = [
    *(meta[key] for key in ("num_tokens", "num_documents", "vocab_size")),
    *meta["num_bytes"].values(),
    *meta["num_counted"].values(),
  ]
  wrong = next((size for size in sizes if not 0 <= size < 2**63), None)
  if wrong is not None:
    return f"sizes of 0 to 2^63 - 1, found {wrong!r:.50}"
  if meta["dtype"] not in ("uint16", "uint32"):
    return f"dtype uint16 or uint32, found {meta['dtype']!r:.50}"
  is_name = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*").fullmatch
  wrong = next((name for name in meta["sha256"] if not is_name(name)), None)
  if wrong is not None:
    return f"names of files in this folder in 'sha256', found {wrong!r:.50}"
  documents = range(meta["num_documents"])
  wrong = next((i for i in meta["heldout"] if type(i) is not int or i not in documents), None)
  if wrong is not None:
    return f"held-out documents from 0 to {meta['num_documents'] - 1}, found {wrong!r:.50}"
  expected = meta.get(_META_CHECKSUM, digest := _meta_digest(meta))  # older files have none
  return "" if expected == digest else f"{_META_CHECKSUM} {expected!r:.70}, found {digest}"


def _meta_digest(meta: dict) -> str:
  """Returns the sha256 of all that a meta.json says, but for this checksum."""
  content = {key: value for key, value in meta.items() if key != _META_CHECKSUM}
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_index(folder: str, meta: dict) -> np.ndarray:
  path = os.path.join(folder, INDEX_FILE)
  _check_sha256(path, meta["sha256"][INDEX_FILE])
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
  if meta["tokenizer"]["name"] == ByteTokenizer.name:
    tokenizer = ByteTokenizer()
    if tokenizer.fingerprint != meta["tokenizer"]["fingerprint"]:
      raise UsageError(
        f"file {os.path.join(folder, META_FILE)}: made with another byte tokenizer (fingerprint "
        f"{meta['tokenizer']['fingerprint']}) than this version's ({tokenizer.fingerprint})"
      )
  else:
    # The checksum of the file, not the fingerprint, which another version of the tokenizers library
    # could compute differently.
    path = os.path.join(folder, TOKENIZER_FILE)
    _check_sha256(path, meta["sha256"].get(TOKENIZER_FILE, "of meta.json, which has none"))
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
