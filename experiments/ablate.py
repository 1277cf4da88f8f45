# ruff: noqa: E402 (see sparsek.command_line.main)
"""Ablation: trains a grid of models that differ in attention, and compares their held-out losses.

  python -m experiments.ablate --workdir=runs/ablation \\
    --base=experiments/recipes/tiny_stdlib.flags --k=32,64 --window=32,64 \\
    --attention=sparsek,random,sliding_window,full --gate=straight_through,value --seeds=3

Each distinct combination of settings is a cell, a run of experiments.pretrain in WORKDIR/cells/NAME
with the flags of --base. The same command again skips finished cells and goes on with interrupted
ones. A cell that was trained with other flags is refused, or with --retrain moved to
WORKDIR/cells/replaced and trained again. --job=i/N takes one cell in N, for the array jobs of a
cluster, and leaves cells that another job trains to that job. After each cell WORKDIR gets
table.md, table.csv, report.html and its picture report.png: heatmaps over k and window, and loss
against keys per query. Without matplotlib there are no pictures.
"""

import functools
import os
import shlex
import sys
from collections.abc import Collection, Iterable, Sequence

from absl import flags as absl_flags

from sparsek.command_line import flagfiles, outputs, own_modules
from sparsek.command_line.configs import model_config, train_config, unused_by_all, unused_flags
from sparsek.command_line.definer import Definer, not_default
from sparsek.command_line.flags import define_alone_flag
from sparsek.command_line.main import parse_first, run
from sparsek.command_line.terminal import said_if_slow
from sparsek.command_line.training_flags import define_mesh_flags, define_pretrain_flags
from sparsek.config import ATTENTION_KINDS, GATES, SCORERS, whole_number
from sparsek.errors import RunError, UsageError
from sparsek.storage import files


def define_flags(flag_values: absl_flags.FlagValues) -> None:
  """Defines the flags of this command."""
  define = Definer(flag_values)
  define.path("workdir", None, "Folder for the runs of the grid and the report. Required.")
  define_alone_flag(flag_values)
  own_modules.define_import_flag(flag_values)
  define.path(
    "base",
    None,
    "Flagfile, or name of a recipe, with flags that all runs share. The flags are those of "
    "experiments.pretrain; what the grid sets replaces what it says.",
  )
  define.string(
    "more",
    None,
    "Further flags that all runs share, in one string. None that the grid sets; for example "
    '--more="--num_steps=500 --seq_len=2048".',
  )
  define.string(
    "attention",
    "sparsek,sliding_window",
    f"Kinds of attention, separated by commas. A kind is one of {', '.join(ATTENTION_KINDS)}, or "
    "a pattern of layers, such as sparsek*5+full.",
  )
  define.string(
    "k",
    "64",
    "Numbers of selected keys per query, separated by commas. For the kinds that select keys.",
  )
  define.string("window", "64", "Numbers of latest tokens that a query sees, separated by commas.")
  define.string(
    "gate",
    "straight_through",
    f"Gates of sparsek attention, separated by commas. A gate is one of {', '.join(GATES)}.",
  )
  define.string(
    "scorer",
    "linear",
    f"Scorers of sparsek attention, separated by commas. A scorer is one of {', '.join(SCORERS)}.",
  )
  define_mesh_flags(flag_values)
  define.integer(
    "seeds", 1, "Runs of each combination, with --seed=0, --seed=1 and so on.", lower=1
  )
  define.string(
    "job",
    "0/1",
    "i/N: train only every N-th cell, from the i-th on, i from 0. So N jobs share a --workdir.",
  )
  define.boolean(
    "retrain",
    False,
    "Train cells again that other flags made. The old ones go to WORKDIR/cells/replaced.",
  )


FLAGS = absl_flags.FlagValues()
define_flags(FLAGS)
# Flags of experiments.pretrain that the grid sets in each cell, and by which of its own.
SET_BY_GRID = {
  **{name: f"--{name}" for name in ("attention", "k", "window", "gate", "scorer", "workdir")},
  "layer_pattern": "--attention",
  "seed": "--seeds",
}
# Flags with which no cell would reach its end, and why.
NOT_OF_CELLS = {
  "dry_run": "trains nothing that could be compared",
  "topology": "of --dry_run, which trains nothing that could be compared",
  "stop_at": "runs that stop before --num_steps cannot be compared",
  "restore_step": "goes back in one run, and a grid has several",
  "stage": "cells are runs of one stage",
}


def choices(name: str, allowed: Sequence[str]) -> list[str]:
  """Returns the values of a flag, each of which must be allowed."""
  text = getattr(FLAGS, name)
  values = text.split(",")
  for value in values:
    if value not in allowed:
      raise UsageError(f"--{name}={text}: {value!r} must be one of {', '.join(allowed)}")
  return values


