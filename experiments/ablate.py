"""Trains a grid of models that differ in attention, one after the other, and compares their held-out losses.

  python -m experiments.ablate --workdir=runs/ablation --base=experiments/recipes/tiny_stdlib.flags --k=32,64 --window=32,64 \\
    --attention=sparsek,random,sliding_window,full --gate=straight_through,value --seeds=3

Every combination that makes a difference is a cell, a run of experiments.pretrain in WORKDIR/cells/NAME under the flags of --base. Finished cells are skipped
and interrupted ones go on: repeat the command. --job=i/N takes every N-th cell, for the array jobs of a cluster. After each cell WORKDIR gets table.md,
table.csv, report.html and its picture report.png: heatmaps over k and window, and loss against keys per query.
"""

import json
import os
import shlex
import signal
import subprocess
import sys

from absl import flags as absl_flags

from sparsek import ablation, flags
from sparsek.config import GATES, SCORERS
from sparsek.errors import RunError, UsageError
from sparsek.run_directory import COMPILATION_CACHE

FLAGS = absl_flags.FlagValues()
flags.define_ablation_flags(FLAGS)


def choices(name, allowed):
  """The values of a flag, of which each must be allowed."""
  values = FLAGS[name].value.split(",")
  for value in values:
    if value not in allowed:
      raise UsageError(f"--{name}={FLAGS[name].value}: {value!r} must be one of {', '.join(allowed)}")
  return values


def numbers(name, minimum):
  """Those of a flag."""
  values = FLAGS[name].value.split(",")
  if not all(value.isdecimal() and int(value) >= minimum for value in values):
    raise UsageError(f"--{name}={FLAGS[name].value}: must be numbers of at least {minimum} separated by commas, such as 64,128")
  return [int(value) for value in values]


def shared():
  """The flags that all runs share, those of --base and --more."""
  if FLAGS.base and not os.path.isfile(FLAGS.base):
    raise UsageError(f"--base={FLAGS.base}: there is no such file")
  return [f"--flagfile={FLAGS.base}"] * bool(FLAGS.base) + shlex.split(FLAGS.more or "")


def check(arguments):
  """The flags of a run, parsed; what pretraining would refuse of them is refused here, before any run begins."""
  values = absl_flags.FlagValues()
  for define in (flags.define_model_flags, flags.define_data_flags, flags.define_train_flags):
    define(values)
  flags.parse(["ablate", *arguments, "--workdir=w"], values)
  flags.model_config(values), flags.train_config(values)
  if not values["eval_every"].value:
    raise UsageError("--eval_every=0 in --base or --more: must be above 0, since held-out losses are compared")
  return values


def train(cell, folder, given):
  """Runs pretraining to its end; True if it got there. A signal that ends this process ends it too, with a checkpoint. Seeds compile once for all."""
  command = [sys.executable, "-m", "experiments.pretrain", *given, *cell.flags(), f"--workdir={folder}"]
  cache = os.path.join(os.path.dirname(os.path.dirname(folder)), "compilation_cache")
  with subprocess.Popen(command, env={COMPILATION_CACHE: cache, **os.environ}) as process:
    try:
      return process.wait() == 0
    except BaseException:
      process.send_signal(signal.SIGTERM)
      raise


def main() -> None:
  """Trains what is missing, and reports after every cell."""
  if not FLAGS.workdir:
    raise UsageError("--workdir is required: the folder for the grid's runs and its report")
  cells = ablation.grid(ablation.patterns(FLAGS.attention), numbers("k", 1), numbers("window", 0), choices("gate", GATES), choices("scorer", SCORERS),
                        FLAGS.seeds)
  mine = ablation.share(cells, FLAGS.job)
  given = shared()
  num_steps = [check([*given, *cell.flags()])["num_steps"].value for cell in cells][0]
  workdir = os.path.expanduser(FLAGS.workdir)
  runs, failed = os.path.join(workdir, "cells"), []
  os.makedirs(runs, exist_ok=True)
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: sys.exit(0))
  for i, cell in enumerate(mine):
    folder = os.path.join(runs, cell.name)
    done = os.path.exists(os.path.join(folder, ablation.RESULT))
    print(f"cell {i + 1} of {len(mine)}: {cell.name}{', finished before' if done else ''}", flush=True)
    if not done:
      if not train(cell, folder, given):
        failed.append(cell.name)
        continue
      if ablation.result_of(folder)["step"] < num_steps:                       # it was stopped by a signal of its own
        failed.append(cell.name)
        continue
      with open(os.path.join(folder, ablation.RESULT + ".new"), "w", encoding="utf-8") as file:
        json.dump(ablation.result_of(folder), file)
      os.replace(os.path.join(folder, ablation.RESULT + ".new"), os.path.join(folder, ablation.RESULT))
    ablation.write_report(workdir, ablation.collect(runs, cells), "\n".join(given))
  rows = ablation.collect(runs, cells)
  if rows:
    print(f"\n{ablation.markdown(ablation.summarize(rows))}\n{len(rows)} of {len(cells)} cells; {os.path.join(workdir, 'report.html')}")
  if failed:
    raise RunError(f"{len(failed)} cell(s) did not finish, which repeating the command tries again: {', '.join(failed)}")


if __name__ == "__main__":
  flags.run(main, FLAGS)
