"""Checkpoints of a run: their format, and how they are read with Orbax.

WORKDIR/checkpoints/STEP holds four checkpointables: `params`, `training_state` (the optimizer's
state), `data` (JSON: the state of the data iterator) and `integrity` (JSON: a checksum per array,
the step, a digest of `data`). Of several trees, `orbax.checkpoint.v1.load(STEP)` takes the first by
name, which must be `params`; docs/checkpoints.md says how else they open. Orbax writes to a
temporary name and renames the folder when all is written, so that a killed save leaves the
checkpoint before it as the newest. No other random state exists: everything random derives from
(seed, step). `sparsek.runs.run_record` reads WORKDIR/model.json.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from sparsek.config import TransformerConfig
from sparsek.errors import RunError, UsageError
from sparsek.model import lora
from sparsek.model.transformer import Params, init_params
from sparsek.parallel import processes
from sparsek.parallel.sharding import computed_on, placements
from sparsek.runs import orbax_handlers
from sparsek.runs.integrity import DamagedCheckpoint, verify
from sparsek.runs.orbax_errors import damage, mute_remains, passing_reason
from sparsek.runs.parameter_table import Comparison, explain_architecture, parameter_shapes
from sparsek.runs.run_record import load_run_config
from sparsek.storage.files import reason_of

Report = Callable[[str], None]
OPTIMIZER = "training_state"  # the checkpointable with the optimizer's state
OPTIMIZER_0_1 = "optimizer"  # its name in checkpoints of version 0.1


def to_stderr(line: str) -> None:
  """Prints a line to stderr."""
  print(line, file=sys.stderr, flush=True)


def orbax_context() -> ocp.Context:
  """Returns the context of Orbax in which checkpoints are saved and loaded."""
  registry = ocp.handlers.local_registry()
  for name in ("params", OPTIMIZER):
    registry.add(orbax_handlers.Arrays, checkpointable_name=name)
  for name in ("data", "integrity"):
    registry.add(orbax_handlers.Json, checkpointable_name=name)
  context = ocp.Context()
  context.checkpointables.registry = registry
  return context


def _is_not_of_orbax(record) -> bool:
  return "orbax" not in record.pathname


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
  """Keeps Orbax's warnings and tracebacks off stderr, for the rest of the process.

  Every failure is also raised, and the caller reports it in one line; Orbax's threads may repeat it
  long after.
  """
  mute_remains()
  logging.get_absl_logger().addFilter(_is_not_of_orbax)
  yield


def checkpoint_folder(workdir: str) -> str:
  """Returns the absolute path of the folder that holds a run's checkpoints."""
  return os.path.join(os.path.abspath(workdir), "checkpoints")


def _step_folder(workdir: str, step: int) -> str:
  return os.path.join(checkpoint_folder(workdir), str(step))


def entries(workdir: str) -> list[str]:
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
  """Returns the steps of a run's finished checkpoints, ascending; [] where there is none."""
  return sorted(int(name) for name in entries(workdir) if re.fullmatch("0|[1-9][0-9]*", name))


def parse_run_reference(reference: str) -> tuple[str, int | None]:
  """Returns (DIR, None) for "DIR", and (DIR, STEP) for "DIR@STEP".

  Where there is a folder called "DIR@STEP", that folder is meant.

  Raises:
    UsageError: where there is such a folder, and DIR has a checkpoint of that step too.
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


@dataclasses.dataclass(frozen=True)
class Restored:
  """Contents of a checkpoint from which a run resumes."""

  step: int
  params: Params
  opt_state: Any
  data_state: dict


def _abstract(tree, mesh):
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    tree,
    placements(mesh, tree),
  )


def abstract_params(config: TransformerConfig) -> Params:
  """Returns the shapes and dtypes of a model's parameters, without making them."""
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
  """Loads the named checkpointables of one step; damage in one process is damage in all.

  Args:
    workdir, step: of the checkpoint.
    config: the model that the parameters are for.
    abstract: name -> tree of jax.ShapeDtypeStruct with shardings, or None for JSON.
  Raises:
    DamagedCheckpoint: where a file is missing or cut, or its contents are not what was saved.
    UsageError: where the architecture differs; with the table of parameters.
    RunError: where it cannot be read for reasons that do not concern its contents.
  """
  load = functools.partial(_load_here, workdir, step, config, abstract)
  return processes.together(load, (DamagedCheckpoint,))


