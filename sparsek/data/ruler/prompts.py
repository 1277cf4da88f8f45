"""Prompts of a task, fitted to a tokenizer."""

import hashlib
import itertools
from array import array
from collections.abc import Callable, Iterator
from typing import NamedTuple

from sparsek.data.chat_template import Chat
from sparsek.data.ruler.drafts import DoesNotFitError, Draft, Generator, fitted_size, fitting_draft
from sparsek.data.ruler.needles import Needles
from sparsek.data.ruler.questions import Questions
from sparsek.data.ruler.sources import Sources
from sparsek.data.ruler.tasks import TASKS, VARIABLES
from sparsek.data.ruler.variables import Variables
from sparsek.data.ruler.words import CodedWords, CommonWords
from sparsek.errors import UsageError


class Prompt(NamedTuple):
  """A prompt.

  Attributes:
    text: all of it, with chat template and answer prefix.
    tokens: ids of the text.
    query: what it asks for, or "" where the task asks the same question of every text.
    outputs: what a right answer holds.
  """

  text: str
  tokens: array
  query: str
  outputs: list[str]

  @property
  def sha256(self) -> str:
    """Returns the hash of the text, in hex."""
    return hashlib.sha256(self.text.encode("utf-8", "replace")).hexdigest()


def make_prompts(
  task: str, length: int, encode: Callable[[str], list[int]], sources: Sources, chat: Chat = str
) -> Iterator[Prompt]:
  """Yields the prompts of a task, always the same ones: they are drawn one after the other.

  Args:
    task: a key of TASKS.
    length: most tokens of a prompt and its answer; of the task fwe, as published, of the prompt
      alone.
    encode: returns the tokens of a text as the model is fed them.
    sources: of the task's data.
    chat: puts what the user says between the words of a chat template, up to where the model's
      answer begins. By default adds nothing.
  Raises:
    UsageError: where the data cannot be understood, or the shortest prompt is longer.
  """
  text_of = lambda draft: chat(draft.question) + draft.answer_prefix
  drafts = _drafts(task, length, lambda text: len(encode(text)), text_of, sources)
  try:
    for draft in drafts:
      text = text_of(draft)
      yield Prompt(text, array("i", encode(text)), draft.query, draft.answers)
  except DoesNotFitError as error:
    raise UsageError(
      f"--lengths={length}: the shortest prompts of {task} and their answers have up to "
      f"{error.args[0]} tokens with this tokenizer"
    ) from None


def most_tokens(task: str, length: int) -> int:
  """Returns the most tokens of a prompt with its answer, for which a model must have positions."""
  return length + (TASKS[task].template.new_tokens if task == "fwe" else 0)


def shortest(
  task: str, length: int, encode: Callable[[str], list[int]], sources: Sources, chat: Chat = str
) -> int:
  """Returns the tokens of one of the shortest prompts of a task with its answer.

  The arguments are those of `make_prompts`.
  """
  tokens = lambda text: len(encode(text))
  text_of = lambda draft: chat(draft.question) + draft.answer_prefix
  new_tokens = TASKS[task].template.new_tokens
  if task == "fwe":
    try:
      return tokens(text_of(CodedWords(lambda draft: tokens(text_of(draft)), length).make()))
    except DoesNotFitError as error:
      return error.args[0]
  generator = _generator(task, length, tokens, sources)
  draft = generator.make(generator.step, 0)
  if isinstance(generator, Variables):
    draft = generator.with_example(draft)
  return tokens(text_of(draft)) + new_tokens


def _drafts(
  task: str,
  length: int,
  tokens: Callable[[str], int],
  text_of: Callable[[Draft], str],
  sources: Sources,
) -> Iterator[Draft]:
  """Yields the prompts as drafts; raises DoesNotFitError where the shortest one is longer."""
  new_tokens = TASKS[task].template.new_tokens
  more = 0  # tokens that are put before each draft
  count = lambda draft, and_counted: (
    more + tokens(text_of(draft) + (draft.counted if and_counted else ""))
  )
  if task == "fwe":
    coded = CodedWords(lambda draft: tokens(text_of(draft)), length)
    while True:
      yield coded.make()
  generator = _generator(task, length, tokens, sources)
  if isinstance(generator, Variables):
    more = generator.example_tokens
  size = fitted_size(generator, count, length, new_tokens)
  for index in range(generator.count) if isinstance(generator, Questions) else itertools.count():
    draft = fitting_draft(generator, count, length, new_tokens, size, index)
    yield generator.with_example(draft) if isinstance(generator, Variables) else draft


def _generator(task: str, length: int, tokens: Callable[[str], int], sources: Sources) -> Generator:
  """Returns the generator of a task other than fwe."""
  of = TASKS[task]
  if of.template is VARIABLES:
    return Variables(tokens)
  if task == "cwe":
    return CommonWords(sources, length)
  if task.startswith("qa"):
    return Questions(sources, *of.files)
  return Needles(sources, length, **of.arguments)
