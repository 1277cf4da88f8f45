"""Generated documents that ask for facts far before: passkey, needle, recall, variables, copy.

A document holds lines of facts, in order but with filler between them, and then questions whose
answers are known and marked. `sparsek.evaluation.tasks` measures how many a model gets right. It
asks in other words than the documents of `texts`, on which models train.

A sliding window of w tokens contains the fact in about w / length of the documents. Deep models see
it more often, since a window passes on what it saw to the window of the next layer: layers * w
tokens at most. `min_distance` keeps the facts farther away than that.
"""

import dataclasses
import functools
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from sparsek.data.tokenizer import ByteTokenizer, Tokenizer
from sparsek.errors import UsageError

T = TypeVar("T")

FILLER = (
  "The grass is green.\n",
  "The sky is blue.\n",
  "The sun is yellow.\n",
  "Here we go.\n",
  "There and back again.\n",
  "Time went by.\n",
)
NEEDLES = 16  # facts of the task needle, one of which is asked for
PAIRS, ASKED = 32, 4  # pairs of the task recall, and how many of them are asked for
CHAIN, CHAINS = 3, 4  # assignments that lead to an answer of the task variables; number of chains
COPIED = 16  # letters of the task copy
BYTES_PER_TASK = 2048  # of a training document; longer ones hold several tasks


@dataclasses.dataclass(frozen=True)
class Problem:
  """Facts, and the questions that they answer.

  Attributes:
    facts: lines, in order.
    questions: (name, answer) of everything that can be asked.
    asked: how an evaluation asks for a name, which stands for {}.
    trained: how training documents ask, in other words, so that no question is one that a model was
      trained on; empty for a task that no document trains.
  """

  facts: tuple[str, ...]
  questions: tuple[tuple[str, str], ...]
  asked: str
  trained: tuple[str, ...] = ()


def _numbers(rng: np.random.Generator, count: int) -> list[str]:
  """Returns different numbers of five digits."""
  return [str(x) for x in rng.choice(90000, count, replace=False) + 10000]


def _names(rng: np.random.Generator, count: int) -> list[str]:
  """Returns different names of four letters."""
  names: dict[str, None] = {}
  while len(names) < count:
    names["".join(rng.choice(list(string.ascii_lowercase), 4))] = None
  return list(names)


def passkey(rng: np.random.Generator) -> Problem:
  """Asks for one number (Mohtashami and Jaggi 2023)."""
  (number,) = _numbers(rng, 1)
  return Problem(
    (f"The pass key is {number}. Remember it.\n",),
    (("", f" {number}"),),
    asked="Which pass key was to be remembered? It was",
    trained=(
      "What is the pass key? The pass key is",
      "Tell me the pass key. It is",
      "The number of the pass key:",
    ),
  )


def needle(rng: np.random.Generator) -> Problem:
  """Asks for one of sixteen sentences that differ only in name and number."""
  pairs = list(zip(_names(rng, NEEDLES), _numbers(rng, NEEDLES)))
  return Problem(
    tuple(f"The code of {name} is {number}.\n" for name, number in pairs),
    tuple((name, f" {number}") for name, number in pairs),
    asked="Which code belongs to {}? The one of {} was",
    trained=(
      "What is the code of {}? The code of {} is",
      "Tell me the code of {}. It is",
      "The number of {}:",
    ),
  )


def recall(rng: np.random.Generator) -> Problem:
  """Asks for some of many pairs (multi-query associative recall, Arora et al. 2023)."""
  pairs = list(zip(_names(rng, PAIRS), _numbers(rng, PAIRS)))
  return Problem(
    tuple(f"{name} -> {number}\n" for name, number in pairs),
    tuple((name, f" {number}") for name, number in pairs),
    asked="{} went to",
    trained=("{} ->", "{} leads to", "After {} comes"),
  )


