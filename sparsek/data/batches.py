"""From token files to batches: packed rows, a resumable iterator over training batches, and fixed
held-out batches.

A batch is a dict of int32 arrays {"tokens": [rows, seq_len + 1], "segment_ids": [rows, seq_len +
1]}. Segment ids count the documents of a row from 1; 0 is padding. The model reads tokens[:, :-1];
the target of position t is tokens[:, t + 1], and it counts where segment_ids[:, t] ==
segment_ids[:, t + 1] != 0. Where documents have marked answers there is a bool array "counted" of
the same shape, and the target counts where counted[:, t + 1] too.
"""

import dataclasses
import functools
import numbers
import os
import platform
import shutil
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging

from sparsek.config import DataConfig, check_at_least
from sparsek.data.corpus import STDLIB, documents
from sparsek.data.epoch_order import EpochOrder, Stage
from sparsek.data.token_files import (
  FORMAT_VERSION,
  TokenDataset,
  TokenSplit,
  open_token_files,
  write_token_files,
)
from sparsek.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from sparsek.errors import RunError, UsageError
from sparsek.storage.new_folder import temporary_name

Batch = dict[str, np.ndarray]
_PREFETCHED_BATCHES = 4
_BYTES_A_TOKEN = 8  # in a batch: its id and its segment
_PREFETCH_THREADS = 2
_ENDLESS = 2**40  # Batches of a stream that has no end; grain wants a number.


def open_data(
  data: str, tokenizer: str | None = None, fingerprint: str | None = None
) -> TokenDataset:
  """Opens a dataset.

  Args:
    data: a folder of token files, or "stdlib": the source text of Python's standard library, which
      is tokenised at first use (a few seconds) into $XDG_CACHE_HOME/sparsek or ~/.cache/sparsek.
    tokenizer: see `load_tokenizer`. "stdlib" is tokenised with it ("byte" by default); a folder
      must have been made with it.
    fingerprint: of that tokenizer as a run recorded it; see `load_tokenizer`.

  Raises:
    UsageError: if the data or the tokenizer cannot be read, or they do not belong together.
  """
  if data == STDLIB:
    return _open_stdlib(load_tokenizer(tokenizer or ByteTokenizer.name, fingerprint))
  dataset = open_token_files(data)
  if tokenizer is not None:
    given, own = load_tokenizer(tokenizer, fingerprint), dataset.tokenizer
    if given.fingerprint != own.fingerprint:
      raise UsageError(
        f"tokenizer {tokenizer!r} ({_describe(given)}) does not match data {data!r}, which was "
        f"made with another ({_describe(own)})"
      )
  return dataset


def _describe(tokenizer: Tokenizer) -> str:
  return f"{tokenizer.name}, {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint[:12]}"


