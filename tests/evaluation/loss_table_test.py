"""The table of losses side by side: what is beyond the training length, intervals, comparisons."""

import dataclasses
import math

from sparsek.evaluation.far_repeats import FarRepeatLosses
from sparsek.evaluation.loss_by_position import Bucket, Evaluation
from sparsek.evaluation.loss_table import format_table
from sparsek.training.document_losses import DocumentLosses

DOCUMENTS = DocumentLosses((0, 3, 4), (10.0, 15.0, 5.0), (4, 6, 2))
ONE = DocumentLosses((3,), (7.5,), (3,))
FIRST = Evaluation(
  2.5,
  12,
  (Bucket(0, 63, 2.75, 10), Bucket(64, 127, 1.25, 2), Bucket(128, 255, None, 0)),
  DOCUMENTS,
  FarRepeatLosses(1024, 4, 8, 2.5, 3, ONE),
)
SECOND = dataclasses.replace(
  FIRST,
  loss=3.5,
  buckets=(Bucket(0, 63, 3.75, 10), Bucket(64, 127, 3.25, 2), Bucket(128, 255, None, 0)),
  documents=DocumentLosses((0, 3, 4), (14.0, 21.0, 7.0), (4, 6, 2)),
)


def words(line):
  return [part.strip() for part in line.split("  ") if part.strip()]


def test_runs_side_by_side():
  lines = format_table(["a", "b"], [FIRST, SECOND], [1.0, 2.0], [64, 100], [{"k": 3}, {"k": 4}])
  assert [words(line) for line in lines.splitlines()] == [
    ["a", "b"],
    ["k", "3", "4"],
    ["held-out loss (nats per token)", "2.5000", "3.5000"],
    ["interval over 3 documents", "2.5000 to 2.5000", "3.5000 to 3.5000"],
    ["minus the first run", "+1.0000"],
    ["interval over the same documents", "+1.0000 to +1.0000"],
    ["p, corrected", "0.2500"],
    ["bits per byte", "1.0000", "2.0000"],
    ["at positions 0 to 63 (10 tokens)", "2.7500", "3.7500"],
    ["at positions 64 to 127 (2 tokens)", "1.2500*", "3.2500"],
    ["repeats over 1,024 tokens back (3 tokens)", "2.5000", "2.5000"],
    ["interval over 1 document", "-", "-"],
    ["* beyond the training length"],
    ["intervals: 95 %, by the bootstrap over documents"],
    ["minus the first run: over the same documents; p of 1 comparison, corrected (Holm)"],
    ["-: an interval needs at least two documents, and losses that are finite"],
  ]


def test_p_values_are_corrected_for_all_comparisons():
  eight = DocumentLosses(tuple(range(8)), (4.0,) * 8, (2,) * 8)
  worse = dataclasses.replace(eight, loss_sum=tuple(4.0 + i for i in range(1, 9)))
  far = dataclasses.replace(FIRST.far_repeats, documents=eight)
  runs = [
    dataclasses.replace(FIRST, documents=documents, far_repeats=far)
    for documents in (eight, worse, worse)
  ]
  text = format_table(["a", "b", "c"], runs, [1.0] * 3, [512] * 3, [{"k": 3}] * 3)
  p_values = [words(line)[1:] for line in text.splitlines() if "p, corrected" in line]
  # 2 of 2^8 signs are as far, times 4 and then 3 (but no less), for the two that differ.
  assert p_values == [["0.0312", "0.0312"], ["1.0000", "1.0000"]]
  assert "p of 4 comparisons" in text and "beyond" not in text and "-:" not in text


def test_a_run_alone_without_far_repeats():
  none = FarRepeatLosses(64, 4, 8, None, 0, DocumentLosses((), (), ()))
  text = format_table(
    ["a"], [dataclasses.replace(FIRST, far_repeats=none)], [1.0], [512], [{"k": 3}]
  )
  assert "minus" not in text and "needs at least two" not in text
  assert ["repeats over 64 tokens back (0 tokens)", "-"] in [*map(words, text.splitlines())]


def test_a_loss_that_is_not_finite_has_no_interval():
  sums = (14.0, math.nan, 7.0)
  nan = dataclasses.replace(
    SECOND, loss=math.nan, documents=dataclasses.replace(DOCUMENTS, loss_sum=sums)
  )
  lines = format_table(
    ["a", "b", "c"], [FIRST, nan, SECOND], [1.0] * 3, [512] * 3, [{"k": 3}] * 3
  ).splitlines()
  assert ["interval over 3 documents", "2.5000 to 2.5000", "-", "3.5000 to 3.5000"] in [
    words(line) for line in lines
  ]
  assert ["minus the first run", "-", "+1.0000"] in [*map(words, lines)]
  assert any("p of 1 comparison," in line for line in lines)