def variables(rng: np.random.Generator) -> Problem:
  """Asks for the variable at the end of a chain of assignments.

  Reference: RULER, Hsieh et al. 2024, arXiv 2404.06654.
  """
  names, numbers = _names(rng, CHAINS * (CHAIN + 1)), _numbers(rng, CHAINS)
  chains = [names[i * (CHAIN + 1) : (i + 1) * (CHAIN + 1)] for i in range(CHAINS)]
  assignments = [
    [f"{chain[0]} = {number}\n", *(f"{new} = {old}\n" for old, new in zip(chain, chain[1:]))]
    for chain, number in zip(chains, numbers)
  ]
  return Problem(
    _shuffled(assignments, rng),
    tuple((chain[-1], f" {number}") for chain, number in zip(chains, numbers)),
    asked="In the end {} equals",
    trained=("The value of {} is", "Tell me the value of {}. It is", "Now {} has the value"),
  )


def copy(rng: np.random.Generator) -> Problem:
  """Asks to repeat a row of letters."""
  letters = " ".join(rng.choice(list(string.ascii_lowercase), COPIED))
  return Problem(
    (f"Letters: {letters}\n",),
    (("", f" {letters}"),),
    asked="Those were, once more,",
    trained=("The letters again:", "Repeat the letters:", "The same letters:"),
  )


def _shuffled(rows: Iterable[Iterable[str]], rng: np.random.Generator) -> tuple[str, ...]:
  """Returns the items of all rows in random order, but those of each row in their own order."""
  remaining = [list(row) for row in rows]
  row_numbers = np.repeat(np.arange(len(remaining)), [len(row) for row in remaining])
  return tuple(remaining[i].pop(0) for i in rng.permutation(row_numbers))


TASKS: dict[str, Callable[[np.random.Generator], Problem]] = {
  "passkey": passkey,
  "needle": needle,
  "recall": recall,
  "variables": variables,
  "copy": copy,
}

# The accuracy of guessing among the numbers of a document; in passkey and copy, of guessing with no
# knowledge of the document.
CHANCE = {
  "passkey": 1 / 90000,
  "needle": 1 / NEEDLES,
  "recall": 1 / PAIRS,
  "variables": 1 / CHAINS,
  "copy": len(string.ascii_lowercase) ** -COPIED,
}


def make_example(
  task: str, tokenizer: Tokenizer, length: int, rng: np.random.Generator, min_distance: int = 0
) -> tuple[np.ndarray, list[np.ndarray]]:
  """Returns a document and the positions of its answers.

  It begins as the tokenizer begins documents, and holds as much filler as fits, the facts anywhere
  in it, and then the questions.

  Args:
    task: a key of TASKS.
    tokenizer: encodes the document.
    length: largest number of tokens.
    rng: determines the document.
    min_distance: smallest number of tokens between the last fact and the first question.
  Returns:
    (tokens [at most length] int32, the positions of the tokens of each answer).
  Raises:
    UsageError: where facts, distance and questions alone are longer.
  """
  problem, encode = TASKS[task](rng), functools.partial(tokenizer.encode, continues=True)
  asked = rng.choice(len(problem.questions), ASKED if task == "recall" else 1, replace=False)
  facts = list(map(encode, problem.facts))
  questions = [
    (encode(_worded(problem.asked, name)), encode(answer))
    for name, answer in (problem.questions[i] for i in asked)
  ]
  newline = encode("\n")
  size = len(tokenizer.bos_ids) + sum(map(len, facts)) + (len(questions) - 1) * len(newline)
  size += sum(len(part) for question in questions for part in question)
  min_filler = min_distance + max(len(encode(line)) for line in FILLER) if min_distance else 0
  if length - size < min_filler:
    far = f", {min_distance} of them between facts and question" if min_distance else ""
    raise UsageError(
      f"a document of the task {task} needs at least {size + min_filler} tokens with this "
      f"tokenizer{far}; got {length}"
    )
  lines = _filler(tokenizer, length - size, rng)
  tail_sizes = np.cumsum([0, *map(len, lines[::-1])])  # tokens of the last 0, 1, ... filler lines
  num_slots = len(lines) + 1 - int(np.searchsorted(tail_sizes, min_distance))
  lines = _insert(lines, facts, num_slots, rng)
  tokens, answers = [*tokenizer.bos_ids, *(token for line in lines for token in line)], []
  for i, (question, answer) in enumerate(questions):
    tokens += (newline if i else []) + question
    answers.append(np.arange(len(tokens), len(tokens) + len(answer)))
    tokens += answer
  return np.array(tokens, np.int32), answers


