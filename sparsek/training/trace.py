"""Traces of some steps of a run, and tables of the devices' time by kind of kernel."""

import collections
import glob
import os
import re
from collections.abc import Callable, Iterable

import jax

SELECTION = "thresholds and lists"  # a kind of kernels
# Kinds of kernels: (kind, pattern). The first pattern that occurs in a kernel's name decides.
KINDS = (
  (
    "attention",
    r"sparsek_(mma_)?(forward|query_gradients|key_gradients)"
    r"|cudnn.*(sdpa|fort_native|compute_dot_do_o|convert_dq)|flash|splash",
  ),
  ("norms", r"sparsek_rms_norm"),
  ("scorers' loss", r"sparsek_scorer_loss"),
  ("gathers and sums of rows", r"sparsek_(gather|sum)_rows"),
  (SELECTION, r"sparsek_|\bsort"),
  ("matrix products", r"nvjet|gemm|cutlass|cublas|convolution|\bdot"),
  ("copies and fills", r"memcpy|memset|^copy"),
  ("all else, by XLA", ""),
)
SHOWN = 12  # kernels that are listed one by one


class Profile:
  """A trace of some steps for TensorBoard or Perfetto, in WORKDIR/profile.

  At its end a table of an accelerator's time is printed. The run waits for the devices before the
  first step of the trace and after the last.
  """

  def __init__(self, workdir: str, steps: tuple[int, int] | None):
    self.folder, self._running = os.path.join(workdir, "profile"), False
    self._first, self._last = steps or (0, 0)

  def begins_at(self, step: int) -> bool:
    """Returns whether a step is the first of the trace."""
    return step == self._first

  def ends_at(self, step: int) -> bool:
    """Returns whether a step is the last of a trace in progress."""
    return self._running and step == self._last

  def before(self, step: int) -> None:
    """Starts the trace where this step is its first."""
    if self.begins_at(step):
      jax.profiler.start_trace(self.folder)
      self._running = True

  def after(self, step: int, say: Callable[[str], None]) -> None:
    """Ends the trace where this step was its last, and prints the table with `say`."""
    if self.ends_at(step):
      self.stop()
      say(f"a trace of steps {self._first} to {self._last} is in {self.folder}")
      for line in table(kernels(self.folder), self._last - self._first + 1):
        say(line)

  def stop(self) -> None:
    """Ends the trace, also one whose last step was not reached."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()


def kind_of(name: str) -> str:
  """Returns the kind of a kernel."""
  return next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))


def kernels(folder: str) -> list[tuple[str, float]]:
  """Returns the kernels that ran on this process's accelerators in the newest trace in a folder.

  Returns:
    (name, milliseconds) of each call; none where only a CPU was traced.
  """
  path = max(
    glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True),
    key=os.path.getmtime,
    default=None,
  )
  if path is None:
    return []
  lines = (
    line
    for plane in jax.profiler.ProfileData.from_file(path).planes
    if plane.name.startswith("/device:")
    for line in plane.lines
  )
  return [
    (event.name, event.duration_ns / 1e6)
    for line in lines
    if line.name.startswith("Stream") or line.name == "XLA Ops"
    for event in line.events
  ]


def by_kind(calls: Iterable[tuple[str, float]], steps: int = 1) -> dict[str, float]:
  """Returns the milliseconds a step of each kind of kernels.

  Args:
    calls: as `kernels` returns them; those of several devices add up.
    steps: how many the trace holds.
  """
  times: dict[str, float] = collections.defaultdict(float)
  for name, ms in calls:
    times[kind_of(name)] += ms / steps
  return dict(times)


def _largest(times: dict[str, float]) -> list[tuple[str, float]]:
  return sorted(times.items(), key=lambda item: item[1], reverse=True)


def table(calls: Iterable[tuple[str, float]], steps: int) -> list[str]:
  """Returns lines: milliseconds a step of each kind, then of the kernels that take most.

  Args:
    calls, steps: as in `by_kind`.
  """
  calls = list(calls)
  kinds = by_kind(calls, steps)
  by_name: dict[str, float] = collections.defaultdict(float)
  num_calls: collections.Counter[str] = collections.Counter()
  for name, ms in calls:
    # Removes suffixes: of copies of one kernel, and the numbers that XLA adds.
    name = re.sub(r"(_mosaic_gpu_kernel|[._]\d+)+$", "", name)
    by_name[name] += ms / steps
    num_calls[name] += 1
  total = sum(kinds.values())
  if not total:
    return []
  return [
    f"busy {total:.2f} ms a step",
    *(f"  {ms:8.2f} ms {ms / total:6.1%}  {kind}" for kind, ms in _largest(kinds)),
    "of these, by kernel:",
    *(
      f"  {ms:8.2f} ms {ms / total:6.1%}  {num_calls[name] / steps:5.4g} x {name[:80]}"
      for name, ms in _largest(by_name)[:SHOWN]
    ),
  ]
