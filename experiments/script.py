"""Helpers of scripts with argparse options: the parser, types of options, and the exit code."""

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable

from sparsek.command_line import outputs, path_flags
from sparsek.errors import RunError, UsageError
from sparsek.storage import files


def parser(description: str) -> argparse.ArgumentParser:
  """Returns an empty parser whose --help begins with a module's docstring."""
  as_written = argparse.RawDescriptionHelpFormatter
  return argparse.ArgumentParser(description=description, formatter_class=as_written)


def page_parser(description: str, page: str, generator: str) -> argparse.ArgumentParser:
  """Returns the parser of a script that writes a page: `path` is the file, by default `page`.

  Args:
    description: the docstring of the script.
    page: path of the page.
    generator: name of the script, by which its pages say that they are generated.
  """
  made = parser(description)
  written = Output(outputs.text(f"page of {generator}", f"generated: `python -m {generator}`"))
  made.add_argument(
    "path", nargs="?", default=os.path.relpath(page), type=written, metavar="FILE", help="to write"
  )
  return made


def path(text: str) -> str:
  """Returns a path, for argparse; a relative one stays relative, since records are published."""
  try:
    return path_flags.parse_path(text, absolute=False)
  except ValueError as error:
    raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def paths(text: str) -> str:
  """Returns paths separated by commas, for argparse."""
  return ",".join(map(path, text.split(",")))


@dataclasses.dataclass(frozen=True)
class Output:
  """Type of an option that names a file to write, for argparse.

  Its folder must exist, and an existing file must be of the script's kind.

  Attributes:
    kind: of the file.
    has_picture: a picture of the same name, .png, is written too.
  """

  kind: outputs.Kind
  has_picture: bool = False

  def __call__(self, text: str) -> str:
    given = path(text)
    if not os.path.isdir(os.path.dirname(given) or "."):
      raise argparse.ArgumentTypeError(f"{text}: there is no folder {os.path.dirname(given)}")
    try:
      outputs.check(text, given, self.kind)
      if self.has_picture:
        picture = outputs.picture_of(given)
        outputs.check(f"{text}: its picture {picture}", picture, outputs.PICTURE)
    except UsageError as error:
      raise argparse.ArgumentTypeError(str(error)) from None
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
