"""Targets that repeat something far back: the last tokens of rare n-grams that were seen before.

Only a model that remembers the earlier place can be sure of such a token: recent tokens do not
hold it, and what is rare was not learnt by heart. Their loss shows what long memory is worth on
plain text.

  document   ... the valve AX-41 leaks ............ so we closed valve AX-41 ...
                           ^---- 4-gram                               ^---- again: its last token
                           |<-------------- more than `distance` ---------->|  is a far repeat
"""

import dataclasses

import numpy as np

from sparsek.config import FarRepeatRule
from sparsek.training.document_losses import DocumentLosses, LossSums


@dataclasses.dataclass(frozen=True)
class FarRepeatLosses:
  """The loss of far repeats.

  Attributes:
    distance, ngram, most: fields of `FarRepeatRule`; the distance is known.
    loss: mean in nats per token, or None if there is no far repeat.
    num_targets: number of far repeats.
    documents: by document.
  """

  distance: int
  ngram: int
  most: int
  loss: float | None
  num_targets: int
  documents: DocumentLosses


class FarRepeats:
  """Collector of far repeats in one pass over rows.

  It keeps 8 bytes for each token, since only the end tells how often an n-gram occurs.

  Args:
    rule: says which targets are far repeats.
    seq_len: tokens of a row.
  """

  def __init__(self, rule: FarRepeatRule, seq_len: int):
    given = rule.far_repeats
    self._distance = seq_len // 4 if given is None else given
    self._ngram, self._most = rule.far_repeats_ngram, rule.far_repeats_most
    self._hashes: list[np.ndarray] = []  # of all n-grams
    # Of targets whose n-gram was last seen far back: its hash, the document, the loss.
    self._far: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

  def add(
    self, tokens: np.ndarray, documents: np.ndarray, losses: np.ndarray, counted: np.ndarray
  ) -> None:
    """Adds rows.

    Args:
      tokens, documents: [B, n + 1]; see `sparsek.data.batches`.
      losses, counted: [B, n], of the targets tokens[:, 1:].
    """
    width = documents.shape[1] - self._ngram + 1  # n-grams of a row
    if width < 1:
      return
    last = documents[:, -width:]  # of the n-gram's last token
    inside = (documents[:, :width] == last) & (last >= 0)
    hashes = ngram_hashes(tokens, self._ngram)[inside]
    self._hashes.append(hashes)
    # Parts of documents, numbered over all rows: a row begins a new one.
    is_first = np.ones(documents.shape, bool)
    is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    parts = np.cumsum(is_first).reshape(documents.shape)[:, -width:][inside]
    places = np.broadcast_to(np.arange(width), inside.shape)[inside]
    # The first token of a row is no target.
    of_targets = ((0, 0), (1, 0))
    losses, counted = np.pad(losses, of_targets), np.pad(counted, of_targets)
    far = last_seen(_joined(hashes, parts), places) > self._distance
    far &= counted[:, -width:][inside]
    self._far.append((hashes[far], last[inside][far], losses[:, -width:][inside][far]))

  def result(self) -> FarRepeatLosses:
    """Returns the losses of the far repeats among all rows."""
    sums = LossSums()
    if self._far:
      hashes, documents, losses = map(np.concatenate, zip(*self._far))
      everything = np.sort(np.concatenate(self._hashes))
      first, end = (np.searchsorted(everything, hashes, side) for side in ("left", "right"))
      is_rare = end - first <= self._most
      sums.add(documents[is_rare], losses[is_rare])
    return FarRepeatLosses(
      self._distance, self._ngram, self._most, sums.mean, sums.num_targets, sums.by_document()
    )


def _mixed(x: np.ndarray) -> np.ndarray:
  """Returns well-mixed uint64 numbers, distinct ones for distinct numbers (splitmix64)."""
  z = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
  z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return z ^ (z >> np.uint64(31))


def ngram_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
  """Returns the hashes of the n-grams of rows, in the order of their first tokens.

  They are polynomials in an odd number modulo 2^64, of mixed tokens.

  Args:
    tokens: [B, m], m >= n.
    n: tokens of an n-gram.
  Returns:
    uint64 [B, m - n + 1].
  """
  width = tokens.shape[1] - n + 1
  hashes = np.zeros((len(tokens), width), np.uint64)
  for i in range(n):
    hashes = _joined(hashes, tokens[:, i : i + width])
  return hashes


def _joined(hashes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
  """Returns the hashes of sequences with one more number each."""
  return hashes * np.uint64(0xD6E8FEB86659FD93) + _mixed(numbers)


def last_seen(keys: np.ndarray, places: np.ndarray) -> np.ndarray:
  """Returns how far back each key was last seen, -1 where it is the first of its kind.

  Args:
    keys: [m], in the order of reading.
    places: [m], where each is; ascending among equal keys.
  """
  order = np.argsort(keys, kind="stable")
  again = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
  distances = np.full(len(keys), -1, np.int64)
  distances[order[again]] = places[order[again]] - places[order[again - 1]]
  return distances
