"""What a trace of some steps says of the devices' time: which kinds of kernels it went to."""

import collections
import glob
import os
import re
from collections.abc import Iterable

import jax

KINDS = (  # the first whose pattern a kernel's name holds
  (
    "attention",
    r"sparsek_(forward|query_gradients|key_gradients)|cudnn.*(sdpa|fort_native|compute_dot_do_o|convert_dq)|flash|splash",
  ),
  ("thresholds, lists, gathers", r"sparsek_|\bsort"),
  ("matrix products", r"nvjet|gemm|cutlass|cublas|convolution|\bdot"),
  ("copies and fills", r"memcpy|memset|^copy"),
  ("all else, by XLA", ""),
)
SHOWN = 12  # kernels that are listed one by one


def kind_of(name: str) -> str:
  return next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))


def kernels(folder: str) -> list[tuple[str, float]]:
  """(name, milliseconds) of every kernel that ran on this process's accelerators in the newest
  trace under a folder; none where only a CPU was traced.
  """
  path = max(
    glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True),
    key=os.path.getmtime,
    default=None,
  )
  if path is None:
    return []
  lines = (
    line
    for plane in jax.profiler.ProfileData.from_file(path).planes
    if plane.name.startswith("/device:")
    for line in plane.lines
  )
  return [
    (event.name, event.duration_ns / 1e6)
    for line in lines
    if line.name.startswith("Stream") or line.name == "XLA Ops"
    for event in line.events
  ]


def table(found: Iterable[tuple[str, float]], steps: int) -> list[str]:
  """Lines: milliseconds a step of each kind, then of the kernels that take most; several devices
  add
    up.
  """
  by_kind, by_name, calls = collections.Counter(), collections.Counter(), collections.Counter()
  for name, ms in found:
    # copies of one kernel, and the numbers that XLA gives
    name = re.sub(r"(_mosaic_gpu_kernel|[._]\d+)+$", "", name)
    by_kind[kind_of(name)] += ms / steps
    by_name[name] += ms / steps
    calls[name] += 1
  total = sum(by_kind.values())
  if not total:
    return []
  return [
    f"busy {total:.2f} ms a step",
    *(f"  {ms:8.2f} ms {ms / total:6.1%}  {kind}" for kind, ms in by_kind.most_common()),
    "of these, by kernel:",
    *(
      f"  {ms:8.2f} ms {ms / total:6.1%}  {calls[name] / steps:5.4g} x {name[:80]}"
      for name, ms in by_name.most_common(SHOWN)
    ),
  ]
