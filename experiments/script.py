"""Helpers of scripts with argparse options: the parser, types of options, and the exit code."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable

from sparsek.command_line import path_flags
from sparsek.errors import RunError, UsageError
from sparsek.storage import files


def parser(description: str) -> argparse.ArgumentParser:
  """Returns an empty parser whose --help begins with a module's docstring."""
  as_written = argparse.RawDescriptionHelpFormatter
  return argparse.ArgumentParser(description=description, formatter_class=as_written)


def page_parser(description: str, page: str) -> argparse.ArgumentParser:
  """Returns the parser of a script that writes a page: `path` is the file, by default `page`."""
  made = parser(description)
  made.add_argument(
    "path", nargs="?", default=os.path.relpath(page), type=output, metavar="FILE", help="to write"
  )
  return made


def path(text: str) -> str:
  """Returns a path, for argparse; a relative one stays relative, since records are published."""
  try:
    return path_flags.parse_path(text, absolute=False)
  except ValueError as error:
    raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def output(text: str) -> str:
  """Returns the path of a file to write, for argparse, in a folder that exists."""
  given = path(text)
  if not os.path.isdir(os.path.dirname(given) or "."):
    raise argparse.ArgumentTypeError(f"{text}: there is no folder {os.path.dirname(given)}")
  return given


def words(text: str) -> str:
  """Returns flags in one string, for argparse, which `shlex.split` can split into words."""
  try:
    shlex.split(text)
  except ValueError as error:
    raise argparse.ArgumentTypeError(f"{text}: {error}") from None
  return text


def run(main: Callable[[argparse.Namespace], object], options: argparse.ArgumentParser) -> None:
  """Calls `main` with the options; exits with 2 for a UsageError and 1 for a RunError."""
  files.let_stdout_take_any_text()
  try:
    main(options.parse_args())
  except (UsageError, RunError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2 if isinstance(error, UsageError) else 1)
