"""Intervals and comparisons of figures that come from few starts, documents or prompts.

A start is a run with a seed of its own. Models of different starts vary, and so do documents: an
interval says over which of the two it was taken, and holds nothing about the other.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95  # of every interval, by default
RESAMPLES = 10_000
BLOCK = 2**20  # drawn documents that exist at the same time


class Interval(NamedTuple):
  """An estimate with its confidence interval.

  Attributes:
    value: the estimate.
    low, high: ends of the interval.
    number: of starts, documents or prompts that it was taken over.
  """

  value: float
  low: float
  high: float
  number: int


class Comparison(NamedTuple):
  """A difference, first minus second, of figures over the same starts or documents.

  Attributes:
    difference: the estimate.
    low, high: ends of its confidence interval.
    p_value: two-sided, for no difference; `holm` corrects several of them.
    number: of pairs.
  """

  difference: float
  low: float
  high: float
  p_value: float
  number: int


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
  """Returns the mean of independent figures with Student's t interval.

  It is `mean +- t s / sqrt(n)`, with the standard deviation s of n - 1 degrees of freedom.

  Args:
    values: a figure of each start, at least two.
    level: probability that the interval holds the mean of all starts, if starts are normal.
  Raises:
    ValueError: for fewer than two figures, one that is not finite, or a level outside 0 to 1.

  >>> [round(x, 3) for x in t_interval([1.0, 2.0, 3.0])]
  [2.0, -0.484, 4.484, 3]
  """
  _check_level(level)
  x = _checked("values", values, "starts")
  half = t_quantile((1 + level) / 2, len(x) - 1) * _standard_error(x)
  return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half), len(x))


def paired_t(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Comparison:
  """Returns the mean difference of pairs of figures, with Student's t interval and test.

  Args:
    first, second: a figure of each start, in the same order; at least two.
    level: of the interval.
  Raises:
    ValueError: as `t_interval`, and for lists that differ in length.
  """
  x, y = _checked("first", first, "starts"), _checked("second", second, "starts")
  _check_pairs(x, y, "first", "second")
  interval = t_interval(x - y, level)
  error = _standard_error(x - y)
  if error == 0:
    p_value = float(interval.value == 0)
  else:
    p_value = max(0.0, 1 - t_probability(abs(interval.value) / error, len(x) - 1))
  return Comparison(*interval[:3], p_value, len(x))


def bootstrap_ratio(
  sums: Sequence[float],
  counts: Sequence[int],
  level: float = LEVEL,
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> Interval:
  """Returns `sum(sums) / sum(counts)` with a percentile bootstrap interval over documents.

  Documents are drawn with replacement, as many as there are; the ratio is taken anew each time.
  With fewer than about 20 documents such an interval is too narrow.

  Args:
    sums: of each document, such as the sum of its tokens' losses.
    counts: of each document, such as its number of tokens.
    level: share of the resampled ratios that the interval holds.
    resamples: how often documents are drawn.
    seed: of the draws; the same one gives the same interval.
  Raises:
    ValueError: for fewer than two documents, a sum that is not finite, a count that is not above 0,
      lists that differ in length, or a level outside 0 to 1.

  >>> bootstrap_ratio([2.0, 8.0], [1, 4])  # every document has the same mean
  Interval(value=2.0, low=2.0, high=2.0, number=2)
  """
  _check_level(level)
  x, n = _checked_documents("sums", sums, counts)
  blocks = [np.sum(x[i], 1) / np.sum(n[i], 1) for i in _draws(len(x), resamples, seed)]
  low, high = _percentiles(np.concatenate(blocks), level)
  return Interval(float(x.sum() / n.sum()), low, high, len(x))


def paired_bootstrap(
  first: Sequence[float],
  second: Sequence[float],
  counts: Sequence[int],
  level: float = LEVEL,
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> Comparison:
  """Returns the difference of two ratios of sums over the same documents.

  The interval is a bootstrap: both ratios are taken over the same drawn documents, so what is hard
  in a document cancels. The p value is that of Fisher's randomization test: how often the
  difference is as large when the models change places in random documents. So it is never small
  for few documents: with n of them at least `2^(1 - n)`.

  Args:
    first, second: of each document, such as the sums of its tokens' losses under two models.
    counts, level, resamples, seed: as in `bootstrap_ratio`.
  Raises:
    ValueError: as `bootstrap_ratio`.
  """
  _check_level(level)
  x, n = _checked_documents("first", first, counts)
  y, _ = _checked_documents("second", second, counts)
  difference = x - y
  blocks = [np.sum(difference[i], 1) / np.sum(n[i], 1) for i in _draws(len(x), resamples, seed)]
  low, high = _percentiles(np.concatenate(blocks), level)
  p_value = _randomization_p(difference, resamples, seed)
  return Comparison(float(difference.sum() / n.sum()), low, high, p_value, len(x))


def score_interval(share: float, count: int, level: float = LEVEL) -> Interval:
  """Returns a mean of scores from 0 to 1 with Wilson's score interval (1927).

  It is exact enough for few prompts, and for a share of 0 or 1, where a bootstrap has no width.
  Scores between 0 and 1, such as the share of a prompt's answers that are right, vary less than
  right and wrong do: then the interval is too wide rather than too narrow.

  Args:
    share: mean score, from 0 to 1.
    count: number of independent prompts.
    level: of the interval.
  Raises:
    ValueError: for a share or a level out of range, or no prompt.

  >>> [round(x, 3) for x in score_interval(0.5, 100)]
  [0.5, 0.404, 0.596, 100]
  """
  _check_level(level)
  if not 0 <= share <= 1:
    raise ValueError(f"share={share} must be from 0 to 1")
  if count < 1:
    raise ValueError(f"count={count} must be at least 1")
  z = normal_quantile((1 + level) / 2)
  centre = share + z * z / (2 * count)
  spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
  low, high = ((centre + sign * spread) / (1 + z * z / count) for sign in (-1, 1))
  # Rounding must not leave out 0 or 1.
  return Interval(share, min(low, share), max(high, share), count)


def holm(p_values: Sequence[float]) -> list[float]:
  """Returns the p values of several comparisons, corrected for how many there are (Holm 1979).

  A comparison whose corrected p value is below 5 % stands: the probability that any of those that
  stand is a chance result is below 5 %.

  Args:
    p_values: one of each comparison that was made, not only of those that are shown.
  Raises:
    ValueError: for a value that is not from 0 to 1.

  >>> holm([0.01, 0.04, 0.03])
  [0.03, 0.06, 0.06]
  """
  p = np.asarray(p_values, np.float64)
  if not np.all((p >= 0) & (p <= 1)):  # a NaN compares as False
    raise ValueError(f"p_values={[*map(float, p)]} must be from 0 to 1")
  order = np.argsort(p, kind="stable")
  steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
  corrected = np.empty_like(p)
  corrected[order] = np.minimum(steps, 1)
  return [float(value) for value in corrected]


def p_words(p_value: float) -> str:
  """Returns a p value in words, such as "p 0.012" or "p < 0.001"."""
  return "p < 0.001" if p_value < 0.001 else f"p {p_value:.3f}"


def t_probability(t: float, degrees: int) -> float:
  """Returns the probability that |T| <= t for Student's T.

  It is the finite sum for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4).

  Args:
    t: at least 0.
    degrees: of freedom, at least 1.
  """
  angle = math.atan(t / math.sqrt(degrees))
  sine, cosine = math.sin(angle), math.cos(angle)
  odd = degrees % 2
  term, total = cosine if odd else 1.0, 0.0
  for i in range(1 + odd, degrees, 2):
    total += term
    term *= cosine * cosine * i / (i + 1)
  return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(probability: float, degrees: int) -> float:
  """Returns the t below which Student's T lies with this probability, from 0.5 to below 1."""
  return _solved(lambda t: (1 + t_probability(t, degrees)) / 2, probability)


