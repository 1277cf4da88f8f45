"""Questions about documents, among documents that do not answer them."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from sparsek.data.ruler.drafts import SEED, Draft
from sparsek.data.ruler.sources import Sources
from sparsek.data.ruler.tasks import QUESTIONS, SQUAD


class Question(NamedTuple):
  """A question.

  Attributes:
    text: what is asked.
    answers: each of them is right.
    documents: numbers of those that answer it.
    others: numbers of others that come before the rest.
  """

  text: str
  answers: list[str]
  documents: list[int]
  others: list[int]


class Questions:
  """The generator of the tasks qa_1 and qa_2.

  Args:
    sources: of questions and documents.
    name: of the file, SQUAD or HOTPOTQA.
  """

  shrinks = True

  def __init__(self, sources: Sources, name: str):
    self._rng = random.Random(SEED)
    content, read = sources.json(name), _read_squad if name == SQUAD else _read_hotpotqa
    try:
      self._questions, self._documents = read(content)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
      raise sources.refuse(name, error) from None
    if problem := _problem(self._questions, self._documents):
      raise sources.refuse(name, problem)
    self.step, self.most = 10, len(self._documents)
    self.count = len(self._questions)

  def make(self, size: int, index: int) -> Draft:
    """Returns a draft of question `index` with `size` documents."""
    text, answers, documents, others = self._questions[index]
    if size >= self.most:
      chosen = list(range(self.most))
    elif size - len(documents) > len(others):
      known = {*documents, *others}
      rest = [i for i in range(self.most) if i not in known]
      missing = max(0, size - len(documents) - len(others))
      chosen = documents + others + self._rng.sample(rest, missing)
    else:
      chosen = documents + self._rng.sample(others, max(0, size - len(documents)))
    random.Random(SEED).shuffle(chosen)
    context = "\n\n".join(
      f"Document {number}:\n{self._documents[i]}" for number, i in enumerate(chosen, 1)
    )
    question = QUESTIONS.question.format(context=context, query=text)
    return Draft(question, QUESTIONS.answer_prefix, text, answers, f" {answers}")


def _problem(questions: list[Question], documents: list[str]) -> str:
  """Returns why nothing can be asked of these, or ""."""
  is_text = lambda value: isinstance(value, str) and bool(value)
  if not questions:
    return "it holds no question that has an answer"
  for number, of in enumerate(questions, 1):
    if not (is_text(of.text) and of.answers and all(map(is_text, of.answers))):
      return f"question {number} is no text, or has no answer that is one"
    if not of.documents:
      return f"question {number} has no document"
  return "" if all(map(is_text, documents)) else "a document is no text"


def _read_squad(content: Any) -> tuple[list[Question], list[str]]:
  paragraphs = [[part["context"] for part in article["paragraphs"]] for article in content["data"]]
  documents, number_of = _numbered(text for texts in paragraphs for text in texts)
  questions = []
  for article, texts in zip(content["data"], paragraphs):
    numbers = [number_of[text] for text in texts]
    for part, number in zip(article["paragraphs"], numbers):
      others = [other for other in numbers if other != number]
      questions += [
        Question(asked["question"], [x["text"] for x in asked["answers"]], [number], others)
        for asked in part["qas"]
        if not asked["is_impossible"]
      ]
  return questions, documents


def _read_hotpotqa(content: Any) -> tuple[list[Question], list[str]]:
  texts = [[f"{title}\n{''.join(parts)}" for title, parts in row["context"]] for row in content]
  documents, number_of = _numbered(text for row in texts for text in row)
  questions = [
    Question(row["question"], [row["answer"]], [number_of[text] for text in of_row], [])
    for row, of_row in zip(content, texts)
  ]
  return questions, documents


def _numbered(texts) -> tuple[list[str], dict[str, int]]:
  documents: Sequence[str] = sorted(set(texts))
  return list(documents), {text: i for i, text in enumerate(documents)}
