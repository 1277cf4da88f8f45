"""Flagfiles: read before absl parses, so that the command line wins wherever `--flagfile` stands.

A line holds one flag; blank lines and lines that begin with # or // are skipped. Among flagfiles
the later one wins. The values of a flag that may be repeated come from one source: the command
line, or else the last file that has the flag. Each field of --model counts as a flag of its own,
and --attention and --layer_pattern, which exclude each other, as one.

A name that is no file may be that of a recipe, which the package holds.

Flags of earlier versions are read, in files and on the command line, as what replaced them.
"""

import codecs
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence

from absl import flags

from sparsek.config import TransformerConfig
from sparsek.errors import UsageError
from sparsek.storage.files import local_path, read_at_most

COMMAND_LINE = "the command line"
MAX_BYTES, MAX_FILES = 2**20, 1000
RECIPES = os.path.join("experiments", "recipes")
_ONE_FLAG = {"layer_pattern": "attention"}  # flags that exclude each other count as one
_ADDED_UP = (None, "undefok")  # names whose values come from all sources
# Flags of version 0.1 that were renamed, and those that became fields of --model.
RENAMED = {"rivals": "baselines"}
TO_MODEL = (
  "positions",
  "max_positions",
  "rope_fraction",
  "rope_scaling",
  "norm",
  "qk_norm",
  "mlp",
  "use_bias",
  "out_bias",
  "mlp_bias",
  "parallel_residual",
  "tie_embeddings",
)
_MODEL_FIELDS = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
_FLAG_OF_FIELD = {"attention": "layer_pattern"}  # fields whose flag has another name
_NEXT_FIELD = re.compile(r",(?=\w+=)")  # a pattern of layers holds commas too
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def recipe_file(name: str) -> str | None:
  """Returns where the package has the recipe "tiny_stdlib", or None for no recipe's name.

  "experiments/recipes/tiny_stdlib.flags", its path in a checkout, is a name too.
  """
  folder, file = os.path.split(f"{name.removesuffix('.flags')}.flags")
  package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  path = os.path.join(package, RECIPES, file)
  return path if folder in ("", RECIPES) and os.path.isfile(path) else None


@dataclasses.dataclass(frozen=True)
class _Given:
  """A flag and where it was given.

  Attributes:
    name: the flag's name; None for an argument that is no flag.
    words: the arguments that give it, one or two.
    source: COMMAND_LINE, or the flagfile's path.
    number: the number of the source, since a file may be read twice; 0 is the command line.
  """

  name: str | None
  words: tuple[str, ...]
  source: str
  number: int

  @property
  def key(self) -> str | None:
    """The name under which it gives way to others, and they to it."""
    return _ONE_FLAG.get(self.name or "", self.name)

  @property
  def text(self) -> str:
    """The flag as one argument, such as "--k=8" or "--noscan_layers"."""
    return "--" + "=".join(self.words).lstrip("-")


class _Reader:
  """A reader of a command line and of the flagfiles that it names, in order."""

  def __init__(self, flag_values: flags.FlagValues, say: Callable[[str], object]):
    self._flag_values, self._say, self._count = flag_values, say, 0
    self.given: list[_Given] = []

  def read(
    self,
    arguments: Sequence[str],
    source: str = COMMAND_LINE,
    number: int = 0,
    parents: tuple[str, ...] = (),
  ) -> None:
    """Appends what `arguments` give to `given`."""
    for name, words in _split(arguments, self._flag_values):
      if name != "flagfile":
        self.given.append(_Given(name, words, source, number))
      elif path := "=".join(words).partition("=")[2]:
        self._read_file(path, parents)

  def _read_file(self, text: str, parents: tuple[str, ...]) -> None:
    path = self._find(local_path(text, "flagfile"), parents)
    *above, real = map(os.path.realpath, (*parents, path))
    if real in above:
      chain = " -> ".join((*parents[above.index(real) :], path))
      raise UsageError(f"--flagfile={text}: a flagfile that includes itself: {chain}")
    self._count += 1
    if self._count > MAX_FILES:
      raise UsageError(f"--flagfile={text}: more than {MAX_FILES} flagfiles include each other")
    self.read(_lines(path), path, self._count, (*parents, path))

  def _find(self, path: str, parents: tuple[str, ...]) -> str:
    """Returns the path of a flagfile: beside the one that names it, or in the working directory."""
    beside = os.path.join(os.path.dirname(parents[-1]), path) if parents else path
    if beside == path or not os.path.exists(beside):
      if not os.path.exists(path):
        recipe = recipe_file(path)
        if recipe is not None:
          self._say(f"--flagfile={path} is the recipe {recipe}")
          return recipe
        tried = " nor ".join(dict.fromkeys(map(os.path.abspath, (beside, path))))
        named = f", which {parents[-1]} names" if parents else ""
        raise UsageError(
          f"--flagfile={path}{named}: there is no file {tried}, and no recipe of that name"
        )
      return path
    if os.path.exists(path) and not os.path.samefile(path, beside):
      self._say(f"--flagfile={path} in {parents[-1]} is {beside}, not {os.path.abspath(path)}")
    return beside


