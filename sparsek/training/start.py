"""Start of a run: its fixed parts, its first state, and the records it writes."""

import functools
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.stages import Wrapped

from sparsek.command_line.stages import named
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
from sparsek.training import spikes, stages, teacher
from sparsek.training.checks import check_run
from sparsek.training.init_from import Say, check_tokenizer, initial_params
from sparsek.training.optimizer import make_optimizer
from sparsek.training.saver import SPIKES
from sparsek.training.stages import ELSEWHERE, Stage
from sparsek.training.step import TrainState, make_diagnose, make_eval_step, make_train_step
from sparsek.training.trace import Profile

Changes = dict[str, tuple[Any, Any]]  # of settings: name -> (old, new)


class Setup(NamedTuple):
  """Parts of a stage that do not depend on its state; a run without stages has one.

  Attributes:
    stage: the model, the data and everything else that flags set.
    num_steps: of the whole run.
    params_shape: of the stage's model.
  """

  stage: Stage
  num_steps: int
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
  def config(self) -> TransformerConfig:
    """The model, as the stage trains it."""
    return self.stage.config

  @property
  def train(self) -> TrainConfig:
    """Everything but the model."""
    return self.stage.train

  @property
  def dataset(self) -> TokenDataset:
    """The data that the stage reads."""
    return self.stage.dataset

  @property
  def end(self) -> int:
    """The last step of the stage."""
    return self.stage.end

  @property
  def last_step(self) -> int:
    """The step of the stage after which this process ends, or goes on to the next stage."""
    return min(self.end, self.train.stop_at or self.end)

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
    return bool(interval) and step > 0 and (step % interval == 0 or step == self.end)


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


def set_up(run: Sequence[Stage]) -> list[Setup]:
  """Checks the stages of a run and opens their data; compiles nothing and changes no file.

  Raises:
    UsageError: where the model cannot be trained on these data and devices.
  """
  stages.check_stages(run)
  setups: list[Setup] = []
  try:
    for index, stage in enumerate(run):
      with named(stage.name):
        setups.append(_set_up(run, index))
  except BaseException:
    for setup in setups:
      setup.iterator.close()
    raise
  return setups


def _set_up(run: Sequence[Stage], index: int) -> Setup:
  """Sets up one stage as `set_up` does."""
  stage = run[index]
  config, train, dataset = stage.config, stage.train, stage.dataset
  mesh, params_shape = make_mesh(train.fsdp, train.context), checkpoint.abstract_params(config)
  check_run(config, train, mesh, params_shape, [other.train for other in run])
  optimizer = make_optimizer(train.optimizer, stage.begin, stages.frozen_steps(run, index))
  teacher_model = None
  if train.distill_from:
    fingerprint = dataset.tokenizer.fingerprint
    teacher_model = teacher.check_teacher(train.distill_from, fingerprint, config.vocab_size)
  parts, num_parts = own_parts(mesh)
  heldout: Iterable[HostBatch] = ()
  if train.eval_every:
    heldout = eval_batches(
      dataset, train.data, train.eval_batches, parts=parts, num_parts=num_parts
    )
  assert not isinstance(train.profile_steps, str)  # TrainConfig has parsed it
  traced = train.profile_steps if processes.is_first() else None
  return Setup(
    stage=stage,
    num_steps=run[-1].end,
    mesh=mesh,
    params_shape=params_shape,
    optimizer=optimizer,
    iterator=make_train_iterator(dataset, train.data, parts=parts, num_parts=num_parts),
    heldout=heldout,
    train_step=make_train_step(config, train, optimizer, mesh, teacher_model, stage.begin),
    eval_step=make_eval_step(config, train.loss_chunk, mesh, train.data.segment_documents),
    diagnose=make_diagnose(config, mesh),
    profile=Profile(train.workdir, traced and (traced[0] + stage.begin, traced[1] + stage.begin)),
  )


