"""The generated documents: answers are what the text says, and lengths are kept."""

import re

import numpy as np
import pytest

from sparsek.data import task_documents
from sparsek.data.corpus import documents
from sparsek.data.tokenizer import ByteTokenizer
from sparsek.errors import UsageError

TOKENIZER = ByteTokenizer()


def example(task, length=1500, seed=0):
  """Returns a text, its answers, and the positions where they begin."""
  tokens, answers = task_documents.make_example(
    task, TOKENIZER, length, np.random.default_rng(seed)
  )
  assert (
    length - max(map(len, task_documents.FILLER)) < len(tokens) <= length
    and len(tokens) == answers[-1][-1] + 1
  )
  return (
    TOKENIZER.decode(tokens),
    [TOKENIZER.decode(tokens[positions]) for positions in answers],
    [positions[0] for positions in answers],
  )


def problem(task):
  return task_documents.TASKS[task](np.random.default_rng(0))


def names_in(question, text):
  """Returns the names that a text asks for in the words of a question."""
  pattern = re.escape(question).replace(r"\{\}", r"(\w{4})", 1).replace(r"\{\}", r"\1")
  return re.findall(rf"\b{pattern}", text)


def solved(task, text, questions=None):
  """Returns the answers that follow from the text, asked in one of some wordings."""
  questions = [problem(task).asked] if questions is None else questions
  if task == "passkey":
    return re.findall(r"The pass key is (\d{5})\. Remember", text)
  if task == "copy":
    return [re.search(r"Letters: (.*)\n", text).group(1)]
  if task == "needle":
    known = dict(re.findall(r"The code of (\w{4}) is (\d{5})\.\n", text))
  elif task == "recall":
    known = dict(re.findall(r"(\w{4}) -> (\d{5})\n", text))
  else:
    known = {}
    for name, value in re.findall(r"(\w{4}) = (\w+)\n", text):
      known[name] = known.get(value, value)
  return [known[name] for question in questions for name in names_in(question, text)]


@pytest.mark.parametrize("task", task_documents.TASKS)
def test_answers_are_what_the_text_says(task):
  distances = []
  for seed in range(20):
    text, answers, positions = example(task, seed=seed)
    assert [answer.strip() for answer in answers] == solved(task, text) and all(
      answer[0] == " " for answer in answers
    )
    assert all(text[position:].startswith(answer) for position, answer in zip(positions, answers))
    distances.append(positions[0] - text.index(answers[0].strip()) if task != "variables" else 0)
  assert task == "variables" or max(distances) - min(distances) > 300, "facts stand at many depths"
  assert example(task, seed=1) == example(task, seed=1) != example(task, seed=2)


def answer_from(task, seen):
  """Returns the answer that follows from a text that ends before it, or some number in it."""
  numbers = re.findall(r"\d{5}", seen)
  if task == "copy":
    return (re.findall(r"Letters: (.*)\n", seen) or [None])[0]
  if task == "passkey":
    return (numbers or [None])[0]
  name = names_in(problem(task).asked, seen)[-1]
  while name.isalpha() and (line := re.search(rf"\b{name} (?:=|is|->) (\w+)\.?\n", seen)):
    name = line.group(1)
  return name if name.isdecimal() else (numbers or [None])[0]


@pytest.mark.parametrize("task", task_documents.TASKS)
def test_a_window_has_no_other_way_to_an_answer(task):
  """The last w characters are enough if the facts are among them, in about w / length of the
  documents, and never with a min_distance above w.
  """

  def share(w, min_distance=0, length=2400, documents=60):
    right = []
    for seed in range(documents):
      tokens, answers = task_documents.make_example(
        task, TOKENIZER, length, np.random.default_rng(seed), min_distance
      )
      text = TOKENIZER.decode(tokens)
      right += [
        answer_from(task, text[max(0, positions[0] - w) : positions[0]])
        == text[positions[0] + 1 : positions[-1] + 1]
        for positions in answers
      ]
    return sum(right) / len(right)

  assert share(2400) == 1, "the whole text says it"
  assert share(600) < 600 / 2400 + 0.1
  assert share(600, min_distance=600) == 0


