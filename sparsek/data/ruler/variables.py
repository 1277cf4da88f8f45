"""Variable tracking: a chain of assignments among repeated sentences, after an example of one."""

import random
import string
import sys
from collections.abc import Callable

import numpy as np

from sparsek.data.ruler.drafts import SEED, DoesNotFitError, Draft, fitted_size, fitting_draft
from sparsek.data.ruler.needles import REPEATED
from sparsek.data.ruler.tasks import VARIABLES

HOPS = 4
EXAMPLE_LENGTH, EXAMPLE_STEP = 500, 5  # of the example, in tokens and lines


class Variables:
  """The generator of the task vt.

  Args:
    count: returns the tokens of a text.
  """

  shrinks = False

  def __init__(self, count: Callable[[str], int]):
    self._rng, self._numbers = random.Random(SEED), np.random.RandomState(SEED)
    self._letters, self.step, self.most = 3, EXAMPLE_STEP, sys.maxsize
    example = self._make_example(lambda draft, _: count(_text(draft) + draft.counted))
    self._example = f"{_text(example)} {' '.join(example.answers)}\n\n"
    self.example_tokens = count(self._example)
    self._letters, self.step = 5, 10

  def _make_example(self, count: Callable[[Draft, bool], int]) -> Draft:
    """Returns the example, longer than published where a tokenizer needs more tokens for it."""
    length, plain = EXAMPLE_LENGTH, lambda draft, _: count(draft._replace(counted=""), False)
    while True:
      try:
        size = fitted_size(self, count, length, VARIABLES.new_tokens)
        return fitting_draft(self, plain, length, VARIABLES.new_tokens, size, 0)
      except DoesNotFitError:
        length *= 2

  def _name(self) -> str:
    return "".join(self._rng.choices(string.ascii_uppercase, k=self._letters))

  def make(self, size: int, index: int) -> Draft:
    """Returns a draft with `size` lines of noise, without the example."""
    names: dict[str, None] = {}
    while len(names) <= HOPS:
      names[self._name()] = None
    chain, value = list(names), str(self._numbers.randint(10000, 99999))
    assignments = [f"VAR {chain[0]} = {value}"]
    assignments += [f"VAR {new} = VAR {old} " for old, new in zip(chain, chain[1:])]
    lines = [f"{REPEATED}\n"] * size
    if size <= HOPS + 1:
      lines = [part + "." if part.strip() else part for line in lines for part in line.split(".")]
    places = sorted(self._rng.sample(range(len(lines)), len(assignments)))
    for i, (place, assignment) in enumerate(zip(places, assignments)):
      lines.insert(place + i, assignment)
    context = " ".join(lines).replace(". \n", ".\n")
    question, prefix = (
      text.format(context=context, query=value, num_v=HOPS + 1)
      for text in (VARIABLES.question, VARIABLES.answer_prefix)
    )
    return Draft(question, prefix, value, chain, f" {chain}")

  def with_example(self, draft: Draft) -> Draft:
    """Returns the draft after the example, whose variables get new names."""
    example = self._example
    for name in example[example.index(VARIABLES.answer_prefix[-10:]) + 10 :].strip().split():
      new = "".join(self._rng.choices(string.ascii_uppercase, k=len(name)))
      example = example.replace(name, new)
    return draft._replace(question=f" {example}\n\n{draft.question}")


def _text(draft: Draft) -> str:
  return draft.question + draft.answer_prefix
