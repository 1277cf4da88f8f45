"""How often runs find what stands far back: accuracy on generated tasks with known answers, with 95 % confidence intervals.

  python -m experiments.evaluate_tasks --workdir=/tmp/run --tasks=passkey,needle --lengths=1024,4096
  python -m experiments.evaluate_tasks --workdir=/tmp/sparsek,/tmp/sliding_window --examples=200

All runs are given the same documents. --k, --window and --gate may differ from those of training. Each run's WORKDIR/tasks.jsonl gets a line with the
numbers and what they were measured with; earlier lines stay.
"""

import dataclasses
import json
import os

from absl import flags as absl_flags
import numpy as np
from tqdm import tqdm

from sparsek import checkpoint, flags, run_directory, tasks
from sparsek.errors import RunError, UsageError
from sparsek.tokenizer import load_tokenizer
from sparsek.train_step import check_length

FLAGS = absl_flags.FlagValues()
flags.define_task_flags(FLAGS)


def listed(name, allowed=None):
  """The values of a flag; numbers unless it says what is allowed."""
  values = FLAGS[name].value.split(",")
  for value in values:
    if value not in allowed if allowed else not (value.isdecimal() and int(value)):
      raise UsageError(f"--{name}={FLAGS[name].value}: {value!r} must be " + (f"one of {', '.join(allowed)}" if allowed else "a number of at least 1"))
  return values if allowed else [int(value) for value in values]


def main() -> None:
  """Evaluates every run on every task at every length."""
  chosen, lengths = listed("tasks", tuple(tasks.TASKS)), listed("lengths")
  workdirs = [os.path.expanduser(folder) for folder in (FLAGS.workdir or "").split(",") if folder]
  if not workdirs:
    raise UsageError("--workdir is required: the folder of a pretraining run, or several separated by commas")
  found = {}
  for workdir in workdirs:
    if not os.path.isdir(workdir):
      raise UsageError(f"--workdir={workdir}: there is no such folder")
    config, record = checkpoint.load_run_config(workdir)
    config, name = flags.override_config(config, FLAGS), record["tokenizer"]["name"]
    tokenizer = load_tokenizer(name if name == "byte" else os.path.join(workdir, "tokenizer"))
    check_length(config, max(lengths), "lengths")
    for task in chosen:                                        # a document too short is refused before any long work
      tasks.make_example(task, tokenizer, min(lengths), np.random.default_rng(0))
    params, step = checkpoint.load_params(workdir, config, FLAGS.step)
    for task in chosen:
      for length in lengths:
        size = -(-FLAGS.examples // FLAGS.batch_size)
        batches = tasks.evaluate(config, params, tokenizer, task, length, FLAGS.examples, FLAGS.batch_size, FLAGS.seed)
        *_, found[workdir, task, length] = tqdm(batches, f"{workdir} {task} {length}", size, unit="batch", disable=None)
    results = [{"task": task, "length": length, "right": right, "total": total}
               for (folder, task, length), (right, total) in found.items() if folder == workdir]
    try:
      with open(os.path.join(workdir, "tasks.jsonl"), "a") as file:
        file.write(json.dumps({"step": step, "results": results, "flags": flags.into_string(FLAGS).splitlines(), "model": dataclasses.asdict(config),
                               "trained_seq_len": record["data"]["seq_len"], "versions": run_directory.versions()}) + "\n")
    except OSError as error:
      raise RunError(f"{workdir}/tasks.jsonl cannot be written: {error.strerror}") from None
  print(tasks.table(workdirs, lengths, found))


if __name__ == "__main__":
  flags.run(main, FLAGS)
