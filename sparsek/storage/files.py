"""Files on disk: atomic replacement, paths that users give, and untrusted files and JSON."""

import contextlib
import fcntl
import glob
import io
import json
import os
import re
import reprlib
import stat
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from sparsek.errors import RunError, UsageError

MAX_JSON = 64 * 2**20
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:/")
_TEMPORARY = ".tmp"
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring = 3, 100


def local_path(text: str, name: str) -> str:
  """Returns a path of this machine's file system as the user meant it, with `~` expanded.

  Args:
    text: what was given; a relative path stays relative to the working directory.
    name: of the flag, for messages.
  Raises:
    UsageError: for an URL such as gs://bucket/run, which would become a local folder of that name,
      and for a path that no file system can hold (a NUL byte).
  """
  if _SCHEME.match(text):
    scheme = text.partition(":")[0]
    raise UsageError(
      f"--{name}={text}: {scheme}: URLs are not supported; give a path of this "
      f"machine's file system (a mounted bucket has one)"
    )
  if "\0" in text:
    raise UsageError(f"--{name}={text!r}: a path holds no NUL character")
  return os.path.expanduser(text)


@contextlib.contextmanager
def atomic_file(path: str, mode: str = "wb", **options: Any) -> Iterator[IO]:
  """Opens a temporary file that replaces `path` when the block ends well, and is removed otherwise.

  The temporary name is unique, so that processes may write the same path at the same time: each
  result is complete, and the last one stays. Everything is on disk before the name changes.

  Args:
    path: of the file to make or to replace.
    mode: "wb" or "w".
    options: for `open`; text is UTF-8 by default.
  Raises:
    OSError: if it cannot be written; then `path` is unchanged.
  """
  if "b" not in mode:
    options.setdefault("encoding", "utf-8")
  folder, name = os.path.split(os.path.abspath(path))
  handle, temporary = _locked_temporary(folder, name)
  try:
    with open(handle, mode, **options) as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
      os.chmod(temporary, _permissions(path))
      os.replace(temporary, path)  # before it is closed, which ends the lock
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise


def _locked_temporary(folder: str, name: str) -> tuple[int, str]:
  """Makes a temporary file that is locked, and removes unlocked ones of processes that were killed.

  On a file system without locks none are removed.
  """
  pattern = f".{glob.escape(name)}.{'?' * 8}{_TEMPORARY}"
  for abandoned in glob.glob(os.path.join(glob.escape(folder), pattern)):
    with contextlib.suppress(OSError), open(abandoned, "rb") as file:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      os.unlink(abandoned)
  while True:
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=_TEMPORARY, dir=folder)
    with contextlib.suppress(OSError):
      fcntl.flock(handle, fcntl.LOCK_EX)
    if os.path.lexists(temporary):  # otherwise another process removed it before it was locked
      return handle, temporary
    os.close(handle)


def _permissions(path: str) -> int:
  """Returns the permissions of an existing file, or those of a new one under this umask."""
  try:
    return stat.S_IMODE(os.stat(path).st_mode)
  except OSError:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_atomically(path: str, content: str | bytes) -> None:
  """Replaces `path` by `content` (text as UTF-8), or raises OSError and leaves it unchanged."""
  with atomic_file(path) as file:
    file.write(content.encode("utf-8") if isinstance(content, str) else content)


def save(path: str, content: str | bytes) -> None:
  """Replaces `path` by `content` like `write_atomically`, but raises RunError if that fails."""
  try:
    write_atomically(path, content)
  except OSError as error:
    raise cannot_write(path, error) from None


def exists(path: str) -> bool:
  """Returns whether there is something at `path`, which may be a broken link.

  Raises:
    UsageError: if it cannot be known, as in a folder without permission.
  """
  try:
    os.lstat(path)
  except FileNotFoundError:
    return False
  except OSError as error:
    raise UsageError(f"{path} cannot be read: {reason_of(error)}") from None
  return True


def check_regular(path: str, name: str = "file") -> None:
  """Raises UsageError unless `path` is a regular file, since others could be read without end.

  Args:
    path: of a file, or of a link to one.
    name: what it is, for messages.
  Raises:
    UsageError: for a folder, a FIFO, a socket or a device, or if it cannot be inspected.
  """
  try:
    mode = os.stat(path).st_mode
  except OSError as error:
    raise UsageError(f"{name} {path} cannot be read: {error.strerror}") from None
  if not stat.S_ISREG(mode):
    kinds = {"folder": stat.S_ISDIR, "FIFO": stat.S_ISFIFO, "socket": stat.S_ISSOCK}
    kind = next((kind for kind, is_kind in kinds.items() if is_kind(mode)), "device")
    raise UsageError(f"{name} {path} is a {kind}, expected a regular file")


