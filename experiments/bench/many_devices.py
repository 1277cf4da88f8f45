"""Timing of training steps over meshes of several devices, beside one device, in one run.

  python -m experiments.bench.many_devices --record=many.json --cases=data,context,fsdp,million
  python -m experiments.bench.many_devices --cases=tiny   # seconds, also on simulated devices

All steps of a case are timed in turn, round after round. Speed is tokens per second of all devices
together. The record is written after every round, and a case that is in it already is skipped, so
that a run that was stopped goes on.

The cases:
  data: rows of 32768 tokens, 110M parameters; one row a device, on one device and on two.
  context: one row of 262144 tokens, 110M parameters, on one device and split over two.
  fsdp: two rows of 32768 tokens, 969M parameters; parameters replicated, and split over two.
  million: one row of 1,048,576 tokens in the 0.5B shape of Qwen2.5, split over two devices.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from sparsek.command_line import outputs
from sparsek.config import TransformerConfig, preset
from sparsek.errors import UsageError
from sparsek.experiments import script
from sparsek.experiments.bench.cells import environment, run_rounds
from sparsek.experiments.bench.training_step import KINDS, Job, StepCell, under
from sparsek.parallel.mesh import AXES, make_mesh
from sparsek.storage import files

RECORD = outputs.record("record of many_devices", "device", "versions", "rows", no_others=True)

Shape = tuple[int, int, int]  # of the mesh: data, fsdp, context
SAMPLE_SECONDS = 2.0  # several steps in a row, as in training, where none waits for the one before


@dataclasses.dataclass(frozen=True)
class Case:
  """Steps that are compared: each kind of attention under each mesh.

  Attributes:
    config: the model.
    n: tokens of a row.
    rows: rows of a batch, for each shape of a mesh.
    kinds: of attention.
  """

  config: TransformerConfig
  n: int
  rows: dict[Shape, int]
  kinds: tuple[str, ...] = KINDS


def cases() -> dict[str, Case]:
  """Returns the cases by name."""
  small = preset("gpt2_small", k=512, window=512, remat="attention")
  billion = preset("1b", k=512, window=512, remat="attention")
  qwen = TransformerConfig(
    vocab_size=151936,
    num_layers=24,
    embed_dim=896,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=4864,
    k=512,
    window=512,
    remat="attention",
    dtype="bfloat16",
    scan_layers=True,
  )
  tiny = preset("tiny", k=8, window=8)
  one = (1, 1, 1)
  return {
    "data": Case(small, 32768, {one: 1, (2, 1, 1): 2}),
    "context": Case(small, 262144, {one: 1, (1, 1, 2): 1}),
    "fsdp": Case(billion, 32768, {(2, 1, 1): 2, (1, 2, 1): 2}),
    "million": Case(qwen, 2**20, {(1, 1, 2): 1}, ("sparsek", "sliding_window")),
    "tiny": Case(tiny, 64, {one: 2, (2, 1, 1): 2, (1, 2, 1): 2, (1, 1, 2): 2}),
  }


class MeshCell(StepCell):
  """A training step under a mesh.

  Attributes:
    argument_mib: parameters, moments and batch of a device.
  """

  argument_mib: float | None = None

  def compile(self) -> None:
    super().compile()
    memory = self._function.memory_analysis()  # type: ignore[attr-defined]
    if memory is not None:
      self.argument_mib = memory.argument_size_in_bytes / 2**20

  def record(self) -> dict[str, Any]:
    return super().record() | {"argument_mib": self.argument_mib}


def mesh_of(shape: Shape) -> Mesh:
  """Returns a mesh of the first devices."""
  data, fsdp, context = shape
  return make_mesh(fsdp, context, jax.devices()[: data * fsdp * context])


def name_of(shape: Shape) -> str:
  """Returns a name such as "context 2"."""
  parts = [f"{axis} {size}" for axis, size in zip(AXES, shape) if size > 1]
  return ", ".join(parts) or "one device"


def time_case(
  name: str, case: Case, rounds: int, seconds: float, save: Callable[[list[dict]], None]
) -> None:
  """Times a case; calls save(rows) after each round."""
  cells = []
  for kind in case.kinds:
    config = under(kind, case.config)
    for shape, rows in case.rows.items():
      cell = MeshCell(Job(config, case.n, rows, scorer_loss=0.0), mesh_of(shape))
      for action in (cell.compile, cell.start):
        cell.attempt(action)
      cell.attempt(cell.calibrate, SAMPLE_SECONDS)
      print(f"{name}: {kind}, {name_of(shape)}: {cell.failed or 'ready'}", flush=True)
      cells.append((kind, shape, cell))
  for _ in run_rounds([cell for *_, cell in cells], rounds, seconds):
    save(
      [
        {"case": name, "kind": kind, "mesh": name_of(shape), "n": case.n, "rows": case.rows[shape]}
        | cell.record()
        for kind, shape, cell in cells
      ]
    )


def table(rows: list[dict]) -> str:
  """Returns the figures as text, each speed also as a ratio to the case's first mesh."""
  lines = [f"{'case':9}{'attention':16}{'mesh':13}{'ms':>9}{'tokens/s':>11}{'ratio':>7}{'GiB':>8}"]
  for row in rows:
    if "failed" in row:
      lines.append(f"{row['case']:9}{row['kind']:16}{row['mesh']:13}{row['failed']}")
      continue
    first = next(
      (r for r in rows if (r["case"], r["kind"]) == (row["case"], row["kind"]) and "ms" in r), row
    )
    speed = row["tokens_per_second"]
    lines.append(
      f"{row['case']:9}{row['kind']:16}{row['mesh']:13}{row['ms']:9.1f}{speed:11,.0f}"
      f"{speed / first['tokens_per_second']:7.3f}{(row['mib'] or 0) / 1024:8.2f}"
    )
  return "\n".join(lines)


def main(options: argparse.Namespace) -> None:
  """Times the cases that the record lacks, and prints the table."""
  known = cases()
  for name in options.cases.split(","):
    if name not in known:
      raise UsageError(f"--cases={options.cases}: no case {name!r}; there are {', '.join(known)}")
  for kind in filter(None, (options.kinds or "").split(",")):
    if kind not in KINDS:
      raise UsageError(f"--kinds={options.kinds}: no kind {kind!r}; there are {', '.join(KINDS)}")
  rows: list[dict] = []
  if options.record and os.path.exists(options.record):
    rows = files.read_json_object(options.record)["rows"]
  done = {row["case"] for row in rows}
  for name in options.cases.split(","):
    if name in done:
      continue
    before = list(rows)

    def save(new: list[dict]) -> None:
      nonlocal rows
      rows = before + new
      if options.record:
        record = {**environment(), "rows": rows}
        files.save(options.record, json.dumps(record, indent=1) + "\n")

    kinds = options.kinds.split(",") if options.kinds else known[name].kinds
    case = dataclasses.replace(known[name], kinds=tuple(kinds))
    time_case(name, case, options.rounds, options.seconds, save)
  print(table(rows))


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the script's arguments."""
  parser = script.parser(__doc__)
  parser.add_argument("--record", type=script.Output(RECORD), help="JSON file to write")
  parser.add_argument("--cases", default="data,context,fsdp,million", help="names, by commas")
  parser.add_argument("--kinds", help="kinds of attention, by commas; by default all of the case")
  parser.add_argument("--rounds", type=int, default=5, help="most samples of each step")
  parser.add_argument("--seconds", type=float, default=60, help="most seconds of rounds, per case")
  return parser


if __name__ == "__main__":
  script.run(main, make_parser())
