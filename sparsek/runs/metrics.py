"""Metrics of a run: metrics.jsonl and its copies, and the progress on the terminal."""

import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TextIO

import tqdm

from sparsek.errors import UsageError
from sparsek.runs.writers import Writer
from sparsek.storage.files import (
  cannot_write,
  check_regular,
  exists,
  parse_json,
  reason_of,
  write_atomically,
)

_reported: set[str] = set()  # files whose lines that are no records were reported


def _read(path: str) -> bytes:
  """Returns a file's content, b"" where there is none; raises UsageError for an unreadable one."""
  if not exists(path):
    return b""
  check_regular(path)
  try:
    with open(path, "rb") as file:
      return file.read()
  except OSError as error:
    raise UsageError(f"{path} cannot be read: {reason_of(error)}") from None


def _parse(line: bytes):
  """Returns the JSON value of a line, None for a line that is no JSON."""
  try:
    return parse_json(line.decode("utf-8"), "")
  except ValueError:
    return None


def _record(line: bytes) -> dict | None:
  """Returns the record that a line holds, an object with an int "step"; None for any other line."""
  value = _parse(line)
  return value if isinstance(value, dict) and type(value.get("step")) is int else None


def _split(content: bytes) -> list[tuple[bytes, dict | None]]:
  """Returns (line, record or None) of each line, without a last one that was only half written."""
  lines = io.BytesIO(content).readlines()
  if lines and lines[-1].startswith(b"{") and lines[-1][-1:] != b"\n" and _parse(lines[-1]) is None:
    lines.pop()
  return [(line, _record(line)) for line in lines]


def _report_foreign(path: str, lines: list[tuple[bytes, dict | None]]) -> None:
  """Reports once per file and process which lines are no records."""
  foreign = [i for i, (line, record) in enumerate(lines, 1) if record is None and line.strip()]
  if foreign and (name := os.path.realpath(path)) not in _reported:
    _reported.add(name)
    are = "1 line is no record" if len(foreign) == 1 else f"{len(foreign)} lines are no records"
    print(
      f"warning: {path}: {are} (line {foreign[0]} is the first): skipped and kept",
      file=sys.stderr,
      flush=True,
    )


def read_metrics(path: str, last_step: int | None = None) -> list[dict]:
  """Returns the records of a metrics.jsonl, or of another file of objects that have an int "step".

  Lines that are no records are skipped, which is reported once; a last line that a kill left half
  written is skipped too.

  Args:
    path: of the file; where there is none, there are no records.
    last_step: records of later steps are left out; None for all.
  Raises:
    UsageError: where the file cannot be read or is no regular file.
  """
  lines = _split(_read(path))
  _report_foreign(path, lines)
  records = [record for _, record in lines if record is not None]
  return [record for record in records if last_step is None or record["step"] <= last_step]


def append_record(path: str, record: dict) -> None:
  """Appends an object to a file of one object a line; raises RunError where it cannot.

  A last object that a kill left half written is cut; every other line stays.
  """
  try:
    with open(path, "a+b") as file:
      file.seek(0)
      kept = b"".join(line for line, _ in _split(file.read()))
      file.truncate(len(kept))
      is_ended = not kept or kept.endswith(b"\n")
      file.write((b"" if is_ended else b"\n") + json.dumps(record).encode() + b"\n")
  except OSError as error:
    raise cannot_write(path, error) from None


class MetricsWriter:
  """Writer of WORKDIR/metrics.jsonl, and of copies for programs that show metrics.

  Opening it at step s removes the records of later steps, so that a resumed run continues the file
  as if it had never stopped. Lines that are no records stay, byte for byte.

  Args:
    workdir: of the run.
    step: s.
    copies: writers that get every record too, and are closed with this one.

  Attributes:
    records_kept: the records of the file up to step s.

  Raises:
    UsageError: where metrics.jsonl cannot be read or is no regular file.
    RunError: where it cannot be written.
  """

  def __init__(self, workdir: str, step: int, copies: Sequence[Writer] = ()):
    self._copies = copies
    self._path = os.path.join(workdir, "metrics.jsonl")
    content = _read(self._path)
    lines = _split(content)
    _report_foreign(self._path, lines)
    kept = [(line, record) for line, record in lines if record is None or record["step"] <= step]
    self.records_kept = [record for _, record in kept if record is not None]
    try:
      self._cut_to(b"".join(line for line, _ in kept), content)
      # Unbuffered: a line that a full disk refuses must not be written again by close.
      self._file = open(self._path, "ab", buffering=0)
    except OSError as error:
      raise cannot_write(self._path, error) from error

  def _cut_to(self, kept: bytes, content: bytes) -> None:
    if kept and kept[-1:] != b"\n":
      kept += b"\n"
    if kept != content and content.startswith(kept):
      os.truncate(self._path, len(kept))  # needs no space on the disk
    elif kept != content:
      write_atomically(self._path, kept)

  @staticmethod
  def _line(record: dict) -> bytes:
    # JSON has no NaN: a statistic that does not exist (the mean age of no keys) is null.
    finite = {
      key: None if isinstance(value, float) and not math.isfinite(value) else value
      for key, value in record.items()
    }
    return json.dumps(finite).encode() + b"\n"

  def write(self, record: dict) -> None:
    """Writes an object with an int "step", floats, and objects and texts that copies do not get.

    Raises:
      RunError: where it cannot.
    """
    line = self._line(record)
    try:
      while line:
        line = line[self._file.write(line) :]
    except OSError as error:
      raise cannot_write(self._path, error) from error
    scalars = {
      key: value
      for key, value in record.items()
      if key != "step" and not isinstance(value, (dict, str))
    }
    for copy in self._copies:
      copy.write(record["step"], scalars)

  def sync(self) -> None:
    """Waits until all records are on disk.

    It is called before a checkpoint is saved, which must not be newer than its metrics.
    """
    try:
      os.fsync(self._file.fileno())
    except OSError as error:
      raise cannot_write(self._path, error) from error

  def close(self) -> None:
    """Closes the file and the copies."""
    self._file.close()
    for copy in self._copies:
      copy.close()


