"""The order in which an epoch is read, also when flags change in the middle of it.

In each epoch the documents are shuffled and concatenated: a stream of N tokens, and of N - 1 pairs
of an input and its target. The stream is cut into rows of seq_len pairs, and these are visited in a
shuffled order. If --seq_len or --seed change within an epoch, the pairs that no row has shown yet
are cut and shuffled again, so that each pair of the epoch is still shown once:

  stream      0 . . . . . . . . . . . . . . . . . . . . . . . N - 1
  stage 1     [ read ][      ][ read ][ read ][      ][      ][   ]    rows of seq_len 64
  unread            [ span 1 ]               [ span 2             ]    concatenated
  stage 2           [ row 1       ][ row 2       ][ row 3 (padded) ]   rows of seq_len 128

The state is a list of stages, each of a few numbers; see `Stage`.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

# Rows are shuffled within groups of this many tokens, which follow one another in the stream. So
# the unread part of a larger epoch is nearly all in one span, and documents stay whole in longer
# rows.
_GROUP_TOKENS = 2**26


@dataclasses.dataclass(frozen=True)
class Stage:
  """A part of an epoch that is read with one seed and seq_len.

  Attributes:
    seed: of the shuffle; the seed of an epoch's first stage also shuffles its documents.
    seq_len: pairs of input and target in a row.
    group: number of consecutive rows among which the order is shuffled.
    rows: number of rows that were read.
  """

  seed: int
  seq_len: int
  group: int
  rows: int = 0

  @staticmethod
  def new(seed: int, seq_len: int) -> "Stage":
    """Returns a stage of which nothing is read yet."""
    return Stage(seed, seq_len, max(1, _GROUP_TOKENS // seq_len))


class EpochOrder:
  """The rows of one epoch in the order of reading, with seed and seq_len of its last stage.

  Memory: 16 bytes per document and 8 per row.

  Attributes:
    documents: numbers of the documents in the order of the stream.
    rows: numbers of the rows in the order of reading.
  """

  def __init__(self, lengths: np.ndarray, epoch: int, stages: Sequence[Stage]):
    """Initialises the order.

    Args:
      lengths: of the documents, in tokens.
      epoch: its number.
      stages: of the epoch, at least one.
    """
    self._lengths = lengths
    self.rows = np.zeros(0, np.int64)
    for i, stage in enumerate(stages):
      # PCG64 by name, since the generator of default_rng may change with numpy's version.
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
    """Sets where spans of unread pairs begin in the stream, ascending, and their sizes in pairs."""
    self._sizes = sizes
    self._ends = np.cumsum(sizes + 1)  # a span of s pairs has s + 1 tokens
    # Added to a position in the concatenated spans, they give the position in the stream.
    self._shifts = begins - (self._ends - sizes - 1)
    self._num_tokens = int(self._ends[-1]) if len(sizes) else 1

  def _pairs_of(self, rows: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns where spans of the pairs of ascending rows begin in the stream, and their sizes."""
    is_first = np.diff(rows, prepend=-2) != 1
    begins = rows[is_first] * seq_len
    ends = (rows[np.roll(is_first, -1)] + 1) * seq_len
    # A run of rows may extend over several spans. The last token of a span is no pair's input.
    first = np.searchsorted(self._ends, begins, side="right")
    counts = np.searchsorted(self._ends, ends, side="left") - first + 1
    spans = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    inside = spans < len(self._ends)  # the last row may extend beyond the last span
    runs, spans = np.repeat(np.arange(len(counts)), counts)[inside], spans[inside]
    begins = np.maximum(begins[runs], self._ends[spans] - self._sizes[spans] - 1)
    sizes = np.minimum(ends[runs], self._ends[spans] - 1) - begins
    shifts = self._shifts[spans]
    return (begins + shifts)[sizes > 0], sizes[sizes > 0]

  def pieces(self, visit: int, seq_len: int) -> Iterator[tuple[int, int, int]]:
    """Yields the parts of documents in row number `visit` of the order.

    Yields:
      (document, begin, end): its number, and token positions in it. Attention treats each part as a
      document.
    """
    position = int(self.rows[visit]) * seq_len
    stop = min(position + seq_len + 1, self._num_tokens)
    while position < stop:
      span = int(np.searchsorted(self._ends, position, side="right"))
      in_stream = position + int(self._shifts[span])
      index = int(np.searchsorted(self._document_ends, in_stream, side="right"))
      rest = int(self._document_ends[index]) - in_stream
      size = min(stop - position, int(self._ends[span]) - position, rest)
      document = int(self.documents[index])
      begin = int(self._lengths[document]) - rest
      yield document, begin, begin + size
      position += size


def _shuffled(num_rows: int, group: int, generator: np.random.Generator) -> np.ndarray:
  """Returns 0 to num_rows - 1, shuffled within groups that follow one another."""
  groups = [
    begin + generator.permutation(min(group, num_rows - begin))
    for begin in range(0, num_rows, group)
  ]
  return np.concatenate(groups) if groups else np.zeros(0, np.int64)
