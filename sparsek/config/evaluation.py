"""The configuration of evaluation."""

import dataclasses

from sparsek.config.checks import Count, Index, check_fields


@dataclasses.dataclass(frozen=True)
class FarRepeatRule:
  """A rule that says which targets are far repeats.

  Attributes:
    far_repeats: the n-gram that ends with the target was last seen more than this many tokens back,
      in the part of the document that the row holds. None is a quarter of the row.
    far_repeats_ngram: tokens of an n-gram, the target included. Of bytes take more, such as 16.
    far_repeats_most: the evaluated rows hold the n-gram at most this often, here included.
  """

  far_repeats: Index | None = None
  far_repeats_ngram: Count = 4
  far_repeats_most: Count = 8

  def __post_init__(self):
    check_fields(self)
