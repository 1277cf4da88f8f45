"""Accuracy of a model on the generated documents of `sparsek.data.task_documents`."""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sparsek.config import TransformerConfig
from sparsek.data.task_documents import CHANCE, make_example
from sparsek.data.tokenizer import Tokenizer
from sparsek.evaluation.statistics import (
  Comparison,
  Interval,
  holm,
  p_words,
  paired_bootstrap,
  score_interval,
)
from sparsek.model.transformer import (
  Params,
  Transformer,
  check_ids,
  hidden_to_logits,
  output_matrix,
  parameter_specs,
)
from sparsek.parallel.exchange import tokens_at
from sparsek.parallel.mesh import CONTEXT, FSDP, ROWS, make_mesh
from sparsek.parallel.sharding import placements


@functools.partial(jax.jit, static_argnums=(0, 1))
def predicted(
  config: TransformerConfig, mesh: Mesh, params: Params, tokens: jax.Array, positions: jax.Array
) -> jax.Array:
  """Returns the most probable token at each of some positions, given all tokens before it.

  Args:
    config, params: the model.
    mesh: devices over which parameters, rows and their tokens are spread.
    tokens: [B, n].
    positions: [B, A], each at least 1.
  """

  def local(params, tokens, positions):
    hidden_BxNxE = Transformer(config).apply({"params": params}, tokens, method="hidden")
    assert isinstance(hidden_BxNxE, jax.Array)
    hidden_BxAxE = tokens_at(hidden_BxNxE, positions - 1)
    return jnp.argmax(hidden_to_logits(hidden_BxAxE, output_matrix(config, params)), axis=-1)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(parameter_specs(config, mesh.shape[FSDP]), P(ROWS, CONTEXT), P(ROWS)),
    out_specs=P(ROWS),
    check_vma=False,
  )(params, tokens, positions)