class Start(NamedTuple):
  """State with which a process begins or resumes a run, or a run begins its next stage.

  Attributes:
    step: updates made so far.
    saved_step: step of the checkpoint that the state comes from, or None.
    state: parameters, moments, ... on the devices.
    data_state: of the data iterator.
    skipped: steps so far that were spikes.
    teacher: (the teacher's parameters,), the further arguments of a training step; or ().
    differing: settings of a run that resumes with others than before.
    stage: index of the stage.
    elsewhere: the places in data sets that only other stages read.
  """

  step: int
  saved_step: int | None
  state: TrainState
  data_state: dict
  skipped: int
  teacher: tuple[Params, ...]
  differing: Changes
  stage: int = 0
  elsewhere: Sequence[dict] = ()


def restore_or_init(setups: Sequence[Setup], say: Say) -> Start:
  """Returns the state from the newest checkpoint in the workdir, else from init_from, else new.

  Where the run resumes, the data iterator goes on from there too. A checkpoint between two stages
  belongs to the first of them, which is then at its end.

  Args:
    setups: of the stages of the run, whose lock the caller holds.
    say: takes one line of text.
  Raises:
    UsageError: where the configuration, the data, the checkpoints and the teacher do not fit.
  """
  first, last = setups[0], setups[-1]
  workdir, mesh = first.train.workdir, first.mesh
  processes.on_first(functools.partial(remove_half_written, workdir, say))
  back_to = processes.on_first(
    functools.partial(set_aside.step_to_restore, workdir, first.train.restore_step, say)
  )
  saved_step = spikes_so_far = None
  differing: Changes = {}
  elsewhere: list[dict] = []
  if processes.on_first(functools.partial(checkpoint.saved_steps, workdir)):
    restored, differing, elsewhere = _resume(setups, back_to, say)
    saved_step, spikes_so_far = restored.step, restored.data_state.get(SPIKES)
  else:
    params = initial_params(last.config, first.train, first.dataset, mesh, say)
    opt_state = computed_on(mesh, first.optimizer.init, params)
    restored = checkpoint.Restored(0, params, opt_state, {})
  index = stages.index_of(setups, restored.step)
  train = setups[index].train
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
    setups[index].iterator.get_state(),
    spikes_so_far[-1] if so_far and spikes_so_far else 0,
    _teacher(setups[index], restored.step),
    differing,
    index,
    elsewhere,
  )


def _teacher(setup: Setup, step: int) -> tuple[Params, ...]:
  """Returns (the parameters of the teacher,), or () where the stage has none or is at its end."""
  reference = setup.train.distill_from
  return (teacher.load_teacher(reference, setup.mesh),) if reference and step < setup.end else ()


def next_stage(
  setups: Sequence[Setup],
  index: int,
  state: TrainState,
  data_state: dict,
  elsewhere: Sequence[dict],
) -> Start:
  """Returns the start of a stage from what the stage before it has left.

  Args:
    setups: of the stages of the run.
    index: of the stage.
    state, data_state, elsewhere: at the end of the stage before it.
  """
  setup = setups[index]
  positions = [*elsewhere, data_state]
  elsewhere = stages.read_on(setup.iterator, setup.dataset, positions)
  skipped = 0
  if isinstance(state.spikes, spikes.Spikes):  # the loss of another stage says nothing
    skipped = jax.device_get(state.spikes.skipped).item()
    anew = spikes.start(setup.train.spike_factor, [0.0, 0.0, 0, skipped])
    state = state._replace(spikes=jax.device_put(anew, replicated(setup.mesh)))
  step = setup.stage.begin
  place, teachers = setup.iterator.get_state(), _teacher(setup, step)
  return Start(step, None, state, place, skipped, teachers, {}, index, elsewhere)