def _as_named(abstract: dict[str, Any], path: str) -> dict[str, Any]:
  """Returns `abstract` under the names that a checkpoint has, perhaps one of version 0.1."""
  old = os.path.isdir(os.path.join(path, OPTIMIZER_0_1))
  return {OPTIMIZER_0_1 if old and name == OPTIMIZER else name: abstract[name] for name in abstract}


def _load_here(
  workdir: str, step: int, config: TransformerConfig, abstract: dict[str, Any]
) -> dict[str, Any]:
  """Loads in this process as `_load` does."""
  path = _step_folder(workdir, step)
  try:
    with orbax_context(), quiet_orbax():
      params = ocp.checkpointables_metadata(path).metadata.get("params")
      if params:  # else loading says why it cannot be read
        _check_architecture(workdir, path, params, abstract["params"], config)
      wanted = _as_named(abstract, path)
      loaded = ocp.load_checkpointables(path, {**wanted, "integrity": None})
    verify(step, loaded, wanted)
    return {OPTIMIZER if name == OPTIMIZER_0_1 else name: loaded[name] for name in loaded}
  except (UsageError, DamagedCheckpoint):
    raise
  except Exception as error:  # Orbax and tensorstore raise many kinds for unreadable files
    reason = passing_reason(path, error)
    if reason:
      raise RunError(f"checkpoint {path} cannot be read; it stays where it is: {reason}") from error
    raise DamagedCheckpoint(damage(error)) from error


def _load_first_good(
  workdir: str, steps: Iterable[int], config: TransformerConfig, abstract: dict[str, Any]
) -> tuple[int, dict[str, Any], dict[int, str]]:
  """Loads the first of some steps that is not damaged.

  Returns:
    (step, checkpointables, damaged steps before it -> description of the damage).
  Raises:
    UsageError: where all are damaged.
    RunError: where one cannot be read, as in `_load`.
  """
  damaged: dict[int, str] = {}
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
  abstract_opt_state: Any,
  mesh: Mesh | None,
  report: Report = to_stderr,
  last: int | None = None,
) -> Restored | None:
  """Returns the newest good checkpoint of a run that resumes, or None where there is none.

  Checkpoints that are newer but damaged are reported and moved to WORKDIR/damaged, so that their
  steps can be saved again.

  Args:
    workdir: of the run; the caller holds its lock.
    config: the model that resumes; k, window, gate, dtype, ... may differ from the saved run's.
    abstract_opt_state: tree of shapes and dtypes.
    mesh: devices over which the arrays are spread; None puts them on the first device. It need not
      be the mesh that they were saved from.
    report: takes one line of text.
    last: the step to go back to; no other is then tried. None: the newest.
  Raises:
    UsageError: where the architecture differs, with a table of the parameters, or where all
      checkpoints are damaged.
    RunError: where one cannot be read for reasons that do not concern its contents; nothing is
      moved.
  """
  steps = processes.on_first(functools.partial(saved_steps, workdir))
  if not steps:
    return None
  abstract = {
    "params": _abstract(abstract_params(config), mesh),
    OPTIMIZER: _abstract(abstract_opt_state, mesh),
    "data": None,
  }
  if last is not None:
    return _restore_step(workdir, last, config, abstract)
  step, loaded, damaged = _load_first_good(workdir, reversed(steps), config, abstract)
  for bad, reason in damaged.items():
    target = processes.on_first(functools.partial(_move_damaged, workdir, bad))
    report(f"checkpoint {_step_folder(workdir, bad)} is damaged and moved to {target}: {reason}")
  return Restored(step, loaded["params"], loaded[OPTIMIZER], loaded["data"])


