"""Stages of a recipe, run side by side and over several GPUs; finished ones are not run again.

A plan is {name: (script, *flags)}. The command of a stage is `python -m experiments.SCRIPT FLAGS`;
it writes to the folder WORKDIR/NAME, or evaluates other stages. A stage waits for those whose
folders its flags name. WORKDIR/minutes.json has the minutes of the finished stages,
WORKDIR/stages.json their settings. Stages that other flags made are refused, or with `retrain`
moved to WORKDIR/replaced and run again, with all stages that follow from them.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping

from sparsek.command_line import outputs
from sparsek.command_line.training_flags import define_pretrain_flags
from sparsek.errors import UsageError
from sparsek.experiments import (
  child,
  evaluate,
  evaluate_humaneval,
  evaluate_ruler,
  evaluate_tasks,
  import_hf,
  script,
)
from sparsek.experiments.bench import flags as bench_flags
from sparsek.runs import checkpoint, run_directory, settings
from sparsek.storage import files

Plan = Mapping[str, tuple[str, ...]]
DEFINE: Mapping[str, settings.Define] = {  # command of a stage -> defines its flags
  "pretrain": define_pretrain_flags,
  "import_hf": import_hf.define_flags,
  "evaluate": evaluate.define_flags,
  "evaluate_tasks": evaluate_tasks.define_flags,
  "evaluate_ruler": evaluate_ruler.define_flags,
  "evaluate_humaneval": evaluate_humaneval.define_flags,
  "benchmark": bench_flags.define_flags,
}
MINUTES, MADE = "minutes.json", "stages.json"  # in WORKDIR: how long stages took, their settings


def add_options(
  parser: argparse.ArgumentParser, seeds: int, record: str, kind: outputs.Kind, *, has_picture: bool
) -> argparse._MutuallyExclusiveGroup:
  """Adds the options of a recipe that runs stages, and returns the group of those of which only one
  can be given.

  Args:
    parser: of the recipe.
    seeds: runs of each kind by default.
    record, kind: the record's default name, and what such a file is.
    has_picture: whether a picture goes beside it.
  """
  for option, default, text in (
    ("devices", "", "GPUs to spread stages over, such as 0,1; default: JAX's"),
    ("only", "", "a regular expression: begin only stages whose names it matches"),
  ):
    parser.add_argument(f"--{option}", default=default, help=text)
  for option, number, text in (
    ("seeds", seeds, "runs of each kind"),
    ("at_once", 1, "stages that run side by side; above 1 they write WORKDIR/NAME.log"),
  ):
    parser.add_argument(f"--{option}", default=number, type=int, help=f"{text}; default: {number}")
  parser.add_argument(
    "--record",
    default=record,
    type=script.Output(kind, has_picture=has_picture),
    help="file for the record" + "; the picture goes beside it" * has_picture,
  )
  instead = parser.add_mutually_exclusive_group()
  instead.add_argument(
    "--collect",
    action="store_true",
    help="train nothing: only write the record of what is finished",
  )
  instead.add_argument(
    "--retrain",
    action="store_true",
    help="move what other flags made to WORKDIR/replaced, and do it again",
  )
  return instead


def needed(plan: Plan, name: str) -> set[str]:
  """Returns the stages whose folders a stage's command names."""
  parts = {os.path.basename(part) for word in plan[name] for part in re.split("[=,]", word)}
  return parts & set(plan) - {name}


def flags_of(folder: str) -> list[str]:
  """Returns the flags of a run, one a line of its flags.txt."""
  with open(os.path.join(folder, "flags.txt"), encoding="utf-8") as file:
    return file.read().splitlines()


def stopped_early(folder: str) -> bool:
  """Returns whether a run of pretraining ended before its last step, because of a signal."""
  return f"--num_steps={checkpoint.saved_steps(folder)[-1]}" not in flags_of(folder)


def _run(
  workdir: str, name: str, words: tuple[str, ...], device: str | None, share: float, to_file: bool
) -> float | None:
  """Returns the minutes that a stage took; None where it did not reach its end."""
  command = [f"sparsek.experiments.{words[0]}", *words[1:]]
  environment = {
    **os.environ,
    "JAX_COMPILATION_CACHE_DIR": os.path.abspath(os.path.join(workdir, "compiled")),
  }
  if device is not None:
    environment |= {
      "CUDA_VISIBLE_DEVICES": device,
      "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.3f}",
    }
  print(f"== {name} ==\n{shlex.join([sys.executable, '-m', *command])}", flush=True)
  begin, folder = time.monotonic(), os.path.join(workdir, name)
  with open(f"{folder}.log", "a", encoding="utf-8") if to_file else contextlib.nullcontext() as log:
    with child.running(command[0], command[1:], env=environment, stdout=log, stderr=log) as process:
      code = process.wait()
  if code or words[0] == "pretrain" and stopped_early(folder):
    return None
  return (time.monotonic() - begin) / 60


def _read(path: str) -> dict:
  return files.read_json_object(path) if os.path.exists(path) else {}


