"""One record of several grids of experiments.ablate: `python -m experiments.collect_grids RECORD.json NOTE GRID ...`.

For every finished cell: the flags in which it differs from the first one, its held-out losses by step, and what its sparsek layers select at the end. The
record also has the flags of the first cell, versions, and the note: what was run on what. GRID is the --workdir of a grid.
"""

import json
import os
import sys

from sparsek import ablation, run_directory
from sparsek.errors import UsageError
from sparsek.metrics import read_metrics

MACHINES = ("--workdir", "--data", "--seed")             # differ by machine, or stand elsewhere


def flags_of(folder):
  """The flags of a run, without those that name folders."""
  with open(os.path.join(folder, "flags.txt"), encoding="utf-8") as file:
    return [line for line in file.read().splitlines() if line.split("=")[0] not in MACHINES]


def cell(grid, name, first):
  folder = os.path.join(grid, "cells", name)
  records = read_metrics(os.path.join(folder, "metrics.jsonl"))
  last = [record for record in records if "loss" in record][-1]
  return {"grid": os.path.basename(os.path.normpath(grid)), "cell": name, "flags": sorted(set(flags_of(folder)) - set(first)),
          "heldout_loss": {record["step"]: record["heldout_loss"] for record in records if "heldout_loss" in record},
          "selection": {key: value for key, value in last.items() if key.startswith("layer_")}}


def main(record, note, *grids):
  cells = [(grid, name) for grid in grids for name in sorted(os.listdir(os.path.join(grid, "cells")))]
  cells = [(grid, name) for grid, name in cells if os.path.exists(os.path.join(grid, "cells", name, ablation.RESULT))]
  if not cells:
    raise UsageError(f"there is no finished cell in {', '.join(grids)}")
  first = flags_of(os.path.join(cells[0][0], "cells", cells[0][1]))
  with open(os.path.join(cells[0][0], "cells", cells[0][1], "versions.json"), encoding="utf-8") as file:
    versions = json.load(file)
  rows = [cell(grid, name, first) for grid, name in cells]
  with open(record, "w", encoding="utf-8") as file:
    file.write(run_directory.to_json({"note": note, "flags": first, "versions": {**versions, "command": None}, "cells": rows}))
  for row in rows:
    print(row["grid"], row["cell"], *(f"{step}: {loss:.4f}" for step, loss in row["heldout_loss"].items()))


if __name__ == "__main__":
  main(*sys.argv[1:])
