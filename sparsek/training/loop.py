"""Training loop: dispatches steps, logs, evaluates, saves and resumes."""

import contextlib
import dataclasses
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Compiled

from sparsek.config import TrainConfig, TransformerConfig
from sparsek.data.token_files import TokenDataset
from sparsek.errors import RunError
from sparsek.model import flops, implementations, lora
from sparsek.model.transformer import Params, count_params
from sparsek.parallel import processes
from sparsek.parallel.mesh import HostBatch, first_row, put_batch, replicated
from sparsek.runs import checkpoint, run_directory, writers
from sparsek.runs.checkpoint_writer import CheckpointWriter
from sparsek.runs.metrics import MetricsWriter, NoMetrics, Progress
from sparsek.storage import files
from sparsek.training.compilation import lower, start_compiling, start_compiling_kernels
from sparsek.training.document_losses import LossSums
from sparsek.training.report import Dispatched, Ended, Reporter
from sparsek.training.saver import Saver
from sparsek.training.stages import ELSEWHERE, Stage, record
from sparsek.training.start import (
  Setup,
  Start,
  describe_complete,
  describe_resume,
  next_stage,
  restore_or_init,
  set_up,
  write_records,
)
from sparsek.training.step import all_finite
from sparsek.training.stop_signal import AgreedStop, StopSignal

SLOW = 2.0  # seconds that compiling takes before its end is worth a line


@dataclasses.dataclass(frozen=True)
class Result:
  """Result of a call of `train`.

  Attributes:
    step: updates made in all.
    loss: of the last step, or None where none was made in this process.
    heldout_loss: of the last evaluation in this process, or None.
    stopped: a signal, or `TrainConfig.stop_at`, ended the run before its last step.
    already_complete: there was nothing left to do.
  """

  step: int
  loss: float | None = None
  heldout_loss: float | None = None
  stopped: bool = False
  already_complete: bool = False


def heldout_losses(
  params: Params,
  eval_step: Callable,
  mesh: Mesh,
  batches: Iterable[HostBatch],
  stop: AgreedStop | None = None,
) -> LossSums | None:
  """Returns the losses of counted targets in nats by document, over held-out batches.

  It is None where `stop` was requested before the end.
  """
  sums = LossSums()
  for batch in batches:
    losses, documents = jax.device_get(eval_step(params, put_batch(mesh, batch)))
    sums.add(documents[documents >= 0], losses[documents >= 0])
    if stop is not None and stop.hear(stop.cast()):
      return None
    processes.progress()
  return sums


