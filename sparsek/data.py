"""From token files to batches: packed rows, a resumable iterator over training batches, and fixed held-out batches.

A batch is a dict of int32 arrays {"tokens": [rows, seq_len + 1], "segment_ids": [rows, seq_len + 1]}. Segment ids count the documents
of a row from 1; 0 is padding. The model reads tokens[:, :-1]; the target of position t is tokens[:, t + 1], and it counts where
segment_ids[:, t] == segment_ids[:, t + 1] != 0. Where documents have marked answers there is a bool array "counted" of the same shape, and
the target counts where counted[:, t + 1] too.
"""

import functools
import numbers
import os
import platform
import shutil
import uuid
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging

from sparsek.config import DataConfig, check_at_least
from sparsek.corpus import STDLIB, documents
from sparsek.errors import UsageError
from sparsek.token_files import FORMAT_VERSION, TokenDataset, TokenSplit, open_token_files, write_token_files
from sparsek.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

Batch = dict[str, np.ndarray]
_PREFETCHED_BATCHES = 4
_PREFETCH_THREADS = 2
_ENDLESS = 2**40  # Batches of a stream that has no end; grain wants a number.


def open_data(data: str, tokenizer: str | None = None) -> TokenDataset:
  """Opens a dataset.

  Args:
    data: a folder of token files, or "stdlib": the source text of Python's standard library, which is tokenised at first use (a
      few seconds) into $XDG_CACHE_HOME/sparsek or ~/.cache/sparsek.
    tokenizer: see `load_tokenizer`. "stdlib" is tokenised with it ("byte" by default); a folder must have been made with it.

  Raises:
    UsageError: if the data or the tokenizer cannot be read, or they do not belong together.
  """
  if data == STDLIB:
    return _open_stdlib(load_tokenizer(tokenizer or ByteTokenizer.name))
  dataset = open_token_files(data)
  if tokenizer is not None:
    given, own = load_tokenizer(tokenizer), dataset.tokenizer
    if given.fingerprint != own.fingerprint:
      raise UsageError(
          f"tokenizer {tokenizer!r} ({_describe(given)}) does not match data {data!r}, which was made with another ({_describe(own)})")
  return dataset


def _describe(tokenizer: Tokenizer) -> str:
  return f"{tokenizer.name}, {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint[:12]}"


