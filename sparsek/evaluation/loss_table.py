"""The table of held-out losses of runs side by side, with intervals over documents."""

from collections.abc import Sequence

from sparsek.evaluation.loss_by_position import Evaluation
from sparsek.evaluation.statistics import Comparison, bootstrap_ratio, holm, paired_bootstrap
from sparsek.training.document_losses import DocumentLosses

ABOUT = (
  "intervals: 95 %, by the bootstrap over documents",
  "minus the first run: over the same documents; p of {} comparison{}, corrected (Holm)",
  "-: an interval needs at least two documents",
)


def format_table(
  labels: Sequence[str],
  evaluations: Sequence[Evaluation],
  bits: Sequence[float],
  trained_lengths: Sequence[int],
  settings: Sequence[dict[str, object]],
) -> str:
  """Returns a table of evaluations of the same batches, a column each.

  A * marks positions beyond a model's training length. Intervals are over documents, and each run
  is compared with the first one over the same documents.

  Args:
    labels: column headings.
    evaluations, bits: results of `evaluate` and `bits_per_byte`; the buckets must be the same.
    trained_lengths: tokens per row in training.
    settings: further rows on top, with the same keys for each column.
  """
  first = evaluations[0]
  overall = [evaluation.documents for evaluation in evaluations]
  far = [evaluation.far_repeats.documents for evaluation in evaluations]
  compared = _compared([overall, far])
  # The space after a number is where others have the *.
  rows = [["", *(f"{label} " for label in labels)]] + [
    [name, *(f"{setting[name]} " for setting in settings)] for name in settings[0]
  ]
  rows += [
    ["held-out loss (nats per token)", *(f"{evaluation.loss:.4f} " for evaluation in evaluations)],
    *_doubt(overall, compared[0]),
    ["bits per byte", *(f"{value:.4f} " for value in bits)],
  ]
  for same in zip(*(evaluation.buckets for evaluation in evaluations)):
    if same[0].num_targets:
      cells = (
        f"{bucket.loss:.4f}{'*' if bucket.first >= length else ' '}"
        for bucket, length in zip(same, trained_lengths)
      )
      rows.append(
        [
          f"  at positions {same[0].first} to {same[0].last} ({same[0].num_targets:,} tokens)",
          *cells,
        ]
      )
  repeats = first.far_repeats
  words = f"repeats over {repeats.distance:,} tokens back ({repeats.num_targets:,} tokens)"
  losses = [evaluation.far_repeats.loss for evaluation in evaluations]
  rows.append([words, *("- " if loss is None else f"{loss:.4f} " for loss in losses)])
  if repeats.num_targets:
    rows += _doubt(far, compared[1])
  beyond = any(cell.endswith("*") for row in rows for cell in row[1:])
  notes = ["* beyond the training length"] * beyond + [ABOUT[0]]
  if comparisons := sum(map(len, compared)):
    notes.append(ABOUT[1].format(comparisons, "s" * (comparisons > 1)))
  if any(cell == "- " for row in rows if "interval" in row[0] for cell in row):
    notes.append(ABOUT[2])
  return "\n".join([*_aligned(rows), *notes])


def _compared(groups: Sequence[Sequence[DocumentLosses]]) -> list[list[Comparison]]:
  """Returns each run minus the first one, in each group, with p values corrected over all.

  A group of fewer than two documents has no comparison.
  """
  compared = [
    [paired_bootstrap(other.loss_sum, first.loss_sum, first.num_targets) for other in others]
    if len(first.index) > 1
    else []
    for first, *others in groups
  ]
  corrected = iter(holm([pair.p_value for pairs in compared for pair in pairs]))
  return [[pair._replace(p_value=next(corrected)) for pair in pairs] for pairs in compared]


def _doubt(documents: Sequence[DocumentLosses], compared: Sequence[Comparison]) -> list[list[str]]:
  """Returns the rows of the intervals of a loss, and of the comparisons with the first run."""
  count = len(documents[0].index)
  name = f"  interval over {count:,} document{'s' * (count != 1)}"
  if count < 2:
    return [[name, *("- " for _ in documents)]]
  intervals = [bootstrap_ratio(of.loss_sum, of.num_targets) for of in documents]
  rows = [[name, *(f"{of.low:.4f} to {of.high:.4f} " for of in intervals)]]
  if compared:
    pairs = [f"{pair.low:+.4f} to {pair.high:+.4f} " for pair in compared]
    rows += [
      ["  minus the first run", "", *(f"{pair.difference:+.4f} " for pair in compared)],
      ["    interval over the same documents", "", *pairs],
      ["    p, corrected", "", *(f"{pair.p_value:.4f} " for pair in compared)],
    ]
  return rows


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

  def aligned(row: Sequence[str]) -> str:
    cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))
    return "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()

  return [*map(aligned, rows)]
