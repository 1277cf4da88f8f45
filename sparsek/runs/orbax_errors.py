"""Errors of Orbax that reads a checkpoint: damage or another reason, and late messages to hide."""

import errno
import functools
import inspect
import logging
import os
import re
import stat
import sys
import warnings
from collections.abc import Iterator

import jax

from sparsek.storage.files import reason_of

_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # there is no file, or a folder instead
_REMAINS = re.compile("orbax|tensorstore|ocdbt|zarr|open event loop", re.IGNORECASE)


def first_line(error: BaseException) -> str:
  """Returns an error as part of one line: its kind and the start of its message."""
  lines = str(error).strip().splitlines()
  return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def passing_reason(path: str, error: Exception) -> str | None:
  """Returns why a checkpoint that may be whole cannot be read, or None where it is damaged.

  Missing permission, a failing disk, too many open files or too little memory say nothing about its
  contents. Orbax hides most of these errors, so every file is read once more.
  """
  for cause in _causes(error):
    if isinstance(cause, OSError) and cause.errno not in (None, *_MISSING):
      return reason_of(cause)
    text = str(cause)
    of_jax = isinstance(cause, (MemoryError, jax.errors.JaxRuntimeError))
    if of_jax or "RESOURCE_EXHAUSTED" in text:
      return first_line(cause)
    code = re.search(r"os_error_code='(\d+)'", text)  # of tensorstore
    if code and int(code[1]) not in _MISSING:
      return os.strerror(int(code[1]))
  try:
    _read_every_file(path)
  except OSError as failed:
    return f"{failed.filename}: {reason_of(failed)}" if failed.filename else reason_of(failed)
  return None


def damage(error: Exception) -> str:
  """Describes the damage of a checkpoint that Orbax failed to load, and the part that has it."""
  part = re.search(r"checkpointable: (\w+)", str(error))
  *_, cause = _causes(error)
  return f"{part[1]}: {first_line(cause)}" if part else first_line(cause)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
  """Yields an exception and those it was raised from, the first cause last."""
  while error is not None:
    yield error
    error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _read_every_file(folder: str) -> None:
  """Reads all files in a folder; raises OSError where one exists and cannot be read."""

  def fail(error: OSError) -> None:
    if error.errno not in _MISSING:
      raise error

  for parent, _, names in os.walk(folder, onerror=fail):
    for name in names:
      path = os.path.join(parent, name)
      try:
        if stat.S_ISREG(os.stat(path).st_mode):  # reading a FIFO might never end
          with open(path, "rb") as file:
            while file.read(2**20):
              pass
      except OSError as error:
        fail(error)


@functools.cache
def mute_remains() -> None:
  """Keeps messages that follow a failed load off stderr, for the rest of the process.

  Orbax gives up at the first error. Reads that are in progress then end in threads of tensorstore,
  and Python finds tasks and coroutines of a closed event loop: each prints a complaint, some much
  later.
  """
  logging.getLogger("asyncio").addFilter(lambda record: not _REMAINS.search(record.getMessage()))
  warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
  show = sys.unraisablehook

  def show_others(unraisable) -> None:
    closed = "Event loop is closed" in str(unraisable.exc_value)
    if not (closed or inspect.iscoroutine(unraisable.object)):
      show(unraisable)

  sys.unraisablehook = show_others
