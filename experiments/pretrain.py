"""Pretrains a language model.

  python -m experiments.pretrain --workdir=/tmp/run --preset=tiny --num_steps=500

The same command again resumes from the newest checkpoint. WORKDIR gets checkpoints/, metrics.jsonl
(one JSON object per logged step), flags.txt (a --flagfile that reproduces the run), model.json and
versions.json. SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C save a checkpoint and exit 0. A checkpoint is
saved only where a further step finds the loss and the gradients finite; --restore_step=N goes back
to an earlier one. --dry_run says what a step takes, and does nothing.
"""

import dataclasses
import os

from sparsek.command_line import flags
from sparsek.data import batches
from sparsek.huggingface import pretrained
from sparsek.runs import checkpoint, run_directory, run_record
from sparsek.training import loop, plan

flags.define_model_flags()
flags.define_data_flags()
flags.define_train_flags()
flags.define_dry_run_flag()


def main() -> None:
  """Reads the flags, opens the data, trains, and says where everything is."""
  config = flags.train_config()
  base = None
  if (config.init_from or "").startswith(pretrained.PREFIX):
    base = pretrained.load_config(config.init_from.removeprefix(pretrained.PREFIX))
  elif config.init_from and not flags.FLAGS["preset"].present:
    base, _ = run_record.load_run_config(checkpoint.parse_run_reference(config.init_from)[0])
  flags.model_config(pretrained=base)  # refuses bad flags before any data is read
  dataset = batches.open_data(config.data.data, flags.FLAGS["tokenizer"].value)
  model = flags.model_config(vocab_size=dataset.vocab_size, pretrained=base)
  if flags.FLAGS["remat"].value is None:
    model = dataclasses.replace(
      model, remat=plan.remat_that_fits(model, config, plan.memory_limit())
    )
  if flags.FLAGS["dry_run"].value:
    print("\n".join(plan.make_plan(model, config).lines()))
    return
  run_directory.use_compilation_cache(config.workdir)
  result = loop.train(model, config, dataset, flags.into_string())

  workdir = config.workdir
  if result.already_complete:
    asked = (
      f"--num_steps={config.optimizer.num_steps}"
      if config.stop_at is None
      else f"--stop_at={config.stop_at}"
    )
    print(f"{workdir} is complete: it has all of {asked} steps ({result.step} were made)")
  elif result.stopped and result.step == config.stop_at:
    print(
      f"stopped at step {result.step} of {config.optimizer.num_steps}, as --stop_at says; "
      "the same command without it goes on"
    )
  elif result.stopped:
    print(
      f"stopped by a signal at step {result.step} of {config.optimizer.num_steps}; "
      "the same command resumes"
    )
  losses = {"loss": result.loss, "held-out loss": result.heldout_loss}
  known = ", ".join(f"{name} {value:.4f}" for name, value in losses.items() if value is not None)
  if known:
    print(f"step {result.step}: {known} (nats per token)")
  print(
    f"checkpoints in {os.path.join(workdir, 'checkpoints')}, metrics in "
    f"{os.path.join(workdir, 'metrics.jsonl')}"
  )


if __name__ == "__main__":
  flags.run(main)