def _worded(question: str, name: str) -> str:
  return question.replace("{}", name)


def _filler(tokenizer: Tokenizer, size: int, rng: np.random.Generator) -> list[list[int]]:
  """Returns random lines of filler as tokens, until the next one does not fit in `size` tokens."""
  all_lines = [tokenizer.encode(line, continues=True) for line in FILLER]
  lines = []
  while (line := all_lines[rng.integers(len(all_lines))]) and len(line) <= size:
    lines.append(line)
    size -= len(line)
  return lines


def _insert(
  lines: Sequence[T], inserted: Sequence[T], num_slots: int, rng: np.random.Generator
) -> list[T]:
  """Returns the lines with others inserted in their order, at random.

  Each comes before one of the first `num_slots` lines; with one slot more than there are lines, the
  last slot is the end.
  """
  mixed: list[T] = []
  begin = 0
  for line, slot in zip(inserted, np.sort(rng.integers(0, num_slots, len(inserted)))):
    mixed += [*lines[begin:slot], line]
    begin = slot
  return mixed + list(lines[begin:])


def texts(length: int, count: int) -> Iterator[tuple[str, str, tuple[tuple[int, int], ...]]]:
  """Yields (name, text, (begin, end) of its answers) of `count` training documents.

  They have from length / 2 to length bytes, and differ from those of `make_example`. A document
  holds one task for every BYTES_PER_TASK bytes, at least one, and each task at most once; the tasks
  take turns. All facts come among the first lines. As many questions as fit come one by one among
  the later lines, since a few answered tokens per document would teach little.
  """
  tokenizer = ByteTokenizer()  # a byte is a character here
  names = [name for name, task in TASKS.items() if task(np.random.default_rng(0)).trained]
  for i in range(count):
    rng = np.random.default_rng([2**62, length, i])
    size = int(rng.integers(length // 2, length + 1))
    num_tasks = min(max(1, size // BYTES_PER_TASK), len(names))
    chosen = rng.permutation([names[(i + j) % len(names)] for j in range(num_tasks)])
    problems = [TASKS[name](rng) for name in chosen]
    facts = _shuffled([problem.facts for problem in problems], rng)
    questions = [
      (_worded(problem.trained[rng.integers(len(problem.trained))], name), answer)
      for problem in problems
      for name, answer in problem.questions
    ]
    questions = [questions[j] for j in rng.permutation(len(questions))]
    free = size - sum(map(len, facts))
    sizes = np.cumsum([len(question) + len(answer) + 1 for question, answer in questions])
    if free + length - size < sizes[0]:
      raise UsageError(
        f"a document of the task {' and '.join(chosen)} needs at least "
        f"{length - free + sizes[0]} bytes; got {length}"
      )
    questions = questions[: max(1, int(np.searchsorted(sizes, free, "right")))]
    filler = _filler(tokenizer, free - sizes[len(questions) - 1], rng)
    lines = [(tokenizer.decode(line), "") for line in filler]
    middle = int(rng.integers(len(lines) // 4, 3 * len(lines) // 4 + 1))
    lines = [
      *_insert(lines[:middle], [(fact, "") for fact in facts], middle + 1, rng),
      *_insert(lines[middle:], questions, len(lines) - middle + 1, rng),
    ]
    text, answers = "", []
    for begin, answer in lines:
      text += begin + answer
      if answer:
        answers.append((len(text) - len(answer), len(text)))
        text += "\n"
    yield " ".join((*chosen, str(i))), text, tuple(answers)
