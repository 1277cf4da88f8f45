"""Comparison of two checkouts of this project in one environment, side by side.

  python -m experiments.bench.compare_checkouts BEFORE AFTER --program
  python -m experiments.bench.compare_checkouts BEFORE AFTER --time --record=compared.json

--program lowers training steps, generation and attention from both checkouts, without compiling
them, and compares the StableHLO text. Names of modules, private functions and results do not count.
The programs are those of a CPU unless JAX_PLATFORMS is set; with JAX_PLATFORMS=cuda those of the
GPU present, with the bodies of Mosaic GPU kernels, whose names and source lines do not count.

--time measures attention, a training step and generation on the device present. Rounds alternate
between the checkouts, and the order is swapped in every round. The interval holds 95 % of the
ratios of medians when rounds are drawn again with replacement; give one checkout twice to see the
noise of the machine.

Each checkout has a process, with the checkout as its working directory and first on PYTHONPATH,
that runs the worker.py beside this file. So the same code measures both.

Exit code: 0; 1 where a program differs or something cannot be lowered or timed; 2 for arguments
that do not fit and for a checkout whose process imports another checkout's files.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsek.command_line import outputs
from sparsek.config import whole_number
from sparsek.experiments import script
from sparsek.experiments.bench.checkouts.report import (
  SUITES,
  pair_programs,
  program_table,
  record_row,
  time_table,
)
from sparsek.storage import files

RECORD = outputs.record("record of compare_checkouts", "before", "after", "suites", "rows")
DUMPED = re.compile(r"\w+\.(before|after)\.mlir")  # names of the texts of programs
WORKER = Path(__file__).resolve().parent / "checkouts" / "worker.py"


class RefusedError(Exception):
  """Arguments or a checkout that cannot be compared."""


class FailedError(Exception):
  """A process that ended before it answered."""


class Worker:
  """A process that runs the code of one checkout.

  Attributes:
    name: "before" or "after".
    checkout: its folder.
  """

  def __init__(self, name: str, checkout: Path, environment: dict[str, str]):
    self.name, self.checkout = name, checkout
    paths = [str(checkout), *filter(None, [environment.get("PYTHONPATH")])]
    # Without -P the folder of this file would come before PYTHONPATH.
    self._process = subprocess.Popen(
      [sys.executable, "-P", str(WORKER)],
      cwd=checkout,
      env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
      encoding="utf-8",
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )

  def send(self, action: str, **arguments) -> None:
    """Sends a request; `receive` returns its answer."""
    assert self._process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # then there is no answer either
      self._process.stdin.write(json.dumps({"action": action, **arguments}) + "\n")
      self._process.stdin.flush()

  def receive(self) -> dict:
    """Returns the answer to the request, {"error": reason} where it failed.

    Raises:
      FailedError: where the process has ended.
    """
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      code = self._process.wait()
      raise FailedError(f"the process of {self.checkout} ended with code {code}")
    return json.loads(line)

  def ask(self, action: str, **arguments) -> dict:
    """Returns the answer to a request, as `receive`."""
    self.send(action, **arguments)
    return self.receive()

  def close(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.communicate()


def check_origin(checkout: Path, reply: dict) -> None:
  """Raises RefusedError unless a worker imports all of sparsek from its own checkout.

  Args:
    checkout: the folder.
    reply: the worker's answer, with the file of each module.
  """
  if "error" in reply:
    raise RefusedError(f"{checkout}: sparsek cannot be imported: {reply['error']}")
  root = checkout.resolve()
  for module, file in reply["files"].items():
    path = Path(file).resolve()
    if not any(path.is_relative_to(root / folder) for folder in ("sparsek", "kernels")):
      hint = "; make the link sparsek/kernels -> ../kernels" if "kernels" in module else ""
      raise RefusedError(
        f"{checkout}: its process imports {module} from {path}, not from its own checkout{hint}"
      )


@contextlib.contextmanager
def start_workers(
  before: Path, after: Path, environment: dict[str, str]
) -> Iterator[tuple[list[Worker], dict]]:
  """Starts a worker for each checkout; yields both, and what the second says of its device.

  Raises:
    RefusedError: where one imports the files of another checkout.
  """
  workers = []
  try:
    for name, checkout in (("before", before), ("after", after)):
      workers.append(Worker(name, checkout, environment))
    for worker in workers:
      worker.send("hello")
    answers = [worker.receive() for worker in workers]
    for worker, hello in zip(workers, answers, strict=True):
      check_origin(worker.checkout, hello)
      print(f"{worker.name}: {hello['files']['sparsek']}, {hello['files']['sparsek.kernels']}")
    device = answers[-1]["device"]
    print(", ".join(f"{name} {value}" for name, value in device.items()), flush=True)
    yield workers, device
    for worker in workers:
      check_origin(worker.checkout, worker.ask("files"))
  finally:
    for worker in workers:
      worker.close()


def compare_programs(workers: Sequence[Worker], dump: Path | None) -> bool:
  """Prints how the programs of two workers compare; returns whether all are equal."""
  pairs = []
  for name in workers[0].ask("program_names")["names"]:
    for worker in workers:
      worker.send("program", name=name)
    pair = pair_programs(name, *[worker.receive() for worker in workers])
    pairs.append(pair)
    print(f"{name}: {'equal' if pair.equal else 'DIFFERENT'}", flush=True)
    if dump:
      for side, text in (("before", pair.before), ("after", pair.after)):
        if text is not None:
          file = re.sub(r"\W+", "_", name) + f".{side}.mlir"
          (dump / file).write_text(text, encoding="utf-8")
  print("\n".join(["", *program_table(pairs)]))
  return all(pair.equal for pair in pairs)


def sample_rounds(workers: Sequence[Worker], operation: str, rounds: int) -> dict:
  """Returns the row of an operation: the samples of both workers, one of each round.

  One worker at a time is busy, and both have run the operation before the first sample.
  """
  row: dict[str, Any] = {"operation": operation}
  try:
    calls = 1
    for worker in workers:
      reply = worker.ask("prepare", name=operation)
      if "error" in reply:
        return row | {"error": f"{worker.name}: {reply['error']}"}
      calls = max(calls, reply["calls"])
    row |= {"calls": calls, "before": [], "after": []}
    for turn in range(rounds):
      for worker in workers if turn % 2 == 0 else reversed(workers):
        reply = worker.ask("sample", calls=calls)
        if "error" in reply:
          return {"operation": operation, "error": f"{worker.name}: {reply['error']}"}
        row[worker.name].append(reply["seconds"])
    return row
  finally:
    for worker in workers:
      worker.ask("release")


def commit(checkout: Path) -> dict:
  """Returns the commit of a checkout and whether files differ from it; None where git has none."""

  def git(*arguments):
    result = subprocess.run(["git", "-C", checkout, *arguments], capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None

  top = git("rev-parse", "--show-toplevel")
  if top is None or Path(top).resolve() != checkout.resolve():  # a copy inside another checkout
    return {"commit": None, "changed": None}
  changed = git("status", "--porcelain", "--untracked-files=no")
  return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed)}


def compare_times(
  workers: Sequence[Worker], suites: Sequence[str], rounds: int, record: dict, path: Path | None
) -> bool:
  """Prints how the times of two workers compare; returns whether everything could be timed.

  Args:
    workers: of the checkouts before and after.
    suites: out of SUITES.
    rounds: samples of each operation and worker.
    record: what the file holds beside the samples.
    path: of the file, written again after every operation; None: no file.
  """
  rows = []
  for name in workers[0].ask("operation_names", suites=suites)["names"]:
    rows.append(sample_rounds(workers, name, rounds))
    print(time_table(rows[-1:])[-1], flush=True)
    if path:
      text = json.dumps(record | {"rows": list(map(record_row, rows))}, indent=1)
      path.write_text(text + "\n", encoding="utf-8")
  print("\n".join(["", *time_table(rows)]))
  return not any("error" in row for row in rows)


def checkout_folder(text: str) -> Path:
  """Returns the folder of a checkout, for argparse."""
  path = Path(os.path.expanduser(text))
  if not (path / "sparsek" / "__init__.py").is_file():
    raise argparse.ArgumentTypeError(f"{text}: there is no checkout of this project, with sparsek/")
  return path.absolute()


def dump_folder(text: str) -> Path:
  """Returns the path of a folder that is new, or holds texts of programs alone, for argparse."""
  path = Path(script.path(text))
  if path.is_dir():
    other = next((file.name for file in path.iterdir() if not DUMPED.fullmatch(file.name)), None)
    if other is not None:
      raise argparse.ArgumentTypeError(f"{text} holds {other}, and not only texts of programs")
  elif os.path.lexists(path):
    raise argparse.ArgumentTypeError(f"{text} is a file, it must be a folder")
  return path


def record_file(text: str) -> Path:
  """Returns the path of a .json file to write, for argparse."""
  path = Path(script.Output(RECORD)(text))
  if path.suffix != ".json":
    raise argparse.ArgumentTypeError(f"{text}: must be a .json file")
  return path


def suite_names(text: str) -> list[str]:
  """Returns the suites that a list separated by commas names, for argparse."""
  names = text.split(",")
  for name in names:
    if name not in SUITES:
      raise argparse.ArgumentTypeError(f"{name!r} must be one of {', '.join(SUITES)}")
  return names


def positive(text: str) -> int:
  """Returns a positive integer, for argparse."""
  number = whole_number(text, 1)
  if number is None:
    raise argparse.ArgumentTypeError(f"{text} must be a positive integer")
  return number


def commit_names(text: str) -> list[str]:
  """Returns two commits separated by a comma, for argparse."""
  names = text.split(",")
  if len(names) != 2 or not all(names):
    raise argparse.ArgumentTypeError(f"{text}: must be two commits, BEFORE,AFTER")
  return names


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the script's arguments."""
  as_written = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
  parser.add_argument("before", metavar="BEFORE", type=checkout_folder, help="a checkout")
  parser.add_argument("after", metavar="AFTER", type=checkout_folder, help="another checkout")
  mode = parser.add_mutually_exclusive_group(required=True)
  mode.add_argument("--program", action="store_true", help="compare lowered programs")
  mode.add_argument("--time", action="store_true", help="compare times")
  parser.add_argument("--dump", type=dump_folder, help="with --program: a folder for the texts")
  parser.add_argument(
    "--suite",
    type=suite_names,
    default=list(SUITES),
    help=f"with --time: out of {','.join(SUITES)}",
  )
  parser.add_argument(
    "--rounds",
    type=positive,
    default=20,
    help="with --time: samples of each operation and checkout",
  )
  parser.add_argument("--record", type=record_file, help="with --time: a .json file to write")
  parser.add_argument(
    "--commits",
    type=commit_names,
    help="with --time: BEFORE,AFTER for the record, of copies without git",
  )
  return parser