def numbers(name: str, minimum: int) -> list[int]:
  """Returns the numbers of a flag."""
  text = getattr(FLAGS, name)
  found = [whole_number(value, minimum) for value in text.split(",")]
  if None in found:
    raise UsageError(
      f"--{name}={text}: must be numbers of at least {minimum} separated by commas, such as 64,128"
    )
  return [number for number in found if number is not None]


def check_flags() -> None:
  """Raises UsageError for values of a grid that cannot be, and without a --workdir for it."""
  if not FLAGS.workdir:
    raise UsageError("--workdir is required: the folder for the grid's runs and its report")
  outputs.check_folder(f"--workdir={FLAGS.workdir}", FLAGS.workdir, outputs.A_GRID, alone=True)
  numbers("k", 1), numbers("window", 0), choices("gate", GATES), choices("scorer", SCORERS)
  base_file(), more_words()


def base_file() -> str | None:
  """Returns the path of the flagfile that --base names, which may be a recipe's."""
  if not FLAGS.base:
    return None
  if os.path.isfile(FLAGS.base):
    return FLAGS.base
  recipe = flagfiles.recipe_file(os.path.relpath(FLAGS.base))
  if recipe is None:
    raise UsageError(f"--base={FLAGS.base}: there is no such file, and no recipe of that name")
  return recipe


def more_words() -> list[str]:
  """Returns the flags of --more."""
  try:
    return shlex.split(FLAGS.more or "")
  except ValueError as error:
    raise UsageError(f"--more={FLAGS.more}: {error}") from None


def advise(name: str, word: str) -> str:
  """Returns how to give all runs a flag of experiments.pretrain, or why not; "" for others.

  Args:
    name: of the flag.
    word: the argument, such as "--num_steps=3" or "--nowandb".
  """
  of_runs = absl_flags.FlagValues()
  define_pretrain_flags(of_runs)
  if name in SET_BY_GRID:
    return f"the grid sets it, by {SET_BY_GRID[name]}"
  if name in NOT_OF_CELLS:
    return NOT_OF_CELLS[name]
  positive = name if name in of_runs else name.removeprefix("no")
  if positive not in of_runs and name not in flagfiles.TO_MODEL:
    return ""
  has_value = "=" in word or positive in of_runs and of_runs[positive].boolean
  return f'write it as --more="{word}{"" if has_value else "=VALUE"}"'


if __name__ == "__main__":
  parse_first(FLAGS, __doc__, check_flags, advise)

from sparsek.data import batches
from sparsek.experiments import child
from sparsek.experiments.reports import grid, plots
from sparsek.parallel import clusters
from sparsek.runs import settings


def devices() -> list[str]:
  """Returns the flags of this command that all runs take as they are."""
  return [f"--{name}={FLAGS[name].value}" for name in ("fsdp", "context") if FLAGS[name].present]


def base_words() -> list[str]:
  """Returns the flagfile of --base as an argument, or none."""
  base = base_file()
  return [f"--flagfile={base}"] if base else []


def shared() -> list[str]:
  """Returns the flags that all runs share: those of --base and --more, --fsdp and --context."""
  return [*base_words(), *more_words(), *devices(), *own_modules.given(FLAGS)]


def parse_part(name: str, words: Sequence[str]) -> absl_flags.FlagValues:
  """Returns the parsed flags of --base or --more alone; raises UsageError that names it."""
  try:
    return settings.parse([*own_modules.given(FLAGS), *words])
  except UsageError as error:
    raise UsageError(f"in --{name}={FLAGS[name].value}: {error}") from None


def check_shared() -> None:
  """Raises UsageError for --more and --base that cannot be parsed, or a --more of the grid's."""
  more = parse_part("more", more_words())
  parse_part("base", base_words())
  for name, instead in SET_BY_GRID.items():
    if more[name].present:
      raise UsageError(f"--{name} in --more: the grid sets it, by {instead}")


def unused_of_grid(cells: Iterable[grid.Cell]) -> set[str]:
  """Returns the flags of this command that no cell has."""
  return set(grid.COLUMNS) - {name for cell in cells for name in cell.given()}


def say_what_gives_way(values: absl_flags.FlagValues, unused: Collection[str]) -> None:
  """Prints on stderr which flags of --base have other values in the grid, a line each.

  Args:
    values: those of a run.
    unused: flags of this command that no cell has.
  """
  names = [name for name in SET_BY_GRID if name in FLAGS and name not in unused]
  of_grid = [*devices(), *(f"--{name}={FLAGS[name].value}" for name in names)]
  of_grid.append(f"--seed={','.join(map(str, range(FLAGS.seeds)))}")
  say = functools.partial(print, file=sys.stderr)
  for words, place in ((more_words(), "--more"), (of_grid, "the grid")):
    flagfiles.expand([*base_words(), *words], values, say, place)


