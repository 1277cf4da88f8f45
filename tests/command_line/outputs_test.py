"""Files that flags name to be written: those of a user or a run stay."""

import argparse
import importlib
import pathlib
import re

import pytest

from sparsek.command_line import outputs
from sparsek.errors import UsageError
from sparsek.experiments import script
from sparsek.experiments.recipes import capital_letter_task
from sparsek.experiments.reports import plots
from sparsek.runs import run_record, set_aside

ROOT = pathlib.Path(__file__).resolve().parents[2]
KIND = outputs.record("record of a test", "rows", "flags")
# Files of this checkout that scripts with argparse wrote, or that summarize would write.
WRITTEN = {
  ("bench.compare_checkouts", "record"): "experiments/results/checkouts_h200.json",
  ("bench.longest_row", "record"): "experiments/results/longest_row_h200.json",
  ("bench.many_devices", "record"): "experiments/results/many_devices_h200.json",
  ("recipes.baselines", "record"): "experiments/results/baselines.json",
  ("recipes.capital_letter_task", "path"): None,
  ("recipes.gguf_model", "record"): "experiments/results/smollm2.json",
  ("recipes.qwen_convert", "record"): None,  # not run yet
  ("recipes.ruler_tools", "record"): "experiments/results/ruler_smollm2_h200.json",
  ("recipes.scorer_reach", "path"): "experiments/results/scorer_reach.json",
  ("recipes.smollm2_convert", "record"): "experiments/results/smollm2_convert.json",
  ("reports.collect_grids", "record"): "experiments/results/baselines_grid.json",
  ("reports.flags_page", "path"): "docs/flags.md",
  ("reports.grid_picture", "picture"): "experiments/results/baselines_grid.png",
  ("reports.results_page", "path"): "docs/results.md",
  ("reports.summarize", "summary"): "experiments/results/baselines_gates.json",
}


@pytest.mark.parametrize("content", ("", '{"flags": [], "rows": [], "more": 1}'))
def test_our_files_and_empty_ones_may_be_replaced(content, tmp_path):
  (tmp_path / "a.json").write_text(content)
  outputs.check_record("record", str(tmp_path / "a.json"), KIND, has_picture=True)


@pytest.mark.parametrize("content", ("notes", "[1]", '{"rows": []}', '{"rows": '))
def test_other_files_are_refused(content, tmp_path):
  path = tmp_path / "a.json"
  path.write_text(content)
  words = f"--record={path} exists and is no record of a test: it would be lost"
  with pytest.raises(UsageError, match=words):
    outputs.check_record("record", str(path), KIND, has_picture=False)


def test_the_picture_beside_a_record_is_one_that_was_drawn(tmp_path):
  record, picture = str(tmp_path / "a.json"), str(tmp_path / "a.png")
  for name in (picture, str(tmp_path / "a.svg")):
    plots.save(plots.new_figure(), name)
    outputs.check("--output", name, outputs.PICTURE)
  outputs.check_record("record", record, KIND, has_picture=True)
  (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n of a camera")
  outputs.check_record("record", record, KIND, has_picture=False)
  with pytest.raises(UsageError, match=r"its picture .*a\.png exists and is no picture"):
    outputs.check_record("record", record, KIND, has_picture=True)


@pytest.mark.parametrize("name", ("flags.txt", "checkpoints/4/x.json", "tokenizer/x", "lock"))
def test_what_a_run_keeps_is_no_output(name, tmp_path):
  assert (outputs.RUN, set_aside.FOLDER) == (run_record.FILE, "set_aside")
  (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
  outputs.check("--save_cache=x", str(tmp_path / name), KIND)
  (tmp_path / outputs.RUN).write_text("{}")
  with pytest.raises(UsageError, match=f"--save_cache=x is a file of the run in {tmp_path}: take"):
    outputs.check("--save_cache=x", str(tmp_path / name), KIND)
  outputs.check("--output=x", str(tmp_path / "plot.png"), KIND)  # beside what it keeps


def test_a_broken_link_and_a_folder_are_no_outputs(tmp_path):
  (tmp_path / "link").symlink_to("nowhere")
  (tmp_path / "folder").mkdir()
  for name in ("link", "folder"):
    with pytest.raises(UsageError, match=name):
      outputs.check("--record=x", str(tmp_path / name), KIND)


def outputs_of_scripts():
  """Returns (script, option) -> the argparse option, of all that name a file to write."""
  found = {}
  for path in (ROOT / "experiments").rglob("*.py"):
    if "def make_parser(" in path.read_text(encoding="utf-8"):
      name = ".".join(path.relative_to(ROOT / "experiments").with_suffix("").parts)
      parser = importlib.import_module(f"sparsek.experiments.{name}").make_parser()
      found |= {
        (name, action.dest): action
        for action in parser._actions
        if isinstance(action.type, script.Output)
        or re.search(r"\bto write|file for", action.help or "")
      }
  return found


def test_no_script_replaces_a_file_of_another_kind(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for content in ("notes", '{"text": "Mine."}\n', '{"rows": [], "cells": [], "runs": []}'):
    path = tmp_path / "important.json"
    path.write_text(content)
    for (name, _), action in outputs_of_scripts().items():
      with pytest.raises(argparse.ArgumentTypeError, match="important.json exists and is no "):
        action.type("important.json")
      (tmp_path / "new.json").touch()
      assert str(action.type("new.json")) == "new.json", name
  with pytest.raises(argparse.ArgumentTypeError, match=r"its picture new\.png exists and is no"):
    (tmp_path / "new.png").write_text("a photograph")
    script.Output(KIND, has_picture=True)("new.json")
  assert path.read_text() == content


def test_scripts_replace_what_they_wrote(tmp_path):
  options = outputs_of_scripts()
  assert set(options) == set(WRITTEN)
  files = {name: str(ROOT / file) for name, file in WRITTEN.items() if file}
  for name, action in options.items():
    for writer, path in files.items():
      if writer == name:
        assert str(action.type(path)) == path
      elif "reports.summarize" not in (writer[0], name[0]):  # summaries are records too
        with pytest.raises(argparse.ArgumentTypeError, match="exists and is no"):
          action.type(path)
  full, documents = files["recipes.baselines", "record"], str(tmp_path / "letters.jsonl")
  with pytest.raises(argparse.ArgumentTypeError, match="exists and is no summary"):
    options["reports.summarize", "summary"].type(full)
  for length in ("4", "5000"):
    given = capital_letter_task.make_parser().parse_args([length, "3", documents])
    capital_letter_task.main(given)
