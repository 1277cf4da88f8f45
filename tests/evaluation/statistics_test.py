"""Intervals and tests against printed tables, closed forms and simulated coverage."""

import doctest
import math

import jax
import jax.scipy.special
import numpy as np
import pytest

from sparsek.evaluation import statistics
from sparsek.evaluation.statistics import (
  bootstrap_ratio,
  holm,
  normal_quantile,
  paired_bootstrap,
  paired_t,
  score_interval,
  t_interval,
  t_probability,
  t_quantile,
)


@pytest.mark.parametrize(
  "probability, degrees, expected",
  [
    (0.975, 1, math.tan(math.pi * 0.475)),
    (0.975, 2, 0.95 / math.sqrt(2 * 0.975 * 0.025)),
    (0.95, 2, 0.9 / math.sqrt(2 * 0.95 * 0.05)),
    (0.975, 3, 3.182446305),
    (0.975, 4, 2.776445105),
    (0.975, 5, 2.570581836),
    (0.995, 9, 3.249835542),
    (0.975, 30, 2.042272456),
    (0.975, 1000, 1.962339081),
    (0.5, 7, 0.0),
  ],
)
def test_quantiles_are_the_printed_ones(probability, degrees, expected):
  assert t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_probabilities_agree_with_the_incomplete_beta_function():
  degrees = [1, 2, 3, 4, 7, 18, 99]
  for t in (0.1, 1.0, 3.0, 40.0):
    ours = [t_probability(t, n) for n in degrees]
    n = np.array(degrees, np.float32)
    tails = jax.scipy.special.betainc(n / 2, 0.5, n / (n + t * t))
    np.testing.assert_allclose(1 - np.array(ours), tails, rtol=1e-4, atol=1e-6)
  assert normal_quantile(0.975) == pytest.approx(1.959963984540054, rel=1e-12)


def test_t_interval_and_paired_t():
  value, low, high, count = t_interval([1.0, 2.0, 3.0, 6.0])
  half = 3.182446305 * math.sqrt(14 / 3 / 4)
  assert (value, count) == (3.0, 4)
  np.testing.assert_allclose((low, high), (3 - half, 3 + half), rtol=1e-9)
  assert t_interval([2.0, 2.0]) == (2.0, 2.0, 2.0, 2)
  # differences 1, 2, 3: t = 2 sqrt(3) with 2 degrees of freedom, whose distribution is closed
  pair = paired_t([5.0, 5.0, 5.0], [4.0, 3.0, 2.0])
  t = 2 * math.sqrt(3)
  assert pair[:3] == t_interval([1.0, 2.0, 3.0])[:3]
  assert pair.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t)) and pair.number == 3
  assert paired_t([1, 2], [1, 2]).p_value == 1 and paired_t([2, 3], [1, 2]).p_value == 0


def test_bootstrap_has_the_spread_of_the_closed_form():
  """A ratio's standard error is that of its linearisation; drawn ones agree within noise."""
  random = np.random.default_rng(0)
  counts = random.integers(50, 500, 200)
  sums = counts * random.normal(3, 0.5, 200)
  value, low, high, count = bootstrap_ratio(sums, counts)
  assert (value, count) == (pytest.approx(sums.sum() / counts.sum()), 200)
  error = math.sqrt(np.sum((sums - value * counts) ** 2)) / counts.sum()
  np.testing.assert_allclose((value - low, high - value), 1.96 * error, rtol=0.06)
  assert bootstrap_ratio(sums, counts) == bootstrap_ratio(sums, counts)
  assert bootstrap_ratio(sums, counts, seed=1) != bootstrap_ratio(sums, counts)
  assert bootstrap_ratio(sums, counts, level=0.5).low > low
  # two documents: the drawn ratios are 1, 2 (twice) and 4
  assert bootstrap_ratio([2.0, 4.0], [2, 1]) == (2.0, 1.0, 4.0, 2)


def test_pairing_removes_what_documents_have_in_common():
  random = np.random.default_rng(1)
  counts, hardness = random.integers(50, 500, 40), random.normal(3, 1, 40)
  first = counts * (hardness + random.normal(0.02, 0.01, 40))
  second = counts * hardness
  found = paired_bootstrap(first, second, counts)
  assert 0.015 < found.low < found.difference < found.high < 0.025
  assert found.p_value == 1 / 10_001 and found.number == 40
  alone = bootstrap_ratio(first, counts)
  assert alone.high - alone.low > 50 * (found.high - found.low)
  assert paired_bootstrap(second, first, counts).difference == -found.difference
  assert paired_bootstrap(second, second, counts)[:4] == (0, 0, 0, 1)


