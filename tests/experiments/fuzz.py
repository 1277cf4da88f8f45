"""Thousands of damaged files and odd command lines, from fixed seeds.

This is no test of the suite, but is run by hand:

  python -m tests.experiments.fuzz --formats --flags

Each file format that is read gets 1000 damaged files, and 500 command lines are drawn. None may end
in a traceback, take 20 seconds or give another value than the file says: it is refused in a
sentence, or read as it is. Exits with 1 where anything is otherwise; --case repeats one.
"""

import argparse
import collections
import json
import os
import pathlib
import platform
import shutil
import sys
import tempfile
import time

SEED = 24


def try_cases(name: str, folder: str, seed: int, first: int, last: int, seconds: float) -> None:
  """Tries the cases of a format; each result goes to the folder's results.jsonl, and each number
  before to the folder's at. Runs in a child."""
  import faulthandler

  from tests.experiments import fuzz_formats

  root = pathlib.Path(folder)
  shutil.rmtree(root / "files", ignore_errors=True)
  (root / "files" / "good").mkdir(parents=True)
  good = fuzz_formats.make_good(name, root / "files")
  with open(root / "results.jsonl", "a", encoding="utf-8") as results:
    for case in range(first, last):
      (root / "at").write_text(str(case))
      # This also ends a case that hangs in C.
      faulthandler.dump_traceback_later(seconds, exit=True)
      kind, why = fuzz_formats.try_case(name, root / "files", good, seed, case)
      results.write(json.dumps([case, kind, why]) + "\n")
      results.flush()
  faulthandler.cancel_dump_traceback_later()


def fuzz_format(name: str, folder: str, seed: int, first: int, last: int, limit: float):
  """Chains children that try cases, a new one after each that a case ended.

  Returns:
    (name, [(case, kind, why)], seconds).
  """
  from tests.experiments import forked

  os.makedirs(folder, exist_ok=True)
  began, results = time.monotonic(), []
  while first < last:
    ended = yield forked.Call(
      lambda: try_cases(name, folder, seed, first, last, limit), folder, 3600
    )
    path = pathlib.Path(folder, "results.jsonl")
    results = (
      [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    )
    if ended.code == 0:
      break
    at = pathlib.Path(folder, "at")
    if not at.exists():
      results.append((-1, "wrong", f"the good files: {ended.err[-600:]}"))
      break
    case = int(at.read_text())
    hung = "Timeout (" in ended.err
    with open(path, "a", encoding="utf-8") as file:
      why = (
        f"still running after {limit:.0f} s"
        if hung
        else f"the process ended with {ended.code}: {ended.err.strip()[-300:]}"
      )
      file.write(json.dumps([case, "wrong", why]) + "\n")
    results.append((case, "wrong", why))
    first = case + 1
  return name, results, time.monotonic() - began


def brief(why: str) -> str:
  """Returns what failures have in common: their text without numbers and names."""
  import re

  return re.sub(r"[-+]?\d[\d.e+-]*", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "S", why))[:90]


def report(name: str, results: list, seconds: float, shown: int) -> int:
  """Prints totals of a format or command and failures by kind; returns how many there are."""
  kinds = collections.Counter(kind for _, kind, _ in results)
  wrong = [(case, why) for case, kind, why in results if kind == "wrong"]
  rest = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()) if kind != "wrong")
  print(
    f"{name}: {len(results)} cases in {seconds:.0f} s: {rest or 'none right'}, {len(wrong)} wrong",
    flush=True,
  )
  groups = collections.defaultdict(list)
  for case, why in wrong:
    groups[brief(why)].append((case, why))
  for group in sorted(groups.values(), key=len, reverse=True)[:shown]:
    print(f"  {len(group)} like case {group[0][0]}: {group[0][1]}", flush=True)
  return len(wrong)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--formats",
    nargs="?",
    const="all",
    help="damage files: of all formats, or of those named, separated by commas",
  )
  parser.add_argument(
    "--flags", nargs="?", const="all", help="draw command lines: of all commands, or of those named"
  )
  parser.add_argument("--cases", type=int, default=1000, help="of a format")
  parser.add_argument(
    "--combinations", type=int, default=500, help="of flags, of all commands together"
  )
  parser.add_argument("--case", type=int, default=None, help="only this one")
  parser.add_argument("--seed", type=int, default=SEED)
  parser.add_argument(
    "--seconds",
    type=float,
    default=20.0,
    help="that a damaged file may take; more on a busy machine",
  )
  parser.add_argument("--at_once", type=int, default=2)
  parser.add_argument("--shown", type=int, default=12, help="kinds of failures of a format")
  parser.add_argument(
    "--folder", default=None, help="a new one, which is kept; default: a temporary one"
  )
  args = parser.parse_args()
  from tests.experiments import crash_points, forked, fuzz_flags, fuzz_formats

  folder = os.path.realpath(args.folder or tempfile.mkdtemp())
  os.environ.update(
    {
      **crash_points.ENVIRONMENT,
      "JAX_COMPILATION_CACHE_DIR": f"{folder}/jax",
      "XDG_CACHE_HOME": f"{folder}/cache",
    }
  )
  crash_points.import_commands()
  failures, began = 0, time.monotonic()
  first, last = (0, args.cases) if args.case is None else (args.case, args.case + 1)
  try:
    if args.formats:
      names = list(fuzz_formats.FORMATS) if args.formats == "all" else args.formats.split(",")
      chains = (
        fuzz_format(name, f"{folder}/{name}", args.seed, first, last, args.seconds)
        for name in names
      )
      failures += sum(
        report(*result, args.shown) for result in forked.run_all(chains, args.at_once)
      )
    if args.flags:
      failures += fuzz_flags.fuzz(
        folder,
        args.flags,
        args.seed,
        args.combinations,
        args.case,
        args.at_once,
        lambda *result: report(*result, args.shown),
      )
  finally:
    if not args.folder and not failures:
      shutil.rmtree(folder, ignore_errors=True)
  print(
    f"seed {args.seed}: {failures} wrong in {time.monotonic() - began:.0f} s; "
    f"python {platform.python_version()} cpu"
  )
  sys.exit(failures > 0)


if __name__ == "__main__":
  main()
