"""Summary of a record: its losses and answers, without the loss by position and the selection.

  git show 5d9e29a:experiments/results/rivals_gates.json > gates.json
  python -m experiments.reports.summarize gates.json experiments/results/baselines_gates.json \\
    --kinds=full,window_512,sparsek_512,sparsek_512_softmax,sparsek_512_straight_through_softmax

Records are those of experiments/recipes/baselines.py and experiments.reports.collect_grids.
"""

import argparse
import re
from collections.abc import Sequence

from sparsek.command_line import outputs
from sparsek.errors import UsageError
from sparsek.experiments import script
from sparsek.experiments.reports import records
from sparsek.storage import files


def summary(record: dict, kinds: Sequence[str] = ()) -> dict:
  """Returns the summary of a record, of the runs of some kinds; empty: of all."""
  if "cells" in record:
    return record | {"cells": [cell | {"selection": {}} for cell in record["cells"]]}
  if unknown := set(kinds) - set(record["runs"]):
    raise UsageError(f"--kinds: the record has no {', '.join(sorted(unknown))}")
  kinds = kinds or list(record["runs"])
  runs = {
    name: run | {"seeds": {seed: _losses_and_answers(of) for seed, of in run["seeds"].items()}}
    for name, run in record["runs"].items()
    if name in kinds
  }
  stages = {
    name: words
    for name, words in record.get("stages", {}).items()
    if name.startswith("dense") or re.sub("^(loss|far|tasks)_|_s[0-9]$", "", name) in kinds
  }
  return record | {"runs": runs} | ({"stages": stages} if stages else {})


def _losses_and_answers(result: dict) -> dict:
  loss = {
    length: {key: of[key] for key in ("loss", "num_targets")}
    for length, of in result["loss"].items()
  }
  return {"loss": loss, "mixed_loss": result["mixed_loss"], "tasks": result["tasks"]}


def _is_summary(path: str) -> bool:
  """Returns whether a file is a summary of a record: it has nothing that a summary leaves out."""
  try:
    record = files.read_json_object(path)
    return "versions" in record and summary(record) == record
  except (UsageError, LookupError, TypeError, AttributeError):
    return False


SUMMARY = outputs.Kind("summary of a record", _is_summary)


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the script's arguments."""
  parser = script.parser(__doc__)
  parser.add_argument("record", type=script.path, metavar="RECORD", help="to read, .json")
  parser.add_argument(
    "summary", type=script.Output(SUMMARY), metavar="SUMMARY", help="to write, .json"
  )
  parser.add_argument(
    "--kinds", default="", help="names of runs, separated by commas; default: all"
  )
  return parser


def main(options: argparse.Namespace) -> None:
  """Reads the record and writes its summary."""
  kinds = options.kinds.split(",") if options.kinds else []
  result = summary(files.read_json_object(options.record), kinds)
  depth = 4 if "runs" in result else 2  # a line for each seed of a run, or for each cell
  files.save(options.summary, records.dumps(result, depth) + "\n")


if __name__ == "__main__":
  script.run(main, make_parser())
