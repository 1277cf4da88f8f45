"""Saving of a run's checkpoints, in the format that `sparsek.runs.checkpoint` describes."""

import errno
import functools
import os
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from sparsek.errors import RunError, UsageError
from sparsek.parallel import processes
from sparsek.runs.checkpoint import (
  OPTIMIZER,
  Report,
  checkpoint_folder,
  entries,
  orbax_context,
  quiet_orbax,
  to_stderr,
)
from sparsek.runs.integrity import integrity_record
from sparsek.runs.orbax_errors import first_line
from sparsek.storage.files import reason_of

HALF_WRITTEN = ".orbax-checkpoint-tmp"  # in the names of folders that Orbax has not finished
PROBE = ".probe"  # a folder beside the checkpoints' steps, while a run starts
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointWriter:
  """A writer of a run's checkpoints, in the background, of which the newest `keep` stay.

  Older ones are deleted only when a newer one is complete.
  """

  def __init__(self, workdir: str, keep: int):
    self._workdir, self._keep = workdir, keep
    self._checkpointer: ocp.training.Checkpointer | None = None
    self._pending: ocp.AsyncResponse[bool] | None = None

  def probe(self) -> None:
    """Saves a small checkpoint beside the others, reads it back and removes it.

    Every process writes a part, and reads it back.

    Raises:
      RunError: where the disk is full.
      UsageError: where checkpoints cannot be written for another reason.
    """
    processes.together(self._probe)

  def _probe(self) -> None:
    folder = os.path.join(checkpoint_folder(self._workdir), PROBE)
    devices = Mesh(np.array(jax.devices()), "devices")
    array = jax.jit(
      lambda: jnp.arange(4.0 * devices.size), out_shardings=NamedSharding(devices, P("devices"))
    )()
    try:
      processes.on_first(functools.partial(_make_empty, folder))
      path = os.path.join(folder, "0")
      with orbax_context(), quiet_orbax():
        ocp.save_checkpointables(path, {"params": {"probe": array}, "data": {}})
        back = ocp.load_checkpointables(path, {"params": {"probe": array}, "data": None})
      if not all(map(np.array_equal, _shards(back["params"]["probe"]), _shards(array))):
        raise OSError("what is read is not what was written")
    except Exception as error:  # Orbax and tensorstore raise many kinds
      full = isinstance(error, OSError) and error.errno in NO_SPACE
      kind = RunError if full else UsageError
      reason = reason_of(error) if isinstance(error, OSError) else first_line(error)
      raise kind(f"--workdir={self._workdir}: checkpoints cannot be written: {reason}") from error
    finally:
      if processes.is_first():
        shutil.rmtree(folder, ignore_errors=True)

  def save(self, step: int, params: Any, opt_state: Any, data_state: dict) -> None:
    """Starts saving, and returns when the arrays are copied, so that they may be donated.

    The save before it must have ended: call `wait` first.

    Args:
      step: updates that led to this state.
      params, opt_state: arrays; where opt_state is None, no run can resume from the checkpoint.
      data_state: of the data iterator, JSON.
    Raises:
      OSError and others: where this save could not be started.
    """
    if self._checkpointer is None:
      self._checkpointer = ocp.training.Checkpointer(
        checkpoint_folder(self._workdir),
        context=orbax_context(),
        preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
      )
    arrays = {"params": params} | ({} if opt_state is None else {OPTIMIZER: opt_state})
    integrity = integrity_record(step, arrays, data_state)
    try:
      items = {**arrays, "data": data_state, "integrity": integrity}
      self._pending = self._checkpointer.save_checkpointables_async(step, items, force=True)
    except Exception:
      self.forget()
      raise

  def wait(self) -> None:
    """Waits until the save in progress, if any, is on disk.

    Raises:
      OSError and others: where that save failed. The checkpoints before it are then untouched, and
        later saves can be tried.
    """
    pending, self._pending = self._pending, None
    if pending is not None:
      try:
        pending.result()
      except Exception:
        self.forget()
        raise

  def forget(self) -> None:
    """Drops an Orbax checkpointer after a save that failed, and removes what is half-written.

    The same checkpointer would raise its error again in each later save.
    """
    self._checkpointer = self._pending = None
    if processes.is_first():
      remove_half_written(self._workdir, report=lambda line: None)

  def close(self) -> None:
    """Waits for the save in progress and ends Orbax's threads."""
    self.wait()
    if self._checkpointer is not None:
      self._checkpointer.close()


def _make_empty(folder: str) -> None:
  shutil.rmtree(folder, ignore_errors=True)
  os.makedirs(folder)


def _shards(array: jax.Array) -> list[np.ndarray]:
  """Returns the parts of an array on this process's devices."""
  return [np.asarray(shard.data) for shard in array.addressable_shards]


def remove_half_written(workdir: str, report: Report = to_stderr) -> None:
  """Removes half-written checkpoints, which killed saves left behind, and reports each.

  The caller holds the run's lock.

  Raises:
    RunError: where one cannot be removed.
  """
  folder = checkpoint_folder(workdir)
  for name in sorted(entries(workdir)):
    if HALF_WRITTEN in name:
      path = os.path.join(folder, name)
      try:
        shutil.rmtree(path)
      except OSError as error:
        raise RunError(f"{path}, half-written, cannot be removed: {reason_of(error)}") from None
      report(
        f"checkpoint {name.split('.')[0]} in {folder} is half-written (the run was stopped "
        "while saving): not used, removed"
      )
