"""The way a command was started, so that messages show commands as the user can type them.

Messages take commands from `command`. Docstrings and the texts of flags name them as in a checkout:
"python -m experiments.pretrain", or "experiments.pretrain" within a sentence; `as_typed` turns
these into "sparsek pretrain", except where `python -m experiments.NAME` was started.
"""

import os
import re
import shlex

STARTED_BY = "SPARSEK_STARTED_BY"  # environment variable, which child processes inherit
IN_CHECKOUT = "python -m experiments"  # a value of STARTED_BY
CHILD = "SPARSEK_CHILD"  # environment variable of commands that another command started
_COMMAND = re.compile(r"(?<![\w./])(?:python -m )?experiments\.([a-z]\w*)(?!\w*(?:\.\w|/))")


def command(name: str, *arguments: str, program: str | None = None) -> str:
  """Returns how a command is typed: "sparsek prepare-data" or "python -m experiments.prepare_data".

  Args:
    name: of the module, such as "prepare_data".
    arguments: of the command, which are quoted where a shell needs it.
    program: by default the one this command was started by, and "sparsek" from Python.
  """
  program = program or os.environ.get(STARTED_BY, "sparsek")
  words = f"{program}.{name}" if program == IN_CHECKOUT else f"{program} {name.replace('_', '-')}"
  return " ".join((words, *map(shlex.quote, arguments)))


def by_user() -> bool:
  """Returns whether the user started this command, and no other command did."""
  return CHILD not in os.environ


def as_typed(text: str, program: str | None = None) -> str:
  """Returns a text with its commands as they are typed; `program` is that of `command`."""
  return _COMMAND.sub(lambda match: command(match[1], program=program), text)
