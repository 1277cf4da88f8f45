"""Commands of the project; `python -m experiments.NAME --help` describes one."""

import os
import signal
import sys

from sparsek.command_line import invocation


def _quit(number: int, frame: object) -> None:
  """Ends the process at once, with one line: there is nothing to save yet."""
  os.write(2, b"interrupted\n")
  os._exit(130)  # the shell's code: 128 + SIGINT


# The imports of a command take seconds, and a KeyboardInterrupt in the middle of them ends in a
# traceback or in another error. `sparsek.command_line.main.run` allows it again while main runs.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
  signal.signal(signal.SIGINT, _quit)
# `python -m experiments.NAME` imports this module under this name, `sparsek NAME` under another.
if sys.argv[0] == "-m" and __name__ == "experiments":
  os.environ.setdefault(invocation.STARTED_BY, invocation.IN_CHECKOUT)
