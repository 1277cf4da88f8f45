"""Generated documents with known answers that stand far before the question: passkey, needles, recall, variables, copy.

A document is lines of facts, in their order but with filler of no use between them, and a question whose answers are marked. An answer counts as right where
every token of it is the most probable one, given all before it: greedy decoding would write it.

A sliding window of w tokens has the fact in sight in about w / length of the documents; in deep models more, since a window hands on to the next layer's what
it saw: layers * w tokens at most. `min_distance` keeps the facts farther away than that.
"""

import dataclasses
import functools
import math
import string
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sparsek.config import TransformerConfig
from sparsek.errors import UsageError
from sparsek.model import Params, Transformer, hidden_to_logits, output_matrix
from sparsek.tokenizer import ByteTokenizer, Tokenizer
from sparsek.train_step import BATCH, make_mesh, replicated

FILLER = ("The grass is green.\n", "The sky is blue.\n", "The sun is yellow.\n", "Here we go.\n", "There and back again.\n", "Time went by.\n")
NEEDLES = 16                     # facts of which one is asked for
PAIRS, ASKED = 32, 4             # of recall
CHAIN, CHAINS = 3, 4             # assignments that an answer hangs on; how many such chains there are
COPIED = 16                      # letters
BYTES_PER_TASK = 2048            # of a document to train on: longer ones ask for more than one thing


@dataclasses.dataclass(frozen=True)
class Problem:
  """facts: lines, in order; question: (text, whether it is an answer) one after the other."""
  facts: tuple[str, ...]
  question: tuple[tuple[str, bool], ...]


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
  number, = _numbers(rng, 1)
  return Problem((f"The pass key is {number}. Remember it.\n",), (("What is the pass key? The pass key is", False), (f" {number}", True)))


def needle(rng: np.random.Generator) -> Problem:
  """One of sixteen sentences that differ in name and number only."""
  names, numbers = _names(rng, NEEDLES), _numbers(rng, NEEDLES)
  asked = rng.integers(NEEDLES)
  facts = tuple(f"The code of {name} is {number}.\n" for name, number in zip(names, numbers))
  return Problem(facts, ((f"What is the code of {names[asked]}? The code of {names[asked]} is", False), (f" {numbers[asked]}", True)))


def recall(rng: np.random.Generator) -> Problem:
  """Several of many pairs (multi-query associative recall, Arora et al. 2023, arXiv 2312.04927)."""
  names, numbers = _names(rng, PAIRS), _numbers(rng, PAIRS)
  asked = rng.choice(PAIRS, ASKED, replace=False)
  question = [piece for i in asked for piece in ((f"{names[i]} ->", False), (f" {numbers[i]}", True), ("\n", False))]
  return Problem(tuple(f"{name} -> {number}\n" for name, number in zip(names, numbers)), tuple(question[:-1]))


def variables(rng: np.random.Generator) -> Problem:
  """The value of a variable that was assigned from another, and that from another (RULER, Hsieh et al. 2024, arXiv 2404.06654)."""
  names, numbers = _names(rng, CHAINS * (CHAIN + 1)), _numbers(rng, CHAINS)
  chains = [names[i * (CHAIN + 1):(i + 1) * (CHAIN + 1)] for i in range(CHAINS)]
  assignments = [[f"{chain[0]} = {number}\n", *(f"{new} = {old}\n" for old, new in zip(chain, chain[1:]))] for chain, number in zip(chains, numbers)]
  order = rng.permutation(np.repeat(np.arange(CHAINS), CHAIN + 1))
  facts = tuple(assignments[chain].pop(0) for chain in order)
  asked = rng.integers(CHAINS)
  return Problem(facts, ((f"The value of {chains[asked][-1]} is", False), (f" {numbers[asked]}", True)))


def copy(rng: np.random.Generator) -> Problem:
  """A row of letters."""
  letters = " ".join(rng.choice(list(string.ascii_lowercase), COPIED))
  return Problem((f"Letters: {letters}\n",), (("The letters again:", False), (f" {letters}", True)))


TASKS: dict[str, Callable[[np.random.Generator], Problem]] = {"passkey": passkey, "needle": needle, "recall": recall, "variables": variables, "copy": copy}

# The share right for one who knows which numbers a document holds but not whose they are; where there is one number or a row of letters: who knows nothing.
CHANCE = {"passkey": 1 / 90000, "needle": 1 / NEEDLES, "recall": 1 / PAIRS, "variables": 1 / CHAINS, "copy": len(string.ascii_lowercase)**-COPIED}


def several(names: Sequence[str], rng: np.random.Generator) -> Problem:
  """One of each of the tasks: their facts shuffled, but each task's in their order, then their questions, a line each."""
  problems = [TASKS[name](rng) for name in names]
  facts = [list(problem.facts) for problem in problems]
  order = rng.permutation(np.repeat(np.arange(len(problems)), [len(left) for left in facts]))
  question = [piece for problem in problems for piece in (*problem.question, ("\n", False))]
  return Problem(tuple(facts[i].pop(0) for i in order), tuple(question[:-1]))


