"""Saving and restoring runs with Orbax.

WORKDIR/checkpoints/STEP holds four checkpointables: `params`, `optimizer` (the optimizer's state),
`data` (JSON: the state of the data iterator) and `integrity` (JSON: a checksum per array, the step,
a digest of `data`). Orbax writes beside the final name and renames when all is written, so that a
killed save leaves the checkpoint before it as the newest. No other random state exists: everything
random derives from (seed, step). WORKDIR/model.json says which model and data the run has.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import typing
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from orbax.checkpoint import v1 as ocp

from sparsek.config import DataConfig, TransformerConfig
from sparsek.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, read_bos
from sparsek.errors import RunError, UsageError
from sparsek.model import lora
from sparsek.model.transformer import init_params
from sparsek.runs.orbax_errors import damage, first_line, mute_remains, passing_reason
from sparsek.runs.parameter_table import Comparison, explain_architecture, parameter_shapes
from sparsek.storage.files import exists, read_json_object, reason_of

Report = Callable[[str], None]
RECORDED_DATA = {"data": str, "seq_len": int, "batch_size": int, "segment_documents": bool}
RECORDED_TOKENIZER = {"name": str, "fingerprint": str, "vocab_size": int}
HALF_WRITTEN = ".orbax-checkpoint-tmp"
PROBE = ".probe"  # beside the checkpoints' steps, while a run starts
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DamagedCheckpoint(Exception):
  """A checkpoint that cannot be read in full, or whose contents are not what was saved."""


def to_stderr(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _context() -> ocp.Context:
  registry = ocp.handlers.local_registry()
  for name in ("data", "integrity"):
    registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
  context = ocp.Context()
  context.checkpointables.registry = registry
  return context


def _is_not_of_orbax(record) -> bool:
  return "orbax" not in record.pathname


@contextlib.contextmanager
def quiet_orbax():
  """Keeps Orbax's warnings and tracebacks off stderr, for the rest of the process.

  Whatever fails is raised too, and said in one line by the caller; Orbax's threads may say it
  again long after.
  """
  mute_remains()
  logging.get_absl_logger().addFilter(_is_not_of_orbax)
  yield


def checkpoint_folder(workdir: str) -> str:
  return os.path.join(os.path.abspath(workdir), "checkpoints")


def _step_folder(workdir: str, step: int) -> str:
  return os.path.join(checkpoint_folder(workdir), str(step))


def _entries(workdir: str) -> list[str]:
  """Returns the names in a run's folder of checkpoints, none where there is no such folder.

  Raises:
    RunError: where it cannot be read: then it is not known whether there are checkpoints.
  """
  folder = checkpoint_folder(workdir)
  try:
    return os.listdir(folder)
  except (FileNotFoundError, NotADirectoryError):
    return []
  except OSError as error:
    raise RunError(f"{folder} cannot be read: {reason_of(error)}") from None


def saved_steps(workdir: str) -> list[int]:
  """Steps of the finished checkpoints of a run, ascending; [] where there is none."""
  return sorted(int(name) for name in _entries(workdir) if re.fullmatch("0|[1-9][0-9]*", name))


@jax.jit
def _sums(tree):
  def bits_sum(x):
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

  return jax.tree.map(bits_sum, tree)


def checksums(tree) -> dict[str, int]:
  """Path -> the sum modulo 2^32 of the bits of each array; it does not depend on the devices and
  changes with any single bit.
  """
  sums = jax.device_get(_sums(tree))
  return {
    jax.tree_util.keystr(path): int(value)
    for path, value in jax.tree_util.tree_leaves_with_path(sums)
  }


def _digest(data_state: dict) -> str:
  """Returns a digest of the JSON that is saved, in which keys are strings and tuples lists."""
  saved = json.loads(json.dumps(data_state))
  return hashlib.sha256(json.dumps(saved, sort_keys=True).encode()).hexdigest()


def _integrity(step: int, arrays: dict[str, Any], data_state: dict) -> dict:
  """Returns what `_verify` compares a loaded checkpoint with."""
  sums = {name: checksums(tree) for name, tree in arrays.items()}
  return {"step": step, "data": _digest(data_state), "checksums": sums}


class CheckpointWriter:
  """Saves a run's checkpoints in the background and keeps the newest `keep`; older ones go only
  when a newer one is complete.
  """

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
    array = jnp.arange(4.0)
    try:
      shutil.rmtree(folder, ignore_errors=True)
      os.makedirs(folder)
      path = os.path.join(folder, "0")
      with _context(), quiet_orbax():
        ocp.save_checkpointables(path, {"params": {"probe": array}, "data": {}})
        back = ocp.load_checkpointables(path, {"params": {"probe": array}, "data": None})
      if not jnp.array_equal(back["params"]["probe"], array):
        raise OSError("what is read is not what was written")
    except Exception as error:  # Orbax and tensorstore raise many kinds
      full = isinstance(error, OSError) and error.errno in NO_SPACE
      kind = RunError if full else UsageError
      reason = reason_of(error) if isinstance(error, OSError) else first_line(error)
      raise kind(f"--workdir={self._workdir}: checkpoints cannot be written: {reason}") from error
    finally:
      shutil.rmtree(folder, ignore_errors=True)

  def save(self, step: int, params, opt_state, data_state: dict) -> None:
    """Starts saving; returns when the arrays are copied, so that they may be donated. Without an
    opt_state (None) no run can go on from the checkpoint.

    Raises:
      OSError and others: what went wrong in starting this save. Call `wait` first for the save
      before it.
    """
    if self._checkpointer is None:
      self._checkpointer = ocp.training.Checkpointer(
        checkpoint_folder(self._workdir),
        context=_context(),
        preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
      )
    arrays = {"params": params} | ({} if opt_state is None else {"optimizer": opt_state})
    integrity = _integrity(step, arrays, data_state)
    try:
      items = {**arrays, "data": data_state, "integrity": integrity}
      self._pending = self._checkpointer.save_checkpointables_async(step, items, force=True)
    except Exception:
      self._forget()
      raise

  def wait(self) -> None:
    """Returns when the save is on disk; raises what went wrong in it. Then those before it are
    untouched, and later saves can be tried.
    """
    pending, self._pending = self._pending, None
    if pending is not None:
      try:
        pending.result()
      except Exception:
        self._forget()
        raise

  def _forget(self) -> None:
    """Drops an Orbax checkpointer that failed, which would raise the same error for ever, and what
    it left half-written.
    """
    self._checkpointer = None
    remove_half_written(self._workdir, report=lambda line: None)

  def close(self) -> None:
    self.wait()
    if self._checkpointer is not None:
      self._checkpointer.close()


def remove_half_written(workdir: str, report: Report = to_stderr) -> None:
  """Removes what saves that were killed left behind, and reports each; the caller holds the run's
  lock.
  """
  folder = checkpoint_folder(workdir)
  for name in sorted(_entries(workdir)):
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
  raise UsageError(
    f"cannot restore {path}: its parameters do not fit this "
    f"model{': ' + reason if reason else ''}\n{comparison.table()}"
  )


def _load(
  workdir: str, step: int, config: TransformerConfig, abstract: dict[str, Any]
) -> dict[str, Any]:
  """Loads the named checkpointables of one step; `abstract` maps names to trees of
  jax.ShapeDtypeStruct with shardings, or None for JSON.

  Raises:
    DamagedCheckpoint: where a file is missing or cut, or its contents are not what was saved.
    UsageError: where the architecture differs; with the table of parameters.
    RunError: where it cannot be read for reasons that say nothing about its contents.
  """
  path = _step_folder(workdir, step)
  try:
    with _context(), quiet_orbax():
      params = ocp.checkpointables_metadata(path).metadata.get("params")
      if params:  # else loading says why it cannot be read
        _check_architecture(workdir, path, params, abstract["params"], config)
      loaded = ocp.load_checkpointables(path, {**abstract, "integrity": None})
    _verify(step, loaded, abstract)
    return loaded
  except (UsageError, DamagedCheckpoint):
    raise
  except Exception as error:  # Orbax and tensorstore raise many kinds for unreadable files
    reason = passing_reason(path, error)
    if reason:
      raise RunError(f"checkpoint {path} cannot be read; it stays where it is: {reason}") from error
    raise DamagedCheckpoint(damage(error)) from error


def _verify(step: int, loaded: dict[str, Any], abstract: dict[str, Any]) -> None:
  """Raises DamagedCheckpoint where what was loaded is not what `_integrity` was made of.

  Checkpoints of earlier versions have checksums of arrays only.
  """
  integrity = loaded["integrity"] if isinstance(loaded["integrity"], dict) else {}
  if integrity.get("step", step) != step:
    raise DamagedCheckpoint(f"its contents are those of step {integrity['step']}")
  if "data" in integrity and "data" in loaded and integrity["data"] != _digest(loaded["data"]):
    raise DamagedCheckpoint("the position in the data is not what was saved")
  sums = integrity.get("checksums")
  for name, tree in loaded.items():
    if abstract.get(name) is None:
      continue
    if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree)):
      raise DamagedCheckpoint(f"arrays of {name} are missing")
    if not isinstance(sums, dict) or sums.get(name) != checksums(tree):
      raise DamagedCheckpoint(f"a checksum of {name} differs")


def _load_first_good(
  workdir: str, steps: Iterable[int], config: TransformerConfig, abstract: dict[str, Any]
) -> tuple[int, dict[str, Any], dict[int, str]]:
  """Loads the first of some steps that is not damaged.

  Returns:
    (step, checkpointables, damaged steps before it -> what is wrong with them).
  Raises:
    UsageError: where all are damaged.
    RunError: where one cannot be read, as of `_load`.
  """
  damaged = {}
  for step in steps:
    try:
      return step, _load(workdir, step, config, abstract), damaged
    except DamagedCheckpoint as error:
      damaged[step] = str(error)
  reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
  raise UsageError(
    f"no checkpoint in {checkpoint_folder(workdir)} can be read ({reasons}); "
    f"move the folder away to start afresh"
  )


def restore_newest(
  workdir: str,
  config: TransformerConfig,
  abstract_opt_state,
  sharding,
  report: Report = to_stderr,
  last: int | None = None,
) -> Restored | None:
  """The newest good checkpoint of a run that goes on, or None where there is none.

  Checkpoints that are newer but damaged are reported and moved to WORKDIR/damaged, so that their
  steps can be saved again.

  Args:
    workdir: of the run; the caller holds its lock.
    config: the model that goes on; k, window, gate, dtype, ... may differ from the saved run's.
    abstract_opt_state: tree of shapes and dtypes.
    sharding: for every array.
    report: takes one line of text.
    last: the step to go back to, the only one that is looked at. None: the newest.
  Raises:
    UsageError: where the architecture differs, with a table of the parameters, or where all
      checkpoints are damaged.
    RunError: where one cannot be read for reasons that say nothing about its contents; nothing is
      moved.
  """
  steps = saved_steps(workdir)
  if not steps:
    return None
  abstract = {
    "params": _abstract(abstract_params(config), sharding),
    "optimizer": _abstract(abstract_opt_state, sharding),
    "data": None,
  }
  if last is not None:
    return _restore_step(workdir, last, config, abstract)
  step, loaded, damaged = _load_first_good(workdir, reversed(steps), config, abstract)
  for bad, reason in damaged.items():
    place = _move_damaged(workdir, bad)
    report(f"checkpoint {_step_folder(workdir, bad)} is damaged and moved to {place}: {reason}")
  return Restored(step, loaded["params"], loaded["optimizer"], loaded["data"])


def _restore_step(workdir: str, step: int, config: TransformerConfig, abstract: dict) -> Restored:
  """Returns the checkpoint of `step`; raises UsageError where it is damaged, and moves nothing."""
  try:
    loaded = _load(workdir, step, config, abstract)
  except DamagedCheckpoint as error:
    raise UsageError(
      f"--restore_step={step}: checkpoint {_step_folder(workdir, step)} is damaged: {error}"
    ) from error
  return Restored(step, loaded["params"], loaded["optimizer"], loaded["data"])


def _move_damaged(workdir: str, step: int) -> str:
  """Moves a checkpoint to WORKDIR/damaged and returns its place there."""
  folder = os.path.join(os.path.abspath(workdir), "damaged")
  places = (os.path.join(folder, f"{step}.{number}") for number in itertools.count())
  path = _step_folder(workdir, step)
  try:
    os.makedirs(folder, exist_ok=True)
    place = next(place for place in places if not os.path.lexists(place))
    os.rename(path, place)
  except OSError as error:
    raise RunError(
      f"checkpoint {path} is damaged and cannot be moved to {folder}: {reason_of(error)}"
    ) from None
  return place


def load_params(
  workdir: str,
  config: TransformerConfig,
  step: int | None = None,
  sharding=None,
  report: Report = to_stderr,
  allow_older: bool = False,
):
  """Parameters of a run, its adapters merged, for evaluation, generation and --init_from. Only
  reads.

  Args:
    workdir: of the run.
    config: the model they are for, as `load_run_config` says it; only its architecture must be the
      run's.
    step: None for the newest checkpoint.
    sharding: for every parameter; None puts them on the first device.
    report: takes one line of text about each damaged checkpoint passed over.
    allow_older: with no `step`, pass over damaged checkpoints to the newest good one.
  Returns:
    (params, step).
  Raises:
    UsageError: where there is no such checkpoint, it is damaged, or the architecture differs (with
      a table of the parameters).
    RunError: where it cannot be read for reasons that say nothing about its contents.
  """
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  saved = _with_adapters(workdir, config)
  abstract = {"params": _abstract(abstract_params(saved), sharding)}
  merge = (
    jax.jit(functools.partial(lora.merge, saved), out_shardings=sharding)
    if saved.lora_rank
    else lambda params: params
  )
  steps = saved_steps(workdir)
  if not steps:
    raise UsageError(f"{workdir} holds no checkpoint")
  if step is None and allow_older:
    step, loaded, damaged = _load_first_good(workdir, reversed(steps), saved, abstract)
    for bad, reason in damaged.items():
      folder = _step_folder(workdir, bad)
      report(f"checkpoint {folder} is damaged and is not used: {reason}")
    return merge(loaded["params"]), step
  if step is not None and step not in steps:
    raise UsageError(
      f"{workdir} holds no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
    )
  wanted = steps[-1] if step is None else step
  try:
    return merge(_load(workdir, wanted, saved, abstract)["params"]), wanted
  except DamagedCheckpoint as error:
    path = _step_folder(workdir, wanted)
    raise UsageError(f"checkpoint {path} is damaged: {error}{_advice(steps, wanted)}") from error


def _advice(steps: list[int], damaged: int) -> str:
  others = [step for step in reversed(steps) if step != damaged]
  if not others:
    return ""
  return (
    f"; the run has others ({', '.join(map(str, others))}): give --step={others[0]} "
    f"(DIR@{others[0]} in --init_from and --distill_from) or --allow_older_step"
  )


def parse_run_reference(reference: str) -> tuple[str, int | None]:
  """Splits "DIR" or "DIR@STEP"; a folder of exactly that name is meant where there is one.

  Raises:
    UsageError: where there is one, and DIR has a checkpoint of that step too.
  """
  parts = re.fullmatch(r"(.+)@(\d{1,18})", reference, re.ASCII | re.DOTALL)
  if not parts:
    return reference, None
  folder, step = parts[1], int(parts[2])
  if not os.path.isdir(reference):
    return folder, step
  if step in saved_steps(folder):
    raise UsageError(
      f"{reference} is ambiguous: write {reference}/ for the folder of that name, "
      f"or {folder}/@{step} for step {step} of {folder}"
    )
  return reference, None


def _with_adapters(workdir: str, config: TransformerConfig) -> TransformerConfig:
  """`config` with the adapters of a run, where it says that it has any."""
  try:
    run, _ = load_run_config(workdir, adapters=True)
  except UsageError:
    return config
  return dataclasses.replace(config, lora_rank=run.lora_rank, lora_alpha=run.lora_alpha)


def _check_record(run: dict) -> None:
  """Raises KeyError or TypeError for a model.json without what other modules read of it."""
  scalars = {
    name: kind
    for name, kind in typing.get_type_hints(TransformerConfig).items()
    if kind in (int, float, bool, str) and name in run["model"]
  }
  kinds = {"model": scalars, "data": RECORDED_DATA, "tokenizer": RECORDED_TOKENIZER}
  for section, fields in kinds.items():
    for name, kind in fields.items():
      value = run[section][name]
      if type(value) is not kind and not (kind is float and type(value) is int):
        raise TypeError(f"{name}={value!r} must be of type {kind.__name__}")
  ends = run["tokenizer"].get("eos_ids", [])
  if not (isinstance(ends, list) and all(type(end) is int for end in ends)):
    raise TypeError(f"eos_ids={ends!r} must be a list of token ids")


def load_run_config(workdir: str, adapters: bool = False) -> tuple[TransformerConfig, dict]:
  """The model of a run, and its model.json: {"model": TransformerConfig fields, "data": DataConfig
  fields, "tokenizer": {...}}.

  Args:
    workdir: of the run.
    adapters: as it is trained, perhaps with adapters; else as `load_params` gives it, with adapters
      merged.
  Raises:
    UsageError: where `workdir` holds no run or its model.json cannot be understood.
  """
  path = os.path.join(workdir, "model.json")
  if not exists(path):
    raise UsageError(f"{workdir} holds no run: there is no {path}")
  run = read_json_object(path)
  try:
    _check_record(run)
    DataConfig(**{name: run["data"][name] for name in RECORDED_DATA})
    config = TransformerConfig(**run["model"])
  except KeyError as error:
    raise UsageError(f"{path} cannot be understood: it has no {error}") from None
  except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
    raise UsageError(f"{path} cannot be understood: {error}") from None
  return config if adapters else lora.merged_config(config), run


def load_run_tokenizer(workdir: str) -> Tokenizer:
  """Returns the tokenizer a run was trained with, which its workdir keeps.

  It begins documents as those of the run begin.

  Raises:
    UsageError: where there is none or it cannot be read.
  """
  _, run = load_run_config(workdir)
  recorded = run["tokenizer"]
  is_byte = recorded["name"] == ByteTokenizer.name
  source = ByteTokenizer.name if is_byte else os.path.join(workdir, "tokenizer")
  tokenizer = load_tokenizer(source, recorded["fingerprint"])
  tokenizer.bos_ids = read_bos(recorded, tokenizer, os.path.join(workdir, "model.json"))
  return tokenizer
