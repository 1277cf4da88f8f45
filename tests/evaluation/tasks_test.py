"""Answers to generated documents: predictions, counts of right answers, the command."""

import dataclasses
import functools
import json
import os
import sys

import jax
import numpy as np
import pytest

from sparsek.config import TransformerConfig
from sparsek.data.tokenizer import ByteTokenizer
from sparsek.evaluation import tasks
from sparsek.experiments import evaluate_tasks
from sparsek.model.transformer import Transformer, init_params
from sparsek.parallel.mesh import make_mesh
from tests.experiments.evaluate_test import write_run
from tests.helpers import run_command

CONFIG = TransformerConfig(
  vocab_size=257,
  num_layers=1,
  embed_dim=8,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=8,
  k=2,
  window=3,
  implementation="reference",
)
TOKENIZER = ByteTokenizer()


def test_right_answers_are_counted(monkeypatch):
  """Every answer token must be right; the rows that fill up the last batch do not count."""

  def oracle(config, mesh, params, tokens, positions):
    return np.take_along_axis(tokens, positions, axis=1)

  monkeypatch.setattr(tasks, "predicted", oracle)
  results = lambda: list(tasks.evaluate(CONFIG, None, TOKENIZER, "recall", 1500, 5, batch_size=2))
  assert results() == [(8, 8), (16, 16), (20, 20)]
  # a wrong token in the second of four answers
  monkeypatch.setattr(
    tasks, "predicted", lambda *args: oracle(*args) + (np.arange(args[4].shape[1]) == 7)
  )
  assert results()[-1] == (15, 20)


def test_another_tokenizer_is_refused():
  small = dataclasses.replace(CONFIG, vocab_size=99)
  with pytest.raises(ValueError, match="tokens.* must be an id of the vocabulary, from 0 to 98"):
    next(tasks.evaluate(small, None, TOKENIZER, "recall", 1500, 1))


def test_predictions_are_the_largest_logits():
  params = init_params(CONFIG, jax.random.key(0))
  tokens, positions = (
    np.random.default_rng(0).integers(0, 257, (2, 30)).astype(np.int32),
    np.array([[1, 5, 29], [2, 3, 4]], np.int32),
  )
  logits = jax.jit(Transformer(CONFIG).apply)({"params": params}, tokens)
  expected = np.take_along_axis(np.argmax(logits, axis=-1), positions - 1, axis=1)
  mesh = make_mesh(devices=jax.devices()[:1])
  answers = tasks.predicted(CONFIG, mesh, params, tokens, positions)
  np.testing.assert_array_equal(answers, expected)


def test_interval():
  np.testing.assert_allclose(tasks.interval(50, 100), (0.4038, 0.5962), atol=1e-4)
  assert (
    tasks.interval(0, 10)[0] == 0
    and tasks.interval(10, 10)[1] == 1
    and tasks.interval(10, 10)[0] == pytest.approx(0.7225, abs=1e-3)
  )


run = functools.partial(run_command, evaluate_tasks.main, evaluate_tasks.FLAGS)


def test_command(tmp_path, capsys):
  folder = write_run(tmp_path / "run", tmp_path, CONFIG, 32, init_params(CONFIG, jax.random.key(0)))
  assert (
    run(
      f"--workdir={folder}",
      "--tasks=passkey,copy",
      "--lengths=200",
      "--examples=3",
      "--batch_size=2",
      f"--record={tmp_path}/found.json",
    )
    == 0
  )
  told = capsys.readouterr()
  assert f"| {folder} | passkey | 0.0% | 0% (0% to 56%) |" in told.out
  assert f"{folder}: each document begins with its text and ends with its answers\n" in told.err
  assert (folder / "tasks.jsonl").read_text().count('"total": 3') == 2
  record = json.loads((tmp_path / "found.json").read_text())
  assert record["runs"][str(folder)] == json.loads((folder / "tasks.jsonl").read_text()) and set(
    record["chance"]
  ) == {"passkey", "copy"}
  assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
  os.mkdir(tmp_path / "folder.json")
  (tmp_path / "notes.json").write_text("notes")
  for argument, words in (
    ("--tasks=riddle", "'riddle' must be one of passkey"),
    ("--lengths=0", "'0' must be a number"),
    ("--context=77", "--fsdp=1 x --context=77 must divide the number of devices"),
    ("--lengths=50", "the task passkey needs"),
    ("--lengths=260", "the task needle needs at least 485"),
    ("--lengths=260", "--tasks=passkey,variables,copy would fit"),
    (f"--lengths={'9' * 5000}", "must be a number of at least 1"),
    (f"--record={tmp_path}/notes.json", "notes.json exists and is no record of"),
    ("--min_distance=1020", "1020 of them between facts and question; got 1024"),
    ("--record=x.png", "x.png: must be a .json file"),
    (f"--record={tmp_path}/folder.json", "folder.json is a folder"),
  ):
    assert run(f"--workdir={folder}", argument) == 2 and words in capsys.readouterr().err
  # All folders are checked before the first model is asked.
  assert run(f"--workdir={folder},{tmp_path}/nowhere", "--lengths=200", "--tasks=copy") == 2
  assert "nowhere: there is no such folder" in capsys.readouterr().err
  assert len((folder / "tasks.jsonl").read_text().splitlines()) == 1


def test_without_matplotlib_the_record_is_written(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  folder = write_run(tmp_path / "run", tmp_path, CONFIG, 32, init_params(CONFIG, jax.random.key(0)))
  record = tmp_path / "found.json"
  arguments = ("--tasks=copy", "--lengths=200", "--examples=1", f"--record={record}")
  assert run(f"--workdir={folder}", *arguments) == 0
  told = capsys.readouterr()
  assert "pip install matplotlib; the record is written without them" in told.err
  assert told.out.endswith(f"{record}\n") and json.loads(record.read_text())["runs"]
