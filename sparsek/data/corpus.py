"""Documents of a corpus, from files, folders or Python's standard library, and their split."""

import dataclasses
import hashlib
import itertools
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence

from sparsek.config import DEFAULT_EXTENSIONS, check_choice
from sparsek.data import task_documents, text_files
from sparsek.errors import UsageError
from sparsek.storage.files import check_regular

STDLIB = "stdlib"
TASKS = "tasks:"
_MAX_TASK_BYTES, _MAX_TASKS = 2**24, 10**9
# Folders of the standard library that are not read: installed packages, and tests, which many
# distributions do not ship.
_STDLIB_SKIPPED = frozenset(
  {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)


@dataclasses.dataclass(frozen=True)
class Document:
  """A text, and the side of the split that it is on.

  Attributes:
    name: file, or file:line.
    text: never empty.
    held_out: not trained on.
    answers: (begin, end) of the characters that the loss counts, ascending; None: all of them.
  """

  name: str
  text: str
  held_out: bool
  answers: tuple[tuple[int, int], ...] | None = None

  def __post_init__(self):
    borders = [0, *itertools.chain.from_iterable(self.answers or ()), len(self.text)]
    if borders != sorted(borders):
      raise ValueError(
        f"answers={self.answers} of document {self.name} must be (begin, end), ascending, "
        f"within its {len(self.text)} characters"
      )


class LeftOut:
  """Counts of what was not read, by reason, with the first example of each."""

  def __init__(self):
    self._counts: dict[str, int] = {}
    self._first: dict[str, str] = {}

  def add(self, reason: str, example: str) -> None:
    """Counts one more.

    Args:
      reason: a plural, such as "hidden files".
      example: what was not read, such as the name of a file.
    """
    self._counts[reason] = self._counts.get(reason, 0) + 1
    self._first.setdefault(reason, example)

  def lines(self, max_reasons: int = 12) -> list[str]:
    """Returns a line for each of the most frequent reasons, and one for all others."""
    reasons = sorted(self._counts, key=lambda reason: self._counts[reason], reverse=True)
    lines = [
      f"left out: {self._counts[reason]:,} {reason} (the first: {self._first[reason]})"
      for reason in reasons[:max_reasons]
    ]
    rest = sum(self._counts[reason] for reason in reasons[max_reasons:])
    return lines + [f"left out: {rest:,} for {len(reasons) - max_reasons} other reasons"] * (
      rest > 0
    )


def _is_held_out(key: str, fraction: float) -> bool:
  return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < fraction * 2**64


def documents(
  sources: Sequence[str],
  *,
  heldout_fraction: float = 0.05,
  extensions: Sequence[str] = DEFAULT_EXTENSIONS,
  text_field: str = "text",
  errors: str = "strict",
  min_document_bytes: int = 0,
  deduplicate: bool = False,
  answers_only: bool = False,
  skip_bad_lines: bool = False,
  left_out: LeftOut | None = None,
) -> Iterator[Document]:
  """Yields the documents of all sources, in an order that depends on their names only.

  Whether a document is held out depends on the hash of its text, so that copies of it are on the
  same side of the split; in the standard library it depends on the relative path, so that the split
  is nearly the same for every version of Python. A corpus of a single document is cut in two, at a
  line break if one is near, and the second part is held out (unless it has marked answers). If all
  of several documents fall on one side, the last one changes sides.

  Args:
    sources: each a file of a kind that `sparsek.data.text_files` reads, a folder (read recursively,
      links too, without hidden files and folders), "stdlib", or "tasks:LENGTH:COUNT", documents of
      `sparsek.data.task_documents` of at most LENGTH bytes.
    heldout_fraction: share of the documents that is held out, approximately.
    extensions: endings of the files that are read in folders, in upper or lower case, compressed or
      not.
    text_field: the field of a JSON object that holds the text, or the column of Parquet.
    errors: "strict", or "replace" for U+FFFD in place of what is not UTF-8.
    min_document_bytes: shorter texts (in bytes of UTF-8) are left out, except generated ones, whose
      source says how long they are.
    deduplicate: keep only the first of equal texts.
    answers_only: in generated documents the loss counts only the answers.
    skip_bad_lines: leave out lines, elements and rows that have no text, instead of raising there.
    left_out: counts what was not read.
  Raises:
    UsageError: naming the file, and where in it, for anything that cannot be read; or if there is
      no document at all.
  """
  if not 0 <= heldout_fraction < 1:
    raise UsageError(f"heldout_fraction={heldout_fraction} must be at least 0 and below 1")
  check_choice("errors", errors, ("strict", "replace"))
  for source in sources:
    _check_source(source)  # now, and not after hours of reading the sources before it
  left_out = left_out or LeftOut()
  endings = tuple(extension.lower() for extension in extensions)

  def skip(error: UsageError) -> None:
    left_out.add("lines without a text that could be read", str(error))

  bad = skip if skip_bad_lines else None

  def read(source: str) -> Iterator[Document]:
    if source.startswith(TASKS):
      for name, text, answers in _task_texts(source):
        yield Document(
          name, text, _is_held_out(text, heldout_fraction), answers if answers_only else None
        )
    else:
      for name, text, key in _named_texts(source, endings, text_field, errors, left_out, bad):
        if len(text.encode()) >= max(min_document_bytes, 1):
          yield Document(name, text, _is_held_out(key, heldout_fraction))
        else:
          short = f"documents below {min_document_bytes} bytes"
          left_out.add(short if text else "empty documents", name)

  all_documents: Iterator[Document] = itertools.chain.from_iterable(map(read, sources))
  if deduplicate:
    all_documents = _different(all_documents, left_out)
  first = list(itertools.islice(all_documents, 2))
  if not first:
    least = f", of at least {min_document_bytes} bytes" if min_document_bytes else ""
    raise UsageError(
      "; ".join(
        (
          f"no documents in sources {', '.join(sources) or '(none given)'} (files taken from "
          f"folders: {' '.join(endings)}{least})",
          *left_out.lines(3),
        )
      )
    )
  if heldout_fraction == 0:
    yield from itertools.chain(first, all_documents)
  elif len(first) == 1:
    yield from _cut(first[0], 1 - heldout_fraction)
  else:
    yield from _on_both_sides(itertools.chain(first, all_documents))


def _different(corpus: Iterable[Document], left_out: LeftOut) -> Iterator[Document]:
  """Yields the first of equal documents."""
  seen = set()
  for document in corpus:
    digest = hashlib.sha256(document.text.encode()).digest()
    if digest not in seen:
      seen.add(digest)
      yield document
    else:
      left_out.add("documents that are there already", document.name)


def _cut(document: Document, share: float) -> list[Document]:
  """Returns a training document of about this share of a text, and the rest as a held-out one."""
  at = int(len(document.text) * share)
  at = document.text.rfind("\n", at * 9 // 10, at) + 1 or at
  if at == 0 or document.answers is not None:
    return [dataclasses.replace(document, held_out=False)]
  return [
    Document(document.name, document.text[:at], False),
    Document(document.name + " (end)", document.text[at:], True),
  ]


def _on_both_sides(corpus: Iterator[Document]) -> Iterator[Document]:
  """Yields at least two documents, of which the last changes sides if all are on one side."""
  last = next(corpus)
  sides = {last.held_out}
  for document in corpus:
    yield last
    last = document
    sides.add(document.held_out)
  yield last if len(sides) == 2 else dataclasses.replace(last, held_out=not last.held_out)


def _check_source(source: str) -> None:
  """Raises UsageError if a source cannot be read."""
  if source.startswith(TASKS):
    _task_texts(source)
  elif source != STDLIB and not os.path.exists(source):
    advice, pattern = "", re.search(r"[*?[]", source)
    if pattern:
      folder = os.path.dirname(source[: pattern.start()]) or "."
      advice = (
        f"; patterns are not expanded: give --sources={folder}, of which all files with one of the "
        "--extensions are read, or name the files, separated by commas"
      )
    raise UsageError(
      f"source {source!r}: no such file or folder (relative to {os.getcwd()}){advice}"
    )
  elif source != STDLIB and not os.path.isdir(source):
    check_regular(source, "source")


def _named_texts(
  source: str,
  extensions: tuple[str, ...],
  text_field: str,
  errors: str,
  left_out: LeftOut,
  bad: Callable[[UsageError], None] | None,
) -> Iterator[tuple[str, str, str]]:
  """Yields (name, text, the key whose hash decides the split)."""
  if source == STDLIB:
    yield from _stdlib_texts()
    return
  for path in _files(source, extensions, left_out) if os.path.isdir(source) else [source]:
    for name, text in text_files.texts(path, text_field, errors, bad):
      yield name, text, text


def _task_texts(source: str) -> Iterator[tuple[str, str, tuple[tuple[int, int], ...]]]:
  """Returns the (name, text, answers) of a source "tasks:LENGTH:COUNT"."""
  match = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", source.removeprefix(TASKS))
  if not match or int(match[1]) > _MAX_TASK_BYTES or int(match[2]) > _MAX_TASKS:
    raise UsageError(
      f"source {source[:80]!r} must be tasks:LENGTH:COUNT, such as "
      f"tasks:4096:1000, of at most {_MAX_TASK_BYTES} bytes and {_MAX_TASKS} "
      f"documents"
    )
  return task_documents.texts(int(match[1]), int(match[2]))


def _files(folder: str, extensions: tuple[str, ...], left_out: LeftOut) -> Iterator[str]:
  """Yields the files of a folder that are read, sorted by name, those of linked folders last."""
  for parent, names in _folders(folder, left_out):
    for name in names:
      path = os.path.join(parent, name)
      if name.startswith("."):
        left_out.add("hidden files", path)
      elif not (
        name.lower().endswith(extensions) or text_files.plain_name(name).endswith(extensions)
      ):
        ending = os.path.splitext(name)[1].lower()
        left_out.add(f"files ending in {ending}" if ending else "files without an ending", path)
      else:
        yield path


def _folders(folder: str, left_out: LeftOut) -> Iterator[tuple[str, list[str]]]:
  """Yields (folder, names of its files) for a folder and all below it, each once, links last."""
  seen, waiting = set(), [folder]
  while waiting:
    for parent, folders, names in os.walk(waiting.pop(0), onerror=_refuse_folder):
      status = os.stat(parent)
      if (status.st_dev, status.st_ino) in seen:
        left_out.add("linked folders that are read anyway", parent)
        folders.clear()
        continue
      seen.add((status.st_dev, status.st_ino))
      for name in [name for name in folders if name.startswith(".")]:
        left_out.add("hidden folders", os.path.join(parent, name))
        folders.remove(name)
      folders.sort()
      paths = (os.path.join(parent, name) for name in folders)
      waiting += filter(os.path.islink, paths)
      yield parent, sorted(names)


def _refuse_folder(error: OSError) -> None:
  raise UsageError(f"folder {error.filename} cannot be read: {error.strerror}")


def _stdlib_texts() -> Iterator[tuple[str, str, str]]:
  """Yields (name, text, name) of the modules of Python's standard library."""
  root = sysconfig.get_paths()["stdlib"]
  for parent, folders, names in os.walk(root, onerror=_refuse_folder):
    folders[:] = sorted(
      name for name in folders if name not in _STDLIB_SKIPPED and not name.startswith(".")
    )
    for path in (os.path.join(parent, name) for name in sorted(names)):
      if path.endswith(".py") and not os.path.basename(path).startswith("."):
        name = os.path.relpath(path, root).replace(os.sep, "/")
        try:
          with open(path, "rb") as file:
            yield name, file.read().decode("utf-8", "replace"), name
        except OSError as error:
          raise UsageError(f"file {path} cannot be read: {error.strerror}") from error
