"""Training steps and runs over meshes of 8 simulated devices, beside one device.

`python -m tests.parallel.sharded_steps FOLDER` computes them, and writes FOLDER/result.json.
"""

import dataclasses
import functools
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsek.config import DataConfig, OptimizerConfig, TrainConfig, TransformerConfig
from sparsek.data.batches import open_data
from sparsek.data.corpus import Document
from sparsek.data.token_files import write_token_files
from sparsek.data.tokenizer import ByteTokenizer
from sparsek.huggingface import pretrained
from sparsek.model import lora
from sparsek.model.transformer import init_params
from sparsek.parallel.mesh import CONTEXT, DATA, FSDP, first_row, make_mesh, put_batch
from sparsek.parallel.sharding import placements
from sparsek.runs.metrics import read_metrics
from sparsek.training import loop
from sparsek.training.step import (
  TrainState,
  make_diagnose,
  make_eval_step,
  make_train_step,
  state_placements,
)
from tests.helpers import quick_jit

BATCH, LENGTH, VOCABULARY = 16, 32, 23
FIELDS: dict[str, Any] = dict(
  vocab_size=VOCABULARY,
  num_layers=2,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=24,
  k=5,
  window=6,
)
CONFIGS = {
  "scanned": TransformerConfig(
    **FIELDS,
    attention="sparsek",
    scan_layers=True,
    remat="attention",
    scorer_noise=0.3,
    scorer_loss_queries=9,
  ),
  "heads": TransformerConfig(
    **FIELDS, attention=("sparsek:h0:k0:w9", "sparsek:h1:k2:w11"), scorer_loss_queries=9
  ),
  "adapted": TransformerConfig(
    **FIELDS,
    attention=("full", "sliding_window"),
    tie_embeddings=False,
    positions="learned",
    max_positions=LENGTH,
    remat="none",
    lora_rank=2,
  ),
}
TEACHER = TransformerConfig(**FIELDS, attention="full", qk_norm=True)
MESHES = [(1, 8, 1), (1, 1, 8), (2, 2, 2)]
CASES = [("scanned", mesh) for mesh in MESHES] + [("adapted", (2, 2, 2)), ("heads", (2, 2, 2))]
GRADIENTS = optax.GradientTransformation(
  lambda params: jax.tree.map(jnp.zeros_like, lora.split(params)[0]),
  lambda gradients, state, params: (jax.tree.map(jnp.zeros_like, gradients), gradients),
)


def example_batch() -> dict[str, np.ndarray]:
  """Returns rows with documents of very different lengths, and padding."""
  rng = np.random.default_rng(0)
  segment_ids = np.ones((BATCH, LENGTH + 1), np.int32)
  for i in range(1, BATCH):
    segment_ids[i] = np.sort(rng.integers(1, 1 + i % 5 + 1, LENGTH + 1))
  segment_ids[3, 7:] = 0
  segment_ids[4, 30:] = 0
  tokens = rng.integers(0, VOCABULARY, (BATCH, LENGTH + 1)).astype(np.int32)
  return {"tokens": tokens, "segment_ids": segment_ids, "documents": segment_ids}


@functools.cache
def random_params(config: TransformerConfig, seed: int) -> Any:
  """Returns parameters of which none is 0, as new adapters are, on the host."""
  return jax.device_get(quick_jit(functools.partial(_random_params, config, seed))())


