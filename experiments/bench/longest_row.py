"""Length of the longest row that can be trained on, on one device and split over several.

  python -m experiments.bench.longest_row --record=longest.json
  python -m experiments.bench.longest_row --cases=tiny --gib=1   # minutes, also on a CPU

A length is a multiple of --step tokens. The search begins at an estimate from a program for a short
row, and trains on longer rows until one does not fit, or on shorter ones until one does. The model
has 110M parameters, k = w = 512, and scans over its layers. The record is written after each
length, and what is in it is not tried again.
"""

import argparse
import itertools
import json
import math
import os
from typing import Any

import jax

from sparsek.command_line import outputs
from sparsek.config import TransformerConfig, preset
from sparsek.errors import UsageError
from sparsek.experiments import script
from sparsek.experiments.bench.cells import environment
from sparsek.experiments.bench.many_devices import MeshCell, Shape, mesh_of, name_of
from sparsek.experiments.bench.training_step import KINDS, Job, under
from sparsek.storage import files

RECORD = outputs.record("record of longest_row", "bytes_limit", "rows")

SHORT = 8  # steps of the row whose program serves the first estimate


def configs() -> dict[str, TransformerConfig]:
  """Returns the models by the name of their case."""
  return {
    "110M": preset("gpt2_small", k=512, window=512, remat="attention", scan_layers=True),
    "tiny": preset("tiny", k=8, window=8),
  }


class Search:
  """The search for the longest row of a kind of attention under a mesh.

  Attributes:
    known: for each length in steps that was tried: its record.
  """

  def __init__(self, config: TransformerConfig, shape: Shape, step: int, bytes_limit: int):
    self._config, self._shape, self._step = config, shape, step
    self._limit = bytes_limit / 2**20
    self._sizes: dict[int, float] = {}  # MiB of the programs for these lengths
    self.known: dict[int, dict[str, Any]] = {}

  def _cell(self, steps: int) -> MeshCell:
    """Returns a training step on a row of that many steps of tokens, compiled if that works."""
    cell = MeshCell(Job(self._config, steps * self._step, scorer_loss=0.0), mesh_of(self._shape))
    cell.attempt(cell.compile)
    if cell.mib is not None and cell.argument_mib is not None:
      self._sizes |= {0: cell.argument_mib, steps: cell.mib}
    return cell

  def fits(self, steps: int) -> bool:
    """Trains on a row of that many steps of tokens, unless that was tried."""
    if steps not in self.known:
      cell = self._cell(steps)
      if cell.mib is not None and cell.mib > self._limit:
        cell.failed = "out of memory"
      for action in (cell.start, cell.time, cell.sample):
        cell.attempt(action)
      self.known[steps] = {"n": steps * self._step} | cell.record()
      cell.release()
    return "failed" not in self.known[steps]

  def _fitting(self) -> int:
    return max((steps for steps, row in self.known.items() if "failed" not in row), default=0)

  def is_done(self) -> bool:
    """Returns whether the most steps that fit, and one more that does not, were tried."""
    return self._fitting() + 1 in self.known

  def following(self) -> int:
    """Returns the length to try next: an estimate, if it tells more than what was tried."""
    if not self._sizes:
      self._cell(SHORT)
    first, last = sorted(self._sizes)[-2:]
    each = (self._sizes[last] - self._sizes[first]) / (last - first)
    estimate = last + math.floor((self._limit - self._sizes[last]) / each)
    best = self._fitting()
    least_failing = min((steps for steps in self.known if steps > best), default=None)
    if least_failing is None:
      return max(best + 1, estimate)
    return min(max(best + 1, estimate), least_failing - 1)


def table(rows: list[dict]) -> str:
  """Returns the lengths as text, each also as a ratio to one device's."""
  lines = [f"{'attention':16}{'mesh':13}{'tokens':>10}{'ratio':>7}{'GiB':>8}{'s a step':>10}"]
  best: dict[tuple[str, str], dict] = {}
  for row in rows:
    key = row["kind"], row["mesh"]
    if "failed" not in row and row["n"] > best.get(key, {"n": 0})["n"]:
      best[key] = row
  for (kind, mesh), row in best.items():
    ratio = row["n"] / best.get((kind, "one device"), row)["n"]
    lines.append(
      f"{kind:16}{mesh:13}{row['n']:10,}{ratio:7.3f}{row['mib'] / 1024:8.2f}{row['ms'] / 1e3:10.2f}"
    )
  return "\n".join(lines)


def bytes_limit(gib: float | None) -> int:
  """Returns the memory that a program may take of a device."""
  if gib is not None:
    return int(gib * 2**30)
  stats = jax.devices()[0].memory_stats() or {}
  if "bytes_limit" not in stats:
    raise UsageError("the device does not tell its memory; --gib says how much there is")
  return stats["bytes_limit"]


def main(options: argparse.Namespace) -> None:
  """Searches for each kind and mesh, and prints the table."""
  for name, given, allowed in (
    ("cases", options.cases, configs()),
    ("kinds", options.kinds, KINDS),
  ):
    for value in given.split(","):
      if value not in allowed:
        raise UsageError(f"--{name}={given}: no {value!r}; there are {', '.join(allowed)}")
  limit, rows = bytes_limit(options.gib), []
  if options.record and os.path.exists(options.record):
    rows = files.read_json_object(options.record)["rows"]

  def keep(row: dict) -> None:
    rows.append(row)
    if options.record:
      record = {**environment(), "bytes_limit": limit, "rows": rows}
      files.save(options.record, json.dumps(record, indent=1) + "\n")

  for case, kind, shape in itertools.product(
    options.cases.split(","), options.kinds.split(","), ((1, 1, 1), (1, 1, len(jax.devices())))
  ):
    labels = {"case": case, "kind": kind, "mesh": name_of(shape)}
    search = Search(under(kind, configs()[case]), shape, options.step, limit)
    known = [row for row in rows if row.items() >= labels.items()]
    search.known |= {row["n"] // options.step: row for row in known}
    while not search.is_done():
      steps = search.following()
      fits = search.fits(steps)
      print(f"{kind}, {name_of(shape)}: {steps * options.step:,} tokens: {fits}", flush=True)
      keep(labels | search.known[steps])
  print(table(rows))


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the script's arguments."""
  parser = script.parser(__doc__)
  parser.add_argument("--record", type=script.Output(RECORD), help="JSON file to write")
  parser.add_argument("--cases", default="110M", help="models, by commas: 110M, tiny")
  parser.add_argument("--kinds", default="sparsek,sliding_window", help="by commas")
  parser.add_argument("--step", type=int, default=32768, help="lengths are multiples of it")
  parser.add_argument("--gib", type=float, help="memory of a device; by default what it says")
  return parser


if __name__ == "__main__":
  script.run(main, make_parser())
