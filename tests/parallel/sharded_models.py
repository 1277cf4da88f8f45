"""Differences between models over sharded rows and the same on one device.

`python -m tests.parallel.sharded_models FILE` computes them on 8 simulated devices and writes JSON.
"""

import functools
import json
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sparsek.attention.documents import document_bounds
from sparsek.attention.scoring import ScoringNetwork
from sparsek.config import TransformerConfig
from sparsek.model import baselines
from sparsek.model.transformer import Transformer, init_params
from sparsek.parallel.mesh import AXES, CONTEXT, ROWS, make_mesh
from sparsek.parallel.sharded_scores import ShardedScoringNetwork
from tests.helpers import quick_jit

BATCH, LENGTH = 4, 64
FIELDS: dict[str, Any] = dict(
  vocab_size=19,
  embed_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=24,
  k=6,
  window=12,
  scorer="conv",
  scorer_lookback=11,  # with 8 shards these reach beyond the next one
  scorer_lookahead=9,
  norm_eps=1e-2,  # linear attention divides by norms near 0
  scorer_init_noise=0.3,
  scorer_init_slope=2.0,
  scorer_init_sink=1.5,
  scorer_noise=0.5,
  scorer_loss_queries=10,
  implementation="xla",
)
CONFIGS = {
  "learned": TransformerConfig(
    # linear attention has a sliding window too
    **FIELDS,
    attention=("sparsek", "full", "linear"),
    num_layers=3,
  ),
  "scanned": TransformerConfig(
    **FIELDS,
    num_layers=2,
    scan_layers=True,
    remat="attention",
    positions="learned",
    max_positions=LENGTH,
    scorer_shared=True,
    scorer_loss_kind="divergence",
  ),
  "fixed": TransformerConfig(**FIELDS, attention=("random", "strided"), num_layers=2),
  "heads": TransformerConfig(
    **FIELDS | {"num_kv_heads": 4},
    attention=("sparsek:h1:k0:w20", "sparsek:k9:h0.2:k3:w30"),
    num_layers=2,
  ),
}
PACKED, ONE, NONE = "several documents", "one document", "no segment ids"


class Case(NamedTuple):
  """A model, its mesh, and the documents of rows that one program computes.

  Attributes:
    config: its name in CONFIGS.
    context, data: sizes of the mesh axes.
    collection: of the scorers' loss.
    documents: kinds of `segment_ids`.
  """

  config: str
  context: int
  data: int
  collection: str
  documents: tuple[str, ...]


CASES = (
  Case("learned", 4, 2, "scorer_loss", (PACKED, ONE)),
  Case("scanned", 8, 1, "scorer_warmup", (NONE, PACKED)),  # fewer scores than shards
  Case("fixed", 2, 1, "", (PACKED,)),
  Case("heads", 4, 2, "scorer_loss", (PACKED,)),
)
IDS = [(*case[:3], documents) for case in CASES for documents in case.documents]


def segment_ids(documents: str) -> jax.Array | None:
  """Returns segment ids [BATCH, LENGTH] of rows."""
  if documents == NONE:
    return None
  if documents == ONE:
    return jnp.ones((BATCH, LENGTH), jnp.int32)
  lengths = [[64], [1, 2, 15, 1, 29, 9, 7], [5, 52, 7], [16, 16, 3, 29]]
  rows = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
  rows[3][-29:] = 0  # padding
  return jnp.asarray(np.stack(rows), jnp.int32)


def model_pass(config, collection, params, tokens, segment_ids, row_index, weight):
  """Returns hidden states and scores of the tokens that are here, their part of the losses, and
  gradients, which layers sum over all devices; without a collection, no gradients.
  """

  def loss(params):
    hidden, left = Transformer(config).apply(
      {"params": params},
      tokens,
      segment_ids,
      row_index,
      method="hidden",
      rngs={"scorer_noise": jax.random.key(5), "scorer_loss": jax.random.key(6)},
      mutable=[collection, "diagnostics"],
    )
    scorers = sum(map(jnp.sum, jax.tree.leaves(left.get(collection))), jnp.zeros(()))
    total = jnp.sum(hidden * weight)
    return total + 3 * scorers, (hidden, left.get("diagnostics"), (total, scorers))

  if not collection:
    hidden, scores, losses = loss(params)[1]
    return hidden, scores, losses, {}
  grads, (hidden, scores, losses) = jax.grad(loss, has_aux=True)(params)
  return hidden, scores, losses, grads


