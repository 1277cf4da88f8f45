"""Page docs/flags.md: `python -m experiments.reports.flags_page` makes it from the commands."""

import argparse
import importlib
import os
import re
from collections.abc import Iterator

from absl import flags as absl_flags

from sparsek.command_line import definer
from sparsek.experiments import script
from sparsek.experiments.reports import records
from sparsek.storage import files

PAGE = os.path.join(os.path.dirname(records.FOLDER), "..", "docs", "flags.md")
COMMANDS = (
  "prepare_data",
  "pretrain",
  "evaluate",
  "evaluate_tasks",
  "generate",
  "import_hf",
  "layer_reach",
  "plot",
  "ablate",
  "benchmark",
)
HEAD = """# Flags

All flags of all commands, with their defaults. `sparsek NAME --help` prints the same. This page is
generated: `python -m experiments.reports.flags_page` writes it from the definitions of the flags.

A flag is written `--name=value`. Booleans also take the forms `--name` and `--noname`. Flags can be
read from files, `--flagfile=FILE`; those of the command line win."""


def groups(values: absl_flags.FlagValues) -> list[tuple[str, list[str]]]:
  """Returns (title, names of flags): of each part of --help, or one part without a title."""
  names = sorted(definer.names_of(values))
  order = getattr(definer, "GROUPS", ("",))
  group_of = getattr(definer, "group_of", lambda flag: "")
  parts = [(part, [name for name in names if group_of(values[name]) == part]) for part in order]
  return [part for part in parts if part[1]]


def _default(flag: absl_flags.Flag) -> str:
  """Returns the default of a flag as it is written on a command line; "" for none."""
  value = flag.default
  if value is None or value == [] or value == "":
    return ""
  if isinstance(value, bool):
    return str(value).lower()
  return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _allowed(flag: absl_flags.Flag) -> str:
  """Returns which values a flag takes, where its help does not say so itself."""
  if isinstance(flag, absl_flags.EnumFlag):
    return "one of " + ", ".join(f"`{value}`" for value in flag.parser.enum_values)
  return flag.parser.syntactic_help or ""


def _escaped(text: str) -> str:
  """Returns text in which Markdown leaves stars, underscores and angle brackets alone."""
  return re.sub(r"([*_<>\[\]|])", r"\\\1", " ".join(text.split()))


def entry(flag: absl_flags.Flag) -> str:
  """Returns the lines of a flag: name and default, then what it means and takes."""
  default = _default(flag)
  head = f"**`--{flag.name}`**" + f", by default `{default}`" * bool(default)
  help_text = re.sub(r"^<[^>]*>: ", "", flag.help or "")  # absl puts choices in front
  fields = re.split(r"\n(?=\S+ \()", help_text)  # those of --model come one a line
  text, allowed = _escaped(fields[0]), _allowed(flag)
  if allowed:
    text += f" ({allowed})"
  lines = [f"{head}  ", text]
  if len(fields) > 1:
    lines += ["", *(f"- {_escaped(field)}" for field in fields[1:])]
  return "\n".join(lines)


def section(command: str) -> Iterator[str]:
  """Yields the paragraphs of a command."""
  module = importlib.import_module(f"sparsek.experiments.{command}")
  name = command.replace("_", "-")
  yield f"## {name}"
  yield " ".join((module.__doc__ or "").strip().split("\n\n")[0].split())
  values = module.FLAGS
  for title, names in groups(values):
    if title:
      yield f"### {name}: {title}"
    yield from (entry(values[flag]) for flag in names)


def page() -> str:
  """Returns the whole page."""
  parts = [HEAD, *(part for command in COMMANDS for part in section(command))]
  return "\n\n".join(parts) + "\n"


def main(options: argparse.Namespace) -> None:
  """Writes the page."""
  files.save(options.path, page())


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the script's argument."""
  parser = script.parser(__doc__)
  default = os.path.relpath(PAGE)
  parser.add_argument(
    "path", nargs="?", default=default, type=script.output, metavar="FILE", help="to write"
  )
  return parser


if __name__ == "__main__":
  script.run(main, make_parser())
