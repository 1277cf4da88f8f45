# ruff: noqa: E402 (see sparsek.command_line.main)
"""Accuracy of runs on generated tasks that ask for facts far back, with intervals over prompts.

  python -m experiments.evaluate_tasks --workdir=/tmp/run --tasks=passkey,needle --lengths=1024,4096
  python -m experiments.evaluate_tasks --workdir=/tmp/sparsek,/tmp/sliding_window \\
    --lengths=1024,4096,16384,65536 --examples=200 --record=tasks.json

All runs are given the same documents, and each is compared with the first one over these. --k,
--window and --gate may differ from those of training.
A line with the figures, the flags and the versions is added to each run's WORKDIR/tasks.jsonl.
--record writes the figures of all runs to one file, and a picture of accuracy against length.
"""

import dataclasses
import itertools
import os
import sys
from collections.abc import Mapping

from absl import flags as absl_flags

from sparsek.command_line import outputs, path_flags
from sparsek.command_line.configs import override_config, refuse_unused
from sparsek.command_line.definer import Definer, into_string
from sparsek.command_line.flags import check_runs, define_evaluation_flags
from sparsek.command_line.main import parse_first, run
from sparsek.command_line.terminal import said_if_slow
from sparsek.command_line.training_flags import define_mesh_flags
from sparsek.config import whole_number
from sparsek.errors import UsageError
from sparsek.storage import files

MAX_LENGTH = 2**24  # tokens of a document
RECORD = outputs.record("record of experiments.evaluate_tasks", "chance", "runs")


def define_flags(flag_values: absl_flags.FlagValues) -> None:
  """Defines the flags of this command."""
  define_evaluation_flags(flag_values)
  define = Definer(flag_values)
  define.string("tasks", "passkey,needle,recall,variables,copy", "Tasks, separated by commas.")
  define.string(
    "lengths",
    "1024,4096",
    "Tokens of a document, separated by commas. They may be more than in training.",
  )
  define.integer("examples", 100, "Documents per task and length.", lower=1)
  define.integer(
    "min_distance",
    0,
    "Least number of tokens between the facts and the question. With layers x window or more, no "
    "sliding window reaches the facts.",
    lower=0,
  )
  define.integer(
    "batch_size",
    None,
    "Documents per batch, over all devices. By default one per --context devices.",
    lower=1,
  )
  define_mesh_flags(flag_values)
  define.integer("seed", 0, "Seed of the documents.", lower=0)
  define.path(
    "record",
    None,
    "Also write a record to this .json file, and a picture beside it. The record holds flags, "
    "figures and versions.",
  )


FLAGS = absl_flags.FlagValues()
define_flags(FLAGS)


def document_lengths() -> list[int]:
  """Returns the lengths of --lengths."""
  lengths = []
  for text in FLAGS.lengths.split(","):
    length = whole_number(text, 1)
    if length is None:
      raise UsageError(f"--lengths={FLAGS.lengths}: {text!r} must be a number of at least 1")
    lengths.append(length)
  return lengths


def check_lengths(lengths: list[int]) -> None:
  """Raises UsageError for documents that would take hours to make."""
  if max(lengths) > MAX_LENGTH:
    raise UsageError(f"--lengths={max(lengths)}: must be at most {MAX_LENGTH}")


def check_flags() -> None:
  """Raises UsageError unless --workdir names folders, and --record can be written."""
  check_lengths(document_lengths())
  check_runs(FLAGS.workdir)
  if FLAGS.record:
    outputs.check_record("record", FLAGS.record, RECORD, has_picture=True)


if __name__ == "__main__":
  parse_first(FLAGS, __doc__, check_flags)

import numpy as np
from tqdm import tqdm

from sparsek.data.task_documents import CHANCE, TASKS, make_example
from sparsek.data.tokenizer import Tokenizer, describe_documents
from sparsek.evaluation import tasks
from sparsek.experiments.reports import plots
from sparsek.experiments.reports.records import dumps
from sparsek.parallel import clusters
from sparsek.parallel.mesh import CONTEXT, make_mesh
from sparsek.runs import checkpoint, run_directory, run_record
from sparsek.runs.metrics import append_record
from sparsek.training.checks import check_batch, check_context, check_length


