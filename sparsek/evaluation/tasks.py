"""Generated documents with known answers that stand far before the question: passkey, needles,
recall, variables, copy.

A document is lines of facts, in their order but with filler of no use between them, and a question
whose answers are marked. An answer counts as right where every token of it is the most probable
one, given all before it: greedy decoding would write it.

A sliding window of w tokens has the fact in sight in about w / length of the documents; in deep
models more, since a window hands on to the next layer's what it saw: layers * w tokens at most.
`min_distance` keeps the facts farther away than that.
"""

import dataclasses
import functools
import math
import string
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sparsek.config import TransformerConfig
from sparsek.data.tokenizer import ByteTokenizer, Tokenizer
from sparsek.errors import UsageError
from sparsek.model.transformer import Params, Transformer, hidden_to_logits, output_matrix
from sparsek.parallel.mesh import BATCH, make_mesh, replicated

FILLER = (
  "The grass is green.\n",
  "The sky is blue.\n",
  "The sun is yellow.\n",
  "Here we go.\n",
  "There and back again.\n",
  "Time went by.\n",
)
NEEDLES = 16  # facts of which one is asked for
PAIRS, ASKED = 32, 4  # of recall, and how many are asked for
CHAIN, CHAINS = 3, 4  # assignments that an answer hangs on; how many such chains there are
COPIED = 16  # letters
BYTES_PER_TASK = 2048  # of a document to train on: longer ones ask for more than one thing


@dataclasses.dataclass(frozen=True)
class Problem:
  """facts: lines, in order; questions: what can be asked, each (how it begins, its answer)."""

  facts: tuple[str, ...]
  questions: tuple[tuple[str, str], ...]


def _numbers(rng: np.random.Generator, count: int) -> list[str]:
  """Different numbers of five digits."""
  return [str(x) for x in rng.choice(90000, count, replace=False) + 10000]


def _names(rng: np.random.Generator, count: int) -> list[str]:
  """Different names of four letters."""
  names: dict[str, None] = {}
  while len(names) < count:
    names["".join(rng.choice(list(string.ascii_lowercase), 4))] = None
  return list(names)


def passkey(rng: np.random.Generator) -> Problem:
  """One number (Mohtashami and Jaggi 2023)."""
  (number,) = _numbers(rng, 1)
  return Problem(
    (f"The pass key is {number}. Remember it.\n",),
    (("What is the pass key? The pass key is", f" {number}"),),
  )


def needle(rng: np.random.Generator) -> Problem:
  """One of sixteen sentences that differ in name and number only."""
  pairs = list(zip(_names(rng, NEEDLES), _numbers(rng, NEEDLES)))
  return Problem(
    tuple(f"The code of {name} is {number}.\n" for name, number in pairs),
    tuple(
      (f"What is the code of {name}? The code of {name} is", f" {number}") for name, number in pairs
    ),
  )


def recall(rng: np.random.Generator) -> Problem:
  """Several of many pairs (multi-query associative recall, Arora et al. 2023, arXiv 2312.04927)."""
  pairs = list(zip(_names(rng, PAIRS), _numbers(rng, PAIRS)))
  return Problem(
    tuple(f"{name} -> {number}\n" for name, number in pairs),
    tuple((f"{name} ->", f" {number}") for name, number in pairs),
  )


def variables(rng: np.random.Generator) -> Problem:
  """The value of a variable that was assigned from another, and that from another (RULER, Hsieh et
  al. 2024, arXiv 2404.06654).
  """
  names, numbers = _names(rng, CHAINS * (CHAIN + 1)), _numbers(rng, CHAINS)
  chains = [names[i * (CHAIN + 1) : (i + 1) * (CHAIN + 1)] for i in range(CHAINS)]
  assignments = [
    [f"{chain[0]} = {number}\n", *(f"{new} = {old}\n" for old, new in zip(chain, chain[1:]))]
    for chain, number in zip(chains, numbers)
  ]
  return Problem(
    _shuffled(assignments, rng),
    tuple((f"The value of {chain[-1]} is", f" {number}") for chain, number in zip(chains, numbers)),
  )


def copy(rng: np.random.Generator) -> Problem:
  """A row of letters."""
  letters = " ".join(rng.choice(list(string.ascii_lowercase), COPIED))
  return Problem((f"Letters: {letters}\n",), (("The letters again:", f" {letters}"),))


