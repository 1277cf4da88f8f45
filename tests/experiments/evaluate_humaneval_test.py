"""HumanEval: the sandbox, the answers that are kept, and the command."""

import gzip
import json
import os
import shutil
import socket

import jax
import pytest

from sparsek.errors import UsageError
from sparsek.evaluation import humaneval, sandbox
from sparsek.evaluation.sandbox import Limits, run_program
from sparsek.experiments import evaluate_humaneval
from sparsek.model.transformer import init_params
from tests.experiments.evaluate_test import write_run
from tests.helpers import SMALLEST, run_command

LIMITS = Limits(10, 512)
NETWORK = "the network cannot be taken away from a process here"


def problem(name, answer):
  """Returns a problem, a line of a file, whose right answer returns a number."""
  test = f"def check(function):\n  assert function() == {answer}\n"
  prompt = f'def {name}():\n  """Returns {answer}."""\n'
  return {"task_id": f"T/{name}", "prompt": prompt, "entry_point": name, "test": test}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("humaneval")
  write_run(folder / "run", "data", SMALLEST, 32, init_params(SMALLEST, jax.random.key(0)))
  problems = [problem("one", 1), problem("two", 2), problem("three", 3)]
  with gzip.open(folder / "problems.jsonl.gz", "wt") as file:
    file.writelines(json.dumps(row) + "\n" for row in problems)
  return folder


@pytest.mark.parametrize(
  ("source", "result"),
  [
    ("x = 1", "passed"),
    ("assert 1 == 2", "AssertionError: "),
    ("def (", "SyntaxError: invalid syntax"),
    ("raise SystemExit(0)", "SystemExit: 0"),
    ("import os; os._exit(0)", "ended with code 0"),
    ("x = bytearray(2**30)", "MemoryError: "),
    ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
    ("import os; os.remove(PATH)", "TypeError: "),
    ("with open('a', 'w') as file: file.write('a')", "PermissionError: a: only reading"),
    ("open(PATH, 'w')", "PermissionError: "),
    ("open(PATH, mode='r+').truncate(0)", "PermissionError: "),
    ("import pathlib; pathlib.Path(PATH).write_text('a')", "PermissionError: "),
    ("import os; os.open(PATH, os.O_RDWR | os.O_TRUNC)", "PermissionError: "),
    ("import os; os.mkdir(PATH + '2')", "TypeError: "),
    ("assert open(PATH).read() == 'kept'", "passed"),
    ("input()", "EOFError: "),
    ("import os; assert 'sparsek_answer_' in os.getcwd() and not os.listdir()", "passed"),
  ],
)
def test_a_program_ends_as_it_should(source, result, tmp_path):
  kept = tmp_path / "kept"
  kept.write_text("kept")
  said = run_program(source.replace("PATH", repr(str(kept))), LIMITS, sandbox.can_isolate())
  assert said.startswith(result) and kept.read_text() == "kept"


def test_a_program_that_does_not_end_is_ended():
  assert run_program("while True: pass", Limits(1, 512), sandbox.can_isolate()) == "timed out"


def test_a_program_has_no_network():
  if not sandbox.can_isolate():
    pytest.skip("unshare --user --net does not work here")
  with socket.create_server(("127.0.0.1", 0)) as server:
    source = f"import socket; socket.create_connection({server.getsockname()}, 2)"
    assert run_program(source, LIMITS, isolated=False) == "passed"
    assert run_program(source, LIMITS).startswith("OSError: ")


def run(folder, *arguments, code=0):
  flags = (f"--workdir={folder}/run", f"--data={folder}/problems.jsonl.gz", *arguments)
  assert run_command(evaluate_humaneval.main, evaluate_humaneval.FLAGS, *flags) == code


@pytest.fixture
def answered(monkeypatch):
  """Answers in place of the model; the list of prompts that each call was given."""
  monkeypatch.setattr(evaluate_humaneval, "can_isolate", lambda: True)
  monkeypatch.setattr(humaneval, "run_program", lambda *a: run_program(*a[:2], False))
  calls = []

  def completions(config, params, tokenizer, prompts, writing, keys, batch_size, mesh):
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    calls.append([text.split()[1] for text in texts])
    for i, text in enumerate(texts):
      if i and completions.dies:
        raise KeyboardInterrupt
      yield i, "  return " + ("1" if "one" in text else "2")

  completions.dies = False
  monkeypatch.setattr(humaneval, "completions", completions)
  return completions, calls