def _random_params(config: TransformerConfig, seed: int) -> Any:
  params = init_params(config, jax.random.key(seed))
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  noise = [0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
  return jax.tree.map(jnp.add, params, jax.tree.unflatten(structure, noise))


def step(name: str, mesh: jax.sharding.Mesh, whole: bool = True) -> dict[str, Any]:
  """Returns the results of a training step, and with `whole` of an evaluation and the selection's
  figures.
  """
  config, distilled = CONFIGS[name], name == "adapted"
  train = TrainConfig(
    workdir="",
    data=DataConfig(batch_size=BATCH, seq_len=LENGTH),
    grad_accumulation=2 if name == "scanned" else 1,
    loss_chunk=7,
    gate_anneal=5.0 if name == "scanned" else 0.0,
    distill=0.3 if distilled else 0.0,
    distill_from="a run" if distilled else None,
  )
  state = TrainState(
    jnp.int32(2), random_params(config, 0), GRADIENTS.init(random_params(config, 0)), jnp.int32(5)
  )
  state = jax.device_put(state, state_placements(mesh, state))
  batch, teacher = put_batch(mesh, example_batch()), TEACHER if distilled else None
  arguments = [random_params(TEACHER, 7)] if distilled else []
  others = {}
  if whole:
    others = {
      "evaluation": make_eval_step(config, 7, mesh)(state.params, batch),
      "statistics": make_diagnose(config, mesh)(state.params, first_row(mesh, batch)),
    }
  placed = jax.tree.map(lambda x: x.sharding, state)
  new, metrics = make_train_step(config, train, GRADIENTS, mesh, teacher)(state, batch, *arguments)
  assert jax.tree.map(lambda x: x.sharding, new) == placed
  bytes_of = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
  return {
    "gradients": jax.device_get(new.opt_state),
    "metrics": jax.device_get(metrics),
    **jax.device_get(others),
    "bytes": bytes_of(new.opt_state),
  }


def largest_difference(got: Any, want: Any) -> float:
  """Returns the largest norm of a difference of two arrays over the norm of the second."""
  norm = lambda x: float(np.linalg.norm(np.ravel(x).astype(np.float64)))
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  return max((norm(a - b) / max(norm(b), 1e-30) for a, b in pairs), default=0.0)


def compare_steps() -> list[dict[str, Any]]:
  """Returns the differences of each case, and its bytes of a device over those of one device."""
  alone = {name: step(name, make_mesh(devices=jax.devices()[:1])) for name in CONFIGS}
  results = []
  for name, (data, fsdp, context) in CASES:
    mesh = make_mesh(fsdp, context)
    assert mesh.shape == {DATA: data, FSDP: fsdp, CONTEXT: context}
    got, want = step(name, mesh, whole=mesh.size == 8 == 2 * data * fsdp), alone[name]
    differences = {
      kind: largest_difference(got[kind], want[kind]) for kind in got if kind != "bytes"
    }
    results.append(
      {
        "case": [name, [data, fsdp, context]],
        "differences": differences,
        "bytes": got["bytes"] / want["bytes"],
      }
    )
  return results


def run_on_meshes(
  folder: pathlib.Path, name: str, meshes: list[tuple[int, int, int]]
) -> list[float]:
  """Trains on each mesh, resuming from the one before, 3 steps in all; returns the losses."""
  config = dataclasses.replace(CONFIGS["scanned"], vocab_size=257, attention="full", remat="none")
  dataset = open_data(str(folder / "tokens"))
  for i, (_, fsdp, context) in enumerate(meshes):
    train = TrainConfig(
      workdir=str(folder / name),
      data=DataConfig(data=dataset.folder, batch_size=8, seq_len=LENGTH),
      optimizer=OptimizerConfig(num_steps=3, warmup_steps=1, learning_rate=0.01),
      fsdp=fsdp,
      context=context,
      stop_at=3 + i + 1 - len(meshes),
      log_every=1,
      eval_every=0,
      checkpoint_every=100,
    )
    assert loop.train(config, train, dataset).step == train.stop_at
  return [
    record["loss"]
    for record in read_metrics(str(folder / name / "metrics.jsonl"))
    if "loss" in record
  ]


def imported_is_equal(folder: pathlib.Path) -> bool:
  """Compares a model that is read onto a mesh, from a folder written from it, with itself."""
  mesh, config = make_mesh(fsdp=4), dataclasses.replace(CONFIGS["scanned"], attention="full")
  params = jax.device_get(random_params(config, 3))
  placed = jax.device_put(params, placements(mesh, params))
  pretrained.save(str(folder / "exported"), config, placed)
  _, back = pretrained.load(str(folder / "exported"), config=config, mesh=mesh)
  equal = jax.tree.map(np.array_equal, jax.device_get(back), params)
  parts = jax.tree.map(lambda x, y: x.sharding == y.sharding, back, placed)
  return all(jax.tree.leaves((equal, parts)))


def write_tokens(folder: pathlib.Path) -> None:
  """Writes token files of random letters."""
  rng = np.random.default_rng(0)
  texts = ["".join(rng.choice(list("abcd "), 60)) for _ in range(60)]
  documents = [Document(str(i), text, i >= 56) for i, text in enumerate(texts)]
  write_token_files(str(folder / "tokens"), documents, ByteTokenizer())


def main() -> None:
  jax.config.update("jax_num_cpu_devices", 8)
  folder = pathlib.Path(sys.argv[1])
  write_tokens(folder)
  result = {
    "imported": imported_is_equal(folder),
    "steps": compare_steps(),
    "stayed": run_on_meshes(folder, "stayed", [(8, 1, 1)]),
    "moved": run_on_meshes(folder, "moved", [MESHES[2], MESHES[1], (8, 1, 1)]),
  }
  (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
  main()
