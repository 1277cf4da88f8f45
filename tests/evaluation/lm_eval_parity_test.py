"""Runs in lm-eval itself, beside lm-eval's own model `hf` for the same weights.

Needs lm-eval, transformers and accelerate: pip install -e '.[test,parity,lm-eval]' accelerate
"""

import hashlib
import json
import sys

import pytest

from sparsek.data.chat_messages import ChatTemplate
from sparsek.errors import UsageError
from sparsek.huggingface import pretrained
from sparsek.runs import checkpoint, run_record
from tests.evaluation.harness_test import TEMPLATE, make_run

reason = "compares with lm-eval, which is not installed here: pip install -e '.[parity,lm-eval]'"
pytest.importorskip("lm_eval", reason=reason)
pytest.importorskip("accelerate", reason=f"{reason} accelerate")

import lm_eval.__main__  # noqa: E402
import transformers  # noqa: E402
from lm_eval import utils as lm_eval_utils  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import sparsek.lm_eval as adapter  # noqa: E402
from sparsek.evaluation.harness import rolling_parts  # noqa: E402
from sparsek.experiments import lm_eval as command  # noqa: E402
from sparsek.experiments.recipes import ruler_tools  # noqa: E402

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
fewshot_split: test
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
  outputs = {"vt": ["", "zz"], "qa_1": ["", "zz"]}  # "" is in every answer
  for task, right in outputs.items():
    documents[f"prompts/4096/{task}/validation"] = [
      {"index": i, "input": sentence(i, 9), "outputs": right, "max_length": 4096} for i in range(3)
    ]
    (folder / f"prompts/4096/{task}").mkdir(parents=True)
  for name, rows in documents.items():
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return folder


@pytest.fixture(scope="module", autouse=True)
def offline():
  with pytest.MonkeyPatch.context() as patch:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
      patch.setenv(name, "1")
    yield


def evaluate(folder, model, arguments, tasks=TASKS, include="tasks", **options):
  """Returns the results of tasks."""
  manager = TaskManager(
    include_path=str(folder / include),
    include_defaults=False,
    metadata={"prompts": str(folder / "prompts")},
  )
  return lm_eval.simple_evaluate(
    model=model,
    model_args=arguments,
    tasks=list(tasks),
    task_manager=manager,
    bootstrap_iters=0,
    device="cpu",
    batch_size=4,
    **options,
  )


def numbers_of(results):
  """Returns {task: {metric: value}}."""
  return {
    task: {name: x for name, x in metrics.items() if isinstance(x, float)}
    for task, metrics in results["results"].items()
  }


def answers(results):
  """Returns {task: what the model answered to each document's requests}."""
  return {
    name: [[x[0] for x in sample["resps"]] for sample in samples]
    for name, samples in results["samples"].items()
  }


def hf(folder):
  return {"pretrained": str(folder / "exported"), "dtype": "float32", "max_length": 48}


def ours(folder, **more):
  return {"workdir": str(folder / "run"), "dtype": "float32", "max_length": 48, **more}


def test_answers_are_those_of_the_model_hf(folder):
  of_hf, of_ours = evaluate(folder, "hf", hf(folder)), evaluate(folder, "sparsek", ours(folder))
  want, got = answers(of_hf), answers(of_ours)
  assert got["writes"] == want["writes"] and len({x for [x] in got["writes"]}) > 1
  for kind in ("choices", "rolling"):
    values = [[x for document in of[kind] for x in document] for of in (got, want)]
    if kind == "choices":
      assert [x[1] for x in values[0]] == [x[1] for x in values[1]]
      values = [[x[0] for x in of] for of in values]
    assert values[0] == pytest.approx(values[1], rel=1e-5), kind
  for task, metrics in numbers_of(of_hf).items():
    assert numbers_of(of_ours)[task] == pytest.approx(metrics), task
  recorded = json.loads(json.dumps(of_ours["config"]))["sparsek"]
  assert recorded["step"] == 7 and recorded["model"]["attention"] == ["full"]


