"""The table of held-out losses of runs side by side, with intervals over documents."""

import math
from collections.abc import Callable, Sequence

from sparsek.evaluation.loss_by_position import Evaluation
from sparsek.evaluation.statistics import Comparison, bootstrap_ratio, holm, paired_bootstrap
from sparsek.training.document_losses import DocumentLosses

ABOUT = (
  "intervals: 95 %, by the bootstrap over documents",
  "minus the first run: over the same documents; p of {} comparison{}, corrected (Holm)",
  "-: an interval needs at least two documents, and losses that are finite",
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
  if comparisons := sum(pair is not None for pairs in compared for pair in pairs):
    notes.append(ABOUT[1].format(comparisons, "s" * (comparisons > 1)))
  if any(cell == "- " for row in rows if "interval" in row[0] for cell in row):
    notes.append(ABOUT[2])
  return "\n".join([*_aligned(rows), *notes])


def _has_interval(documents: DocumentLosses) -> bool:
  return len(documents.index) > 1 and all(map(math.isfinite, documents.loss_sum))


def _compared(groups: Sequence[Sequence[DocumentLosses]]) -> list[list[Comparison | None]]:
  """Returns each run minus the first one, in each group, with p values corrected over all.

  A loss without an interval has no comparison, which is None.
  """
  compared = [
    [
      paired_bootstrap(other.loss_sum, first.loss_sum, first.num_targets)
      if _has_interval(first) and _has_interval(other)
      else None
      for other in others
    ]
    for first, *others in groups
  ]
  corrected = iter(holm([pair.p_value for pairs in compared for pair in pairs if pair]))
  return [[pair and pair._replace(p_value=next(corrected)) for pair in pairs] for pairs in compared]


def _doubt(
  documents: Sequence[DocumentLosses], compared: Sequence[Comparison | None]
) -> list[list[str]]:
  """Returns the rows of the intervals of a loss, and of the comparisons with the first run."""
  count = len(documents[0].index)
  cells = [f"  interval over {count:,} document{'s' * (count != 1)}"]
  for of in documents:
    interval = bootstrap_ratio(of.loss_sum, of.num_targets) if _has_interval(of) else None
    cells.append(f"{interval.low:.4f} to {interval.high:.4f} " if interval else "- ")
  if not any(compared):
    return [cells]

  def row(name: str, words: Callable[[Comparison], str]) -> list[str]:
    return [name, "", *(f"{words(pair) if pair else '-'} " for pair in compared)]

  return [
    cells,
    row("  minus the first run", lambda pair: f"{pair.difference:+.4f}"),
    row(
      "    interval over the same documents", lambda pair: f"{pair.low:+.4f} to {pair.high:+.4f}"
    ),
    row("    p, corrected", lambda pair: f"{pair.p_value:.4f}"),
  ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

  def aligned(row: Sequence[str]) -> str:
    cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))
    return "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()

  return [*map(aligned, rows)]
