"""Compiles the kernels for GPUs since Ampere with the real compiler, without such a GPU, and prints
what each kernel takes: registers, spilled bytes, shared memory.

  python -m tests.kernels.ampere.compiler 8.0 --json     one compute capability
  python -m tests.kernels.ampere.compiler --record=PATH  the published record, of all

A process compiles for one compute capability only: JAX keeps the first one. `make test-compile`
installs what this needs.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

import sparsek
from sparsek.config import preset
from sparsek.kernels import devices
from sparsek.kernels.rms_norm import branched_rms_norm
from sparsek.kernels.specs import Spec
from tests.kernels.decoding_steps import compiled_steps

ROOT = pathlib.Path(__file__).resolve().parents[3]


class Gpu(NamedTuple):
  """A GPU to compile for; the figures are those of CUDA's tables of compute capabilities.

  Attributes:
    name: JAX's name of one with that compute capability.
    shared_kib: shared memory of a program.
    cores: multiprocessors.
    threads: of a multiprocessor.
  """

  name: str
  shared_kib: int
  cores: int
  threads: int


GPUS = {
  "8.0": Gpu("NVIDIA A100-SXM4-40GB", 163, 108, 2048),
  "8.6": Gpu("NVIDIA GeForce RTX 3090", 99, 82, 1536),
  "8.9": Gpu("NVIDIA GeForce RTX 4090", 99, 128, 1536),
  "9.0": Gpu("NVIDIA H100 80GB HBM3", 227, 132, 2048),
  "10.0": Gpu("NVIDIA B200", 227, 148, 2048),
  "12.0": Gpu("NVIDIA GeForce RTX 5090", 99, 170, 1536),
}
# The target of these names features that later ones lack.
ACCELERATED = "feature_extension: ACCELERATED_FEATURES"
TARGET = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32
shared_memory_per_block: 49152 shared_memory_per_core: {core_bytes}
threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
memory_bandwidth: 1555000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41
device_memory_size: 25000000000 shared_memory_per_block_optin: {block_bytes}
cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 }}
device_description_str: "{name}\""""

HEADS = dict(heads=4, groups=4, n=8192, k=512, window=512)
CASES = {
  "heads of 128": (Spec("wide", head_dim=128, dtype="bfloat16", **HEADS), "straight_through"),
  "heads of 128, value": (Spec("value", head_dim=128, dtype="float16", **HEADS), "value"),
  "heads of 128, key_value": (Spec("gated", head_dim=128, dtype="bfloat16", **HEADS), "key_value"),
  "heads of 64": (Spec("narrow", head_dim=64, dtype="bfloat16", **HEADS), "straight_through"),
  "heads of 64, key_value": (Spec("narrow", head_dim=64, dtype="float16", **HEADS), "key_value"),
  "grouped heads": (
    Spec("grouped", n=5000, heads=8, groups=2, head_dim=100, k=300, window=9, dtype="bfloat16"),
    "straight_through",
  ),
}
# selection and norms, with the sizes of the first case, and steps of generation
PORTABLE = "portable"


def device_of(capability: str) -> jax.Device:
  """Returns a described GPU of that compute capability."""
  from jax.experimental import topologies

  gpu, (major, minor) = GPUS[capability], capability.split(".")
  target = TARGET.format(
    name=gpu.name,
    cores=gpu.cores,
    threads=gpu.threads,
    block_bytes=gpu.shared_kib * 1024,
    core_bytes=(gpu.shared_kib + 1) * 1024,
    major=major,
    minor=minor,
    extension=ACCELERATED if int(major) >= 9 else "",
  )
  return topologies.get_topology_desc("", "cuda", target_config=target, topology="1x1x1").devices[0]


