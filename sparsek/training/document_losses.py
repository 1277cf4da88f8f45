"""Held-out losses summed by document, so that intervals can be taken over documents."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class DocumentLosses:
  """The losses of documents, those that have targets.

  Attributes:
    index: numbers of the documents in their split, ascending.
    loss_sum: of each, the sum over its targets in nats.
    num_targets: of each.
  """

  index: tuple[int, ...]
  loss_sum: tuple[float, ...]
  num_targets: tuple[int, ...]


class LossSums:
  """Sums in float64 of the losses of targets that have the same label, such as a document."""

  def __init__(self) -> None:
    self._sums: dict[int, float] = {}
    self._counts: dict[int, int] = {}

  def add(self, labels: np.ndarray, losses: np.ndarray) -> None:
    """Adds targets, given the label and the loss of each."""
    present, which = np.unique(labels, return_inverse=True)
    sums = np.bincount(which, losses.astype(np.float64))
    for label, loss, count in zip(present.tolist(), sums.tolist(), np.bincount(which).tolist()):
      self._sums[label] = self._sums.get(label, 0.0) + loss
      self._counts[label] = self._counts.get(label, 0) + count

  @property
  def num_targets(self) -> int:
    """The number of targets."""
    return sum(self._counts.values())

  @property
  def mean(self) -> float | None:
    """The mean loss of all targets; None where there is none."""
    return sum(self._sums.values()) / self.num_targets if self._counts else None

  def of(self, label: int) -> tuple[float | None, int]:
    """Returns the mean loss of a label, None where it has no target, and its number of targets."""
    count = self._counts.get(label, 0)
    return (self._sums[label] / count if count else None), count

  def by_document(self) -> DocumentLosses:
    """Returns the sums of all labels, which are documents."""
    index = tuple(sorted(self._sums))
    return DocumentLosses(
      index, tuple(self._sums[i] for i in index), tuple(self._counts[i] for i in index)
    )
