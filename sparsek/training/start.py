"""Start of a run: its fixed parts, its first state, and the records it writes."""

import functools
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.stages import Wrapped

from sparsek.config import TrainConfig, TransformerConfig
from sparsek.data.batches import TrainIterator, eval_batches, make_train_iterator
from sparsek.data.token_files import TokenDataset
from sparsek.errors import UsageError
from sparsek.model import implementations
from sparsek.model.transformer import Params
from sparsek.parallel import processes
from sparsek.parallel.mesh import CONTEXT, HostBatch, make_mesh, own_parts, replicated
from sparsek.parallel.sharding import computed_on
from sparsek.runs import checkpoint, run_directory, run_record, set_aside
from sparsek.runs.checkpoint_writer import remove_half_written
from sparsek.runs.parameter_table import differing_fields
from sparsek.training import spikes, teacher
from sparsek.training.checks import check_run
from sparsek.training.init_from import Say, check_tokenizer, initial_params
from sparsek.training.optimizer import make_optimizer
from sparsek.training.saver import SPIKES
from sparsek.training.step import TrainState, make_diagnose, make_eval_step, make_train_step
from sparsek.training.trace import Profile

Changes = dict[str, tuple[Any, Any]]  # of settings: name -> (old, new)


class Setup(NamedTuple):
  """Parts of a run that do not depend on its state."""

  config: TransformerConfig
  train: TrainConfig
  dataset: TokenDataset
  mesh: Mesh
  params_shape: Params
  optimizer: optax.GradientTransformation
  iterator: TrainIterator
  heldout: Iterable[HostBatch]
  train_step: Wrapped
  eval_step: Wrapped
  diagnose: Wrapped
  profile: Profile

  @property
  def num_steps(self) -> int:
    """Steps of the whole run."""
    return self.train.optimizer.num_steps

  @property
  def last_step(self) -> int:
    """The step after which this process ends."""
    return min(self.num_steps, self.train.stop_at or self.num_steps)

  @property
  def packed(self) -> bool:
    """True if attention is told where documents end: in packed rows, and in parts of rows."""
    return may_be_packed(self.train, self.mesh)

  @property
  def attention_shape(self) -> tuple[TransformerConfig, int, int]:
    """The model, the tokens of a row, and the rows that a device computes at once."""
    return attention_shape(self.config, self.train, self.mesh)

  def evaluation_due(self, step: int) -> bool:
    """Returns whether the held-out loss is computed after a step."""
    interval = self.train.eval_every
    return bool(interval) and step > 0 and (step % interval == 0 or step == self.num_steps)


def may_be_packed(train: TrainConfig, mesh: Mesh) -> bool:
  """Returns whether attention is told where documents end: in packed rows, and parts of rows."""
  return train.data.segment_documents or mesh.shape[CONTEXT] > 1


def attention_shape(
  config: TransformerConfig, train: TrainConfig, mesh: Mesh
) -> tuple[TransformerConfig, int, int]:
  """Returns the model, the tokens of a row on a device, and the rows that it computes at once."""
  data, context = train.data, mesh.shape[CONTEXT]
  rows = data.batch_size * context // (mesh.size * train.grad_accumulation)
  return config, data.seq_len // context, rows


def set_up(config: TransformerConfig, train: TrainConfig, dataset: TokenDataset) -> Setup:
  """Checks the configuration and opens the data; compiles nothing and changes no file.

  Raises:
    UsageError: where the model cannot be trained on these data and devices.
  """
  mesh, params_shape = make_mesh(train.fsdp, train.context), checkpoint.abstract_params(config)
  check_run(config, train, mesh, params_shape)
  optimizer = make_optimizer(train.optimizer)
  parts, num_parts = own_parts(mesh)
  iterator = make_train_iterator(dataset, train.data, parts=parts, num_parts=num_parts)
  heldout: Iterable[HostBatch] = ()
  if train.eval_every:
    heldout = eval_batches(
      dataset, train.data, train.eval_batches, parts=parts, num_parts=num_parts
    )
  teacher_model = teacher.teacher_config(train.distill_from) if train.distill_from else None
  assert not isinstance(train.profile_steps, str)  # TrainConfig has parsed it
  return Setup(
    config=config,
    train=train,
    dataset=dataset,
    mesh=mesh,
    params_shape=params_shape,
    optimizer=optimizer,
    iterator=iterator,
    heldout=heldout,
    train_step=make_train_step(config, train, optimizer, mesh, teacher_model),
    eval_step=make_eval_step(config, train.loss_chunk, mesh, train.data.segment_documents),
    diagnose=make_diagnose(config, mesh),
    profile=Profile(train.workdir, train.profile_steps if processes.is_first() else None),
  )


class Start(NamedTuple):
  """State with which a process begins or resumes a run.

  Attributes:
    step: updates made so far.
    saved_step: step of the checkpoint that the state comes from, or None.
    state: parameters, moments, ... on the devices.
    data_state: of the data iterator.
    skipped: steps so far that were spikes.
    teacher: (the teacher's parameters,), the further arguments of a training step; or ().
    differing: settings of a run that resumes with others than before.
  """

  step: int
  saved_step: int | None
  state: TrainState
  data_state: dict
  skipped: int
  teacher: tuple[Params, ...]
  differing: Changes