@contextlib.contextmanager
def target_of(capability: str, shared: dict[str, int]) -> Iterator[jax.Device]:
  """Lets JAX compile for that compute capability, and fills `shared` with the bytes of shared
  memory of each kernel.

  Mosaic takes devices that are not attached for Hopper GPUs, and asks private functions which they
  are and how much shared memory they have.
  """
  from jax.experimental.mosaic.gpu import core, utils

  device, launch = device_of(capability), core._launch
  architecture = tuple(map(int, capability.split(".")))

  def noted_launch(token, grid, cluster, block, smem_buffers, semantics, module, *rest, **options):
    name = module.operation.attributes["sym_name"].value
    shared[name] = core._smem_tree_size(smem_buffers)
    return launch(token, grid, cluster, block, smem_buffers, semantics, module, *rest, **options)

  utils._infer_arch = lambda: architecture
  core._SMEM_SIZE_BOUND = GPUS[capability].shared_kib * 1024
  core._launch = noted_launch
  with devices.compiling_for(device):
    yield device


def compile_case(device: jax.Device, spec: Spec, gate: str) -> None:
  """Compiles attention and all gradients, given the selection."""
  from sparsek.kernels.ampere import attention as ampere

  query, key, scores = _inputs(device, spec)
  by_head = jax.ShapeDtypeStruct(
    (spec.batch, spec.groups, spec.n), jnp.float32, sharding=scores.sharding
  )
  tokens = by_head.update(dtype=jnp.int32)
  bound = jax.ShapeDtypeStruct((spec.batch, spec.n), jnp.int32, sharding=scores.sharding)

  def gradients(cotangent, query, key, value, scores, threshold, *rest):
    attend = lambda *inputs: ampere.attention(
      *inputs, *rest, k=spec.k, window=spec.window, gate=gate, scale=spec.head_dim**-0.5
    )
    out, vjp = jax.vjp(attend, query, key, value, scores, threshold)
    return out, vjp(cotangent)

  arguments = query, query, key, key, by_head, by_head, tokens, tokens, bound, bound
  jax.jit(gradients).lower(*arguments).compile()


def compile_portable(device: jax.Device, spec: Spec) -> None:
  """Compiles thresholds and expiry, and norms, with their gradients."""
  scores = _inputs(device, spec)[2]

  def gradient(scores, cotangent):
    select = lambda scores: sparsek.causal_sparsek(scores, k=spec.k, delay=spec.window)
    selection, vjp = jax.vjp(lambda scores: select(scores).threshold, scores)
    return select(scores), vjp(cotangent)

  jax.jit(gradient).lower(scores, scores).compile()
  x = jax.ShapeDtypeStruct((1, spec.n, 1024), spec.dtype, sharding=scores.sharding)
  scale = jax.ShapeDtypeStruct((1024,), jnp.float32, sharding=scores.sharding)

  def norm_gradients(x, scale, *cotangents):
    norm = functools.partial(branched_rms_norm, epsilon=1e-6)
    return jax.vjp(norm, x, scale)[1](cotangents)

  jax.jit(norm_gradients).lower(x, scale, x, x).compile()


def compile_decoding(device: jax.Device) -> None:
  """Compiles steps of generation, by the kernels that need nothing of Hopper."""
  sizes = dict(num_layers=2, k=512, window=512, vocab_size=32768)
  compiled_steps(preset("1b", attention="sparsek,full", **sizes), 1, device)


def _inputs(device: jax.Device, spec: Spec) -> list[jax.ShapeDtypeStruct]:
  """Returns queries, keys and scores."""
  sharding = jax.sharding.SingleDeviceSharding(device)
  return [
    jax.ShapeDtypeStruct((spec.batch, spec.n, *dims), dtype, sharding=sharding)
    for dtype, dims in (
      (spec.dtype, (spec.heads, spec.head_dim)),
      (spec.dtype, (spec.groups, spec.head_dim)),
      (jnp.float32, (spec.groups,)),
    )
  ]


