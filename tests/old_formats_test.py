"""Loads what version 0.1 wrote: runs, flagfiles, caches, token files, exports and a grid.

tests/fixtures/make_version_0_1.py says what each of them is. Figures agree with those of that
version to 1e-5, texts and files exactly.
"""

import dataclasses
import json
import pathlib
import re
import shutil
import tempfile

import pytest

import sparsek
from tests.commands import run_forked

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures" / "version_0_1"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
RUNS = ("neox", "scan", "imported", "lora")
DATA = {"neox": "bpe", "scan": "bytes", "lora": "bpe"}
PROMPTS = {"neox": "a key that", "scan": "a key that", "text.npz": " the best"}
LAST_STEP = 200


@pytest.fixture
def old(tmp_path):
  """Returns a copy of the files of version 0.1."""
  return pathlib.Path(shutil.copytree(FIXTURES, tmp_path / "version_0_1"))


def command(name, *arguments):
  """Runs `python -m experiments.NAME ARGUMENTS`, which must succeed."""
  with tempfile.TemporaryDirectory() as outputs:
    words = [f"experiments.{name}", *map(str, arguments)]
    done = run_forked(words, ROOT, pathlib.Path(outputs))
  assert done.returncode == 0, done.stderr
  return done


def records(run, name="metrics.jsonl"):
  """Returns the lines of a run's .jsonl file."""
  return [json.loads(line) for line in (run / name).read_text().splitlines()]


def at_step(run, step):
  """Returns the figures that a run logged at a step."""
  lines = [line for line in records(run) if line["step"] == step]
  return {name: value for line in lines for name, value in line.items()}


def contents(folder):
  """Returns the bytes of all files below a folder."""
  files = (path for path in sorted(folder.rglob("*")) if path.is_file())
  return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def close(expected):
  return pytest.approx(expected, rel=1e-5, abs=0)


@pytest.mark.parametrize("run", RUNS)
def test_a_recorded_model_is_a_configuration(run):
  recorded = json.loads((FIXTURES / run / "model.json").read_text())["model"]
  fields = json.loads(json.dumps(dataclasses.asdict(sparsek.TransformerConfig(**recorded))))
  assert {name: fields[name] for name in recorded} == recorded


@pytest.mark.slow
@pytest.mark.parametrize(
  "runs, arguments",
  [
    (
      ("neox", "imported", "lora"),
      ("--data={}/bpe", "--seq_len=16", "--batch_size=2", "--eval_batches=2"),
    ),
    (("scan",), ("--data={}/bytes",)),
  ],
)
def test_runs_have_their_loss(old, runs, arguments):
  before = [records(old / run, "evaluation.jsonl") for run in runs]
  workdirs = ",".join(str(old / run) for run in runs)
  command("evaluate", f"--workdir={workdirs}", *(word.format(old) for word in arguments))
  for run, lines in zip(runs, before):
    *earlier, last = records(old / run, "evaluation.jsonl")
    assert earlier == lines
    assert last["loss"] == close(EXPECTED["loss"][run])


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_text_is_the_same(old, name):
  more = {"neox": ["--step=98"], "text.npz": [f"--load_cache={old}/text.npz"]}.get(name, [])
  run = "scan" if name == "text.npz" else name
  done = command(
    "generate",
    f"--workdir={old}/{run}",
    f"--prompt={PROMPTS[name]}",
    "--max_new_tokens=16",
    "--temperature=0",
    *more,
  )
  assert done.stdout == EXPECTED["text"][name]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED["step 200"])
def test_a_stopped_run_goes_on(old, name):
  run = old / name
  before = records(run)
  done = command(
    "pretrain",
    f"--flagfile={run}/flags.txt",
    f"--workdir={run}",
    f"--data={old}/{DATA[name]}",
    f"--stop_at={LAST_STEP}",
  )
  assert f"\nresuming {run} at step 196, with other settings" in f"\n{done.stderr}"
  changed = re.findall(r"^  (\w+): \S+ -> ", done.stderr, re.MULTILINE)
  assert set(changed) == {"data", "stop_at"}
  assert records(run)[: len(before)] == before
  expected = EXPECTED["step 200"][name]
  figures = at_step(run, LAST_STEP)
  assert {key: figures[key] for key in expected} == close(expected)


@pytest.mark.slow
def test_a_finished_run_is_complete(old):
  run = old / "lora"
  before = contents(run / "checkpoints"), records(run)
  done = command(
    "pretrain",
    f"--flagfile={run}/flags.txt",
    f"--workdir={run}",
    f"--data={old}/bpe",
    f"--init_from=hf:{old}/hf",
  )
  assert f"{run} is complete: it has all of --num_steps=4 steps" in done.stderr
  assert (contents(run / "checkpoints"), records(run)) == before


@pytest.mark.slow
def test_a_flagfile_makes_the_same_run(old):
  command(
    "pretrain",
    f"--flagfile={old}/user.flags",
    f"--workdir={old}/new",
    f"--data={old}/bpe",
    "--stop_at=14",
  )
  models = [json.loads((old / run / "model.json").read_text())["model"] for run in ("neox", "new")]
  assert {name: models[1][name] for name in models[0]} == models[0]
  for step in (1, 14):
    assert at_step(old / "new", step)["loss"] == close(at_step(old / "neox", step)["loss"])


@pytest.mark.slow
def test_a_finished_grid_trains_nothing(old):
  before = contents(old / "ablation" / "cells")
  done = command(
    "ablate",
    f"--workdir={old}/ablation",
    f"--base={old}/ablation.flags",
    f"--more=--data={old}/bytes",
    "--attention=sliding_window,sparsek,sliding_window+sparsek",
    "--k=4",
    "--window=4",
  )
  assert done.stdout.count(", finished before") == 3 and "3 of 3 cells" in done.stdout
  assert contents(old / "ablation" / "cells") == before


@pytest.mark.slow
@pytest.mark.parametrize("source", ["imported anew", "neox"])
def test_a_folder_in_hugging_faces_format_is_imported_and_exported(old, source):
  if source == "imported anew":
    command("import_hf", f"--from={old}/hf", f"--workdir={old}/{source}")
  command("import_hf", f"--workdir={old}/{source}", f"--export={old}/export", "--export_dense")
  for name in ("README.md", "tokenizer_config.json"):  # which version 0.1 did not write
    (old / "export" / name).unlink()
  assert contents(old / "export") == contents(old / "hf")


@pytest.mark.slow
def test_token_files_are_the_same(old):
  done = command("prepare_data", f"--verify={old}/bytes")
  assert "All checksums agree" in done.stdout
  command(
    "prepare_data",
    f"--sources={old}/documents.jsonl",
    "--heldout_fraction=0.3",
    f"--tokenizer={old}/bpe",
    f"--expect={old}/bpe/meta.json",
    f"--output={old}/new",
  )
  for name in ("tokens.bin", "index.npy"):
    assert (old / "new" / name).read_bytes() == (old / "bpe" / name).read_bytes()