def _open_stdlib(tokenizer: Tokenizer) -> TokenDataset:
  cache = os.environ.get("XDG_CACHE_HOME", "")
  if not os.path.isabs(cache):  # The XDG specification asks to ignore relative paths.
    cache = os.path.join(os.path.expanduser("~"), ".cache")
  made_by = f"{tokenizer.name}-{tokenizer.fingerprint[:12]}"
  name = f"{STDLIB}-python{platform.python_version()}-{made_by}-v{FORMAT_VERSION}"
  name += "-bos" if tokenizer.bos_ids else ""  # older folders of this tokenizer have none
  folder = os.path.join(cache, "sparsek", name)
  try:
    if os.path.lexists(folder):
      try:
        return open_token_files(folder)
      except UsageError as error:
        logging.warning("Making the cached corpus anew: %s", error)
        damaged = temporary_name(folder)
        os.rename(folder, damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    logging.info("Tokenising Python's standard library into %s", folder)
    write_token_files(folder, documents([STDLIB]), tokenizer, [STDLIB])
  except (OSError, RunError, UsageError) as error:
    # Another process may have been faster; then its files are as good as ours.
    if not os.path.isdir(folder):
      raise UsageError(
        f"the corpus {STDLIB!r} could not be prepared in {folder} (XDG_CACHE_HOME "
        f"sets another place): {error}"
      ) from error
  return open_token_files(folder)


class PackedRows:
  """Documents packed in rows of seq_len + 1 tokens; see `sparsek.data.epoch_order` for their order.

  Rows overlap by one token, so that each token but the stream's first is the target of one row. A
  row is a function of its number, the seed, seq_len and the stages of the epoch that came before.
  In the rest of an epoch that began under another seq_len, rows are put together from what no row
  has shown: documents that are cut more often (a span of pairs is a document of its own), and a
  pair more at each cut where `segment_documents` is off.
  Memory: 16 bytes a document and 8 a row, for the two epochs used last.

  Attributes:
    num_rows: of a whole epoch.
    first: number of the row with which to go on after `stages`.
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
    """Takes fields of `DataConfig`, and where to begin.

    Args:
      epoch: in which rows begin.
      stages: what was read of it before; where the last has this seed and seq_len, it goes on.
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
    # Two, since at the end of an epoch prefetching threads ask for both in turn.
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

  def _place(self, i: int) -> tuple[int, int]:
    """Returns the epoch of row i, and how many rows come before it there."""
    if i < self._rows_of_first_epoch:
      return self._epoch, i
    epochs, visit = divmod(i - self._rows_of_first_epoch, self.num_rows)
    return self._epoch + 1 + epochs, visit

  def stages_before(self, i: int) -> tuple[int, list[Stage]]:
    """Returns the epoch of row i, and what is read of it before that row."""
    epoch, visit = self._place(i)
    stages = self._stages if epoch == self._epoch else [self._new_stage]
    return epoch, [*stages[:-1], dataclasses.replace(stages[-1], rows=visit)]

  def example(self, i: int) -> Batch:
    """Returns row i >= 0 of the endless stream of epochs.

    Returns:
      {"tokens": [seq_len + 1], "segment_ids": [seq_len + 1]}, int32; see above for "counted".
    Raises:
      RunError: where a token is outside of the vocabulary, which the checksums would have shown.
    """
    epoch, visit = self._place(i)
    order = self._order(epoch)
    tokens = np.zeros(self._seq_len + 1, np.int32)
    segment_ids = np.zeros(self._seq_len + 1, np.int32)
    counted = np.zeros(self._seq_len + 1, bool) if self._split.marked else None
    filled = 0
    for segment, (document, begin, end) in enumerate(order.pieces(visit, self._seq_len), 1):
      to = slice(filled, filled + end - begin)
      tokens[to] = self._split.document(document)[begin:end]
      if counted is not None:
        counted[to] = ~self._split.uncounted(document)[begin:end]
      segment_ids[to] = segment if self._segment_documents else 1
      filled = to.stop
    if tokens.view(np.uint32).max() >= self._split.vocab_size:
      for document, _, _ in order.pieces(visit, self._seq_len):
        self._split.check_ids(document)
    return {
      "tokens": tokens,
      "segment_ids": segment_ids,
      **({} if counted is None else {"counted": counted}),
    }


def _stack(examples: Sequence[Batch]) -> Batch:
  return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def _local_rows(batch_size: int, seq_len: int, process_index: int, process_count: int) -> range:
  """The rows of a global batch that a process reads."""
  check_at_least("process_count", process_count, 1)
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index={process_index} must be at least 0 and below process_count={process_count}"
    )
  if batch_size % process_count:
    raise UsageError(
      f"batch_size={batch_size} must be a multiple of the number of processes, {process_count}"
    )
  local = batch_size // process_count
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  needed = local * (seq_len + 1) * _BYTES_A_TOKEN
  if needed > memory:
    raise UsageError(
      f"--batch_size={batch_size} with --seq_len={seq_len}: a batch takes {needed:,} "
      f"bytes of this machine's memory, which has {memory:,}"
    )
  return range(process_index * local, (process_index + 1) * local)


class _LocalBatches:
  """What grain reads: batch s holds the examples first + s * batch_size + row, for the rows of this
  process.
  """

  def __init__(self, rows: PackedRows, first: int, batch_size: int, local_rows: range):
    self._rows, self._first, self._batch_size, self._local_rows = (
      rows,
      first,
      batch_size,
      local_rows,
    )

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, s: int) -> Batch:
    start = self._first + s * self._batch_size
    return _stack([self._rows.example(start + row) for row in self._local_rows])