@contextlib.contextmanager
def standard_output(lines: list[str]) -> Iterator[None]:
  """Collects what is written to the file descriptor of standard output, as the compiler does."""
  sys.stdout.flush()
  with tempfile.TemporaryFile() as file:
    kept = os.dup(1)
    os.dup2(file.fileno(), 1)
    try:
      yield
    finally:
      os.dup2(kept, 1)
      os.close(kept)
      file.seek(0)
      lines += file.read().decode(errors="replace").splitlines()


def kernels_of(lines: list[str]) -> list[dict]:
  """Reads what ptxas says of each kernel that it compiles."""
  found: list[dict] = []
  for line in lines:
    if name := re.search(r"Compiling entry function '(\w+?)(_mosaic_gpu_kernel)?'", line):
      found.append({"kernel": name[1]})
    elif spilled := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
      if "warning" not in line:
        found[-1]["spilled_bytes"] = int(spilled[1])
    elif registers := re.search(r"Used (\d+) registers", line):
      found[-1]["registers"] = int(registers[1])
  return found


def measure(capability: str, names: list[str]) -> dict:
  """Compiles cases for a compute capability; returns the figures of their attention kernels, and
  the names of all kernels.
  """
  import jax_plugins.xla_cuda13  # noqa: F401  registers the compiler

  os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
  cases: dict[str, list] = {}
  others: set[str] = set()
  shared: dict[str, int] = {}
  with target_of(capability, shared) as device:
    for name in (*names, PORTABLE):
      lines: list[str] = []
      try:
        with standard_output(lines):
          if name == PORTABLE:
            compile_portable(device, CASES[names[0]][0])
            compile_decoding(device)
          else:
            compile_case(device, *CASES[name])
      except Exception:
        print(*lines, sep="\n", file=sys.stderr)
        raise
      kernels = kernels_of(lines)
      others |= {kernel["kernel"] for kernel in kernels if "_mma_" not in kernel["kernel"]}
      if name != PORTABLE:
        cases[name] = [
          kernel | {"shared_bytes": shared[kernel["kernel"]]}
          for kernel in kernels
          if "_mma_" in kernel["kernel"]
        ]
  return {"cases": cases, "other_kernels": sorted(others)}


def measured(capability: str, *options: str) -> dict:
  """Returns what `measure` returns, from a new process.

  Raises:
    RuntimeError: if it fails, with the end of what it writes.
  """
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "0",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
  }
  command = [sys.executable, "-m", "tests.kernels.ampere.compiler", capability, "--json", *options]
  done = subprocess.run(
    command, env=environment, capture_output=True, text=True, timeout=900, cwd=ROOT, check=False
  )
  if done.returncode:
    raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def main(options: argparse.Namespace) -> None:
  """Prints a line for each kernel, or the figures as JSON; writes the record."""
  if options.json:
    print(json.dumps(measure(options.capability, options.case or list(CASES))))
    return
  wanted = [options.capability] if options.capability else list(GPUS)
  record: dict = {
    "script": "python -m tests.kernels.ampere.compiler",
    "jax": jax.__version__,
    "compiler": importlib.metadata.version("jax-cuda13-plugin"),
    "capabilities": {},
  }
  for capability in wanted:
    figures = measured(capability, *(f"--case={name}" for name in options.case or ()))
    record["capabilities"][capability] = GPUS[capability]._asdict() | figures
    for name, kernels in figures["cases"].items():
      for kernel in kernels:
        print(
          f"{capability:5s}{name:25s}{kernel['kernel']:30s}{kernel['registers']:4d} registers"
          f"{kernel['spilled_bytes']:5d} bytes spilled{kernel['shared_bytes'] / 1024:6.0f} KiB",
          flush=True,
        )
  if options.record:
    pathlib.Path(options.record).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("capability", nargs="?", choices=GPUS)
  parser.add_argument("--case", action="append", choices=CASES)
  parser.add_argument("--json", action="store_true")
  parser.add_argument("--record")
  main(parser.parse_args())
