"""Fails the writes, renames, fsyncs, ... of training, import, export and preparation in turn.

This is no test of the suite, but is run by hand:

  python -m tests.experiments.crash_points

A command runs undisturbed once, and its operations on files are recorded. Then it runs again for
each kind of them, from the same folder, with one failing: by ENOSPC, which lasts, by EIO, once, and
by a kill (in a write when half of it is written). Each time

  - it ends with code 0, or with 1 or 2 and one sentence, in 20 seconds of a
    processor, and does not wait for longer;
  - checkpoints that are named as complete load, bit-equal to the undisturbed run's, the metrics of
    their steps are there, and the files of others are what they were;
  - the same command again ends with 0, or says that all is done, and leaves what an undisturbed run
    leaves: metrics and parameters bit-equal, exported and token files byte-equal, no other file.

Exits with 1 where anything is otherwise. A point is "silent" where the command ended with 0 and all
was well, yet it said nothing.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tests.experiments import forked, io_faults
from tests.experiments.crash_scenarios import SCENARIOS, SHARED, Scenario, run_product

ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  "TOKENIZERS_PARALLELISM": "false",
}
SECONDS = 20.0
NOTE = "what its user wrote\n"
# Others' files, which look like what a program might clean up.
NOTES = ("notes.txt", "draft.tmp", "model.json.new", ".mine")


def read_by(words: Iterable[str]) -> set[str]:
  """Returns the names of SHARED that a command's words mention."""
  return set(re.findall(r"SHARED/(\w+)", " ".join(words)))


class Bench:
  """The folders of a measurement, and what an undisturbed run of each scenario leaves.

  Attributes:
    folder: holds everything.
  """

  def __init__(self, folder: str):
    self.folder, self.shared = folder, os.path.join(folder, "shared")
    self._limits: dict[str, float] = {}

  def words(self, words: list[str], point: str) -> list[str]:
    return [word.replace("POINT", point).replace("SHARED", self.shared) for word in words]

  def must_run(self, words: list[str], point: str) -> None:
    ended = forked.run(
      forked.command(*self.words(words, point)), os.path.join(self.folder, "output"), 300
    )
    if ended.code != 0:
      sys.exit(f"without any fault: {' '.join(words)} ended with {ended.code}\n{ended.err}")

  def make_shared(self, names: Iterable[str] = ("texts", *SHARED)) -> None:
    """Makes what commands only read, where it is not there yet, and what that is made of."""
    for name in names:
      if os.path.exists(os.path.join(self.shared, name)):
        continue
      if name == "texts":
        texts = pathlib.Path(self.shared, "texts")
        texts.mkdir(parents=True)
        for i in range(12):
          (texts / f"{i}.txt").write_text(f"Document {i}: {i**7} {i**11}.\n" * 9)
      else:
        self.make_shared(read_by(SHARED[name]) - {name})
        self.must_run(SHARED[name], "")

  def template(self, scenario: Scenario) -> str:
    return os.path.join(self.folder, "templates", scenario.name)

  def make_template(self, scenario: Scenario) -> None:
    """Makes what is there before the command."""
    point = self.point(scenario)
    os.makedirs(point)
    for words in scenario.before:
      self.must_run(words, point)
    for parent in (point, *([os.path.join(point, scenario.makes)] if scenario.notes else [])):
      for name in NOTES:
        pathlib.Path(parent, name).write_text(NOTE)
    os.makedirs(os.path.dirname(self.template(scenario)), exist_ok=True)
    os.rename(point, self.template(scenario))

  def point(self, scenario: Scenario, number: int = 0) -> str:
    return os.path.join(self.folder, "points", f"{scenario.name}_{number}")

  def fresh(self, scenario: Scenario, number: int) -> str:
    """Makes a folder for a point, and returns it."""
    point = self.point(scenario, number)
    shutil.copytree(self.template(scenario), point, symlinks=True)
    return point


def listing(point: str) -> list[str]:
  """Returns all paths of a point, without random names and the contents of checkpoints."""
  names = []
  for parent, folders, files in os.walk(point):
    relative = os.path.relpath(parent, point)
    if re.search(r"/checkpoints/\d+$", f"/{relative}"):
      folders.clear()
      continue
    names += [os.path.normpath(os.path.join(relative, name)) for name in (*folders, *files)]
  return sorted(names)