def task_names() -> list[str]:
  """Returns the tasks of --tasks."""
  names = FLAGS.tasks.split(",")
  for name in names:
    if name not in TASKS:
      allowed = ", ".join(TASKS)
      raise UsageError(f"--tasks={FLAGS.tasks}: {name!r} must be one of {allowed}")
  return names


def check_documents(chosen: list[str], tokenizer: Tokenizer, length: int) -> None:
  """Raises UsageError, before any long work, that names the tasks for which documents are short."""
  reasons = {}
  for task in chosen:
    try:
      make_example(task, tokenizer, length, np.random.default_rng(0), FLAGS.min_distance)
    except UsageError as error:
      reasons[task] = str(error)
  if reasons:
    fitting = ",".join(task for task in chosen if task not in reasons)
    advice = f"--tasks={fitting} would fit" if fitting else "no other task is chosen"
    raise UsageError(f"--lengths={FLAGS.lengths}: {'; '.join(reasons.values())}. {advice}")


def save(path: str, runs: Mapping[str, dict], answers: tasks.Results, draws: bool = True) -> None:
  """Writes the record of all runs and its picture; with `draws` False only the record."""
  panels: dict[str, dict[str, list]] = {}
  for (label, task, length), prompts in answers.items():
    panels.setdefault(task, {}).setdefault(label, []).append((length, *tasks.accuracy(prompts)[:3]))
  record = {"chance": {task: CHANCE[task] for task in panels}, "runs": runs}
  files.save(path, dumps(record, depth=4) + "\n")
  written = [path]
  if draws:
    written.append(outputs.picture_of(path))
    plots.save_accuracies(written[-1], panels, CHANCE)
  print(", ".join(written))


def main() -> None:
  """Evaluates all runs on all tasks at all lengths."""
  check_flags()
  clusters.check_alone("experiments.evaluate_tasks", FLAGS.distributed, os.environ)
  chosen, lengths = task_names(), document_lengths()
  mesh = make_mesh(FLAGS.fsdp, FLAGS.context)
  batch_size = FLAGS.batch_size or mesh.size // mesh.shape[CONTEXT]
  check_batch(mesh, batch_size)
  answers: dict[tuple[str, str, int], list[tasks.PromptAnswers]] = {}
  records, runs = {}, []
  for workdir in FLAGS.workdir:
    config, record = run_record.load_run_config(workdir)
    config, tokenizer = override_config(config, FLAGS), run_record.load_run_tokenizer(workdir)
    check_length(config, max(lengths), "lengths")
    for length in lengths:
      check_context(config, mesh, length, "lengths")
    check_documents(chosen, tokenizer, min(lengths))
    files.check_writable(os.path.join(workdir, "tasks.jsonl"))
    runs.append((workdir, config, record, tokenizer))
  refuse_unused([config for _, config, _, _ in runs], FLAGS)
  draws = bool(FLAGS.record) and plots.can_draw("the record is written without them")
  for workdir, config, record, tokenizer in runs:
    label = path_flags.shown(workdir)
    print(f"{workdir}: {describe_documents(tokenizer, end='its answers')}", file=sys.stderr)
    with said_if_slow(f"loading {workdir} ..."):
      params, step = checkpoint.load_params(
        workdir, config, FLAGS.step, mesh, allow_older=FLAGS.allow_older_step
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
          mesh,
        )
        shown = tqdm(batches, f"{label} {task} {length}", size, unit="batch", disable=None)
        answers[label, task, length] = list(itertools.chain.from_iterable(shown))
    results = [
      tasks.result(task, length, prompts)
      for (folder, task, length), prompts in answers.items()
      if folder == label
    ]
    records[label] = {
      "step": step,
      "results": results,
      "flags": into_string(FLAGS).splitlines(),
      "model": dataclasses.asdict(config),
      "trained_seq_len": record["data"]["seq_len"],
      "versions": run_directory.versions(),
    }
    append_record(os.path.join(workdir, "tasks.jsonl"), records[label])
  print(tasks.table(list(records), lengths, answers))
  if FLAGS.record:
    save(FLAGS.record, records, answers, draws)


if __name__ == "__main__":
  run(main, FLAGS)
