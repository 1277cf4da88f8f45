"""The search for the longest row, with lengths that fit or do not by rule."""

import pytest

from sparsek.errors import UsageError
from sparsek.experiments.bench import longest_row


class Rule(longest_row.Search):
  """A search whose programs take 10 MiB and 2 a step, and fail from a number of steps on."""

  def __init__(self, limit: int, fails_from: int):
    super().__init__(None, (1, 1, 1), 1, limit * 2**20)
    self._fails_from, self.tried = fails_from, []

  def _cell(self, steps):
    self._sizes |= {0: 10.0, steps: 10.0 + 2 * steps}

  def fits(self, steps):
    self._cell(steps)
    self.tried.append(steps)
    self.known[steps] = {} if steps < self._fails_from else {"failed": "out of memory"}
    return steps < self._fails_from


@pytest.mark.parametrize(
  "limit, fails_from, tried",
  [
    (110, 51, [50, 51]),  # as estimated
    (110, 49, [50, 49, 48]),  # less fits
    (110, 53, [50, 51, 52, 53]),  # more fits
    (110, 1, None),  # nothing fits
  ],
)
def test_ends_beside_a_row_that_does_not_fit(limit, fails_from, tried):
  search = Rule(limit, fails_from)
  while not search.is_done():
    search.fits(search.following())
  assert max((s for s, row in search.known.items() if not row), default=0) == fails_from - 1
  assert tried is None or search.tried == tried


def test_what_is_not_known_is_refused():
  for flag in ("--cases=110M,2B", "--kinds=lsh"):
    with pytest.raises(UsageError, match=f"{flag}: no '(2B|lsh)'; there are"):
      longest_row.main(longest_row.make_parser().parse_args([flag]))