def _restore_step(workdir: str, step: int, config: TransformerConfig, abstract: dict) -> Restored:
  """Returns the checkpoint of `step`; raises UsageError where it is damaged, and moves nothing."""
  try:
    loaded = _load(workdir, step, config, abstract)
  except DamagedCheckpoint as error:
    raise UsageError(
      f"--restore_step={step}: checkpoint {_step_folder(workdir, step)} is damaged: {error}"
    ) from error
  return Restored(step, loaded["params"], loaded[OPTIMIZER], loaded["data"])


def _move_damaged(workdir: str, step: int) -> str:
  """Moves a checkpoint to WORKDIR/damaged and returns its path there."""
  folder = os.path.join(os.path.abspath(workdir), "damaged")
  targets = (os.path.join(folder, f"{step}.{number}") for number in itertools.count())
  path = _step_folder(workdir, step)
  try:
    os.makedirs(folder, exist_ok=True)
    target = next(target for target in targets if not os.path.lexists(target))
    os.rename(path, target)
  except OSError as error:
    raise RunError(
      f"checkpoint {path} is damaged and cannot be moved to {folder}: {reason_of(error)}"
    ) from None
  return target


def load_params(
  workdir: str,
  config: TransformerConfig,
  step: int | None = None,
  mesh: Mesh | None = None,
  report: Report = to_stderr,
  allow_older: bool = False,
) -> tuple[Params, int]:
  """Loads parameters of a run, its adapters merged, for evaluation, generation and --init_from.

  Nothing in the run's folder changes.

  Args:
    workdir: of the run.
    config: the model they are for, as `load_run_config` returns it; only its architecture must be
      the run's.
    step: None for the newest checkpoint.
    mesh: devices over which they are spread; None puts them on the first device.
    report: takes one line of text about each damaged checkpoint that is skipped.
    allow_older: with no `step`, skip damaged checkpoints and take the newest good one.
  Returns:
    (params, step).
  Raises:
    UsageError: where there is no such checkpoint, it is damaged, or the architecture differs (with
      a table of the parameters).
    RunError: where it cannot be read for reasons that do not concern its contents.
  """
  saved = _with_adapters(workdir, config)
  abstract = {"params": _abstract(abstract_params(saved), mesh)}
  steps = processes.on_first(functools.partial(saved_steps, workdir))
  if not steps:
    raise UsageError(f"{workdir} holds no checkpoint")
  if step is None and allow_older:
    step, loaded, damaged = _load_first_good(workdir, reversed(steps), saved, abstract)
    for bad, reason in damaged.items():
      folder = _step_folder(workdir, bad)
      report(f"checkpoint {folder} is damaged and is not used: {reason}")
    return _merge_adapters(saved, loaded["params"], mesh), step
  if step is not None and step not in steps:
    raise UsageError(
      f"{workdir} holds no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
    )
  wanted = steps[-1] if step is None else step
  try:
    loaded = _load(workdir, wanted, saved, abstract)
  except DamagedCheckpoint as error:
    path = _step_folder(workdir, wanted)
    raise UsageError(f"checkpoint {path} is damaged: {error}{_advice(steps, wanted)}") from error
  return _merge_adapters(saved, loaded["params"], mesh), wanted


def _with_adapters(workdir: str, config: TransformerConfig) -> TransformerConfig:
  """Returns `config` with the adapters that a run's record mentions, if any."""
  try:
    run, _ = load_run_config(workdir, adapters=True)
  except UsageError:
    return config
  return dataclasses.replace(config, lora_rank=run.lora_rank, lora_alpha=run.lora_alpha)


def _merge_adapters(config: TransformerConfig, params: Params, mesh: Mesh | None) -> Params:
  if not config.lora_rank:
    return params
  return computed_on(mesh, functools.partial(lora.merge, config), params)


def _advice(steps: list[int], damaged: int) -> str:
  others = [step for step in reversed(steps) if step != damaged]
  if not others:
    return ""
  return (
    f"; the run has others ({', '.join(map(str, others))}): give --step={others[0]} "
    f"(DIR@{others[0]} in --init_from and --distill_from) or --allow_older_step"
  )
