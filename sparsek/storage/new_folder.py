"""Folders that appear under their names complete or not at all, however the process ends."""

import contextlib
import fcntl
import glob
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator

from sparsek.errors import RunError, UsageError
from sparsek.storage.files import cannot_write, reason_of

_TEMPORARY = ".unfinished"  # ending of the folder that is filled


@contextlib.contextmanager
def new_folder(path: str, alone: bool = True) -> Iterator[str]:
  """Makes a folder that appears under its name when the block ends well, and not at all otherwise.

  It is filled under a hidden name beside the final one, where it is locked. During the block
  SIGTERM and SIGHUP end the process by an exception, so that nothing stays behind. A folder that
  stays after SIGKILL is removed by the next process that makes the same folder.

  Args:
    path: of the folder, which must not exist or be empty. Its parents are made.
    alone: refuse at once if another process is making the folder; otherwise the process that ends
      first makes it.
  Yields:
    the folder to fill.
  Raises:
    UsageError: if there is something already, another process is making it, or nothing can be made
      there.
    RunError: if filling it ends in an OSError.
  """
  path = os.path.realpath(path)
  parent = os.path.dirname(path)
  with contextlib.ExitStack() as stack:
    try:
      check_new_folder(path)
      with contextlib.suppress(FileExistsError):  # the parent is a file: mkdir below fails too
        os.makedirs(parent, exist_ok=True)
      if remove_abandoned(path) and alone:
        raise UsageError(f"{path} is being written by another process")
      stack.enter_context(_unwinding_on_signals())
      unfinished = stack.enter_context(_temporary_sibling(path))
    except OSError as error:
      raise UsageError(f"{path} cannot be written: {reason_of(error)}") from None
    try:
      yield unfinished
      _sync(unfinished)
      check_new_folder(path)
      os.rename(unfinished, path)  # over an empty folder, or to a new name
    except OSError as error:
      raise cannot_write(path, error) from None
    except RunError as error:  # messages should not show the hidden name
      raise RunError(str(error).replace(unfinished, path)) from None
    with contextlib.suppress(OSError):  # the folder is complete in any case
      _sync_folder(parent)


def check_new_folder(path: str) -> None:
  """Raises UsageError unless `new_folder(path)` can put a folder there."""
  if not os.path.lexists(path):
    return
  if not os.path.isdir(path):
    raise UsageError(f"{path} is there already and is no folder: give a new folder")
  if os.path.ismount(path) or os.path.samefile(path, os.curdir):
    raise UsageError(
      f"{path} is a mount point or the working directory, which cannot be replaced: "
      f"give a folder in it"
    )
  try:
    empty = not os.listdir(path)
  except OSError as error:
    raise UsageError(f"{path} cannot be read: {reason_of(error)}") from None
  if not empty:
    raise UsageError(f"{path} is not empty: give a new folder")


@contextlib.contextmanager
def _temporary_sibling(folder: str) -> Iterator[str]:
  """Makes a hidden folder beside `folder`, locked while it is in use, and removed at the end.

  It is a sibling, since a folder can be renamed atomically only within a file system. It is not
  made by mkdtemp, which would keep other users from reading it.
  """
  with contextlib.ExitStack() as stack:
    ready = False
    while not ready:  # another process may remove it before it is locked
      temporary = temporary_name(folder)
      os.mkdir(temporary)
      stack.callback(_remove, temporary)
      ready = stack.enter_context(_lock(temporary)) is not False
    yield temporary


def temporary_name(folder: str) -> str:
  """Returns a new name that `remove_abandoned(folder)` recognises."""
  parent, name = os.path.split(folder)
  return os.path.join(parent, f".{name}.{uuid.uuid4().hex}{_TEMPORARY}")


def remove_abandoned(folder: str) -> bool:
  """Removes the temporary folders of processes that were killed while they made `folder`.

  Returns:
    whether there are others, of processes that are still making it.
  """
  parent, name = os.path.split(folder)
  pattern, others = f".{glob.escape(name)}.{'[0-9a-f]' * 32}{_TEMPORARY}", False
  for path in glob.glob(os.path.join(glob.escape(parent), pattern)):
    with _lock(path) as locked:
      if locked:
        shutil.rmtree(path, ignore_errors=True)
      others |= locked is False and os.path.lexists(path)
  return others


@contextlib.contextmanager
def _lock(folder: str) -> Iterator[bool | None]:
  """Locks a folder until the end of the block or of this process.

  Yields:
    whether it is locked: False if another process holds the lock or has removed the folder, None on
    a file system without locks.
  """
  with contextlib.ExitStack() as stack:
    try:
      handle = os.open(folder, os.O_RDONLY)
      stack.callback(os.close, handle)
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
      locked = os.path.isdir(folder)
    except (BlockingIOError, FileNotFoundError):
      locked = False
    except OSError:
      locked = None
    yield locked


@contextlib.contextmanager
def _unwinding_on_signals() -> Iterator[None]:
  """Makes signals that would end the process at once raise SystemExit instead."""

  def stop(number, frame):
    raise SystemExit(128 + number)

  previous = {}
  if threading.current_thread() is threading.main_thread():
    for number in (signal.SIGTERM, signal.SIGHUP):
      if signal.getsignal(number) == signal.SIG_DFL:
        previous[number] = signal.signal(number, stop)
  try:
    yield
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def _remove(folder: str) -> None:
  """Removes a folder into which threads of a failed save may still be writing."""
  for _ in range(20):
    if not os.path.lexists(folder):
      return
    shutil.rmtree(folder, ignore_errors=True)
    time.sleep(0.05)


def _sync(folder: str) -> None:
  """Waits until a folder with all its contents is on disk."""
  for parent, _, names in os.walk(folder):
    for name in names:
      with open(os.path.join(parent, name), "rb") as file:
        os.fsync(file.fileno())
    _sync_folder(parent)


def _sync_folder(folder: str) -> None:
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
