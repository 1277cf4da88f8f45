"""Documents from text files, folders, JSON lines and Python's standard library."""

import dataclasses
import hashlib
import itertools
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence

from sparsek import tasks
from sparsek.config import check_choice
from sparsek.errors import UsageError
from sparsek.tokenizer import as_valid_unicode

STDLIB = "stdlib"
TASKS = "tasks:"
DEFAULT_EXTENSIONS = (".txt", ".md", ".rst", ".py", ".jsonl")
# Left out of the standard library: what is not its own (site-packages), and its tests, which many distributions do not ship.
_STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclasses.dataclass(frozen=True)
class Document:
  """A text with its place in the split.

  Attributes:
    name: file, or file:line.
    text: never empty.
    held_out: not trained on.
    answers: (begin, end) of characters, ascending: the loss counts only these; None: everything.
  """
  name: str
  text: str
  held_out: bool
  answers: tuple[tuple[int, int], ...] | None = None

  def __post_init__(self):
    places = [0, *itertools.chain.from_iterable(self.answers or ()), len(self.text)]
    if places != sorted(places):
      raise ValueError(f"answers={self.answers} of document {self.name} must be (begin, end), ascending, within its {len(self.text)} characters")


def _is_held_out(key: str, fraction: float) -> bool:
  return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < fraction * 2**64


def documents(
    sources: Sequence[str], *, heldout_fraction: float = 0.05, extensions: Sequence[str] = DEFAULT_EXTENSIONS,
    text_field: str = "text", errors: str = "strict", min_document_bytes: int = 0, deduplicate: bool = False, answers_only: bool = False,
) -> Iterator[Document]:
  """Yields the documents of all sources, in an order that depends on their names only.

  Whether a document is held out follows from its text, so that copies of it land on the same side; in the standard library it
  follows from the relative path, so that it is nearly the same for every version of Python.
  A corpus of a single document is cut in two, at a line break if one is near: the second part is held out (unless it has marked answers).
  Should all of several documents fall on one side, the last one changes sides.

  Args:
    sources: each a text file (one document), a .jsonl file (one document a line), a folder (recursive; hidden files and folders
      are skipped), "stdlib", or "tasks:LENGTH:COUNT", documents of `sparsek.tasks` of at most LENGTH bytes.
    heldout_fraction: about this share of the documents is held out.
    extensions: endings of the files taken from folders.
    text_field: the field of a JSON line that holds the text.
    errors: "strict", or "replace" for U+FFFD in place of what is not UTF-8.
    min_document_bytes: shorter texts are left out, in bytes of UTF-8; generated ones are as long as their source says.
    deduplicate: of equal texts only the first is kept.
    answers_only: of generated documents the loss counts only the answers.

  Raises:
    UsageError: naming the file, and where in it, for whatever cannot be read; or if there is no document at all.
  """
  if not 0 <= heldout_fraction < 1:
    raise UsageError(f"heldout_fraction={heldout_fraction} must be at least 0 and below 1")
  check_choice("errors", errors, ("strict", "replace"))

  def read(source: str) -> Iterator[Document]:
    if source.startswith(TASKS):
      for name, text, answers in _task_texts(source):
        yield Document(name, text, _is_held_out(text, heldout_fraction), answers if answers_only else None)
    else:
      for name, text, key in _named_texts(source, tuple(extensions), text_field, errors):
        if len(text.encode()) >= max(min_document_bytes, 1):
          yield Document(name, text, _is_held_out(key, heldout_fraction))

  every = itertools.chain.from_iterable(map(read, sources))
  if deduplicate:
    every = _different(every)
  first = list(itertools.islice(every, 2))
  if not first:
    least = f", of at least {min_document_bytes} bytes" if min_document_bytes else ""
    raise UsageError(f"no documents in sources {', '.join(sources) or '(none given)'} (files taken from folders: {' '.join(extensions)}{least})")
  if heldout_fraction == 0:
    yield from itertools.chain(first, every)
  elif len(first) == 1:
    yield from _cut(first[0], 1 - heldout_fraction)
  else:
    yield from _on_both_sides(itertools.chain(first, every))


def _different(every: Iterable[Document]) -> Iterator[Document]:
  seen = set()
  for document in every:
    digest = hashlib.sha256(document.text.encode()).digest()
    if digest not in seen:
      seen.add(digest)
      yield document


