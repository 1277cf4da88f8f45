"""Answers of a model to RULER's prompts: asking, the file that keeps them, scores in a table."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from sparsek.config import TransformerConfig
from sparsek.data.ruler.prompts import Prompt
from sparsek.data.ruler.tasks import TASKS, score
from sparsek.data.tokenizer import Tokenizer
from sparsek.errors import UsageError
from sparsek.evaluation.memory import memory_that_holds
from sparsek.evaluation.statistics import bootstrap_ratio
from sparsek.generation.cache_sizes import GROWTH, check_memory, clip_sizes
from sparsek.generation.inference import InferenceParams
from sparsek.generation.session import Session
from sparsek.runs.metrics import append_record, read_metrics

FILE = "ruler.jsonl"  # of a run
BATCH_TOKENS = 2**18  # of the prompts that are read together by default


def default_batch(prompts: int, length: int, groups: int) -> int:
  """Returns how many prompts are answered together by default.

  Args:
    prompts: number of all.
    length: of each, in tokens.
    groups: of devices, among which prompts are spread.
  """
  batches = -(-prompts // max(1, BATCH_TOKENS // length))
  return -(-prompts // (batches * groups)) * groups


def check_room(config: TransformerConfig, batch_size: int, length: int) -> None:
  """Raises UsageError where the model has no cache, or memory could never hold it."""
  room = length + GROWTH
  try:
    check_memory(clip_sizes(config, room), batch_size, room, f"--lengths={length}")
  except ValueError as error:
    raise UsageError(str(error)) from None


def answers(
  config: TransformerConfig,
  params: InferenceParams,
  tokenizer: Tokenizer,
  prompts: Sequence[Prompt],
  *,
  length: int,
  new_tokens: int,
  batch_size: int,
  eos_id: int | Sequence[int],
  mesh: Mesh | None = None,
) -> Iterator[list[tuple[str, int]]]:
  """Yields the greedy answers of each batch, with the counts of `Session.lost_scores`.

  Args:
    config, params, tokenizer: the model.
    prompts: what is asked.
    length: that prompts are padded to, so that few programs are compiled.
    new_tokens: most tokens of an answer.
    batch_size: prompts that are answered together; the last batch is filled up.
    eos_id: token, or tokens, that end an answer.
    mesh: devices over which prompts are spread; None: one device.
  Raises:
    RunError: where memory does not hold a batch.
  """
  for first in range(0, len(prompts), batch_size):
    asked = [prompt.tokens for prompt in prompts[first : first + batch_size]]
    rows = asked + asked[:1] * (batch_size - len(asked))
    written: list[list[int]] = [[] for _ in rows]
    what = f"--batch_size={batch_size} prompts of --lengths={length} tokens"
    with memory_that_holds(what, "--batch_size"):
      session = Session(config, params, len(rows), mesh, pad_to=length)
      for tokens in session.generate(
        rows, max_new_tokens=new_tokens, temperature=0.0, eos_id=eos_id
      ):
        for text, token in zip(written, tokens):
          if token is not None:
            text.append(token)
      lost = session.lost_scores
    yield [(tokenizer.decode(written[i]), int(lost[i])) for i in range(len(asked))]


class AnswerFile:
  """The file of a run to which every answer goes as soon as it is known.

  A line has a key, the hash of the settings under which the model was asked: the settings, or an
  answer. Answers of other settings stay.

  Args:
    path: of the file.
    settings: what the answers depend on, "step" among them.
  Raises:
    UsageError: where the file cannot be read.
  """

  def __init__(self, path: str, settings: Mapping[str, Any]):
    self._path, self._settings = path, settings
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    self._line = {"step": settings["step"], "key": key}
    rows = [row for row in read_metrics(path) if row.get("key") == key]
    self._is_new = not rows
    self._known = {(row.get("task"), row.get("length"), row.get("index")): row for row in rows}

  def answer(self, task: str, length: int, index: int, prompt: Prompt) -> dict | None:
    """Returns the line with the answer to a prompt, or None."""
    row = self._known.get((task, length, index))
    return row if row and row.get("sha256") == prompt.sha256 else None

  def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes answers to the end of the file.

    Raises:
      RunError: where it cannot be written.
    """
    for row in ({"settings": self._settings},) * self._is_new + (*rows,):
      append_record(self._path, {**self._line, **row})
    self._is_new = False


