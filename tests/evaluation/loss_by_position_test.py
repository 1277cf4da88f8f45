import collections
import math
import types

import jax
import numpy as np
import pytest

from sparsek.config import TransformerConfig
from sparsek.evaluation.loss_by_position import bits_per_byte, bucket_edges, evaluate
from sparsek.model.transformer import Transformer, init_params
from sparsek.training.loss import cut_targets
from sparsek.training.objective import token_losses

CONFIG = TransformerConfig(
  vocab_size=13,
  num_layers=1,
  embed_dim=8,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=8,
  k=3,
  window=2,
  implementation="reference",
)
ROWS, LENGTH = jax.device_count(), 130


@pytest.fixture(scope="module")
def params():
  # Predictions are far from uniform, so that a loss at a wrong position is noticed.
  return jax.tree.map(lambda x: 3 * x, init_params(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def batches():
  random = np.random.default_rng(0)

  def batch(*lengths):
    ids = np.tile(np.repeat(np.arange(len(lengths)), lengths), (ROWS, 1)).astype(np.int32)
    return {
      "tokens": random.integers(0, 13, (ROWS, LENGTH + 1), dtype=np.int32),
      "segment_ids": ids,
      # The last documents of a row go on in the first ones of the next.
      "documents": ids + 2 * np.arange(ROWS, dtype=np.int32)[:, None],
    }

  packed, padded = batch(0, 100, 31), batch(0, 40, 30, 61)
  padded["documents"][padded["segment_ids"] == 3] = -1
  padded["segment_ids"][padded["segment_ids"] == 3] = 0
  return [packed, padded]


@pytest.mark.parametrize(
  "seq_len, extra, edges",
  [
    (1, (), (0, 1)),
    (64, (), (0, 64)),
    (65, (), (0, 64, 65)),
    (512, (), (0, 64, 128, 256, 512)),
    (1000, (384,), (0, 64, 128, 256, 384, 512, 1000)),
    (256, (256, 4096), (0, 64, 128, 256)),
  ],
)
def test_bucket_edges(seq_len, extra, edges):
  assert bucket_edges(seq_len, extra) == edges


def test_loss_by_position_agrees_with_a_count_by_hand(params, batches):
  edges = (0, 20, 64, 99, LENGTH)
  total, count = np.zeros(4), np.zeros(4, int)
  of_documents = collections.defaultdict(list)
  forward = jax.jit(Transformer(CONFIG).apply)
  for batch in batches:
    tokens, ids = batch["tokens"], batch["segment_ids"]
    log_probs = np.asarray(
      jax.nn.log_softmax(forward({"params": params}, tokens[:, :-1], segment_ids=ids[:, :-1])),
      np.float64,
    )
    for row in range(ROWS):
      position = 0
      for t in range(LENGTH):
        position = position + 1 if t and ids[row, t] == ids[row, t - 1] else 0
        if ids[row, t] == ids[row, t + 1] != 0:
          bucket = np.searchsorted(edges, position, side="right") - 1
          loss = -log_probs[row, t, tokens[row, t + 1]]
          total[bucket] += loss
          count[bucket] += 1
          of_documents[batch["documents"][row, t + 1]].append(loss)
  assert count[3] == 0  # the longest document has 100 tokens, the last of which predicts nothing
  result = evaluate(CONFIG, params, batches, edges, loss_chunk=48)
  assert [bucket.num_targets for bucket in result.buckets] == count.tolist()
  assert [(bucket.first, bucket.last) for bucket in result.buckets] == [
    (0, 19),
    (20, 63),
    (64, 98),
    (99, LENGTH - 1),
  ]
  np.testing.assert_allclose(
    [bucket.loss for bucket in result.buckets[:3]], total[:3] / count[:3], rtol=1e-5
  )
  assert result.buckets[3].loss is None
  assert result.num_targets == count.sum()
  assert result.loss == pytest.approx(total.sum() / count.sum(), rel=1e-5)
  documents = result.documents
  assert documents.index == tuple(sorted(of_documents)) and len(documents.index) == 2 * ROWS
  assert documents.num_targets == tuple(len(of_documents[i]) for i in documents.index)
  np.testing.assert_allclose(
    documents.loss_sum, [sum(of_documents[i]) for i in documents.index], rtol=1e-5
  )


def test_logits_never_exist_at_once(params, batches):
  batch = batches[0]
  losses = lambda batch: token_losses(CONFIG, params, cut_targets(batch), 48)
  jaxpr = str(jax.make_jaxpr(losses)(batch))
  assert "f32[48,13]" in jaxpr
  assert (
    f"[{ROWS * LENGTH},13]" not in jaxpr
    and f"[{ROWS},{LENGTH},13]" not in jaxpr
    and f"[{ROWS * LENGTH},1,13]" not in jaxpr
  )


def test_batches_that_do_not_fit_are_refused(params, batches):
  with pytest.raises(ValueError, match="must reach the rows' length 130"):
    evaluate(CONFIG, params, batches, (0, 64))
  tokens = np.where(np.arange(LENGTH + 1) == 3, CONFIG.vocab_size, batches[0]["tokens"])
  with pytest.raises(ValueError, match=rf"tokens\[0, 3\]={CONFIG.vocab_size} must be an id of the"):
    evaluate(CONFIG, params, [batches[0] | {"tokens": tokens}], (0, LENGTH))
  with pytest.raises(ValueError, match="no target"):
    evaluate(CONFIG, params, [], (0, LENGTH))


def test_bits_per_byte_counts_the_bytes_of_the_text():
  assert bits_per_byte(
    3 * math.log(2), types.SimpleNamespace(num_counted=50, num_bytes=100)
  ) == pytest.approx(1.5)