class PromptAnswers(NamedTuple):
  """The answers to a prompt, the document up to its last question.

  Attributes:
    prompt: hexadecimal digits that tell prompts apart: a hash of the document's tokens.
    right, total: number of right answers, and of all.
  """

  prompt: str
  right: int
  total: int


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
  mesh: Mesh | None = None,
) -> Iterator[list[PromptAnswers]]:
  """Yields the answers of a model to the prompts of each batch of documents.

  An answer is right if each of its tokens is the most probable one, given all tokens before it:
  greedy decoding would write it.

  Args:
    config, params, tokenizer: the model.
    task, length, min_distance: see `sparsek.data.task_documents.make_example`; together with `seed`
      they determine the documents.
    examples: number of documents.
    batch_size: documents per batch.
    seed: of the documents.
    mesh: devices over which parameters, documents and their tokens are spread; None: documents over
      all.
  Raises:
    ValueError: where the tokenizer has tokens that are no ids of the model's vocabulary.
  """
  mesh = make_mesh() if mesh is None else mesh
  params = jax.device_put(params, placements(mesh, params))
  for first in range(0, examples, batch_size):
    rows = [
      make_example(task, tokenizer, length, np.random.default_rng([seed, length, i]), min_distance)
      for i in range(first, min(first + batch_size, examples))
    ]
    num_rows = len(rows)
    rows += rows[:1] * (batch_size - num_rows)  # fills up the last batch; not counted
    positions = [np.concatenate(of_answers) for _, of_answers in rows]
    tokens_BxN = np.zeros((batch_size, length), np.int32)
    width = max(map(len, positions))
    # Rounded up, so that few widths are compiled.
    positions_BxA = np.ones((batch_size, -(-width // 32) * 32), np.int32)
    for i, (tokens, _) in enumerate(rows):
      tokens_BxN[i, : len(tokens)] = tokens
      positions_BxA[i, : len(positions[i])] = positions[i]
    check_ids("tokens", tokens_BxN, config.vocab_size)
    answers_BxA = predicted(config, mesh, params, tokens_BxN, positions_BxA)
    predicted_BxA = np.asarray(jax.device_get(answers_BxA))
    yield [
      _prompt_answers(tokens, of_answers, predicted_BxA[i, : len(positions[i])])
      for i, (tokens, of_answers) in enumerate(rows[:num_rows])
    ]


def _prompt_answers(
  tokens: np.ndarray, positions: Sequence[np.ndarray], predicted: np.ndarray
) -> PromptAnswers:
  """Returns which answers are right.

  Args:
    tokens: of the document.
    positions: of the tokens of each answer.
    predicted: the most probable token at each of these positions.
  """
  is_right = predicted == tokens[np.concatenate(positions)]
  ends = np.cumsum([len(answer) for answer in positions])
  right = sum(bool(np.all(part)) for part in np.split(is_right, ends[:-1]))
  digest = hashlib.sha256(np.asarray(tokens, np.int64).tobytes()).hexdigest()
  return PromptAnswers(digest[:16], right, len(positions))


def distinct(prompts: Iterable[PromptAnswers]) -> list[PromptAnswers]:
  """Returns one of each group of equal prompts, in their order: the same answers, asked again."""
  return list({prompt.prompt: prompt for prompt in prompts}.values())


def accuracy(prompts: Sequence[PromptAnswers]) -> Interval:
  """Returns the share of right answers with Wilson's interval over distinct prompts.

  Answers to one prompt are not independent, so that prompts count, not answers.
  """
  prompts = distinct(prompts)
  right, total = (sum(getattr(prompt, name) for prompt in prompts) for name in ("right", "total"))
  return score_interval(right / total, len(prompts))


def result(task: str, length: int, prompts: Sequence[PromptAnswers]) -> dict[str, Any]:
  """Returns what a record holds of the answers to a task: counts of all, and distinct prompts."""
  once = distinct(prompts)
  return {
    "task": task,
    "length": length,
    "right": sum(prompt.right for prompt in prompts),
    "total": sum(prompt.total for prompt in prompts),
    "prompts": {name: [getattr(prompt, name) for prompt in once] for name in PromptAnswers._fields},
  }


Results = Mapping[tuple[str, str, int], Sequence[PromptAnswers]]  # by run, task and length


def table(labels: Sequence[str], lengths: Sequence[int], results: Results) -> str:
  """Returns tables in Markdown: accuracies, and differences from the first run.

  Accuracies have 95 % confidence intervals over distinct prompts. Differences, where there are
  other runs, are over the prompts that both were given.

  Args:
    labels: of the runs, a row for each and each task.
    lengths: of the documents, a column for each.
    results: the answers.
  """
  lines = [
    "| run | task | chance | prompts | " + " | ".join(map(str, lengths)) + " |",
    "|" + "---|" * (4 + len(lengths)),
  ]
  tasks = list(dict.fromkeys(task for _, task, _ in results))
  for label in labels:
    for task in tasks:
      of = [accuracy(results[label, task, length]) for length in lengths]
      numbers = ", ".join(map(str, dict.fromkeys(interval.number for interval in of)))
      cells = " | ".join(f"{x.value:.0%} ({x.low:.0%} to {x.high:.0%})" for x in of)
      lines.append(f"| {label} | {task} | {CHANCE[task]:.1%} | {numbers} | {cells} |")
  lines.append("\nPrompts are distinct ones; intervals: 95 %, over prompts (Wilson).")
  return "\n".join([*lines, *_differences(labels, tasks, lengths, results)])


def _differences(
  labels: Sequence[str], tasks: Sequence[str], lengths: Sequence[int], results: Results
) -> list[str]:
  """Returns the lines of a table of each run minus the first one; none where there is no other."""
  first, *others = labels
  keys = [(label, task, length) for label in others for task in tasks for length in lengths]
  compared = {key: _compared(results[key], results[first, *key[1:]]) for key in keys}
  made = [pair for pair in compared.values() if pair]
  if not keys:
    return []
  corrected = iter(holm([pair.p_value for pair in made]))

  def cell(pair: Comparison | None) -> str:
    if pair is None:
      return "-"
    return f"{pair.difference:+.0%}, {p_words(next(corrected))}"

  lines = [
    f"\n| minus {first} | task | " + " | ".join(map(str, lengths)) + " |",
    "|" + "---|" * (2 + len(lengths)),
  ]
  for label in others:
    for task in tasks:
      cells = " | ".join(cell(compared[label, task, length]) for length in lengths)
      lines.append(f"| {label} | {task} | {cells} |")
  note = (
    "\nDifferences: over the same prompts; p values (randomization test) corrected (Holm) for "
    f"{len(made)} comparison{'s' * (len(made) != 1)}."
  )
  if len(made) < len(keys):
    note += " -: fewer than two prompts were given to both; tokenizers that differ make others."
  return [*lines, note]


def _compared(these: Sequence[PromptAnswers], others: Sequence[PromptAnswers]) -> Comparison | None:
  """Returns the difference of accuracies over shared prompts; None for fewer than two."""
  there = {prompt.prompt: prompt for prompt in others}
  pairs = [(x, there[x.prompt]) for x in distinct(these) if x.prompt in there]
  if len(pairs) < 2:
    return None
  return paired_bootstrap(
    [x.right for x, _ in pairs], [y.right for _, y in pairs], [x.total for x, _ in pairs]
  )
