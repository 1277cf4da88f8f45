"""Prompts before their length is fitted, and the fitting."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

SEED = 42  # of all draws, as published
MOST_DRAWS = 10000  # for a prompt that fits


class Draft(NamedTuple):
  """A prompt of some size.

  Attributes:
    question: what the user says.
    answer_prefix: the beginning of the answer.
    query: what is asked for, or "".
    answers: what a right answer holds.
    counted: text that the fitting counts after the prompt.
  """

  question: str
  answer_prefix: str
  query: str
  answers: list[str]
  counted: str


class Generator(Protocol):
  """A generator of drafts, which takes random numbers in the published order.

  Attributes:
    step: by which sizes are tried; the least size too.
    most: largest size.
    shrinks: prompts that chance made too long get fewer pieces; otherwise they are drawn again.
  """

  step: int
  most: int
  shrinks: bool

  def make(self, size: int, index: int) -> Draft:
    """Returns a draft with `size` pieces of haystack; `index` counts prompts."""


class DoesNotFitError(Exception):
  """A prompt of the least size that is longer than asked for; holds the length that it needs."""


def fitted_size(
  generator: Generator, count: Callable[[Draft, bool], int], length: int, new_tokens: int
) -> int:
  """Returns the size of the prompts of `length` tokens, by trying larger and larger ones.

  Each size is drawn, as published. Counting takes long, so sizes are not counted that are less than
  halfway from the last counted one to where the length would be reached.

  Args:
    generator: of the prompts.
    count: returns the tokens of a draft, of what is counted after it too where it is given True.
    length: most tokens of a prompt and its answer.
    new_tokens: room for the answer.
  Raises:
    DoesNotFitError: where the least size is too large.
  """
  size, tokens, fits = generator.step, 0, 0.0
  while tokens + new_tokens < length:
    draft = generator.make(size, 0)
    if size >= fits:
      tokens = count(draft, True)
      if tokens + new_tokens > length:
        size -= generator.step
        break
      fits = size + size / tokens * (length - new_tokens - tokens) / 2
    size += generator.step
    if size > generator.most:
      return generator.most
  if size < generator.step:
    raise DoesNotFitError(tokens + new_tokens)
  return size


def fitting_draft(
  generator: Generator,
  count: Callable[[Draft, bool], int],
  length: int,
  new_tokens: int,
  size: int,
  index: int,
) -> Draft:
  """Returns a draft of `size` that fits, or of fewer pieces where chance made these too long."""
  tokens = 0
  for _ in range(MOST_DRAWS):
    draft = generator.make(size, index)
    tokens = count(draft, False)
    if tokens + new_tokens <= length:
      return draft
    if generator.shrinks and size <= generator.step:
      break
    size -= generator.step * generator.shrinks
  raise DoesNotFitError(tokens + new_tokens)
