# ruff: noqa: E402 (see sparsek.command_line.main)
"""Pretraining of a language model.

  python -m experiments.pretrain --workdir=/tmp/run --preset=tiny --num_steps=500

The same command again resumes from the newest checkpoint. WORKDIR gets checkpoints/, metrics.jsonl
(one JSON object per logged step), flags.txt (a --flagfile that reproduces the run), model.json and
versions.json. SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C save a checkpoint and exit 0. A checkpoint is
saved only if its parameters, and the loss and gradients that they give, are finite;
--restore_step=N goes back to an earlier one. With --stage="NAME: FLAGS", given several times, one
run trains under other flags stage by stage. --dry_run prints the parameters, operations, memory
and collectives of a step, and trains nothing; with --topology, of a step on devices that need not
be here.
"""

import contextlib
import dataclasses
import math
import os
import shlex
from typing import Any

from absl import flags as absl_flags

from sparsek.command_line import outputs, own_modules, path_flags
from sparsek.command_line.configs import (
  model_config,
  train_config,
  unused_by_all,
  unused_flags,
  warn_of_unused,
)
from sparsek.command_line.definer import OF_PROCESSES, into_string
from sparsek.command_line.invocation import by_user, command
from sparsek.command_line.main import parse_first, run
from sparsek.command_line.stages import named, stages_of
from sparsek.command_line.terminal import said_if_slow
from sparsek.command_line.training_flags import define_pretrain_flags
from sparsek.config import TrainConfig, TransformerConfig
from sparsek.errors import UsageError

FLAGS = absl_flags.FlagValues()
define_pretrain_flags(FLAGS)


def check_flags() -> None:
  """Raises UsageError for what can be refused before data and a model are read."""
  for stage in stages_of(FLAGS):
    with named(stage.name):
      train_config(stage.values)
      if not FLAGS.init_from:
        model_config(stage.values)
  if FLAGS.topology is not None and not FLAGS.dry_run:
    raise UsageError(f"--topology={FLAGS.topology} needs --dry_run: nothing can be trained there")
  if not FLAGS.dry_run:
    outputs.check_folder(f"--workdir={FLAGS.workdir}", FLAGS.workdir, outputs.A_RUN)


if __name__ == "__main__":
  parse_first(FLAGS, __doc__, check_flags)

import jax

from sparsek.data import batches
from sparsek.huggingface import pretrained
from sparsek.parallel import processes, topology
from sparsek.parallel.mesh import check_divides
from sparsek.runs import checkpoint, run_directory, run_record
from sparsek.training import loop, plan
from sparsek.training.stages import Stage, alike_in_layout, check_stages


def base_model(config: TrainConfig) -> TransformerConfig | None:
  """Returns the model that --init_from names; None where a preset is trained."""
  source = config.init_from or ""
  if source.startswith(pretrained.PREFIX):
    return pretrained.load_config(source.removeprefix(pretrained.PREFIX))
  if source and not FLAGS["preset"].present:
    return run_record.load_run_config(checkpoint.parse_run_reference(source)[0])[0]
  return None


def report(result: loop.Result, config: TrainConfig, num_steps: int) -> None:
  """Prints how far a run came, its losses, and where everything is.

  Args:
    result: of the run.
    config: of its last stage.
    num_steps: of the whole run.
  """
  workdir = config.workdir
  if result.stopped and result.step == config.stop_at:
    print(
      f"stopped at step {result.step} of {num_steps}, as --stop_at says; "
      "the same command without it goes on"
    )
  elif result.stopped:
    print(f"stopped by a signal at step {result.step} of {num_steps}; the same command resumes")
  losses = {config.loss_name: result.loss, "held-out loss": result.heldout_loss}
  known = [
    f"{name} {value:.4f}{' nats per token' * (name == 'held-out loss')}"
    for name, value in losses.items()
    if value is not None
  ]
  if known:
    print(f"step {result.step}: {', '.join(known)}")
  print(
    f"checkpoints in {os.path.join(workdir, 'checkpoints')}, metrics in "
    f"{os.path.join(workdir, 'metrics.jsonl')}"
  )
  if by_user() and not result.stopped:
    run_flag = f"--workdir={shlex.quote(path_flags.shown(workdir))}"
    run_flag = " ".join((*own_modules.given(FLAGS), run_flag))
    print(f"next: {command('evaluate')} {run_flag}")
    print(f'      {command("generate")} {run_flag} --prompt="def main"')


