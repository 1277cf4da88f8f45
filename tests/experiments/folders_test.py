"""Folders that commands write: none holds the outputs of two kinds."""

import pathlib
import shutil

import pytest

from sparsek.command_line import outputs
from sparsek.data.token_files import format as token_format
from sparsek.errors import UsageError
from sparsek.experiments import ablate, demo_commands, import_hf, prepare_data, pretrain
from sparsek.experiments.recipes import gguf_model, stages
from sparsek.experiments.reports import grid
from sparsek.runs import run_directory
from tests.helpers import run_command

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "version_0_1"
MADE = {  # kind of folder -> one that a command made
  outputs.A_RUN: "lora",
  outputs.A_GRID: "ablation",
  "cells of a grid": "ablation/cells",
  "token files": "bytes",
  outputs.A_MODEL: "hf",
}
RUN = str(FIXTURES / "lora")
COMMANDS = {  # words -> command, and the kind of folder that it makes in FOLDER
  "--workdir=FOLDER --data=/nowhere": (pretrain, outputs.A_RUN),
  "--workdir=FOLDER --more=--data=/nowhere": (ablate, outputs.A_GRID),
  f"--workdir=FOLDER --from={FIXTURES / 'hf'}": (import_hf, None),
  f"--workdir={RUN} --export=FOLDER": (import_hf, None),
  f"--sources={FIXTURES} --output=FOLDER": (prepare_data, None),
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("words", COMMANDS)
def test_no_command_writes_into_a_folder_of_another_kind(words, kind, tmp_path, capsys):
  command, made = COMMANDS[words]
  if made == kind:
    return  # goes on there
  folder = tmp_path / "there"
  shutil.copytree(FIXTURES / MADE[kind], folder)
  before = sorted(folder.rglob("*"))
  arguments = words.replace("FOLDER", str(folder)).split()
  assert run_command(command.main, command.FLAGS, *arguments) == 2
  told = capsys.readouterr()
  flag = next(word for word in arguments if word.endswith("there"))
  assert told.err.startswith(f"error: {flag} holds {kind} (") and told.out == ""
  assert "give another folder" in told.err if made else "give a new folder" in told.err
  assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("kind", MADE)
def test_a_folder_of_the_kind_and_a_plain_one_are_accepted(kind, tmp_path):
  outputs.check_folder("--workdir=x", str(FIXTURES / MADE[kind]), kind)
  (tmp_path / "notes.txt").write_text("mine")
  for path in (tmp_path, tmp_path / "new"):
    outputs.check_folder("--workdir=x", str(path), kind)
  (tmp_path / "cells").mkdir()  # both kinds, as earlier versions made them: runs can go on
  (tmp_path / outputs.RUN).write_text("{}")
  for both in (outputs.A_RUN, outputs.A_GRID):
    outputs.check_folder("--workdir=x", str(tmp_path), both)


NEW = {words: command for words, command in COMMANDS.items() if command[1]}  # not only new ones


@pytest.mark.parametrize("words", NEW)
@pytest.mark.parametrize("place", ("a file", "below a file", "within a run", "of runs", "of grids"))
def test_runs_and_grids_are_made_in_folders_of_their_own(words, place, tmp_path, capsys):
  command, made = NEW[words]
  folder = tmp_path / "there"
  if place.endswith("a file"):
    folder.write_text("mine")
    folder = folder / "x" if place.startswith("below") else folder
    said = " is a file: give" if place == "a file" else " cannot be read: Not a directory: give"
  elif place == "within a run":
    shutil.copytree(FIXTURES / "lora", folder)
    folder, said = folder / "x", f" lies in the run {folder}: give a folder outside it"
  else:
    shutil.copytree(FIXTURES / {"of runs": "lora", "of grids": "ablation"}[place], folder / "x")
    said = " holds a folder of runs (x/" if made == outputs.A_RUN else " holds x and is not a"
  before = sorted(tmp_path.rglob("*"))
  arguments = words.replace("FOLDER", str(folder)).split()
  assert run_command(command.main, command.FLAGS, *arguments) == 2
  assert capsys.readouterr().err.startswith(f"error: --workdir={folder}{said}")
  assert sorted(tmp_path.rglob("*")) == before


def test_folders_of_several_runs_are_as_they_were(tmp_path):
  shutil.copytree(FIXTURES / "lora", tmp_path / "x")
  for kind in (outputs.STAGES, outputs.DEMOS):  # they make runs below
    outputs.check_folder("--workdir=x", str(tmp_path), kind)
  shutil.copytree(FIXTURES / "lora", tmp_path / "x" / "y")
  for name in ("x", "x/y", "z"):  # they go on where earlier versions made them
    outputs.check_folder("--workdir=x", str(tmp_path / name), outputs.A_RUN)


def test_a_grid_begins_in_a_folder_without_files_of_others(tmp_path):
  check = lambda: outputs.check_folder("--workdir=x", str(tmp_path), outputs.A_GRID, alone=True)
  check()
  (tmp_path / ".nfs1").write_text("")
  check()
  (tmp_path / "paper.tex").write_text("mine")
  with pytest.raises(UsageError, match="--workdir=x holds paper.tex and is not a grid: give a new"):
    check()
  (tmp_path / "cells").mkdir()
  check()


def test_demos_recipes_and_python_calls_follow_the_rule(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  shutil.copytree(FIXTURES / "ablation", "demo")
  with pytest.raises(UsageError, match=r"demo/ holds a grid \(cells\), and not the demos"):
    demo_commands.prepare(demo_commands.FOLDER + "/demo.png")
  with pytest.raises(UsageError, match=r"--workdir=demo holds a grid \(cells\), and not stages"):
    stages.run_stages({}, "demo")
  with pytest.raises(UsageError, match=r"--folder=demo holds a grid \(cells\), and not a model"):
    gguf_model.convert(gguf_model.PACKAGES["smollm2-135m"], "demo", "bfloat16", wheels="wheels")
  with pytest.raises(UsageError, match=r"--workdir=demo holds a grid \(cells\), and not a run"):
    with run_directory.locked("demo"):
      pass


def test_kinds_are_told_by_files_that_commands_make():
  assert set(MADE) <= set(outputs.FOLDERS)
  assert outputs.FOLDERS[outputs.STAGES] == (stages.MADE, stages.MINUTES)
  assert outputs.FOLDERS["token files"] == (token_format.TOKENS_FILE,)
  assert outputs.FOLDERS["cells of a grid"] == (f"*/{grid.RESULT}",)


def test_a_new_folder_may_exist_and_be_empty(tmp_path):
  outputs.check_new_folder("output", str(tmp_path / "new"))
  outputs.check_new_folder("output", str(tmp_path))
  (tmp_path / "mine").write_text("")
  with pytest.raises(UsageError, match=f"--output={tmp_path} is not empty: give a new folder"):
    outputs.check_new_folder("output", str(tmp_path))
