"""Saving of checkpoints while a run trains: a save that fails does not end it."""

import contextlib
import functools
import os
from collections.abc import Callable

from sparsek.errors import RunError
from sparsek.parallel import processes
from sparsek.runs import run_directory
from sparsek.runs.checkpoint_writer import CheckpointWriter
from sparsek.runs.metrics import MetricsWriter
from sparsek.runs.orbax_errors import first_line
from sparsek.training import spikes
from sparsek.training.step import TrainState

SPIKES = "spikes"  # key in the data state of a checkpoint


class Saver:
  """Checkpoints of a run in progress.

  A save that fails is reported, and training goes on to the next one.

  Attributes:
    saved_step: step of the newest complete checkpoint, or None.
  """

  def __init__(
    self,
    workdir: str,
    writer: CheckpointWriter,
    metrics: MetricsWriter,
    saved_step: int | None,
    say: Callable[[str], None],
  ):
    """Initialises the saver of a run whose lock, metrics and folder of checkpoints exist.

    Args:
      workdir, writer, metrics: of the run.
      saved_step: step of the newest complete checkpoint, or None.
      say: takes one line of text.
    """
    self.saved_step = saved_step
    self._saving_step: int | None = None  # of the checkpoint that is being written
    self._ended = False  # the processes cannot save together any more
    self._workdir, self._writer, self._metrics, self._say = workdir, writer, metrics, say
    names = ("lock", "metrics.jsonl", "checkpoints") if processes.is_first() else ()
    self._presence = run_directory.Presence(os.path.join(workdir, name) for name in names)

  def has(self, step: int) -> bool:
    """Returns whether the checkpoint of a step is complete or being written."""
    return step in (self.saved_step, self._saving_step)

  def save(self, step: int, state: TrainState, data_state: dict) -> None:
    """Starts saving a step, once its metrics are on disk and the save before it has ended.

    Raises:
      RunError: where the folder of the run is gone, or the processes do not agree any more.
    """
    processes.on_first(self._presence.check)
    processes.on_first(self._metrics.sync)
    self.finish()
    if state.spikes:
      data_state = {**data_state, SPIKES: spikes.to_json(state.spikes)}
    try:
      processes.together(
        functools.partial(self._writer.save, step, state.params, state.opt_state, data_state)
      )
      self._saving_step = step
    except processes.OutOfStep:
      self._ended = True
      raise
    except Exception as error:  # Orbax and tensorstore raise many kinds for a full or failing disk.
      self._forget()
      self._say(
        f"the checkpoint of step {step} cannot be saved, those before it are kept: "
        f"{first_line(error)}"
      )

  def finish(self) -> None:
    """Waits for the save in progress, if any."""
    if self._ended:
      return
    try:
      processes.together(self._writer.wait)
      self.saved_step = self.saved_step if self._saving_step is None else self._saving_step
    except processes.OutOfStep:
      self._ended = True
      raise
    except Exception as error:
      self._forget()
      self._say(
        f"the checkpoint of step {self._saving_step} could not be saved, those before it are "
        f"kept: {first_line(error)}"
      )
    self._saving_step = None

  def _forget(self) -> None:
    """Drops what this process saved where another process failed to save its part."""
    if processes.count() > 1:  # a process alone has dropped it
      self._writer.forget()

  def wind_up(self) -> None:
    """Waits for the save in progress, if any, where perhaps this process alone has failed."""
    if processes.count() == 1:
      self.finish()
    elif not self._ended:
      with contextlib.suppress(Exception):  # the run ends for another reason
        self._writer.wait()

  def close(self, step: int) -> None:
    """Ends saving, with `step` as the last one.

    Raises:
      RunError: where that step was not saved, or the folder of the run is gone.
    """
    self.finish()
    self._writer.close()
    processes.on_first(self._presence.check)
    if self.saved_step != step:
      raise RunError(
        f"the checkpoint of step {step} could not be saved in {self._workdir}; the newest "
        f"is of step {self.saved_step}"
      )
