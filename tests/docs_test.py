"""Runs every command and example that README.md and WORKSPACE.md show, at a size for a test."""

import configparser
import importlib.util
import pathlib
import re
import shlex
import subprocess

import pytest

from sparsek.config import presets
from tests.commands import run_forked

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("sparsek", "kernels", "experiments", "tests")
# Appended to the shown command: absl takes the last value of a flag.
SMALLER = {
  "experiments.prepare_data": "--train_bpe=300",
  "experiments.pretrain": "--num_steps=2 --warmup_steps=1 --seq_len=64 --batch_size=2 "
  "--grad_accumulation=1 --num_layers=1 --embed_dim=32 --num_heads=2 "
  "--num_kv_heads=1 --head_dim=16 --mlp_dim=32 --scan_layers=false --remat=none "
  "--eval_every=0 --checkpoint_every=2 "
  # all alike: compiled once, and fast
  "--dtype=float32 --k=8 --window=8 --learning_rate=1e-3 --implementation=reference",
  "experiments.evaluate": "--eval_batches=1 --batch_size=1 --seq_len=128",
  "experiments.evaluate_tasks": "--lengths=256 --examples=1 --tasks=passkey",
  "experiments.generate": "--max_new_tokens=3",
  "experiments.import_hf": "",
  "experiments.layer_reach": "--seq_len=64 --eval_batches=1 --window=8 --k=4 --budget=32",
  "experiments.ablate": "--attention=full --k=8 --window=8 --seeds=1 '--more=--num_steps=1 "
  "--seq_len=64 --batch_size=2 --num_layers=1 --embed_dim=32 "
  "--num_heads=2 --num_kv_heads=1 --head_dim=16 --mlp_dim=32 --noscan_layers "
  "--eval_batches=1 --warmup_steps=1 --data=data/stdlib'",
  "experiments.benchmark": (
    "--lengths=64 --heads=2 --kv_heads=1 --head_dim=8 --k=8 "
    "--window=8 --baselines=sparsek,dense --rounds=1 --record=benchmark.json "
    "--implementation=reference"
  ),
  "experiments.benchmark --suite=train": (
    "--preset=tiny --vocab_size=300 --lengths=64 --k=8 --window=8 --baselines=sparsek --rounds=1 "
    "--dtype=float32 --implementation=reference"
  ),
  "experiments.benchmark --suite=decode": (
    "--vocab_size=300 --lengths=64 --batch_sizes=1 "
    "--prompts=64 --k=8 --window=8 --baselines=sparsek --rounds=1 "
    "--dtype=float32 --implementation=reference"
  ),
}


def blocks(language):
  """Returns [(file, block)] for the fenced blocks in a language."""
  return [
    (name, block)
    for name in ("README.md", "WORKSPACE.md")
    for block in re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.S)
  ]


def commands():
  return [line for _, block in blocks("bash") for line in block.splitlines() if line.strip()]


def smaller(words):
  """Returns flags that make a command small enough for a test."""
  of_suite = [
    name for name in SMALLER if name.split()[0] == words[2] and set(name.split()[1:]) <= set(words)
  ]
  return shlex.split(SMALLER[max(of_suite, key=len)])


def run(words, folder):
  """Runs `python -m ...` in a folder; it must succeed."""
  done = run_forked(words[2:], folder, folder)
  assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
def test_commands_in_order(tmp_path):
  """Runs them in one folder, one after the other, as a reader would type them."""
  (tmp_path / "experiments").symlink_to(ROOT / "experiments")
  small = tmp_path / "text"
  small.mkdir()
  for path in (ROOT / "sparsek" / "attention").glob("*.py"):
    (small / path.name).write_text(path.read_text())
  (tmp_path / "prompts.txt").write_text("def main\nclass Other(\n")
  ran = 0
  for line in commands():
    words = [
      word.replace("stdlib", str(small)) if word == "--sources=stdlib" else word
      for word in shlex.split(line)
    ]
    if words[1:2] == ["-m"] and words[2] in SMALLER:
      run([*words, *smaller(words)], tmp_path)
      ran += 1
  assert ran >= 8


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_every_command_is_of_a_known_kind(line):
  """Checks the commands too that the test above does not run."""
  words = shlex.split(line)
  if words[0] == "make":
    assert subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True).returncode == 0
  elif words[:3] == ["pip", "install", "-e"]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert all(
      extra in setup["options.extras_require"] for extra in re.findall(r"\[(\w+)\]", words[3])
    )
  elif words[1:3] == ["-m", "pytest"]:
    assert all((ROOT / word).exists() for word in words[3:] if not word.startswith("-"))
  elif words[1:2] == ["-m"] and words[2] in ("ruff", "mypy"):
    assert importlib.util.find_spec(words[2])
  else:
    assert words[:2] == ["python", "-m"] and words[2] in SMALLER, line


@pytest.mark.parametrize("block", [block for _, block in blocks("python")])
def test_python_examples_run(block, monkeypatch):
  monkeypatch.setitem(presets.PRESETS, "tiny", (1, 32, 2, 1, 16, 32, 257, 64, 64))  # compiles fast
  names = {}
  exec(compile(block, "README.md", "exec"), names)
  assert names["out"].shape == names["query"].shape
  assert abs(float(names["gates"].sum()) - 64) < 1e-3


def test_links_exist():
  for name in ("README.md", "WORKSPACE.md", "docs/attention-map.md"):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
      assert target.startswith("http") or ((ROOT / name).parent / target).exists(), (
        f"{name}: {target}"
      )


def quoted_in_workspace():
  """Returns what stands in backticks in WORKSPACE.md."""
  return re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", workspace(), flags=re.S))


def workspace():
  return (ROOT / "WORKSPACE.md").read_text()


def test_workspace_is_short():
  assert len(workspace().splitlines()) <= 120


@pytest.mark.parametrize("parent", FOLDERS)
def test_workspace_names_each_folder(parent):
  """A name is `sparsek/attention/`, or `attention/` beside its parent."""
  folders = {path.parent.name for path in (ROOT / parent).glob("*/*.py")} - {"__pycache__"}
  names = {word.rstrip("/") for word in quoted_in_workspace() if "/" in word}
  assert {name for name in folders if not names & {name, f"{parent}/{name}"}} == set()


def test_paths_that_workspace_names_exist():
  """Paths from the root on: those of files, and all below the folders with code."""
  paths = [word for word in quoted_in_workspace() if re.fullmatch(r"[\w.*/-]+/[\w.*/-]*", word)]
  paths = [path for path in paths if path.split("/")[0] in FOLDERS or pathlib.Path(path).suffix]
  assert [path for path in paths if not list(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize(
  "recipe", sorted((ROOT / "experiments" / "recipes").glob("*.flags")), ids=lambda path: path.stem
)
def test_recipes_parse(recipe):
  from absl import flags as absl_flags

  from sparsek.command_line.configs import model_config, train_config
  from sparsek.command_line.main import parse
  from sparsek.command_line.training_flags import define_pretrain_flags
  from sparsek.experiments import prepare_data

  if "experiments.prepare_data --flagfile" in recipe.read_text():
    parse(["prepare_data", f"--flagfile={recipe}"], prepare_data.FLAGS)
    return
  values = absl_flags.FlagValues()
  define_pretrain_flags(values)
  parse(["pretrain", f"--flagfile={recipe}", "--workdir=w"], values)
  assert model_config(values).num_layers > 0 and train_config(values).optimizer.num_steps > 0
