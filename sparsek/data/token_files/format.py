"""The names of token files, and meta.json with its checks."""

import hashlib
import json
import re

from sparsek.command_line.invocation import command
from sparsek.errors import UsageError
from sparsek.storage.files import check_regular, read_json_object

FORMAT = "sparsek-tokens"
FORMAT_VERSION = 1
TOKENS_FILE = "tokens.bin"
INDEX_FILE = "index.npy"
META_FILE = "meta.json"
DOCUMENTS_FILE = "documents.jsonl"
UNCOUNTED_FILE = "uncounted.bin"
SPLITS = ("train", "heldout")
META_CHECKSUM = "meta_sha256"
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
# Keys that a section of meta.json must have.
_REQUIRED_KEYS = {
  "num_bytes": SPLITS,
  "sha256": (TOKENS_FILE, INDEX_FILE),
  "tokenizer": ("name", "fingerprint"),
}
_MAX_META_BYTES = 1 << 30  # it lists the held-out documents, up to some 10^8 of them
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def read_meta(path: str) -> dict:
  """Returns the content of a meta.json.

  Raises:
    UsageError: where it cannot be read or is damaged.
  """
  try:
    meta = read_json_object(path, _MAX_META_BYTES)
  except UsageError as error:
    made_by = command("prepare_data")
    raise UsageError(f"{error}; is it of a folder that `{made_by}` wrote?") from None
  name, version = meta.get("format"), meta.get("format_version")
  if (name, version) != (FORMAT, FORMAT_VERSION):
    raise UsageError(
      f"file {path}: expected format {FORMAT} version {FORMAT_VERSION}, found "
      f"format {name!r:.50} version {version!r:.50}"
    )
  meta.setdefault("num_counted", {})  # not in older files, where all tokens count
  damage = _damage_of(meta)
  if damage:
    raise UsageError(f"file {path} is damaged: expected {damage}")
  return meta


def meta_digest(meta: dict) -> str:
  """Returns the sha256 of everything in a meta.json except this checksum itself."""
  content = {key: value for key, value in meta.items() if key != META_CHECKSUM}
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256_of(path: str) -> str:
  """Returns the sha256 of a file in hex."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: str, expected: str) -> None:
  """Raises UsageError unless the file can be read and has this sha256."""
  check_regular(path)
  try:
    actual = sha256_of(path)
  except OSError as error:
    raise UsageError(f"file {path} cannot be read: {error.strerror}") from error
  if actual != expected:
    raise UsageError(f"file {path} is damaged: expected sha256 {expected}, found {actual}")


def _damage_of(meta: dict) -> str:
  """Returns a description of the first damage, "EXPECTED, found ACTUAL", or "" if there is none."""
  damage = _wrong_type(meta) or _wrong_value(meta)
  if damage:
    return damage
  digest = meta_digest(meta)
  expected = meta.get(META_CHECKSUM, digest)  # older files have none
  return "" if expected == digest else f"{META_CHECKSUM} {expected!r:.70}, found {digest}"


def _wrong_type(meta: dict) -> str:
  """Returns a description of the first missing key or value of a wrong type, or ""."""
  for key, kind in _META_TYPES.items():
    if type(meta.get(key)) is not kind:
      return f"{key!r} of type {kind.__name__}, found {meta.get(key)!r:.50}"
  for key, names in _REQUIRED_KEYS.items():
    if not set(names) <= set(meta[key]):
      return f"{', '.join(names)} in {key!r}, found {', '.join(map(ascii, meta[key])) or 'nothing'}"
  for key, kind in {"num_bytes": int, "num_counted": int, "sha256": str, "tokenizer": str}.items():
    checked = _REQUIRED_KEYS["tokenizer"] if key == "tokenizer" else meta[key]
    wrong = next((name for name in checked if type(meta[key][name]) is not kind), None)
    if wrong is not None:
      return f"{kind.__name__} in {key!r}, found {meta[key][wrong]!r:.50} as {wrong!r:.50}"
  return ""


def _wrong_value(meta: dict) -> str:
  """Returns a description of the first value out of range, or ""; the types are right."""
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
  wrong = next((name for name in meta["sha256"] if not _FILE_NAME.fullmatch(name)), None)
  if wrong is not None:
    return f"names of files in this folder in 'sha256', found {wrong!r:.50}"
  documents = range(meta["num_documents"])
  wrong = next((i for i in meta["heldout"] if type(i) is not int or i not in documents), None)
  if wrong is not None:
    return f"held-out documents from 0 to {meta['num_documents'] - 1}, found {wrong!r:.50}"
  return ""
