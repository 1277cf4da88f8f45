"""A resumable iterator over training batches."""

import dataclasses
import numbers
from collections.abc import Iterator, Sequence
from typing import TypeGuard

from absl import logging

from sparsek.config import DataConfig
from sparsek.data.batches.packing import Batch, PackedRows, local_rows, stack
from sparsek.data.epoch_order import Stage
from sparsek.data.token_files import TokenDataset, TokenSplit
from sparsek.errors import UsageError

_PREFETCHED_BATCHES = 4
_PREFETCH_THREADS = 2
_ENDLESS = 2**40  # length of an endless stream of batches; grain needs a number


class _LocalBatches:
  """A data source for grain: the part of each batch that this process reads.

  Batch s consists of the examples first + s * batch_size + row, for the rows of this process.
  """

  def __init__(self, rows: PackedRows, first: int, batch_size: int, rows_to_read: Sequence[int]):
    self._rows, self._first = rows, first
    self._batch_size, self._rows_to_read = batch_size, rows_to_read

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, s: int) -> Batch:
    start = self._first + s * self._batch_size
    return stack([self._rows.example(start + row) for row in self._rows_to_read])


class TrainIterator:
  """An endless iterator over training batches, with a state that can be saved.

  Threads of grain prefetch batches. The state describes what the returned batches have shown, in
  all processes together; batches that are only prefetched do not count. It is the same in every
  process, and can be set with another seq_len, seed, batch size or number of processes: the
  iterator then goes on with what has not been shown in the epoch.
  """

  def __init__(
    self, split: TokenSplit, config: DataConfig, rows_to_read: Sequence[int], fingerprint: str
  ):
    """Starts at the beginning; see `make_train_iterator`.

    Args:
      split, config: the documents and how to make rows of them.
      rows_to_read: the rows of a global batch that this process reads.
      fingerprint: of the dataset.
    """
    self._split = split
    self._config = config
    self._rows_to_read = rows_to_read
    self._fingerprint = fingerprint
    self._batches = None
    self._start(0, 0, ())

  def _start(self, tokens: int, epoch: int, stages: Sequence[Stage]) -> None:
    """Starts after `stages` of an epoch, with `tokens` tokens returned so far in all epochs."""
    try:
      import grain
    except ImportError as error:
      raise UsageError(
        f"reading training data needs grain, which cannot be imported ({error}): pip install grain"
      ) from None
    self.close()
    config = self._config
    self._rows = PackedRows(
      self._split,
      config.seq_len,
      seed=config.seed,
      segment_documents=config.segment_documents,
      epoch=epoch,
      stages=stages,
    )
    self._next_example = self._rows.first
    self._tokens = tokens
    source = _LocalBatches(self._rows, self._next_example, config.batch_size, self._rows_to_read)
    options = grain.ReadOptions(
      num_threads=_PREFETCH_THREADS, prefetch_buffer_size=_PREFETCHED_BATCHES
    )
    self._batches = iter(grain.MapDataset.source(source).to_iter_dataset(options))

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    assert self._batches is not None  # since _start
    batch = next(self._batches)
    self._next_example += self._config.batch_size
    self._tokens += self._config.batch_size * self._config.seq_len
    return batch

  def get_state(self) -> dict:
    """Returns the position, as a small dict that JSON can hold.

    Returns:
      "tokens": number of tokens returned so far; "dataset": its fingerprint; "epoch": its number;
      "stages": the stages that are read of the epoch, each as the fields of a `Stage`.
    """
    epoch, stages = self._rows.stages_before(self._next_example)
    return {
      "tokens": self._tokens,
      "dataset": self._fingerprint,
      "epoch": epoch,
      "stages": [list(dataclasses.astuple(stage)) for stage in stages],
    }

  def set_state(self, state: dict, saved_under: dict | None = None) -> None:
    """Goes to a position that `get_state` returned.

    If the position is one of another dataset, this warns, and goes on after as many tokens of the
    present one.

    Args:
      state: the position; that of an older version holds only a number of tokens.
      saved_under: "seq_len" and "seed" with which such an old state was saved; where they are not
        known, this warns and uses the present ones.
    Raises:
      ValueError: for anything that is no such state.
    """
    tokens = state.get("tokens") if isinstance(state, dict) else None
    if not _is_count(tokens):
      raise ValueError(
        f"the state of a data iterator must hold a number of 'tokens', got {state!r}"
      )
    if state.get("dataset") != self._fingerprint:
      logging.warning(
        "the data are not those that were read so far: training goes on after %d tokens of the new "
        "data",
        tokens,
      )
    elif "stages" in state:
      self._start(tokens, *_read_stages(state))
      return
    seq_len, seed = self._config.seq_len, self._config.seed
    if state.get("dataset") == self._fingerprint:
      old = saved_under or {}
      old_seq_len, old_seed = old.get("seq_len"), old.get("seed")
      if _is_count(old_seq_len, 1) and _is_count(old_seed):
        seq_len, seed = old_seq_len, old_seed
      else:
        logging.warning(
          "the position in the data was saved by an older version, without the flags "
          "of the order: if --seq_len or --seed changed since, some of this epoch "
          "comes twice and some not at all"
        )
    rows_of_epoch = -(-(self._split.num_tokens - 1) // seq_len)
    epoch, rows = divmod(-(-tokens // seq_len), rows_of_epoch)
    # In older versions all rows of an epoch were one group.
    self._start(tokens, epoch, [Stage(seed, seq_len, rows_of_epoch, rows)])

  def close(self) -> None:
    """Stops prefetching; not necessary at the end of a program."""
    if self._batches is not None:
      self._batches.close()


def _is_count(value: object, minimum: int = 0) -> TypeGuard[int]:
  return (
    isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= minimum
  )


def _read_stages(state: dict) -> tuple[int, list[Stage]]:
  """Returns the epoch and the stages of an iterator's state, or raises ValueError."""
  epoch, stages = state.get("epoch"), state["stages"]
  if not (_is_count(epoch) and isinstance(stages, list) and all(map(_is_stage, stages))):
    raise ValueError(
      f"the state of a data iterator must hold an 'epoch' and its 'stages' of 4 "
      f"numbers each, got {state!r}"
    )
  return epoch, [Stage(*stage) for stage in stages]


def _is_stage(value: object) -> bool:
  smallest = (0, 1, 1, 0)  # of the fields of a Stage
  return isinstance(value, list) and len(value) == 4 and all(map(_is_count, value, smallest))


def make_train_iterator(
  dataset: TokenDataset, config: DataConfig, *, parts: Sequence[int] = (0,), num_parts: int = 1
) -> TrainIterator:
  """Returns an endless iterator over shuffled batches of the training split.

  A process reads `parts` of every global batch of config.batch_size rows, as `local_rows` counts
  them, so that the batches of all processes together do not depend on their number.

  Raises:
    UsageError: if batch_size is not a multiple of num_parts, or the split has fewer than
      seq_len + 1 tokens.
    ImportError: if grain is not installed.
  """
  split = dataset.split("train")
  if split.num_tokens < config.seq_len + 1:
    raise UsageError(
      f"seq_len={config.seq_len} needs at least {config.seq_len + 1} tokens to train on; "
      f"{dataset.folder} has {split.num_tokens}"
    )
  rows_to_read = local_rows(config.batch_size, config.seq_len, parts, num_parts)
  return TrainIterator(split, config, rows_to_read, dataset.fingerprint)
