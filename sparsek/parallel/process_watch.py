"""Threads by which the processes of one run notice that one of them failed, died or hangs.

Every process sets a key of the coordination service again and again, with the position of its main
thread. Process 0 compares them. The first reason to end is kept under one key, for which all
processes wait, so that they all end with the same sentence:

  main thread   --progress, pause-->  position  --beat-->  alive/0, alive/1, ...
  process 0     alive/*  --judge-->   ended  --listen-->  every process prints it and ends
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from sparsek.errors import RunError, UsageError

ALIVE, ENDED = "sparsek/alive/", "sparsek/ended"
BEATS = 20  # of a process within the timeout
# Part of the timeout that a process may be silent. JAX's own heartbeats, at half of it, come later:
# they abort the process with a stack trace.
SILENCE = 0.25
GRACE = 3.0  # seconds in which the main thread may end by itself when another process has failed


class Reason(NamedTuple):
  """Reason why all processes end.

  Attributes:
    text: one sentence.
    code: exit code.
    lost: a process is gone or hangs: nobody can wait for it.
  """

  text: str
  code: int
  lost: bool = False


NO_REASON = Reason("", 0)  # all processes end by themselves


class Beat(NamedTuple):
  """State of a process as it publishes it.

  Attributes:
    number: of this beat.
    position: steps that the main thread reported.
    running: a step is in progress, and may take as long as the timeout.
    host: name of the machine.
  """

  number: int
  position: int
  running: bool
  host: str


class Judge:
  """A judge of the beats of all processes.

  Args:
    timeout: seconds that a step may take; and SILENCE times that a process may be silent.
    num_processes: of the run.
    clock: returns seconds.
  """

  def __init__(self, timeout: float, num_processes: int, clock: Callable[[], float]):
    self._timeout, self._clock = timeout, clock
    start = Beat(-1, 0, False, "")
    self._last = dict.fromkeys(range(num_processes), (start, clock(), clock()))

  def judge(self, beats: Mapping[int, Beat]) -> str | None:
    """Returns the sentence with which the run ends, or None where all is well."""
    now = self._clock()
    all_run = all(beat.running for beat in beats.values())  # the others wait for one that does not
    for process, beat in beats.items():
      old, heard, moved = self._last[process]
      if beat.number != old.number:
        heard = now
      if beat.position != old.position or not all_run:
        moved = now
      self._last[process] = beat, heard, moved
    of_flag = f"(--process_timeout={self._timeout:g})"
    silent = [p for p, (_, heard, _) in self._last.items() if now - heard > SILENCE * self._timeout]
    if silent:
      return f"{self._names(silent)} died or hangs: no sign of life {of_flag}"
    if all(now - moved <= self._timeout for _, _, moved in self._last.values()):
      return None
    first = min(beat.position for beat, _, _ in self._last.values())
    behind = [p for p, (beat, _, _) in self._last.items() if beat.position == first]
    who = f"; {self._names(behind)} is behind" if len(behind) < len(self._last) else ""
    return f"a step did not end within {self._timeout:g} seconds {of_flag}{who}"

  def _names(self, processes: list[int]) -> str:
    hosts = {p: self._last[p][0].host for p in processes}
    return ", ".join(f"process {p}" + f" on {host}" * bool(host) for p, host in hosts.items())


class Watch:
  """Threads that watch the processes of a run, from `start` to `leave`.

  Args:
    client: of the coordination service.
    process_id, num_processes: of this process and of the run.
    timeout: seconds.
  """

  def __init__(self, client: Any, process_id: int, num_processes: int, timeout: float):
    self._client, self._process_id, self._timeout = client, process_id, timeout
    self._judge = Judge(timeout, num_processes, time.monotonic) if process_id == 0 else None
    self._leaving = threading.Event()
    self._position, self._running = 0, False
    self._threads = [
      threading.Thread(target=target, daemon=True) for target in (self._beat, self._listen)
    ]

  def start(self) -> None:
    """Starts the threads."""
    end_at_abort(Reason("another process died, unless the lines above say otherwise", 1))
    for thread in self._threads:
      thread.start()

  def progress(self) -> None:
    """Notes that a step has ended, and that the next one may take as long as the timeout."""
    self._position, self._running = self._position + 1, True

  def pause(self) -> None:
    """Notes that the main thread does what may take any time, until the next `progress`."""
    self._running = False

  def post(self, reason: Reason) -> None:
    """Ends all processes with this reason, unless there is one already."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._client.key_value_set(ENDED, json.dumps(reason))

  def leave(self) -> None:
    """Ends the threads, since this process ends by itself."""
    self._leaving.set()
    self.post(NO_REASON)  # a thread that waited for one would crash the end of the interpreter
    for thread in self._threads:
      thread.join(1.0)

  def _beat(self) -> None:
    """Publishes the state of this process; in process 0, judges those of all."""
    number, host = 0, socket.gethostname()
    while not self._leaving.wait(self._timeout / BEATS):
      beat, number = Beat(number, self._position, self._running, host), number + 1
      try:
        self._client.key_value_set(
          f"{ALIVE}{self._process_id}", json.dumps(beat), allow_overwrite=True
        )
        beats = self._client.key_value_dir_get(ALIVE) if self._judge is not None else []
      except jax.errors.JaxRuntimeError:
        self._lose_coordinator()
        return
      if self._judge is not None:
        sentence = self._judge.judge(
          {int(key.rsplit("/")[-1]): Beat(*json.loads(value)) for key, value in beats}
        )
        if sentence is not None:
          self.post(Reason(sentence, 1, lost=True))
          return

  def _listen(self) -> None:
    """Waits for the reason to end, and ends this process unless its main thread does."""
    while not self._leaving.is_set():
      try:
        text = self._client.blocking_key_value_get(ENDED, int(1000 * self._timeout))
      except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
          continue
        self._lose_coordinator()
        return
      reason = Reason(*json.loads(text))
      if reason == NO_REASON:
        return
      if reason.lost:
        if self._process_id == 0:
          time.sleep(min(1.0, self._timeout / BEATS))  # the others still read the reason from here
      elif self._leaving.wait(GRACE):
        return
      self._end(reason)

  def _lose_coordinator(self) -> None:
    """Ends this process since process 0, which runs the coordination service, is gone."""
    if not self._leaving.is_set():
      self._end(Reason("process 0 died: its coordination service does not answer", 1, lost=True))

  def _end(self, reason: Reason) -> None:
    """Prints the reason and ends this process, whatever its other threads wait for."""
    os.write(2, f"error: {reason.text}\n".encode())
    if not reason.lost:
      with contextlib.suppress(RuntimeError):
        jax.distributed.shutdown()
    os._exit(reason.code)


_at_abort = Reason("JAX aborted this process", 1)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _explain_abort(number: int) -> None:
  """Prints the sentence of `end_at_abort`, and ends the process."""
  os.write(2, f"error: {_at_abort.text}\n".encode())
  os._exit(_at_abort.code)


def end_at_abort(reason: Reason) -> None:
  """Lets this process end with a sentence where JAX aborts it, as when process 0 is gone.

  JAX's thread aborts within the same millisecond, and a handler of Python would run too late.
  """
  global _at_abort
  _at_abort = reason
  ctypes.CDLL(None).signal(signal.SIGABRT, _explain_abort)


def reason_of(error: BaseException, process_id: int) -> Reason:
  """Returns the reason to end for an error that one process has met."""
  if isinstance(error, UsageError):
    return Reason(str(error), 2)
  if isinstance(error, RunError):
    return Reason(str(error), 1)
  lines = str(error).strip().splitlines()
  return Reason(f"process {process_id} failed: {type(error).__name__}: {' '.join(lines[:1])}", 1)
