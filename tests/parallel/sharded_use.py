"""Evaluation and generation over many devices, and the same on one.

`python -m tests.parallel.sharded_use FILE` computes them on 8 simulated devices and writes JSON.
"""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
from jax.sharding import Mesh

from sparsek.config import TransformerConfig
from sparsek.data.tokenizer import ByteTokenizer
from sparsek.evaluation import layer_reach, loss_by_position, tasks
from sparsek.generation.session import Session
from sparsek.model.transformer import Params, init_params
from sparsek.parallel.mesh import make_mesh

CONFIG = TransformerConfig(
  vocab_size=257,
  num_layers=2,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=24,
  k=6,
  window=12,
  attention=("sparsek", "full"),
  scan_layers=True,
  implementation="xla",
)
DENSE = dataclasses.replace(CONFIG, attention="full", positions="learned", max_positions=64)
LENGTH = 64
EDGES = (0, 20, 40, LENGTH)


def model(config: TransformerConfig) -> Params:
  """Returns parameters under which tokens have very different logits."""
  return jax.tree.map(lambda x: 4 * x, init_params(config, jax.random.key(0)))


def batch() -> dict[str, np.ndarray]:
  """Returns packed and padded rows of LENGTH + 1 tokens."""
  lengths = [[65], [1, 2, 15, 1, 29, 9, 8], [5, 53, 7], [16, 16, 4, 29]]
  ids = np.stack([np.repeat(np.arange(1, len(row) + 1), row) for row in lengths])
  ids[3][-29:] = 0
  tokens = np.random.default_rng(0).integers(0, 257, ids.shape)
  return {"tokens": tokens.astype(np.int32), "segment_ids": ids.astype(np.int32)}


def evaluations(mesh: Mesh) -> dict[str, list]:
  """Returns what is evaluated on a mesh."""
  params = model(CONFIG)
  loss = loss_by_position.evaluate(CONFIG, params, [batch()], EDGES, loss_chunk=24, mesh=mesh)
  tokens, positions = batch()["tokens"][:, :-1], np.array([[1, 17, 64, 33]] * 4, np.int32)
  answers = tasks.evaluate(CONFIG, params, ByteTokenizer(), "copy", 200, 3, 4, mesh=mesh)
  dense, short = layer_reach.losses(DENSE, model(DENSE), [batch()], "sliding_window:w3", mesh=mesh)
  return {
    "losses": [loss.loss, *(bucket.loss for bucket in loss.buckets), dense, *short],
    "targets": [bucket.num_targets for bucket in loss.buckets],
    "predicted": np.asarray(tasks.predicted(CONFIG, mesh, params, tokens, positions)).tolist(),
    "tasks": list(answers),
  }


def texts(config: TransformerConfig, mesh: Mesh | None, rows: int) -> list[list[int | None]]:
  """Returns the tokens of two turns, the first of them greedy."""
  session = Session(config, model(config), rows, mesh)
  prompts = [batch()["tokens"][i, : 50 - 9 * i].tolist() for i in range(rows)]
  tokens = list(session.generate(prompts, max_new_tokens=5, temperature=0.0))
  keys = jax.random.split(jax.random.key(1), rows)
  return tokens + list(session.generate([[7]] * rows, max_new_tokens=4, keys=keys, ahead=2))


def main() -> None:
  jax.config.update("jax_num_cpu_devices", 8)
  one = make_mesh(devices=jax.devices()[:1])
  output = {
    "evaluations": [evaluations(one), evaluations(make_mesh(fsdp=2, context=2))],
    "texts": [
      texts(CONFIG, None, 4),
      texts(CONFIG, make_mesh(fsdp=2, devices=jax.devices()[:4]), 4),
    ],
    "text": [texts(CONFIG, None, 1), texts(CONFIG, make_mesh(fsdp=4), 1)],
  }
  pathlib.Path(sys.argv[1]).write_text(json.dumps(output))


if __name__ == "__main__":
  main()
