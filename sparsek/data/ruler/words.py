"""Aggregation: the commonest words of a numbered list, and of a text of coded words."""

import math
import random
import string
from collections.abc import Callable

import numpy as np

from sparsek.data.ruler.drafts import SEED, DoesNotFitError, Draft
from sparsek.data.ruler.sources import Sources
from sparsek.data.ruler.tasks import ADJECTIVES, CODED_WORDS, COMMON_WORDS, NOUNS, VERBS

COMMON = 10  # words that occur often
EXAMPLE = 40  # different words of the example
CODED_LETTERS, CODED_ANSWERS = 6, 3
ALPHA, ZETA = 2.0, math.pi**2 / 6  # frequencies are rank**-ALPHA, whose sum is ZETA


class CommonWords:
  """The generator of the task cwe.

  Args:
    sources: of words.
    length: of the prompts.
  """

  shrinks = True

  def __init__(self, sources: Sources, length: int):
    self._rng = random.Random(SEED)
    self._words = sorted(
      {word for name in (NOUNS, ADJECTIVES, VERBS) for word in sources.words(name)}
    )
    if len(self._words) < EXAMPLE:
      names = f"{NOUNS}, {ADJECTIVES} and {VERBS}"
      problem = f"{names} hold {len(self._words)} different words, and cwe needs {EXAMPLE} at least"
      raise sources.refuse(NOUNS, problem)
    random.Random(SEED).shuffle(self._words)
    self._is_short = length < 4096
    self.step, self.most = 10, len(self._words)

  def _list(self, size: int, often: int, seldom: int) -> tuple[str, list[str]]:
    """Returns a numbered list of `size` words, each several times, and the common ones."""
    words = self._rng.sample(self._words, size)
    rows = words[:COMMON] * often + words[COMMON:] * seldom
    random.Random(SEED).shuffle(rows)
    return _numbered(rows), words[:COMMON]

  def make(self, size: int, index: int) -> Draft:
    """Returns a draft with `size` different words."""
    example, answers = self._list(20, 3, 1) if self._is_short else self._list(EXAMPLE, 10, 3)
    context, words = self._list(size, 6, 1) if self._is_short else self._list(size, 30, 3)
    solved = (
      COMMON_WORDS.question.format(context=example)
      + COMMON_WORDS.answer_prefix
      + _numbered(answers)
    )
    question = f"{solved}\n{COMMON_WORDS.question.format(context=context)}"
    return Draft(question, COMMON_WORDS.answer_prefix, "", words, f" {_numbered(words)}")


def _numbered(words: list[str]) -> str:
  return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


class CodedWords:
  """The generator of the task fwe, which fits the length in its own way.

  As published, the prompt alone may have `length` tokens, without room for the answer.

  Args:
    count: returns the tokens of a draft.
    length: of the prompts.
  """

  def __init__(self, count: Callable[[Draft], int], length: int):
    self._rng, self._count, self._length = random.Random(SEED), count, length
    self._step = length // 32
    vocabulary, size = self._vocabulary(), length // CODED_LETTERS
    while count(_coded(vocabulary, size)) < length:
      size += self._step
    self._size = size - self._step

  def _vocabulary(self) -> list[str]:
    """Returns new words, the most frequent one first."""
    size = self._length // 50
    word = lambda: "".join(self._rng.choices(string.ascii_lowercase, k=CODED_LETTERS))
    words = [word() for _ in range(size)]
    while len(set(words)) < size:
      words.append(word())
    words = sorted(set(words))
    random.Random(SEED).shuffle(words)
    return ["...", *words[1:]]

  def make(self) -> Draft:
    """Returns the next draft that fits."""
    vocabulary, size = self._vocabulary(), self._size
    while (tokens := self._count(draft := _coded(vocabulary, size))) > self._length:
      size -= self._step
      if size <= 0:
        raise DoesNotFitError(tokens)
    return draft


def _coded(vocabulary: list[str], size: int) -> Draft:
  counts = size * np.arange(1, len(vocabulary) + 1) ** -ALPHA / ZETA
  words = [word for word, times in zip(vocabulary, counts.astype(int)) for _ in range(times)]
  random.Random(SEED).shuffle(words)
  question = CODED_WORDS.question.format(context=" ".join(words))
  answers = vocabulary[1 : CODED_ANSWERS + 1]
  return Draft(question, CODED_WORDS.answer_prefix, "", answers, "")
