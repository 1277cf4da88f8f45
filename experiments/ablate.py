"""Trains a grid of models that differ in attention, one after the other, and compares their
held-out losses.

  python -m experiments.ablate --workdir=runs/ablation --base=experiments/recipes/tiny_stdlib.flags
  --k=32,64 --window=32,64 \\
    --attention=sparsek,random,sliding_window,full --gate=straight_through,value --seeds=3

Every combination that makes a difference is a cell, a run of experiments.pretrain in
WORKDIR/cells/NAME under the flags of --base. Finished cells are skipped and interrupted ones go on:
repeat the command. What other flags made is refused, or with --retrain moved to
WORKDIR/cells/replaced and trained again. --job=i/N takes every N-th cell, for the array jobs of a
cluster; a cell that another job trains is left to it. After each cell WORKDIR gets table.md,
table.csv, report.html and its picture report.png: heatmaps over k and window, and loss against keys
per query.
"""

import os
import shlex
import sys

from absl import flags as absl_flags

from experiments import child
from experiments.reports import grid
from sparsek.command_line import flags
from sparsek.config import GATES, SCORERS
from sparsek.data import batches
from sparsek.errors import RunError, UsageError
from sparsek.runs import settings
from sparsek.runs.run_directory import COMPILATION_CACHE
from sparsek.storage import files

FLAGS = absl_flags.FlagValues()
flags.define_ablation_flags(FLAGS)


def choices(name, allowed):
  """The values of a flag, of which each must be allowed."""
  values = FLAGS[name].value.split(",")
  for value in values:
    if value not in allowed:
      raise UsageError(
        f"--{name}={FLAGS[name].value}: {value!r} must be one of {', '.join(allowed)}"
      )
  return values


def numbers(name, minimum):
  """Those of a flag."""
  values = FLAGS[name].value.split(",")
  if not all(value.isdecimal() and int(value) >= minimum for value in values):
    raise UsageError(
      f"--{name}={FLAGS[name].value}: must be numbers of at least {minimum} separated "
      "by commas, such as 64,128"
    )
  return [int(value) for value in values]


def shared():
  """Returns the flags that all runs share, those of --base and --more."""
  if FLAGS.base and not os.path.isfile(FLAGS.base):
    raise UsageError(f"--base={FLAGS.base}: there is no such file")
  try:
    more = shlex.split(FLAGS.more or "")
  except ValueError as error:
    raise UsageError(f"--more={FLAGS.more}: {error}") from None
  return [f"--flagfile={FLAGS.base}"] * bool(FLAGS.base) + more


def check(arguments):
  """Returns a run's parsed flags; what pretraining would refuse is refused before any run."""
  values = settings.parse("pretrain", arguments)
  flags.model_config(values), flags.train_config(values)
  if values["dry_run"].value:
    raise UsageError("--dry_run in --base or --more: trains nothing that could be compared")
  if not values["eval_every"].value:
    raise UsageError(
      "--eval_every=0 in --base or --more: must be above 0, since held-out losses are compared"
    )
  return values


def train(cell, folder, given):
  """Runs pretraining to its end; True if it got there. A signal that ends this process ends it too,
  with a checkpoint. Seeds compile once for all.
  """
  cache = os.path.join(os.path.dirname(os.path.dirname(folder)), "compilation_cache")
  arguments = [*given, *cell.flags(), f"--workdir={folder}"]
  environment = {COMPILATION_CACHE: cache, **os.environ}
  with child.running("experiments.pretrain", arguments, env=environment) as process:
    return process.wait() == 0


def main() -> None:
  """Trains what is missing, and reports after every cell."""
  if not FLAGS.workdir:
    raise UsageError("--workdir is required: the folder for the grid's runs and its report")
  cells = grid.grid(
    grid.patterns(FLAGS.attention),
    numbers("k", 1),
    numbers("window", 0),
    choices("gate", GATES),
    choices("scorer", SCORERS),
    FLAGS.seeds,
  )
  mine, given = grid.share(cells, FLAGS.job), shared()
  runs = os.path.join(FLAGS.workdir, "cells")
  folders = {cell: os.path.join(runs, cell.name) for cell in cells}
  values = {cell: check([*given, *cell.flags(), f"--workdir={folders[cell]}"]) for cell in cells}
  wanted = {cell: settings.effective(values[cell]) for cell in cells}
  first = values[cells[0]]
  dataset = batches.open_data(first["data"].value, first["tokenizer"].value).fingerprint
  grid.clear(folders, wanted, dataset, FLAGS.workdir, FLAGS.retrain)
  files.make_folder(runs)
  report = flags.not_default(check([*given, f"--workdir={runs}"]))
  failed, busy = [], []
  with child.ending_at_signals(0):
    for i, cell in enumerate(mine):
      done = grid.read_result(folders[cell]) is not None
      before = ", finished before" if done else ""
      print(f"cell {i + 1} of {len(mine)}: {cell.name}{before}", flush=True)
      # Another job may have made it meanwhile.
      grid.clear({cell: folders[cell]}, wanted, dataset, FLAGS.workdir)
      if not done:
        ended = train(cell, folders[cell], given)
        if not ended and grid.in_use(folders[cell]):
          busy.append(cell.name)
          continue
        if not (ended and grid.is_complete(folders[cell], first["num_steps"].value)):
          failed.append(cell.name)
          continue
        grid.save_result(folders[cell], dataset)
      grid.write_report(FLAGS.workdir, grid.collect(runs, cells), report)
  rows = grid.collect(runs, cells)
  if rows:
    print(
      f"\n{grid.markdown(grid.summarize(rows))}\n{len(rows)} of {len(cells)} cells; "
      f"{os.path.join(FLAGS.workdir, 'report.html')}"
    )
  if busy:
    print(f"left to another job, which trains them: {', '.join(busy)}", file=sys.stderr)
  if failed:
    raise RunError(
      f"{len(failed)} cell(s) did not finish, which repeating the command tries "
      f"again: {', '.join(failed)}"
    )


if __name__ == "__main__":
  flags.run(main, FLAGS)
