"""The way a command was started, so that messages show commands as the user can type them.

Texts name commands as in a checkout: "python -m experiments.pretrain", or "experiments.pretrain"
within a sentence. `as_typed` turns them into "sparsek pretrain" where `sparsek` was started.
"""

import os
import re

STARTED_BY = "SPARSEK_STARTED_BY"  # environment variable, which child processes inherit
CHILD = "SPARSEK_CHILD"  # environment variable of commands that another command started
_COMMAND = re.compile(r"(?<![\w./])(?:python -m )?experiments\.([a-z]\w*)(?!\w*(?:\.\w|/))")


def command(name: str, program: str | None = None) -> str:
  """Returns how a command is typed: "sparsek prepare-data" or "python -m experiments.prepare_data".

  Args:
    name: of the module, such as "prepare_data".
    program: "sparsek"; by default as this command was started.
  """
  program = program or os.environ.get(STARTED_BY)
  return f"{program} {name.replace('_', '-')}" if program else f"python -m experiments.{name}"


def by_user() -> bool:
  """Returns whether the user started this command, and no other command did."""
  return CHILD not in os.environ


def as_typed(text: str, program: str | None = None) -> str:
  """Returns a text with its commands as they are typed; `program` is that of `command`."""
  return _COMMAND.sub(lambda match: command(match[1], program), text)