class _Run:
  """A stage of a run in progress: its state on the devices, and where figures and checkpoints go.

  Attributes:
    step: updates dispatched so far.
    state, data_state: after them.
    heldout_loss: of the last evaluation in this process, or None.
  """

  def __init__(
    self,
    setup: Setup,
    start: Start,
    stop: AgreedStop,
    metrics: MetricsWriter,
    saver: Saver,
    progress: Progress,
  ):
    self._setup, self._train, self._stop = setup, setup.train, stop
    self._metrics, self._saver, self._progress = metrics, saver, progress
    self._reporter = Reporter(setup, start, metrics, progress)
    self.step, self.state, self.data_state = start.step, start.state, start.data_state
    self._teacher, self._elsewhere = start.teacher, start.elsewhere
    # Values of the argument `apply` of the training step.
    self._yes, self._no = jax.device_put(
      (jnp.bool_(True), jnp.bool_(False)), replicated(setup.mesh)
    )
    self._pending: Dispatched | None = None
    self.heldout_loss: float | None = None

  def result(self, before: Result) -> Result:
    """Returns the result of the run so far, given that before this stage."""
    loss, heldout_loss = self._reporter.loss, self.heldout_loss
    return Result(
      self.step,
      before.loss if loss is None else loss,
      before.heldout_loss if heldout_loss is None else heldout_loss,
    )

  def announce(self) -> None:
    """Says which stage begins or goes on, and how it computes attention."""
    setup, stage = self._setup, self._setup.stage
    self._progress.begin(stage.name, setup.train.loss_name)
    if self.step < setup.last_step:
      if stage.name:
        self._progress.say(f"stage {stage.name}, steps {stage.begin + 1} to {stage.end}")
      for line in implementations.describe_choice(*setup.attention_shape, packed=setup.packed):
        self._progress.say(line)

  def loop(self) -> None:
    """Runs to the last step of the stage, or until a signal.

    Step s + 1 is dispatched before the metrics of step s are read: the devices never wait.
    """
    setup, watch = self._setup, self._reporter.watch
    while self.step < setup.last_step and not self._stop.requested:
      begin = watch.now()
      dispatched = self._dispatch(next(setup.iterator))
      self._report_pending(ahead=watch.now() - begin)
      self._pending = dispatched
      save = self.step % self._train.checkpoint_every == 0 or self.step == setup.end
      evaluate = setup.evaluation_due(self.step)
      if save or evaluate or setup.profile.ends_at(self.step):
        self._report_pending()
        processes.pause()
        with watch.paused():
          setup.profile.after(self.step, self._progress.say)
          if evaluate:
            self.evaluate()
          if save:
            self.save()
    self._report_pending()
    processes.pause()

  def _dispatch(self, batch: HostBatch) -> Dispatched:
    """Starts a step on the devices."""
    setup = self._setup
    self.step += 1
    self.data_state = setup.iterator.get_state()
    if setup.profile.begins_at(self.step):
      self._report_pending()
      with self._reporter.watch.paused():
        setup.profile.before(self.step)
    placed = put_batch(setup.mesh, batch)
    arguments = self.state, placed, *self._teacher
    diagnostics = {}
    with self._compiling(arguments) as compilation:
      self.state, outputs = setup.train_step(*arguments, apply=self._yes)
      if compilation is not None:
        compilation.result()
      if self._reporter.is_diagnosed(self.step):
        diagnostics = setup.diagnose(self.state.params, first_row(setup.mesh, placed))
    lengths = flops.document_lengths(batch["segment_ids"][:, :-1])
    stop = self._stop.cast()
    if self._pending is not None:  # so this step did not compile
      processes.progress()
    return Dispatched(self.step, placed, outputs, diagnostics, lengths, stop)

  @contextlib.contextmanager
  def _compiling(self, arguments: tuple[Any, ...]) -> Iterator[Future[Compiled] | None]:
    """Says that the first step of a stage is compiled in the block, and how long it took.

    Its kernels and the diagnostics are compiled in other threads.

    Args:
      arguments: of the step.
    Yields:
      the compilation of the diagnostics, or None after the first step.
    """
    if self.step > self._reporter.first_step:
      yield None
      return
    processes.pause()
    kept = " (cached next time)" if run_directory.keeps_compiled() else ""
    self._progress.say(f"compiling the training step{kept} ...")
    begin = time.monotonic()
    setup = self._setup
    # which the step need not repeat
    lowered = lower(setup.train_step, *arguments, apply=self._yes)
    start_compiling_kernels(lowered, jax.local_devices()[0])
    state, batch, *_ = arguments
    yield start_compiling(setup.diagnose, state.params, first_row(setup.mesh, batch))
    seconds = time.monotonic() - begin
    if seconds >= SLOW:
      self._progress.say(f"compiled in {seconds:.0f} s")

  def _report_pending(self, ahead: float = 0.0) -> None:
    """Reports the pending step, if any, which waits for it; `ahead` is that of `Stopwatch.lap`."""
    if self._pending is not None:
      pending, self._pending = self._pending, None
      self._reporter.report(pending, ahead)
      self._stop.hear(pending.stop)
      processes.progress()

  def _check_state(self) -> None:
    """Raises Ended unless the state, and the loss and the gradients under it, are finite.

    The loss of a step is computed before its update, so it says nothing about the updated
    parameters. One more step, on the last ordinary batch again and without an update, tests them. A
    process that has made no step has no such batch, and its state is a new one.
    """
    if not jax.device_get(all_finite((self.state.params, self.state.opt_state))):
      raise Ended(
        f"parameters or moments of step {self.step} are not finite{self._reporter.last_update}"
      )
    if self._reporter.last_batch is not None:
      self.state, outputs = self._setup.train_step(
        self.state, self._reporter.last_batch, *self._teacher, apply=self._no
      )
      loss, grad_norm = (float(jax.device_get(outputs[name])) for name in ("loss", "grad_norm"))
      if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise Ended(
          f"the loss is {loss} and the gradient norm {grad_norm} under the parameters "
          f"of step {self.step}{self._reporter.last_update}"
        )

  def evaluate(self) -> None:
    """Writes the held-out loss, at the end of the run also that of each document.

    Where a signal interrupts it, nothing is written, and the resumed run evaluates again.
    """
    setup = self._setup
    sums = heldout_losses(self.state.params, setup.eval_step, setup.mesh, setup.heldout, self._stop)
    if sums is None:
      return
    loss = sums.mean or 0.0  # of no target
    if not math.isfinite(loss):
      raise Ended(f"the held-out loss is {loss} at step {self.step}{self._reporter.last_update}")
    record: dict[str, Any] = {"step": self.step, **setup.stage.label, "heldout_loss": loss}
    line = f"step {self.step}/{setup.num_steps}  held-out loss {loss:.4f}"
    if setup.dataset.tokenizer.name == "byte":
      record["heldout_bits_per_byte"] = loss / math.log(2)
      line += f"  bits per byte {record['heldout_bits_per_byte']:.4f}"
    if self.step == setup.num_steps:
      record["heldout_documents"] = dataclasses.asdict(sums.by_document())
    processes.on_first(functools.partial(self._metrics.write, record))
    self._progress.say(line)
    self.heldout_loss = loss

  def save(self) -> None:
    """Starts saving this step, unless it is saved or being saved already.

    Raises:
      Ended: where the state, or the loss or the gradients under it, are not finite.
      RunError: where the folder of the run is gone.
    """
    if not self._saver.has(self.step):
      self._check_state()
      elsewhere = {ELSEWHERE: list(self._elsewhere)} if self._elsewhere else {}
      self._saver.save(self.step, self.state, self.data_state | elsewhere)


