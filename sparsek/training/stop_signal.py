"""Signals that ask a run to save and end."""

import signal
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopSignal:
  """Context in which STOP_SIGNALS set `requested` and do not end the process.

  A second SIGINT raises KeyboardInterrupt. Where SIGHUP is ignored, as under nohup, it stays so.
  """

  def __enter__(self) -> "StopSignal":
    self.requested = False
    numbers = [
      number
      for number in STOP_SIGNALS
      if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
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
