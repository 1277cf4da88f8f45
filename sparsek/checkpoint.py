"""Saving and restoring runs with Orbax.

WORKDIR/checkpoints/STEP holds four checkpointables: `params`, `optimizer` (the optimizer's state), `data` (JSON: the state of the data
iterator) and `integrity` (JSON: a checksum per array). Orbax writes beside the final name and renames when all is written, so that a killed
save leaves the checkpoint before it as the newest.
No other random state exists: everything random derives from (seed, step). WORKDIR/model.json says which model and data the run has.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from orbax.checkpoint import v1 as ocp

from sparsek import lora
from sparsek.config import TransformerConfig
from sparsek.errors import RunError, UsageError
from sparsek.files import reason_of
from sparsek.model import init_params
from sparsek.parameter_table import Comparison, explain_architecture, parameter_shapes
from sparsek.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

Report = Callable[[str], None]
HALF_WRITTEN = ".orbax-checkpoint-tmp"
PROBE = ".probe"                                         # beside the checkpoints' steps, while a run starts
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DamagedCheckpoint(Exception):
  """A checkpoint that cannot be read in full, or whose contents are not what was saved."""


def first_line(error: Exception) -> str:
  """An error as part of one line: its kind and the start of its message."""
  lines = str(error).strip().splitlines()
  return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def to_stderr(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _context() -> ocp.Context:
  registry = ocp.handlers.local_registry()
  for name in ("data", "integrity"):
    registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
  context = ocp.Context()
  context.checkpointables.registry = registry
  return context


@contextlib.contextmanager
def quiet_orbax():
  """Keeps Orbax's warnings and tracebacks off stderr: whatever fails is raised too, and said in one line by the caller."""
  keep = lambda record: "orbax" not in record.pathname
  logger = logging.get_absl_logger()
  logger.addFilter(keep)
  try:
    yield
  finally:
    logger.removeFilter(keep)


def checkpoint_folder(workdir: str) -> str:
  return os.path.join(os.path.abspath(workdir), "checkpoints")


def saved_steps(workdir: str) -> list[int]:
  """Steps of the finished checkpoints of a run, ascending; [] where there is none."""
  folder = checkpoint_folder(workdir)
  return sorted(int(name) for name in os.listdir(folder) if name.isdecimal()) if os.path.isdir(folder) else []


@jax.jit
def _sums(tree):
  def bits_sum(x):
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)
  return jax.tree.map(bits_sum, tree)


def checksums(tree) -> dict[str, int]:
  """Path -> the sum modulo 2^32 of the bits of each array; it does not depend on the devices and changes with any single bit."""
  sums = jax.device_get(_sums(tree))
  return {jax.tree_util.keystr(path): int(value) for path, value in jax.tree_util.tree_leaves_with_path(sums)}


class CheckpointWriter:
  """Saves a run's checkpoints in the background and keeps the newest `keep`; older ones go only when a newer one is complete."""

  def __init__(self, workdir: str, keep: int):
    self._workdir, self._keep = workdir, keep
    self._checkpointer = self._pending = None

  def probe(self) -> None:
    """Saves a small checkpoint beside the others, reads it back and removes it.

    Raises:
      RunError: where the disk is full.
      UsageError: where checkpoints cannot be written for another reason.
    """
    folder = os.path.join(checkpoint_folder(self._workdir), PROBE)
    array = jnp.arange(4.)
    try:
      shutil.rmtree(folder, ignore_errors=True)
      os.makedirs(folder)
      path = os.path.join(folder, "0")
      with _context(), quiet_orbax():
        ocp.save_checkpointables(path, {"params": {"probe": array}, "data": {}})
        back = ocp.load_checkpointables(path, {"params": {"probe": array}, "data": None})
      if not jnp.array_equal(back["params"]["probe"], array):
        raise OSError("what is read is not what was written")
    except Exception as error:    # Orbax and tensorstore raise many kinds
      full = isinstance(error, OSError) and error.errno in NO_SPACE
      kind = RunError if full else UsageError
      reason = reason_of(error) if isinstance(error, OSError) else first_line(error)
      raise kind(f"--workdir={self._workdir}: checkpoints cannot be written: {reason}") from error
    finally:
      shutil.rmtree(folder, ignore_errors=True)

  def save(self, step: int, params, opt_state, data_state: dict) -> None:
    """Starts saving; returns when the arrays are copied, so that they may be donated. Without an opt_state (None) no run can go on from the checkpoint.

    Raises:
      OSError and others: what went wrong in starting this save. Call `wait` first for the save before it.
    """
    if self._checkpointer is None:
      self._checkpointer = ocp.training.Checkpointer(
          checkpoint_folder(self._workdir), context=_context(), preservation_policy=ocp.training.preservation_policies.LatestN(self._keep))
    arrays = {"params": params} | ({} if opt_state is None else {"optimizer": opt_state})
    integrity = {"checksums": {name: checksums(tree) for name, tree in arrays.items()}}
    try:
      items = {**arrays, "data": data_state, "integrity": integrity}
      self._pending = self._checkpointer.save_checkpointables_async(step, items, force=True)
    except Exception:
      self._forget()
      raise

  def wait(self) -> None:
    """Returns when the save is on disk; raises what went wrong in it. Then those before it are untouched, and later saves can be tried."""
    pending, self._pending = self._pending, None
    if pending is not None:
      try:
        pending.result()
      except Exception:
        self._forget()
        raise

  def _forget(self) -> None:
    """Drops an Orbax checkpointer that failed, which would raise the same error for ever, and what it left half-written."""
    self._checkpointer = None
    remove_half_written(self._workdir, report=lambda line: None)

  def close(self) -> None:
    self.wait()
    if self._checkpointer is not None:
      self._checkpointer.close()


