"""The definition of flags of all types, in groups, and the text of flags in flagfiles."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from absl import flags

from sparsek.command_line import path_flags
from sparsek.config import (
  MAX_INT,
  DataConfig,
  FarRepeatRule,
  OptimizerConfig,
  Range,
  TrainConfig,
  TransformerConfig,
  check_choice,
  number_ranges,
)

# Flags with the name of a field have its range.
RANGES = number_ranges(TransformerConfig, DataConfig, OptimizerConfig, TrainConfig, FarRepeatRule)
# Flags that say where a process runs, and belong to no record of what it does.
OF_PROCESSES = (
  "coordinator_address",
  "num_processes",
  "process_id",
  "distributed",
  "process_timeout",
)

# Parts of --help, in its order; "command" are the flags that one command alone has.
GROUPS = ("command", "model", "scorer", "data", "training", "run", "devices")
_GROUP = "group"  # attribute of a flag


class _Number(flags.ArgumentParser):
  """A parser of numbers that says what is allowed.

  Unlike absl's own parsers it refuses nan and inf, and names the bounds in words.
  """

  def __init__(self, kind: type, allowed: Range):
    self.kind, self.allowed = kind, allowed
    self.syntactic_help = allowed.described(kind)

  def parse(self, argument: Any) -> Any:
    try:
      value = self.kind(argument)
    except (TypeError, ValueError, OverflowError):
      raise ValueError(f"must be {self.syntactic_help}") from None
    if isinstance(value, int) and value > MAX_INT and self.allowed.upper in (None, MAX_INT):
      raise ValueError(f"must be at most {MAX_INT}")
    if value not in self.allowed:
      raise ValueError(f"must be {self.syntactic_help}")
    return value

  def flag_type(self) -> str:
    return self.kind.__name__


class _Boolean(flags.BooleanParser):
  """A parser of true and false, which names both in its refusal."""

  def parse(self, argument: Any) -> bool:
    try:
      return super().parse(argument)
    except (TypeError, ValueError):
      raise ValueError("must be true or false") from None


class Definer:
  """A definer of flags on `flag_values`.

  Of several definitions of a name the first one counts, so that sets of flags may overlap.

  Args:
    flag_values: where to define them.
    group: the part of --help that lists them, one of GROUPS.
  """

  def __init__(self, flag_values: flags.FlagValues, group: str = GROUPS[0]):
    check_choice("group", group, GROUPS)
    self.flag_values, self.group = flag_values, group

  def _define(self, name: str, define: Callable, *args: Any, **kwargs: Any) -> None:
    if name not in self.flag_values:
      define(*args, flag_values=self.flag_values, **kwargs)
      setattr(self.flag_values[name], _GROUP, self.group)

  def _number(
    self, name: str, default: float | None, help_text: str, kind: type, bounds: Range
  ) -> None:
    parser = _Number(kind, RANGES.get(name, bounds) if bounds == Range() else bounds)
    serializer: flags.ArgumentSerializer = flags.ArgumentSerializer()
    self._define(name, flags.DEFINE, parser, name, default, help_text, serializer=serializer)

  def integer(
    self,
    name: str,
    default: int | None,
    help_text: str,
    lower: int | None = None,
    upper: int | None = None,
  ) -> None:
    """Defines a flag that holds an integer between `lower` and `upper`, both included.

    By default it has the range of the configurations' field of this name. No integer is above
    MAX_INT.
    """
    self._number(name, default, help_text, int, Range(lower, upper))

  def real(
    self,
    name: str,
    default: float | None,
    help_text: str,
    lower: float | None = None,
    upper: float | None = None,
  ) -> None:
    """Defines a flag that holds a finite number between `lower` and `upper`, both included.

    By default it has the range of the configurations' field of this name.
    """
    self._number(name, default, help_text, float, Range(lower, upper))

  def string(self, name: str, default: str | None, help_text: str) -> None:
    """Defines a flag that holds any text."""
    self._define(name, flags.DEFINE_string, name, default, help_text)

  def strings(self, name: str, help_text: str) -> None:
    """Defines a flag that may be given several times and holds a list, empty by default."""
    self._define(name, flags.DEFINE_multi_string, name, [], help_text)

  def words(self, name: str, default: Sequence[str], help_text: str) -> None:
    """Defines a flag that holds a list of words separated by commas."""
    self._define(name, flags.DEFINE_list, name, list(default), help_text)

  def path(self, name: str, default: str | None, help_text: str, **options: Any) -> None:
    """Defines a flag that holds a path; `options` are those of `path_flags.parse_path`."""
    self.flag(path_flags.path_flag(name, default, help_text, **options))

  def paths(self, name: str, help_text: str, **options: Any) -> None:
    """Defines a flag that holds a list of paths; `options` are those of `parse_paths`."""
    self.flag(path_flags.paths_flag(name, help_text, **options))

  def choice(self, name: str, default: str | None, choices: Sequence[str], help_text: str) -> None:
    """Defines a flag that holds one of `choices`; a list may grow until the flag is parsed."""
    self._define(name, flags.DEFINE_enum, name, default, list(choices), help_text)
    if isinstance(choices, list):
      parser: Any = self.flag_values[name].parser
      parser.enum_values = choices

  def boolean(self, name: str, default: bool | None, help_text: str) -> None:
    """Defines a flag that is given as --name, --noname, --name=true or --name=false."""
    flag = flags.BooleanFlag(name, default, help_text)
    flag.parser = _Boolean()
    self.flag(flag)

  def flag(self, flag: flags.Flag) -> None:
    """Defines a flag that was made elsewhere."""
    self._define(flag.name, flags.DEFINE_flag, flag)


def names_of(flag_values: flags.FlagValues) -> list[str]:
  """Returns the names of the flags that a `Definer` defined, in the order of their definition."""
  return [flag.name for flag in flag_values.flags_by_module_dict().get(__name__, [])]


def group_of(flag: flags.Flag) -> str:
  """Returns the part of --help that lists a flag which a `Definer` defined."""
  return getattr(flag, _GROUP)


def into_string(flag_values: flags.FlagValues) -> str:
  """Returns a flagfile that reproduces this command line, defaults spelled out, one flag a line.

  The flags of processes are left out.

  A --preset that was not given is left out where the model is that of another run or folder, since
  the two exclude each other.
  """
  names = [name for name in names_of(flag_values) if name not in OF_PROCESSES]
  if any(flag_values[name].value for name in ("init_from", "from") if name in names):
    names = [name for name in names if name != "preset" or flag_values[name].present]
  return "".join(line + "\n" for line in (flag_values[name].serialize() for name in names) if line)


def not_default(flag_values: flags.FlagValues, without: Collection[str] = ("workdir",)) -> str:
  """Returns the flags whose values are not the defaults, one a line, without some."""
  return "".join(
    flag_values[name].serialize() + "\n"
    for name in names_of(flag_values)
    if name not in (*without, *OF_PROCESSES)
    and flag_values[name].value != flag_values[name].default
  )