def expand(
  arguments: Sequence[str],
  flag_values: flags.FlagValues,
  say: Callable[[str], object],
  place: str = COMMAND_LINE,
) -> list[str]:
  """Returns a command line's arguments with those of its flagfiles in place of `--flagfile`.

  Args:
    arguments: without the program's name.
    flag_values: the flags that are defined.
    say: takes a line for each flag of a file that has another value on the command line.
    place: what these lines call the command line.
  Raises:
    UsageError: naming the flagfile, where it cannot be read or includes itself.
  """
  reader = _Reader(flag_values, say)
  reader.read(arguments)
  winners: dict[str | None, int] = {}
  for given in reader.given:
    if winners.get(given.key) != 0:
      winners[given.key] = given.number
  in_files = {given.key: given for given in reader.given if given.number}
  for key, here in {given.key: given for given in reader.given if not given.number}.items():
    there = in_files.get(key)
    if there and key not in _ADDED_UP and there.text != here.text:
      say(f"{there.text} in {there.source} gives way to {here.text} of {place}")
  kept = [
    given for given in reader.given if given.name in _ADDED_UP or given.number == winners[given.key]
  ]
  kept.sort(key=lambda given: given.number == 0)  # files first: the sort is stable
  return [word for given in kept for word in given.words]


def _split(
  arguments: Sequence[str], flag_values: flags.FlagValues
) -> Iterator[tuple[str | None, tuple[str, ...]]]:
  """Yields (name, words) for every flag, as absl reads them, and (None, words) for the rest.

  Raises:
    UsageError: for `--flagfile` without a value.
  """
  arguments = list(arguments)
  while arguments:
    word = arguments.pop(0)
    name, equals, _ = word.lstrip("-").partition("=") if word[:1] == "-" else ("", "", "")
    if not name:  # absl reads no flags after such a word
      yield None, (word, *arguments)
      return
    if name.startswith("no") and not _is_known(name, flag_values):
      name = name[2:] if _is_known(name[2:], flag_values) else name
    if equals or not _takes_value(name, flag_values):
      yield from _current(name, (word,), flag_values)
    elif arguments:
      yield from _current(name, (word, arguments.pop(0)), flag_values)
    elif name == "flagfile":
      raise UsageError("--flagfile: the path of the file is missing")
    else:
      yield from _current(name, (word,), flag_values)


def _replacement(name: str, flag_values: flags.FlagValues) -> str | None:
  """Returns the flag that replaced `name` of an earlier version, or None for any other name."""
  flag = "model" if name in TO_MODEL else RENAMED.get(name, "")
  return flag if flag in flag_values and name not in flag_values else None


def _is_known(name: str, flag_values: flags.FlagValues) -> bool:
  return name in flag_values or _replacement(name, flag_values) is not None


def _takes_value(name: str, flag_values: flags.FlagValues) -> bool:
  """Returns whether the value of a flag may be the next word."""
  if _replacement(name, flag_values):
    return not isinstance(_MODEL_FIELDS.get(name), bool)
  is_value = name in flag_values and not flag_values[name].boolean
  return is_value or name in ("flagfile", "undefok")


def _current(
  name: str, words: tuple[str, ...], flag_values: flags.FlagValues
) -> Iterator[tuple[str, tuple[str, ...]]]:
  """Yields a flag as this version has it; the fields of --model one by one."""
  text, replacement = "=".join(words).lstrip("-"), _replacement(name, flag_values)
  spelled, equals, value = text.partition("=")
  if replacement == "model" and isinstance(_MODEL_FIELDS[name], bool) and not equals:
    yield _field(f"{name}={str(spelled == name).lower()}", flag_values)
  elif spelled != name:  # --noNAME: absl knows whether NAME is a boolean
    yield name, words
  elif replacement == "model":
    yield _field(text, flag_values)
  elif replacement:
    yield replacement, (f"--{replacement}{equals}{value}",)
  elif name == "model" and name in flag_values and equals:
    for part in _NEXT_FIELD.split(value):
      yield _field(part, flag_values)
  else:
    yield name, words


def _field(text: str, flag_values: flags.FlagValues) -> tuple[str, tuple[str, ...]]:
  """Returns the flag that "FIELD=VALUE" gives: the field's own, if it has one."""
  field, equals, value = text.partition("=")
  flag = _FLAG_OF_FIELD.get(field, field)
  if equals and field in _MODEL_FIELDS and flag in flag_values:
    return flag, (f"--{flag}={value}",)
  return f"model={field}", (f"--model={text}",)


def _lines(path: str) -> list[str]:
  """Returns the arguments that a flagfile holds.

  Raises:
    UsageError: naming the file, and the line and the byte that is no text.
  """
  text = _decode(read_at_most(path, MAX_BYTES, "--flagfile"), path)
  lines = (line.strip() for line in text.replace("\r", "\n").split("\n"))
  return [line for line in lines if line and not line.startswith(("#", "//"))]


def _decode(content: bytes, path: str) -> str:
  """Returns the text of a flagfile: UTF-8, or UTF-16 that begins with a byte order mark."""
  if content.startswith(_UTF16):
    try:
      return content.decode("utf-16")
    except UnicodeDecodeError as error:
      raise UsageError(
        f"--flagfile={path}: not UTF-16 at byte {error.start}, though it begins as such a file"
      ) from None
  start = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
  bad = content.find(b"\0")
  try:
    text = content[start:].decode("utf-8")
    if bad < 0:
      return text
  except UnicodeDecodeError as error:
    bad = start + error.start
  line = content.count(b"\n", 0, bad) + 1
  raise UsageError(
    f"--flagfile={path}, line {line}: byte 0x{content[bad]:02x} at offset {bad} is "
    "no UTF-8 text; save the file as UTF-8"
  )
