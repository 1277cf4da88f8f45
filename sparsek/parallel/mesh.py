"""Devices of a run, and how a batch and the parameters are placed on them.

A mesh has three axes. The rows of a batch are split over `data` and `fsdp`, the parameters over
`fsdp`, and the tokens of a row over `context`.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsek.errors import UsageError

HostBatch = Mapping[str, np.ndarray]
DATA, FSDP, CONTEXT = AXES = ("data", "fsdp", "context")
ROWS = (DATA, FSDP)  # the axes over which the rows of a batch are split


def make_mesh(fsdp: int = 1, context: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a mesh of devices in which `data` takes what `fsdp` and `context` leave.

  Args:
    fsdp: parts into which the parameters are split.
    context: parts into which a row's tokens are split.
    devices: all devices by default.
  Raises:
    UsageError: where the number of devices is not a multiple of fsdp * context.
  """
  count = jax.device_count() if devices is None else len(devices)
  if count % (fsdp * context):
    raise UsageError(
      f"--fsdp={fsdp} x --context={context} must divide the number of devices, {count}"
    )
  shape = (count // (fsdp * context), fsdp, context)
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


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
