"""Settings of a run, compared with those that a command asks for."""

import json
import os

import pytest

from sparsek.command_line.definer import into_string
from sparsek.errors import UsageError
from sparsek.experiments.recipes import stages
from sparsek.runs import run_directory, settings

BASE = ["--workdir=/a/runs/x", "--data=/a/data"]


def of(*words, script="pretrain", base=BASE):
  return settings.effective(settings.parse([*base, *words], stages.DEFINE[script]))


def write(folder, *words, name="flags.txt"):
  os.makedirs(folder, exist_ok=True)
  text = into_string(settings.parse(words))
  (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
  "old, new, lines",
  [
    ([], [], []),
    ([], ["--k=64", "--preset=tiny", "--attention=sparsek", "--num_steps=1000"], []),  # defaults
    ([], ["--layer_pattern=sparsek"], []),
    ([], ["--warmup_steps=100"], []),
    ([], ["--keep_checkpoints=1", "--checkpoint_every=7", "--log_every=1", "--tensorboard"], []),
    ([], ["--stop_at=3", "--profile_steps=1:2", "--dry_run"], []),
    ([], ["--workdir=/a/runs/y"], []),
    ([], ["--k=8"], ["--k: 64 -> 8"]),
    (["--num_steps=20"], [], ["--num_steps: 20 -> 1000", "--warmup_steps: 2 -> 100"]),
    ([], ["--attention=full"], ["--attention: sparsek -> full"]),
    (
      [],
      ["--layer_pattern=sparsek*3,full"],
      ["--attention: sparsek -> sparsek,sparsek,sparsek,full"],
    ),
    (
      [],
      [
        "--preset=mini",
        "--num_layers=4",
        "--embed_dim=128",
        "--num_heads=4",
        "--head_dim=32",
        "--mlp_dim=384",
        "--k=64",
        "--window=64",
        "--dtype=float32",
      ],
      [],
    ),
    ([], ["--seed=1", "--remat=attention"], ["--remat: none -> attention", "--seed: 0 -> 1"]),
    ([], ["--data=/b/data"], ["--data: /a/data -> /b/data"]),
    ([], ["--data=/b/data", "--workdir=/b/runs/x"], []),  # moved together
    ([], ["--workdir=/b/c/runs/x"], []),  # moved alone
    (["--data=stdlib"], [], ["--data: stdlib -> /a/data"]),
    ([], ["--tokenizer=byte"], ["--tokenizer: the default -> byte"]),
    (["--init_from=/a/y"], ["--init_from=/a/y@3"], ["--init_from: /a/y -> /a/y@3"]),
    (["--init_from=/a/y"], ["--init_from=/a/y", "--k=8"], ["--k: the default -> 8"]),
    (["--init_from=hf:/a/y"], ["--init_from=hf:/b/y", "--data=/b/data", "--workdir=/b/runs/x"], []),
  ],
)
def test_differences(old, new, lines):
  there, here = of(*old), of(*new)
  assert sorted(settings.differences(there, here)) == sorted(lines)
  assert sorted(settings.differences(json.loads(json.dumps(there)), here)) == sorted(lines)


@pytest.mark.parametrize(
  "script, old, new, lines",
  [
    ("evaluate", ["--workdir=/a,/b"], ["--workdir=/a", "--workdir=/b"], []),
    ("evaluate", ["--workdir=/a,/b"], ["--workdir=/a,/c"], ["--workdir: /a,/b -> /a,/c"]),
    (
      "evaluate_tasks",
      ["--workdir=/a"],
      ["--workdir=/a", "--examples=9", "--record=/a.json"],
      ["--examples: 100 -> 9"],
    ),
    (
      "import_hf",
      ["--from=/a"],
      ["--from=/a", "--attention=full"],
      ["--attention: the default -> full"],
    ),
    # As earlier versions wrote it.
    ("import_hf", ["--from=/a", "--preset=tiny"], ["--from=/a"], []),
  ],
)
def test_differences_of_other_commands(script, old, new, lines):
  base = ["--workdir=/a/runs/x"] if script == "import_hf" else []
  made = (of(*words, script=script, base=base) for words in (old, new))
  assert settings.differences(*made) == lines


def test_every_neutral_flag_says_why():
  known = {name for define in stages.DEFINE.values() for name in settings.parse([], define)}
  assert all(settings.NEUTRAL.values()) and set(settings.NEUTRAL) - {"restore_step"} <= known


def test_settings_of_a_folder_are_those_of_all_its_flag_files(tmp_path):
  run = tmp_path / "run"
  assert settings.of_folder(str(run)) == []
  write(run, *BASE, "--k=8", name="flags.1.txt")
  write(run, *BASE, "--k=9")
  assert sorted(one["k"] for one in settings.of_folder(str(run))) == [8, 9]
  (run / "flags.txt").write_text("--workdir=/a\n--gone=3\n")
  with pytest.raises(UsageError, match=f"{run}/flags.txt is not of this version: .*gone"):
    settings.of_folder(str(run))


def test_moving_aside_deletes_nothing(tmp_path):
  for content in "abc":
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "x").write_text(content)
    settings.move_aside(str(tmp_path / "run"))
  moved = {path.parent.name: path.read_text() for path in (tmp_path / "replaced").glob("*/x")}
  assert moved == {"run": "a", "run.1": "b", "run.2": "c"} and not (tmp_path / "run").exists()
  settings.move_aside(str(tmp_path / "run"))  # there is nothing
  (tmp_path / "run").mkdir()
  with run_directory.lock(str(tmp_path / "run")), pytest.raises(UsageError, match="in use"):
    settings.move_aside(str(tmp_path / "run"))
  assert (tmp_path / "run").exists()


def test_refusal_names_what_differs():
  settings.refuse({"a": []}, "w")
  stale = {"a": ["--k: 1 -> 2", "--seed: 0 -> 1"], "b": [], **{name: ["--x"] for name in "cde"}}
  message = (
    r"^--workdir=w holds what other flags made \(old -> new\): "
    r"a \(--k: 1 -> 2, --seed: 0 -> 1\); c \(--x\); d \(--x\), and 1 more\. .*--retrain"
  )
  with pytest.raises(UsageError, match=message):
    settings.refuse(stale, "w")