def _shuffled(rows: Iterable[Iterable[str]], rng: np.random.Generator) -> tuple[str, ...]:
  """What is in the rows, mixed, but each row in its order."""
  rows = [list(row) for row in rows]
  return tuple(
    rows[i].pop(0) for i in rng.permutation(np.repeat(np.arange(len(rows)), list(map(len, rows))))
  )


TASKS: dict[str, Callable[[np.random.Generator], Problem]] = {
  "passkey": passkey,
  "needle": needle,
  "recall": recall,
  "variables": variables,
  "copy": copy,
}

# The share right for one who knows which numbers a document holds but not whose they are; where
# there is one number or a row of letters: who knows nothing.
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
  """(tokens [at most length] int32, the places of every answer's tokens): as much filler as fits,
  facts anywhere in it, and then what is asked.

  It begins as the tokenizer begins documents. At least `min_distance` tokens stand between the last
  fact and the first question.

  Raises:
    UsageError: where facts, distance and questions alone are longer.
  """
  problem, encode = TASKS[task](rng), functools.partial(tokenizer.encode, continues=True)
  asked = rng.choice(len(problem.questions), ASKED if task == "recall" else 1, replace=False)
  facts = list(map(encode, problem.facts))
  asked = [tuple(map(encode, problem.questions[i])) for i in asked]
  newline = encode("\n")
  size = len(tokenizer.bos_ids) + sum(map(len, facts)) + (len(asked) - 1) * len(newline)
  size += sum(len(part) for question in asked for part in question)
  least = min_distance + max(len(encode(line)) for line in FILLER) if min_distance else 0
  if length - size < least:
    far = f", {min_distance} of them between facts and question" if min_distance else ""
    raise UsageError(
      f"a document of the task {task} needs at least {size + least} tokens with this "
      f"tokenizer{far}; got {length}"
    )
  lines = _filler(tokenizer, length - size, rng)
  tail = np.cumsum([0, *map(len, lines[::-1])])  # tokens of the last 0, 1, ... lines of filler
  lines = _among(lines, facts, len(lines) + 1 - np.searchsorted(tail, min_distance), rng)
  tokens, answers = [*tokenizer.bos_ids, *(token for line in lines for token in line)], []
  for i, (question, answer) in enumerate(asked):
    tokens += (newline if i else []) + question
    answers.append(np.arange(len(tokens), len(tokens) + len(answer)))
    tokens += answer
  return np.array(tokens, np.int32), answers


def _filler(tokenizer, room, rng):
  """Lines of tokens, as many as fit."""
  every, lines = [tokenizer.encode(line, continues=True) for line in FILLER], []
  while (line := every[rng.integers(len(every))]) and len(line) <= room:
    lines.append(line)
    room -= len(line)
  return lines


def _among(lines, others, places, rng):
  """The lines, and the others in their order before any of the first so many of them."""
  mixed, begin = [], 0
  for other, place in zip(others, np.sort(rng.integers(0, places, len(others)))):
    mixed += [*lines[begin:place], other]
    begin = place
  return mixed + lines[begin:]