def look(bench: Bench, scenario: Scenario, point: str) -> dict:
  """Returns what a point holds: the product or why there is none, all paths, and the user's files
  that are not what they were. Runs in a child."""
  path = os.path.join(point, scenario.makes)
  try:
    product = scenario.product(path) if os.path.exists(path) else None
  except Exception as error:
    product = f"{type(error).__name__}: {str(error)[:300]}"
  notes = [point, *([path] if scenario.notes else [])]
  changed = [
    os.path.join(parent, name)
    for parent in notes
    for name in NOTES
    if not (
      os.path.isfile(os.path.join(parent, name)) and pathlib.Path(parent, name).read_text() == NOTE
    )
  ]
  return {"product": product, "listing": listing(point), "changed": changed}


def lost(scenario: Scenario, before: Any, state: Any, whole: Any) -> list[str]:
  """Returns what a fault destroyed of what was there before it or is named as complete."""
  if isinstance(state, str):
    return [f"what is there cannot be read: {state}"]
  if scenario.product is not run_product:
    if before is not None and state not in (before, whole):
      return ["what was there is neither what it was nor what it should become"]
    return []
  faults = []
  state = state or {"metrics": [], "checkpoints": {}}
  missing = set((before or {"checkpoints": {}})["checkpoints"]) - set(state["checkpoints"])
  if missing:
    faults.append(f"the checkpoints {sorted(missing)} are gone")
  for step, checksum in state["checkpoints"].items():
    if checksum != whole["checkpoints"].get(step):
      faults.append(f"checkpoint {step} loads and is not the undisturbed run's")
  last = max(map(int, state["checkpoints"]), default=0)
  # The evaluation of the newest step may still be to come.
  wanted = [
    record
    for record in whole["metrics"]
    if record["step"] <= last and not ("heldout_loss" in record and record["step"] == last)
  ]
  if not all(record in state["metrics"] for record in wanted):
    faults.append(f"metrics of steps up to {last} are gone")
  return faults


@dataclasses.dataclass
class Result:
  """Outcome of a point.

  Attributes:
    scenario, key, ordinal, mode: the point.
    reached: the command came to that operation.
    code: of the command with the fault.
    said: its last line on stderr.
    faults: what is wrong.
  """

  scenario: str
  key: str
  ordinal: int
  mode: str
  reached: bool = True
  code: int | str = 0
  said: str = ""
  faults: list[str] = dataclasses.field(default_factory=list)


def try_point(
  bench: Bench,
  scenario: Scenario,
  number: int,
  place: tuple[str, int],
  mode: str,
  whole: dict,
  before: Any,
  limit: float,
):
  """Chains the command with a fault, a look at what it left, the command again, a last look."""
  point, output = (
    bench.fresh(scenario, number),
    os.path.join(bench.folder, "outputs", f"{scenario.name}_{number}"),
  )
  result = Result(scenario.name, *place, mode)
  run = forked.command(*bench.words(scenario.command, point))
  log = os.path.join(bench.folder, "outputs", f"{scenario.name}_{number}.log")
  os.makedirs(output)

  def disturbed():
    io_faults.fail(point, *place, io_faults.ERRORS[mode], mode == "ENOSPC", log)
    run()

  ended = yield forked.Call(disturbed, output, limit)
  result.code, result.said = ended.code, (ended.err.strip().splitlines() or [""])[-1]
  result.reached = place in io_faults.recorded(log)
  lacks = may_lack(ended.err, whole["product"])
  wanted = without(whole["product"], lacks)
  if result.reached and not (mode == "kill" and ended.code == -9):
    result.faults += forked.command_faults(ended)

  def check_and_repeat():
    state = look(bench, scenario, point)
    pathlib.Path(output, "state").write_text(json.dumps(state))
    run()

  def check():
    return look(bench, scenario, point)

  again = yield forked.Call(check_and_repeat, os.path.join(output, "again"), 2 * limit)
  state = (
    json.loads(pathlib.Path(output, "state").read_text())
    if os.path.exists(os.path.join(output, "state"))
    else None
  )
  if state is None:
    result.faults.append(f"what it left cannot be looked at ({again.code}): {again.err[-500:]}")
    return result
  result.faults += lost(scenario, before["product"], state["product"], whole["product"])
  result.faults += [f"{path} was changed" for path in state["changed"]]
  complete = without(state["product"], lacks) == wanted
  if ended.code == 0 and not complete:
    result.faults.append("code 0, and the result is not that of an undisturbed run")
  if again.code != 0 and not (complete and again.code == 2):
    said = (again.err.strip().splitlines() or [""])[-1]
    result.faults.append(f"the same command again ended with {again.code}: {said}")
  last = yield forked.Call(check, os.path.join(output, "last"), limit)
  if last.value is None:
    result.faults.append(f"what the repeated command left cannot be looked at: {last.err[-500:]}")
    return result
  if without(last.value["product"], lacks) != wanted:
    result.faults.append(
      "the repeated command's result differs: " + difference(last.value["product"], wanted)
    )
  names, right = set(last.value["listing"]), set(whole["listing"])
  extra, missing = names - right, right - names
  missing -= {f"{scenario.makes}/checkpoints/{step}" for step in lacks}
  if extra or missing:
    result.faults.append(
      f"left over: {', '.join(sorted(extra)) or 'nothing'}; "
      f"missing: {', '.join(sorted(missing)) or 'nothing'}"
    )
  result.faults += [f"{path} was changed in the end" for path in last.value["changed"]]
  if not result.faults:
    shutil.rmtree(point)
    shutil.rmtree(output)
  return result


