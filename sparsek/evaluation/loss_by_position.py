"""Held-out loss of a model, as a whole and by how much context a prediction had."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sparsek.config import TransformerConfig
from sparsek.data.token_files import TokenSplit
from sparsek.errors import RunError
from sparsek.model.transformer import Params, Transformer, check_ids, output_matrix, parameter_specs
from sparsek.parallel.mesh import AXES, FSDP, batch_specs, make_mesh, put_batch
from sparsek.parallel.sharded_scores import token_positions
from sparsek.parallel.sharding import placements
from sparsek.training.loss import Batch, chunked_cross_entropy, cut_targets

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
  """

  loss: float
  num_targets: int
  buckets: tuple[Bucket, ...]


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


def token_losses(config: TransformerConfig, params: Params, batch: Batch, chunk: int) -> jax.Array:
  """Returns the cross-entropy in nats of each target, float32 [B, n]; 0 where it does not count.

  Args:
    config, params: the model.
    batch: as `sparsek.training.loss.cut_targets` returns it; inside `jax.shard_map` over `context`
      the tokens and targets of this shard, and whole rows of segment_ids.
    chunk: largest number of tokens whose logits exist at the same time.
  """
  hidden = Transformer(config).apply(
    {"params": params}, batch["tokens"], batch["segment_ids"], batch["row_index"], method="hidden"
  )
  assert isinstance(hidden, jax.Array)
  matrix = output_matrix(config, params)

  def token_loss(token: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    hidden_E, target, is_counted = token
    return chunked_cross_entropy(hidden_E[None], matrix, target[None], is_counted[None], 1)

  targets, counted = batch["targets"], batch["counted"]
  flat = (hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), counted.reshape(-1))
  return jax.lax.map(token_loss, flat, batch_size=min(chunk, targets.size)).reshape(targets.shape)


def make_bucket_sums(
  config: TransformerConfig, edges: Sequence[int], loss_chunk: int, mesh: Mesh
) -> Callable:
  """Compiles (params, batch) -> (summed loss, number of counted targets) of each bucket.

  Both are arrays [len(edges) - 1], float32 and int32, summed over all devices. The batch is as in
  `sparsek.training.loss.next_token_targets`.
  """
  specs = parameter_specs(config, mesh.shape[FSDP])

  def local_sums(params, batch):
    losses = token_losses(config, params, batch, loss_chunk)
    positions = token_positions(batch["segment_ids"], *losses.shape)
    bucket = jnp.searchsorted(jnp.asarray(edges[1:]), positions, side="right")
    sums = functools.partial(
      jax.ops.segment_sum, segment_ids=bucket.reshape(-1), num_segments=len(edges) - 1
    )
    counted = batch["counted"].astype(jnp.int32)
    return jax.lax.psum((sums(losses.reshape(-1)), sums(counted.reshape(-1))), AXES)

  def bucket_sums(params, batch):
    return jax.shard_map(
      local_sums, mesh=mesh, in_specs=(specs, batch_specs()), out_specs=P(), check_vma=False
    )(params, cut_targets(batch))

  return jax.jit(bucket_sums)


def evaluate(
  config: TransformerConfig,
  params: Params,
  batches: Iterable[dict[str, np.ndarray]],
  edges: Sequence[int],
  *,
  loss_chunk: int = 2048,
  mesh: Mesh | None = None,
) -> Evaluation:
  """Returns the mean loss over held-out batches, and that by position in the document.

  The position is that of the predicting token in the part of its document that the row holds.
  Attention restarts at each document of a row, so a bucket shows how well tokens are predicted with
  about that much context. Buckets hold different text: compare models within a bucket, not the
  buckets of a model with each other.

  Args:
    config, params: the model.
    batches: as from `sparsek.data.batches.eval_batches`; wrap them to show progress.
    edges: ascending, from 0 to the rows' length, as from `bucket_edges`.
    loss_chunk: number of tokens whose logits exist at the same time, per device.
    mesh: devices over which parameters, rows and their tokens are spread; None: rows over all.
  Raises:
    ValueError: if rows are longer than the last edge, a token is no id of the vocabulary, or no
      target counts at all.
    RunError: where memory does not hold a batch.
  """
  mesh = make_mesh() if mesh is None else mesh
  params = jax.device_put(params, placements(mesh, params))
  bucket_sums = make_bucket_sums(config, edges, loss_chunk, mesh)
  total, count = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1, np.int64)
  for batch in batches:
    rows, length = batch["tokens"].shape
    check_ids("tokens", batch["tokens"], config.vocab_size)
    if length - 1 > edges[-1]:
      raise ValueError(f"edges={tuple(edges)} must reach the rows' length {length - 1}")
    with _memory_that_holds(rows, length - 1):
      loss, number = jax.device_get(bucket_sums(params, put_batch(mesh, batch)))
    total, count = total + loss, count + number
  if not count.sum():
    raise ValueError("batches hold no target: every document is shorter than two tokens")
  buckets = tuple(
    Bucket(first, end - 1, float(loss / number) if number else None, int(number))
    for first, end, loss, number in zip(edges[:-1], edges[1:], total, count)
  )
  return Evaluation(float(total.sum() / count.sum()), int(count.sum()), buckets)


@contextlib.contextmanager
def _memory_that_holds(rows: int, seq_len: int) -> Iterator[None]:
  """Raises RunError where memory does not hold a batch of that size in the block."""
  try:
    yield
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise RunError(
      f"memory does not hold --batch_size={rows} rows of --seq_len={seq_len} tokens: lower one of "
      "them, or --loss_chunk"
    ) from error


def bits_per_byte(loss: float, split: TokenSplit) -> float:
  """Returns a loss in nats per token as bits per UTF-8 byte of text.

  Bits per byte can be compared between models with different tokenizers. The number of tokens per
  byte is that of the whole split.
  """
  return loss * split.num_counted / split.num_bytes / math.log(2)


def format_table(
  labels: Sequence[str],
  evaluations: Sequence[Evaluation],
  bits: Sequence[float],
  trained_lengths: Sequence[int],
  settings: Sequence[dict[str, object]],
) -> str:
  """Returns a table of evaluations of the same batches, a column each.

  A * marks positions beyond a model's training length.

  Args:
    labels: column headings.
    evaluations, bits: results of `evaluate` and `bits_per_byte`; the buckets must be the same.
    trained_lengths: tokens per row in training.
    settings: further rows on top, with the same keys for each column.
  """
  # The space after a number is where others have the *.
  rows = [["", *(f"{label} " for label in labels)]] + [
    [name, *(f"{setting[name]} " for setting in settings)] for name in settings[0]
  ]
  rows += [
    ["held-out loss (nats per token)", *(f"{evaluation.loss:.4f} " for evaluation in evaluations)],
    ["bits per byte", *(f"{value:.4f} " for value in bits)],
  ]
  for same in zip(*(evaluation.buckets for evaluation in evaluations)):
    if same[0].num_targets:
      cells = (
        f"{bucket.loss:.4f}{'*' if bucket.first >= length else ' '}"
        for bucket, length in zip(same, trained_lengths)
      )
      rows.append(
        [
          f"  at positions {same[0].first} to {same[0].last} ({same[0].num_targets:,} tokens)",
          *cells,
        ]
      )
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

  def aligned(row: list[str]) -> str:
    cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))
    return "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()

  beyond = any(cell.endswith("*") for row in rows for cell in row[1:])
  return "\n".join([*map(aligned, rows), *["* beyond the training length"] * beyond])