def train(
  config: TransformerConfig, train_config: TrainConfig, dataset: TokenDataset, flagfile: str = ""
) -> Result:
  """Trains a model in `train_config.workdir`, and resumes where an earlier call stopped there.

  Everything random derives from (seed, step): a run that is killed and started again logs the same
  losses as one that was not.

  Args:
    config: the model; its vocabulary is the tokenizer's.
    train_config: everything else.
    dataset: as `sparsek.data.batches.open_data` returns it.
    flagfile: text for WORKDIR/flags.txt.
  Returns:
    the result. STOP_SIGNALS end the run early, with a checkpoint.
  Raises:
    UsageError: before anything is changed, where the configuration, the data or the workdir's
      checkpoints do not go together.
    RunError: where the loss is not finite, the last checkpoint cannot be written, the disk is full
      or the workdir is gone.
  """
  return train_stages([Stage(config, train_config, dataset)], flagfile)


def train_stages(stages: Sequence[Stage], flagfile: str = "") -> Result:
  """Trains the stages of a run one after the other, as `train` does the only one.

  Killed anywhere and started again, the run goes on as if it had not been.

  Args:
    stages: in their order, each with its own `begin`; their workdir, seed and mesh are the same.
    flagfile: text for WORKDIR/flags.txt.
  Returns:
    the result, with the losses of the last stage that made a step.
  Raises:
    UsageError, RunError: as `train`.
  """
  try:
    return _train_locked(stages, flagfile)
  except OSError as error:
    where = f" ({error.filename})" if error.filename else ""
    raise RunError(
      f"the run in {stages[0].train.workdir} cannot go on: {files.reason_of(error)}{where}"
    ) from error