def may_lack(err: str, whole: Any) -> set[str]:
  """Returns the steps, but for the last, whose checkpoint a run said it could not save."""
  if not (isinstance(whole, dict) and whole.get("checkpoints")):
    return set()
  said = re.findall(r"^the checkpoint of step (\d+) (?:could not|cannot) be saved", err, re.M)
  return set(said) - {max(whole["checkpoints"], key=int)}


def without(product: Any, steps: set[str]) -> Any:
  """Returns a run's product less the checkpoints of some steps."""
  if not steps or not isinstance(product, dict):
    return product
  kept = {step: sums for step, sums in product["checkpoints"].items() if step not in steps}
  return {**product, "checkpoints": kept}


def difference(state: Any, wanted: Any) -> str:
  """Returns where two products differ, in short."""
  if not isinstance(state, dict) or not isinstance(wanted, dict):
    return str(state)[:300]
  return ", ".join(
    f"{key}: {str(state.get(key))[:100]} not {str(wanted.get(key))[:100]}"
    for key in {**state, **wanted}
    if state.get(key) != wanted.get(key)
  )


def undisturbed(
  bench: Bench, scenario: Scenario
) -> tuple[dict, dict, list[tuple[str, int]], float]:
  """Returns what is there before the command and after it, its operations, and its seconds."""
  bench.make_template(scenario)
  point = bench.fresh(scenario, 0)
  log, output = os.path.join(bench.folder, "log"), os.path.join(bench.folder, "output")
  run = forked.command(*bench.words(scenario.command, point))

  def recorded():
    io_faults.record(point, log)
    run()

  before = forked.run(lambda: look(bench, scenario, point), output).value
  ended = forked.run(recorded, output, 300)
  if ended.code != 0:
    sys.exit(f"without any fault: {scenario.name} ended with {ended.code}\n{ended.err}")
  after = forked.run(lambda: look(bench, scenario, point), output)
  if after.value is None or isinstance(after.value["product"], str):
    sys.exit(f"without any fault: {scenario.name} left {after}")
  shutil.rmtree(point)
  return before, after.value, io_faults.recorded(log), ended.seconds


