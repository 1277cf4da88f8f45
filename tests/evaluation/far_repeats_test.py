"""Far repeats against a count by hand, in packed rows and over several batches."""

import collections

import numpy as np
import pytest

from sparsek.config import FarRepeatRule
from sparsek.evaluation.far_repeats import FarRepeats, last_seen, ngram_hashes


def by_hand(rows, rule, distance):
  """Returns {document: [losses of its far repeats]} by dictionaries of tuples."""
  n = rule.far_repeats_ngram
  counts, far = collections.Counter(), []
  for tokens, documents, losses, counted in rows:
    seen, start = {}, 0
    for t in range(len(tokens)):
      if t == 0 or documents[t] != documents[t - 1]:
        seen, start = {}, t
      if documents[t] < 0 or t - n + 1 < start:
        continue
      ngram = tuple(tokens[t - n + 1 : t + 1])
      counts[ngram] += 1
      if ngram in seen and t - seen[ngram] > distance and t and counted[t - 1]:
        far.append((documents[t], losses[t - 1], ngram))
      seen[ngram] = t
  found = collections.defaultdict(list)
  for document, loss, ngram in far:
    if counts[ngram] <= rule.far_repeats_most:
      found[int(document)].append(loss)
  return found


def example(seed, rows=6, length=90):
  random = np.random.default_rng(seed)
  # Each row has the end of a document and the beginning of the next.
  is_next = random.random((rows, 1)) < np.linspace(0, 1, length + 1)
  documents = is_next + np.arange(rows)[:, None]
  documents[-1, -20:] = -1
  return (
    random.integers(0, 3, (rows, length + 1)).astype(np.int32),
    documents.astype(np.int32),
    random.random((rows, length)).astype(np.float32),
    random.random((rows, length)) < 0.8,
  )


@pytest.mark.parametrize("ngram, most", [(1, 1000), (3, 40), (4, 13), (5, 4), (5, 1)])
@pytest.mark.parametrize("distance", [None, 0, 7])
def test_far_repeats_agree_with_a_count_by_hand(ngram, most, distance):
  rule = FarRepeatRule(distance, ngram, most)
  batches = [example(0), example(1)]
  whole, by_row = FarRepeats(rule, 90), FarRepeats(rule, 90)
  for arrays in batches:
    whole.add(*arrays)
    for row in zip(*arrays):
      by_row.add(*(array[None] for array in row))
  result = whole.result()
  expected = by_hand([row for arrays in batches for row in zip(*arrays)], rule, result.distance)
  assert result.distance == (22 if distance is None else distance)
  assert result.documents.index == tuple(sorted(expected))
  assert result.documents.num_targets == tuple(len(expected[i]) for i in sorted(expected))
  np.testing.assert_allclose(
    result.documents.loss_sum, [sum(expected[i]) for i in sorted(expected)], rtol=1e-6
  )
  losses = [loss for of in expected.values() for loss in of]
  assert result.num_targets == len(losses) and bool(losses) == (most > 1)
  assert result.loss == (pytest.approx(np.mean(losses)) if losses else None)
  assert by_row.result() == result  # rows do not see each other, except in the counts


def test_a_repeat_that_a_reader_would_call_far():
  tokens = np.arange(100)[None] + 7
  tokens[0, 90:94] = tokens[0, 10:14]  # a 4-gram, 80 tokens after its first place
  documents, losses = np.zeros((1, 100), int), np.arange(99.0)[None]
  for distance, targets in ((79, 1), (80, 0)):
    far = FarRepeats(FarRepeatRule(distance), 99)
    far.add(tokens, documents, losses, np.ones((1, 99), bool))
    result = far.result()
    assert (result.num_targets, result.loss) == (targets, 92.0 if targets else None)


def test_rows_shorter_than_an_ngram_have_none():
  far = FarRepeats(FarRepeatRule(0, 12), 4)
  far.add(np.zeros((2, 5), int), np.zeros((2, 5), int), np.zeros((2, 4)), np.ones((2, 4), bool))
  assert far.result().num_targets == 0 and far.result().loss is None


def test_hashes_tell_ngrams_apart():
  random = np.random.default_rng(0)
  tokens = random.integers(0, 50_000, (1, 200_000))
  ngrams = np.lib.stride_tricks.sliding_window_view(tokens[0], 2)
  assert len(np.unique(ngram_hashes(tokens, 2))) == len(np.unique(ngrams, axis=0))
  assert last_seen(np.array([5, 5, 9, 5]), np.array([0, 2, 3, 9])).tolist() == [-1, 2, -1, 7]


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"far_repeats": -1}, "far_repeats=-1 must be at least 0"),
    ({"far_repeats_ngram": 0}, "far_repeats_ngram=0 must be at least 1"),
    ({"far_repeats_most": 1.5}, "far_repeats_most=1.5 must be an integer"),
  ],
)
def test_rules_that_cannot_be_are_refused(fields, words):
  with pytest.raises(ValueError, match=words):
    FarRepeatRule(**fields)
