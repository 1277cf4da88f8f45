"""Evaluation and generation over many devices, and the same on one.

`python -m tests.parallel.sharded_use FILE` computes them on 8 simulated devices and writes JSON.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sparsek.config import FarRepeatRule, TransformerConfig
from sparsek.data.tokenizer import ByteTokenizer
from sparsek.evaluation import layer_reach, loss_by_position, tasks
from sparsek.evaluation.likelihoods import log_likelihoods
from sparsek.generation.cached_attention import LayerCache, selects
from sparsek.generation.session import Session
from sparsek.model.transformer import Params, init_params
from sparsek.parallel.mesh import make_mesh

CONFIG = TransformerConfig(
  vocab_size=257,
  num_layers=4,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=24,
  k=6,
  window=12,
  attention=("sparsek", "full", "sliding_window", "sparsek:h1:k0:w30"),
  scan_layers=True,
  scorer="conv",
  scorer_init_sink=0.5,
  gate="value",
  implementation="xla",
)
WINDOW = dataclasses.replace(CONFIG, attention="sliding_window", num_layers=1)
DENSE = dataclasses.replace(CONFIG, attention="full", num_layers=2)
LENGTH = 200
ROWS = 4


def model(config: TransformerConfig) -> Params:
  """Returns parameters under which tokens have very different logits."""
  return jax.tree.map(lambda x: 2 * x, init_params(config, jax.random.key(0)))


def batch() -> dict[str, np.ndarray]:
  """Returns packed and padded rows of LENGTH + 1 tokens."""
  lengths = [[201], [1, 2, 40, 1, 90, 17, 50], [5, 150, 46], [20, 50, 30, 101]]
  ids = np.stack([np.repeat(np.arange(1, len(row) + 1), row) for row in lengths])
  ids[3][-101:] = 0
  documents = np.where(ids == 0, -1, ids + np.arange(ROWS)[:, None])
  tokens = np.random.default_rng(0).integers(0, 257, ids.shape)
  arrays = {"tokens": tokens, "segment_ids": ids, "documents": documents}
  return {name: array.astype(np.int32) for name, array in arrays.items()}


def evaluations(mesh: Mesh) -> dict[str, list]:
  """Returns what is evaluated on a mesh."""
  params = jax.device_put(model(WINDOW), jax.devices()[0])  # of one device, to be spread
  edges, predicted = (0, 20, 40, LENGTH), tasks.predicted
  rule = FarRepeatRule(20, 1, 1000)
  loss = loss_by_position.evaluate(WINDOW, params, [batch()], edges, rule, loss_chunk=24, mesh=mesh)
  documents = [loss.documents, loss.far_repeats.documents]
  answers = []

  def note(*args):
    answers.append(np.asarray(predicted(*args)))
    return answers[-1]

  tasks.predicted = note
  counts = tasks.evaluate(WINDOW, params, ByteTokenizer(), "copy", LENGTH, 3, ROWS, mesh=mesh)
  counts = [prompt for prompts in counts for prompt in prompts]
  tasks.predicted = predicted
  changes = [
    *layer_reach.of_layers(DENSE, "sliding_window:w3"),
    *layer_reach.of_heads(DENSE, "attention_sinks:k1:w3", LENGTH),
  ]
  dense, short = layer_reach.losses(DENSE, model(DENSE), [batch()], changes, mesh=mesh)
  return {
    "losses": [loss.loss, *(bucket.loss for bucket in loss.buckets), dense, *short],
    "targets": [bucket.num_targets for bucket in loss.buckets],
    "documents": [[of.index, of.num_targets] for of in documents],
    "losses of documents": [*documents[0].loss_sum, *documents[1].loss_sum],
    "answers": [*map(list, counts), *(x.tolist() for x in answers)],
  }


def generated(mesh: Mesh | None) -> tuple[list, Any]:
  """Returns the tokens of two greedy turns, and the cache after them without rounding errors."""
  session = Session(CONFIG, model(CONFIG), ROWS, mesh)
  prompts = [batch()["tokens"][i, : 50 - 14 * i].tolist() for i in range(ROWS)]
  turns = [
    list(session.generate(prompt, max_new_tokens=9, temperature=0.0))
    for prompt in (prompts, [[7, 8]] * ROWS)
  ]
  return turns, list(map(without_rest, jax.device_get(session.cache.layers)))


def without_rest(layer: LayerCache) -> LayerCache:
  """Returns a layer of a cache without the rounding errors in the state of its scorer."""
  if not selects(layer):
    return layer
  return layer._replace(scorer=layer.scorer._replace(mean_rest=(), deviation_rest=()))


def likelihoods(mesh: Mesh | None) -> list[float]:
  """Returns log-likelihoods of continuations of contexts of different lengths."""
  rows = batch()["tokens"]
  contexts = [rows[i, : 50 - 14 * i].tolist() for i in range(3)]
  pairs = [(context, rows[3, 9 * i : 9 * i + 5].tolist()) for i in range(2) for context in contexts]
  config = dataclasses.replace(DENSE, num_layers=1)
  values = dict(log_likelihoods(config, model(config), pairs, 4, mesh))
  return [values[i][0] for i in range(len(pairs))]


def difference(got: Any, want: Any) -> float:
  """Returns the largest difference of two trees of arrays, over the largest number of an array;
  infinite numbers must be equal.
  """

  def largest(a, b):
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite]):
      return float("inf")
    top = np.max(np.abs(b[finite]), initial=1)
    return float(np.max(np.abs(a[finite] - b[finite]), initial=0) / top)

  return max(jax.tree.leaves(jax.tree.map(largest, got, want)))


def main() -> None:
  jax.config.update("jax_num_cpu_devices", 8)
  one, many = make_mesh(devices=jax.devices()[:1]), make_mesh(fsdp=2, context=2)
  turns, caches = zip(generated(None), generated(make_mesh(2, 2, jax.devices()[:4])))
  output = {
    "evaluations": [evaluations(one), evaluations(many)],
    "turns": turns,
    "cache": difference(*caches),
    "likelihoods": [likelihoods(None), likelihoods(make_mesh(2, 2, jax.devices()[:4]))],
  }
  pathlib.Path(sys.argv[1]).write_text(json.dumps(output))


if __name__ == "__main__":
  main()