def make_folder(path: str) -> None:
  """Makes a folder and its parents; raises UsageError if that is impossible, as under a file."""
  try:
    os.makedirs(path, exist_ok=True)
  except OSError as error:
    raise UsageError(f"folder {path} cannot be made: {reason_of(error)}") from None


def check_writable(path: str) -> None:
  """Raises UsageError if a file cannot be made or changed; called before long work."""
  target = os.path.dirname(path) or "."
  if exists(path):
    check_regular(path)
    target = path
  if not os.access(target, os.W_OK):
    raise UsageError(f"{path} cannot be written")


def parse_json(text: str | bytes, where: str, unique: bool = False) -> Any:
  """Returns the JSON value of `text`.

  Args:
    text: JSON.
    where: the origin of the text, for messages.
    unique: refuse an object that has a key twice.
  Raises:
    UsageError: beginning with `where`, for text that is no JSON, is nested too deeply for Python,
      or holds an integer of too many digits.
  """
  try:
    return json.loads(text, object_pairs_hook=_unique if unique else None)
  except RecursionError:
    raise UsageError(f"{where}: JSON that is nested too deeply") from None
  except ValueError as error:
    reason = str(error)
    if "integer string conversion" in reason:
      reason = "an integer of too many digits"
    raise UsageError(f"{where}: no JSON that can be understood: {reason[:200]}") from None


def shown(value: object, length: int = 80) -> str:
  """Returns a JSON value as text for a message: short and on one line, however deeply nested."""
  text = _REPR.repr(value)
  return text if len(text) <= length else text[:length] + "..."


def _unique(pairs: list[tuple]) -> dict:
  if len(dict(pairs)) != len(pairs):
    raise ValueError("an object has a key twice")
  return dict(pairs)


def read_at_most(path: str, max_bytes: int, name: str = "file") -> bytes:
  """Returns the content of a regular file.

  Args:
    path: of the file.
    max_bytes: that such a file may have.
    name: what it is, for messages, such as "--prompt_file".
  Raises:
    UsageError: naming the file, if it is no regular file, cannot be read or is larger.
  """
  check_regular(path, name)
  try:
    with open(path, "rb") as file:
      content = file.read(max_bytes + 1)
  except OSError as error:
    raise UsageError(f"{name} {path} cannot be read: {reason_of(error)}") from None
  if len(content) > max_bytes:
    raise UsageError(f"{name} {path} has more than {max_bytes:,} bytes")
  return content


def read_json_object(path: str, max_bytes: int = MAX_JSON) -> dict:
  """Returns the JSON object that a file holds.

  Raises:
    UsageError: naming the file, if it is no regular file, cannot be read, is larger than
      `max_bytes`, is not UTF-8, is no JSON object that `parse_json` accepts, or has a key twice.
  """
  value = parse_json(read_at_most(path, max_bytes), path, unique=True)
  if not isinstance(value, dict):
    raise UsageError(f"{path} holds a JSON {type(value).__name__}, expected an object")
  return value


def reason_of(error: OSError) -> str:
  """Returns the system's description of an error, such as "No space left on device"."""
  return error.strerror or str(error) or type(error).__name__


def cannot_write(path: str, error: OSError) -> RunError:
  """Returns the error that ends a command whose file could not be written."""
  return RunError(f"{path} cannot be written: {reason_of(error)}")


def let_stdout_take_any_text() -> None:
  """Makes `print` write characters outside the terminal's encoding as \\xb1 or \\u2192."""
  if isinstance(sys.stdout, io.TextIOWrapper):  # a test may have replaced it
    sys.stdout.reconfigure(errors="backslashreplace")


def cache_folder() -> str:
  """Returns the folder for what can be made again: $XDG_CACHE_HOME/sparsek or ~/.cache/sparsek."""
  home = os.environ.get("XDG_CACHE_HOME", "")
  if not os.path.isabs(home):  # The XDG specification asks to ignore relative paths.
    home = os.path.join(os.path.expanduser("~"), ".cache")
  return os.path.join(home, "sparsek")