def _read_minutes(path: str) -> dict[str, float]:
  minutes = _read(path)
  for name, value in minutes.items():
    if type(value) not in (int, float):
      raise UsageError(f"{path} says {name}={str(value)[:50]!r}, expected a number of minutes")
  return minutes


def _stale(
  plan: Plan, wanted: Mapping[str, settings.Settings], workdir: str, minutes: Mapping, made: Mapping
) -> dict[str, list[str]]:
  """Returns {stage: differences from the plan}, also of the stages that follow from such stages.

  A stage that is not in `made`, because it is unfinished or of an earlier version, is compared by
  its flags.txt.
  """
  stale: dict[str, list[str]] = {}
  folder = lambda name: os.path.join(workdir, name)
  for name in plan:
    try:
      before = (
        [made[name]] if name in made else settings.of_folder(folder(name), DEFINE[plan[name][0]])
      )
    except UsageError as error:
      stale[name] = [str(error)]
      continue
    if lines := [line for one in before for line in settings.differences(one, wanted[name])]:
      stale[name] = list(dict.fromkeys(lines))
    if name in minutes and not before:
      print(
        f"{name}: done by an earlier version, which did not say with which settings",
        file=sys.stderr,
      )
  ran = [name for name in plan if name in minutes or os.path.isdir(folder(name))]
  follows = lambda name: name not in stale and needed(plan, name) & set(stale)
  while following := list(filter(follows, ran)):
    stale |= {name: [f"follows from {min(needed(plan, name) & set(stale))}"] for name in following}
  return stale


def _clear(
  plan: Plan, wanted: Mapping[str, settings.Settings], workdir: str, retrain: bool
) -> None:
  """Refuses stages that other flags made, or moves them aside and forgets that they are done."""
  records = {name: _read(os.path.join(workdir, name)) for name in (MINUTES, MADE)}
  stale = _stale(plan, wanted, workdir, records[MINUTES], records[MADE])
  if not retrain:
    settings.refuse(stale, workdir)
  for file, record in records.items() if stale else ():
    kept = {name: value for name, value in record.items() if name not in stale}
    run_directory.write_record(workdir, file, json.dumps(kept))
  for name in stale:
    settings.move_aside(os.path.join(workdir, name))


def run_stages(
  plan: Plan,
  workdir: str,
  devices: str = "",
  at_once: int = 1,
  only: str = "",
  retrain: bool = False,
) -> dict[str, float]:
  """Runs the stages that are not done, and returns the minutes of all stages.

  They begin in the order of the plan, as soon as those that they need are done. Ends the process
  where a stage failed.

  Args:
    plan: {name: (script, *flags)}.
    workdir: for all stages; made if there is none.
    devices: GPUs to spread stages over, such as "0,1"; empty: JAX's choice.
    at_once: stages that run side by side; above 1 each writes WORKDIR/NAME.log.
    only: a regular expression: other stages are not begun.
    retrain: move stages that other flags made aside, and run them again.
  Raises:
    UsageError: where the folder is of another kind, or without `retrain` other flags made a stage;
      nothing has begun then.
  """
  outputs.check_folder(f"--workdir={workdir}", workdir, outputs.STAGES)
  files.make_folder(workdir)
  wanted = {
    name: settings.effective(settings.parse(words, DEFINE[script]))
    for name, (script, *words) in plan.items()
  }
  _clear(plan, wanted, workdir, retrain)
  paths = [os.path.join(workdir, name) for name in (MADE, MINUTES)]
  made, minutes = _read(paths[0]), _read_minutes(paths[1])
  share = 0.9 / -(-at_once // len(devices.split(",")))
  waiting = [name for name in plan if name not in minutes and re.search(only, name)]
  running: dict[concurrent.futures.Future, tuple[str, str | None]] = {}
  failed = []
  with child.ending_at_signals(), concurrent.futures.ThreadPoolExecutor(at_once) as pool:
    while waiting or running:
      ready = [name for name in waiting if needed(plan, name) <= set(minutes)]
      for name in ready[: at_once - len(running)]:
        taken = [device for _, device in running.values()]
        device = min(devices.split(","), key=taken.count) if devices else None
        future = pool.submit(_run, workdir, name, plan[name], device, share, at_once > 1)
        running[future] = name, device
        waiting.remove(name)
      if not running:
        break  # the waiting stages need one that failed, or that `only` excludes
      for future in concurrent.futures.wait(
        running, return_when=concurrent.futures.FIRST_COMPLETED
      ).done:
        name, _ = running.pop(future)
        taken_minutes = future.result()
        if taken_minutes is None:
          failed.append(name)
          continue
        minutes[name] = taken_minutes
        made[name] = wanted[name]
        for path, record in zip(paths, (made, minutes)):
          files.save(path, json.dumps(record))
        print(f"{name}: {minutes[name]:.2f} minutes", flush=True)
  if failed:
    sys.exit(
      f"did not get to their end: {', '.join(failed)}; the same command goes on from here"
      + f" ({workdir}/NAME.log)" * (at_once > 1)
    )
  return minutes