def make_example(task: str, tokenizer: Tokenizer, length: int, rng: np.random.Generator, min_distance: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
  """`arrange` of a new problem of the task called so."""
  return arrange(task, TASKS[task](rng), tokenizer, length, rng, min_distance)


def arrange(name: str, problem: Problem, tokenizer: Tokenizer, length: int, rng: np.random.Generator,
            min_distance: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
  """(tokens [at most length] int32, the places of every answer's tokens): as much filler as fits, facts anywhere in it.

  At least `min_distance` tokens stand between the last fact and the question.

  Raises:
    UsageError: where facts, distance and question alone are longer.
  """
  facts = [tokenizer.encode(fact) for fact in problem.facts]
  question = [(tokenizer.encode(text), is_answer) for text, is_answer in problem.question]
  room = length - sum(map(len, facts)) - sum(len(tokens) for tokens, _ in question)
  filler, lines = [tokenizer.encode(line) for line in FILLER], []
  least = min_distance + max(map(len, filler)) if min_distance else 0
  if room < least:
    far = f", {min_distance} of them between facts and question" if min_distance else ""
    raise UsageError(f"a document of the task {name} needs at least {length - room + least} tokens with this tokenizer{far}; got {length}")
  while (line := filler[rng.integers(len(filler))]) and len(line) <= room:
    lines.append(line)
    room -= len(line)
  tail = np.cumsum([0, *map(len, lines[::-1])])                                    # tokens of the last 0, 1, ... lines of filler
  places = np.sort(rng.integers(0, len(lines) + 1 - np.searchsorted(tail, min_distance), len(facts)))
  for place, fact in zip(places[::-1], facts[::-1]):
    lines.insert(place, fact)
  tokens, answers = [token for line in lines for token in line], []
  for piece, is_answer in question:
    if is_answer:
      answers.append(np.arange(len(tokens), len(tokens) + len(piece)))
    tokens += piece
  return np.array(tokens, np.int32), answers


def texts(length: int, count: int) -> Iterator[tuple[str, str, tuple[tuple[int, int], ...]]]:
  """(name, text, (begin, end) of its answers) of `count` documents to train on, of length / 2 to length bytes; `evaluate` has others.

  A document asks for one thing per BYTES_PER_TASK bytes, for at least one, and for each task at most once; tasks take turns.
  """
  tokenizer, names = ByteTokenizer(), list(TASKS)
  for i in range(count):
    rng = np.random.default_rng([2**62, length, i])
    size = int(rng.integers(length // 2, length + 1))
    asked = rng.permutation([names[(i + j) % len(names)] for j in range(min(max(1, size // BYTES_PER_TASK), len(names)))])
    name = " ".join((*asked, str(i)))
    tokens, answers = arrange(name, several(asked, rng), tokenizer, size, rng)                            # a byte is a character here
    yield name, tokenizer.decode(tokens), tuple((int(places[0]), int(places[-1]) + 1) for places in answers)


@functools.partial(jax.jit, static_argnums=0)
def predicted(config: TransformerConfig, params: Params, tokens: jax.Array, places: jax.Array) -> jax.Array:
  """The most probable token at each of the places [B, A] >= 1, given the tokens [B, n] before it; rows are spread over all devices."""
  def local(params, tokens, places):
    hidden_BxNxE = Transformer(config).apply({"params": params}, tokens, method="hidden")
    hidden_BxAxE = jnp.take_along_axis(hidden_BxNxE, places[..., None] - 1, axis=1)
    return jnp.argmax(hidden_to_logits(hidden_BxAxE, output_matrix(config, params)), axis=-1)

  return jax.shard_map(local, mesh=make_mesh(), in_specs=(P(), P(BATCH), P(BATCH)), out_specs=P(BATCH), check_vma=False)(params, tokens, places)


def evaluate(config: TransformerConfig, params: Params, tokenizer: Tokenizer, task: str, length: int, examples: int, batch_size: int = 1,
             seed: int = 0, min_distance: int = 0) -> Iterator[tuple[int, int]]:
  """Yields, after each batch of `batch_size` rows, (answers right, answers so far). The examples are those of (task, length, seed, min_distance)."""
  params = jax.device_put(params, replicated(make_mesh()))
  right = total = 0
  for first in range(0, examples, batch_size):
    rows = [make_example(task, tokenizer, length, np.random.default_rng([seed, length, i]), min_distance)
            for i in range(first, min(first + batch_size, examples))]
    rows += rows[:1] * (batch_size - len(rows))                                   # the last batch is filled up; its filling is not counted
    tokens = np.zeros((batch_size, length), np.int32)
    width = max(sum(map(len, answers)) for _, answers in rows)
    places = np.ones((batch_size, -(-width // 32) * 32), np.int32)               # few widths: each compiles
    for i, (row, answers) in enumerate(rows):
      tokens[i, :len(row)] = row
      places[i, :sum(map(len, answers))] = np.concatenate(answers)
    found = np.asarray(jax.device_get(predicted(config, params, tokens, places)))
    for i, (row, answers) in enumerate(rows[:min(batch_size, examples - first)]):
      hit = found[i, :sum(map(len, answers))] == row[np.concatenate(answers)]
      right += sum(bool(np.all(part)) for part in np.split(hit, np.cumsum([len(answer) for answer in answers])[:-1]))
      total += len(answers)
    yield right, total


def interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
  """The 95 % confidence interval of a share (Wilson 1927) of independent answers, which the four of a document of recall are not quite."""
  share = right / total
  centre, spread = share + z * z / (2 * total), z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
  return tuple(max(0., min(1., (centre + sign * spread) / (1 + z * z / total))) for sign in (-1, 1))


def table(labels: Sequence[str], lengths: Sequence[int], found: dict[tuple[str, str, int], tuple[int, int]]) -> str:
  """Accuracies in Markdown, with their 95 % confidence intervals; found: {(label, task, length): (right, total)}."""
  cell = lambda right, total: "{:.0%} ({:.0%} to {:.0%})".format(right / total, *interval(right, total))
  lines = ["| run | task | chance | " + " | ".join(map(str, lengths)) + " |", "|" + "---|" * (3 + len(lengths))]
  for label in labels:
    for task in dict.fromkeys(task for _, task, _ in found):
      lines.append(f"| {label} | {task} | {CHANCE[task]:.1%} | " + " | ".join(cell(*found[label, task, length]) for length in lengths) + " |")
  return "\n".join(lines)
