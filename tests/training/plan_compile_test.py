"""Plans for devices that are not attached, by the real compilers; `make test-compile` runs them
where those are installed.
"""

import dataclasses
import importlib.util

import pytest

from sparsek.config import DataConfig, TrainConfig, TransformerConfig, preset
from sparsek.parallel.topology import described_devices, parse
from sparsek.training import plan

CUDA, LIBTPU = "jax_cuda13_plugin", "libtpu"
SMALL = preset(
  "tiny", dtype="bfloat16", head_dim=64, num_layers=2, remat="attention", scan_layers=True
)
QWEN_7B = TransformerConfig(
  vocab_size=152064,
  num_layers=28,
  embed_dim=3584,
  num_heads=28,
  num_kv_heads=4,
  head_dim=128,
  mlp_dim=18944,
  rope_theta=1e6,
  use_bias=True,
  tie_embeddings=False,
  dtype="bfloat16",
  scan_layers=True,
  remat="attention",
)


def planned(text, config, **fields):
  """Returns the plan of rows that `fields` describe; prints it."""
  data = DataConfig(seq_len=fields.pop("seq_len"), batch_size=fields.pop("batch_size"))
  train = TrainConfig(workdir="", data=data, **fields)
  made = plan.make_plan(config, train, described_devices(parse(text)))
  print("\n".join(made.lines()))
  return made


def test_a_second_device_needs_little_more_memory_than_one():
  """A layer's gradients are summed before those of the next are computed; beside the sums it costs
  the joined gradients of a few layers, never the activations of all.
  """
  if importlib.util.find_spec(CUDA) is None:
    pytest.skip(f"needs {CUDA}: make test-compile installs it")
  config = dataclasses.replace(SMALL, num_layers=6, scan_layers=False, embed_dim=512, mlp_dim=2048)
  one, two = (planned(f"h100:{n}", config, seq_len=32768, batch_size=n) for n in (1, 2))
  assert two.temporary_bytes - one.temporary_bytes < 3 * two.arguments["parameters"]


@pytest.mark.parametrize(
  "text, compiler, kernels, fields",
  [
    ("h100:8", CUDA, "mosaic_gpu", dict(fsdp=2, context=2, batch_size=4)),
    ("v6e:16x16", LIBTPU, "mosaic_tpu", dict(fsdp=4, context=4, batch_size=64)),
    ("v5p:4x8x8", LIBTPU, "mosaic_tpu", dict(fsdp=8, context=8, batch_size=32)),
  ],
)
def test_plans_a_step_over_all_devices(text, compiler, kernels, fields):
  if importlib.util.find_spec(compiler) is None:
    pytest.skip(f"needs {compiler}: make test-compile installs it")
  made = planned(text, SMALL, seq_len=4096, **fields)
  assert made.attention[0].startswith(f"attention: {kernels} on ")
  assert made.fits and made.seconds_at_peak > 0
  assert 0 < made.activation_bytes and 0 < made.temporary_bytes
  # Gradients are summed over all devices, keys move along a row, parameters are gathered.
  sums = {"all-reduce", "reduce-scatter"} & set(made.collectives)
  assert sums and {"all-gather", "all-to-all"} <= set(made.collectives)
  assert made.collective_seconds > 0
  assert all(traffic.between_nodes == 0 for traffic in made.collectives.values())


@pytest.mark.parametrize("k", [512, 1024])
def test_7b_fits_at_131072_tokens_a_row_on_64_h100(k):
  if importlib.util.find_spec(CUDA) is None:
    pytest.skip(f"needs {CUDA}: make test-compile installs it")
  config = dataclasses.replace(QWEN_7B, k=k, window=k)
  made = planned("h100:64", config, seq_len=131072, batch_size=8, fsdp=8, context=8)
  assert made.total_bytes < 40e9
  # All parameters are gathered for the forward and the backward pass, and summed once: between
  # nodes 7/8 of their bytes each time.
  size = 4 * made.parameters * 7 / 8
  gathered, summed = made.collectives["all-gather"], made.collectives["reduce-scatter"]
  assert gathered.between_nodes < 2.05 * size and summed.between_nodes < 1.05 * size
