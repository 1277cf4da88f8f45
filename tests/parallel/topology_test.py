"""Devices that are not attached: how they are named, and what is refused.

`make test-compile` compiles for them: tests/training/plan_compile_test.py.
"""

import dataclasses
import types

import jax
import pytest
from jax.experimental import topologies

from sparsek.errors import UsageError
from sparsek.parallel import hardware, topology
from sparsek.parallel.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Device:
  """A device as JAX describes it."""

  id: int
  platform: str
  slice_index: int
  device_kind: str = ""


def test_reads_a_topology():
  assert topology.parse("h100:64") == ("h100", (64,))
  assert topology.parse("v5p:4x8x8") == ("v5p", (4, 8, 8))
  for text in ("h100:1", "h200:8", "h100:16", "v5e:4x4", "v6e:16x16", "v5p:2x2x1"):
    assert str(topology.parse(text)) == text


@pytest.mark.parametrize(
  "text, words",
  [
    ("h100", "--topology=h100 must be KIND:SHAPE.*h100, h200, v5e, v5p, v6e"),
    ("a100:8", "--topology=a100:8 must be KIND:SHAPE"),
    ("H100:8", "must be KIND:SHAPE"),
    ("h100:0", "SHAPE of h100 must be N, numbers from 1 on"),
    ("h100:1x8", "SHAPE of h100 must be N"),
    ("h100:", "SHAPE of h100 must be N"),
    ("h100:-8", "SHAPE of h100 must be N"),
    ("h100:12", "at most 8 GPUs, those of a node, or a multiple of 8"),
    ("h100:65544", "has 65544 devices, more than 65536"),
    ("v5p:4x8", "SHAPE of v5p must be AxBxC"),
    ("v6e:4x4x4", "SHAPE of v6e must be AxB, "),
    ("v6e:4x4 ", "SHAPE of v6e must be AxB"),
    ("v6e:4096x4096", "more than 65536"),
  ],
)
def test_refuses_what_is_no_topology(text, words):
  with pytest.raises(UsageError, match=words):
    topology.parse(text)


def test_says_how_to_install_a_compiler(monkeypatch):
  monkeypatch.setattr(topology, "PLUGINS", ("absent",))
  monkeypatch.setattr(topology.importlib.util, "find_spec", lambda _: None)
  for text, package in (("h200:16", "jax-cuda13-plugin=="), ("v5e:2x2", r'"jax\[tpu\]==')):
    with pytest.raises(UsageError, match=f"{text} needs .*: pip install .*{package}") as error:
      topology.described_devices(topology.parse(text))
    assert jax.__version__ in str(error.value)


def test_says_what_the_compiler_does_not_know(monkeypatch):
  def unknown(*_, **__):
    raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: not divisible\nby 2x2x1")

  monkeypatch.setattr(topology.importlib.util, "find_spec", lambda _: "libtpu")
  monkeypatch.setattr(topology, "TPU_ENVIRONMENT", {})
  monkeypatch.setattr(topologies, "get_topology_desc", unknown)
  with pytest.raises(UsageError, match="v5p:3x5x7: .* no such devices: INVALID.* divisible$"):
    topology.described_devices(topology.parse("v5p:3x5x7"))


def test_nodes_of_gpus(monkeypatch):
  asked = []

  def describe(name, platform, target_config, topology):
    asked.append(
      (topology, "H200" in target_config, "device_memory_size: 150754820096" in target_config)
    )
    return types.SimpleNamespace(devices=["a device"])

  monkeypatch.setattr(topology.importlib, "import_module", lambda _: None)
  monkeypatch.setattr(topologies, "get_topology_desc", describe)
  for text in ("h100:1", "h100:6", "h200:8", "h100:64"):
    assert topology.described_devices(topology.parse(text)) == ["a device"]
  assert asked == [
    ("1x1x1", False, False),
    ("1x1x6", False, False),
    ("1x1x8", True, True),
    ("1x8x8", False, False),
  ]


def test_rates():
  device = lambda kind: types.SimpleNamespace(device_kind=kind)
  assert hardware.rates(device("cpu")) is None
  for gpu in topology.GPUS.values():
    known = hardware.rates(device(gpu.name))
    assert known.flops == 989e12 and 0.9 < known.memory_bytes / gpu.memory_bytes < 1
  v5e, v5p = hardware.rates(device("TPU v5 lite")), hardware.rates(device("TPU v5"))
  assert (v5e.flops, v5e.memory_bytes, v5p.flops) == (197e12, 16e9, 459e12)


def test_a_mesh_takes_gpus_of_several_nodes_and_one_tpu_slice():
  """JAX gives every node of GPUs a slice of its own."""
  device = lambda platform, i: Device(i, platform, slice_index=i // 2)
  nodes = make_mesh(1, 2, [device("gpu", i) for i in range(4)])
  assert [[d.slice_index for d in row] for row in nodes.devices[:, 0]] == [[0, 0], [1, 1]]
  with pytest.raises(UsageError, match="of 2 TPU slices"):
    make_mesh(1, 2, [device("tpu", i) for i in range(4)])
