"""The recipe that asks RULER by three programs: its commands, what goes on, its records."""

import hashlib
import json
import os
import shlex

import pytest

from sparsek.command_line.main import parse
from sparsek.errors import UsageError
from sparsek.evaluation import harness
from sparsek.experiments import evaluate_ruler, import_hf, lm_eval
from sparsek.experiments.recipes import ruler_tools
from sparsek.experiments.reports import ruler_report
from sparsek.storage import files

QUESTION = "a question"
SHA256 = hashlib.sha256(QUESTION.encode()).hexdigest()


@pytest.fixture
def options(tmp_path, monkeypatch):
  """Returns a function of further words that parses options for the runs a and b."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(ruler_tools.importlib.util, "find_spec", lambda name: name)
  for name in "ab":
    os.makedirs(f"runs/{name}")
  words = "--workdir=runs/a,runs/b --tasks=vt,fwe --lengths=4096,8192 --folder=asked --prompts=1"
  return lambda *more: ruler_tools.make_parser().parse_args([*shlex.split(words), *more])


def call_main(options):
  """Calls the recipe as in a new process."""
  for flag in evaluate_ruler.FLAGS:
    evaluate_ruler.FLAGS[flag].unparse()
  ruler_tools.main(options)


def answer(index, score):
  return {
    **{"task": "vt", "length": 4096, "index": index, "sha256": SHA256, "query": "", "answer": "X"},
    **{"outputs": ["x", "y"], "score": score},
  }


def make(step):
  """Makes what a step would make, whole at once as steps do, since others look at it meanwhile."""
  if step.words[0] == "lm_eval":
    unfinished = f"{step.output}.unfinished"
    folder = os.path.join(unfinished, "model")
    os.makedirs(folder)
    sample = {
      "doc": {"input": QUESTION, "outputs": ["x", "y"], "max_length": 4096},
      **{"resps": [["it is X and Y" if "hf" in step.words else "X"]], "4096": 0.5},
    }
    with open(os.path.join(folder, "samples_ruler_prompts_vt_2026-01-01T00.jsonl"), "w") as file:
      file.write(json.dumps(sample) + "\n")
    with open(os.path.join(unfinished, ruler_tools.TABLE), "w") as file:
      file.write("sparsek ({...})\n|Tasks|\n|-----|\n")
    os.rename(unfinished, step.output)
  elif step.output.endswith(".json"):
    runs = {f"runs/{name}": {"answers": [answer(0, 50.0)]} for name in "ab"}
    files.save(step.output, json.dumps({"benchmark": "RULER", "data": {}, "runs": runs}))
  else:
    os.makedirs(step.output)


def run(options, monkeypatch, failing=()):
  """Runs the recipe, with steps that only make their outputs; returns the names of those it ran."""
  ran = []

  def run_step(name, step, folder, at_once):
    assert all(plan[need].done for need in step.needs)
    ran.append(name)
    if name in failing:
      return None
    make(step)
    return 1.0

  plan = ruler_tools.steps(options)
  monkeypatch.setattr(ruler_tools, "run_step", run_step)
  monkeypatch.setattr(ruler_tools, "versions", dict)
  if failing:
    with pytest.raises(SystemExit, match="the same command goes on"):
      call_main(options)
  else:
    call_main(options)
  return ran


def test_every_command_parses(options):
  plan = ruler_tools.steps(options("--batch_size=4"))
  assert len(plan) == 8
  for name, step in plan.items():
    command, *words = step.words
    words = [word.replace(ruler_tools.OUTPUT, step.output) for word in words]
    if command != "lm_eval":
      flags = {"evaluate_ruler": evaluate_ruler, "import_hf": import_hf}[command].FLAGS
      for flag in flags:
        flags[flag].unparse()
      parse([command, *words], flags)
      continue
    given = dict(zip(words[:-1:2], words[1::2]))
    arguments = dict(pair.split("=", 1) for pair in given["--model_args"].split(","))
    assert arguments["max_length"] == "8242" and given["--batch_size"] == "4"  # fwe has 50 more
    if given["--model"] == "sparsek":
      assert harness.parse_arguments(arguments).workdir == os.path.abspath(f"runs/{name[0]}")
    else:
      assert arguments["pretrained"] == plan[f"{name[0]}_exported"].output
    for task in given["--tasks"].split(","):
      assert os.path.exists(os.path.join(lm_eval.TASKS, f"{task[len('ruler_prompts_') :]}.yaml"))
    assert given["--metadata"] == f"prompts={plan['prompts'].output}"


def test_finished_steps_are_skipped_and_those_that_need_a_failed_one_wait(
  options, monkeypatch, capsys
):
  given = options("--at_once=2")
  ran = run(given, monkeypatch, failing=("a_exported",))
  assert set(ran) == set(ruler_tools.steps(given)) - {"a_transformers"}
  transformers = json.loads(open("ruler_tools_transformers.json").read())
  assert (
    list(transformers["runs"]) == ["b"] and "lm-eval, model hf, 4096" in capsys.readouterr().out
  )
  assert run(given, monkeypatch) == ["a_exported", "a_transformers"]
  assert run(given, monkeypatch) == []
  page = ruler_report.lines(*ruler_tools.write_records(given, ruler_tools.steps(given)))
  assert page[2:6] == [
    "| task | evaluate-ruler, 4096 | lm-eval, model sparsek, 4096 | lm-eval, model hf, 4096 |",
    "|---|---|---|---|",
    "| vt | 50.0 | 50.0 | 100.0 |",
    "| mean | 50.0 | 50.0 | 100.0 |",
  ]
  told = "0 of 1 prompts have another score than by evaluate-ruler, the mean over all differs by"
  assert f"- lm-eval, model sparsek: {told} +0.00." == " ".join(" ".join(page[7:9]).split())
  with pytest.raises(UsageError, match="filled with other options"):
    call_main(options("--dtype=float32"))


def test_records_hold_answers_both_scores_and_what_lm_eval_printed(options, monkeypatch):
  run(options(), monkeypatch)
  for tool, text, score in (("lm_eval", "X", 50.0), ("transformers", "it is X and Y", 100.0)):
    record = json.loads(open(f"ruler_tools_{tool}.json").read())
    assert record["runs"]["a"]["printed"] == ["|Tasks|", "|-----|"]
    assert record["runs"]["b"]["answers"] == [
      {
        **{"task": "vt", "length": 4096, "index": 0, "sha256": SHA256, "answer": text},
        **{"score": score, "score_of_lm_eval": 50.0},
      }
    ]
  (path,) = [
    os.path.join(folder, name)
    for folder, _, names in os.walk("asked/a/lm_eval")
    for name in names
    if name.startswith("samples")
  ]
  with open(path) as file:
    changed = file.read().replace(QUESTION, "another one")
  with open(path, "w") as file:
    file.write(changed)
  with pytest.raises(UsageError, match="a prompt of 4096 tokens is none that evaluate-ruler asked"):
    call_main(options("--collect"))


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--workdir=runs/a,runs/c"], "runs/c: there is no such folder"),
    (["--workdir=runs/a,other/a/"], "two folders have the same name"),
    (["--tasks=vt,none"], "'none' must be one of"),
    (["--tasks=qa_1"], "qa_1 needs squad.json"),
    (["--lengths=4096,8000"], "not for 8000"),
    (["--prompts=0"], "prompts"),
    (["--batch_size=-1"], "batch_size"),
    (["--at_once=0"], "at least 1"),
    (["--only=("], "must be a regular expression"),
    (["--folder=runs"], "holds something else"),
  ],
)
def test_bad_options_are_named_before_anything_runs(options, monkeypatch, words, message):
  monkeypatch.setattr(ruler_tools, "run_steps", None)
  with pytest.raises(UsageError, match=message):
    call_main(options(*words))


def test_a_step_that_was_killed_leaves_no_output(options, monkeypatch):
  step = ruler_tools.Step("asked/a/lm_eval", ("lm_eval", "--output_path", ruler_tools.OUTPUT))
  os.makedirs("asked")
  for code, done in ((1, False), (0, True)):
    monkeypatch.setattr(ruler_tools.child, "running", lambda *_, code=code, **__: _Process(code))
    seconds = ruler_tools.run_step("a_lm_eval", step, "asked", 1)
    assert (seconds is not None) == done == step.done
  assert os.listdir("asked/a") == ["lm_eval"]


class _Process:
  """A process, and the block in which it runs."""

  def __init__(self, code):
    self.code = code

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def wait(self):
    return self.code
