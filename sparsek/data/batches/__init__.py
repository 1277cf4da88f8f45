"""From token files to batches: packed rows, a resumable iterator over training batches, and fixed
held-out batches.

A batch is a dict of int32 arrays {"tokens": [rows, seq_len + 1], "segment_ids": [rows, seq_len +
1]}. Segment ids count the documents of a row from 1; 0 is padding. The model reads tokens[:, :-1];
the target of position t is tokens[:, t + 1], and the loss counts it where segment_ids[:, t] ==
segment_ids[:, t + 1] != 0. Where documents have marked answers there is a bool array "counted" of
the same shape, and the loss counts a target only where counted[:, t + 1] is True too.
"""

from sparsek.data.batches.held_out import EvalBatches, eval_batches
from sparsek.data.batches.opening import open_data
from sparsek.data.batches.packing import Batch, PackedRows
from sparsek.data.batches.training import TrainIterator, make_train_iterator

__all__ = [
  "Batch",
  "EvalBatches",
  "PackedRows",
  "TrainIterator",
  "eval_batches",
  "make_train_iterator",
  "open_data",
]
