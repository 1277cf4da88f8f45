"""Child processes that end when their parent ends, even if it is killed.

The parent holds one end of a pipe; a thread of the child waits at the other end. When the parent is
gone, the pipe is closed, and the child sends itself SIGTERM: training saves a checkpoint and ends.
`python -m sparsek.experiments.child DESCRIPTOR MODULE ARGUMENTS...` is that child.
"""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from sparsek.command_line.invocation import CHILD

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_processes: set[subprocess.Popen] = set()


@contextlib.contextmanager
def running(module: str, arguments: Sequence[str], **options: Any) -> Iterator[subprocess.Popen]:
  """Runs `python -m module arguments` during the block, and waits for its end after the block.

  An exception in the block sends the process SIGTERM.

  Args:
    module: name of the module.
    arguments: its command line.
    options: those of `subprocess.Popen`.
  """
  reader, writer = os.pipe()  # no other child inherits the writer
  command = [sys.executable, "-m", "sparsek.experiments.child", str(reader), module, *arguments]
  try:
    with subprocess.Popen(command, pass_fds=(reader,), **options) as process:
      _processes.add(process)
      try:
        yield process
      except BaseException:
        process.terminate()
        raise
      finally:
        _processes.discard(process)
  finally:
    os.close(reader)
    os.close(writer)


@contextlib.contextmanager
def ending_at_signals(code: int | None = None) -> Iterator[None]:
  """Ends this process and its children if one of SIGNALS arrives during the block.

  Args:
    code: exit code; by default 128 + the number of the signal.
  """

  def end(number, frame):
    # Not print: the signal may have arrived within one.
    os.write(2, b"stopped by a signal; the same command goes on from here\n")
    for process in list(_processes):
      process.terminate()
    sys.exit(128 + number if code is None else code)

  before = {number: signal.signal(number, end) for number in SIGNALS}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _end_with_parent(descriptor: int) -> None:
  os.read(descriptor, 1)  # nothing is ever written
  os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
  """Runs the module that the command line names as if it had been started itself."""
  descriptor, module = int(sys.argv[1]), sys.argv[2]
  os.set_inheritable(descriptor, False)
  os.environ[CHILD] = "1"
  threading.Thread(target=_end_with_parent, args=(descriptor,), daemon=True).start()
  sys.argv[1:] = sys.argv[3:]
  runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
