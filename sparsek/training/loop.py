"""The training loop: dispatch, log, evaluate, save, resume."""

import contextlib
import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparsek.config import TrainConfig, TransformerConfig
from sparsek.data.batches import eval_batches, make_train_iterator
from sparsek.data.token_files import TokenDataset
from sparsek.data.tokenizer import load_tokenizer, read_bos
from sparsek.errors import RunError, UsageError
from sparsek.huggingface import pretrained
from sparsek.model import flops, lora
from sparsek.model.transformer import count_params, init_params
from sparsek.parallel.mesh import make_mesh, put_batch, replicated
from sparsek.runs import checkpoint, run_directory, set_aside
from sparsek.runs.metrics import MetricsWriter, Progress, Stopwatch
from sparsek.runs.parameter_table import differing_fields
from sparsek.storage import files
from sparsek.training import distillation, spikes, trace
from sparsek.training import start as start_lib
from sparsek.training.optimizer import make_optimizer, trainable_mask
from sparsek.training.step import (
  TrainState,
  all_finite,
  check_adapters,
  check_batch,
  check_implementation,
  check_length,
  make_diagnose,
  make_eval_step,
  make_train_step,
)

SPIKES = "spikes"  # beside the state of the data in a checkpoint
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# What a resumed run may have otherwise without a word: where it is, and how it got its state.
UNTOLD = ("workdir", "init_from", "restore_step", "data", "optimizer")


class _Ended(Exception):
  """A run that goes nowhere, such as one whose loss is not finite; says why, and of which step."""


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended.

  Attributes:
    step: updates made.
    loss: of the last step, or None where none was made in this process.
    heldout_loss: of the last evaluation in this process, or None.
    stopped: a signal, or `TrainConfig.stop_at`, asked it to stop before its end.
    already_complete: there was nothing left to do.
  """

  step: int
  loss: float | None = None
  heldout_loss: float | None = None
  stopped: bool = False
  already_complete: bool = False


class StopSignal:
  """While entered, STOP_SIGNALS set `requested` instead of ending the process.

  A second SIGINT raises KeyboardInterrupt. SIGHUP stays ignored where it is, as under nohup.
  """

  def __enter__(self):
    self.requested = False
    numbers = [
      number
      for number in STOP_SIGNALS
      if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    ]
    self._old = {number: signal.signal(number, self._handle) for number in numbers}
    return self

  def _handle(self, number, frame):
    if self.requested and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.requested = True

  def __exit__(self, *exception):
    for number, handler in self._old.items():
      signal.signal(number, handler)


class Profile:
  """A trace of some steps for TensorBoard or Perfetto, under WORKDIR/profile, and what it says of
  an accelerator's time.

  The devices are waited for before its first and after its last step.
  """

  def __init__(self, workdir: str, steps: tuple[int, int] | None):
    self.folder, self._running = os.path.join(workdir, "profile"), False
    self._first, self._last = steps or (0, 0)

  def begins_at(self, step: int) -> bool:
    return step == self._first

  def ends_at(self, step: int) -> bool:
    return self._running and step == self._last

  def before(self, step: int) -> None:
    if self.begins_at(step):
      jax.profiler.start_trace(self.folder)
      self._running = True

  def after(self, step: int, say: Callable[[str], None]) -> None:
    if self.ends_at(step):
      self.stop()
      say(f"a trace of steps {self._first} to {self._last} is in {self.folder}")
      for line in trace.table(trace.kernels(self.folder), self._last - self._first + 1):
        say(line)

  def stop(self) -> None:
    """Also ends a trace whose last step is not reached."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()


def heldout_loss(
  params, eval_step: Callable, mesh, batches, stop: StopSignal | None = None
) -> float | None:
  """Mean loss in nats per counted target over held-out batches; None where `stop` was requested
  before the end.
  """
  total, count = 0.0, 0
  for batch in batches:
    loss, num_targets = eval_step(params, put_batch(mesh, batch))
    total, count = total + float(loss), count + int(num_targets)
    if stop is not None and stop.requested:
      return None
  return total / max(count, 1)


def _model_record(config: TransformerConfig, train: TrainConfig, dataset: TokenDataset) -> dict:
  tokenizer = dataset.tokenizer
  return {
    "model": dataclasses.asdict(config),
    "data": dataclasses.asdict(train.data),
    "train": _settings(train),
    "tokenizer": {
      "name": tokenizer.name,
      "fingerprint": tokenizer.fingerprint,
      "vocab_size": tokenizer.vocab_size,
      "bos_ids": tokenizer.bos_ids,
    },
  }


