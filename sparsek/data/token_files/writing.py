"""Writing token files."""

import array
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sparsek.data.corpus import Document
from sparsek.data.token_files.format import (
  DOCUMENTS_FILE,
  FORMAT,
  FORMAT_VERSION,
  INDEX_FILE,
  META_CHECKSUM,
  META_FILE,
  SPLITS,
  TOKENS_FILE,
  UNCOUNTED_FILE,
  meta_digest,
  sha256_of,
)
from sparsek.data.tokenizer import Tokenizer
from sparsek.errors import UsageError
from sparsek.storage.files import reason_of
from sparsek.storage.new_folder import check_new_folder, new_folder

_CHARACTERS_AT_ONCE = 1 << 22


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
    UsageError: if the folder is not empty, or there is no document.
    RunError: if it cannot be written.
  """
  with new_folder(folder, alone=False) as unfinished:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    totals = _write_documents(unfinished, documents, tokenizer, dtype)
    np.save(os.path.join(unfinished, INDEX_FILE), np.array(totals.offsets, np.int64))
    tokenizer.save(unfinished)
    _write_meta(unfinished, totals, tokenizer, dtype, sources)


def check_can_make(folder: str) -> None:
  """Raises UsageError unless a new folder can be made at this path; makes nothing that stays."""
  check_new_folder(folder)
  parent = os.path.dirname(os.path.abspath(folder))
  while not os.path.lexists(parent):
    parent = os.path.dirname(parent)
  try:
    with tempfile.TemporaryFile(dir=parent):  # has no name, so that a killed process leaves nothing
      pass
  except OSError as error:
    raise UsageError(
      f"folder {folder} cannot be written: {reason_of(error)} (in {parent})"
    ) from None


@dataclasses.dataclass
class _Totals:
  """Sizes of the documents written so far.

  Attributes:
    offsets: where each document starts, and where the last one ends, in tokens.
    held_out: of each document, whether it is held out.
    num_counted: by split, tokens that the loss counts.
    num_bytes: by split, UTF-8 bytes of the text of these tokens.
  """

  offsets: array.array = dataclasses.field(default_factory=lambda: array.array("q", [0]))
  held_out: array.array = dataclasses.field(default_factory=lambda: array.array("b"))
  num_counted: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
  num_bytes: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))


def _write_documents(
  folder: str, documents: Iterable[Document], tokenizer: Tokenizer, dtype: np.dtype
) -> _Totals:
  """Writes tokens.bin, documents.jsonl and, where documents have marked answers, uncounted.bin."""
  totals, any_marked = _Totals(), False
  tokens_path, documents_path, uncounted_path = (
    os.path.join(folder, name) for name in (TOKENS_FILE, DOCUMENTS_FILE, UNCOUNTED_FILE)
  )
  with (
    open(tokens_path, "wb") as tokens_file,
    open(documents_path, "w", encoding="utf-8") as documents_file,
    open(uncounted_path, "wb") as uncounted_file,
  ):
    for group in _groups(documents):
      unmarked = [document.text for document in group if document.answers is None]
      encoded = iter(tokenizer.encode_documents(unmarked))
      for document in group:
        content = document.text.encode("utf-8")
        if document.answers is None:
          ids, counted_bytes = next(encoded), len(content)
          num_counted = len(ids) - len(tokenizer.bos_ids)  # nothing predicts bos
        else:
          ids, uncounted, counted_bytes = _encode_marked(document.text, document.answers, tokenizer)
          num_counted, any_marked = len(ids) - int(np.count_nonzero(uncounted)), True
          uncounted_file.seek(totals.offsets[-1])  # the bytes that this skips read as zeros
          uncounted_file.write(uncounted.data)
        tokens_file.write(ids.astype(dtype).data)
        totals.offsets.append(totals.offsets[-1] + len(ids))
        totals.held_out.append(document.held_out)
        split = SPLITS[document.held_out]
        totals.num_counted[split] += num_counted
        totals.num_bytes[split] += counted_bytes
        line = {
          "name": document.name,
          "sha256": hashlib.sha256(content).hexdigest(),
          "bytes": len(content),
          "tokens": len(ids),
          "held_out": document.held_out,
        }
        documents_file.write(json.dumps(line) + "\n")
    uncounted_file.truncate(totals.offsets[-1])
  if not totals.held_out:
    raise UsageError("no documents to write")
  if not any_marked:
    os.remove(uncounted_path)
  return totals


def _write_meta(
  folder: str, totals: _Totals, tokenizer: Tokenizer, dtype: np.dtype, sources: Sequence[str]
) -> None:
  """Writes meta.json, with the checksums of all other files in the folder."""
  meta = {
    "format": FORMAT,
    "format_version": FORMAT_VERSION,
    "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
    "num_tokens": totals.offsets[-1],
    "num_documents": len(totals.held_out),
    "num_counted": totals.num_counted,
    "num_bytes": totals.num_bytes,
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
    "heldout": np.flatnonzero(totals.held_out).tolist(),
    "sha256": {name: sha256_of(os.path.join(folder, name)) for name in sorted(os.listdir(folder))},
  }
  meta[META_CHECKSUM] = meta_digest(meta)
  with open(os.path.join(folder, META_FILE), "w", encoding="utf-8") as file:
    json.dump(meta, file, indent=1)
    file.write("\n")


def _encode_marked(
  text: str, answers: Sequence[tuple[int, int]], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, int]:
  """Returns the ids of a text with marked answers; no token crosses the border of an answer.

  Returns:
    the ids; a bool for each, True where the loss does not count it; and the number of UTF-8 bytes
    of the answers.
  """
  ids, counted_bytes, position = list(tokenizer.bos_ids), 0, 0
  uncounted = [True] * len(ids)
  for begin, end in (*answers, (len(text), len(text))):
    for piece, is_answer in ((text[position:begin], False), (text[begin:end], True)):
      piece_ids = tokenizer.encode(piece, continues=len(ids) > len(tokenizer.bos_ids))
      ids += piece_ids
      uncounted += [not is_answer] * len(piece_ids)
      counted_bytes += is_answer * len(piece.encode("utf-8"))
    position = end
  return np.array(ids + [tokenizer.eos_id]), np.array(uncounted + [True]), counted_bytes


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
  """Yields lists of documents of a few million characters, to be encoded in parallel."""
  group: list[Document] = []
  characters = 0
  for document in documents:
    group.append(document)
    characters += len(document.text)
    if characters >= _CHARACTERS_AT_ONCE:
      yield group
      group, characters = [], 0
  if group:
    yield group
