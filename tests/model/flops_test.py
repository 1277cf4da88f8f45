"""Operations against brute force, and what a run would take."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from sparsek.config import DataConfig, OptimizerConfig, TrainConfig, TransformerConfig, preset
from sparsek.errors import RunError, UsageError
from sparsek.model import flops
from sparsek.parallel.hardware import Rates
from sparsek.runs import checkpoint
from sparsek.training import plan

CONFIG = TransformerConfig(
  vocab_size=11,
  num_layers=2,
  embed_dim=8,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=12,
  k=3,
  window=5,
  attention="full,sparsek",
  implementation="reference",
)


@pytest.mark.parametrize(
  "k, window, lengths",
  [(3, 5, [1, 4, 9, 30]), (1, 0, [7]), (100, 2, [9, 50]), (2, 100, [99, 101, 104])],
)
def test_attended_pairs_are_those_of_a_mask(k, window, lengths):
  want = dict(full=0, sliding_window=0, sparsek=0, lsh=0, linear=0)
  for n in lengths:
    i = np.arange(n)
    want["full"] += np.sum(i + 1)
    want["lsh"] += np.sum(np.minimum(i + 1, k + window))
    want["linear"] += np.sum(np.minimum(i + 1, window) + 8)
    want["sliding_window"] += np.sum(np.minimum(i + 1, window))
    want["sparsek"] += np.sum(np.minimum(i + 1, window) + np.clip(i + 1 - window, 0, k))
  want["tova"] = want["sparsek"]
  assert {
    kind: flops.attended_pairs(kind, np.array(lengths), k, window, 8) for kind in want
  } == want


def test_document_lengths():
  assert flops.document_lengths(np.array([[1, 1, 2, 1], [1, 0, 0, 0]])).tolist() == [2, 1, 1, 1, 3]


@pytest.mark.parametrize("tied", (True, False))
def test_training_flops_are_six_per_parameter_and_twelve_per_pair(tied):
  config = dataclasses.replace(CONFIG, tie_embeddings=tied)
  layer = 8 * 4 * (2 + 1 + 1 + 2) + 3 * 8 * 12
  scorer = 8 * 1
  with_weights = 2 * layer + scorer + 8 * 11
  pairs = sum(range(1, 21)) + sum(min(i, 5) + min(max(i - 5, 0), 3) for i in range(1, 21))
  assert (
    flops.training_flops(config, checkpoint.abstract_params(config), np.array([20]))
    == 6 * 20 * with_weights + 12 * 2 * 4 * pairs
  )
  heads = dataclasses.replace(config, num_kv_heads=2, attention="full,sparsek:k3:w5:h1:k0:w9")
  window = sum(min(i, 9) for i in range(1, 21))
  full, select = sum(range(1, 21)), pairs - sum(range(1, 21))
  assert flops.training_flops(
    heads, checkpoint.abstract_params(heads), np.array([20])
  ) == 6 * 20 * (with_weights + 2 * 8 * 4 * 2 + 8) + 12 * 4 * (2 * full + select + window)
  own = dataclasses.replace(config, attention="full,sparsek:k3:w5", k=9, window=9)
  assert (
    flops.training_flops(own, checkpoint.abstract_params(own), np.array([20]))
    == 6 * 20 * with_weights + 12 * 2 * 4 * pairs
  )


def test_peak_rates():
  kind = lambda name: types.SimpleNamespace(device_kind=name)
  assert [
    flops.peak(kind(name))
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "TPU v5 lite", "TPU v5p", "cpu")
  ] == [989e12, 756e12, 197e12, 459e12, None]


def test_plan(monkeypatch):
  train = TrainConfig(
    workdir="",
    data=DataConfig(seq_len=20, batch_size=2),
    optimizer=OptimizerConfig(num_steps=10, warmup_steps=1),
  )
  monkeypatch.setattr(plan, "rates", lambda _: Rates(1e9, 1e9, 1e9, 1e9))
  found = plan.make_plan(CONFIG, train)
  params = checkpoint.abstract_params(CONFIG)
  assert found.parameters == sum(x.size for x in jax.tree.leaves(params)) and found.tokens == 40
  assert (
    found.step_flops == 2 * flops.training_flops(CONFIG, params, np.array([20])) < found.full_flops
  )
  assert found.seconds_at_peak == pytest.approx(found.step_flops / 1e9)
  assert (
    found.state_bytes >= 3 * 4 * found.parameters
    and found.temporary_bytes > 0
    and found.fits is None
  )
  tight = dataclasses.replace(found, limit_bytes=found.state_bytes)
  assert tight.fits is False and "it does not fit" in tight.lines()[-1]
  assert "it fits" in dataclasses.replace(found, limit_bytes=10**10).lines()[-1]


@pytest.mark.parametrize(
  "seq_len, grad_accumulation, limit, expected",
  [
    (131072, 1, 64e9, "none"),
    (262144, 1, 64e9, "attention"),
    (131072, 2, 64e9, "none"),
    (131072, 1, 40e9, "attention"),
    (262144, 1, None, "none"),
  ],
)
def test_what_is_recomputed_depends_on_memory(seq_len, grad_accumulation, limit, expected):
  """The estimate against the compiler's figure: tests/kernels/hopper/compile_test.py."""
  data = DataConfig(seq_len=seq_len, batch_size=grad_accumulation * jax.device_count())
  train = TrainConfig(workdir="", data=data, grad_accumulation=grad_accumulation)
  assert plan.remat_that_fits(preset("gpt2_small", vocab_size=32768), train, limit) == expected


def test_plan_refuses_what_cannot_run_here():
  with pytest.raises(UsageError, match="--implementation=mosaic_tpu: .*needs a TPU"):
    plan.make_plan(
      dataclasses.replace(CONFIG, implementation="mosaic_tpu"), TrainConfig(workdir="")
    )


def test_plan_says_when_the_compiler_finds_too_little_memory(monkeypatch):
  def out_of_memory(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 90G of 80G")

  monkeypatch.setattr(
    plan, "make_train_step", lambda *_: types.SimpleNamespace(lower=out_of_memory)
  )
  with pytest.raises(RunError, match="does not fit into memory.*90G"):
    plan.make_plan(CONFIG, TrainConfig(workdir=""))
