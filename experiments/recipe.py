"""Recipes: flagfiles of experiments, to read, copy and train with.

  python -m experiments.recipe
  python -m experiments.recipe tiny_stdlib > tiny.flags

Without a name it lists them. A recipe is used as --flagfile=tiny.flags by the command that its
first lines show, or as --flagfile=tiny_stdlib; flags of the command line replace those of the file.
"""

import importlib.resources
import re
import sys

from absl import flags as absl_flags

from sparsek.command_line.invocation import as_typed
from sparsek.command_line.main import run
from sparsek.errors import UsageError

FLAGS = absl_flags.FlagValues()  # none: the name is an argument


def texts() -> dict[str, str]:
  """Returns the text of each recipe by its name."""
  folder = importlib.resources.files("sparsek.experiments.recipes")
  files = sorted(folder.iterdir(), key=lambda file: file.name)
  found = {file.name: file for file in files if file.name.endswith(".flags")}
  return {
    name.removesuffix(".flags"): file.read_text(encoding="utf-8") for name, file in found.items()
  }


def summary(text: str) -> str:
  """Returns the first comment of a flagfile, without its mark."""
  return next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "")


def show(name: str) -> None:
  """Prints a recipe."""
  recipes = texts()
  known = name.removesuffix(".flags")
  if known not in recipes:
    raise UsageError(f"there is no recipe {name!r}: must be one of {', '.join(recipes)}")
  print(as_typed(re.sub(r"experiments/recipes/(\w+)\.flags", r"\1", recipes[known])), end="")


def main() -> None:
  """Prints the names of all recipes."""
  for name, text in texts().items():
    print(f"{name:24}{summary(text)}")


if __name__ == "__main__":
  if len(sys.argv) == 2 and not sys.argv[1].startswith("-"):
    recipe_name = sys.argv.pop()
    run(lambda: show(recipe_name), FLAGS)
  run(main, FLAGS)
