"""Batches of token files: packed rows, a resumable training iterator, fixed held-out batches.

A batch is a dict of arrays of shape [rows, seq_len + 1]:

  "tokens"       int32
  "segment_ids"  int32, the number of the document in its row, from 1; 0 is padding
  "counted"      bool, only where documents have marked answers
  "documents"    int32, only held out: the number of the document in the split; -1 is padding

The model reads tokens[:, :-1]; the target of position t is tokens[:, t + 1]. The loss counts it
where segment_ids[:, t] == segment_ids[:, t + 1] != 0 and, if there is "counted", where
counted[:, t + 1] is True.
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
