"""Collectives of a compiled program: how many of each kind, and the bytes that a device receives.

Reads the text that a compiled function's `as_text` returns. A loop's collectives count as often as
it runs if XLA knows that, and once if not.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
)
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([a-z][a-z-]*)\((.*)")
_CALLED = re.compile(
  r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
  r"|branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Traffic(NamedTuple):
  """The collectives of one kind in one run of a program.

  Attributes:
    number: how often a device takes part in one.
    received: bytes that a device receives in all of them; the most that one device does.
  """

  number: int
  received: int


def collectives(program: str) -> dict[str, Traffic]:
  """Counts the collectives in the text of a compiled program, by kind; only the kinds it has."""
  devices = _devices(program)
  bodies = dict(_computations(program))
  entry = next(name for name, (is_entry, _) in bodies.items() if is_entry)
  totals: dict[str, Traffic] = {}

  def visit(name: str, times: int) -> None:
    for line in bodies[name][1] if name in bodies else []:
      instruction = _INSTRUCTION.match(line)
      if not instruction:
        continue
      shape, operation, _ = instruction.groups()
      kind = operation.removesuffix("-start")
      if kind in KINDS:
        number, received = totals.get(kind, Traffic(0, 0))
        bytes_ = _received(kind, _result(shape, operation), _group_size(line, devices))
        totals[kind] = Traffic(number + times, received + times * bytes_)
        continue
      if operation.endswith(("-done", "-update")):  # name what their start has called
        continue
      trips = _TRIPS.search(line) if operation == "while" else None
      for one, several in _CALLED.findall(line):
        for called in re.findall(r"[\w.-]+", one or several):
          visit(called, times * (int(trips[1]) if trips else 1))

  visit(entry, 1)
  return totals


def _devices(program: str) -> int:
  """Returns the number of devices that a program runs on, from its first line."""
  header = program.split("\n", 1)[0]
  sizes = re.findall(r"\b(?:replica_count|num_partitions)=(\d+)", header)
  product = 1
  for size in sizes:
    product *= int(size)
  return product


def _computations(program: str) -> Iterator[tuple[str, tuple[bool, list[str]]]]:
  """Yields the name of each computation, whether it is the entry, and its lines."""
  lines: list[str] = []
  for line in program.splitlines():
    head = _COMPUTATION.match(line)
    if head:
      lines = []
      yield head[2], (bool(head[1]), lines)
    else:
      lines.append(line.strip())


def _result(shape: str, operation: str) -> str:
  """Returns the shape of a collective's result: the start of an asynchronous one returns its
  operands before it, except that of an all-reduce.
  """
  if not operation.endswith("-start") or operation == "all-reduce-start":
    return shape
  depth, parts = 0, [""]
  for character in shape[1:-1]:
    depth += (character in "([{") - (character in ")]}")
    if character == "," and not depth:
      parts.append("")
    else:
      parts[-1] += character
  return parts[1]


def _bytes(shape: str) -> int:
  """Returns the size of an array or tuple."""
  total = 0
  for _, bits, dims in _SHAPE.findall(shape):
    size = int(bits or 8)
    for dim in dims.split(",") if dims else ():
      size *= int(dim)
    total += -(-size // 8)
  return total


def _group_size(line: str, devices: int) -> int:
  """Returns how many devices take part in one instance of a collective."""
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
  if listed:
    return listed[1].count(",") + 1
  counted = re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)
  return int(counted[1]) if counted else devices


def _received(kind: str, result: str, group: int) -> int:
  """Returns the bytes that a device receives, at least, in one collective with this result."""
  size = _bytes(result)
  if kind == "reduce-scatter":
    return size * (group - 1)
  if kind == "collective-permute":
    return size
  share = size * (group - 1) // group
  return 2 * share if kind == "all-reduce" else share
