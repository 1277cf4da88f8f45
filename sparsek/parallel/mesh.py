"""Devices of a run, and how a batch and the parameters are placed on them.

A mesh has three axes. The rows of a batch are split over `data` and `fsdp`, the parameters over
`fsdp`, and the tokens of a row over `context`.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsek.errors import UsageError

HostBatch = Mapping[str, np.ndarray]
DATA, FSDP, CONTEXT = AXES = ("data", "fsdp", "context")
ROWS = (DATA, FSDP)  # the axes over which the rows of a batch are split


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
  if count % (fsdp * context):
    raise UsageError(
      f"--fsdp={fsdp} x --context={context} must divide the number of devices, {count}"
    )
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


def put_batch(mesh: Mesh, batch: HostBatch) -> dict[str, jax.Array]:
  """Moves a batch to the devices, its rows split over them."""
  return jax.device_put(dict(batch), NamedSharding(mesh, P(ROWS)))