def _train_locked(stages: Sequence[Stage], flagfile: str) -> Result:
  """Trains as `train_stages` does, under the lock of the workdir; a full disk raises OSError."""
  train_config = stages[-1].train
  workdir = train_config.workdir
  with contextlib.ExitStack() as stack:
    stack.enter_context(checkpoint.quiet_orbax())
    stop = stack.enter_context(StopSignal())
    if processes.count() > 1:
      processes.check_same(_settings(stages))
    processes.on_first(functools.partial(_lock, stack, workdir))
    setups = set_up(stages)
    for setup in setups:
      stack.callback(setup.iterator.close)
      stack.callback(setup.profile.stop)
    writer = CheckpointWriter(workdir, train_config.keep_checkpoints)
    writer.probe()
    say = checkpoint.to_stderr if processes.is_first() else _drop
    start = restore_or_init(setups, say)
    metrics, evaluated = _open_metrics(stack, stages, start.step)
    evaluate_first = setups[start.stage].evaluation_due(start.step) and not evaluated
    if start.step >= setups[-1].last_step and not evaluate_first:
      say(describe_complete(setups, start))
      return Result(start.step, already_complete=True)
    if start.saved_step is not None:
      for line in describe_resume(setups, start):
        say(line)
    processes.on_first(lambda: write_records(setups, flagfile))
    stream = sys.stderr if processes.is_first() else stack.enter_context(open(os.devnull, "w"))
    progress = stack.enter_context(contextlib.closing(Progress(start.step, setups[-1].end, stream)))
    saver = Saver(workdir, writer, metrics, start.saved_step, progress.say)
    progress.say(f"the run goes to {workdir}")
    progress.say(f"{_describe_size(start.state.params)}, {_describe_devices()}")
    stack.callback(saver.wind_up)
    agreed, result = AgreedStop(stop, setups[0].mesh), Result(start.step)
    try:
      while True:
        setup = setups[start.stage]
        run = _Run(setup, start, agreed, metrics, saver, progress)
        run.announce()
        if evaluate_first:
          run.evaluate()
          evaluate_first = False
        run.loop()
        run.save()
        result = run.result(result)
        if agreed.requested or run.step >= setups[-1].last_step:
          break
        setup.iterator.close()
        setup.profile.stop()
        left = start.stage + 1, run.state, run.data_state, start.elsewhere
        del run, start  # and with them the teacher
        start = next_stage(setups, *left)
    except Ended as ended:
      saver.finish()
      raise RunError(f"{ended}; {_advice(workdir)}") from None
    saver.close(result.step)
    return dataclasses.replace(result, stopped=result.step < setups[-1].end)


def _lock(stack: contextlib.ExitStack, workdir: str) -> None:
  """Locks the folder of the run until the stack unwinds."""
  stack.enter_context(run_directory.locked(workdir))


def _drop(line: str) -> None:
  """Drops a line of text, which process 0 prints."""


def _open_metrics(
  stack: contextlib.ExitStack, stages: Sequence[Stage], step: int
) -> tuple[MetricsWriter, bool]:
  """Opens the metrics of a run at a step until the stack unwinds.

  Returns:
    (the writer, which writes in process 0 only; whether they hold the held-out loss of this step).
  """
  metrics: MetricsWriter = NoMetrics()

  def opened() -> bool:
    nonlocal metrics
    train = stages[-1].train
    settings = record(stages)
    metrics = MetricsWriter(train.workdir, step, writers.open_writers(train, step, settings))
    stack.callback(metrics.close)
    return any("heldout_loss" in kept and kept["step"] == step for kept in metrics.records_kept)

  evaluated = processes.on_first(opened)
  return metrics, evaluated


def _settings(stages: Sequence[Stage]) -> dict[str, Any]:
  """Returns what must be the same in all processes of a run, by flag; paths may differ."""
  result: dict[str, Any] = {}
  for stage in stages:
    fields = dataclasses.asdict(stage.config) | dataclasses.asdict(stage.train)
    sections = {name: fields.pop(name) for name in ("data", "optimizer")}
    for section in sections.values():
      fields |= section
    for path in ("workdir", "data"):
      fields.pop(path, None)
    fields = {name: repr(value) for name, value in fields.items()}
    dataset = stage.dataset
    fields |= {"data": dataset.fingerprint, "tokenizer": dataset.tokenizer.fingerprint}
    prefix = f"stage={stage.name}: --" if stage.name else ""
    result |= {f"{prefix}{name}": value for name, value in fields.items()}
  return result


def _describe_size(params: Params) -> str:
  return lora.describe_size(count_params(params), count_params(lora.split(params)[0]))


def _describe_devices() -> str:
  of_processes = f" in {processes.count()} processes" if processes.count() > 1 else ""
  return f"{jax.device_count()} x {jax.devices()[0].device_kind}{of_processes}"


def _advice(workdir: str) -> str:
  """Returns advice on a run that cannot go on."""
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
