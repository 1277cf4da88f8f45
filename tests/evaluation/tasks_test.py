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
from sparsek.evaluation.statistics import score_interval
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

  def counts():
    batches = tasks.evaluate(CONFIG, None, TOKENIZER, "recall", 1500, 5, batch_size=2)
    return [[prompt[1:] for prompt in prompts] for prompts in batches]

  assert counts() == [[(4, 4)] * 2, [(4, 4)] * 2, [(4, 4)]]
  # a wrong token in the second of four answers
  monkeypatch.setattr(
    tasks, "predicted", lambda *args: oracle(*args) + (np.arange(args[4].shape[1]) == 7)
  )
  assert counts()[-1] == [(3, 4)]


def prompts(names, right, total=1):
  return [tasks.PromptAnswers(name, count, total) for name, count in zip(names, right)]


def test_accuracies_count_distinct_prompts():
  """Several answers to a prompt, or a prompt that is asked again, narrow no interval."""
  once = prompts("abcd", [4, 0, 4, 0], 4)
  assert tasks.accuracy(once) == score_interval(0.5, 4)
  assert tasks.accuracy(once * 3) == tasks.accuracy(once)
  result = tasks.result("recall", 64, once * 3)
  assert (result["right"], result["total"]) == (24, 48)
  assert result["prompts"] == {"prompt": [*"abcd"], "right": [4, 0, 4, 0], "total": [4] * 4}


def test_table_compares_runs_over_the_prompts_that_both_were_given():
  names = [str(i) for i in range(40)]
  results = {
    ("a", "copy", 64): prompts(names, [0] * 40),
    ("a", "copy", 128): prompts(names, [1] * 40),
    ("b", "copy", 64): prompts(names, [1] * 30 + [0] * 10),
    ("b", "copy", 128): prompts(names, [1] * 40),
    ("c", "copy", 64): prompts(["0", *"xyz"], [1] * 4),
    ("c", "copy", 128): prompts(names, [1] * 40),
  }
  text = tasks.table(["a", "b", "c"], [64, 128], results)
  lines = text.splitlines()
  assert lines[2] == "| a | copy | 0.0% | 40 | 0% (0% to 9%) | 100% (91% to 100%) |"
  assert lines[4] == "| c | copy | 0.0% | 4, 40 | 100% (51% to 100%) | 100% (91% to 100%) |"
  assert "| b | copy | +75%, p < 0.001 | +0%, p 1.000 |" in lines
  assert "| c | copy | - | +0%, p 1.000 |" in lines
  assert "for 3 comparisons" in text and "fewer than two prompts were given to both" in text
  alone = {key: value for key, value in results.items() if key[0] == "a"}
  assert "minus" not in tasks.table(["a"], [64, 128], alone)


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
  assert f"| {folder} | passkey | 0.0% | 3 | 0% (0% to 56%) |" in told.out
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