def sharded_pass(config, case, has_ids):
  """Returns `model_pass` on a mesh, from whole arrays to whole arrays."""
  mesh = make_mesh(context=case.context, devices=jax.devices()[: case.context * case.data])
  shard = P(ROWS, CONTEXT)

  def on_shard(*arrays):
    hidden, scores, losses, grads = model_pass(config, case.collection, *arrays)
    return hidden, scores, jax.lax.psum(losses, AXES), grads

  return jax.shard_map(
    on_shard,
    mesh=mesh,
    in_specs=(P(), shard, P(ROWS) if has_ids else P(), P(ROWS), shard),
    out_specs=(shard, P(None, ROWS, CONTEXT) if config.scan_layers else shard, P(), P()),
    check_vma=False,
  )


def difference(got, want) -> float:
  """Returns the norm of the difference of two lists of arrays over the norm of the second."""
  squares = lambda arrays: sum(float(np.sum(np.square(x, dtype=np.float64))) for x in arrays)
  norm = squares(want)
  return (squares(x - y for x, y in zip(got, want, strict=True)) / norm) ** 0.5 if norm else 0.0


def differences(got, want) -> dict[str, float]:
  """Returns the difference of each kind of result, and the largest of a single array's."""
  flat = lambda x: list(map(jax.tree.leaves, jax.device_get(x)))
  kinds, leaf = {}, 0.0
  for kind, a, b in zip(("hidden", "scores", "losses", "gradients"), flat(got), flat(want)):
    kinds[kind] = difference(a, b)
    leaf = max([leaf, *(difference([x], [y]) for x, y in zip(a, b, strict=True))])
  return kinds | {"array": leaf}


def normalization_is_exact() -> bool:
  """Compares normalised logits of 8 shards with those of one device, to the bit."""
  logits = jax.random.normal(jax.random.key(3), (BATCH, LENGTH, 2)) + 100
  bounds = document_bounds(segment_ids(PACKED), BATCH, LENGTH)
  want = jax.jit(ScoringNetwork(2)._normalized)(logits, *bounds)
  sharded = jax.shard_map(
    ShardedScoringNetwork(2)._normalized,
    mesh=make_mesh(context=8),
    in_specs=(P(None, CONTEXT), P(), P()),
    out_specs=P(None, CONTEXT),
    check_vma=False,
  )
  return bool(np.array_equal(jax.jit(sharded)(logits, *bounds), want))


def results():
  """Yields the differences of each case."""
  tokens = jax.random.randint(jax.random.key(0), (BATCH, LENGTH), 0, FIELDS["vocab_size"])
  weight = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, FIELDS["embed_dim"]))
  for case in CASES:
    config = CONFIGS[case.config]
    params = init_params(config, jax.random.key(2))
    params["embed"]["embedding"] *= 50  # else the first norm multiplies every rounding error
    alone = quick_jit(functools.partial(model_pass, config, case.collection))
    many = quick_jit(sharded_pass(config, case, case.documents != (NONE,)))
    for documents in case.documents:
      arrays = (params, tokens, segment_ids(documents), jnp.arange(BATCH), weight)
      yield [*case[:3], documents], differences(many(*arrays), alone(*arrays))


def main() -> None:
  jax.config.update("jax_num_cpu_devices", 8)
  baselines.CHUNK = 5  # several chunks a shard, the last one not full
  output = {"exact": normalization_is_exact(), "cases": list(results())}
  pathlib.Path(sys.argv[1]).write_text(json.dumps(output))


if __name__ == "__main__":
  main()
