"""Faults of the file system for whole commands: io_faults.c, compiled, preloaded and armed."""

import collections
import ctypes
import errno
import os
import pathlib
import shutil
import subprocess
import sys

SOURCE = pathlib.Path(__file__).with_name("io_faults.c")
KILL = -1
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "kill": KILL}
_LOADED = "SPARSEK_IO_FAULTS"  # a variable of the environment: the library that was preloaded


def restart_with_faults(folder: str, environment: dict[str, str]) -> None:
  """Compiles the library into `folder` and starts this command again with it, unless that was done.

  Raises:
    SystemExit: with a sentence, where there is no compiler.
  """
  if _LOADED in os.environ:
    return
  compiler = next(
    filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None
  )
  if compiler is None:
    sys.exit("no C compiler (cc, gcc or clang) is installed, which io_faults.c needs")
  library = os.path.join(folder, "io_faults.so")
  subprocess.run(
    [compiler, "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl", "-lpthread"], check=True
  )
  preload = {"LD_PRELOAD": library, _LOADED: library}
  arguments = [sys.executable, "-m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]]
  os.execve(sys.executable, arguments, {**os.environ, **environment, **preload})


def _library() -> ctypes.CDLL:
  return ctypes.CDLL(os.environ[_LOADED])


def record(folder: str, log: str) -> None:
  """Writes the key of each operation below `folder` to the file `log`, until the process ends."""
  file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
  _library().faults_arm(folder.encode(), file, b"", ctypes.c_long(-1), 0, 0)


def fail(folder: str, key: str, ordinal: int, error: int, lasting: bool, log: str) -> None:
  """Fails the operation `key` below `folder` that comes after `ordinal` others of that key.

  Args:
    folder: absolute, without links.
    key: a line that `record` wrote.
    ordinal: from 0.
    error: of `errno`, or KILL.
    lasting: whatever needs space fails from then on.
    log: of the operations, as `record` writes it.
  """
  file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
  _library().faults_arm(folder.encode(), file, key.encode(), ctypes.c_long(ordinal), error, lasting)


def recorded(log: str) -> list[tuple[str, int]]:
  """Returns the operations of a log as (key, ordinal), in their order."""
  counts: collections.Counter = collections.Counter()
  operations = []
  for key in pathlib.Path(log).read_text(encoding="utf-8").splitlines():
    operations.append((key, counts[key]))
    counts[key] += 1
  return operations