def ask(
  config: TransformerConfig,
  params: InferenceParams,
  tokenizer: Tokenizer,
  task: str,
  length: int,
  prompts: Sequence[Prompt],
  kept: AnswerFile,
  *,
  batch_size: int,
  eos_id: int | Sequence[int],
  mesh: Mesh | None = None,
  progress: Callable = iter,
) -> list[dict]:
  """Asks what is not in a file, writes each batch of answers to it, and returns all of them.

  Args:
    config, params, tokenizer, batch_size, eos_id, mesh: as in `answers`.
    task, length, prompts: what is asked.
    kept: where answers are kept.
    progress: wraps an iterator over prompts, as tqdm does, and takes their number as `total`.
  """
  known = {}
  for i, prompt in enumerate(prompts):
    if (row := kept.answer(task, length, i, prompt)) is not None:
      # The score is that of what is expected now.
      known[i] = _row(task, length, i, prompt, row["answer"], row["lost_scores"])
  missing = [i for i in range(len(prompts)) if i not in known]
  batches = answers(
    config,
    params,
    tokenizer,
    [prompts[i] for i in missing],
    length=length,
    new_tokens=TASKS[task].template.new_tokens,
    batch_size=batch_size,
    eos_id=eos_id,
    mesh=mesh,
  )

  def written() -> Iterator[int]:
    following = iter(missing)
    for batch in batches:
      places = list(itertools.islice(following, len(batch)))
      new = [
        _row(task, length, i, prompts[i], text, lost) for i, (text, lost) in zip(places, batch)
      ]
      kept.add(new)
      known.update(zip(places, new))
      yield from range(len(new))

  for _ in progress(written(), total=len(missing)):
    pass
  return [known[i] for i in range(len(prompts))]


def _row(task: str, length: int, index: int, prompt: Prompt, answer: str, lost: int) -> dict:
  """Returns the line of an answer."""
  return {
    "task": task,
    "length": length,
    "index": index,
    "prompt_tokens": len(prompt.tokens),
    "sha256": prompt.sha256,
    "query": prompt.query,
    "outputs": prompt.outputs,
    "answer": answer,
    "score": score(task, answer, prompt.outputs),
    "lost_scores": lost,
  }


def prompt_lines(task: str, length: int, prompts: Sequence[Prompt]) -> Iterator[dict]:
  """Yields prompts as the lines of RULER's files; lm-eval reads the last two fields too."""
  for i, prompt in enumerate(prompts):
    yield {
      "index": i,
      "input": prompt.text,
      "outputs": prompt.outputs,
      "length": len(prompt.tokens) + TASKS[task].template.new_tokens,
      "max_length": length,
      "gen_prefix": "",
    }


@dataclasses.dataclass(frozen=True)
class Score:
  """The score of a task at a length.

  Attributes:
    score: mean over the prompts, in percent.
    low, high: 95 % interval of a bootstrap over distinct prompts; None where all of them have the
      same score, which tells nothing of how far others would vary.
    prompts: number of distinct prompts.
    empty: answers without any text.
  """

  score: float
  low: float | None
  high: float | None
  prompts: int
  empty: int

  def __str__(self) -> str:
    interval = "" if self.low is None else f" ({self.low:.0f} to {self.high:.0f})"
    return f"{self.score:.1f}{interval}"


def summaries(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Score]:
  """Returns {(task, length): score} of answers."""
  groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
  for row in rows:
    groups.setdefault((row["task"], row["length"]), []).append(row)
  return {pair: _summary(group) for pair, group in groups.items()}


def _summary(rows: Sequence[Mapping[str, Any]]) -> Score:
  by_prompt = {row["sha256"]: row["score"] for row in rows}  # greedy answers to one are the same
  low = high = None
  if len(set(by_prompt.values())) > 1:
    _, low, high, _ = bootstrap_ratio(list(by_prompt.values()), [1] * len(by_prompt))
    low, high = round(low, 2), round(high, 2)
  return Score(
    round(sum(row["score"] for row in rows) / len(rows), 2),
    low,
    high,
    len(by_prompt),
    sum(not row["answer"].strip() for row in rows),
  )


def table(
  labels: Sequence[str],
  tasks: Sequence[str],
  lengths: Sequence[int],
  scores: Mapping[tuple[str, str, int], Score],
) -> str:
  """Returns a table in Markdown of scores in percent with their intervals, and means over tasks.

  Args:
    labels: of the runs, rows for each.
    tasks: a row each.
    lengths: of the prompts, a column each.
    scores: {(label, task, length): score}.
  """
  lines = [
    "| run | task | distinct prompts | " + " | ".join(map(str, lengths)) + " |",
    "|" + "---|" * (3 + len(lengths)),
  ]
  for label in labels:
    for task in tasks:
      of = [scores[label, task, length] for length in lengths]
      counts = ", ".join(dict.fromkeys(str(score.prompts) for score in of))
      lines.append(f"| {label} | {task} | {counts} | {' | '.join(map(str, of))} |")
    means = [sum(scores[label, task, n].score for task in tasks) / len(tasks) for n in lengths]
    lines.append(f"| {label} | mean | | {' | '.join(f'{mean:.1f}' for mean in means)} |")
  return "\n".join(lines)