def chosen(
  operations: list[tuple[str, int]], modes: list[str]
) -> list[tuple[tuple[str, int], str]]:
  """Returns (operation, mode): every mode once for each kind of operation, a key without numbers.

  In turn at its first, its last, and one in the middle.
  """
  by_kind = collections.defaultdict(list)
  for operation in operations:
    by_kind[re.sub(r"\d+", "N", operation[0])].append(operation)
  points = []
  for kind, places in by_kind.items():
    # fsync, renaming and removing need no space.
    fitting = [
      mode
      for mode in modes
      if mode != "ENOSPC"
      or not kind.startswith(("fsync", "fdatasync", "rename", "unlink", "rmdir"))
    ]
    at = (places[0], places[-1], places[len(places) // 2])
    points += [(at[number % 3], mode) for number, mode in enumerate(fitting)]
  return points


def progress(results: Iterator[Result], total: int) -> Iterator[Result]:
  began = time.monotonic()
  for number, result in enumerate(results, 1):
    if result.faults:
      print(
        f"WRONG {result.scenario}: {result.mode} at [{result.ordinal}] {result.key}: "
        f"code {result.code}: {result.said}",
        *(f"    {fault}" for fault in result.faults),
        sep="\n",
        flush=True,
      )
    if not result.reached:
      print(f"  not reached: {result.mode} at [{result.ordinal}] {result.key}", flush=True)
    if number % 25 == 0 or number == total:
      print(f"  {number} of {total}, {time.monotonic() - began:.0f} s", flush=True)
    yield result


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  names = [scenario.name for scenario in SCENARIOS]
  parser.add_argument("--scenarios", default=",".join(names))
  parser.add_argument("--modes", default=",".join(io_faults.ERRORS))
  parser.add_argument("--every", type=int, default=1, help="take every N-th point only")
  parser.add_argument(
    "--only", default="", help="a regular expression: take the points whose operation it finds"
  )
  parser.add_argument("--at_once", type=int, default=2)
  parser.add_argument(
    "--folder", default=None, help="a new one, which is kept; default: a temporary one"
  )
  parser.add_argument("--list", action="store_true", help="only list the operations")
  args = parser.parse_args()
  folder = args.folder or os.environ.get("SPARSEK_CRASH_POINTS") or tempfile.mkdtemp()
  os.makedirs(folder, exist_ok=True)
  folder = os.path.realpath(folder)
  io_faults.restart_with_faults(
    folder,
    {
      **ENVIRONMENT,
      "JAX_COMPILATION_CACHE_DIR": f"{folder}/jax",
      "XDG_CACHE_HOME": f"{folder}/cache",
      "SPARSEK_CRASH_POINTS": folder,
    },
  )
  import_commands()
  bench, began = Bench(folder), time.monotonic()
  chosen_scenarios = [
    scenario for scenario in SCENARIOS if scenario.name in args.scenarios.split(",")
  ]
  for scenario in chosen_scenarios:
    bench.make_shared(
      read_by(word for words in (scenario.command, *scenario.before) for word in words)
    )
  print(f"prepared in {time.monotonic() - began:.0f} s", flush=True)
  totals, failures, began = [], 0, time.monotonic()
  try:
    for scenario in chosen_scenarios:
      before, whole, operations, seconds = undisturbed(bench, scenario)
      points = [
        point
        for point in chosen(operations, args.modes.split(","))
        if re.search(args.only, point[0][0])
      ][:: args.every * scenario.stride]
      print(
        f"{scenario.name}: {seconds:.1f} s undisturbed, {len(operations)} operations, "
        f"{len(points)} points",
        flush=True,
      )
      if args.list:
        print(*(f"  [{ordinal}] {key}" for key, ordinal in operations), sep="\n")
        continue
      limit = SECONDS
      chains = (
        try_point(bench, scenario, number, place, mode, whole, before, limit)
        for number, (place, mode) in enumerate(points, 1)
      )
      results = list(progress(forked.run_all(chains, args.at_once), len(points)))
      reached = [result for result in results if result.reached]
      failures += sum(bool(result.faults) for result in results)
      silent = [
        result
        for result in reached
        if result.code == 0 and not result.faults and key_matters(result.key)
      ]
      totals += reached
      modes = collections.Counter(result.mode for result in reached)
      ends = collections.Counter(str(result.code) for result in reached)
      print(
        f"{scenario.name}: {len(reached)} points reached of {len(points)} ({counted(modes)}), "
        f"codes {counted(ends)}, "
        f"{sum(bool(result.faults) for result in results)} wrong; {len(silent)} failed with code 0",
        flush=True,
      )
  finally:
    if not args.folder and not failures:
      shutil.rmtree(folder, ignore_errors=True)
  print(
    f"{len(totals)} crash points "
    f"({counted(collections.Counter(result.mode for result in totals))}; "
    f"{counted(collections.Counter(result.scenario for result in totals))}) "
    f"in {time.monotonic() - began:.0f} s: {failures} wrong"
    + (f"; what they left is in {folder}" if failures else "")
  )
  import jax

  print(f"python {platform.python_version()} jax {jax.__version__} cpu")
  sys.exit(failures > 0)


def key_matters(key: str) -> bool:
  return key.startswith(("write", "pwrite", "fsync", "fdatasync", "rename"))


def counted(counter: collections.Counter) -> str:
  return ", ".join(f"{count} {name}" for name, count in counter.most_common()) or "none"


def import_commands() -> None:
  """Imports what the commands need, and computes nothing: children are forked from here."""
  import tokenizers  # noqa: F401

  import sparsek.evaluation.loss_by_position  # noqa: F401
  import sparsek.experiments.reports.grid  # noqa: F401
  import sparsek.generation.session  # noqa: F401
  import sparsek.huggingface.pretrained  # noqa: F401
  import sparsek.training.loop  # noqa: F401


if __name__ == "__main__":
  main()
