"""Needles in a haystack: sentences that name numbers or words, in repeats, essays or needles."""

import bisect
import heapq
import random
import re
import sys
import uuid
from collections.abc import Iterable, Sequence

import numpy as np

from sparsek.data.ruler.drafts import SEED, Draft
from sparsek.data.ruler.sources import Sources
from sparsek.data.ruler.tasks import ADJECTIVES, ESSAYS, NEEDLES, NOUNS

NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
REPEATED = (
  "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
DEPTHS = [int(depth) for depth in np.round(np.linspace(0, 100, 40))]  # percent of an essay
_SENTENCE_END = re.compile(r"(?:(?<=[.?!])|(?<=[.?!][\"')\]])) (?=[\"'(\[]?[A-Z0-9])")


def sentences(text: str) -> list[str]:
  """Returns the sentences of a text: they end at . ? or ! before a space and a capital letter.

  The published generator asks NLTK's model, so that needles lie a few sentences apart from ours.
  """
  return _SENTENCE_END.split(text) if text else []


class Pairs(Sequence[str]):
  """The sorted list of all "adjective-noun", of which no more is made than is asked for.

  The order is by adjective, but for an adjective that begins another one ("blue", "blue-eyed").
  """

  def __init__(self, adjectives: Iterable[str], nouns: Iterable[str]):
    self._nouns = sorted(set(nouns))
    self._blocks: list[list[str]] = []  # beginnings whose words are mixed
    for beginning in sorted({f"{adjective}-" for adjective in adjectives}):
      if self._blocks and beginning.startswith(self._blocks[-1][0]):
        self._blocks[-1].append(beginning)
      else:
        self._blocks.append([beginning])
    self._mixed = {i: self._mix(block) for i, block in enumerate(self._blocks) if len(block) > 1}
    sizes = [
      len(self._mixed[i]) if i in self._mixed else len(self._nouns)
      for i in range(len(self._blocks))
    ]
    self._ends = np.cumsum(sizes, dtype=int).tolist()

  def _mix(self, block: list[str]) -> list[str]:
    rows = ([beginning + noun for noun in self._nouns] for beginning in block)
    return list(dict.fromkeys(heapq.merge(*rows)))

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index):
    i = bisect.bisect_right(self._ends, index)
    place = index - (self._ends[i - 1] if i else 0)
    return self._mixed[i][place] if i in self._mixed else self._blocks[i][0] + self._nouns[place]


class Needles:
  """The generator of the tasks niah_*.

  Args:
    sources: of words and essays.
    length: of the prompts.
    haystack: "repeat", "essay" or "needle".
    keys, values: "numbers", "words" or "uuids".
    num_keys, num_values, num_queries: needles, values of each, and how many are asked for.
  """

  shrinks = True

  def __init__(
    self,
    sources: Sources,
    length: int,
    haystack: str,
    keys: str,
    values: str,
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
  ):
    self._rng = random.Random(SEED)
    self._haystack, self._keys, self._values = haystack, keys, values
    self._num_keys, self._num_values = max(num_keys, num_queries), num_values
    self._num_queries = num_queries
    if "words" in (keys, values):
      self._words = Pairs(sources.words(ADJECTIVES), sources.words(NOUNS))
      if len(self._words) < self._num_keys:
        raise sources.refuse(
          NOUNS,
          f"with {ADJECTIVES} it makes {len(self._words)} pairs of words, and the task asks for "
          f"{self._num_keys} at least",
        )
    self.step, self.most = 5 if length < 4096 else 25, sys.maxsize
    if haystack == "essay":
      self._essay = essay_words(sources)
      self.step, self.most = 500, len(self._essay)

  def _draw(self, kind: str) -> str:
    if kind == "numbers":
      return str(self._rng.randint(10**6, 10**7 - 1))
    if kind == "words":
      return self._rng.choice(self._words)
    return str(uuid.UUID(int=self._rng.getrandbits(128), version=4))

  def _needle(self, key: str, value: str) -> str:
    return NEEDLE.format(type_needle_v=self._values, key=key, value=value)

  def make(self, size: int, index: int) -> Draft:
    """Returns a draft with `size` words of essays, repeats, or needles that nobody asks for."""
    keys, values, needles = [], [], []
    for _ in range(self._num_keys):
      keys.append(self._draw(self._keys))
      values.append([self._draw(self._values) for _ in range(self._num_values)])
      needles += [self._needle(keys[-1], value) for value in values[-1]]
    random.Random(SEED).shuffle(needles)
    context = (
      self._in_essay(size, needles) if self._haystack == "essay" else self._in(size, needles)
    )
    asked = self._rng.sample(range(self._num_keys), self._num_queries)
    queries = [keys[i] for i in asked]
    answers = [value for i in asked for value in values[i]]
    query = f"{', '.join(queries[:-1])}, and {queries[-1]}" if len(queries) > 1 else queries[0]
    is_one, kind = len(answers) == 1, self._values
    question, prefix = (
      (_singular(text) if is_one else text).format(
        type_needle_v=kind[:-1] if is_one else kind, context=context, query=query
      )
      for text in (NEEDLES.question, NEEDLES.answer_prefix)
    )
    return Draft(question, prefix, query, answers, " ".join(answers))

  def _in_essay(self, size: int, needles: list[str]) -> str:
    """Returns an essay with needles after some of its sentences."""
    parts = sentences(" ".join(self._essay[:size]).strip())
    depths = self._rng.sample(DEPTHS, len(needles))
    cuts = [0, *sorted(int(len(parts) * (depth / 100)) for depth in depths), len(parts)]
    mixed = []
    for i, (begin, end) in enumerate(zip(cuts, cuts[1:])):
      mixed += [" ".join(parts[begin:end]), *needles[i : i + 1]]
    return " ".join(mixed)

  def _in(self, size: int, needles: list[str]) -> str:
    """Returns lines with needles between them."""
    if self._haystack == "repeat":
      lines = [REPEATED] * size
    else:
      lines = [self._needle(self._draw(self._keys), self._draw(self._values)) for _ in range(size)]
    places = sorted(self._rng.sample(range(size), len(needles)), reverse=True)
    for place, needle in zip(places, needles):
      lines.insert(place, needle)
    return "\n".join(lines)


def essay_words(sources: Sources) -> list[str]:
  """Returns the words of the essays."""
  try:
    words = re.sub(r"\s+", " ", sources.json(ESSAYS)["text"]).split(" ")
  except (TypeError, KeyError) as error:
    raise sources.refuse(ESSAYS, error) from None
  if not any(words):
    raise sources.refuse(ESSAYS, "its text has no words")
  return words


def _singular(text: str) -> str:
  return text.replace("Some", "A").replace("are all", "is").replace("are", "is")