def remove_half_written(workdir: str, report: Report = to_stderr) -> None:
  """Removes what saves that were killed left behind, and reports each; the caller holds the run's lock."""
  folder = checkpoint_folder(workdir)
  for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
    if HALF_WRITTEN in name:
      shutil.rmtree(os.path.join(folder, name))
      report(f"checkpoint {name.split('.')[0]} in {folder} is half-written (the run was stopped while saving): not used, removed")


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a checkpoint holds."""
  step: int
  params: Any
  opt_state: Any
  data_state: dict


def _abstract(tree, sharding):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def abstract_params(config: TransformerConfig):
  """Shapes and dtypes of the parameters of a model, without making them."""
  return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def _check_architecture(workdir: str, path: str, saved, wanted, config: TransformerConfig) -> None:
  comparison = Comparison(parameter_shapes(saved), parameter_shapes(wanted))
  if comparison.fits:
    return
  try:
    reason = explain_architecture(load_run_config(workdir, adapters=True)[0], config)
  except UsageError:
    reason = ""
  raise UsageError(f"cannot restore {path}: its parameters do not fit this model{': ' + reason if reason else ''}\n{comparison.table()}")


def _load(workdir: str, step: int, config: TransformerConfig, abstract: dict[str, Any]) -> dict[str, Any]:
  """Loads the named checkpointables of one step; `abstract` maps names to trees of jax.ShapeDtypeStruct with shardings, or None for JSON.

  Raises:
    DamagedCheckpoint: where it cannot be read or a checksum differs.
    UsageError: where the architecture differs; with the table of parameters.
    RunError: where memory does not suffice.
  """
  path = os.path.join(checkpoint_folder(workdir), str(step))
  try:
    with _context(), quiet_orbax():
      metadata = ocp.checkpointables_metadata(path).metadata
      if not metadata.get("params"):
        raise DamagedCheckpoint("the tree of parameters cannot be read")
      _check_architecture(workdir, path, metadata["params"], abstract["params"], config)
      loaded = ocp.load_checkpointables(path, {**abstract, "integrity": None})
    for name, tree in loaded.items():
      if abstract.get(name) is not None and checksums(tree) != loaded["integrity"]["checksums"][name]:
        raise DamagedCheckpoint(f"a checksum of {name} differs")
  except (UsageError, DamagedCheckpoint):
    raise
  except Exception as error:  # Orbax and tensorstore raise many kinds for unreadable files; whatever it is, this checkpoint cannot be used.
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):  # but for this, which says nothing of the files
      raise RunError(f"checkpoint {path} cannot be read for want of memory; it stays where it is: {first_line(error)}") from error
    raise DamagedCheckpoint(first_line(error)) from error
  return loaded


def _load_newest(workdir: str, config: TransformerConfig, abstract: dict[str, Any], report: Report, last: int | None = None) -> tuple[int, dict, list[int]]:
  """Loads the newest good checkpoint up to step `last`: (step, checkpointables, damaged steps that are newer). Each damaged one is reported."""
  damaged = {}
  for step in reversed([step for step in saved_steps(workdir) if last is None or step <= last]):
    try:
      return step, _load(workdir, step, config, abstract), list(damaged)
    except DamagedCheckpoint as error:
      damaged[step] = str(error)
      report(f"checkpoint {os.path.join(checkpoint_folder(workdir), str(step))} is damaged and is not used: {error}")
  if not damaged:
    raise UsageError(f"{workdir} holds no checkpoint")
  raise UsageError(f"no checkpoint in {checkpoint_folder(workdir)} can be read; move the folder away to start afresh")


def restore_newest(workdir: str, config: TransformerConfig, abstract_opt_state, sharding,
                   report: Report = to_stderr, last: int | None = None) -> Restored | None:
  """The newest good checkpoint of a run that goes on, or None where there is none.

  Checkpoints that are newer but damaged are reported and moved to WORKDIR/damaged, so that their steps can be saved again.

  Args:
    workdir: of the run; the caller holds its lock.
    config: the model that goes on; k, window, gate, dtype, ... may differ from the saved run's.
    abstract_opt_state: tree of shapes and dtypes.
    sharding: for every array.
    report: takes one line of text.
    last: the step to go back to; later checkpoints are not looked at. None: the newest.
  Raises:
    UsageError: where the architecture differs, with a table of the parameters, or where no checkpoint can be read.
    RunError: where memory does not suffice.
  """
  if not saved_steps(workdir):
    return None
  abstract = {"params": _abstract(abstract_params(config), sharding), "optimizer": _abstract(abstract_opt_state, sharding), "data": None}
  step, loaded, damaged = _load_newest(workdir, config, abstract, report, last)
  for bad in damaged:
    folder = os.path.join(os.path.abspath(workdir), "damaged")
    os.makedirs(folder, exist_ok=True)
    number = sum(name.split(".")[0] == str(bad) for name in os.listdir(folder))
    os.rename(os.path.join(checkpoint_folder(workdir), str(bad)), os.path.join(folder, f"{bad}.{number}"))
  return Restored(step, loaded["params"], loaded["optimizer"], loaded["data"])


def load_params(workdir: str, config: TransformerConfig, step: int | None = None, sharding=None, report: Report = to_stderr):
  """Parameters of a run, its adapters merged, for evaluation, generation and --init_from. Only reads.

  Args:
    workdir: of the run.
    config: the model they are for, as `load_run_config` says it; only its architecture must be the run's.
    step: None for the newest good checkpoint.
    sharding: for every parameter; None puts them on the first device.
    report: takes one line of text about each damaged checkpoint passed over.
  Returns:
    (params, step).
  Raises:
    UsageError: where there is no such checkpoint, it cannot be read, or the architecture differs (with a table of the parameters).
    RunError: where memory does not suffice.
  """
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  saved = _with_adapters(workdir, config)
  abstract = {"params": _abstract(abstract_params(saved), sharding)}
  merge = jax.jit(functools.partial(lora.merge, saved), out_shardings=sharding) if saved.lora_rank else lambda params: params
  if step is None:
    step, loaded, _ = _load_newest(workdir, saved, abstract, report)
    return merge(loaded["params"]), step
  if step not in saved_steps(workdir):
    raise UsageError(f"{workdir} holds no checkpoint of step {step}; it has {', '.join(map(str, saved_steps(workdir))) or 'none'}")
  try:
    return merge(_load(workdir, step, saved, abstract)["params"]), step
  except DamagedCheckpoint as error:
    raise UsageError(f"checkpoint {os.path.join(checkpoint_folder(workdir), str(step))} is damaged: {error}") from error


def parse_run_reference(reference: str) -> tuple[str, int | None]:
  """Splits "DIR" or "DIR@STEP"."""
  folder, at, step = reference.rpartition("@")
  return (folder, int(step)) if at and step.isdecimal() else (reference, None)


def _with_adapters(workdir: str, config: TransformerConfig) -> TransformerConfig:
  """`config` with the adapters of a run, where it says that it has any."""
  try:
    run, _ = load_run_config(workdir, adapters=True)
  except UsageError:
    return config
  return dataclasses.replace(config, lora_rank=run.lora_rank, lora_alpha=run.lora_alpha)


def load_run_config(workdir: str, adapters: bool = False) -> tuple[TransformerConfig, dict]:
  """The model of a run, and its model.json: {"model": TransformerConfig fields, "data": DataConfig fields, "tokenizer": {...}}.

  Args:
    workdir: of the run.
    adapters: as it is trained, perhaps with adapters; else as `load_params` gives it, with adapters merged.
  Raises:
    UsageError: where `workdir` holds no run or its model.json cannot be understood.
  """
  path = os.path.join(workdir, "model.json")
  try:
    with open(path) as file:
      run = json.load(file)
    config = TransformerConfig(**run["model"])
    return config if adapters else lora.merged_config(config), run
  except FileNotFoundError:
    raise UsageError(f"{workdir} holds no run: there is no {path}") from None
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UsageError(f"{path} cannot be understood: {error}") from None


def load_run_tokenizer(workdir: str) -> Tokenizer:
  """The tokenizer a run was trained with, which its workdir keeps. Raises UsageError where there is none or it cannot be read."""
  _, run = load_run_config(workdir)
  return load_tokenizer(ByteTokenizer.name if run["tokenizer"]["name"] == ByteTokenizer.name else os.path.join(workdir, "tokenizer"))
