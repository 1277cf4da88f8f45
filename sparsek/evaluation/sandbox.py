"""Programs that a model wrote, run in a process of their own.

It has no network, a new temporary folder, Python without installed packages, and limits of time and
memory; Python opens files for reading only, and its functions that change files or start processes
are taken away. Sockets in the file system stay open to it. That holds off accidents. It is no
prison: a program that means harm belongs into a virtual machine.
"""

import dataclasses
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile

PASSED, TIMED_OUT = "passed", "timed out"
# Namespaces of its own: no network, and no process of it outlives the first one.
ISOLATED = ("unshare", "--user", "--map-current-user", "--net", "--pid", "--fork", "--kill-child")
_MAX_REASON = 200  # characters
_SOURCE = """
import builtins, io, os, resource, shutil, subprocess, sys

seconds, megabytes = int(sys.argv[1]), int(sys.argv[2])
sys.argv = ["answer.py"]
report = os.dup(1)
nothing = os.open(os.devnull, os.O_RDWR)
for stream in (1, 2):
  os.dup2(nothing, stream)
token = sys.stdin.readline().strip()
source = sys.stdin.read()
os.dup2(nothing, 0)
for name, most in (
  ("RLIMIT_AS", megabytes << 20),
  ("RLIMIT_CPU", seconds + 1),
  ("RLIMIT_FSIZE", 0),
  ("RLIMIT_CORE", 0),
):
  resource.setrlimit(getattr(resource, name), (most, most))
names = "kill killpg system remove unlink rmdir removedirs rename renames replace truncate"
names += " mkdir makedirs mkfifo mknod link symlink utime fchmod fchown"
names += " ftruncate fork forkpty chmod chown lchown setuid putenv execv execve posix_spawn"
for name in names.split():
  setattr(os, name, None)
for name in ("rmtree", "move", "chown"):
  setattr(shutil, name, None)
subprocess.Popen = None

def reading(function, is_reading):
  def opened(file, how=None, *args, **kwargs):
    given = kwargs.get("mode", kwargs.get("flags", how))
    if given is not None and not is_reading(given):
      raise PermissionError(f"{file}: only reading is allowed")
    return function(file, *([] if how is None else [how]), *args, **kwargs)
  return opened

changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
builtins.open = io.open = reading(io.open, lambda mode: not set(mode) & set("wax+"))
os.open = reading(os.open, lambda flags: not flags & changing)
builtins.help = None
write, leave = os.write, os._exit
try:
  exec(compile(source, "answer.py", "exec"), {"__name__": "answer"})
  said = token
except BaseException as error:
  said = f"{type(error).__name__}: {error}"
write(report, said.encode("utf-8", "replace")[:4096])
leave(0)
"""


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of a program: seconds of its run, and megabytes (2^20 bytes) of its memory."""

  seconds: int
  megabytes: int


@functools.cache
def can_isolate() -> bool:
  """Returns whether a process can be started here that has no network."""
  if shutil.which(ISOLATED[0]) is None:
    return False
  try:
    done = subprocess.run([*ISOLATED, "true"], capture_output=True, timeout=30, check=False)
  except (OSError, subprocess.TimeoutExpired):
    return False
  return done.returncode == 0


def run_program(source: str, limits: Limits, isolated: bool = True) -> str:
  """Runs a program of Python; returns "passed" if it comes to its end, otherwise the reason.

  Args:
    source: of the program; what it prints is dropped.
    limits: of the process.
    isolated: False leaves it the network, and processes that it starts may outlive it.
  """
  token = secrets.token_hex(16)  # by which the end of the program is told from an early exit
  command = [
    *(ISOLATED if isolated else ()),
    *(sys.executable, "-I", "-S", "-c", _SOURCE),
    *(str(limits.seconds), str(limits.megabytes)),
  ]
  with tempfile.TemporaryDirectory(prefix="sparsek_answer_") as folder:
    process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      cwd=folder,
      env={"HOME": folder, "TMPDIR": folder, "PATH": os.defpath},
      start_new_session=True,
    )
    try:
      text = f"{token}\n{source}".encode("utf-8", "replace")
      said, _ = process.communicate(text, timeout=limits.seconds)
    except subprocess.TimeoutExpired:
      return TIMED_OUT
    finally:
      _end(process)
  if said.decode("utf-8", "replace") == token:
    return PASSED
  code = process.returncode
  return said.decode("utf-8", "replace")[:_MAX_REASON] or f"ended with code {code}"


def _end(process: subprocess.Popen) -> None:
  """Ends a process and those that it started."""
  try:
    os.killpg(process.pid, signal.SIGKILL)
  except ProcessLookupError:
    pass
  process.communicate()
