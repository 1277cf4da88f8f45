"""Jobs and whole commands in forked processes, which need a second where a new Python needs more.

The process that forks has imported what commands need, and never computed: JAX's devices come up in
each child. One thread forks; a child is a process group, so that nothing of it outlives its limit.
"""

import atexit
import dataclasses
import faulthandler
import json
import os
import pathlib
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

TIMED_OUT = "timed out"
IDLE = 0.02  # share of a processor; a process that waits for ever may poll now and then


@dataclasses.dataclass(frozen=True)
class Call:
  """A job to run in a child.

  Attributes:
    job: runs there; what it returns must be JSON.
    folder: for the child's output.
    seconds: of its processor's time, or without any, after which the child is killed.
  """

  job: Callable[[], Any]
  folder: str
  seconds: float = 30.0


@dataclasses.dataclass(frozen=True)
class Ended:
  """The end of a child.

  Attributes:
    code: the exit code; minus the signal's number; or TIMED_OUT.
    out, err: what it printed.
    seconds: wall clock.
    value: what the job returned, or None.
  """

  code: int | str
  out: str
  err: str
  seconds: float
  value: Any


def command(name: str, *flags: str) -> Callable[[], None]:
  """Returns a job that runs `python -m experiments.NAME FLAGS` to its end."""

  def job():
    sys.argv = [name, *flags]
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)

  return job


def _child(call: Call) -> None:
  """Runs a job and ends the process as the interpreter would, its threads joined."""
  code = 0
  try:
    os.setpgid(0, 0)
    # SIGTERM may be ignored by whoever started the parent.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number, name in ((0, os.devnull), (1, "out"), (2, "err")):
      flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
      path = name if number == 0 else os.path.join(call.folder, name)
      file = os.open(path, flags, 0o600)
      os.dup2(file, number)
      os.close(file)
    faulthandler.enable()
    faulthandler.register(signal.SIGXCPU)
    value = call.job()
    pathlib.Path(call.folder, "value").write_text(json.dumps(value), encoding="utf-8")
  except SystemExit as exit_:
    code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    if not isinstance(exit_.code, int | None):
      print(exit_.code, file=sys.stderr)
  except BaseException:
    traceback.print_exc()
    code = 1
  finally:
    try:
      threading._shutdown()
      atexit._run_exitfuncs()
      sys.stdout.flush()
      sys.stderr.flush()
    except BaseException:
      traceback.print_exc()
      code = code or 120
    os._exit(code)


def _start(call: Call) -> int:
  os.makedirs(call.folder, exist_ok=True)
  for name in ("out", "err", "value"):
    pathlib.Path(call.folder, name).unlink(missing_ok=True)
  sys.stdout.flush()
  sys.stderr.flush()
  process = os.fork()
  if process == 0:
    _child(call)
  return process


def _kill_group(process: int) -> None:
  try:
    os.killpg(process, signal.SIGKILL)
  except (ProcessLookupError, PermissionError):
    pass


def _dump_and_kill(process: int) -> None:
  """Kills a child once it has written where all its threads are."""
  os.kill(process, signal.SIGXCPU)
  time.sleep(0.2)
  _kill_group(process)
  os.waitpid(process, 0)


class _Watch:
  """A watch on processor time: tells a child that hangs from one that waits for a processor."""

  def __init__(self, call: Call):
    self.began, self._limit = time.monotonic(), call.seconds
    self._marks = [(self.began, 0.0)]

  def is_over(self, group: int) -> bool:
    """Returns whether it used more than its limit, or nothing for as long as that."""
    now = time.monotonic()
    if now - self._marks[-1][0] < 1:
      return False
    used = _processor_seconds(group)
    self._marks.append((now, used))
    while now - self._marks[1][0] >= self._limit:
      del self._marks[0]
    since, used_then = self._marks[0]
    idle = now - since >= self._limit and used - used_then < IDLE * (now - since)
    return used > self._limit or idle


def _processor_seconds(group: int) -> float:
  """Returns the processor time of a process group, with children that have ended."""
  ticks = 0
  for entry in os.listdir("/proc"):
    if entry.isdecimal():
      try:
        with open(f"/proc/{entry}/stat", encoding="ascii", errors="replace") as file:
          fields = file.read().rpartition(")")[2].split()
      except OSError:
        continue
      if int(fields[2]) == group:
        ticks += sum(map(int, fields[11:15]))
  return ticks / os.sysconf("SC_CLK_TCK")


def _ended(call: Call, code: int | str, seconds: float) -> Ended:
  def read(name):
    path = pathlib.Path(call.folder, name)
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

  value = read("value")
  return Ended(code, read("out"), read("err"), seconds, json.loads(value) if value else None)


def run_all(chains: Iterable[Generator[Call, Ended, Any]], at_once: int = 2) -> Iterator[Any]:
  """Runs chains of calls side by side and yields what each returns, in the order in which they end.

  Args:
    chains: generators that yield a Call and are sent how it Ended.
    at_once: children.
  """
  waiting = iter(chains)
  running: dict[int, tuple[Generator, Call, _Watch]] = {}
  results = []

  def advance(chain, ended):
    try:
      call = next(chain) if ended is None else chain.send(ended)
    except StopIteration as stop:
      results.append(stop.value)
      return
    running[_start(call)] = chain, call, _Watch(call)

  try:
    while True:
      while len(running) < at_once:
        chain = next(waiting, None)
        if chain is None:
          break
        advance(chain, None)
      yield from results
      results.clear()
      if not running:
        break
      process, status = os.waitpid(-1, os.WNOHANG)
      now = time.monotonic()
      if process in running:
        _kill_group(process)
        chain, call, watch = running.pop(process)
        code = os.waitstatus_to_exitcode(status)
        advance(chain, _ended(call, code, now - watch.began))
      elif not process:
        for number, (chain, call, watch) in list(running.items()):
          if watch.is_over(number):
            _dump_and_kill(number)
            del running[number]
            advance(chain, _ended(call, TIMED_OUT, now - watch.began))
        time.sleep(0.005)
  finally:
    for number in running:
      _kill_group(number)


def run(job: Callable[[], Any], folder: str, seconds: float = 60.0) -> Ended:
  """Runs one job in a child."""

  def chain():
    return (yield Call(job, folder, seconds))

  return next(iter(run_all([chain()], 1)))


def command_faults(ended: Ended) -> list[str]:
  """Returns what is wrong with the way in which a command ended: it may succeed, or say why not.

  A command that fails has code 1 or 2, and one line "error: ..." on stderr, its last; nothing of it
  is a traceback.
  """
  if ended.code == TIMED_OUT:
    return [f"still running after {ended.seconds:.0f} s"]
  faults = []
  if "Traceback (most recent call last)" in ended.err or "Exception ignored" in ended.err:
    faults.append("a traceback")
  if ended.code not in (0, 1, 2):
    faults.append(f"code {ended.code}")
  lines = ended.err.strip().splitlines()
  if ended.code in (1, 2) and not (
    lines
    and lines[-1].startswith("error: ")
    and sum(line.startswith("error: ") for line in lines) == 1
  ):
    faults.append(f"code {ended.code} without one sentence at the end")
  return faults
