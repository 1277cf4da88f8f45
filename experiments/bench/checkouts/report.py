"""Tables of programs and times of two checkouts."""

import hashlib
import itertools
import os
import random
import re
import statistics
from collections.abc import Sequence
from typing import NamedTuple

SUITES = ("attention", "train", "decode")
RESAMPLES = 2000
SHOWN_DIFFERENCES = 3
SHOWN_WIDTH = 150

_MODULE = re.compile(r"^module @\S+", re.MULTILINE)
_LOCATION_LINE = re.compile(r"^#loc.*\n", re.MULTILINE)
_LOCATION = re.compile(r'\s*\bloc\((?:#loc\d*|unknown|"[^"]*"(?:\(#loc\d*\))?)\)')
_RESULT_NAME = re.compile(r'(jax\.result_info = )"(?:[^"\\]|\\.)*"')
_SYMBOL = r'@("(?:[^"\\]|\\.)*"|[\w.$-]+)'
_PRIVATE = re.compile(r"func\.func private " + _SYMBOL)
_KERNEL_NAME = re.compile(r"^module @([\w.$-]+)", re.MULTILINE)


def canonical(text: str) -> str:
  """Returns the text of a program without locations and without names that Python code gave.

  Private functions are called f0, f1, ... in the order in which the text first mentions them.
  """
  text = _LOCATION.sub("", _LOCATION_LINE.sub("", text))
  text = _RESULT_NAME.sub(r'\1""', _MODULE.sub("module", text))
  private = set(_PRIVATE.findall(text))
  names: dict[str, str] = {}

  def rename(match: re.Match) -> str:
    name = match[1]
    return "@" + names.setdefault(name, f"f{len(names)}") if name in private else match[0]

  return re.sub(_SYMBOL, rename, text)


def canonical_kernel(text: str) -> str:
  """Returns the text of a kernel's module without the name that its Python function gave it."""
  match = _KERNEL_NAME.search(text)
  if match is None:
    return text
  name = re.escape(match[1])
  return re.sub(
    rf'(@|sym_name = "){name}(?![\w.$-])|(sym_name = "){name}(?=_mosaic_gpu")',
    lambda use: f"{use[1] or use[2]}kernel",
    text,
  )


def digest(text: str) -> str:
  """Returns the SHA-256 of a text, in hexadecimal."""
  return hashlib.sha256(text.encode()).hexdigest()


def first_differences(before: str, after: str) -> list[str]:
  """Returns lines that show the first places where two texts differ."""
  lines = []
  pairs = itertools.zip_longest(before.splitlines(), after.splitlines(), fillvalue="(no line)")
  different = ((number, pair) for number, pair in enumerate(pairs, 1) if pair[0] != pair[1])
  for number, (old, new) in itertools.islice(different, SHOWN_DIFFERENCES):
    column = len(os.path.commonprefix([old, new]))
    start = max(column - SHOWN_WIDTH // 2, 0)
    lines.append(f"  line {number}, column {column + 1}")
    lines += [
      f"    {sign} {line[start : start + SHOWN_WIDTH].strip()}"
      for sign, line in (("-", old), ("+", new))
    ]
  return lines


class ProgramPair(NamedTuple):
  """One program from both checkouts: canonical texts, or the reasons why there is none."""

  name: str
  before: str | None
  after: str | None
  errors: tuple[str, ...] = ()

  @property
  def equal(self) -> bool:
    return self.before is not None and self.before == self.after


def pair_programs(name: str, before: dict, after: dict) -> ProgramPair:
  """Returns the pair of a program's two answers.

  Args:
    name: of the program.
    before, after: {"text", "kernels": [the text of each kernel]} or {"error"}.
  """
  old, new = [
    None
    if "error" in reply
    else "\n".join([canonical(reply["text"]), *map(canonical_kernel, reply["kernels"])])
    for reply in (before, after)
  ]
  errors = [
    f"{side}: {reply['error']}"
    for side, reply in (("before", before), ("after", after))
    if "error" in reply
  ]
  return ProgramPair(name, old, new, tuple(errors))


def program_table(pairs: Sequence[ProgramPair]) -> list[str]:
  """Returns a table of programs, and below it the first differing lines of those that differ."""
  width = max(len(pair.name) for pair in pairs)
  lines = [f"{'program':{width}}  equal  lines  sha256 before  sha256 after"]
  for pair in pairs:
    shown = ["failed" if text is None else digest(text)[:12] for text in pair[1:3]]
    length = "" if pair.before is None else pair.before.count("\n")
    verdict = "yes" if pair.equal else "NO"
    lines.append(f"{pair.name:{width}}  {verdict:5}  {length:>5}  {shown[0]:13}  {shown[1]}")
  for pair in pairs:
    if not pair.equal:
      lines += ["", f"{pair.name}:", *(f"  {error}" for error in pair.errors)]
      if pair.before is not None and pair.after is not None:
        lines += first_differences(pair.before, pair.after)
  return lines


class Comparison(NamedTuple):
  """Medians in milliseconds a call, the ratio after / before, and its 95 % interval."""

  before: float
  after: float
  ratio: float
  low: float
  high: float


def compare_samples(before: Sequence[float], after: Sequence[float]) -> Comparison:
  """Returns how the samples of two checkouts compare; those of one round have the same index.

  Args:
    before, after: seconds a call, one of each round.
  """

  def ratio(rounds):
    old, new = zip(*rounds, strict=True)
    return statistics.median(new) / statistics.median(old)

  rounds, generator = list(zip(before, after, strict=True)), random.Random(0)
  drawn = sorted(ratio(generator.choices(rounds, k=len(rounds))) for _ in range(RESAMPLES))
  outside = round(0.025 * RESAMPLES)
  old_ms, new_ms = (1e3 * statistics.median(samples) for samples in (before, after))
  return Comparison(old_ms, new_ms, ratio(rounds), drawn[outside], drawn[-1 - outside])


def time_table(rows: Sequence[dict]) -> list[str]:
  """Returns a table of operations.

  Args:
    rows: {"operation", "before": [seconds a call], "after": [...]} or {"operation", "error"}.
  """
  width = max(len(row["operation"]) for row in rows)
  lines = [f"{'operation':{width}}  before, ms  after, ms   ratio  95 % interval   rounds"]
  for row in rows:
    if "error" in row:
      lines.append(f"{row['operation']:{width}}  failed: {row['error']}")
      continue
    result = compare_samples(row["before"], row["after"])
    lines.append(
      f"{row['operation']:{width}}  {result.before:10.4f}  {result.after:9.4f}  "
      f"{result.ratio:6.4f}  {result.low:6.4f}..{result.high:6.4f}  "
      f"{len(row['before']):6}"
    )
  return lines


def record_row(row: dict) -> dict:
  """Returns what a record holds of a row of `time_table`: figures in ms, samples in seconds."""
  if "error" in row:
    return row
  result = compare_samples(row["before"], row["after"])
  return {
    "operation": row["operation"],
    "before_ms": result.before,
    "after_ms": result.after,
    "ratio": result.ratio,
    "interval": [result.low, result.high],
    "calls": row["calls"],
    "samples": {side: row[side] for side in ("before", "after")},
  }
