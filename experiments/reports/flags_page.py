"""Page docs/flags.md: `python -m experiments.reports.flags_page` makes it from the commands."""

import argparse
import importlib
import os
import re
from collections.abc import Iterator

from absl import flags as absl_flags

from sparsek.command_line import help
from sparsek.command_line.help import FlagHelp
from sparsek.command_line.invocation import as_typed
from sparsek.experiments import script
from sparsek.experiments.reports import records
from sparsek.storage import files

PAGE = os.path.join(os.path.dirname(records.FOLDER), "..", "docs", "flags.md")
COMMANDS = (
  "prepare_data",
  "pretrain",
  "evaluate",
  "evaluate_tasks",
  "evaluate_ruler",
  "evaluate_humaneval",
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


def _allowed(flag: absl_flags.Flag) -> str:
  """Returns which values a flag takes, where its help does not say so itself."""
  return "" if isinstance(flag, absl_flags.EnumFlag) else flag.parser.syntactic_help or ""


def _escaped(text: str) -> str:
  """Returns text in which Markdown leaves stars, underscores and angle brackets alone."""
  return re.sub(r"([*_<>\[\]|])", r"\\\1", as_typed(" ".join(text.split()), "sparsek"))


def entry(flag: FlagHelp, allowed: str) -> str:
  """Returns the lines of a flag: name and default, then what it means and takes."""
  head = f"**`--{flag.name}`**" + f", by default `{flag.default}`" * bool(flag.default)
  fields = re.split(r"\n(?=\S+ \()", flag.text)  # those of --model come one a line
  text = _escaped(fields[0])
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
  yield as_typed(" ".join((module.__doc__ or "").strip().split("\n\n")[0].split()), "sparsek")
  for title, flags in help.groups(module.FLAGS).items():
    yield f"### {name}: {title}"
    yield from (entry(flag, _allowed(module.FLAGS[flag.name])) for flag in flags)


def page() -> str:
  """Returns the whole page."""
  parts = [HEAD, *(part for name in COMMANDS for part in section(name))]
  return "\n\n".join(parts) + "\n"


def main(options: argparse.Namespace) -> None:
  """Writes the page."""
  files.save(options.path, page())


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the script's argument."""
  return script.page_parser(__doc__, PAGE, "experiments.reports.flags_page")


if __name__ == "__main__":
  script.run(main, make_parser())
