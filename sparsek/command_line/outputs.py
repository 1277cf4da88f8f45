"""Files and folders that commands write where a flag says.

No file that a user or a run keeps is replaced, and no folder holds the outputs of two kinds.
"""

import dataclasses
import glob
import os
from collections.abc import Callable, Sequence

from sparsek.errors import UsageError
from sparsek.storage import files, new_folder

RUN = "model.json"  # a folder that holds it is a run's
OF_RUNS = (  # what a run keeps in its folder
  *(RUN, "flags.txt", "versions.json", "metrics.jsonl", "evaluation.jsonl", "tasks.jsonl"),
  *("ruler.jsonl", "humaneval.jsonl", "lock"),
  *("checkpoints", "tokenizer", "set_aside", "profile", "wandb", "wandb.json"),
)
_HEAD = 4096  # bytes that tell a kind of file
# Kinds of folders, by patterns of files that tell them.
A_RUN, A_GRID, STAGES, DEMOS = "a run", "a grid", "stages of a recipe", "the demos"
A_MODEL = "a model in Hugging Face's format"
FOLDERS = {
  A_RUN: (RUN, "metrics.jsonl", "checkpoints"),
  A_GRID: ("cells",),
  "cells of a grid": ("*/result.json",),
  STAGES: ("stages.json", "minutes.json"),
  DEMOS: ("documents/tokens.bin", "text_sparsek"),
  "token files": ("tokens.bin",),
  A_MODEL: ("model*.safetensors",),
}
_RUNS_BELOW = (f"*/{RUN}", f"*/cells/*/{RUN}")  # a folder that holds them is one of runs or grids


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of file that a command makes, and may replace.

  Attributes:
    name: for messages, such as "record of experiments.benchmark".
    matches: returns whether the file of this path is of the kind.
  """

  name: str
  matches: Callable[[str], bool]


def record(name: str, *keys: str, no_others: bool = False) -> Kind:
  """Returns the kind of the JSON objects that have these keys, and perhaps no others."""

  def matches(path: str) -> bool:
    try:
      known = set(files.read_json_object(path))
    except UsageError:
      return False
    return known == set(keys) if no_others else known >= set(keys)

  return Kind(name, matches)


def text(name: str, *words: str) -> Kind:
  """Returns the kind of the files that have one of these words near their beginning."""
  return Kind(name, lambda path: any(word.encode() in head(path) for word in words))


# Matplotlib signs what it writes.
PICTURE = text("picture that Matplotlib drew", "Matplotlib")


def head(path: str) -> bytes:
  """Returns the first bytes of a file, which tell its kind."""
  with open(path, "rb") as file:
    return file.read(_HEAD)


def check(named: str, path: str, kind: Kind) -> None:
  """Raises UsageError, before long work, where a command must not write a file.

  Args:
    named: what names the file, such as "--record=a.json".
    path: of the file.
    kind: that the file has; an existing one of another kind is refused, unless it is empty.
  Raises:
    UsageError: also for a path that a run keeps, and where nothing can be written.
  """
  files.check_writable(path)
  run = _run_that_keeps(path)
  if run is not None:
    raise UsageError(f"{named} is a file of the run in {run}: take another name")
  try:
    is_other = os.path.lexists(path) and os.path.getsize(path) and not kind.matches(path)
  except OSError as error:
    raise UsageError(f"{named} cannot be read: {files.reason_of(error)}") from None
  if is_other:
    raise UsageError(
      f"{named} exists and is no {kind.name}: it would be lost; take another name or move it"
    )


def check_record(flag: str, path: str, kind: Kind, has_picture: bool) -> None:
  """Raises UsageError where a record, and the picture beside it, must not be written.

  Args:
    flag: the name of the flag that holds the path.
    path: of the record, which ends in .json.
    kind: of the record.
    has_picture: a picture of the same name, .png, is written too.
  """
  check_name(flag, path)
  check(f"--{flag}={path}", path, kind)
  if has_picture:
    check_picture(flag, path)


def check_name(flag: str, path: str) -> None:
  """Raises UsageError unless a flag names a .json file in a folder that exists."""
  if not (path.endswith(".json") and os.path.isdir(os.path.dirname(path) or ".")):
    raise UsageError(f"--{flag}={path}: must be a .json file in a folder that exists")


def check_picture(flag: str, path: str) -> None:
  """Raises UsageError where the picture beside a record must not be written."""
  check(f"--{flag}={path}: its picture {picture_of(path)}", picture_of(path), PICTURE)


def check_folder(named: str, path: str, kind: str, alone: bool = False) -> None:
  """Raises UsageError where a command must not write into a folder, since another kind is there.

  A folder in which both kinds lie already is accepted, so that its runs can go on. Otherwise a run
  holds no folder that another command makes, and no run has runs or grids in its folder.

  Args:
    named: what names the folder, such as "--workdir=runs/a".
    path: of the folder; need not exist.
    kind: of FOLDERS, that the command makes.
    alone: refuse a folder without the kind if it holds anything else, hidden files excepted.
  """
  held = _kinds_of(path)
  if kind in held:
    return
  for other, file in held.items():
    raise UsageError(f"{named} holds {other} ({file}), and not {kind}: give another folder")
  names = [name for name in _names_in(named, path) if not name.startswith(".")]
  if names and alone:
    raise UsageError(f"{named} holds {names[0]} and is not {kind}: give a new folder")
  run = os.path.dirname(os.path.realpath(path))
  if all(os.path.exists(os.path.join(run, name)) for name in (RUN, "checkpoints")):
    raise UsageError(f"{named} lies in the run {run}: give a folder outside it")
  below = _first(path, _RUNS_BELOW) if kind == A_RUN else None
  if below:
    raise UsageError(f"{named} holds a folder of runs ({below}): give another folder")


def check_new_folder(flag: str, path: str) -> None:
  """Raises UsageError unless a flag names a folder that is new or empty."""
  for kind, file in _kinds_of(path).items():
    raise UsageError(f"--{flag}={path} holds {kind} ({file}): give a new folder")
  try:
    new_folder.check_new_folder(path)
  except UsageError as error:  # which begins with the path
    raise UsageError(f"--{flag}={error}") from None


def _kinds_of(path: str) -> dict[str, str]:
  """Returns the kinds of FOLDERS that a folder holds, each with a file that tells it."""
  held = {kind: _first(path, patterns) for kind, patterns in FOLDERS.items()}
  return {kind: file for kind, file in held.items() if file}


def _names_in(named: str, path: str) -> list[str]:
  """Returns the names in a folder, or none where it does not exist.

  Raises:
    UsageError: for a file, and where it cannot be read.
  """
  try:
    return sorted(os.listdir(path))
  except FileNotFoundError:
    return []
  except OSError as error:
    reason = "is a file" if os.path.isfile(path) else f"cannot be read: {files.reason_of(error)}"
    raise UsageError(f"{named} {reason}: give a folder") from None


def _first(path: str, patterns: Sequence[str]) -> str | None:
  """Returns a path in a folder, relative to it, that has one of these patterns; None: no such."""
  paths = (glob.glob(os.path.join(glob.escape(path), pattern)) for pattern in patterns)
  found = next(filter(None, paths), None)
  return os.path.relpath(found[0], path) if found else None


def picture_of(path: str) -> str:
  """Returns the path of the picture beside a record."""
  return os.path.splitext(path)[0] + ".png"


def _run_that_keeps(path: str) -> str | None:
  """Returns the folder of the run that keeps a file of this path, or None."""
  folder, name = os.path.split(os.path.realpath(path))
  while name:
    if name in OF_RUNS and os.path.isfile(os.path.join(folder, RUN)):
      return folder
    folder, name = os.path.split(folder)
  return None
