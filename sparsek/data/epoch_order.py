"""The order in which an epoch is read, and what is left of it under other flags.

In each epoch the documents are shuffled and put one after the other: a stream of N tokens, and of
N - 1 pairs of an input and its target. The stream is cut into rows of seq_len pairs, and these are
visited in a shuffled order. Where --seq_len or --seed change within an epoch, the pairs that no row
has shown yet are cut and shuffled anew, so that each pair of the epoch is still shown once:

  stream      0 . . . . . . . . . . . . . . . . . . . . . . . N - 1
  stage 1     [ read ][      ][ read ][ read ][      ][      ][   ]    rows of seq_len 64
  left              [ span 1 ]               [ span 2             ]    put one after the other
  stage 2           [ row 1       ][ row 2       ][ row 3 (padded) ]   rows of seq_len 128

The state of this is a list of stages, a line of numbers each; see `Stage`.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

# Rows are shuffled within groups of so many tokens, which follow one another in the stream. So what
# is left of a larger epoch is nearly all in one span, and documents stay whole in longer rows.
_GROUP_TOKENS = 2**26


@dataclasses.dataclass(frozen=True)
class Stage:
  """A part of an epoch that is read under one seed and seq_len.

  Attributes:
    seed: of the shuffle; that of an epoch's first stage also shuffles its documents.
    seq_len: pairs of input and target in a row.
    group: rows among which the order is shuffled.
    rows: how many were read.
  """

  seed: int
  seq_len: int
  group: int
  rows: int = 0

  @staticmethod
  def new(seed: int, seq_len: int) -> "Stage":
    """Returns a stage of which nothing is read."""
    return Stage(seed, seq_len, max(1, _GROUP_TOKENS // seq_len))


class EpochOrder:
  """The rows of one epoch in the order of reading, under the last of its stages.

  Memory: 16 bytes a document, 8 a row.

  Attributes:
    documents: numbers of the documents in the order of the stream.
    rows: numbers of the rows in the order of reading.
  """

  def __init__(self, lengths: np.ndarray, epoch: int, stages: Sequence[Stage]):
    """Args: the documents' lengths in tokens; the epoch's number; its stages, at least one."""
    self._lengths = lengths
    for i, stage in enumerate(stages):
      # The generator is named, since what default_rng returns may change with numpy's version.
      seeds = [stage.seed, epoch, i] if i else [stage.seed, epoch]
      generator = np.random.Generator(np.random.PCG64(seeds))
      if i:
        unread = np.sort(self.rows[stages[i - 1].rows :])
        self._set_spans(*self._pairs_of(unread, stages[i - 1].seq_len))
      else:
        self.documents = generator.permutation(len(lengths))
        self._document_ends = np.cumsum(lengths[self.documents])
        self._set_spans(np.array([0]), self._document_ends[-1:] - 1)
      self.rows = _shuffled(-(-(self._num_tokens - 1) // stage.seq_len), stage.group, generator)

  def _set_spans(self, begins: np.ndarray, sizes: np.ndarray) -> None:
    """Takes where spans of unread pairs begin in the stream, ascending, and the pairs of each."""
    self._sizes = sizes
    self._ends = np.cumsum(sizes + 1)  # a span of s pairs has s + 1 tokens
    # From a place among the spans' tokens to the stream.
    self._shifts = begins - (self._ends - sizes - 1)
    self._num_tokens = int(self._ends[-1]) if len(sizes) else 1

  def _pairs_of(self, rows: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the pairs of ascending rows begin in the stream, and how many follow there."""
    is_first = np.diff(rows, prepend=-2) != 1
    begins = rows[is_first] * seq_len
    ends = (rows[np.roll(is_first, -1)] + 1) * seq_len
    # A run of rows may reach over several spans. The last token of a span is no pair's input.
    first = np.searchsorted(self._ends, begins, side="right")
    counts = np.searchsorted(self._ends, ends, side="left") - first + 1
    spans = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    inside = spans < len(self._ends)  # the last row may reach over the last span
    runs, spans = np.repeat(np.arange(len(counts)), counts)[inside], spans[inside]
    begins = np.maximum(begins[runs], self._ends[spans] - self._sizes[spans] - 1)
    sizes = np.minimum(ends[runs], self._ends[spans] - 1) - begins
    shifts = self._shifts[spans]
    return (begins + shifts)[sizes > 0], sizes[sizes > 0]

  def pieces(self, visit: int, seq_len: int) -> Iterator[tuple[int, int, int]]:
    """Yields the parts of documents in the row that is visited as number `visit`.

    Yields:
      (document, begin, end): its number and places in it; each is a document for attention.
    """
    at = int(self.rows[visit]) * seq_len
    stop = min(at + seq_len + 1, self._num_tokens)
    while at < stop:
      span = int(np.searchsorted(self._ends, at, side="right"))
      in_stream = at + int(self._shifts[span])
      place = int(np.searchsorted(self._document_ends, in_stream, side="right"))
      rest = int(self._document_ends[place]) - in_stream
      size = min(stop - at, int(self._ends[span]) - at, rest)
      document = int(self.documents[place])
      begin = int(self._lengths[document]) - rest
      yield document, begin, begin + size
      at += size


def _shuffled(num_rows: int, group: int, generator: np.random.Generator) -> np.ndarray:
  """Returns 0 to num_rows - 1, shuffled within groups that follow one another."""
  groups = [
    begin + generator.permutation(min(group, num_rows - begin))
    for begin in range(0, num_rows, group)
  ]
  return np.concatenate(groups) if groups else np.zeros(0, np.int64)