@pytest.mark.parametrize("as_turns", [False, True])
def test_chats_are_those_of_the_model_hf(folder, as_turns):
  options = {
    "apply_chat_template": True,
    "fewshot_as_multiturn": as_turns,
    "system_instruction": "list text",
    "num_fewshot": 2,
    "tasks": ("writes",),
  }
  of_hf, of_ours = (
    evaluate(folder, *model, **options)["samples"]["writes"]
    for model in (
      ("hf", {**hf(folder), "max_length": 200}),
      ("sparsek", ours(folder, max_length=200)),
    )
  )
  asked, resps = (
    [[x[name] for x in of] for of in (of_hf, of_ours)] for name in ("arguments", "resps")
  )
  assert asked[0] == asked[1] and resps[0] == resps[1]
  assert asked[0][0][0][0].startswith("<|system|>list text<|endoftext|><|user|>")


def test_ruler_prompts_from_files_have_the_scores_of_the_model_hf(folder):
  tasks = ("ruler_prompts_vt", "ruler_prompts_qa_1")
  of_hf, of_ours = (
    evaluate(folder, *model, tasks=tasks, include=command.TASKS)
    for model in (
      ("hf", {**hf(folder), "max_length": 120}),
      ("sparsek", ours(folder, max_length=120)),
    )
  )
  assert numbers_of(of_hf) == numbers_of(of_ours) and answers(of_hf) == answers(of_ours)
  (sample, *_), lines = of_ours["samples"]["ruler_prompts_vt"], folder / "prompts/4096/vt"
  first = json.loads((lines / "validation.jsonl").read_text().splitlines()[0])
  assert sample["arguments"][0][0] == first["input"]
  assert sample["arguments"][0][1]["max_gen_toks"] == 30
  scores = [numbers_of(of_ours)[task]["4096,none"] for task in tasks]
  # lm-eval counts the right outputs of questions too, where RULER's own programs take any one.
  assert scores == [0.5, 0.5]


def test_the_answers_that_the_command_writes_go_into_records(folder, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["sparsek"])
  words = ["--tasks", "ruler_prompts_vt,ruler_prompts_qa_1", "--log_samples", "--output_path"]
  words += [str(folder / "written"), "--metadata", f"prompts={folder}/prompts", "--batch_size", "3"]
  arguments = f"workdir={folder}/run,max_length=120"
  command.evaluate(["--model", "sparsek", "--model_args", arguments, *words])
  right = {}
  for task in ("vt", "qa_1"):
    for line in (folder / f"prompts/4096/{task}/validation.jsonl").read_text().splitlines():
      prompt = json.loads(line)
      sha256 = hashlib.sha256(prompt["input"].encode()).hexdigest()
      right[task, 4096, sha256] = prompt
  rows = ruler_tools.answers_of(str(folder / "written"), right)
  assert [(row["task"], row["index"]) for row in rows] == [
    (task, i) for task in ("vt", "qa_1") for i in range(3)
  ]
  assert [row["score"] for row in rows] == [50] * 3 + [100] * 3 and all(
    row["answer"] for row in rows
  )
  assert {row["score_of_lm_eval"] for row in rows} == {50}


