"""What a run says about itself: metrics.jsonl, TensorBoard events, and the progress on the
terminal.
"""

import io
import json
import math
import os
import sys
import time

import tqdm

from sparsek.errors import UsageError
from sparsek.storage.files import (
  cannot_write,
  check_regular,
  exists,
  parse_json,
  reason_of,
  write_atomically,
)

_told: set[str] = set()  # files whose foreign lines were told


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
  """Returns the JSON value of a line, None for a line that has none."""
  try:
    return parse_json(line.decode("utf-8"), "")
  except ValueError:
    return None


def _record(line: bytes) -> dict | None:
  """Returns the record that a line holds, an object with an int "step"; None for any other line."""
  value = _parse(line)
  return value if isinstance(value, dict) and type(value.get("step")) is int else None


def _split(content: bytes) -> list[tuple[bytes, dict | None]]:
  """Returns the lines and what they hold, without a last one that was torn while it was written."""
  lines = io.BytesIO(content).readlines()
  if lines and lines[-1].startswith(b"{") and lines[-1][-1:] != b"\n" and _parse(lines[-1]) is None:
    lines.pop()
  return [(line, _record(line)) for line in lines]


def _tell_foreign(path: str, lines: list[tuple[bytes, dict | None]]) -> None:
  """Says once per file and process which lines are no records."""
  foreign = [i for i, (line, record) in enumerate(lines, 1) if record is None and line.strip()]
  if foreign and (name := os.path.realpath(path)) not in _told:
    _told.add(name)
    are = "1 line is no record" if len(foreign) == 1 else f"{len(foreign)} lines are no records"
    print(
      f"warning: {path}: {are} (line {foreign[0]} is the first): skipped and kept",
      file=sys.stderr,
      flush=True,
    )


def read_metrics(path: str, last_step: int | None = None) -> list[dict]:
  """Returns the records of a metrics.jsonl, or of another file of objects that have an int "step".

  Lines that are no records are skipped, which is told once; a last one torn by a kill is left out.

  Args:
    path: of the file; where there is none, there are no records.
    last_step: of the last records to return; None for all.
  Raises:
    UsageError: where the file cannot be read or is no regular file.
  """
  lines = _split(_read(path))
  _tell_foreign(path, lines)
  records = [record for _, record in lines if record is not None]
  return [record for record in records if last_step is None or record["step"] <= last_step]


def append_record(path: str, record: dict) -> None:
  """Appends an object to a file of one object a line; raises RunError where it cannot.

  A last object that was torn by a kill is cut; every other line stays.
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
  """Appends objects to WORKDIR/metrics.jsonl, and to TensorBoard where asked.

  Opening it at step s removes the records of later steps, so that after a resume it continues as if
  nothing had happened. Lines that are no records stay, byte for byte.

  Raises:
    UsageError: where metrics.jsonl cannot be read or is no regular file.
    RunError: where it cannot be written.
  """

  def __init__(self, workdir: str, step: int, tensorboard: bool = False):
    self._tensorboard = open_tensorboard(workdir, step) if tensorboard else None
    self._path = os.path.join(workdir, "metrics.jsonl")
    content = _read(self._path)
    lines = _split(content)
    _tell_foreign(self._path, lines)
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
      os.truncate(self._path, len(kept))  # which needs no room on the disk
    elif kept != content:
      write_atomically(self._path, kept)

  @staticmethod
  def _line(record: dict) -> bytes:
    # JSON has no nan: a statistic that does not exist (the mean age of no keys) is null.
    finite = {
      key: None if isinstance(value, float) and not math.isfinite(value) else value
      for key, value in record.items()
    }
    return json.dumps(finite).encode() + b"\n"

  def write(self, record: dict) -> None:
    """Writes one object, an int "step" and else floats; raises RunError where it cannot."""
    line = self._line(record)
    try:
      while line:
        line = line[self._file.write(line) :]
    except OSError as error:
      raise cannot_write(self._path, error) from error
    if self._tensorboard is not None:
      for key, value in record.items():
        if key != "step":
          self._tensorboard.add_scalar(key, value, record["step"])
      self._tensorboard.flush()  # else a full disk is seen by its thread only, which ends

  def sync(self) -> None:
    """Returns when all is on disk; called before a checkpoint, which must not be newer than its
    metrics.
    """
    try:
      os.fsync(self._file.fileno())
    except OSError as error:
      raise cannot_write(self._path, error) from error
    if self._tensorboard is not None:
      self._tensorboard.flush()

  def close(self) -> None:
    self._file.close()
    if self._tensorboard is not None:
      self._tensorboard.close()


def open_tensorboard(workdir: str, step: int):
  """A tensorboardX writer that hides events after `step`. Raises UsageError where tensorboardX is
  not installed.
  """
  try:
    import tensorboardX
  except ImportError:
    raise UsageError(
      "--tensorboard needs tensorboardX: pip install 'sparsek[tensorboard]'"
    ) from None
  # The queue must hold what is added between two flushes: adding more waits, for a thread that a
  # full disk may have ended.
  folder = os.path.join(workdir, "tensorboard")
  return tensorboardX.SummaryWriter(folder, purge_step=step + 1, max_queue=10_000)


class Progress:
  """A bar on a terminal, else one line per logged step. Shows the loss, tokens per second and the
  time left.
  """

  def __init__(self, step: int, num_steps: int, stream=None):
    self._stream = stream or sys.stderr
    self._num_steps = num_steps
    self._bar = None
    if self._stream.isatty():
      self._bar = tqdm.tqdm(
        total=num_steps, initial=step, unit="step", file=self._stream, dynamic_ncols=True
      )

  def step(self, step: int) -> None:
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def log(
    self,
    step: int,
    loss: float,
    tokens_per_second: float,
    seconds_per_step: float | None,
    mfu: float | None = None,
  ) -> None:
    """Shows a logged step; `seconds_per_step` is None for the first, whose time went to compiling;
    `mfu` where the devices' peak rate is not known.
    """
    speed = (
      f"{tokens_per_second:,.0f} tokens/s" + ("" if mfu is None else f", {mfu:.1%} MFU")
      if seconds_per_step is not None
      else "compiled"
    )
    if self._bar is not None:
      self._bar.set_postfix_str(f"loss {loss:.4f}, {speed}")
    else:
      left = (
        ""
        if seconds_per_step is None
        else f"  {tqdm.tqdm.format_interval(seconds_per_step * (self._num_steps - step))} left"
      )
      self.say(f"step {step}/{self._num_steps}  loss {loss:.4f}  {speed}{left}")

  def say(self, line: str) -> None:
    """One line of text, above the bar."""
    if self._bar is not None:
      self._bar.write(line, file=self._stream)
    else:
      print(line, file=self._stream, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


class Stopwatch:
  """Seconds of training since the last reading, without those spent paused (evaluating, saving,
  compiling).
  """

  def __init__(self):
    self.restart()

  def restart(self, steps: int = 0) -> None:
    self._start, self._seconds, self._last_step = time.perf_counter(), 0.0, steps

  def pause(self) -> None:
    self._seconds += time.perf_counter() - self._start

  def resume(self) -> None:
    self._start = time.perf_counter()

  def lap(self, step: int) -> float:
    """Seconds per step since the last lap."""
    self.pause()
    seconds = self._seconds / max(step - self._last_step, 1)
    self.restart(step)
    return seconds