def _open_stdlib(tokenizer: Tokenizer) -> TokenDataset:
  cache = os.environ.get("XDG_CACHE_HOME", "")
  if not os.path.isabs(cache):  # The XDG specification asks to ignore relative paths.
    cache = os.path.join(os.path.expanduser("~"), ".cache")
  name = f"{STDLIB}-python{platform.python_version()}-{tokenizer.name}-{tokenizer.fingerprint[:12]}-v{FORMAT_VERSION}"
  name += "-bos" if tokenizer.bos_ids else ""            # older folders of this tokenizer have none
  folder = os.path.join(cache, "sparsek", name)
  try:
    if os.path.lexists(folder):
      try:
        return open_token_files(folder)
      except UsageError as error:
        logging.warning("Making the cached corpus anew: %s", error)
        damaged = os.path.join(os.path.dirname(folder), f".{name}.{uuid.uuid4().hex}.tmp")
        os.rename(folder, damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    logging.info("Tokenising Python's standard library into %s", folder)
    write_token_files(folder, documents([STDLIB]), tokenizer, [STDLIB])
  except (OSError, UsageError) as error:
    # Another process may have been faster; then its files are as good as ours.
    if not os.path.isdir(folder):
      raise UsageError(f"the corpus {STDLIB!r} could not be prepared in {folder} (XDG_CACHE_HOME sets another place): {error}") from error
  return open_token_files(folder)


class PackedRows:
  """Documents packed in rows of seq_len + 1 tokens; every row is a pure function of (seed, seq_len, its number).

  In each epoch the documents are shuffled and put one after the other, and this stream of N tokens is cut in ceil((N - 1) / seq_len)
  rows that overlap by one token, so that each token but the first is the target of exactly one row. The last row is padded. The rows
  are then visited in a shuffled order. Memory: 16 bytes a document and 8 a row, for the two epochs used last.
  """

  def __init__(self, split: TokenSplit, seq_len: int, *, seed: int = 0, segment_documents: bool = True):
    """Args as in `DataConfig`. Raises ValueError if the split has fewer than two tokens, or for a negative seed."""
    check_at_least("seq_len", seq_len, 1)
    check_at_least("seed", seed, 0)
    if split.num_tokens < 2:
      raise ValueError(f"the {split.name} split has {split.num_tokens} tokens; a row needs at least 2")
    self._split = split
    self._seq_len = seq_len
    self._seed = seed
    self._segment_documents = segment_documents
    self.num_rows = -(-(split.num_tokens - 1) // seq_len)
    # Two, since at the end of an epoch prefetching threads ask for both in turn.
    self._orders = functools.lru_cache(maxsize=2)(self._make_orders)

  def _make_orders(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Document numbers in stream order, where each ends in the stream, and row numbers in the order of visiting."""
    # The generator is named, since what default_rng returns may change with the version of numpy.
    generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
    order = generator.permutation(self._split.num_documents)
    return order, np.cumsum(self._split.lengths[order]), generator.permutation(self.num_rows)

  def example(self, i: int) -> Batch:
    """Row i >= 0 of the endless stream of epochs: {"tokens": [seq_len + 1], "segment_ids": [seq_len + 1]}, int32; see above for "counted"."""
    epoch, visit = divmod(i, self.num_rows)
    order, ends, rows = self._orders(epoch)
    start = int(rows[visit]) * self._seq_len
    count = min(self._seq_len + 1, self._split.num_tokens - start)
    tokens = np.zeros(self._seq_len + 1, np.int32)
    segment_ids = np.zeros(self._seq_len + 1, np.int32)
    counted = np.zeros(self._seq_len + 1, bool) if self._split.marked else None
    place = first = int(np.searchsorted(ends, start, side="right"))
    filled = 0
    while filled < count:
      document = self._split.document(int(order[place]))
      begin = start + filled - (int(ends[place]) - len(document))
      piece = document[begin:begin + count - filled]
      tokens[filled:filled + len(piece)] = piece
      if counted is not None:
        counted[filled:filled + len(piece)] = ~self._split.uncounted(int(order[place]))[begin:begin + count - filled]
      segment_ids[filled:filled + len(piece)] = place - first + 1 if self._segment_documents else 1
      filled += len(piece)
      place += 1
    return {"tokens": tokens, "segment_ids": segment_ids, **({} if counted is None else {"counted": counted})}


def _stack(examples: Sequence[Batch]) -> Batch:
  return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def _local_rows(batch_size: int, process_index: int, process_count: int) -> range:
  """The rows of a global batch that a process reads."""
  check_at_least("process_count", process_count, 1)
  if not 0 <= process_index < process_count:
    raise ValueError(f"process_index={process_index} must be at least 0 and below process_count={process_count}")
  if batch_size % process_count:
    raise UsageError(f"batch_size={batch_size} must be a multiple of the number of processes, {process_count}")
  local = batch_size // process_count
  return range(process_index * local, (process_index + 1) * local)


class _LocalBatches:
  """What grain reads: batch s holds the examples first + s * batch_size + row, for the rows of this process."""

  def __init__(self, rows: PackedRows, first: int, batch_size: int, local_rows: range):
    self._rows, self._first, self._batch_size, self._local_rows = rows, first, batch_size, local_rows

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, s: int) -> Batch:
    start = self._first + s * self._batch_size
    return _stack([self._rows.example(start + row) for row in self._local_rows])


class TrainIterator:
  """An endless iterator over training batches, prefetched by threads of grain, with a state that can be saved.

  The state counts the tokens of the batches that were returned (not of those prefetched), in all processes together. It is the same
  in every process, and can be set under another seq_len, batch size or number of processes: reading goes on after that many tokens,
  rounded up to a whole row.
  """

  def __init__(self, rows: PackedRows, config: DataConfig, local_rows: range, fingerprint: str):
    """See `make_train_iterator`; `local_rows` are the rows of a global batch to read, `fingerprint` is the dataset's."""
    self._rows = rows
    self._config = config
    self._local_rows = local_rows
    self._fingerprint = fingerprint
    self._batches = None
    self._start(0)

  def _start(self, example: int) -> None:
    try:
      import grain
    except ImportError as error:
      raise ImportError("reading training data needs grain: pip install grain") from error
    self.close()
    self._next_example = example
    source = _LocalBatches(self._rows, example, self._config.batch_size, self._local_rows)
    options = grain.ReadOptions(num_threads=_PREFETCH_THREADS, prefetch_buffer_size=_PREFETCHED_BATCHES)
    self._batches = iter(grain.MapDataset.source(source).to_iter_dataset(options))

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    batch = next(self._batches)
    self._next_example += self._config.batch_size
    return batch

  def get_state(self) -> dict:
    """The position, as a small dict that JSON can hold: tokens returned so far, and the fingerprint of the dataset."""
    return {"tokens": self._next_example * self._config.seq_len, "dataset": self._fingerprint}

  def set_state(self, state: dict) -> None:
    """Goes to a position that `get_state` returned. On another dataset this warns, and goes on after as many tokens there."""
    tokens = state.get("tokens") if isinstance(state, dict) else None
    if not isinstance(tokens, numbers.Integral) or tokens < 0:
      raise ValueError(f"the state of a data iterator must hold a number of 'tokens', got {state!r}")
    if state.get("dataset") != self._fingerprint:
      logging.warning("The data is not what this state was saved with; going on after %d tokens of the new data.", tokens)
    self._start(-(-tokens // self._config.seq_len))

  def close(self) -> None:
    """Stops prefetching. Needs no call at the end of a program."""
    if self._batches is not None:
      self._batches.close()


def make_train_iterator(dataset: TokenDataset, config: DataConfig, *, process_index: int = 0, process_count: int = 1) -> TrainIterator:
  """Batches of the training split, shuffled, without end.

  Process p of P reads rows p * B / P to (p + 1) * B / P - 1 of every global batch of B = config.batch_size rows, so that the batches
  of all processes together do not depend on P.

  Raises:
    UsageError: if batch_size is not a multiple of process_count, or the split has fewer than seq_len + 1 tokens.
    ImportError: if grain is not installed.
  """
  split = dataset.split("train")
  if split.num_tokens < config.seq_len + 1:
    raise UsageError(
        f"seq_len={config.seq_len} needs at least {config.seq_len + 1} tokens to train on; {dataset.folder} has {split.num_tokens}")
  rows = PackedRows(split, config.seq_len, seed=config.seed, segment_documents=config.segment_documents)
  return TrainIterator(rows, config, _local_rows(config.batch_size, process_index, process_count), dataset.fingerprint)


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
    examples = [self._rows.example((s * self._batch_size + row) % self._rows.num_rows) for row in self._local_rows]
    for row, example in zip(self._local_rows, examples):
      if s * self._batch_size + row >= self._rows.num_rows:
        example["segment_ids"][:] = 0  # Padding: this row was read already.
    return _stack(examples)


def eval_batches(
    dataset: TokenDataset, config: DataConfig, num_batches: int, *, process_index: int = 0, process_count: int = 1,
) -> EvalBatches:
  """The first `num_batches` batches of the held-out split, packed like training rows, in an order that is fixed once and for all.

  There are fewer batches if the split is smaller; the last one then ends with rows of padding. Processes share the rows of a batch
  as in `make_train_iterator`. Iterating again gives the same batches.

  Raises:
    UsageError: if nothing is held out, or batch_size is not a multiple of process_count.
  """
  check_at_least("num_batches", num_batches, 1)
  split = dataset.split("heldout")
  if split.num_tokens < 2:
    raise UsageError(f"{dataset.folder} has no held-out documents to evaluate on; prepare the data with a held-out fraction above 0")
  rows = PackedRows(split, config.seq_len, segment_documents=config.segment_documents)
  return EvalBatches(rows, config.batch_size, num_batches, _local_rows(config.batch_size, process_index, process_count))
