"""Runs in lm-eval itself, beside lm-eval's own model `hf` for the same weights.

Needs lm-eval, transformers and accelerate: pip install -e '.[test,parity,lm-eval]' accelerate
"""

import contextlib
import io
import json
import os

import pytest

from sparsek.huggingface import pretrained
from sparsek.runs import checkpoint, run_record
from tests.evaluation.harness_test import TEMPLATE, make_run

reason = "compares with lm-eval, which is not installed here: pip install -e '.[parity,lm-eval]'"
pytest.importorskip("lm_eval", reason=reason)
pytest.importorskip("accelerate", reason=f"{reason} accelerate")

import lm_eval  # noqa: E402
from lm_eval import utils as lm_eval_utils  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import sparsek.lm_eval as adapter  # noqa: E402
from sparsek.evaluation.harness import rolling_parts  # noqa: E402
from sparsek.experiments import lm_eval as command  # noqa: E402

WORDS = "def return import class self value name list number text index while for in not None"
TASKS = {
  "choices": """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
  "rolling": """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rolling.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
  "writes": """
task: writes
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/writes.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e", " class"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def sentence(start, number):
  words = WORDS.split()
  return " ".join(words[(start + i * i) % len(words)] for i in range(number))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Makes run/, a dense model, exported/, the same for transformers, and tasks/."""
  folder = tmp_path_factory.mktemp("lm_eval")
  make_run(folder / "run", attention="full")
  config, _ = run_record.load_run_config(str(folder / "run"))
  params, _ = checkpoint.load_params(str(folder / "run"), config)
  pretrained.save(
    str(folder / "exported"),
    config,
    params,
    fields={"eos_token_id": 0},
    tokenizer=str(folder / "run" / "tokenizer"),
  )
  (folder / "tasks").mkdir()
  for name, text in TASKS.items():
    (folder / "tasks" / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
  documents = {
    "choices": [
      {
        "question": sentence(i, 3 + 7 * i),
        "choices": [f" {sentence(i + j, 1 + j)}" for j in range(4)],
        "label": i % 4,
      }
      for i in range(5)
    ],
    "rolling": [{"text": sentence(i, n)} for i, n in enumerate((1, 9, 70))],
    "writes": [{"question": sentence(i, 4 + 5 * i), "answer": "x"} for i in range(4)],
  }
  for name, rows in documents.items():
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return folder


@pytest.fixture(scope="module", autouse=True)
def offline():
  with pytest.MonkeyPatch.context() as patch:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
      patch.setenv(name, "1")
    yield


def evaluate(folder, model, arguments, **options):
  """Returns the results of all tasks."""
  return lm_eval.simple_evaluate(
    model=model,
    model_args=arguments,
    tasks=list(TASKS),
    task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
    bootstrap_iters=0,
    device="cpu",
    **options,
  )


def answers(results):
  """Returns {task: what the model answered to each document's requests}."""
  return {
    name: [[x[0] for x in sample["resps"]] for sample in samples]
    for name, samples in results["samples"].items()
  }


@pytest.fixture(scope="module")
def of_hf(folder):
  arguments = {"pretrained": str(folder / "exported"), "dtype": "float32", "max_length": 48}
  return evaluate(folder, "hf", arguments, batch_size=4)


def test_answers_are_those_of_the_model_hf(folder, of_hf):
  arguments = {"workdir": str(folder / "run"), "dtype": "float32", "max_length": 48}
  ours = evaluate(folder, "sparsek", arguments, batch_size=4)
  want, got = answers(of_hf), answers(ours)
  assert got["writes"] == want["writes"] and len({x for [x] in got["writes"]}) > 1
  for kind in ("choices", "rolling"):
    values = [[x for document in a[kind] for x in document] for a in (got, want)]
    if kind == "choices":
      assert [x[1] for x in values[0]] == [x[1] for x in values[1]]
      values = [[x[0] for x in of] for of in values]
    assert values[0] == pytest.approx(values[1], rel=1e-5), kind
  for task, metrics in of_hf["results"].items():
    numbers = {name: x for name, x in metrics.items() if isinstance(x, float)}
    assert {name: ours["results"][task][name] for name in numbers} == pytest.approx(numbers)
