"""One record of several grids of experiments.ablate.

  python -m experiments.reports.collect_grids RECORD.json NOTE GRID ...

The record holds for each finished cell the flags that differ from those of the first cell, its
held-out losses by step, and statistics of the selection at the end; and the flags of the first
cell, versions, and NOTE, which says what was run on what device. GRID is the --workdir of a grid.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from sparsek.command_line import outputs
from sparsek.errors import UsageError
from sparsek.experiments import script
from sparsek.experiments.reports import grid, records
from sparsek.runs.metrics import read_metrics
from sparsek.storage import files

# Flags that differ by machine, or that the record holds elsewhere.
MACHINES = ("--workdir", "--data", "--seed", "--tokenizer", "--init_from", "--distill_from")
RECORD = outputs.record("record of collect_grids", "note", "flags", "cells")


def flags_of(folder: str) -> list[str]:
  """Returns the flags of a run, without those that name folders."""
  with open(os.path.join(folder, "flags.txt"), encoding="utf-8") as file:
    return [line for line in file.read().splitlines() if line.split("=")[0] not in MACHINES]


def cell(workdir: str, name: str, first: Sequence[str]) -> dict[str, Any]:
  """Returns what the record holds of a cell.

  Args:
    workdir: of the grid.
    name: of the cell.
    first: the flags of the record's first cell.
  """
  folder = os.path.join(workdir, "cells", name)
  lines = read_metrics(os.path.join(folder, "metrics.jsonl"))
  last = [line for line in lines if "loss" in line][-1]
  return {
    "grid": os.path.basename(os.path.normpath(workdir)),
    "cell": name,
    "flags": sorted(set(flags_of(folder)) - set(first)),
    "heldout_loss": {
      line["step"]: line["heldout_loss"] for line in lines if "heldout_loss" in line
    },
    grid.DOCUMENTS: [line for line in lines if "heldout_loss" in line][-1].get(grid.DOCUMENTS),
    "selection": {key: value for key, value in last.items() if key.startswith("layer_")},
  }


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the script's arguments."""
  parser = script.parser(__doc__)
  parser.add_argument(
    "record", type=script.Output(RECORD), metavar="RECORD", help="to write, .json"
  )
  parser.add_argument("note", metavar="NOTE", help="what was run on what device")
  parser.add_argument(
    "grids", nargs="+", type=script.path, metavar="GRID", help="--workdir of a grid"
  )
  return parser


def main(options: argparse.Namespace) -> None:
  """Writes the record and prints the losses of all cells."""
  cells = [
    (workdir, name)
    for workdir in options.grids
    for name in finished(os.path.join(workdir, "cells"))
  ]
  if not cells:
    raise UsageError(f"there is no finished cell in {', '.join(options.grids)}")
  folder = os.path.join(cells[0][0], "cells", cells[0][1])
  first = flags_of(folder)
  versions = files.read_json_object(os.path.join(folder, "versions.json"))
  rows = [cell(workdir, name, first) for workdir, name in cells]
  record = {
    "note": options.note,
    "flags": first,
    "versions": {**versions, "command": None},
    "cells": rows,
  }
  files.save(options.record, records.dumps(record) + "\n")
  for row in rows:
    print(
      row["grid"],
      row["cell"],
      *(f"{step}: {loss:.4f}" for step, loss in row["heldout_loss"].items()),
    )


def finished(folder: str) -> list[str]:
  """Returns the names of the finished cells of a grid."""
  if not os.path.isdir(folder):
    raise UsageError(f"there is no folder {folder}: give the --workdir of a grid")
  return [
    name
    for name in sorted(os.listdir(folder))
    if os.path.exists(os.path.join(folder, name, grid.RESULT))
  ]


if __name__ == "__main__":
  script.run(main, make_parser())