def planned_devices() -> list[jax.Device] | None:
  """Returns the devices that --topology describes; None without that flag.

  Raises:
    UsageError: where --fsdp and --context do not divide them, or they cannot be compiled for.
  """
  if FLAGS.topology is None:
    return None
  described = topology.parse(FLAGS.topology)
  check_divides(FLAGS.fsdp, FLAGS.context, math.prod(described.shape))
  jax.config.update("jax_platforms", "cpu")  # uses no attached device
  return topology.described_devices(described)


def main() -> None:
  """Joins the processes of the run, and trains."""
  check_flags()
  if FLAGS.topology is not None:  # such a plan needs this process alone
    pretrain()
    return
  flags: list[Any] = [FLAGS[name].value for name in OF_PROCESSES]
  with processes.running(processes.Options(*flags)):
    pretrain()


def read_stages(devices: list[jax.Device] | None) -> list[Stage]:
  """Returns the stages of the run, one where --stage is not given; opens their data.

  Args:
    devices: those of a plan; None for the attached ones.
  """
  flags = stages_of(FLAGS)
  trains, models, data = [], [], {}
  for stage in flags:
    with named(stage.name):
      trains.append(train_config(stage.values))
  base = base_model(trains[0])
  for stage in flags:
    with named(stage.name):
      model_config(stage.values, pretrained=base)  # refuses bad flags before any data is read
  slow = said_if_slow("opening the data ...") if processes.is_first() else contextlib.nullcontext()
  with slow:
    for stage, train in zip(flags, trains):
      if train.data.data not in data:
        with named(stage.name):
          data[train.data.data] = batches.open_data(train.data.data, FLAGS.tokenizer)
  vocab_size = data[trains[-1].data.data].vocab_size
  for stage in flags:
    with named(stage.name):
      models.append(model_config(stage.values, vocab_size=vocab_size, pretrained=base))
  if processes.is_first() and by_user():
    unused = [unused_flags(model, stage.values) for model, stage in zip(models, flags)]
    warn_of_unused(unused_by_all(unused))
  stages = [
    Stage(model, train, data[train.data.data], stage.name, stage.text, stage.begin)
    for model, train, stage in zip(alike_in_layout(models), trains, flags)
  ]
  check_stages(stages)
  return [_with_remat(stage, of.values["remat"].value, devices) for stage, of in zip(stages, flags)]


def _with_remat(stage: Stage, given: str | None, devices: list[jax.Device] | None) -> Stage:
  """Returns a stage that recomputes in the backward pass what --remat or its memory says."""
  if given is not None:
    return stage
  remat = plan.remat_that_fits(
    stage.config, stage.train, plan.memory_limit(devices), len(devices) if devices else None
  )
  return stage._replace(config=dataclasses.replace(stage.config, remat=remat))


def pretrain() -> None:
  """Reads the flags, opens the data, trains, and says where everything is."""
  devices = planned_devices()
  stages = read_stages(devices)
  if FLAGS.dry_run:
    for stage in stages:
      print_plan(stage, stages, devices)
    return
  run_directory.use_compilation_cache(FLAGS.compilation_cache)
  result = loop.train_stages(stages, into_string(FLAGS))
  if processes.is_first():
    report(result, stages[-1].train, stages[-1].end)


def print_plan(stage: Stage, run: list[Stage], devices: list[jax.Device] | None) -> None:
  """Prints the plan of a stage of a run."""
  said = "compiling the step for the plan; a large model takes minutes ..."
  with said_if_slow(said) if processes.is_first() else contextlib.nullcontext(), named(stage.name):
    lines = plan.make_plan(stage.config, stage.train, devices, run).lines()
  if stage.name:
    lines = [f"stage {stage.name}, steps {stage.begin + 1} to {stage.end}:"] + [
      f"  {line}" for line in lines
    ]
  if processes.is_first():
    print("\n".join(lines))


if __name__ == "__main__":
  run(main, FLAGS)