def restore_or_init(setup: Setup, say: Say) -> Start:
  """Returns the state from the newest checkpoint in the workdir, else from init_from, else new.

  Where the run resumes, its data iterator goes on from there too.

  Args:
    setup: of the run, whose lock the caller holds.
    say: takes one line of text.
  Raises:
    UsageError: where the configuration, the data, the checkpoints and the teacher do not fit.
  """
  config, train, dataset, optimizer = setup.config, setup.train, setup.dataset, setup.optimizer
  workdir, mesh = train.workdir, setup.mesh
  teacher_params: tuple[Params, ...] = ()
  if train.distill_from:
    fingerprint = dataset.tokenizer.fingerprint
    teacher_params = (
      teacher.load_teacher(train.distill_from, fingerprint, config.vocab_size, mesh),
    )
  processes.on_first(functools.partial(remove_half_written, workdir, say))
  back_to = processes.on_first(
    functools.partial(set_aside.step_to_restore, workdir, train.restore_step, say)
  )
  saved_step = spikes_so_far = None
  differing: Changes = {}
  if processes.on_first(functools.partial(checkpoint.saved_steps, workdir)):
    restored, differing = _resume(setup, back_to, say)
    saved_step, spikes_so_far = restored.step, restored.data_state.get(SPIKES)
  else:
    params = initial_params(config, train, dataset, mesh, say)
    opt_state = computed_on(mesh, optimizer.init, params)
    restored = checkpoint.Restored(0, params, opt_state, {})
  numbers = (
    jnp.int32(restored.step),
    jnp.int32(train.seed),
    spikes.start(train.spike_factor, spikes_so_far),
  )
  step, seed, so_far = jax.device_put(numbers, replicated(mesh))
  return Start(
    restored.step,
    saved_step,
    TrainState(step, restored.params, restored.opt_state, seed, so_far),
    setup.iterator.get_state(),
    spikes_so_far[-1] if so_far and spikes_so_far else 0,
    teacher_params,
    differing,
  )


def _resume(setup: Setup, back_to: int | None, say: Say) -> tuple[checkpoint.Restored, Changes]:
  """Sets the data iterator to the newest checkpoint or that of step `back_to`.

  Returns:
    (what the checkpoint holds, `Start.differing`).
  """
  config, train, workdir = setup.config, setup.train, setup.train.workdir
  record = run_record.load_run_config(workdir)[1]
  if not record["data"]["data"]:
    raise UsageError(
      f"--workdir={workdir} holds an imported model and no run that could go on: give a new "
      "folder, and --init_from=hf:FOLDER"
    )
  old = check_tokenizer(workdir, setup.dataset, train.data.data, say)
  # With another scale, the older checkpoints of this run would be other models.
  if old.lora_rank == config.lora_rank and old.lora_scale != config.lora_scale:
    here, there = (c.lora_alpha or c.lora_rank for c in (config, old))
    raise UsageError(
      f"--lora_alpha={here} must be {there}, as in the run in {workdir}; or give a new "
      f"folder, and --init_from={workdir}"
    )
  opt_state = jax.eval_shape(setup.optimizer.init, setup.params_shape)
  restored = checkpoint.restore_newest(workdir, config, opt_state, setup.mesh, say, back_to)
  assert restored is not None  # the caller saw a checkpoint, and holds the lock
  if back_to is not None:
    processes.on_first(functools.partial(set_aside.set_aside, workdir, restored.step, say))
  data_state = {name: value for name, value in restored.data_state.items() if name != SPIKES}
  setup.iterator.set_state(data_state, saved_under=record["data"])
  return restored, differing_fields(old, config) | run_record.changed_settings(record, train)


def describe_resume(setup: Setup, start: Start) -> list[str]:
  """Returns lines of text: the step where a run resumes, and the settings that have changed."""
  train, workdir = setup.train, setup.train.workdir
  unused = " (--init_from is not used)" if train.init_from else ""
  changed = ", with other settings than before:" if start.differing else ""
  lines = [f"resuming {workdir} at step {start.step}{unused}{changed}"]
  lines += [f"  {name}: {old} -> {new}" for name, (old, new) in start.differing.items()]
  flagfile = os.path.join(workdir, "flags.txt")
  if start.differing and os.path.exists(flagfile):
    lines += [f"  (flags not given have their defaults; --flagfile={flagfile} keeps the old ones)"]
  return lines


def describe_complete(setup: Setup, start: Start) -> str:
  """Returns a line of text: a run has nothing left to do, its settings, and what can be done."""
  train = setup.train
  length = "num_steps" if setup.last_step == setup.num_steps else "stop_at"
  settings = ", ".join(
    f"{name}={old} (not {new})"
    for name, (old, new) in start.differing.items()
    if name not in ("num_steps", "stop_at")
  )
  return (
    f"{train.workdir} is complete: it has all of --{length}={setup.last_step} steps "
    f"({start.step} were made)" + (f", with {settings}" if settings else "") + f"; raise "
    f"--{length} to train it further, or give another --workdir for a new run"
  )


def write_records(setup: Setup, flagfile: str) -> None:
  """Writes flags.txt, versions.json, model.json and the tokenizer, and keeps older versions.

  Args:
    setup: of the run.
    flagfile: the text of flags.txt; "" for none.
  """
  train, dataset = setup.train, setup.dataset
  workdir = train.workdir
  if flagfile:
    run_directory.write_record(workdir, "flags.txt", flagfile)
  choices = implementations.attention_choices(*setup.attention_shape, packed=setup.packed)
  attention = {term: choice._asdict() for term, choice in choices.items()}
  versions = run_directory.to_json(run_directory.versions() | {"attention": attention})
  run_directory.write_record(workdir, "versions.json", versions)
  record = run_directory.to_json(run_record.model_record(setup.config, train, dataset))
  run_directory.write_record(workdir, run_record.FILE, record)
  folder = os.path.join(workdir, "tokenizer")
  os.makedirs(folder, exist_ok=True)
  dataset.tokenizer.save(folder)
