"""Collectives of a compiled program: how many of each kind, and the bytes that a device receives.

Reads the text that a compiled function's `as_text` returns. A loop's collectives count as often as
it runs if XLA knows that, or if it counts from 0 to a constant as JAX's scans do, and once if not.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

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
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CONSTANT = re.compile(r"%?([\w.-]+) = s32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"ROOT .* compare\(.*?%?([\w.-]+)\), direction=LT")
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]+\},?)*)\}")
_ORDER = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # of all devices: reshaped, then transposed
_IOTA = re.compile(rf"replica_groups=\[([\d,]+)\]<={_ORDER}")
_NAMED = re.compile(
  rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_ORDER}\))? ?\{{([^}}]*)\}}"
)


class Traffic(NamedTuple):
  """The collectives of one kind in one run of a program.

  Attributes:
    number: how often a device takes part in one.
    received: bytes that a device receives in all of them; the most that one device does.
    between_nodes: those of `received` in collectives over devices of several nodes.
  """

  number: int
  received: int
  between_nodes: int = 0


def collectives(program: str, nodes: Sequence[int] | None = None) -> dict[str, Traffic]:
  """Counts the collectives in the text of a compiled program, by kind; only the kinds it has.

  Args:
    program: the text.
    nodes: of each device of the mesh, in its order, the node that it belongs to; None for one node.

  Raises:
    ValueError: for a list of devices in a form that is not known.
  """
  devices = _devices(program)
  node = np.zeros(devices, int) if nodes is None else np.asarray(nodes)
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
        number, received, between = totals.get(kind, Traffic(0, 0))
        groups = _groups(line, devices)
        bytes_ = times * _received(kind, _result(shape, operation), groups.shape[1])
        far = bytes_ if np.any(np.ptp(node[groups], axis=1)) else 0
        totals[kind] = Traffic(number + times, received + bytes_, between + far)
        continue
      if operation.endswith(("-done", "-update")):  # name what their start has called
        continue
      trips = _trips(line, bodies) if operation == "while" else 1
      for one, several in _CALLED.findall(line):
        for called in re.findall(r"[\w.-]+", one or several):
          visit(called, times * trips)

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


def _trips(line: str, bodies: Mapping[str, tuple[bool, list[str]]]) -> int:
  """Returns how often a loop runs, 1 where that is not known."""
  known, condition = _TRIPS.search(line), _CONDITION.search(line)
  if known:
    return int(known[1])
  lines = bodies[condition[1]][1] if condition and condition[1] in bodies else []
  operations = [match[2] for match in map(_INSTRUCTION.match, lines) if match]
  if sorted(operations) != ["compare", "constant", "get-tuple-element", "parameter"]:
    return 1
  constants = {match[1]: int(match[2]) for match in map(_CONSTANT.match, lines) if match}
  below = next((match[1] for match in map(_BELOW.match, lines) if match), "")
  return constants.get(below, 1)


def _result(shape: str, operation: str) -> str:
  """Returns the shape of a collective's result: the start of an asynchronous one returns its
  operands before it, except that of an all-reduce where they are no tuple.
  """
  if not operation.endswith("-start"):
    return shape
  if operation == "all-reduce-start" and not shape.startswith("(("):
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


def _groups(line: str, devices: int) -> np.ndarray:
  """Returns the devices that take part together, a row for each instance of a collective."""
  listed, iota, named = (form.search(line) for form in (_LISTED, _IOTA, _NAMED))
  if listed and listed[1]:
    return np.array([_integers(group) for group in re.findall(r"[\d,]*\d", listed[1])])
  if iota:
    return _ordered(devices, iota[2], iota[3]).reshape(_integers(iota[1]))
  if named:
    return _along_axes(named[1], named[4], _ordered(devices, named[2], named[3]))
  if re.search(r"(replica_groups|source_target_pairs)=(?!\{\})", line):
    raise ValueError(f"cannot read the devices of this collective: {line}")
  return np.arange(devices)[None]


def _integers(text: str) -> list[int]:
  return [int(number) for number in text.split(",")]


def _ordered(devices: int, shape: str | None, axes: str | None) -> np.ndarray:
  """Returns all devices in the order "[2,4]T(1,0)"."""
  ids = np.arange(devices)
  if shape:
    ids = ids.reshape(_integers(shape)).transpose(_integers(axes) if axes else None)
  return ids.reshape(-1)


def _along_axes(mesh: str, axes: str, ids: np.ndarray) -> np.ndarray:
  """Returns the groups of "'a'=2,'b'=8" along "'a'" or, for 4 parts in each of 2, "'b':(2)4"."""
  sizes = {name: int(size) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", mesh)}
  parts: list[int] = []
  inside: list[bool] = []
  chosen = {
    name: (int(before or 1), int(size or sizes[name]))
    for name, before, size in re.findall(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?", axes)
  }
  for name, size in sizes.items():
    before, part = chosen.get(name, (size, 1))
    parts += [before, part, size // (before * part)]
    inside += [False, name in chosen, False]
  order = np.argsort(inside, kind="stable")
  count = int(np.prod([part for part, is_chosen in zip(parts, inside) if is_chosen]))
  return ids.reshape(parts).transpose(order).reshape(-1, count)


def _received(kind: str, result: str, group: int) -> int:
  """Returns the bytes that a device receives, at least, in one collective with this result."""
  size = _bytes(result)
  if kind == "reduce-scatter":
    return size * (group - 1)
  if kind == "collective-permute":
    return size
  share = size * (group - 1) // group
  return 2 * share if kind == "all-reduce" else share