def normal_quantile(probability: float) -> float:
  """Returns the z below which a normal variable lies with this probability, from 0.5 to below 1."""
  return _solved(lambda z: (1 + math.erf(z / math.sqrt(2))) / 2, probability)


def _solved(rising: Callable[[float], float], value: float) -> float:
  """Returns the x >= 0 at which a rising function has a value, by bisection."""
  low, high = 0.0, 1.0
  while rising(high) < value and math.isfinite(high):
    low, high = high, 2 * high
  while low < (middle := (low + high) / 2) < high:
    low, high = (middle, high) if rising(middle) < value else (low, middle)
  return high


def _standard_error(x: np.ndarray) -> float:
  return float(x.std(ddof=1)) / math.sqrt(len(x))


def _draws(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
  """Yields the indices of drawn documents, [some of the resamples, count]."""
  generator, rows = np.random.default_rng(seed), max(1, BLOCK // count)
  for first in range(0, resamples, rows):
    yield generator.integers(count, size=(min(rows, resamples - first), count))


def _randomization_p(difference: np.ndarray, resamples: int, seed: int) -> float:
  """Returns how often the sum is as far from 0 when the signs are random.

  All signs are tried where they are few; else one more is counted than was drawn.
  """
  count, least = len(difference), abs(difference.sum()) * (1 - 1e-12)  # but for rounding
  if 2**count <= resamples:
    bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
    return float(np.mean(np.abs((2 * bits - 1) @ difference) >= least))
  generator, rows, as_far = np.random.default_rng(seed), max(1, BLOCK // count), 0
  for first in range(0, resamples, rows):
    bits = generator.integers(2, size=(min(rows, resamples - first), count))
    as_far += int(np.sum(np.abs((2 * bits - 1) @ difference) >= least))
  return (as_far + 1) / (resamples + 1)


def _percentiles(drawn: np.ndarray, level: float) -> tuple[float, float]:
  low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def _check_level(level: float) -> None:
  if not 0 < level < 1:
    raise ValueError(f"level={level} must be above 0 and below 1")


def _checked(name: str, values: Sequence[float], of: str) -> np.ndarray:
  """Returns values as float64; raises ValueError for fewer than two, or one that is not finite."""
  x = np.asarray(values, np.float64)
  if x.ndim != 1 or len(x) < 2:
    raise ValueError(f"{name} must hold at least 2 {of}; got {values!r}")
  if not np.all(np.isfinite(x)):
    raise ValueError(f"{name} must be finite; got {x[~np.isfinite(x)][0]}")
  return x


def _check_pairs(x: np.ndarray, y: np.ndarray, first: str, second: str) -> None:
  if len(x) != len(y):
    raise ValueError(f"{first} and {second} must be of equal length; got {len(x)} and {len(y)}")


def _checked_documents(
  name: str, sums: Sequence[float], counts: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns sums and counts of documents as float64.

  Raises:
    ValueError: for too few, lists that differ in length, and values out of range.
  """
  x, n = _checked(name, sums, "documents"), _checked("counts", counts, "documents")
  _check_pairs(x, n, name, "counts")
  if np.any(n <= 0):
    raise ValueError(f"counts must be above 0; got {n[n <= 0][0]:g}")
  return x, n
