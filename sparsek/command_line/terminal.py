"""Robustness of a command against closed standard streams, Ctrl-C, and threads that do not end;
and a line where it takes long.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import IO

from absl import logging as absl_logging

from sparsek.storage import files

END_SECONDS = 10.0  # for the interpreter to end once a command has printed its last line


class Lenient:
  """A text stream that drops what is written to it, without an error, once nobody reads it.

  All other attributes are those of the stream.

  Args:
    stream: standard output or error.
    name: what messages call the stream.
    forgiven: the kind of error after which the rest of the output is dropped; another OSError
      raises RunError.
  """

  def __init__(self, stream: IO[str], name: str, forgiven: type[OSError]):
    self._stream, self._name, self._forgiven = stream, name, forgiven

  def __getattr__(self, name):
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    try:
      return self._stream.write(text)
    except OSError as error:
      self._fail(error)
      return len(text)

  def flush(self) -> None:
    try:
      self._stream.flush()
    except OSError as error:
      self._fail(error)

  def _fail(self, error: OSError) -> None:
    self._silence()
    if not isinstance(error, self._forgiven):
      raise files.cannot_write(self._name, error) from None

  def _silence(self) -> None:
    """Points the file descriptor at the null device, where what is still buffered can go too.

    Otherwise the interpreter fails to flush the stream when it ends, and exits with code 120.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, self._stream.fileno())
    os.close(null)
    self._stream.flush()


def make_lenient() -> None:
  """Makes a closed standard output or error lose what is printed, but not the run.

  On standard output a pipe that nobody reads (`| head`) is forgiven; on standard error any failure
  is, such as a terminal that hung up or a full disk. Descriptors that the command was started
  without (`2>&-`) become the null device: a file opened later would get their number, and
  whatever is printed would land in that file.
  """
  while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
    pass
  os.close(null)
  out, err = (
    stream or open(os.devnull, "w", encoding="utf-8") for stream in (sys.stdout, sys.stderr)
  )
  sys.stdout = Lenient(out, "standard output", BrokenPipeError)
  sys.stderr = Lenient(err, "standard error", OSError)


def shorten_warnings() -> None:
  """Makes warnings that are logged lines like the others: "warning: the data are ..." """
  handler = logging.StreamHandler(sys.stderr)
  handler.setFormatter(logging.Formatter("warning: %(message)s"))
  logger = absl_logging.get_absl_logger()
  logger.addHandler(handler)
  logger.propagate = False


def keep_interrupts() -> None:
  """Makes sure that Ctrl-C takes effect at any moment.

  Python shows and drops exceptions of destructors and of callbacks of the garbage collector, which
  JAX has. A KeyboardInterrupt that is raised there is sent once more.
  """
  show = sys.unraisablehook

  def show_others(unraisable) -> None:
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
      show(unraisable)
      return
    # Sent later, when this hook has returned, and to the main thread, which may be waiting.
    to_main = [threading.main_thread().ident, signal.SIGINT]
    again = threading.Timer(0.01, signal.pthread_kill, to_main)
    again.daemon = True
    again.start()

  sys.unraisablehook = show_others


def end_within(seconds: float, code: int) -> None:
  """Makes sure that the process ends with `code` in this time, whatever its threads wait for.

  The interpreter joins all threads before it ends, also those of an Orbax save that failed, which
  can wait for ever. Call it when all work is done and flushed; exit handlers run as long as they
  are done in time.
  """
  watchdog = threading.Timer(seconds, os._exit, [code])
  watchdog.daemon = True
  watchdog.start()


@contextlib.contextmanager
def said_if_slow(line: str, seconds: float = 2.0) -> Iterator[None]:
  """Prints a line on stderr once the block has taken this long, so that no wait is silent."""
  timer = threading.Timer(seconds, lambda: print(line, file=sys.stderr, flush=True))
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()
