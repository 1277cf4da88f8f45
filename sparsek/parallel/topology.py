"""Devices that are not attached, to compile for: "h100:64" or "v5p:4x8x8".

JAX compiles for them with the compiler alone: its CUDA plugin, or libtpu.
"""

import contextlib
import importlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from sparsek.errors import UsageError
from sparsek.kernels import devices as kernel_devices

GPUS_PER_NODE = 8
LARGEST = 2**16  # devices
PLUGINS = ("xla_cuda13", "xla_cuda12")


class _Gpu(NamedTuple):
  """JAX's name of a GPU, its memory as CUDA reports it, and its rate, in bytes."""

  name: str
  memory_bytes: int
  memory_rate: int


GPUS = {
  "h100": _Gpu("NVIDIA H100 80GB HBM3", 84942979072, 3352320000000),
  "h200": _Gpu("NVIDIA H200", 150754820096, 4801920000000),
}
TPUS = {"v5e": 2, "v5p": 3, "v6e": 2}  # kind -> axes of its shape
KINDS = (*GPUS, *TPUS)

# The compiler asks for these where it finds no TPU.
TPU_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_ID": "0",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
HOPPER = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32
shared_memory_per_block: 49152 shared_memory_per_core: 233472 threads_per_core_limit: 2048
core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
memory_bandwidth: {memory_rate} l2_cache_size: 52428800 clock_rate_ghz: 1.98
device_memory_size: {memory_bytes} shared_memory_per_block_optin: 232448
cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 }}
device_description_str: "{name}\""""


class Topology(NamedTuple):
  """A kind of devices and their arrangement; `str` is the text that `parse` reads.

  Attributes:
    kind: one of KINDS.
    shape: the number of GPUs, or the sizes of a TPU slice along its axes.
  """

  kind: str
  shape: tuple[int, ...]

  def __str__(self) -> str:
    return f"{self.kind}:{'x'.join(map(str, self.shape))}"


def parse(text: str) -> Topology:
  """Returns the topology of "KIND:SHAPE".

  Raises:
    UsageError: for another text; it says what is allowed.
  """
  kind, colon, shape = text.partition(":")
  if not colon or kind not in KINDS:
    raise UsageError(
      f"--topology={text} must be KIND:SHAPE, such as h100:64 or v5p:4x8x8; KIND is one of "
      f"{', '.join(KINDS)}"
    )
  axes = TPUS.get(kind, 1)
  if not re.fullmatch("x".join([r"[1-9][0-9]{0,4}"] * axes), shape):
    form = "x".join("ABC"[:axes]) if axes > 1 else "N"
    raise UsageError(f"--topology={text}: SHAPE of {kind} must be {form}, numbers from 1 on")
  topology = Topology(kind, tuple(map(int, shape.split("x"))))
  count = math.prod(topology.shape)
  if count > LARGEST:
    raise UsageError(f"--topology={text} has {count} devices, more than {LARGEST}")
  if kind in GPUS and count > GPUS_PER_NODE and count % GPUS_PER_NODE:
    raise UsageError(
      f"--topology={text} must have at most {GPUS_PER_NODE} GPUs, those of a node, or a multiple "
      f"of {GPUS_PER_NODE}"
    )
  return topology


def described_devices(topology: Topology) -> list[jax.Device]:
  """Returns devices to compile for. No attached device is used.

  Raises:
    UsageError: where the compiler is not installed, with the line that installs it, or where it
      knows no such topology.
  """
  try:
    if topology.kind in GPUS:
      return _gpus(topology)
    return _tpus(topology)
  except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
    reason = str(error).split("\n", 1)[0]
    raise UsageError(f"--topology={topology}: the compiler has no such devices: {reason}") from None


def compiling_for(devices: Sequence[jax.Device] | None) -> contextlib.AbstractContextManager[None]:
  """Chooses kernels for devices that `described_devices` returned, in functions traced inside; with
  None for those attached.
  """
  return kernel_devices.compiling_for(devices[0] if devices else None)


def _gpus(topology: Topology) -> list[jax.Device]:
  for plugin in PLUGINS:
    try:
      importlib.import_module(f"jax_plugins.{plugin}")  # registers the compiler
      break
    except ImportError:
      continue
  else:
    packages = (f"jax-cuda13-{part}=={jax.__version__}" for part in ("plugin", "pjrt"))
    raise UsageError(
      f"--topology={topology} needs JAX's compiler for GPUs: pip install --no-deps "
      f"{' '.join(packages)}"
    )
  (count,) = topology.shape
  nodes, each = max(1, count // GPUS_PER_NODE), min(count, GPUS_PER_NODE)
  target = HOPPER.format(**GPUS[topology.kind]._asdict())
  return topologies.get_topology_desc(
    "", "cuda", target_config=target, topology=f"1x{nodes}x{each}"
  ).devices


def _tpus(topology: Topology) -> list[jax.Device]:
  if importlib.util.find_spec("libtpu") is None:
    raise UsageError(
      f"--topology={topology} needs JAX's compiler for TPUs: pip install "
      f'"jax[tpu]=={jax.__version__}"'
    )
  for name, value in TPU_ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  return topologies.get_topology_desc(str(topology), "tpu").devices
