"""The real TPU compiler, without a TPU: bytes and FLOPs of the compiled kernels, compared with
splash attention with a local mask of the same budget.

python -m tests.kernels.tpu.compiler --record=PATH makes the published record again; `make
test-compile` installs what it needs.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import re

# The compiler asks for these where it finds no TPU.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_ID", "0")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.experimental.pallas.ops.tpu.splash_attention import (  # noqa: E402
  splash_attention_kernel,
  splash_attention_mask,
)
from jax.sharding import SingleDeviceSharding  # noqa: E402

from sparsek.kernels.specs import Spec  # noqa: E402
from sparsek.kernels.tpu import attention as tpu_attention  # noqa: E402

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SPLASH_BLOCK = 512  # of queries and of keys, forward and backward, as ours
BYTES = {
  "pred": 1,
  "s8": 1,
  "u8": 1,
  "bf16": 2,
  "f16": 2,
  "s16": 2,
  "u16": 2,
  "f32": 4,
  "s32": 4,
  "u32": 4,
}
VMEM = r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"'
# Operations that move nothing.
FREE = (
  "parameter",
  "get-tuple-element",
  "tuple",
  "bitcast",
  "constant",
  "after-all",
  "iota",
  "while",
  "conditional",
  "copy-start",
  "copy-done",
  "slice-start",
  "slice-done",  # to VMEM: counted where it is read
  "call-done",  # waits for a SparseCore's gather or scatter
)
# Operations of a SparseCore, which works beside the TensorCore; from libtpu 0.0.50 on.
OFFLOADED = ("call-start", "call-update")


@functools.cache
def devices(chip: str):
  """Returns four chips to compile for."""
  return topologies.get_topology_desc(TOPOLOGIES[chip], "tpu").devices


def compile_for(chip, function, *shapes):
  """Compiles for one chip; too much VMEM and impossible tiles are errors."""
  sharding = SingleDeviceSharding(devices(chip)[0])
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in shapes]
  return jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",)).compile()


def attention_and_gradients(
  query, key, value, scores, threshold, expiry, start, end, cotangent, *, spec, gate
):
  """Computes attention and its gradients, given the selection. Query, key, value, cotangent and
  results are [batch, heads, n, D], the order in which TPUs hold them.
  """
  heads_first = lambda x: jnp.swapaxes(x, 1, 2)

  def attend(query, key, value, scores, threshold):
    out = tpu_attention.attention(
      *map(heads_first, (query, key, value)),
      scores,
      threshold,
      expiry,
      None,
      start,
      end,
      k=spec.k,
      window=spec.window,
      gate=gate,
      scale=spec.head_dim**-0.5,
    )
    return heads_first(out)

  out, vjp = jax.vjp(attend, query, key, value, scores, threshold)
  return out, vjp(cotangent)


def arguments(spec):
  shape = lambda dtype, *dims: jax.ShapeDtypeStruct((spec.batch, *dims), dtype)
  queries, keys = (
    shape(spec.dtype, heads, spec.n, spec.head_dim) for heads in (spec.heads, spec.groups)
  )
  floats, integers, bounds = (
    shape(jnp.float32, spec.groups, spec.n),
    shape(jnp.int32, spec.groups, spec.n),
    shape(jnp.int32, spec.n),
  )
  return queries, keys, keys, floats, floats, integers, bounds, bounds, queries


def compile_attention(chip, spec, gate):
  return compile_for(
    chip, functools.partial(attention_and_gradients, spec=spec, gate=gate), *arguments(spec)
  )


def _instructions(text):
  """Returns {computation: [(name, result type, operation, operands, line)]}, the entry's name."""
  computations, current, entry = {}, None, None
  for line in text.splitlines():
    header = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
    if header:
      current = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
      continue
    match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$", line)
    if match and current is not None:
      current.append(
        (match[1], match[2], match[3], re.findall(r"%([\w.\-]+)", match[4].split("), ")[0]), line)
      )
  return computations, entry


def _size(types):
  return sum(
    int(np.prod([int(x) for x in dims.split(",") if x])) * BYTES.get(dtype, 4)
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", types)
  )