def make_folder(path: Path) -> None:
  """Makes the folder of --dump; raises RefusedError where that cannot be."""
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise RefusedError(f"--dump={path} cannot be made: {files.reason_of(error)}") from None


def main(arguments: Sequence[str] | None = None) -> int:
  """Compares the checkouts, and returns the exit code."""
  options = make_parser().parse_args(arguments)
  environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  if options.program:
    environment.setdefault("JAX_PLATFORMS", "cpu")
  try:
    if options.dump:
      make_folder(options.dump)
    with start_workers(options.before, options.after, environment) as (workers, device):
      if options.program:
        return 0 if compare_programs(workers, options.dump) else 1
      commits = [commit(worker.checkout) for worker in workers]
      if options.commits:
        commits = [{"commit": name, "changed": None} for name in options.commits]
      set_here = {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(("JAX_", "XLA_")) and os.sep not in value
      }
      record = {
        **dict(zip(("before", "after"), commits, strict=True)),
        "device": device,
        "environment": set_here,
        "suites": options.suite,
        "rounds": options.rounds,
      }
      timed = compare_times(workers, options.suite, options.rounds, record, options.record)
      return 0 if timed else 1
  except (RefusedError, FailedError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, RefusedError) else 1


if __name__ == "__main__":
  sys.exit(main())
