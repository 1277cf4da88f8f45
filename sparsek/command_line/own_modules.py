"""The flag --import: modules of the user that register scorers and kinds of attention."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from sparsek.command_line.definer import Definer
from sparsek.errors import UsageError

NAME = "import"


def define_import_flag(flag_values: flags.FlagValues) -> None:
  """Defines --import, which commands need to read a model with a part that is not ours."""
  Definer(flag_values, "model").strings(
    NAME,
    "Python module, in the working directory or installed, that is imported first. It registers "
    "scorers and kinds of attention, which --scorer, --attention and configurations then accept "
    "(sparsek.model.registration). May be given several times. Commands that read the run need it "
    "too.",
  )


def given(flag_values: flags.FlagValues) -> list[str]:
  """Returns the flags --import=MODULE of a command line, for other commands on the same model."""
  modules: Any = flag_values[NAME].value
  return [f"--{NAME}={module}" for module in modules]


def import_named(arguments: Sequence[str]) -> None:
  """Imports the modules that --import names, before the flags that may depend on them are parsed.

  The working directory comes last in the search for them.

  Args:
    arguments: a command line without the program's name and without flagfiles.
  Raises:
    UsageError: for a module that there is not, or whose code raises an exception.
  """
  words = list(arguments)
  for word, following in zip(words, [*words[1:], ""]):
    name, equals, value = word.lstrip("-").partition("=")
    if word.startswith("-") and name == NAME:
      _import(value if equals else following)


def _import(name: str) -> None:
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  if name in sys.modules:
    return
  try:
    importlib.import_module(name)
  except Exception as error:  # of any code that the user wrote
    missing = isinstance(error, ModuleNotFoundError) and error.name in (name, name.split(".")[0])
    text = (
      f"there is no module of this name in {os.getcwd()} or among installed packages"
      if missing or not name or name.startswith(".")
      else f"importing it raised {type(error).__name__}: {error}"
    )
    raise UsageError(f"--import={name}: {text}") from error