def test_few_documents_have_no_small_p_value():
  """All differences have the same sign: of the 2^n signs two give a sum as large."""
  for n in (2, 3, 6):
    found = paired_bootstrap(np.full(n, 3.0), np.full(n, 1.0), np.ones(n))
    assert found.difference == 2 and found.p_value == 2 ** (1 - n)
  found = paired_bootstrap([5.0, 3.0, 2.0], [1.0, 2.0, 4.0], [1, 1, 1])  # 4 + 1 - 2
  assert found.p_value == 6 / 8
  # drawn signs agree with all of them
  random = np.random.default_rng(2)
  first, second, counts = random.normal(0.4, 1, 12), np.zeros(12), np.ones(12)
  every = paired_bootstrap(first, second, counts).p_value
  drawn = paired_bootstrap(first, second, counts, resamples=2**12 - 1).p_value
  assert 0.02 < every < 0.9 and drawn == pytest.approx(every, abs=0.03)


def test_large_bootstraps_are_drawn_in_blocks(monkeypatch):
  sums, counts = np.arange(1.0, 31), np.arange(2, 32)
  whole = bootstrap_ratio(sums, counts)
  monkeypatch.setattr(statistics, "BLOCK", 100)
  np.testing.assert_allclose(bootstrap_ratio(sums, counts), whole, rtol=0.01)
  assert {len(rows) for rows in statistics._draws(30, 10, 0)} == {3, 1}


def test_score_intervals():
  np.testing.assert_allclose(score_interval(0.5, 100)[1:3], (0.4038, 0.5962), atol=1e-4)
  assert score_interval(0.0, 10).low == 0 and score_interval(1.0, 10).high == 1
  assert score_interval(1.0, 10).low == pytest.approx(0.7225, abs=1e-3)
  assert score_interval(1.0, 10, level=0.5).low > 0.9


@pytest.mark.parametrize(
  "p_values, corrected",
  [
    ([], []),
    ([0.2], [0.2]),
    ([0.01, 0.02, 0.03, 0.04], [0.04, 0.06, 0.06, 0.06]),
    ([0.5, 0.001, 0.04], [0.5, 0.003, 0.08]),
    ([0.6, 0.6], [1.0, 1.0]),
  ],
)
def test_holm(p_values, corrected):
  assert holm(p_values) == pytest.approx(corrected)


@pytest.mark.parametrize(
  "function, arguments, words",
  [
    (t_interval, ([1.0],), r"values must hold at least 2 starts; got \[1.0\]"),
    (t_interval, ([1.0, math.nan],), "values must be finite; got nan"),
    (t_interval, ([1.0, 2.0], 95), "level=95 must be above 0 and below 1"),
    (paired_t, ([1.0, 2.0], [1.0]), "second must hold at least 2 starts"),
    (paired_t, ([1.0, 2.0], [1.0, 2.0, 3.0]), "first and second must be of equal length"),
    (bootstrap_ratio, ([1.0], [2]), "sums must hold at least 2 documents"),
    (bootstrap_ratio, ([1.0, 2.0], [2, 0]), "counts must be above 0; got 0"),
    (bootstrap_ratio, ([1.0, 2.0], [2, 1, 1]), "sums and counts must be of equal length; got 2"),
    (paired_bootstrap, ([1.0, 2.0], [math.inf, 1.0], [1, 1]), "second must be finite; got inf"),
    (paired_bootstrap, ([1.0, 2.0], [2.0, 1.0], [1, 1], 0), "level=0 must be above 0"),
    (score_interval, (1.5, 3), "share=1.5 must be from 0 to 1"),
    (score_interval, (0.5, 0), "count=0 must be at least 1"),
    (holm, ([0.5, math.nan],), "must be from 0 to 1"),
  ],
)
def test_what_has_no_interval_is_refused(function, arguments, words):
  with pytest.raises(ValueError, match=words):
    function(*arguments)


def test_examples():
  assert doctest.testmod(statistics) == (0, 4)