class TrainIterator:
  """An endless iterator over training batches, prefetched by threads of grain, with a state that
  can be saved.

  The state says what the batches that were returned (not those prefetched) have shown, in all
  processes together. It is the same in every process, and can be set under another seq_len, seed,
  batch size or number of processes: the rest of the epoch is what has not been shown.
  """

  def __init__(self, split: TokenSplit, config: DataConfig, local_rows: range, fingerprint: str):
    """See `make_train_iterator`; `local_rows` are the rows of a global batch to read, `fingerprint`
    is the dataset's.
    """
    self._split = split
    self._config = config
    self._local_rows = local_rows
    self._fingerprint = fingerprint
    self._batches = None
    self._start(0, 0, ())

  def _start(self, tokens: int, epoch: int, stages: Sequence[Stage]) -> None:
    """Goes on after `stages` of an epoch, with a count of all tokens up to there."""
    try:
      import grain
    except ImportError as error:
      raise ImportError("reading training data needs grain: pip install grain") from error
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
    source = _LocalBatches(self._rows, self._next_example, config.batch_size, self._local_rows)
    options = grain.ReadOptions(
      num_threads=_PREFETCH_THREADS, prefetch_buffer_size=_PREFETCHED_BATCHES
    )
    self._batches = iter(grain.MapDataset.source(source).to_iter_dataset(options))

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    batch = next(self._batches)
    self._next_example += self._config.batch_size
    self._tokens += self._config.batch_size * self._config.seq_len
    return batch

  def get_state(self) -> dict:
    """Returns the position, as a small dict that JSON can hold.

    Returns:
      "tokens": returned so far; "dataset": its fingerprint; "epoch"; "stages": what is read of the
      epoch, the fields of a `Stage` each.
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

    On another dataset this warns, and goes on after as many tokens there.

    Args:
      state: the position; one of an older version holds a count of tokens only.
      saved_under: "seq_len" and "seed" that such an old state was saved under; it warns where they
        are not known, and takes those of now.
    Raises:
      ValueError: for what is no such state.
    """
    tokens = state.get("tokens") if isinstance(state, dict) else None
    if not _is_count(tokens):
      raise ValueError(
        f"the state of a data iterator must hold a number of 'tokens', got {state!r}"
      )
    if state.get("dataset") != self._fingerprint:
      logging.warning(
        "The data is not what this state was saved with; going on after %d tokens of the new data.",
        tokens,
      )
    elif "stages" in state:
      self._start(tokens, *_read_stages(state))
      return
    seq_len, seed = self._config.seq_len, self._config.seed
    if state.get("dataset") == self._fingerprint:
      old = saved_under or {}
      if _is_count(old.get("seq_len"), 1) and _is_count(old.get("seed")):
        seq_len, seed = old["seq_len"], old["seed"]
      else:
        logging.warning(
          "The position in the data was saved by an older version, without the flags "
          "of the order: if --seq_len or --seed changed since, some of this epoch "
          "comes twice and some not at all."
        )
    rows_of_epoch = -(-(self._split.num_tokens - 1) // seq_len)
    epoch, rows = divmod(-(-tokens // seq_len), rows_of_epoch)
    # One group: the order of older versions.
    self._start(tokens, epoch, [Stage(seed, seq_len, rows_of_epoch, rows)])

  def close(self) -> None:
    """Stops prefetching. Needs no call at the end of a program."""
    if self._batches is not None:
      self._batches.close()


def _is_count(value, minimum: int = 0) -> bool:
  return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= minimum


def _read_stages(state: dict) -> tuple[int, list[Stage]]:
  """Returns the epoch and the stages of an iterator's state, or raises ValueError."""
  epoch, stages = state.get("epoch"), state["stages"]
  is_stage = lambda stage: (
    isinstance(stage, list) and len(stage) == 4 and all(map(_is_count, stage, (0, 1, 1, 0)))
  )
  if not (_is_count(epoch) and isinstance(stages, list) and all(map(is_stage, stages))):
    raise ValueError(
      f"the state of a data iterator must hold an 'epoch' and its 'stages' of 4 "
      f"numbers each, got {state!r}"
    )
  return epoch, [Stage(*stage) for stage in stages]


def make_train_iterator(
  dataset: TokenDataset, config: DataConfig, *, process_index: int = 0, process_count: int = 1
) -> TrainIterator:
  """Batches of the training split, shuffled, without end.

  Process p of P reads rows p * B / P to (p + 1) * B / P - 1 of every global batch of B =
  config.batch_size rows, so that the batches of all processes together do not depend on P.

  Raises:
    UsageError: if batch_size is not a multiple of process_count, or the split has fewer than
      seq_len + 1 tokens.
    ImportError: if grain is not installed.
  """
  split = dataset.split("train")
  if split.num_tokens < config.seq_len + 1:
    raise UsageError(
      f"seq_len={config.seq_len} needs at least {config.seq_len + 1} tokens to train on; "
      f"{dataset.folder} has {split.num_tokens}"
    )
  local_rows = _local_rows(config.batch_size, config.seq_len, process_index, process_count)
  return TrainIterator(split, config, local_rows, dataset.fingerprint)


class EvalBatches(Sequence):
  """Held-out batches, always the same rows whatever the seed; see `eval_batches`."""

  def __init__(self, rows: PackedRows, batch_size: int, num_batches: int, local_rows: range):
    self._rows, self._batch_size, self._local_rows = rows, batch_size, local_rows
    self._num_batches = min(num_batches, -(-rows.num_rows // batch_size))

  def __len__(self) -> int:
    return self._num_batches

  def __getitem__(self, s: int) -> Batch:
    if not 0 <= s < self._num_batches:
      raise IndexError(s)
    examples = [
      self._rows.example((s * self._batch_size + row) % self._rows.num_rows)
      for row in self._local_rows
    ]
    for row, example in zip(self._local_rows, examples):
      if s * self._batch_size + row >= self._rows.num_rows:
        example["segment_ids"][:] = 0  # Padding: this row was read already.
    return _stack(examples)


def eval_batches(
  dataset: TokenDataset,
  config: DataConfig,
  num_batches: int,
  *,
  process_index: int = 0,
  process_count: int = 1,
) -> EvalBatches:
  """The first `num_batches` batches of the held-out split, packed like training rows, in an order
  that is fixed once and for all.

  There are fewer batches if the split is smaller; the last one then ends with rows of padding.
  Processes share the rows of a batch as in `make_train_iterator`. Iterating again gives the same
  batches.

  Raises:
    UsageError: if nothing is held out, or batch_size is not a multiple of process_count.
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
    _local_rows(config.batch_size, config.seq_len, process_index, process_count),
  )
