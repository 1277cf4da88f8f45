"""Start of every command: --help and bad flags are answered before slow modules are imported."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags as absl_flags

from sparsek.__main__ import WIDTH, commands, main, overview
from sparsek.command_line import help as help_text
from sparsek.command_line import terminal
from sparsek.command_line.training_flags import define_pretrain_flags
from sparsek.runs import settings

ROOT = pathlib.Path(__file__).resolve().parents[2]
SLOW = ("jax", "numpy", "flax", "optax", "orbax", "grain", "tokenizers", "tqdm", "matplotlib")
# Runs every command with each of some arguments in one process, which imports nothing slow.
STARTS = f"""
import contextlib, io, json, sys
from sparsek.__main__ import commands, main
from sparsek.command_line import terminal
terminal.END_SECONDS = 600
sys.modules["lm_eval"] = None  # as where it is not installed
result = {{}}
for name in commands():
  for argument in ("--help", "--helpfull", "--prset=tiny", "--k=0"):
    sys.argv = ["sparsek", name, argument]
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    try:
      main()
      code = 0
    except SystemExit as end:
      code = end.code
    slow = [module for module in {SLOW} if module in sys.modules]
    output = sys.stdout.getvalue() + sys.stderr.getvalue()
    result[f"{{name}} {{argument}}"] = (code, slow, output)
json.dump(result, sys.__stdout__)
"""


@pytest.fixture(scope="module")
def started():
  done = subprocess.run(
    [sys.executable, "-c", STARTS],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    text=True,
    capture_output=True,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.mark.slow
def test_help_and_bad_flags_are_answered_before_slow_imports(started):
  assert len(started) == 4 * len(commands()) >= 40
  assert {start: slow for start, (_, slow, _) in started.items() if slow} == {}
  codes = {start: code for start, (code, _, _) in started.items()}
  assert codes == {start: 0 if "--help" in start else 2 for start in codes}


@pytest.mark.slow
def test_commands_are_shown_as_they_were_typed(started):
  texts = {start: output for start, (_, _, output) in started.items()}
  assert [start for start, text in texts.items() if "python -m experiments" in text] == []
  assert "sparsek import-hf --from=FOLDER" in texts["import_hf --help"]
  assert texts["pretrain --k=0"] == "error: --k=0: must be an integer of at least 1\n"


def test_the_overview_has_a_line_for_each_command(capsys, monkeypatch):
  names = list(commands())
  assert {"pretrain", "ablate", "demo", "recipe"} <= set(names) and "child" not in names
  text = overview("sparsek")
  assert all(f"\n  {name.replace('_', '-')} " in text for name in names)
  assert max(map(len, text.splitlines())) <= 100
  for name, sentence in commands().items():  # whole, or ends with a clause of it
    described = ast.get_docstring(ast.parse((ROOT / "experiments" / f"{name}.py").read_text()))
    assert re.match(rf"{re.escape(sentence)}[.,:]\s", described.replace("\n", " ")), name
    assert len(sentence) <= WIDTH
  monkeypatch.setattr(sys, "argv", ["sparsek", "pretrian"])
  with pytest.raises(SystemExit) as end:
    main()
  assert end.value.code == 2
  assert "'pretrian' is no command; did you mean pretrain?" in capsys.readouterr().err


@pytest.mark.slow
def test_help_describes_a_command(started):
  command = [sys.executable, "-m", "sparsek", "help", "pretrain"]
  text = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout
  assert text.replace("python -m sparsek", "sparsek") == started["pretrain --help"][2]


def test_help_has_groups_and_the_commonest_flags_first():
  values = absl_flags.FlagValues()
  define_pretrain_flags(values)
  groups = help_text.groups(values)
  assert list(groups) == ["model", "scorer", "data", "training", "run", "devices"]
  described = {flag.name: flag for members in groups.values() for flag in members}
  assert len(described) == len(set(help_text.names_of(values)))
  assert described["num_steps"][1:3] == ("--num_steps=N", "1000")
  assert described["scan_layers"].usage == "--[no]scan_layers"
  assert described["gate"].text.endswith("One of straight_through, value, key_value.")
  assert [flag.name for flag in groups["model"]][:3] == ["preset", "attention", "k"]
  short, full = (help_text.help_of(values, "Trains.", full) for full in (False, True))
  assert short.startswith("Trains.\n\nModel:\n  --preset=NAME ")
  assert short.count("\n  --") == sum(flag.common for flag in described.values()) < 45
  assert full.count("\n  --") == len(described)
  assert max(map(len, short.splitlines())) <= help_text.WIDTH


def test_every_common_flag_exists():
  values = absl_flags.FlagValues()
  define_pretrain_flags(values)
  assert set(help_text.COMMON) - set(help_text.names_of(values)) == {"step"}


def test_what_takes_long_is_said(capsys):
  with terminal.said_if_slow("loading ...", 0.01) as _:
    for _ in range(1000):
      if err := capsys.readouterr().err:
        break
      terminal.threading.Event().wait(0.01)
  assert err == "loading ...\n"
  with terminal.said_if_slow("loading ...", 60):
    pass
  assert capsys.readouterr().err == ""


def test_the_cache_of_compiled_programs_changes_no_run():
  cached, plain = (
    settings.effective(settings.parse(["--workdir=w", *words]))
    for words in (["--compilation_cache=/c"], [])
  )
  assert cached == plain
