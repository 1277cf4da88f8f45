"""How often runs find what stands far back: accuracy on generated tasks with known answers, with 95
% confidence intervals.

  python -m experiments.evaluate_tasks --workdir=/tmp/run --tasks=passkey,needle --lengths=1024,4096
  python -m experiments.evaluate_tasks --workdir=/tmp/sparsek,/tmp/sliding_window
  --lengths=1024,4096,16384,65536 --examples=200 --record=tasks.json

All runs are given the same documents. --k, --window and --gate may differ from those of training.
Each run's WORKDIR/tasks.jsonl gets a line with the numbers and what they were measured with;
earlier lines stay. --record writes those of all runs to one file, and a picture of accuracy against
length.
"""

import dataclasses
import json
import os
import sys

import numpy as np
from absl import flags as absl_flags
from tqdm import tqdm

from experiments.reports import plots
from sparsek.command_line import flags, path_flags
from sparsek.data.task_documents import CHANCE, TASKS, make_example
from sparsek.errors import UsageError
from sparsek.evaluation import tasks
from sparsek.parallel.mesh import make_mesh, replicated
from sparsek.runs import checkpoint, run_directory
from sparsek.runs.metrics import append_record
from sparsek.storage import files
from sparsek.training.step import check_batch, check_length

MAX_LENGTH = 2**24  # tokens of a document

FLAGS = absl_flags.FlagValues()
flags.define_task_flags(FLAGS)


def listed(name, allowed=None):
  """The values of a flag; numbers unless it says what is allowed."""
  values = FLAGS[name].value.split(",")
  for value in values:
    if value not in allowed if allowed else not (value.isdecimal() and int(value)):
      raise UsageError(
        f"--{name}={FLAGS[name].value}: {value!r} must be "
        + (f"one of {', '.join(allowed)}" if allowed else "a number of at least 1")
      )
  return values if allowed else [int(value) for value in values]


def save(path, records, found):
  """The record of all runs and its picture."""
  panels = {}
  for (label, task, length), (right, total) in found.items():
    panels.setdefault(task, {}).setdefault(label, []).append(
      (length, right / total, *tasks.interval(right, total))
    )
  picture = os.path.splitext(path)[0] + ".png"
  record = {"chance": {task: CHANCE[task] for task in panels}, "runs": records}
  files.save(path, json.dumps(record, indent=1))
  plots.save_accuracies(picture, panels, CHANCE)
  print(f"{path}, {picture}")


def check_lengths(lengths: list[int]) -> None:
  """Raises UsageError for documents that would take hours to make."""
  if max(lengths) > MAX_LENGTH:
    raise UsageError(f"--lengths={max(lengths)}: must be at most {MAX_LENGTH}")


def main() -> None:
  """Evaluates every run on every task at every length."""
  chosen, lengths = listed("tasks", tuple(TASKS)), listed("lengths")
  check_lengths(lengths)
  workdirs = FLAGS.workdir
  if not workdirs:
    raise UsageError(
      "--workdir is required: the folder of a pretraining run, or several separated by commas"
    )
  if FLAGS.record and not (
    FLAGS.record.endswith(".json") and os.path.isdir(os.path.dirname(FLAGS.record) or ".")
  ):
    raise UsageError(f"--record={FLAGS.record}: must be a .json file in a folder that exists")
  if FLAGS.record:
    files.check_writable(FLAGS.record)
  mesh = make_mesh()
  batch_size = FLAGS.batch_size or mesh.size
  check_batch(mesh, batch_size)
  found, records, runs = {}, {}, []
  for workdir in workdirs:
    if not os.path.isdir(workdir):
      raise UsageError(f"--workdir={workdir}: there is no such folder")
    config, record = checkpoint.load_run_config(workdir)
    config, tokenizer = flags.override_config(config, FLAGS), checkpoint.load_run_tokenizer(workdir)
    check_length(config, max(lengths), "lengths")
    for task in chosen:  # a document too short is refused before any long work
      make_example(task, tokenizer, min(lengths), np.random.default_rng(0), FLAGS.min_distance)
    files.check_writable(os.path.join(workdir, "tasks.jsonl"))
    runs.append((workdir, config, record, tokenizer))
  for workdir, config, record, tokenizer in runs:
    label = path_flags.shown(workdir)
    begin = " ".join(map(tokenizer.token, tokenizer.bos_ids))
    print(f"{workdir}: each document begins with {begin or 'its text'}", file=sys.stderr)
    params, step = checkpoint.load_params(
      workdir, config, FLAGS.step, replicated(mesh), allow_older=FLAGS.allow_older_step
    )
    for task in chosen:
      for length in lengths:
        size = -(-FLAGS.examples // batch_size)
        batches = tasks.evaluate(
          config,
          params,
          tokenizer,
          task,
          length,
          FLAGS.examples,
          batch_size,
          FLAGS.seed,
          FLAGS.min_distance,
        )
        *_, found[label, task, length] = tqdm(
          batches, f"{label} {task} {length}", size, unit="batch", disable=None
        )
    results = [
      {"task": task, "length": length, "right": right, "total": total}
      for (folder, task, length), (right, total) in found.items()
      if folder == label
    ]
    records[label] = {
      "step": step,
      "results": results,
      "flags": flags.into_string(FLAGS).splitlines(),
      "model": dataclasses.asdict(config),
      "trained_seq_len": record["data"]["seq_len"],
      "versions": run_directory.versions(),
    }
    append_record(os.path.join(workdir, "tasks.jsonl"), records[label])
  print(tasks.table(list(records), lengths, found))
  if FLAGS.record:
    save(FLAGS.record, records, found)


if __name__ == "__main__":
  flags.run(main, FLAGS)
