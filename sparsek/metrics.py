"""What a run says about itself: metrics.jsonl, TensorBoard events, and the progress on the terminal."""

import json
import math
import os
import sys
import time

import tqdm

from sparsek.errors import RunError, UsageError


def read_metrics(path: str, last_step: int | None = None) -> list[dict]:
  """The objects of a metrics.jsonl up to `last_step`; a last line cut short by a kill is left out. [] where there is no file."""
  if not os.path.exists(path):
    return []
  with open(path) as file:
    lines = file.readlines()
  records = []
  for line in lines:
    try:
      records.append(json.loads(line))
    except ValueError:
      break
  return [record for record in records if last_step is None or record["step"] <= last_step]


class MetricsWriter:
  """Appends objects to WORKDIR/metrics.jsonl, and to TensorBoard where asked.

  Opening it at step s cuts the file back to the records of steps <= s, so that after a resume it continues as if nothing had happened.
  """

  def __init__(self, workdir: str, step: int, tensorboard: bool = False):
    self._tensorboard = open_tensorboard(workdir, step) if tensorboard else None
    path = os.path.join(workdir, "metrics.jsonl")
    self.records_kept = read_metrics(path, step)
    with open(path + ".new", "w") as file:
      file.writelines(self._line(record) for record in self.records_kept)
    os.replace(path + ".new", path)
    self._file = open(path, "a")

  @staticmethod
  def _line(record: dict) -> str:
    # JSON has no nan: a statistic that does not exist (the mean age of no keys) is null.
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
    return json.dumps(finite) + "\n"

  def write(self, record: dict) -> None:
    """Writes one object, which has an int "step" and else floats."""
    try:
      self._file.write(self._line(record))
      self._file.flush()
    except OSError as error:
      raise RunError(f"{self._file.name} cannot be written: {error.strerror}") from error
    if self._tensorboard is not None:
      for key, value in record.items():
        if key != "step":
          self._tensorboard.add_scalar(key, value, record["step"])
      self._tensorboard.flush()                                  # else a full disk is seen by its thread only, which ends

  def sync(self) -> None:
    """Returns when all is on disk; called before a checkpoint, which must not be newer than its metrics."""
    os.fsync(self._file.fileno())
    if self._tensorboard is not None:
      self._tensorboard.flush()

  def close(self) -> None:
    self._file.close()
    if self._tensorboard is not None:
      self._tensorboard.close()


def open_tensorboard(workdir: str, step: int):
  """A tensorboardX writer that hides events after `step`. Raises UsageError where tensorboardX is not installed."""
  try:
    import tensorboardX
  except ImportError:
    raise UsageError("--tensorboard needs tensorboardX: pip install 'sparsek[tensorboard]'") from None
  # The queue must hold what is added between two flushes: adding more waits, for a thread that a full disk may have ended.
  return tensorboardX.SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=step + 1, max_queue=10_000)


class Progress:
  """A bar on a terminal, else one line per logged step. Shows the loss, tokens per second and the time left."""

  def __init__(self, step: int, num_steps: int, stream=None):
    self._stream = stream or sys.stderr
    self._num_steps = num_steps
    self._bar = None
    if self._stream.isatty():
      self._bar = tqdm.tqdm(total=num_steps, initial=step, unit="step", file=self._stream, dynamic_ncols=True)

  def step(self, step: int) -> None:
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def log(self, step: int, loss: float, tokens_per_second: float, seconds_per_step: float | None, mfu: float | None = None) -> None:
    """Shows a logged step; `seconds_per_step` is None for the first, whose time went to compiling; `mfu` where the devices' peak rate is not known."""
    speed = f"{tokens_per_second:,.0f} tokens/s" + ("" if mfu is None else f", {mfu:.1%} MFU") if seconds_per_step is not None else "compiled"
    if self._bar is not None:
      self._bar.set_postfix_str(f"loss {loss:.4f}, {speed}")
    else:
      left = "" if seconds_per_step is None else f"  {tqdm.tqdm.format_interval(seconds_per_step * (self._num_steps - step))} left"
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
  """Seconds of training since the last reading, without those spent paused (evaluating, saving, compiling)."""

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
