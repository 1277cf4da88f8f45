"""Tests of the Mosaic TPU kernels with the real TPU compiler, without a TPU; `make test-compile`
runs them where the compiler is installed.
"""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sparsek.config import DataConfig, TrainConfig, preset
from sparsek.kernels import devices
from sparsek.kernels.specs import Spec
from sparsek.kernels.tpu import grid
from sparsek.parallel.mesh import ROWS, make_mesh
from sparsek.runs.checkpoint import abstract_params
from sparsek.training.optimizer import make_optimizer
from sparsek.training.step import abstract_state, make_train_step
from tests.kernels.tpu import compiler

if importlib.util.find_spec("libtpu") is None:
  pytestmark = pytest.mark.skip(
    reason="needs the TPU compiler, libtpu: make test-compile installs it"
  )


@pytest.mark.parametrize("chip", compiler.TOPOLOGIES)
@pytest.mark.parametrize("spec", compiler.RECORDED, ids=lambda spec: spec.name)
def test_moves_and_computes_at_most_splash_and_a_half(chip, spec):
  row = compiler.row_of(chip, spec)
  print(compiler.table([row]))
  assert (
    row["bytes_over_splash"] <= 1.5
    and row["flops_over_splash"] <= 1.5
    and len(row["vmem_bytes"]) == 3
  )


@pytest.mark.parametrize(
  "spec, gate",
  [
    pytest.param(spec, gate, id=f"{spec.name}-{gate}")
    for spec, gate in (
      (
        Spec(
          "grouped", n=8192, heads=32, groups=4, head_dim=128, k=512, window=512, dtype="bfloat16"
        ),
        "value",
      ),
      (
        Spec("narrow", n=4096, heads=4, groups=2, head_dim=64, k=500, window=300, dtype="bfloat16"),
        "key_value",
      ),
      (Spec("float32", n=4096, heads=4, groups=2, head_dim=128, k=512, window=512), "key_value"),
      (
        Spec("wide", n=4096, heads=2, groups=1, head_dim=256, k=512, window=512, dtype="bfloat16"),
        "value",
      ),
      (
        Spec("one_token", n=1, heads=2, groups=1, head_dim=16, k=1, window=1, dtype="bfloat16"),
        "value",
      ),
      (
        Spec("window_0", n=5000, heads=4, groups=2, head_dim=40, k=1, window=0, dtype="bfloat16"),
        "value",
      ),
      (
        Spec(
          "window_only", n=4096, heads=4, groups=2, head_dim=128, k=0, window=1024, dtype="bfloat16"
        ),
        "straight_through",
      ),
      (
        Spec("full", n=8192, heads=4, groups=2, head_dim=128, k=0, window=8192, dtype="bfloat16"),
        "straight_through",
      ),
    )
  ],
)
def test_compiles(spec, gate):
  compiler.compile_attention("v5e", spec, gate)


def test_too_much_vmem_is_an_error(monkeypatch):
  monkeypatch.setattr(grid, "VMEM_BYTES", 2**20)
  spec = Spec(
    "too_large", n=4096, heads=1, groups=1, head_dim=128, k=512, window=512, dtype="bfloat16"
  )
  with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
    compiler.compile_attention("v5e", spec, "value")


def test_more_than_2_to_the_31_elements_and_linear_memory():
  spec = lambda n: Spec(
    "long", n=n, heads=16, groups=2, head_dim=128, k=512, window=512, dtype="bfloat16"
  )
  temporary = lambda n: (
    compiler.compile_attention("v5p", spec(n), "straight_through")
    .memory_analysis()
    .temp_size_in_bytes
  )
  assert 2**21 * 16 * 128 > 2**31
  assert temporary(2**21) < 5 * temporary(2**19)


def test_training_step_compiles():
  """Compiles a whole optimizer step over four chips, with the kernels inside."""
  config, mesh = (
    preset("gpt2_small", remat="attention", scan_layers=True, implementation="mosaic_tpu"),
    make_mesh(devices=compiler.devices("v5e")),
  )
  train = TrainConfig(
    workdir="", data=DataConfig(seq_len=32768, batch_size=4, segment_documents=False)
  )
  optimizer = make_optimizer(train.optimizer)
  state = abstract_state(abstract_params(config), optimizer, mesh)
  sharding = NamedSharding(mesh, PartitionSpec(ROWS))
  batch = {
    name: jax.ShapeDtypeStruct((4, 32769), jnp.int32, sharding=sharding)
    for name in ("tokens", "segment_ids")
  }
  with devices.compiling_for(mesh.devices.flat[0]):
    compiled = make_train_step(config, train, optimizer, mesh).lower(state, batch).compile()
  memory, text = compiled.memory_analysis(), compiled.as_text()
  gigabytes = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9
  print(f"gpt2_small, 4 x 32768 tokens on v5e:2x2, remat attention: {gigabytes:.1f} GB a chip")
  assert gigabytes < 16 and text.count("tpu_custom_call") >= 3
