"""Plans of runs over several devices; tests/model/flops_test.py has those of one."""

import dataclasses
import json
import re
import types

import jax
import pytest

from sparsek.config import DataConfig, TrainConfig, preset
from sparsek.parallel.collectives import Traffic
from sparsek.parallel.hardware import Rates
from sparsek.parallel.mesh import make_mesh
from sparsek.runs.checkpoint import abstract_params
from sparsek.training import plan
from sparsek.training.activations import activation_bytes
from tests.commands import FORKS, ROOT, become, run_forked, simulated

MADE = plan.Plan(
  devices="16 x NVIDIA H100 (data 1, fsdp 2, context 8)",
  attention=["attention: mosaic_gpu on NVIDIA H100"],
  parameters=1_000_000,
  learned=1_000_000,
  tokens=8192,
  step_flops=int(16e12),
  full_flops=int(17e12),
  num_devices=16,
  rates=Rates(1e12, 80e9, 400e9, 50e9),
  collectives={
    "all-reduce": Traffic(3, int(40e9), 0),
    "all-gather": Traffic(24, int(110e9), int(100e9)),
  },
  compile_seconds=3.2,
  arguments={"parameters": int(2e9), "moments": int(4e9), "batch": 1000},
  activation_bytes=int(5e9),
  temporary_bytes=int(9e9),
  limit_bytes=int(60e9),
)


def test_says_what_a_step_costs():
  compute = 1 / plan.RECORDED_SHARE
  lines = MADE.lines()
  assert lines[2:4] == ["attention: mosaic_gpu on NVIDIA H100", "compiled in 3 s"]
  assert lines[4:7] == [
    "collectives of a step:",
    "  24 all-gather: a device receives 110 GB, 100 of it between nodes",
    "  3 all-reduce: a device receives 40 GB",
  ]
  assert MADE.collective_seconds == pytest.approx(50 / 400 + 100 / 50)
  assert lines[7].startswith(f"a step should take {compute:.3g} to {compute + 2.125:.3g} s: ")
  assert "collectives 2.12 s at 400 GB/s (50 between nodes)" in lines[7]
  assert lines[8] == (
    "memory per device in GB: 2 parameters + 4 moments + 1e-06 batch + 5 activations + "
    "4 other temporaries = 15 of 60: it fits"
  )
  unknown = dataclasses.replace(MADE, rates=None, temporary_bytes=None)
  assert unknown.lines()[4:] == lines[4:7]


def test_the_share_of_the_peak_rate_is_that_of_the_record():
  record = json.loads((ROOT / "experiments/results/train_h100.json").read_text())
  (row,) = [row for row in record["rows"] if row["n"] == 32768]
  assert row["model"].startswith("110M") and "H100" in record["device"]
  assert plan.RECORDED_SHARE == pytest.approx(row["rivals"]["sparsek"]["mfu"], abs=5e-4)


def test_memory_of_devices_that_are_not_attached(monkeypatch):
  monkeypatch.delenv(plan.GPU_FRACTION, raising=False)
  limit = lambda platform, kind: plan.memory_limit(
    [types.SimpleNamespace(platform=platform, device_kind=kind)]
  )
  assert limit("gpu", "NVIDIA H100 80GB HBM3") == 60e9 and limit("tpu", "TPU v5 lite") == 16e9
  monkeypatch.setenv(plan.GPU_FRACTION, "0.9")
  assert limit("gpu", "NVIDIA H200") == pytest.approx(0.9 * 141e9)
  assert limit("gpu", "NVIDIA X") is None


@pytest.mark.parametrize(
  "fields, batch_size, devices, expected",
  [
    ({}, 8, 8, "attention"),
    ({"context": 8}, 1, 8, "none"),
    ({"context": 8}, 8, 64, "none"),
    ({"context": 8}, 8, 8, "attention"),
    ({"fsdp": 8}, 8, 8, "attention"),
  ],
)
def test_what_is_recomputed_depends_on_the_mesh(fields, batch_size, devices, expected):
  train = TrainConfig(workdir="", data=DataConfig(seq_len=262144, batch_size=batch_size), **fields)
  assert plan.remat_that_fits(preset("gpt2_small"), train, 64e9, devices) == expected


def test_split_parameters_leave_room():
  """A model whose parameters and moments fit only where they are split."""
  train = TrainConfig(workdir="", data=DataConfig(seq_len=1024, batch_size=8))
  split = dataclasses.replace(train, fsdp=8)
  fits = lambda train: plan.remat_that_fits(preset("1b"), train, 14e9, 8)
  assert (fits(train), fits(split)) == ("attention", "none")


def test_activations_are_what_the_backward_pass_keeps():
  train = TrainConfig(workdir="", data=DataConfig(seq_len=256, batch_size=2))
  mesh = make_mesh(devices=jax.devices()[:1])

  def kept(train=train, **fields):
    config = preset("tiny", **{"num_layers": 3, "remat": "full", **fields})
    state, batch, _ = plan._abstract_arguments(abstract_params(config), train, mesh)
    return activation_bytes(config, train, mesh, state, batch)

  full = kept()
  assert kept(mlp_dim=768) == full  # neither parameters nor the inside of a layer
  # A layer more keeps its input, [2, 256, 128] in float32.
  assert kept(num_layers=4) - full == pytest.approx(2 * 256 * 128 * 4, rel=0.01)
  assert full < kept(remat="attention") < kept(remat="none")
  assert kept(dataclasses.replace(train, grad_accumulation=2)) < 0.6 * full


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--dry_run", "--topology=h100:12"], "--topology=h100:12 must have at most 8 GPUs"),
    (["--workdir=w", "--topology=h100:8"], "--topology=h100:8 needs --dry_run"),
    (["--dry_run", "--topology=h100:8", "--fsdp=3"], "--fsdp=3 x --context=1 must divide"),
  ],
)
def test_refuses_topologies_before_any_work(flags, words, tmp_path):
  done = run_forked(["experiments.pretrain", *flags], ROOT, tmp_path)
  assert done.returncode == 2 and words in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_a_dry_run_over_eight_devices(tmp_path):
  """The row of a million tokens is one that no device here could hold."""
  flags = [
    "--dry_run",
    "--num_layers=1",
    "--embed_dim=64",
    "--scan_layers",
    "--fsdp=2",
    "--context=2",
    "--batch_size=4",
    "--seq_len=1048576",
  ]
  arguments = (["experiments.pretrain", *flags], str(ROOT), str(tmp_path), simulated(8))
  process = FORKS.Process(target=become, args=arguments)
  process.start()
  process.join()
  assert process.exitcode == 0, (tmp_path / "stderr").read_text()
  said = (tmp_path / "stdout").read_text()
  assert "8 x cpu (data 2, fsdp 2, context 2)" in said
  assert re.search(r"\n  \d+ all-gather: a device receives [\d.e-]+ GB\n", said)
  assert re.search(r"activations \+ .* other temporaries = [\d.]+$", said.strip())
