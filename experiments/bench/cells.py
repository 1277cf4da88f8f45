"""Timing of functions: cells that are sampled in turn, round after round."""

import importlib.metadata
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from sparsek.runs import run_directory
from sparsek.training import trace

MAX_INNER = 1000
TRACED = 5  # calls of a trace
# raised by XLA and cuDNN for too little memory or an unsupported shape
ERRORS = (RuntimeError, MemoryError)


def reason(error: Exception) -> str:
  """Returns in one line why something could not be timed.

  A kernel that needs too much shared memory is not "out of memory": it fits no device.
  """
  text = str(error).lower()
  if isinstance(error, MemoryError) or (
    ("out of memory" in text or "failed to allocate" in text) and "shared memory" not in text
  ):
    return "out of memory"
  return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class Cell:
  """One function on one problem, and its samples.

  Attributes:
    failed: why it cannot be timed, or None.
    mib: arguments, outputs and temporaries of the compiled function together; None where it was not
      compiled or the backend does not say.
    inner: calls per sample.
    seconds: time of a call, one value per round.
    kinds_ms: milliseconds of each kind of kernels in a call, where it was traced on an accelerator.
  """

  def __init__(self, function: Callable[..., Any], args: tuple = (), in_order: bool = False):
    self._function, self._args, self._in_order = function, args, in_order
    self._lowered: jax.stages.Lowered | None = None
    self.failed: str | None = None
    self.mib: float | None = None
    self.inner = 1
    self.seconds: list[float] = []
    self.kinds_ms: dict[str, float] = {}

  def attempt(self, action: Callable[..., object], *args: Any) -> None:
    """Runs an action unless an earlier one failed; keeps a failure, so that other cells go on."""
    if self.failed is None:
      try:
        action(*args)
      except ERRORS as error:
        self.failed, self.seconds = reason(error), []

  def lower(self) -> None:
    """Traces the function for its arguments."""
    self._lowered = jax.jit(self._function).lower(*self._args)

  def compile(self) -> None:
    """Compiles what was lowered, and replaces the function by it."""
    assert self._lowered is not None
    compiled, self._lowered = self._lowered.compile(), None
    self._function = compiled
    memory = compiled.memory_analysis()
    if memory is not None:
      parts = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
      )
      self.mib = parts / 2**20

  def adopt(self, other: "Cell") -> None:
    """Takes over what another cell compiled for inputs of the same shapes."""
    self._function, self.mib, self.failed = other._function, other.mib, other.failed

  def time(self) -> float:
    """Returns the seconds of `inner` calls one after the other.

    A GPU runs them in order, so the host need not wait between them; elsewhere they could overlap.
    """
    begin = time.perf_counter()
    for _ in range(self.inner):
      out = self._function(*self._args)
      if not self._in_order:
        jax.block_until_ready(out)
    jax.block_until_ready(out)
    return time.perf_counter() - begin

  def calibrate(self, seconds: float) -> None:
    """Warms up, and chooses `inner` so that a sample takes that long."""
    self.time()
    for _ in range(3):
      taken = self.time()
      if taken >= seconds or self.inner == MAX_INNER:
        break
      self.inner = min(MAX_INNER, math.ceil(1.1 * self.inner * seconds / max(taken, 1e-9)))

  def sample(self) -> None:
    """Takes one sample."""
    self.seconds.append(self.time() / self.inner)

  def trace(self) -> None:
    """Finds the milliseconds of each kind of kernels (`sparsek.training.trace`) in some calls.

    A CPU has no kernels to trace.
    """
    if jax.default_backend() == "cpu":
      return
    inner, self.inner = self.inner, TRACED
    with tempfile.TemporaryDirectory() as folder:
      with jax.profiler.trace(folder):
        self.time()
      self.kinds_ms = trace.by_kind(trace.kernels(folder), TRACED)
    self.inner = inner

  def release(self) -> None:
    """Frees the memory of the arguments."""
    self._args = ()

  def record(self) -> dict[str, Any]:
    """Returns the median of the samples and related figures, or why there is none."""
    if self.failed is not None:
      return {"failed": self.failed, "mib": self.mib}
    traced = {"kinds_ms": self.kinds_ms} if self.kinds_ms else {}
    return summarize(self.seconds) | {"inner": self.inner, "mib": self.mib} | traced


def summarize(seconds: Sequence[float]) -> dict[str, Any]:
  """Returns the median of some samples in milliseconds, the fastest, the slowest, the number."""
  milliseconds = sorted(1e3 * x for x in seconds)
  return {
    "ms": statistics.median(milliseconds),
    "fastest": milliseconds[0],
    "slowest": milliseconds[-1],
    "rounds": len(milliseconds),
  }


def run_rounds(cells: Sequence[Cell], rounds: int, seconds: float) -> Iterator[int]:
  """Samples all cells in turn, forwards and backwards, so that none always follows the same one.

  Stops before a round that would not end in time. Yields the number of rounds done, after each.
  """
  begin = time.perf_counter()
  for turn in range(rounds):
    for cell in cells if turn % 2 == 0 else reversed(cells):
      cell.attempt(cell.sample)
    yield turn + 1
    elapsed = time.perf_counter() - begin
    if elapsed * (turn + 2) / (turn + 1) > seconds:
      return


def environment() -> dict[str, Any]:
  """Returns the device and the versions of all packages, of the GPU libraries too."""
  device, libraries = jax.devices()[0], {}
  for package in ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
    try:
      libraries[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      pass
  return {
    "device": device.device_kind,
    "versions": {
      **run_directory.versions(),
      "libraries": libraries,
      "backend": device.client.platform_version,
    },
  }
