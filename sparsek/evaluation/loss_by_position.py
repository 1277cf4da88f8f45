"""Held-out loss of a model: as a whole, by context, by document, and of far repeats."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from sparsek.config import FarRepeatRule, TransformerConfig
from sparsek.data.token_files import TokenSplit
from sparsek.evaluation.far_repeats import FarRepeatLosses, FarRepeats
from sparsek.evaluation.memory import memory_that_holds
from sparsek.model.transformer import Params, check_ids
from sparsek.parallel.mesh import make_mesh, put_batch
from sparsek.parallel.sharding import placements
from sparsek.training.document_losses import DocumentLosses, LossSums
from sparsek.training.step import make_eval_step

FIRST_BUCKET = 64  # positions; finer buckets would hold few targets each


@dataclasses.dataclass(frozen=True)
class Bucket:
  """The targets that are predicted with first + 1 to last + 1 tokens of context.

  Attributes:
    first, last: positions of the predicting tokens in their document.
    loss: mean in nats per token, or None if there is no target.
    num_targets: number of targets.
  """

  first: int
  last: int
  loss: float | None
  num_targets: int


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The result of `evaluate`.

  Attributes:
    loss: mean over all targets in nats per token.
    num_targets: number of targets.
    buckets: by position, ascending; together they hold all targets.
    documents: by document; together they hold all targets.
    far_repeats: of targets that repeat something far back.
  """

  loss: float
  num_targets: int
  buckets: tuple[Bucket, ...]
  documents: DocumentLosses
  far_repeats: FarRepeatLosses


def bucket_edges(seq_len: int, extra: Iterable[int] = ()) -> tuple[int, ...]:
  """Returns the borders of buckets: 0, 64, 128, 256, ..., seq_len, and those of `extra` in between.

  Args:
    seq_len: the last border.
    extra: further borders, such as training lengths.

  >>> bucket_edges(512, extra=[384])
  (0, 64, 128, 256, 384, 512)
  """
  powers = (FIRST_BUCKET * 2**i for i in range(seq_len.bit_length()))
  return (0, *sorted({edge for edge in (*powers, *extra) if 0 < edge < seq_len}), seq_len)


def positions(segment_ids: np.ndarray) -> np.ndarray:
  """Returns how many tokens of its own document precede each token of rows, [B, n]."""
  index = np.broadcast_to(np.arange(segment_ids.shape[1]), segment_ids.shape)
  is_first = np.ones(segment_ids.shape, bool)
  is_first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
  return index - np.maximum.accumulate(np.where(is_first, index, 0), axis=1)


def evaluate(
  config: TransformerConfig,
  params: Params,
  batches: Iterable[dict[str, np.ndarray]],
  edges: Sequence[int],
  rule: FarRepeatRule = FarRepeatRule(),
  *,
  loss_chunk: int = 2048,
  mesh: Mesh | None = None,
) -> Evaluation:
  """Returns the mean loss over held-out batches, by position, by document, and of far repeats.

  The position is that of the predicting token in the part of its document that the row holds.
  Attention restarts at each document of a row, so a bucket shows how well tokens are predicted with
  about that much context. Buckets hold different text: compare models within a bucket, not the
  buckets of a model with each other. Losses are summed in float64, in the order of the rows.

  Args:
    config, params: the model.
    batches: as from `sparsek.data.batches.eval_batches`; wrap them to show progress.
    edges: ascending, from 0 to the rows' length, as from `bucket_edges`.
    rule: says which targets are far repeats.
    loss_chunk: number of tokens whose logits exist at the same time, per device.
    mesh: devices over which parameters, rows and their tokens are spread; None: rows over all.
  Raises:
    ValueError: if rows are longer than the last edge, a token is no id of the vocabulary, or no
      target counts at all.
    RunError: where memory does not hold a batch.
  """
  mesh = make_mesh() if mesh is None else mesh
  params = jax.device_put(params, placements(mesh, params))
  eval_step = make_eval_step(config, loss_chunk, mesh)
  by_bucket, by_document, far_repeats = LossSums(), LossSums(), FarRepeats(rule, edges[-1])
  for batch in batches:
    rows, length = batch["tokens"].shape
    check_ids("tokens", batch["tokens"], config.vocab_size)
    if length - 1 > edges[-1]:
      raise ValueError(f"edges={tuple(edges)} must reach the rows' length {length - 1}")
    what = f"--batch_size={rows} rows of --seq_len={length - 1} tokens"
    with memory_that_holds(what, "one of them, or --loss_chunk"):
      losses, documents = jax.device_get(eval_step(params, put_batch(mesh, batch)))
    counted = documents >= 0
    buckets = np.searchsorted(edges[1:], positions(batch["segment_ids"][:, :-1]), side="right")
    by_bucket.add(buckets[counted], losses[counted])
    by_document.add(documents[counted], losses[counted])
    far_repeats.add(batch["tokens"], batch["documents"], losses, counted)
  if by_document.mean is None:
    raise ValueError("batches hold no target: every document is shorter than two tokens")
  return Evaluation(
    by_document.mean,
    by_document.num_targets,
    tuple(
      Bucket(first, end - 1, *by_bucket.of(i))
      for i, (first, end) in enumerate(zip(edges[:-1], edges[1:]))
    ),
    by_document.by_document(),
    far_repeats.result(),
  )


def bits_per_byte(loss: float, split: TokenSplit) -> float:
  """Returns a loss in nats per token as bits per UTF-8 byte of text.

  Bits per byte can be compared between models with different tokenizers. The number of tokens per
  byte is that of the whole split.
  """
  return loss * split.num_counted / split.num_bytes / math.log(2)