def _settings(train: TrainConfig) -> dict:
  """Returns the flags of a run that are neither the model's nor the data's."""
  fields = dataclasses.asdict(train)
  return {
    name: value for name, value in (fields | fields["optimizer"]).items() if name not in UNTOLD
  }


def _changed_settings(run: dict, train: TrainConfig) -> dict[str, tuple]:
  """Returns the flags that are not what the run was last started with: name -> (old, new).

  Args:
    run: its model.json; those of older versions hold the data's flags only.
    train: of this start.
  """
  old = {**run["data"], **run.get("train", {})}
  new = json.loads(json.dumps({**dataclasses.asdict(train.data), **_settings(train)}))
  return {
    name: (old[name], value) for name, value in new.items() if name in old and old[name] != value
  }


def _check_tokenizer(
  workdir: str, dataset: TokenDataset, data: str, say: Callable[[str], None]
) -> TransformerConfig:
  """Returns the configuration of the run in `workdir`; says where its documents began otherwise.

  Raises:
    UsageError: where it was trained on other tokens.
  """
  config, run = checkpoint.load_run_config(workdir, adapters=True)
  if run["tokenizer"]["fingerprint"] != dataset.tokenizer.fingerprint:
    here, there = (
      f"{name}, {fingerprint[:12]}"
      for name, fingerprint in (
        (dataset.tokenizer.name, dataset.tokenizer.fingerprint),
        (run["tokenizer"]["name"], run["tokenizer"]["fingerprint"]),
      )
    )
    raise UsageError(
      f"the tokenizer of --data={data} ({here}) does not match that of the run "
      f"in {workdir} ({there})"
    )
  bos_ids = read_bos(run["tokenizer"], dataset.tokenizer, os.path.join(workdir, "model.json"))
  _tell_beginning(dataset, data, bos_ids, workdir, say)
  return config


def _tell_beginning(
  dataset: TokenDataset, data: str, bos_ids: list[int], model: str, say: Callable[[str], None]
) -> None:
  """Says in a line where the documents do not begin as those that a model knows."""
  tokenizer = dataset.tokenizer
  if tokenizer.bos_ids != bos_ids:
    here, there = (
      " ".join(map(tokenizer.token, ids)) or "their text" for ids in (tokenizer.bos_ids, bos_ids)
    )
    say(
      f"warning: the documents of --data={data} begin with {here}, those of {model} with "
      f"{there}: make the data anew with experiments.prepare_data"
    )