def test_the_command_prints_a_table_and_names_bad_arguments(folder, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["sparsek"])
  words = ["--model", "sparsek", "--tasks", "choices", "--include_path", str(folder / "tasks")]
  words += ["--batch_size", "3", "--use_cache", str(folder / "cache"), "--model_args"]
  command.evaluate([*words, f"workdir={folder}/run,max_length=48"])
  table = capsys.readouterr().out
  assert "|choices|" in table and "|acc_norm|" in table
  monkeypatch.setattr(adapter.SparsekLM, "_read", None)  # all answers are in the cache now
  command.evaluate([*words, f"workdir={folder}/run,max_length=48"])
  assert capsys.readouterr().out == table
  with pytest.raises(UsageError, match="^k=0: must be an integer of at least 1"):
    command.evaluate([*words, f"workdir={folder}/run,k=0"])


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--tasks=choice,rolling"], "Tasks not found: choice; `sparsek lm-eval ls tasks` lists all"),
    (["--config=nowhere.yaml"], "Config file not found: .*/nowhere.yaml"),
    ([], "No tasks specified, or no tasks found.*; `sparsek lm-eval ls tasks` lists all"),
    (["--tasks=choices", "--limit=0"], "task.build_requests.* did not find any docs!$"),
    (["--tasks=choices", "--log_samples"], "Specify --output_path"),
    (["--tasks=choices", "--model=sparsk"], "Attempted to load model 'sparsk', but no model for"),
  ],
)
def test_what_lm_eval_refuses_is_one_sentence(words, said, folder, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["sparsek"])
  base = ["--model", "sparsek", "--model_args", f"workdir={folder}/run"]
  with pytest.raises(UsageError, match=f"^lm-eval: {said}") as caught:
    command.evaluate([*base, "--include_path", str(folder / "tasks"), *words])
  assert "\n" not in str(caught.value)


def test_a_fault_of_a_model_keeps_its_traceback(monkeypatch):
  def broken():
    raise ValueError("a bug")

  monkeypatch.setattr(sys, "argv", ["sparsek"])
  monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", broken)
  with pytest.raises(ValueError, match="^a bug"):
    command.evaluate([])


@pytest.mark.parametrize(
  ("given", "passed"),
  [
    (["ls", "tasks"], ["ls", "tasks", "--include_path", command.TASKS]),
    (["--include_path=here", "--tasks=a"], ["--include_path=here", "--tasks=a"]),
    (["run", "-C", "a.yaml"], ["run", "-C", "a.yaml"]),
  ],
)
def test_own_tasks_are_there_unless_others_are_named(given, passed, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["sparsek"])
  monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: None)
  command.evaluate(given)
  assert sys.argv == ["lm-eval", *passed]


def test_texts_are_cut_as_lm_eval_cuts_them():
  for length in range(1, 40):
    tokens = list(range(100, 100 + length))
    for most in (2, 3, 7, 39, 40):
      windows = lm_eval_utils.get_rolling_token_windows(tokens, 0, most, 1)
      want = list(map(lm_eval_utils.make_disjoint_window, windows))
      assert rolling_parts(tokens, [0], most) == want


@pytest.mark.parametrize("final", ["Answer:", " The answer is  "])
def test_templates_are_rendered_as_transformers_renders_them(folder, final):
  messages = [{"role": "user", "content": "a  "}, {"role": "assistant", "content": final}]
  tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder / "exported"))
  loop = "{% for message in messages %}[{{ message.content | tojson }}{{ eos_token }}]\n"
  loop += "  {% if loop.last %}{% break %}{% endif %}\n{% endfor %}{{ bos_token }}"
  for text in (TEMPLATE, TEMPLATE.replace(" | trim", ""), loop):
    ours = ChatTemplate(text, {"eos_token": "<|endoftext|>"})
    for starts in (True, False):
      want = tokenizer.apply_chat_template(
        messages,
        chat_template=text,
        tokenize=False,
        add_generation_prompt=starts,
        continue_final_message=not starts,
      )
      assert ours.render(messages, starts) == want


def test_a_template_that_refuses_says_why():
  for text, reason in (
    ("{{ raise_exception('no system role') }}", "no system role"),
    ("{% if %}", "Expected an expression"),
    ("{{ 1 + messages[0].other }}", "other"),
  ):
    with pytest.raises(UsageError, match=f"the chat template cannot be rendered: .*{reason}"):
      ChatTemplate(text, {}).render([{"role": "user", "content": "a"}])
  with pytest.raises(UsageError, match="leaves out the last message"):
    ChatTemplate("a", {}).render([{"role": "user", "content": "a"}], False)
