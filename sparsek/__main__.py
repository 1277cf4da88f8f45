"""The program `sparsek`: `sparsek NAME FLAGS` runs a command, a module in experiments/.

A command is a module whose docstring has a line that begins "  python -m experiments.NAME". No
command is imported before it is chosen.
"""

import ast
import difflib
import importlib.util
import os
import pathlib
import re
import runpy
import shlex
import shutil
import sys

import sparsek
from sparsek.command_line.invocation import STARTED_BY

FIRST = (
  *("demo", "prepare_data", "pretrain", "evaluate", "evaluate_tasks", "evaluate_ruler"),
  *("generate", "ablate"),
)
WIDTH = 80  # columns of a command's sentence
HOME = "https://github.com/sparsek/sparsek"


def commands() -> dict[str, str]:
  """Returns the modules of all commands and the first sentence of each docstring."""
  spec = importlib.util.find_spec("sparsek.experiments")
  found = {}
  for folder in spec.submodule_search_locations or () if spec else ():
    for path in sorted(pathlib.Path(folder).glob("*.py")):
      text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
      if re.search(rf"^ +python -m experiments\.{path.stem}\b", text, re.MULTILINE):
        found[path.stem] = _short(text.partition("\n\n")[0].replace("\n", " ").rstrip("."))
  order = (*(name for name in FIRST if name in found), *found)
  return {name: found[name] for name in order}


def _short(sentence: str) -> str:
  """Returns a sentence without its last clauses, or words, where it is too long for a line."""
  for ends in (r"[,:] |$", r" "):
    kept = [match.start() for match in re.finditer(ends, sentence) if match.start() <= WIDTH]
    if kept:
      return sentence[: kept[-1]]
  return sentence


def overview(program: str) -> str:
  """Returns the text of `sparsek --help`."""
  lines = [
    f"SPARSEK {sparsek.__version__}: learned sparse attention in JAX. {program} COMMAND --help",
    "describes a command and its commonest flags, --helpfull all of them.",
    "",
    *(f"  {name.replace('_', '-') + ' ':16}{text}" for name, text in commands().items()),
    "",
    f"Begin with `{program} demo`, or train on the source of Python's standard library:",
    f"  {program} pretrain --workdir=runs/first --preset=tiny --num_steps=200",
    f"Documentation: {HOME}",
  ]
  return "\n".join(lines)


def _program(path: str) -> str:
  """Returns how the user can type this program again, given sys.argv[0]."""
  if path.endswith("__main__.py"):
    return "python -m sparsek"
  found = shutil.which("sparsek")
  return "sparsek" if found and os.path.samefile(found, path) else shlex.quote(path)


def main() -> None:
  """Runs the command that the first argument names, or prints what there is."""
  program = _program(sys.argv[0])
  given = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if given == "help" and len(sys.argv) > 2:
    given, sys.argv = sys.argv[2], [sys.argv[0], sys.argv[2], "--help"]
  if given in ("--help", "-h", "--helpfull", "help"):
    print(overview(program))
    return
  if given == "--version":
    print(f"sparsek {sparsek.__version__}")
    return
  names = [name.replace("_", "-") for name in commands()]
  if given.replace("_", "-") not in names:
    near = difflib.get_close_matches(given, names, 1, 0.5)
    meant = f"did you mean {near[0]}? " if near else ""
    print(f"error: {given!r} is no command; {meant}`{program} --help` lists all", file=sys.stderr)
    sys.exit(2)
  os.environ[STARTED_BY] = program
  sys.argv = ["-m", *sys.argv[2:]]  # as under `python -m`: see sparsek/experiments/__init__.py
  module = f"sparsek.experiments.{given.replace('-', '_')}"
  runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