def traffic(compiled) -> dict:
  """Counts bytes moved, by kind of operation, FLOPs and the VMEM of each kernel, from the
  executable.

  A kernel moves what its grid fetches (the estimate it was compiled with); an operation of XLA its
  operands and results, once each; a gather or scatter the rows that it moves (XLA estimates sixteen
  times that); a loop its body's bytes times its trips.
  """
  text = compiled.as_text()
  computations, entry = _instructions(text)
  totals = {
    "kernel_bytes": 0,
    "gather_bytes": 0,
    "scatter_bytes": 0,
    "other_bytes": 0,
    "flops": 0,
    "vmem_bytes": [],
  }

  def count(name, times):
    types = {}
    for result, result_type, operation, operands, line in computations[name]:
      types[result] = result_type
      if operation == "while":
        condition = computations[re.search(r"condition=%?([\w.\-]+)", line)[1]]
        trips = max(
          int(x)
          for *_, line_of_condition in condition
          for x in re.findall(r"constant\((\d+)\)", line_of_condition)
        )
        count(re.search(r"body=%?([\w.\-]+)", line)[1], times * trips)
      # Custom calls of other names are bitcasts and hints.
      if operation in FREE or (operation == "custom-call" and "tpu_custom_call" not in line):
        continue
      moved = _size(result_type) + sum(_size(types.get(x, "")) for x in operands)
      kind = "other_bytes"
      if "tpu_custom_call" in line:
        kind, cost = "kernel_bytes", re.search(r'"cost_estimate":\{[^}]*\}', line)[0]
        field = lambda key: int(re.search(rf'"{key}":"?(\d+)', cost)[1])
        moved = field("bytes_accessed")
        totals["flops"] += field("flops") * times
        totals["vmem_bytes"].append(int(re.search(VMEM, line)[1]))
      elif "gather" in result and operation == "fusion":
        kind, moved = "gather_bytes", 2 * _size(result_type)
      elif (
        "gather" in result and operation in OFFLOADED
      ):  # the result type lists the operands, then the result
        kind, moved = (
          "gather_bytes",
          2 * (_size(result_type) - sum(_size(types.get(x, "")) for x in operands)),
        )
      elif "scatter" in result and operation in ("fusion", *OFFLOADED) and len(operands) > 2:
        *_, rows, _ = sorted(
          _size(types.get(x, "")) for x in operands
        )  # the largest is what they are added to
        kind, moved = "scatter_bytes", 3 * rows
      elif "dynamic-update-slice" in line or "dynamic_update_slice" in line:
        moved = 2 * min([_size(types.get(x, "")) for x in operands] or [0])
      totals[kind] += moved * times

  count(entry, 1)
  totals["bytes"] = sum(
    x for key, x in totals.items() if key.endswith("_bytes") and key != "vmem_bytes"
  )
  return totals


@functools.cache
def splash(n, budget):
  """Returns splash attention of one head with a window of `budget`."""
  block = SPLASH_BLOCK
  sizes = splash_attention_kernel.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  mask = splash_attention_mask.MultiHeadMask(
    [splash_attention_mask.LocalMask((n, n), (budget - 1, 0), 0)]
  )
  return splash_attention_kernel.make_splash_mha(
    mask, block_sizes=sizes, head_shards=1, q_seq_shards=1
  )