def _cut(document: Document, share: float) -> list[Document]:
  at = int(len(document.text) * share)
  at = document.text.rfind("\n", at * 9 // 10, at) + 1 or at
  if at == 0 or document.answers is not None:
    return [dataclasses.replace(document, held_out=False)]
  return [Document(document.name, document.text[:at], False), Document(document.name + " (end)", document.text[at:], True)]


def _on_both_sides(every: Iterable[Document]) -> Iterator[Document]:
  last, sides = None, set()
  for document in every:
    if last is not None:
      yield last
    last = document
    sides.add(document.held_out)
  yield last if len(sides) == 2 else dataclasses.replace(last, held_out=not last.held_out)


def _named_texts(source: str, extensions: tuple[str, ...], text_field: str, errors: str) -> Iterator[tuple[str, str, str]]:
  """Yields (name, text, the key whose hash decides the split)."""
  if source == STDLIB:
    yield from _stdlib_texts()
  elif os.path.isdir(source):
    for path in _files(source, extensions):
      yield from _file_texts(path, text_field, errors)
  elif os.path.exists(source):
    yield from _file_texts(source, text_field, errors)
  else:
    raise UsageError(f"source {source!r}: no such file or folder (relative to {os.getcwd()})")


def _task_texts(source: str) -> Iterator[tuple[str, str, tuple[tuple[int, int], ...]]]:
  length, colon, count = source.removeprefix(TASKS).partition(":")
  if not (colon and length.isdecimal() and count.isdecimal()):
    raise UsageError(f"source {source!r} must be tasks:LENGTH:COUNT, such as tasks:4096:1000")
  return tasks.texts(int(length), int(count))


def _files(folder: str, extensions: tuple[str, ...], skipped: Iterable[str] = ()) -> Iterator[str]:
  def refuse(error: OSError):
    raise UsageError(f"folder {error.filename} cannot be read: {error.strerror}")

  for parent, folders, files in os.walk(folder, onerror=refuse):
    folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
    for name in sorted(files):
      if name.endswith(extensions) and not name.startswith("."):
        yield os.path.join(parent, name)


def _stdlib_texts() -> Iterator[tuple[str, str, str]]:
  root = sysconfig.get_paths()["stdlib"]
  for path in _files(root, (".py",), _STDLIB_SKIPPED):
    name = os.path.relpath(path, root).replace(os.sep, "/")
    yield name, _decode(path, _read(path), "replace"), name


def _file_texts(path: str, text_field: str, errors: str) -> Iterator[tuple[str, str, str]]:
  if path.endswith(".jsonl"):
    yield from _json_lines(path, text_field, errors)
  else:
    text = _decode(path, _read(path), errors)
    yield path, text, text


def _json_lines(path: str, text_field: str, errors: str) -> Iterator[tuple[str, str, str]]:
  try:
    with open(path, "rb") as file:
      for number, line in enumerate(file, 1):
        if not line.strip():
          continue
        name = f"{path}:{number}"
        try:
          value = json.loads(_decode(name, line, errors))
        except json.JSONDecodeError as error:
          raise UsageError(f"{name}: not a JSON object: {error}") from error
        if not isinstance(value, dict):
          raise UsageError(f"{name}: expected a JSON object with the field {text_field!r}, found a {type(value).__name__}")
        text = value.get(text_field)
        if not isinstance(text, str):
          found = f"a {type(text).__name__}" if text_field in value else f"the fields {', '.join(value) or '(none)'}"
          raise UsageError(f"{name}: expected text in the field {text_field!r}, found {found}")
        valid = as_valid_unicode(text)
        if valid != text and errors == "strict":
          raise UsageError(f"{name}: the text has a lone surrogate, which UTF-8 cannot express (--errors=replace would replace it)")
        yield name, valid, valid
  except OSError as error:
    raise UsageError(f"file {path} cannot be read: {error.strerror}") from error


def _read(path: str) -> bytes:
  try:
    with open(path, "rb") as file:
      return file.read()
  except OSError as error:
    raise UsageError(f"file {path} cannot be read: {error.strerror}") from error


def _decode(name: str, content: bytes, errors: str) -> str:
  try:
    return content.decode("utf-8", errors)
  except UnicodeDecodeError as error:
    raise UsageError(
        f"{name}: not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start} (--errors=replace would replace it)") from error
