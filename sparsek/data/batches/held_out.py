"""Held-out batches for evaluation."""

from collections.abc import Iterator, Sequence

from sparsek.config import DataConfig, check_at_least
from sparsek.data.batches.packing import Batch, PackedRows, local_rows, stack
from sparsek.data.token_files import TokenDataset
from sparsek.errors import UsageError


class EvalBatches:
  """A sequence of held-out batches, the same for every seed; see `eval_batches`."""

  def __init__(
    self, rows: PackedRows, batch_size: int, num_batches: int, local_rows: Sequence[int]
  ):
    self._rows, self._batch_size, self._local_rows = rows, batch_size, local_rows
    self._num_batches = min(num_batches, -(-rows.num_rows // batch_size))

  def __len__(self) -> int:
    return self._num_batches

  def __iter__(self) -> Iterator[Batch]:
    return map(self.__getitem__, range(self._num_batches))

  def __getitem__(self, s: int) -> Batch:
    if not 0 <= s < self._num_batches:
      raise IndexError(s)
    return stack([self._example(s * self._batch_size + row) for row in self._local_rows])

  def _example(self, i: int) -> Batch:
    row = i % self._rows.num_rows
    example = {**self._rows.example(row), "documents": self._rows.documents(row)}
    if i >= self._rows.num_rows:  # padding, since this row is in an earlier batch
      example["segment_ids"][:], example["documents"][:] = 0, -1
    return example


def eval_batches(
  dataset: TokenDataset,
  config: DataConfig,
  num_batches: int,
  *,
  parts: Sequence[int] = (0,),
  num_parts: int = 1,
) -> EvalBatches:
  """Returns the first `num_batches` batches of the held-out split, packed like training rows.

  A batch also holds "documents", int32: the number of each token's document in the split, -1 for
  padding. The order of batches is fixed. There are fewer batches if the split is smaller; the last
  one then ends with rows of padding. Processes share the rows of a batch as in
  `make_train_iterator`. Iterating again gives the same batches.

  Raises:
    UsageError: if nothing is held out, or batch_size is not a multiple of num_parts.
  """
  check_at_least("num_batches", num_batches, 1)
  split = dataset.split("heldout")
  if split.num_tokens < 2:
    raise UsageError(
      f"{dataset.folder} has no held-out documents to evaluate on; prepare the data "
      "with a held-out fraction above 0"
    )
  rows = PackedRows(split, config.seq_len, segment_documents=config.segment_documents)
  return EvalBatches(
    rows,
    config.batch_size,
    num_batches,
    local_rows(config.batch_size, config.seq_len, parts, num_parts),
  )
