"""Every flag is used: it occurs in a test, a document or a recipe."""

import importlib
import pathlib
import re

import pytest

from sparsek.command_line.definer import names_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMANDS = (
  "ablate",
  "benchmark",
  "demo",
  "demo_text",
  "evaluate",
  "evaluate_humaneval",
  "evaluate_ruler",
  "evaluate_tasks",
  "generate",
  "import_hf",
  "layer_reach",
  "plot",
  "prepare_data",
  "pretrain",
)
WHERE = ("README.md", "docs/**/*.md", "experiments/recipes/*.flags", "tests/**/*.py")


def flags_of(command: str) -> list[str]:
  module = importlib.import_module(f"experiments.{command}")
  return names_of(module.FLAGS)


def used() -> set[str]:
  """Returns the flags that occur as --NAME or --noNAME."""
  paths = (path for pattern in WHERE for path in ROOT.glob(pattern))
  texts = (path.read_text(encoding="utf-8") for path in paths)
  words = {word for text in texts for word in re.findall(r"--([a-z_0-9]+)", text)}
  return words | {word.removeprefix("no") for word in words}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_occurs_in_a_test_or_a_document(command):
  assert sorted(set(flags_of(command)) - used()) == []


def test_a_flag_that_nobody_uses_is_found():
  assert "k" in used() and "scan_layers" in used() and "-".join(("a", "b")) not in used()
