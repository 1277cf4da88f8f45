"""Commands: `python -m experiments.NAME --help`."""

import os
import signal
import sys


def _quit(number: int, frame: object) -> None:
  """Ends the process at once, with one line: nothing is there to be saved yet."""
  os.write(2, b"interrupted\n")
  os._exit(130)  # as a shell says it: 128 + SIGINT


# The imports of a command take seconds, and a KeyboardInterrupt in the middle of them becomes a
# traceback, or another error. While main runs, `sparsek.command_line.main.run` lets it be raised.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
  signal.signal(signal.SIGINT, _quit)