def _resume(
  setups: Sequence[Setup], back_to: int | None, say: Say
) -> tuple[checkpoint.Restored, Changes, list[dict]]:
  """Sets the data iterator to the newest checkpoint or that of step `back_to`.

  Returns:
    (what the checkpoint holds, `Start.differing`, `Start.elsewhere`).
  """
  last = setups[-1]
  config, train, workdir = last.config, last.train, last.train.workdir
  record = run_record.load_run_config(workdir)[1]
  if not record["data"]["data"]:
    raise UsageError(
      f"--workdir={workdir} holds an imported model and no run that could go on: give a new "
      "folder, and --init_from=hf:FOLDER"
    )
  old = check_tokenizer(workdir, last.dataset, train.data.data, say)
  # With another scale, the older checkpoints of this run would be other models.
  if old.lora_rank == config.lora_rank and old.lora_scale != config.lora_scale:
    here, there = (c.lora_alpha or c.lora_rank for c in (config, old))
    raise UsageError(
      f"--lora_alpha={here} must be {there}, as in the run in {workdir}; or give a new "
      f"folder, and --init_from={workdir}"
    )
  opt_state = jax.eval_shape(last.optimizer.init, last.params_shape)
  restored = checkpoint.restore_newest(workdir, config, opt_state, last.mesh, say, back_to)
  assert restored is not None  # the caller saw a checkpoint, and holds the lock
  if back_to is not None:
    processes.on_first(functools.partial(set_aside.set_aside, workdir, restored.step, say))
  ours = (SPIKES, ELSEWHERE)
  data_state = {name: value for name, value in restored.data_state.items() if name not in ours}
  setup = setups[stages.index_of(setups, restored.step)]
  elsewhere = restored.data_state.get(ELSEWHERE, [])
  if setup.dataset.fingerprint in [position["dataset"] for position in elsewhere]:
    # The stages have changed since.
    elsewhere = stages.read_on(setup.iterator, setup.dataset, [*elsewhere, data_state])
  else:
    setup.iterator.set_state(data_state, saved_under=record["data"])
  changes = differing_fields(old, config) | run_record.changed_settings(record, train)
  changes |= stages.changed(record.get(run_record.STAGES, []), _stages(setups))
  return restored, changes, elsewhere


def _stages(setups: Sequence[Setup]) -> list[Stage]:
  return [setup.stage for setup in setups]


def describe_resume(setups: Sequence[Setup], start: Start) -> list[str]:
  """Returns lines of text: the step where a run resumes, and the settings that have changed."""
  train = setups[-1].train
  workdir = train.workdir
  unused = " (--init_from is not used)" if train.init_from else ""
  changed = ", with other settings than before:" if start.differing else ""
  lines = [f"resuming {workdir} at step {start.step}{unused}{changed}"]
  lines += [f"  {name}: {old} -> {new}" for name, (old, new) in start.differing.items()]
  flagfile = os.path.join(workdir, "flags.txt")
  if start.differing and os.path.exists(flagfile):
    lines += [f"  (flags not given have their defaults; --flagfile={flagfile} keeps the old ones)"]
  return lines


def describe_complete(setups: Sequence[Setup], start: Start) -> str:
  """Returns a line of text: a run has nothing left to do, its settings, and what can be done."""
  last = setups[-1]
  train, last_step = last.train, last.last_step
  length = "num_steps" if last_step == last.num_steps else "stop_at"
  settings = ", ".join(
    f"{name}={old} (not {new})"
    for name, (old, new) in start.differing.items()
    if name not in ("num_steps", "stop_at")
  )
  staged = last.stage.name and length == "num_steps"
  names = ", ".join(setup.stage.name for setup in setups)
  steps = (
    f"the {last_step} steps of its stages {names}" if staged else f"--{length}={last_step} steps"
  )
  advice = "add a --stage" if staged else f"raise --{length}"
  return (
    f"{train.workdir} is complete: it has all of {steps} "
    f"({start.step} were made)" + (f", with {settings}" if settings else "") + f"; {advice} "
    "to train it further, or give another --workdir for a new run"
  )


def write_records(setups: Sequence[Setup], flagfile: str) -> None:
  """Writes flags.txt, versions.json, model.json and the tokenizer, and keeps older versions.

  Args:
    setups: of the stages of the run.
    flagfile: the text of flags.txt; "" for none.
  """
  workdir, tokenizer = setups[-1].train.workdir, setups[-1].dataset.tokenizer
  if flagfile:
    run_directory.write_record(workdir, "flags.txt", flagfile)
  attention = {
    term: choice._asdict()
    for setup in setups
    for term, choice in implementations.attention_choices(
      *setup.attention_shape, packed=setup.packed
    ).items()
  }
  versions = run_directory.to_json(run_directory.versions() | {"attention": attention})
  run_directory.write_record(workdir, "versions.json", versions)
  record = run_directory.to_json(stages.record(_stages(setups)))
  run_directory.write_record(workdir, run_record.FILE, record)
  folder = os.path.join(workdir, "tokenizer")
  os.makedirs(folder, exist_ok=True)
  tokenizer.save(folder)
