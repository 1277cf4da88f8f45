import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek.config import DataConfig, OptimizerConfig, TrainConfig, preset
from sparsek.data.batches import open_data
from sparsek.data.corpus import Document
from sparsek.data.token_files import write_token_files
from sparsek.data.tokenizer import ByteTokenizer
from sparsek.training import compilation, loop, step

CALL = (
  "%{name} = stablehlo.custom_call @mosaic_gpu_v2(%arg0, %{of}) "
  '{{mhlo.backend_config = {{kernel_hash = "{hash}", module = "ML\\22 : (\\0A\\EF"}}, '
  "operand_layouts = [dense<0> : tensor<1xindex>]}} : (tensor<8xf32>, tensor<8xf32>) -> {result}"
)
PROGRAM = "\n".join(
  [
    "module @jit_step {",
    "  func.func public @main(%arg0: tensor<8xf32>) -> tensor<8xf32> {",
    "    " + CALL.format(name="0", of="arg0", hash="a\\22b", result="tensor<8xf32>"),
    "    %1 = stablehlo.custom_call @other(%0) : (tensor<8xf32>) -> tensor<8xf32>",
    "    " + CALL.format(name="2", of="1", hash="a\\22b", result="tensor<8xf32>"),
    "    " + CALL.format(name="3:2", of="2", hash="c", result="(tensor<8xf32>, tensor<2x8xbf16>)"),
    "    return %3#0 : tensor<8xf32>",
    "  }",
    "}",
  ]
)


def test_each_kernel_of_a_program_has_one_program():
  one, two = compilation.kernel_programs(PROGRAM)
  assert 'kernel_hash = "a\\22b", module = "ML\\22 : (\\0A\\EF"' in one
  assert "@main(%arg0: tensor<8xf32>, %arg1: tensor<8xf32>) -> (tensor<8xf32>)" in one
  assert "%0:1 = stablehlo.custom_call @mosaic_gpu_v2(%arg0, %arg1)" in one
  assert "-> (tensor<8xf32>, tensor<2x8xbf16>)" in two and "return %0#0, %0#1" in two
  assert not compilation.kernel_programs("module {}")


class Device:
  """A device whose compiler keeps what it is given."""

  id = 3

  def __init__(self, platform):
    self.platform, self.client, self.compiled = platform, self, []

  def compile_and_load(self, program, devices, options):
    assert devices == (self,) and options.device_assignment.serialize()
    self.compiled.append(program)


class Lowered:
  """A program that is lowered."""

  def as_text(self):
    return PROGRAM


@pytest.mark.parametrize("platform, kernels", [("gpu", 2), ("cpu", 0)])
def test_kernels_are_compiled_on_gpus(platform, kernels):
  device = Device(platform)
  started = compilation.start_compiling_kernels(Lowered(), device)
  for compiling in started:
    compiling.result()
  assert len(device.compiled) == kernels
  assert set(device.compiled) == set(compilation.kernel_programs(PROGRAM)[:kernels])


@pytest.mark.parametrize("collects", [True, False])
def test_nothing_is_collected_while_a_function_is_lowered(collects):
  collecting = []

  @jax.jit
  def halve(x):
    collecting.append(gc.isenabled())
    return x / 2

  before = gc.isenabled()
  (gc.enable if collects else gc.disable)()
  try:
    lowered = compilation.lower(halve, jnp.float32(3))
    assert collecting == [False] and gc.isenabled() == collects
  finally:
    (gc.enable if before else gc.disable)()
  assert float(lowered.compile()(jnp.float32(3))) == 1.5


def test_a_call_finds_what_was_compiled_before():
  traces = []

  @jax.jit
  def double(tree, y):
    traces.append(y)
    return 2 * tree["x"] + y

  tree, y = {"x": jnp.arange(3.0)}, jnp.float32(1)
  compiled = compilation.start_compiling(double, tree, y).result()
  np.testing.assert_array_equal(double(tree, y), compiled(tree, y))
  assert len(traces) == 1


def test_the_first_step_of_a_run_is_traced_once(tmp_path, monkeypatch):
  """The loop lowers it before it calls it, and the diagnostics in another thread."""
  traced = []
  cut, sparsek_statistics = step.cut_targets, step.selection_statistics
  monkeypatch.setattr(step, "cut_targets", lambda batch: traced.append("step") or cut(batch))
  monkeypatch.setattr(
    step,
    "selection_statistics",
    lambda *args, **kwargs: traced.append("diagnose") or sparsek_statistics(*args, **kwargs),
  )
  documents = [Document(str(i), "abcd " * 20, held_out=False) for i in range(2)]
  write_token_files(str(tmp_path / "data"), documents, ByteTokenizer())
  train = TrainConfig(
    workdir=str(tmp_path / "run"),
    data=DataConfig(data="d", seq_len=16, batch_size=jax.device_count()),
    optimizer=OptimizerConfig(num_steps=2, warmup_steps=1),
    log_every=1,
    eval_every=0,
  )
  config = preset("tiny", num_layers=1, embed_dim=16, mlp_dim=16, k=2, window=2)
  assert loop.train(config, train, open_data(str(tmp_path / "data"))).step == 2
  assert sorted(traced) == ["diagnose", "step"]