def test_answers_are_kept_and_asked_once(folder, answered, capsys):
  completions, calls = answered
  completions.dies = True
  run(folder, "--batch_size=1", code=130)
  completions.dies = False
  run(folder, f"--record={folder}/record.json")
  assert calls == [["one():", "two():", "three():"], ["two():", "three():"]]
  assert "| 3 | 2 | 66.7% (20.8% to 93.9%) |" in capsys.readouterr().out
  record = json.loads((folder / "record.json").read_text())["runs"]
  (of_run,) = record.values()
  assert of_run["pass_at_1"] == pytest.approx(2 / 3) and of_run["max_new_tokens"] == 512
  assert [row["result"] for row in of_run["answers"]] == ["passed", "passed", "AssertionError: "]
  assert [row["answer"] for row in of_run["answers"]] == ["  return 1", "  return 2", "  return 2"]
  run(folder, "--max_new_tokens=9")
  assert len(calls) == 3 and len(calls[-1]) == 3
  # other parameters of the same step, as after --restore_step
  write_run(folder / "other", "data", SMALLEST, 32, init_params(SMALLEST, jax.random.key(1)))
  shutil.rmtree(folder / "run" / "checkpoints")
  shutil.move(folder / "other" / "checkpoints", folder / "run")
  run(folder)
  assert len(calls) == 4 and len(calls[-1]) == 3


def test_no_other_record_is_replaced(folder, answered, capsys):
  record = folder / "record.json"
  record.write_text('{"benchmark": "RULER", "data": {}, "runs": {}}')
  run(folder, f"--record={record}", code=2)
  assert "it would be lost" in capsys.readouterr().err and "RULER" in record.read_text()


@pytest.mark.parametrize(
  ("flags", "error"),
  [
    (["--data="], "--data=: must be a path, it is empty"),
    (["--data=nowhere"], "--data=nowhere: there is no such file"),
    (["--data=FOLDER/run/model.json"], "line 1: must be a JSON object with the texts task_id, "),
    (["--seconds=0"], "--seconds=0: must be an integer of at least 1"),
    (["--record=FOLDER/run/model.json"], "is a file of the run in "),
    (["--workdir=nowhere"], "--workdir=nowhere: there is no such folder"),
  ],
)
def test_bad_flags_are_refused(folder, flags, error, monkeypatch, capsys):
  monkeypatch.setattr(evaluate_humaneval, "can_isolate", lambda: True)
  monkeypatch.chdir(folder)
  run(folder, *(flag.replace("FOLDER", str(folder)) for flag in flags), code=2)
  assert error in capsys.readouterr().err.replace(str(folder) + "/", "")


def test_programs_do_not_run_with_a_network_unless_asked(folder, monkeypatch, capsys):
  monkeypatch.setattr(evaluate_humaneval, "can_isolate", lambda: False)
  run(folder, code=2)
  assert NETWORK in capsys.readouterr().err
  monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
  assert not sandbox.can_isolate.__wrapped__()


@pytest.mark.parametrize("content", ["", "[]\n", '{"task_id": "a"}\n', "x\n"])
def test_files_of_other_things_are_refused(content, tmp_path):
  path = str(tmp_path / "a.jsonl")
  with open(path, "w") as file:
    file.write(content)
  with pytest.raises(UsageError, match="holds no problems|must be a JSON object with the texts"):
    humaneval.read_problems(path)
  os.rename(path, f"{path}.gz")
  with pytest.raises(UsageError, match="holds no problems|cannot be read: Not a gzipped file"):
    humaneval.read_problems(f"{path}.gz")


def test_damaged_files_are_refused(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  content = bytearray(gzip.compress(b'{"task_id": "a"}\n' * 1000))
  content[20:30] = b"x" * 10
  path.write_bytes(content)
  with pytest.raises(UsageError, match="cannot be read"):
    humaneval.read_problems(str(path))
