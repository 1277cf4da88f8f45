"""Documents packed in rows, and the rows of a batch that a process reads."""

import dataclasses
import functools
import os
from collections.abc import Sequence

import numpy as np

from sparsek.config import check_at_least
from sparsek.data.epoch_order import EpochOrder, Stage
from sparsek.data.token_files import TokenSplit
from sparsek.errors import UsageError

Batch = dict[str, np.ndarray]
_BYTES_PER_TOKEN = 8  # in a batch: its id and its segment


class PackedRows:
  """Documents packed in rows of seq_len + 1 tokens; see `sparsek.data.epoch_order` for their order.

  Rows overlap by one token, so that each token except the first of the stream is a target in one
  row. A row is a function of its number, the seed, seq_len and the earlier stages of the epoch.

  In an epoch that began with another seq_len, the remaining rows are made of the pairs that no row
  has shown yet. Documents are then cut more often, since each span of pairs counts as a document,
  and each cut repeats a pair if `segment_documents` is off.

  Memory: 16 bytes per document and 8 per row, for the two epochs used last.

  Attributes:
    num_rows: of a whole epoch.
    first: number of the first row to read after `stages`.
  """

  def __init__(
    self,
    split: TokenSplit,
    seq_len: int,
    *,
    seed: int = 0,
    segment_documents: bool = True,
    epoch: int = 0,
    stages: Sequence[Stage] = (),
  ):
    """Initialises the rows.

    Args:
      split: the documents.
      seq_len, seed, segment_documents: as in `DataConfig`.
      epoch: number of the epoch with which to begin.
      stages: what was already read of this epoch; if the last stage has this seed and seq_len, it
        is continued.
    Raises:
      ValueError: if the split has fewer than two tokens, for a negative seed, and for stages that
        cannot be of this split.
    """
    check_at_least("seq_len", seq_len, 1)
    check_at_least("seed", seed, 0)
    if split.num_tokens < 2:
      raise ValueError(
        f"the {split.name} split has {split.num_tokens} tokens; a row needs at least 2"
      )
    self._split = split
    self._seq_len = seq_len
    self._segment_documents = segment_documents
    self._new_stage = Stage.new(seed, seq_len)
    self._epoch = epoch
    self._stages = [stage for stage in stages if stage.rows]
    if not self._stages or (self._stages[-1].seed, self._stages[-1].seq_len) != (seed, seq_len):
      self._stages.append(self._new_stage)
    self.first = self._stages[-1].rows
    self.num_rows = -(-(split.num_tokens - 1) // seq_len)
    # Two, since at the end of an epoch prefetching threads alternate between two epochs.
    self._order = functools.lru_cache(maxsize=2)(self._make_order)
    changed = len(self._stages) > 1
    self._rows_of_first_epoch = len(self._order(epoch).rows) if changed else self.num_rows
    if self.first > self._rows_of_first_epoch:
      raise ValueError(
        f"{self.first} rows of an epoch of {self._rows_of_first_epoch} cannot be read"
      )

  def _make_order(self, epoch: int) -> EpochOrder:
    stages = self._stages if epoch == self._epoch else [self._new_stage]
    return EpochOrder(self._split.lengths, epoch, stages)

  def _epoch_and_visit(self, i: int) -> tuple[int, int]:
    """Returns the epoch of row i, and the number of rows before it in this epoch."""
    if i < self._rows_of_first_epoch:
      return self._epoch, i
    epochs, visit = divmod(i - self._rows_of_first_epoch, self.num_rows)
    return self._epoch + 1 + epochs, visit

  def stages_before(self, i: int) -> tuple[int, list[Stage]]:
    """Returns the epoch of row i, and the stages of that epoch that are read before the row."""
    epoch, visit = self._epoch_and_visit(i)
    stages = self._stages if epoch == self._epoch else [self._new_stage]
    return epoch, [*stages[:-1], dataclasses.replace(stages[-1], rows=visit)]

  def example(self, i: int) -> Batch:
    """Returns row i >= 0 of the endless stream of epochs.

    Returns:
      {"tokens": [seq_len + 1], "segment_ids": [seq_len + 1]}, int32, and "counted", bool, if the
      split has marked answers; see `sparsek.data.batches`.
    Raises:
      RunError: where a token is outside the vocabulary, since the file is damaged.
    """
    epoch, visit = self._epoch_and_visit(i)
    order = self._order(epoch)
    tokens = np.zeros(self._seq_len + 1, np.int32)
    segment_ids = np.zeros(self._seq_len + 1, np.int32)
    counted = np.zeros(self._seq_len + 1, bool) if self._split.marked else None
    filled = 0
    for segment, (document, begin, end) in enumerate(order.pieces(visit, self._seq_len), 1):
      target = slice(filled, filled + end - begin)
      tokens[target] = self._split.document(document)[begin:end]
      if counted is not None:
        counted[target] = ~self._split.uncounted(document)[begin:end]
      segment_ids[target] = segment if self._segment_documents else 1
      filled = target.stop
    if np.max(tokens.view(np.uint32)) >= self._split.vocab_size:
      for document, _, _ in order.pieces(visit, self._seq_len):
        self._split.check_ids(document)
    example = {"tokens": tokens, "segment_ids": segment_ids}
    return example if counted is None else {**example, "counted": counted}

  def documents(self, i: int) -> np.ndarray:
    """Returns the number of each token's document in row i, int32 [seq_len + 1]; -1 is padding."""
    epoch, visit = self._epoch_and_visit(i)
    documents, filled = np.full(self._seq_len + 1, -1, np.int32), 0
    for document, begin, end in self._order(epoch).pieces(visit, self._seq_len):
      documents[filled : filled + end - begin] = document
      filled += end - begin
    return documents


def stack(examples: Sequence[Batch]) -> Batch:
  """Returns the batch of these rows."""
  return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def local_rows(
  batch_size: int, seq_len: int, parts: Sequence[int] = (0,), num_parts: int = 1
) -> list[int]:
  """Returns the rows of a global batch that a process reads.

  Args:
    batch_size, seq_len: as in `DataConfig`.
    parts: those that this process reads; processes may share a part.
    num_parts: equal parts in which the rows of a batch are cut.
  Raises:
    UsageError: if batch_size is not a multiple of num_parts, or a batch does not fit in memory.
  """
  check_at_least("num_parts", num_parts, 1)
  if not all(0 <= part < num_parts for part in parts):
    raise ValueError(f"parts={parts} must be at least 0 and below num_parts={num_parts}")
  if batch_size % num_parts:
    raise UsageError(
      f"batch_size={batch_size} must be a multiple of {num_parts}, the parts that devices share"
    )
  size = batch_size // num_parts
  local = size * len(parts)
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  needed = local * (seq_len + 1) * _BYTES_PER_TOKEN
  if needed > memory:
    raise UsageError(
      f"--batch_size={batch_size} with --seq_len={seq_len}: a batch takes {needed:,} "
      f"bytes of this machine's memory, which has {memory:,}"
    )
  return [row for part in parts for row in range(part * size, (part + 1) * size)]
