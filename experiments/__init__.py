"""Commands: `python -m experiments.NAME --help`."""

import os
import signal
import sys


def _quit(number, frame) -> None:
  """Ends the process at once, with one line: there is nothing to be saved yet, or any more."""
  os.write(2, b"interrupted\n")
  os._exit(130)  # as a shell says it: 128 + SIGINT


# A command begins. Its imports take seconds, and in the middle of them Python's KeyboardInterrupt
# becomes a traceback, or another error. `sparsek.command_line.flags.run` raises it while main runs.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
  signal.signal(signal.SIGINT, _quit)