class _Run:
  """A run in progress: its state on the devices, its iterator, and the files it writes."""

  def __init__(
    self, config: TransformerConfig, train: TrainConfig, dataset: TokenDataset, stop: StopSignal
  ):
    self.config, self.train, self.dataset, self.stop = config, train, dataset, stop
    self.num_steps = train.optimizer.num_steps
    self.last_step = min(self.num_steps, train.stop_at or self.num_steps)
    self.mesh = make_mesh()
    check_batch(self.mesh, train.data.batch_size, train.grad_accumulation)
    check_adapters(config, train)
    self.params_shape = checkpoint.abstract_params(config)
    check_length(config, train.data.seq_len)
    check_implementation(config, train.data.seq_len, self.params_shape)
    if not any(jax.tree.leaves(trainable_mask(self.params_shape, train.optimizer.trainable))):
      raise UsageError(f"--trainable={train.optimizer.trainable}: no layer has such parameters")
    self.optimizer = make_optimizer(train.optimizer)
    self.iterator = make_train_iterator(dataset, train.data)
    self.heldout = eval_batches(dataset, train.data, train.eval_batches) if train.eval_every else ()
    teacher = distillation.teacher_config(train.distill_from) if train.distill_from else None
    self.train_step = make_train_step(config, train, self.optimizer, self.mesh, teacher)
    self.eval_step = make_eval_step(
      config, train.loss_chunk, self.mesh, train.data.segment_documents
    )
    self.diagnose = make_diagnose(config)
    self.profile = Profile(train.workdir, train.profile_steps)
    # The warm-up's step is not the forward and backward pass that operations are counted for.
    self.peak_flops = None if train.scorer_warmup else flops.peak(jax.devices()[0])
    self.result_loss = self.result_heldout = None
    self.saving_step = self.saved_step = (
      None  # of the checkpoint being written, and of the newest that is complete
    )
    self.batch = None  # of the last step that was no spike
    self.presence = None  # of the run's files, once they are there
    self.last_update = ""  # what led to the parameters, for messages
    self.skipped = self.skipped_in_a_row = 0

  def restore_or_init(self, say: Callable[[str], None]) -> None:
    """Sets the state: from the newest checkpoint of the workdir, else parameters from init_from,
    else new ones.
    """
    workdir, everywhere = self.train.workdir, replicated(self.mesh)
    self.teacher = ()
    if self.train.distill_from:
      tokenizer = self.dataset.tokenizer
      self.teacher = (
        distillation.load_teacher(
          self.train.distill_from, tokenizer.fingerprint, self.config.vocab_size, everywhere
        ),
      )
    checkpoint.remove_half_written(workdir, say)
    back_to = set_aside.step_to_restore(workdir, self.train.restore_step, say)
    spikes_so_far = None
    if checkpoint.saved_steps(workdir):
      record = checkpoint.load_run_config(workdir)[1]
      if not record["data"]["data"]:
        raise UsageError(
          f"--workdir={workdir} holds an imported model and no run that could go on: give a new "
          "folder, and --init_from=hf:FOLDER"
        )
      old = _check_tokenizer(workdir, self.dataset, self.train.data.data, say)
      # else its older checkpoints would be other models
      if old.lora_rank == self.config.lora_rank and old.lora_scale != self.config.lora_scale:
        here, there = (config.lora_alpha or config.lora_rank for config in (self.config, old))
        raise UsageError(
          f"--lora_alpha={here} must be {there}, as in the run in {workdir}; or give a new "
          f"folder, and --init_from={workdir}"
        )
      opt_state = jax.eval_shape(self.optimizer.init, self.params_shape)
      restored = checkpoint.restore_newest(
        workdir, self.config, opt_state, everywhere, say, back_to
      )
      if back_to is not None:
        set_aside.set_aside(workdir, restored.step, say)
      spikes_so_far = restored.data_state.pop(SPIKES, None)
      self.iterator.set_state(restored.data_state, saved_under=record["data"])
      differing = differing_fields(old, self.config) | _changed_settings(record, self.train)
      changed = "".join(f", {name} {there} -> {here}" for name, (there, here) in differing.items())
      say(
        f"resuming {workdir} at step {restored.step}{changed}"
        + (" (--init_from is not used)" if self.train.init_from else "")
      )
      self.step = self.saved_step = restored.step
      params, opt_state = restored.params, restored.opt_state
    else:
      model = lora.merged_config(self.config)
      if self.train.init_from and self.train.init_from.startswith(pretrained.PREFIX):
        folder = self.train.init_from.removeprefix(pretrained.PREFIX)
        params = self._load_pretrained(folder, everywhere, say)
        say(f"starting from {self.train.init_from}")
      elif self.train.init_from:
        folder, step = checkpoint.parse_run_reference(self.train.init_from)
        if not os.path.isdir(folder):
          raise UsageError(f"--init_from={self.train.init_from}: there is no folder {folder}")
        _check_tokenizer(folder, self.dataset, self.train.data.data, say)
        params, step = start_lib.load(
          folder, model, step, jax.random.key(self.train.seed), everywhere, say
        )
        say(f"starting from the parameters of {folder} at step {step}")
      elif self.config.lora_rank:
        raise UsageError(
          f"--lora_rank={self.config.lora_rank} needs --init_from: adapters learn beside the "
          "matrices of a pretrained model"
        )
      else:
        params = jax.jit(lambda key: init_params(self.config, key), out_shardings=everywhere)(
          jax.random.key(self.train.seed)
        )
      if self.config.lora_rank:
        params = lora.extend(self.config, params, jax.random.key(self.train.seed), everywhere)
      self.step = 0
      opt_state = jax.jit(self.optimizer.init, out_shardings=everywhere)(params)
    self.data_state = self.iterator.get_state()
    self.yes, self.no = jax.device_put((jnp.bool_(True), jnp.bool_(False)), everywhere)
    numbers = (
      jnp.int32(self.step),
      jnp.int32(self.train.seed),
      spikes.start(self.train.spike_factor, spikes_so_far),
    )
    step, seed, so_far = jax.device_put(numbers, everywhere)
    self.state = TrainState(step, params, opt_state, seed, so_far)
    self.skipped = spikes_so_far[-1] if so_far and spikes_so_far else 0

  def _load_pretrained(self, folder: str, sharding, say: Callable[[str], None]):
    """The parameters of a folder in Hugging Face's format, and new ones where it has none. Raises
    UsageError where the data are of another tokenizer.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != self.dataset.tokenizer.fingerprint:
      raise UsageError(
        f"the tokenizer of --data={self.train.data.data} is not that of "
        f"--init_from={self.train.init_from}: make the data with "
        f"experiments.prepare_data --tokenizer={folder}"
      )
    if self.dataset.tokenizer.vocab_size > self.config.vocab_size:
      raise UsageError(
        f"--init_from={self.train.init_from}: the tokenizer has "
        f"{self.dataset.tokenizer.vocab_size} ids, the model {self.config.vocab_size}"
      )
    _tell_beginning(
      self.dataset, self.train.data.data, tokenizer.bos_ids, self.train.init_from, say
    )
    return pretrained.load(
      folder,
      config=lora.merged_config(self.config),
      key=jax.random.key(self.train.seed),
      sharding=sharding,
    )[1]

  def evaluation_due(self, step: int) -> bool:
    return (
      bool(self.train.eval_every)
      and step > 0
      and (step % self.train.eval_every == 0 or step == self.num_steps)
    )

  def write_records(self, flagfile: str) -> None:
    """flags.txt, versions.json, model.json and the tokenizer, older versions of which are kept."""
    workdir = self.train.workdir
    if flagfile:
      run_directory.write_record(workdir, "flags.txt", flagfile)
    run_directory.write_record(
      workdir, "versions.json", run_directory.to_json(run_directory.versions())
    )
    run_directory.write_record(
      workdir,
      "model.json",
      run_directory.to_json(_model_record(self.config, self.train, self.dataset)),
    )
    os.makedirs(os.path.join(workdir, "tokenizer"), exist_ok=True)
    self.dataset.tokenizer.save(os.path.join(workdir, "tokenizer"))

  def loop(
    self, metrics: MetricsWriter, writer: checkpoint.CheckpointWriter, progress: Progress
  ) -> None:
    """Runs to the last step, or until a signal. Step s + 1 is dispatched before the metrics of step
    s are read: the devices never wait.
    """
    train = self.train
    first, watch, pending, work = self.step + 1, Stopwatch(), None, []

    def is_logged(step):
      return step == 1 or step % train.log_every == 0 or step == self.num_steps

    def report(step, batch, outputs, diagnostics, lengths):
      """Reads the metrics of a step, which waits for it, and logs them where due."""
      work.append(flops.training_flops(self.config, self.params_shape, lengths))
      outputs = {key: value.item() for key, value in jax.device_get(outputs).items()}
      if not self.is_spike(step, outputs, progress.say):
        # Raised before the parameters it led to are saved, so that the newest checkpoint is a good
        # one.
        self.check_step(step, outputs)
        self.result_loss, self.batch = outputs["loss"], batch
      progress.step(step)
      if is_logged(step):
        seconds = watch.lap(step)
        rate = train.data.batch_size * train.data.seq_len / seconds
        selection = {key: float(value) for key, value in jax.device_get(diagnostics).items()}
        speed = {"tokens_per_second": rate}
        if self.peak_flops is not None:
          speed["mfu"] = sum(work) / len(work) / seconds / (self.peak_flops * self.mesh.size)
        metrics.write({"step": step, **outputs, **speed, **selection})
        progress.log(
          step, outputs["loss"], rate, seconds if step > first else None, speed.get("mfu")
        )
        work.clear()
      elif step == first:
        watch.restart(step)  # The first step compiled; it says nothing about the speed.
        work.clear()

    while self.step < self.last_step and not self.stop.requested:
      batch = next(self.iterator)
      self.step += 1
      self.data_state = self.iterator.get_state()
      if self.profile.begins_at(self.step) and pending is not None:
        report(*pending)
        pending = None
      self.profile.before(self.step)
      placed = put_batch(self.mesh, batch)
      self.state, outputs = self.train_step(self.state, placed, *self.teacher, apply=self.yes)
      row = {key: value[:1] for key, value in batch.items()}
      diagnostics = self.diagnose(self.state.params, row) if is_logged(self.step) else {}
      if pending is not None:
        report(*pending)
      lengths = flops.document_lengths(batch["segment_ids"][:, :-1])
      pending = (self.step, placed, outputs, diagnostics, lengths)
      save = self.step % train.checkpoint_every == 0 or self.step == self.num_steps
      if save or self.evaluation_due(self.step) or self.profile.ends_at(self.step):
        report(*pending)
        pending = None
        watch.pause()
        self.profile.after(self.step, progress.say)
        if self.evaluation_due(self.step):
          self.evaluate(metrics, progress)
        if save:
          self.save(metrics, writer, progress.say)
        watch.resume()
    if pending is not None:
      report(*pending)

  def is_spike(self, step: int, outputs: dict, say: Callable[[str], None]) -> bool:
    """Returns whether the update of a step was not applied, and tells so.

    Raises:
      _Ended: where --on_spike=stop, or too many follow each other.
    """
    skipped = outputs.get("skipped", self.skipped)
    if skipped == self.skipped:
      self.skipped_in_a_row = 0
      return False
    self.skipped, self.skipped_in_a_row = skipped, self.skipped_in_a_row + 1
    line = (
      f"step {step}: a spike, by --spike_factor={self.train.spike_factor}: loss "
      f"{outputs['loss']:.4g}, gradient norm {outputs['grad_norm']:.4g}"
    )
    if self.train.on_spike == "stop":
      raise _Ended(f"{line}; the run ends, as --on_spike says")
    if self.skipped_in_a_row == spikes.MOST_IN_A_ROW:
      raise _Ended(f"{line}; it is the {self.skipped_in_a_row}th in a row")
    say(f"{line}; its update is skipped ({skipped} so far)")
    return True

  def check_step(self, step: int, outputs: dict) -> None:
    """Raises _Ended where the loss or the gradient norm of a step is not finite."""
    loss, grad_norm = outputs["loss"], outputs["grad_norm"]
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
      raise _Ended(f"the loss is {loss} and the gradient norm {grad_norm} at step {step}")
    self.last_update = f", whose update had loss {loss:.4g} and gradient norm {grad_norm:.4g}"

  def check_state(self) -> None:
    """Raises _Ended unless the state is finite, and so are the loss and the gradients under it.

    The loss of a step says nothing about the parameters that its update led to: only what a
    further step has seen is saved. Here it is the last ordinary batch once more, without an
    update. In a process that has made no step the state is a new one.
    """
    if not jax.device_get(all_finite((self.state.params, self.state.opt_state))):
      raise _Ended(f"parameters or moments of step {self.step} are not finite{self.last_update}")
    if self.batch is not None:
      self.state, outputs = self.train_step(self.state, self.batch, *self.teacher, apply=self.no)
      loss, grad_norm = (float(jax.device_get(outputs[name])) for name in ("loss", "grad_norm"))
      if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise _Ended(
          f"the loss is {loss} and the gradient norm {grad_norm} under the parameters "
          f"of step {self.step}{self.last_update}"
        )

  def evaluate(self, metrics: MetricsWriter, progress: Progress) -> None:
    """Writes the held-out loss, unless a signal interrupts it; then the resumed run evaluates
    again.
    """
    loss = heldout_loss(self.state.params, self.eval_step, self.mesh, self.heldout, self.stop)
    if loss is None:
      return
    if not math.isfinite(loss):
      raise _Ended(f"the held-out loss is {loss} at step {self.step}{self.last_update}")
    record, line = (
      {"step": self.step, "heldout_loss": loss},
      f"step {self.step}/{self.num_steps}  held-out loss {loss:.4f}",
    )
    if self.dataset.tokenizer.name == "byte":
      record["heldout_bits_per_byte"] = loss / math.log(2)
      line += f"  bits per byte {record['heldout_bits_per_byte']:.4f}"
    metrics.write(record)
    progress.say(line)
    self.result_heldout = loss

  def save(
    self, metrics: MetricsWriter, writer: checkpoint.CheckpointWriter, say: Callable[[str], None]
  ) -> None:
    """Starts saving this step. A save that fails is reported, and training goes on to the next one.

    Raises:
      _Ended: where the state is not one to go on from.
      RunError: where the folder of the run is gone.
    """
    if self.step in (self.saved_step, self.saving_step):
      return
    self.check_state()
    self.presence.check()
    metrics.sync()
    self.finish_save(writer, say)
    data_state = self.data_state
    if self.state.spikes:
      data_state = {**data_state, SPIKES: spikes.to_json(self.state.spikes)}
    try:
      writer.save(self.step, self.state.params, self.state.opt_state, data_state)
      self.saving_step = self.step
    except Exception as error:  # Orbax and tensorstore raise many kinds for a full or failing disk.
      say(
        f"the checkpoint of step {self.step} cannot be saved, those before it are kept: "
        f"{checkpoint.first_line(error)}"
      )

  def finish_save(self, writer: checkpoint.CheckpointWriter, say: Callable[[str], None]) -> None:
    """Waits for the save in progress, if any."""
    try:
      writer.wait()
      self.saved_step = self.saved_step if self.saving_step is None else self.saving_step
    except Exception as error:
      say(
        f"the checkpoint of step {self.saving_step} could not be saved, those before it are "
        f"kept: {checkpoint.first_line(error)}"
      )
    self.saving_step = None


def train(
  config: TransformerConfig, train_config: TrainConfig, dataset: TokenDataset, flagfile: str = ""
) -> Result:
  """Trains a model in `train_config.workdir`, from where an earlier call with the same workdir got
  to.

  Whatever is random derives from (seed, step): a run that is killed and started again logs the
  losses it would have logged.

  Args:
    config: the model; its vocabulary is the tokenizer's.
    train_config: everything else.
    dataset: what `sparsek.data.batches.open_data` returns.
    flagfile: text for WORKDIR/flags.txt.
  Returns:
    how it ended. STOP_SIGNALS end it early with a checkpoint.
  Raises:
    UsageError: before anything is changed, where the configuration, the data or the workdir's
      checkpoints do not go together.
    RunError: where the loss is not finite, the last checkpoint cannot be written, the disk is full
      or the workdir is gone.
  """
  try:
    return _train(config, train_config, dataset, flagfile)
  except OSError as error:
    where = f" ({error.filename})" if error.filename else ""
    raise RunError(
      f"the run in {train_config.workdir} cannot go on: {files.reason_of(error)}{where}"
    ) from error


def _train(
  config: TransformerConfig, train_config: TrainConfig, dataset: TokenDataset, flagfile: str
) -> Result:
  """Does what `train` says; a full disk raises OSError."""
  workdir = train_config.workdir
  with contextlib.ExitStack() as stack:
    stack.enter_context(checkpoint.quiet_orbax())
    stop = stack.enter_context(StopSignal())
    stack.enter_context(contextlib.closing(run_directory.lock(workdir)))
    run = _Run(config, train_config, dataset, stop)
    stack.callback(run.iterator.close)
    writer = checkpoint.CheckpointWriter(workdir, train_config.keep_checkpoints)
    writer.probe()
    stack.callback(run.profile.stop)
    run.restore_or_init(checkpoint.to_stderr)
    metrics = stack.enter_context(
      contextlib.closing(MetricsWriter(workdir, run.step, train_config.tensorboard))
    )
    evaluated = any(
      "heldout_loss" in record and record["step"] == run.step for record in metrics.records_kept
    )
    evaluate_first = run.evaluation_due(run.step) and not evaluated
    if run.step >= run.last_step and not evaluate_first:
      return Result(run.step, already_complete=True)
    run.write_records(flagfile)
    run.presence = run_directory.Presence(
      os.path.join(workdir, name) for name in ("lock", "metrics.jsonl", "checkpoints")
    )
    progress = stack.enter_context(contextlib.closing(Progress(run.step, run.num_steps)))
    size = lora.describe_size(
      *(count_params(params) for params in (run.state.params, lora.split(run.state.params)[0]))
    )
    progress.say(f"{size}, {jax.device_count()} x {jax.devices()[0].device_kind}")
    stack.callback(run.finish_save, writer, progress.say)
    try:
      if evaluate_first:
        run.evaluate(metrics, progress)
      run.loop(metrics, writer, progress)
      run.save(metrics, writer, progress.say)
    except _Ended as ended:
      run.finish_save(writer, progress.say)
      raise RunError(f"{ended}; {_advice(workdir)}") from None
    run.finish_save(writer, progress.say)
    writer.close()
    run.presence.check()
    if run.saved_step != run.step:
      raise RunError(
        f"the checkpoint of step {run.step} could not be saved in {workdir}; the newest "
        f"is of step {run.saved_step}"
      )
    return Result(run.step, run.result_loss, run.result_heldout, stopped=run.step < run.num_steps)


def _advice(workdir: str) -> str:
  """Returns what can be done about a run that goes nowhere."""
  advice = "lower --learning_rate or raise --warmup_steps"
  saved = checkpoint.saved_steps(workdir)
  if not saved:
    return f"no checkpoint was saved: {advice}"
  steps = f"step{'s' * (len(saved) > 1)} {', '.join(map(str, saved))}"
  back = f", --restore_step={saved[-2]} from an earlier one" if len(saved) > 1 else ""
  return (
    f"{workdir} has checkpoints of {steps}: {advice}; the same command goes on from step "
    f"{saved[-1]}{back}"
  )
