"""Signals that ask a run to save and end, and the agreement of all processes on it."""

import signal
import threading
from types import FrameType, TracebackType

import jax
from jax.sharding import Mesh

from sparsek.parallel import processes

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopSignal:
  """Context in which STOP_SIGNALS set `requested` and do not end the process.

  A second SIGINT raises KeyboardInterrupt. Where SIGHUP is ignored, as under nohup, it stays so.
  Only the main thread can set handlers: in another one signals do what they did before.
  """

  def __enter__(self) -> "StopSignal":
    self.requested = False
    in_main = threading.current_thread() is threading.main_thread()
    numbers = [
      number
      for number in STOP_SIGNALS
      if in_main and (number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN)
    ]
    self._old = {number: signal.signal(number, self._handle) for number in numbers}
    return self

  def _handle(self, number: int, frame: FrameType | None) -> None:
    if self.requested and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.requested = True

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)


class AgreedStop:
  """A request to stop that all processes see at the same step, whichever got the signal.

  In a process that is alone, a signal counts at once. Among several, each gives its answer with a
  step, and hears that of all when the step has ended.

  Args:
    stop: of this process.
    mesh: all devices.
  """

  def __init__(self, stop: StopSignal, mesh: Mesh):
    self._stop, self._vote, self._agreed = stop, processes.Vote(mesh), False

  @property
  def requested(self) -> bool:
    """True once all processes stop."""
    return self._agreed or (processes.count() == 1 and self._stop.requested)

  def cast(self) -> jax.Array | bool:
    """Gives the answer of this process; returns that of all, for `hear`."""
    return self._vote.cast(self._stop.requested)

  def hear(self, answer: jax.Array | bool) -> bool:
    """Waits for the answer of all processes, and returns whether they stop."""
    self._agreed = self._agreed or bool(answer)
    return self.requested
