"""Training and its plan refuse the same configurations, before any long work."""

import dataclasses

import jax
import pytest
from jax.sharding import AbstractMesh

from sparsek.config import DataConfig, OptimizerConfig, TrainConfig, TransformerConfig
from sparsek.errors import UsageError
from sparsek.parallel.mesh import AXES, make_mesh
from sparsek.training import loop, plan
from sparsek.training.checks import check_batch, check_context

CONFIG = TransformerConfig(
  vocab_size=19,
  num_layers=1,
  embed_dim=8,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=8,
  attention="full",
)
TRAIN = TrainConfig(workdir="", data=DataConfig(batch_size=2 * jax.device_count(), seq_len=12))
SCORER_ONLY = OptimizerConfig(trainable="scorer")
FAULTS = {  # name -> (fields of the model, fields of the run, message)
  "gates of no layer": ({}, {"gate_anneal": 9.0}, "--gate_anneal=9.0: no layer has gates"),
  "soft at the end": (
    {"attention": "sparsek", "gate": "value"},
    {"gate_anneal": 9.0},
    "needs --gate=straight_through",
  ),
  "no adapter learns": ({"lora_rank": 2}, {"optimizer": SCORER_ONLY}, "exclude each other"),
  "wide adapters": ({"lora_rank": 9}, {}, "--lora_rank=9 must be at most 8"),
  "length": ({"positions": "learned", "max_positions": 11}, {}, "--seq_len=12 must be at most 11"),
  "implementation": (
    {"attention": "sparsek", "implementation": "mosaic_tpu"},
    {},
    "--implementation=mosaic_tpu: ",
  ),
  "nothing to train": ({}, {"optimizer": SCORER_ONLY}, "--trainable=scorer: no layer has such"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_plan_and_a_run_refuse_the_same(fault, tmp_path):
  model, run, message = FAULTS[fault]
  config, train = dataclasses.replace(CONFIG, **model), dataclasses.replace(TRAIN, **run)
  messages = []
  for refuse in (
    lambda: plan.make_plan(config, train),
    lambda: loop.train(config, dataclasses.replace(train, workdir=str(tmp_path)), dataset=None),
  ):
    with pytest.raises(UsageError, match=message) as error:
      refuse()
    messages.append(str(error.value))
  assert messages[0] == messages[1]


def test_batch_must_divide_over_devices_and_accumulation():
  check_batch(make_mesh(), 8 * jax.device_count(), 8)
  with pytest.raises(UsageError, match="--batch_size=9 must be a multiple of"):
    check_batch(make_mesh(), 9, 2)


def test_tokens_of_a_row_must_divide_over_context():
  mesh = AbstractMesh((1, 1, 4), AXES)
  check_context(CONFIG, mesh, 12)
  with pytest.raises(UsageError, match="--lengths=14 must be a multiple of --context=4"):
    check_context(CONFIG, mesh, 14, "lengths")
  with pytest.raises(UsageError, match="--context=4: attention 'lsh' needs whole rows"):
    check_context(dataclasses.replace(CONFIG, attention="lsh"), mesh, 12)
  with pytest.raises(UsageError, match="--context=4: --implementation=reference takes whole rows"):
    check_context(dataclasses.replace(CONFIG, implementation="reference"), mesh, 12)