def texts(length: int, count: int) -> Iterator[tuple[str, str, tuple[tuple[int, int], ...]]]:
  """(name, text, (begin, end) of its answers) of `count` documents to train on, of length / 2 to
  length bytes; `evaluate` has others.

  A document is of as many tasks as it holds BYTES_PER_TASK bytes, at least of one and of each at
  most once; tasks take turns. All facts come among the first lines, and all that can be asked, as
  far as there is room, line by line among the later ones: few tokens would teach anything
  otherwise.
  """
  names, tokenizer = list(TASKS), ByteTokenizer()  # a byte is a character here
  for i in range(count):
    rng = np.random.default_rng([2**62, length, i])
    size = int(rng.integers(length // 2, length + 1))
    chosen = rng.permutation(
      [names[(i + j) % len(names)] for j in range(min(max(1, size // BYTES_PER_TASK), len(names)))]
    )
    problems = [TASKS[name](rng) for name in chosen]
    facts = _shuffled([problem.facts for problem in problems], rng)
    questions = [
      problem.questions[j] for problem in problems for j in range(len(problem.questions))
    ]
    questions = [questions[j] for j in rng.permutation(len(questions))]
    room = size - sum(map(len, facts))
    sizes = np.cumsum([len(question) + len(answer) + 1 for question, answer in questions])
    if room + length - size < sizes[0]:
      raise UsageError(
        f"a document of the task {' and '.join(chosen)} needs at least "
        f"{length - room + sizes[0]} bytes; got {length}"
      )
    questions = questions[: max(1, np.searchsorted(sizes, room, "right"))]
    lines = [
      (tokenizer.decode(np.array(line)), "")
      for line in _filler(tokenizer, room - sizes[len(questions) - 1], rng)
    ]
    middle = int(rng.integers(len(lines) // 4, 3 * len(lines) // 4 + 1))
    lines = [
      *_among(lines[:middle], [(fact, "") for fact in facts], middle + 1, rng),
      *_among(lines[middle:], questions, len(lines) - middle + 1, rng),
    ]
    text, answers = "", []
    for begin, answer in lines:
      text += begin + answer
      if answer:
        answers.append((len(text) - len(answer), len(text)))
        text += "\n"
    yield " ".join((*chosen, str(i))), text, tuple(answers)


@functools.partial(jax.jit, static_argnums=0)
def predicted(
  config: TransformerConfig, params: Params, tokens: jax.Array, places: jax.Array
) -> jax.Array:
  """The most probable token at each of the places [B, A] >= 1, given the tokens [B, n] before it;
  rows are spread over all devices.
  """

  def local(params, tokens, places):
    hidden_BxNxE = Transformer(config).apply({"params": params}, tokens, method="hidden")
    hidden_BxAxE = jnp.take_along_axis(hidden_BxNxE, places[..., None] - 1, axis=1)
    return jnp.argmax(hidden_to_logits(hidden_BxAxE, output_matrix(config, params)), axis=-1)

  return jax.shard_map(
    local, mesh=make_mesh(), in_specs=(P(), P(BATCH), P(BATCH)), out_specs=P(BATCH), check_vma=False
  )(params, tokens, places)


def evaluate(
  config: TransformerConfig,
  params: Params,
  tokenizer: Tokenizer,
  task: str,
  length: int,
  examples: int,
  batch_size: int = 1,
  seed: int = 0,
  min_distance: int = 0,
) -> Iterator[tuple[int, int]]:
  """Yields, after each batch of `batch_size` rows, (answers right, answers so far). The examples
  are those of (task, length, seed, min_distance).
  """
  params = jax.device_put(params, replicated(make_mesh()))
  right = total = 0
  for first in range(0, examples, batch_size):
    rows = [
      make_example(task, tokenizer, length, np.random.default_rng([seed, length, i]), min_distance)
      for i in range(first, min(first + batch_size, examples))
    ]
    # the last batch is filled up; its filling is not counted
    rows += rows[:1] * (batch_size - len(rows))
    tokens = np.zeros((batch_size, length), np.int32)
    width = max(sum(map(len, answers)) for _, answers in rows)
    places = np.ones((batch_size, -(-width // 32) * 32), np.int32)  # few widths: each compiles
    for i, (row, answers) in enumerate(rows):
      tokens[i, : len(row)] = row
      places[i, : sum(map(len, answers))] = np.concatenate(answers)
    found = np.asarray(jax.device_get(predicted(config, params, tokens, places)))
    for i, (row, answers) in enumerate(rows[: min(batch_size, examples - first)]):
      hit = found[i, : sum(map(len, answers))] == row[np.concatenate(answers)]
      right += sum(
        bool(np.all(part))
        for part in np.split(hit, np.cumsum([len(answer) for answer in answers])[:-1])
      )
      total += len(answers)
    yield right, total


def interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
  """The 95 % confidence interval of a share (Wilson 1927) of independent answers, which the four of
  a document of recall are not quite.
  """
  share = right / total
  centre, spread = (
    share + z * z / (2 * total),
    z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)),
  )
  return tuple(
    max(0.0, min(1.0, (centre + sign * spread) / (1 + z * z / total))) for sign in (-1, 1)
  )


def table(
  labels: Sequence[str], lengths: Sequence[int], found: dict[tuple[str, str, int], tuple[int, int]]
) -> str:
  """Accuracies in Markdown, with their 95 % confidence intervals; found: {(label, task, length):
  (right, total)}.
  """
  cell = lambda right, total: "{:.0%} ({:.0%} to {:.0%})".format(
    right / total, *interval(right, total)
  )
  lines = [
    "| run | task | chance | " + " | ".join(map(str, lengths)) + " |",
    "|" + "---|" * (3 + len(lengths)),
  ]
  for label in labels:
    for task in dict.fromkeys(task for _, task, _ in found):
      lines.append(
        f"| {label} | {task} | {CHANCE[task]:.1%} | "
        + " | ".join(cell(*found[label, task, length]) for length in lengths)
        + " |"
      )
  return "\n".join(lines)