class NoMetrics(MetricsWriter):
  """Writer of nothing, for processes other than the first of a run."""

  def __init__(self) -> None:
    self.records_kept = []

  def write(self, record: dict) -> None:
    """Drops a record."""

  def sync(self) -> None:
    """Returns at once."""

  def close(self) -> None:
    """Returns at once."""


class Progress:
  """A bar on a terminal, elsewhere one line per logged step: loss, tokens per second, time left.

  Both show the speed of the last lap. The bar's own would count compiling and evaluating.
  """

  _BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"

  def __init__(self, step: int, num_steps: int, stream: TextIO | None = None):
    self._stream, self._num_steps = stream or sys.stderr, num_steps
    self.begin("", "loss")
    self._bar: tqdm.tqdm | None = None
    if self._stream.isatty():
      self._bar = tqdm.tqdm(
        total=num_steps, initial=step, file=self._stream, dynamic_ncols=True, bar_format=self._BAR
      )

  def begin(self, stage: str, loss_name: str) -> None:
    """Takes the name of the stage that follows, "" for none, and that of its loss."""
    self._stage, self._loss_name = stage, loss_name

  def step(self, step: int) -> None:
    """Moves the bar, if any, to a step."""
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def log(
    self,
    step: int,
    loss: float,
    tokens_per_second: float | None = None,
    seconds_per_step: float | None = None,
    mfu: float | None = None,
  ) -> None:
    """Shows a logged step.

    Args:
      step, loss: of the step.
      tokens_per_second, seconds_per_step: of the last lap; None where none has been measured.
      mfu: None where the devices' peak rate is not known.
    """
    shown = [self._stage] * bool(self._stage) + [f"{self._loss_name} {loss:.4f}"]
    if tokens_per_second is not None and seconds_per_step is not None:
      of_peak = "" if mfu is None else f", {mfu:.1%} MFU"
      time_left = tqdm.tqdm.format_interval(seconds_per_step * (self._num_steps - step))
      shown += [f"{tokens_per_second:,.0f} tokens/s{of_peak}", f"{time_left} left"]
    if self._bar is not None:
      self._bar.set_postfix_str(", ".join(shown))
    else:
      self.say("  ".join([f"step {step}/{self._num_steps}", *shown]))

  def say(self, line: str) -> None:
    """Prints a line of text, above the bar."""
    if self._bar is not None:
      self._bar.write(line, file=self._stream)
    else:
      print(line, file=self._stream, flush=True)

  def close(self) -> None:
    """Ends the bar, if any."""
    if self._bar is not None:
      self._bar.close()


class Stopwatch:
  """Time of whole steps, without pauses: profiling, evaluating, saving.

  It runs from the first `lap` on. A lap ends when the devices have ended a step and all before it.
  """

  def __init__(self):
    self._begin, self._seconds = self.now(), 0.0
    self._last_step: int | None = None

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Stops the time in the block, which begins when the devices have nothing left to do."""
    self._seconds += self.now() - self._begin
    yield
    self._begin = self.now()

  def now(self) -> float:
    """Returns the time in seconds."""
    return time.perf_counter()

  def lap(self, step: int, ahead: float = 0.0) -> float | None:
    """Ends a lap and starts another.

    Args:
      step: that has ended.
      ahead: seconds since the last lap that the host spent on the next step, whose lap they are in.
    Returns:
      the seconds per step, None at the end of the first lap.
    """
    now, last_step = self.now(), self._last_step
    seconds = self._seconds + now - self._begin - ahead
    self._begin, self._seconds, self._last_step = now, ahead, step
    return None if last_step is None else seconds / (step - last_step)
