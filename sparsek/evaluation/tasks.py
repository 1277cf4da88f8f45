"""Accuracy of a model on the generated documents of `sparsek.data.task_documents`."""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sparsek.config import TransformerConfig
from sparsek.data.task_documents import CHANCE, make_example
from sparsek.data.tokenizer import Tokenizer
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
) -> Iterator[tuple[int, int]]:
  """Yields (right answers, all answers) of a model so far, after each batch of documents.

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
  right = total = 0
  for first in range(0, examples, batch_size):
    rows = [
      make_example(task, tokenizer, length, np.random.default_rng([seed, length, i]), min_distance)
      for i in range(first, min(first + batch_size, examples))
    ]
    num_rows = len(rows)
    rows += rows[:1] * (batch_size - num_rows)  # fills up the last batch; not counted
    positions = [np.concatenate(answers) for _, answers in rows]
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
    for i, (tokens, answers) in enumerate(rows[:num_rows]):
      is_right = predicted_BxA[i, : len(positions[i])] == tokens[positions[i]]
      ends = np.cumsum([len(answer) for answer in answers])
      right += sum(bool(np.all(part)) for part in np.split(is_right, ends[:-1]))
      total += len(answers)
    yield right, total


def interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
  """Returns the 95 % confidence interval (Wilson 1927) of the accuracy of independent answers.

  The answers in a document of the task recall are not quite independent.
  """
  share = right / total
  centre = share + z * z / (2 * total)
  spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
  low, high = (
    max(0.0, min(1.0, (centre + sign * spread) / (1 + z * z / total))) for sign in (-1, 1)
  )
  return low, high


def table(
  labels: Sequence[str],
  lengths: Sequence[int],
  results: dict[tuple[str, str, int], tuple[int, int]],
) -> str:
  """Returns a table in Markdown of accuracies with their 95 % confidence intervals.

  Args:
    labels: of the runs, a row for each and each task.
    lengths: of the documents, a column for each.
    results: {(label, task, length): (right, total)}.
  """
  lines = [
    "| run | task | chance | " + " | ".join(map(str, lengths)) + " |",
    "|" + "---|" * (3 + len(lengths)),
  ]
  for label in labels:
    for task in dict.fromkeys(task for _, task, _ in results):
      cells = " | ".join(_cell(*results[label, task, length]) for length in lengths)
      lines.append(f"| {label} | {task} | {CHANCE[task]:.1%} | {cells} |")
  return "\n".join(lines)


def _cell(right: int, total: int) -> str:
  low, high = interval(right, total)
  return f"{right / total:.0%} ({low:.0%} to {high:.0%})"
