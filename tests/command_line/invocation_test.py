"""Commands in messages: the user can type them as they are shown."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

from sparsek import programs
from sparsek.command_line import invocation
from sparsek.data.corpus import Document
from sparsek.data.token_files import open_token_files, write_token_files
from sparsek.data.tokenizer import ByteTokenizer
from sparsek.errors import RunError, UsageError
from sparsek.evaluation.heldout import Run, other_beginning
from tests.helpers import SMALLEST

ROOT = pathlib.Path(__file__).resolve().parents[2]
# --help shows what these hold by `as_typed`.
TEXTS_OF_FLAGS = {"training_flags.py", "flags.py"}
# Names of modules and folders.
NO_MESSAGES = {"sparsek/__main__.py", "sparsek/command_line/invocation.py"}


@pytest.mark.parametrize(
  "started_by, prepare_data",
  [
    (None, "sparsek prepare-data"),
    ("python -m sparsek", "python -m sparsek prepare-data"),
    (invocation.IN_CHECKOUT, "python -m experiments.prepare_data"),
  ],
)
def test_commands_are_shown_as_this_process_was_started(started_by, prepare_data, monkeypatch):
  monkeypatch.delenv(invocation.STARTED_BY, raising=False)
  if started_by:
    monkeypatch.setenv(invocation.STARTED_BY, started_by)
  text = "`python -m experiments.prepare_data`, experiments.prepare_data, a/experiments.b"
  assert invocation.as_typed(text) == f"`{prepare_data}`, {prepare_data}, a/experiments.b"
  assert invocation.as_typed("experiments/c, experiments.c.d") == "experiments/c, experiments.c.d"
  typed = invocation.command("prepare_data", "--verify=my data", "--k=1")
  assert typed == f"{prepare_data} '--verify=my data' --k=1"


@pytest.mark.slow
@pytest.mark.parametrize(
  "started, shown",
  [
    (("-m", "experiments.pretrain"), "python -m experiments.prepare_data"),
    (("-m", "sparsek.experiments.pretrain"), "sparsek prepare-data"),
    (("-m", "sparsek", "pretrain"), "python -m sparsek prepare-data"),
    (
      ("-c", "import sparsek; sparsek.train(sparsek.preset('tiny'), 'nowhere', 'w')"),
      "sparsek prepare-data",
    ),
  ],
)
def test_a_process_knows_how_it_was_started(started, shown, tmp_path):
  flags = () if started[0] == "-c" else ("--data=nowhere", "--workdir=w")
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  environment.pop(invocation.STARTED_BY, None)
  done = subprocess.run(
    [sys.executable, *started, *flags],
    cwd=tmp_path,
    env=environment,
    text=True,
    capture_output=True,
  )
  assert done.returncode and f"no such folder; make it with `{shown}`, or" in done.stderr


def messages(path: pathlib.Path) -> list[str]:
  """Returns the literal texts of a module that are no docstrings."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
  return [
    node.value
    for node in ast.walk(tree)
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
    if id(node) not in statements
  ]


def test_messages_of_the_library_take_commands_from_one_function():
  paths = [path for folder in ("sparsek", "kernels") for path in (ROOT / folder).rglob("*.py")]
  assert len(paths) > 100
  for path in paths:
    name = str(path.relative_to(ROOT))
    if name not in NO_MESSAGES and path.name not in TEXTS_OF_FLAGS:
      for text in messages(path):
        assert invocation.as_typed(text, "sparsek") == text and "experiments." not in text, name


def test_advice_from_python_names_the_program(tmp_path, monkeypatch):
  monkeypatch.delenv(invocation.STARTED_BY, raising=False)
  tokenizer, folder = ByteTokenizer(), tmp_path / "my data"
  documents = [Document(str(i), f"Document {i}.", i % 2 == 0) for i in range(8)]
  write_token_files(str(folder), documents, tokenizer)
  record = {"data": {"data": ""}, "tokenizer": {"bos_ids": [65]}}
  imported = Run("run", SMALLEST, record)
  advice = [other_beginning(imported, tokenizer)]
  split = open_token_files(str(folder)).split("train")
  monkeypatch.setattr(split, "vocab_size", 65)
  (folder / "meta.json").write_text("{")
  for wrong in (
    imported.open_data,
    lambda: programs.train(SMALLEST, tmp_path / "nowhere", tmp_path / "run"),
    lambda: open_token_files(str(folder)),
    lambda: split.check_ids(0),
  ):
    with pytest.raises((UsageError, RunError)) as caught:
      wrong()
    advice.append(str(caught.value))
  for text in advice:
    assert "`sparsek prepare-data" in text and "experiments" not in text, text
