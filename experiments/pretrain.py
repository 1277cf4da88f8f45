# ruff: noqa: E402 (see sparsek.command_line.main)
"""Pretraining of a language model.

  python -m experiments.pretrain --workdir=/tmp/run --preset=tiny --num_steps=500

The same command again resumes from the newest checkpoint. WORKDIR gets checkpoints/, metrics.jsonl
(one JSON object per logged step), flags.txt (a --flagfile that reproduces the run), model.json and
versions.json. SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C save a checkpoint and exit 0. A checkpoint is
saved only if its parameters, and the loss and gradients that they give, are finite;
--restore_step=N goes back to an earlier one. --dry_run prints the parameters, operations, memory
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
from sparsek.command_line.configs import model_config, train_config, warn_of_unused
from sparsek.command_line.definer import OF_PROCESSES, into_string
from sparsek.command_line.invocation import by_user, command
from sparsek.command_line.main import parse_first, run
from sparsek.command_line.terminal import said_if_slow
from sparsek.command_line.training_flags import define_pretrain_flags
from sparsek.config import TrainConfig, TransformerConfig
from sparsek.errors import UsageError

FLAGS = absl_flags.FlagValues()
define_pretrain_flags(FLAGS)


def check_flags() -> None:
  """Raises UsageError for what can be refused before data and a model are read."""
  train_config(FLAGS)
  if not FLAGS.init_from:
    model_config(FLAGS)
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


def base_model(config: TrainConfig) -> TransformerConfig | None:
  """Returns the model that --init_from names; None where a preset is trained."""
  source = config.init_from or ""
  if source.startswith(pretrained.PREFIX):
    return pretrained.load_config(source.removeprefix(pretrained.PREFIX))
  if source and not FLAGS["preset"].present:
    return run_record.load_run_config(checkpoint.parse_run_reference(source)[0])[0]
  return None


def report(result: loop.Result, config: TrainConfig) -> None:
  """Prints how far training came, its losses, and where everything is."""
  workdir, num_steps = config.workdir, config.optimizer.num_steps
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


def pretrain() -> None:
  """Reads the flags, opens the data, trains, and says where everything is."""
  devices = planned_devices()
  config = train_config(FLAGS)
  base = base_model(config)
  model_config(FLAGS, pretrained=base)  # refuses bad flags before any data is read
  slow = said_if_slow("opening the data ...") if processes.is_first() else contextlib.nullcontext()
  with slow:
    dataset = batches.open_data(config.data.data, FLAGS.tokenizer)
  model = model_config(FLAGS, vocab_size=dataset.vocab_size, pretrained=base)
  if processes.is_first() and by_user():
    warn_of_unused(model, FLAGS)
  if FLAGS.remat is None:
    model = dataclasses.replace(
      model,
      remat=plan.remat_that_fits(
        model, config, plan.memory_limit(devices), len(devices) if devices else None
      ),
    )
  if FLAGS.dry_run:
    said = "compiling the step for the plan; a large model takes minutes ..."
    with said_if_slow(said) if processes.is_first() else contextlib.nullcontext():
      lines = plan.make_plan(model, config, devices).lines()
    if processes.is_first():
      print("\n".join(lines))
    return
  run_directory.use_compilation_cache(FLAGS.compilation_cache)
  result = loop.train(model, config, dataset, into_string(FLAGS))
  if processes.is_first():
    report(result, config)


if __name__ == "__main__":
  run(main, FLAGS)