@pytest.mark.parametrize("task", ["needle", "recall", "variables"])
def test_chance_is_one_of_the_numbers(task):
  text, _, positions = example(task)
  assert len(set(re.findall(r"\d{5}", text[: positions[0]]))) * task_documents.CHANCE[task] == 1


def test_too_short_a_row_is_refused():
  with pytest.raises(UsageError, match="the task recall needs at least"):
    task_documents.make_example("recall", TOKENIZER, 100, np.random.default_rng(0))


def test_documents_to_train_on():
  all_documents = list(documents(["tasks:1500:20"], heldout_fraction=0.2))
  assert len({document.text for document in all_documents}) == 20 and {
    document.name.split()[0] for document in all_documents
  } == set(task_documents.TASKS)
  assert all(700 < len(document.text) <= 1500 for document in all_documents)
  assert all(document.answers is None for document in all_documents)
  assert example("passkey", 1500)[0] not in {document.text for document in all_documents}
  with pytest.raises(UsageError, match="'tasks:many' must be tasks:LENGTH:COUNT"):
    list(documents(["tasks:many"]))
  with pytest.raises(
    UsageError, match="a document of the task needle needs at least [0-9]+ bytes; got 400"
  ):
    list(documents(["tasks:400:20"]))
  for document in documents(["tasks:900:20"], answers_only=True):
    assert len(document.text) <= 900 and 1 <= len(document.answers) < 32


def test_documents_to_train_on_ask_for_everything():
  """They ask for all facts, after all of them; long ones hold several tasks."""
  facts = {
    "passkey": r"Remember it",
    "needle": r"^The code",
    "recall": r"^\w{4} -> (?=\d)",
    "variables": r" = ",
    "copy": r"Letters:",
  }
  counts, mixes = {"passkey": 1, "needle": 16, "recall": 32, "variables": 4, "copy": 1}, set()
  for document in [
    *documents(["tasks:2900:20"], answers_only=True),
    *documents(["tasks:9000:30"], answers_only=True),
  ]:
    *names, _ = document.name.split()
    mixes.add(tuple(names))
    text, answers = document.text, sorted(document.answers)
    assert len(answers) == sum(counts[name] for name in names) and len(set(names)) == len(names)
    for name in names:
      assert (
        len(re.findall(facts[name], text[: answers[0][0]].rpartition("\n")[0], re.MULTILINE))
        == {**counts, "variables": 16}[name]
      )
    for begin, end in answers:
      line = text[:begin].rpartition("\n")[2]
      before = text[: answers[0][0]].rpartition("\n")[0] + "\n"
      task, question = next(
        (name, words)
        for name in task_documents.TASKS
        for words in problem(name).trained
        if re.fullmatch(re.escape(words).replace(r"\{\}", r"\w{4}"), line)
      )
      expected = solved(task, before + line, [question])[-1]
      assert task in names and text[begin:end] == f" {expected}" and text[end] == "\n"
  assert {len(names) for names in mixes} == {1, 2, 3, 4} and len(mixes) > 15


def test_no_question_is_asked_in_words_that_were_trained():
  trained = "".join(document.text for document in documents(["tasks:2900:60"]))
  for task in task_documents.TASKS:
    of = problem(task)
    assert not names_in(of.asked, trained) and of.asked not in trained
    assert len(of.trained) == 3 and all(names_in(words, trained) for words in of.trained)
    asked = example(task)[0].splitlines()[-1]
    assert not any(re.search(re.escape(w).replace(r"\{\}", r"\w{4}"), asked) for w in of.trained)


def test_a_task_without_words_for_training_is_only_asked(monkeypatch):
  def colour(rng):
    return task_documents.Problem(("It is red.\n",), (("", " red"),), asked="It is")

  monkeypatch.setitem(task_documents.TASKS, "colour", colour)
  assert example("colour")[1] == [" red"]
  assert "red" not in "".join(document.text for document in documents(["tasks:2900:20"]))
