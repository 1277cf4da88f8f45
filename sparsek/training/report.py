"""Reports of the steps of a run: metrics, speed, spikes, and a loss that is not finite."""

import math
from typing import NamedTuple

import jax
import numpy as np

from sparsek.model import flops
from sparsek.parallel.mesh import own_parts
from sparsek.runs.metrics import MetricsWriter, Progress, Stopwatch
from sparsek.training import spikes
from sparsek.training.start import Setup, Start


class Ended(Exception):
  """Reason why a run cannot go on, such as a loss that is not finite; names the step."""


class Dispatched(NamedTuple):
  """A step that the devices work on, and what its report needs.

  Attributes:
    lengths: of the documents in this process's rows.
    stop: answer to `AgreedStop.cast`.
  """

  step: int
  batch: dict[str, jax.Array]
  outputs: dict[str, jax.Array]
  diagnostics: dict[str, jax.Array]
  lengths: np.ndarray
  stop: jax.Array | bool


class Reporter:
  """Reader of the metrics that the devices return, step by step.

  Attributes:
    loss: of the last ordinary step, or None.
    last_batch: of that step, on the devices, or None.
    last_update: words about the update of that step, for messages.
    first_step: of this process and stage; in it everything is compiled.
    watch: the time that steps take, from the end of the first one on.
  """

  def __init__(self, setup: Setup, start: Start, metrics: MetricsWriter, progress: Progress):
    self.loss: float | None = None
    self.last_batch: dict[str, jax.Array] | None = None
    self.last_update = ""
    self.first_step = start.step + 1
    self.watch = Stopwatch()
    self._setup, self._train = setup, setup.train
    self._metrics, self._progress = metrics, progress
    self._skipped, self._skipped_in_a_row = start.skipped, 0
    self._work: list[int] = []  # operations of each step since the last lap of the watch
    # The step of a warm-up is not the forward and backward pass that operations are counted for.
    self._peak_flops = None if self._train.scorer_warmup else flops.peak(jax.devices()[0])

  def is_logged(self, step: int) -> bool:
    """Returns whether the metrics of a step are written."""
    first, last = self._setup.stage.begin + 1, self._setup.end
    return step in (first, last) or step % self._train.log_every == 0

  def is_diagnosed(self, step: int) -> bool:
    """Returns whether the selection in a step is measured; the first time, this compiles."""
    return step == self.first_step or self.is_logged(step)

  def report(self, done: Dispatched, ahead: float) -> None:
    """Reads the metrics of a step, which waits for it, and logs them where due.

    The speed that is logged is the mean since the last step that was logged, or else since the
    first one; that one has none.

    Args:
      done: the step.
      ahead: as in `Stopwatch.lap`.

    Raises:
      Ended: where the run cannot go on after this step.
    """
    setup = self._setup
    of_process = flops.training_flops(setup.config, setup.params_shape, done.lengths)
    parts, num_parts = own_parts(setup.mesh)
    self._work.append(of_process * num_parts // len(parts))
    outputs = {key: value.item() for key, value in jax.device_get(done.outputs).items()}
    if not self._is_spike(done.step, outputs):
      # This raises before the parameters after this step are saved, so that the newest checkpoint
      # is a good one.
      self._check_finite(done.step, outputs)
      self.loss, self.last_batch = outputs["loss"], done.batch
    self._progress.step(done.step)
    if not self.is_diagnosed(done.step):
      return
    # The diagnosis belongs to the time of its step.
    selection = {key: float(value) for key, value in jax.device_get(done.diagnostics).items()}
    seconds = self.watch.lap(done.step, ahead)
    if self.is_logged(done.step):
      speed = {} if seconds is None else self._speed(seconds)
      label = self._setup.stage.label
      self._metrics.write({"step": done.step, **label, **outputs, **speed, **selection})
      self._progress.log(done.step, outputs["loss"], seconds_per_step=seconds, **speed)
    self._work.clear()

  def _speed(self, seconds: float) -> dict[str, float]:
    """Returns {"tokens_per_second"}, and "mfu" where it is known, at some seconds a step."""
    data = self._train.data
    speed = {"tokens_per_second": data.batch_size * data.seq_len / seconds}
    if self._peak_flops is not None:
      mean_flops = sum(self._work) / len(self._work)
      speed["mfu"] = mean_flops / seconds / (self._peak_flops * self._setup.mesh.size)
    return speed

  def _is_spike(self, step: int, outputs: dict) -> bool:
    """Returns whether the update of a step was skipped as a spike, and reports it.

    Raises:
      Ended: where --on_spike=stop, or too many follow each other.
    """
    skipped = outputs.get("skipped", self._skipped)
    if skipped == self._skipped:
      self._skipped_in_a_row = 0
      return False
    self._skipped, self._skipped_in_a_row = skipped, self._skipped_in_a_row + 1
    line = (
      f"step {step}: a spike, by --spike_factor={self._train.spike_factor}: loss "
      f"{outputs['loss']:.4g}, gradient norm {outputs['grad_norm']:.4g}"
    )
    if self._train.on_spike == "stop":
      raise Ended(f"{line}; the run ends, as --on_spike says")
    if self._skipped_in_a_row == spikes.MOST_IN_A_ROW:
      raise Ended(f"{line}; it is the {self._skipped_in_a_row}th in a row")
    self._progress.say(f"{line}; its update is skipped ({skipped} so far)")
    return True

  def _check_finite(self, step: int, outputs: dict) -> None:
    """Raises Ended where the loss or the gradient norm of a step is not finite."""
    loss, grad_norm = outputs["loss"], outputs["grad_norm"]
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
      raise Ended(f"the loss is {loss} and the gradient norm {grad_norm} at step {step}")
    self.last_update = f", whose update had loss {loss:.4g} and gradient norm {grad_norm:.4g}"