def splash_traffic(spec) -> dict:
  """Counts bytes and FLOPs of splash attention's kernels, forward and backward: the blocks that its
  mask visits, each with all products, and what its grids fetch.

  It states no cost to the compiler, so this is counted from the tables it prefetches; the output's
  product with its gradient is added. Every block of queries after the first windows visits as many,
  so long rows, whose tables take minutes, follow from shorter ones.
  """
  if spec.n > 16384:
    short, long = (splash_traffic(dataclasses.replace(spec, n=n)) for n in (8192, 16384))
    return {key: short[key] + (long[key] - short[key]) * (spec.n - 8192) // 8192 for key in short}
  kernel = splash(spec.n, spec.k + spec.window)
  row = spec.head_dim * jnp.dtype(spec.dtype).itemsize

  def visited(info, transpose):
    order, mask = (
      np.asarray(x)[0].T if transpose else np.asarray(x)[0]
      for x in (info.data_next, info.block_mask)
    )
    fetched = 1 + int(np.count_nonzero(np.diff(order.reshape(-1).astype(np.int64))))
    return int(np.count_nonzero(mask)), fetched * SPLASH_BLOCK

  (forward, forward_rows), (dq, dq_rows), (dkv, dkv_rows) = (
    visited(info, transpose)
    for info, transpose in (
      (kernel.fwd_mask_info, False),
      (kernel.dq_mask_info, False),
      (kernel.dkv_mask_info, True),
    )
  )
  rows = (
    (2 * spec.n + 2 * forward_rows)
    + (3 * spec.n + 2 * dq_rows)
    + (4 * spec.n + 2 * dkv_rows)
    + 2 * spec.n
  )
  products = 2 * forward + 3 * dq + 4 * dkv
  return {
    "bytes": spec.batch * spec.heads * rows * row,
    "flops": spec.batch * spec.heads * 2 * products * SPLASH_BLOCK**2 * spec.head_dim,
  }


def splash_vmem(chip, spec) -> list:
  """Returns the VMEM of splash attention's kernels, compiled for one head."""
  shape = jax.ShapeDtypeStruct((1, spec.n, spec.head_dim), spec.dtype)

  def run(query, key, value, cotangent):
    out, vjp = jax.vjp(splash(spec.n, spec.k + spec.window), query, key, value)
    return out, vjp(cotangent)

  text = compile_for(chip, run, *[shape] * 4).as_text()
  return [int(size) for size in re.findall('"tpu_custom_call".*?' + VMEM, text, re.DOTALL)]


RECORDED = tuple(
  Spec(
    f"n={n}, k={k}, window={window}",
    n=n,
    heads=8,
    groups=8,
    head_dim=128,
    k=k,
    window=window,
    dtype="bfloat16",
  )
  for n in (8192, 131072)
  for k, window in ((512, 512), (2048, 1024))
)


def row_of(chip, spec, gate="straight_through") -> dict:
  """Returns one row of the record."""
  compiled = compile_attention(chip, spec, gate)
  ours, theirs = traffic(compiled), splash_traffic(spec)
  return {
    "chip": chip,
    "n": spec.n,
    "heads": spec.heads,
    "key_heads": spec.groups,
    "head_dim": spec.head_dim,
    "k": spec.k,
    "window": spec.window,
    "gate": gate,
    "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    **ours,
    "splash_bytes": theirs["bytes"],
    "splash_flops": theirs["flops"],
    "splash_vmem_bytes": splash_vmem(chip, dataclasses.replace(spec, n=8192)),
    "bytes_over_splash": round(ours["bytes"] / theirs["bytes"], 3),
    "flops_over_splash": round(ours["flops"] / theirs["flops"], 3),
  }


def table(rows) -> str:
  return "\n".join(
    f"{row['chip']} n={row['n']} k={row['k']} window={row['window']}: VMEM "
    f"{max(row['vmem_bytes']) / 2**20:.1f} MiB (splash "
    f"{max(row['splash_vmem_bytes']) / 2**20:.1f}), {row['bytes'] / 1e9:.2f} GB = "
    f"{row['bytes_over_splash']:.2f} splash, "
    f"{row['flops'] / 1e12:.2f} TFLOP = {row['flops_over_splash']:.2f} splash, temporary "
    f"{row['temporary_bytes'] / 2**20:.0f} MiB"
    for row in rows
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--record", required=True, help="file to write")
  path = parser.parse_args().record
  rows = []
  for spec in RECORDED:
    for chip in TOPOLOGIES:
      rows.append(row_of(chip, spec))
      print(table(rows[-1:]), flush=True)
  record = {
    "command": (
      "python -m tests.kernels.tpu.compiler "
      "--record=experiments/results/attention_tpu_compiled.json"
    ),
    "what": "read from compiled executables; nothing here was timed, and no chip was at hand",
    "jax": jax.__version__,
    "libtpu": importlib.metadata.version("libtpu"),
    "splash_block": SPLASH_BLOCK,
    "rows": rows,
  }
  with open(path, "w", encoding="utf-8") as file:
    json.dump(record, file, indent=1)
    file.write("\n")


if __name__ == "__main__":
  main()
