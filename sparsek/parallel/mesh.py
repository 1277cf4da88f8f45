"""Devices of a run, and how a batch and the parameters are placed on them.

A mesh has three axes. The rows of a batch are split over `data` and `fsdp`, the parameters over
`fsdp`, and the tokens of a row over `context`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsek.errors import UsageError

HostBatch = Mapping[str, np.ndarray]
DATA, FSDP, CONTEXT = AXES = ("data", "fsdp", "context")
ROWS = (DATA, FSDP)  # the axes over which the rows of a batch are split


def check_divides(fsdp: int, context: int, devices: int) -> None:
  """Raises UsageError where a number of devices is not a multiple of fsdp * context."""
  if devices % (fsdp * context):
    raise UsageError(
      f"--fsdp={fsdp} x --context={context} must divide the number of devices, {devices}"
    )


def make_mesh(fsdp: int = 1, context: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a mesh of devices in which `data` takes what `fsdp` and `context` leave.

  The devices along `context`, then those along `fsdp`, are the nearest ones: of a node of GPUs, or
  neighbours in a TPU's torus.

  Args:
    fsdp: parts into which the parameters are split.
    context: parts into which a row's tokens are split.
    devices: all devices by default.
  Raises:
    UsageError: where the number of devices is not a multiple of fsdp * context, or they are of
      several TPU slices.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  check_divides(fsdp, context, count)
  slices = {getattr(device, "slice_index", 0) for device in devices}
  if devices[0].platform == "tpu" and len(slices) > 1:
    raise UsageError(f"the devices are of {len(slices)} TPU slices; a run takes those of one")
  # jax.make_mesh refuses GPUs of several nodes, and to split an axis of a TPU's torus.
  arranged = mesh_utils.create_device_mesh(
    (count // (fsdp * context), fsdp, context), devices, allow_split_physical_axes=True
  )
  return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 3)


def axis_size(axis: str) -> int:
  """Returns the size of a mesh axis inside `jax.shard_map` over it, and 1 elsewhere.

  Layers ask this, so that the same module computes whole rows or a shard of them.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.shape[axis] if axis in mesh.manual_axes else 1


def is_sharded() -> bool:
  """Returns whether this runs inside `jax.shard_map` over more than one device of a mesh."""
  return any(axis_size(axis) > 1 for axis in AXES)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the placement of an array that every device of the mesh holds in full."""
  return NamedSharding(mesh, P())


def batch_specs() -> dict[str, P]:
  """Returns how `jax.shard_map` splits a batch that `sparsek.training.loss.cut_targets` returned.

  Documents are found from the segment ids of whole rows.
  """
  tokens = P(ROWS, CONTEXT)
  return {
    "tokens": tokens,
    "targets": tokens,
    "counted": tokens,
    "segment_ids": P(ROWS),
    "row_index": P(ROWS),
  }


def own_parts(mesh: Mesh) -> tuple[list[int], int]:
  """Returns the parts of a batch that this process holds, and the number of all parts.

  The rows of a batch are cut in as many equal parts as `data` and `fsdp` have devices. Processes
  whose devices differ in `context` only hold the same parts.
  """
  groups = mesh.devices.reshape(-1, mesh.shape[CONTEXT])
  here = jax.process_index()
  own = [i for i, group in enumerate(groups) if any(d.process_index == here for d in group)]
  return own, len(groups)


def put_batch(mesh: Mesh, batch: HostBatch) -> dict[str, jax.Array]:
  """Moves a batch to the devices, its rows split over them.

  Args:
    mesh: all devices.
    batch: the rows of this process's parts (`own_parts`), in their order.
  """
  sharding = NamedSharding(mesh, P(ROWS))
  if mesh.is_multi_process:
    return {name: _put_own_rows(mesh, sharding, rows) for name, rows in batch.items()}
  return jax.device_put(dict(batch), sharding)


def _put_own_rows(mesh: Mesh, sharding: NamedSharding, rows: np.ndarray) -> jax.Array:
  parts, num_parts = own_parts(mesh)
  size = len(rows) // len(parts)  # of a part
  of_part = dict(zip(parts, np.split(rows, len(parts))))

  def part_at(index: Any) -> np.ndarray:
    return of_part[(index[0].start or 0) // size]

  return jax.make_array_from_callback((size * num_parts, *rows.shape[1:]), sharding, part_at)


@functools.cache
def _make_first_row(mesh: Mesh) -> Callable:
  def first_row(batch):
    return {name: rows[:1] for name, rows in batch.items()}

  return jax.jit(first_row, out_shardings=replicated(mesh))


def first_row(mesh: Mesh, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns the first row of a batch that `put_batch` has moved, on every device."""
  return _make_first_row(mesh)(batch)