def warn_of_unused(values: Iterable[absl_flags.FlagValues], of_grid: Collection[str]) -> None:
  """Prints a line for each flag that changes no run of the grid.

  Args:
    values: those of the runs, with the flags of --base and --more.
    of_grid: flags of this command that no cell has.
  """
  for name in (name for name in grid.COLUMNS if name in of_grid and FLAGS[name].present):
    print(
      f"warning: --{name}={FLAGS[name].value} has no effect: no kind of "
      f"--attention={FLAGS.attention} uses it",
      file=sys.stderr,
    )
  unused = unused_by_all([unused_flags(model_config(of_run), of_run) for of_run in values])
  for flag, reason in unused.items():
    if flag.removeprefix("--").partition("=")[0] not in SET_BY_GRID:
      print(f"warning: {flag} has no effect: {reason}", file=sys.stderr)


def check(arguments: Sequence[str]) -> absl_flags.FlagValues:
  """Returns a run's parsed flags.

  Raises:
    UsageError: for what pretraining would refuse, so that it is refused before any run.
  """
  values = settings.parse(arguments)
  model_config(values), train_config(values)
  for name, reason in NOT_OF_CELLS.items():
    if values[name].value != values[name].default:
      raise UsageError(f"--{name} in --base or --more: {reason}")
  if not values.eval_every:
    raise UsageError(
      "--eval_every=0 in --base or --more: must be above 0, since held-out losses are compared"
    )
  return values


def train(cell: grid.Cell, folder: str, given: Sequence[str]) -> bool:
  """Runs pretraining of a cell; returns whether it reached its end.

  A signal that ends this process also ends the run, with a checkpoint.
  """
  arguments = [*given, *cell.flags(), f"--workdir={folder}"]
  arguments += [] if FLAGS.distributed else ["--nodistributed"]
  with child.running("sparsek.experiments.pretrain", arguments) as process:
    return process.wait() == 0


def main() -> None:
  """Trains what is missing, and reports after every cell."""
  check_flags()
  clusters.check_alone("experiments.ablate", FLAGS.distributed, os.environ)
  kinds, ks, windows = grid.patterns(FLAGS.attention), numbers("k", 1), numbers("window", 0)
  gates, scorers = choices("gate", GATES), choices("scorer", SCORERS)
  check_shared()
  cells = grid.grid(kinds, ks, windows, gates, scorers, FLAGS.seeds)
  mine, given = grid.share(cells, FLAGS.job), shared()
  runs = os.path.join(FLAGS.workdir, "cells")
  folders = {cell: os.path.join(runs, cell.name) for cell in cells}
  values = {cell: check([*given, *cell.flags(), f"--workdir={folders[cell]}"]) for cell in cells}
  wanted = {cell: settings.effective(values[cell]) for cell in cells}
  grid.check_report(FLAGS.workdir)
  first, unused = values[cells[0]], unused_of_grid(cells)
  say_what_gives_way(first, unused)
  warn_of_unused(values.values(), unused)
  with said_if_slow("opening the data ..."):
    dataset = batches.open_data(first.data, first.tokenizer).fingerprint
  grid.clear(folders, wanted, dataset, FLAGS.workdir, FLAGS.retrain)
  files.make_folder(runs)
  report = not_default(settings.parse(given), without=SET_BY_GRID)
  draws = plots.can_draw("the tables and report.html are written without them")
  failed, busy = [], []
  with child.ending_at_signals(0):
    for i, cell in enumerate(mine):
      done = grid.read_result(folders[cell]) is not None
      before = ", finished before" if done else ""
      print(f"cell {i + 1} of {len(mine)}: {cell.name}{before}", flush=True)
      # Another job may have trained the cell meanwhile.
      grid.clear({cell: folders[cell]}, wanted, dataset, FLAGS.workdir)
      if not done:
        ended = train(cell, folders[cell], given)
        if not ended and grid.in_use(folders[cell]):
          busy.append(cell.name)
          continue
        if not (ended and grid.is_complete(folders[cell], first.num_steps)):
          failed.append(cell.name)
          continue
        grid.save_result(folders[cell], dataset)
      grid.write_report(FLAGS.workdir, grid.collect(runs, cells), report, draws)
  rows = grid.collect(runs, cells)
  if rows:
    summary = grid.summarize(rows)
    print(
      f"\n{grid.markdown(summary)}\n{grid.about(summary)}\n\n{len(rows)} of {len(cells)} cells; "
      f"{os.path.join(FLAGS.workdir, 'report.html')}"
    )
    if others := grid.other_finished(runs, cells):
      print(f"in {runs}, but not in this table: {', '.join(others)}", file=sys.stderr)
  if busy:
    print(f"left to another job, which trains them: {', '.join(busy)}", file=sys.stderr)
  if failed:
    raise RunError(
      f"{len(failed)} cell(s) did not finish, which repeating the command tries "
      f"again: {', '.join(failed)}"
    )


if __name__ == "__main__":
  run(main, FLAGS)
