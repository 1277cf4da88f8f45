"""Devices of a run, and how a batch and the parameters are placed on them."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

HostBatch = Mapping[str, np.ndarray]
BATCH = "batch"  # the mesh axis


def make_mesh() -> Mesh:
  """Returns all devices along one axis, over which the rows of a batch are split."""
  return jax.make_mesh((jax.device_count(),), (BATCH,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the placement of an array that every device of the mesh holds in full."""
  return NamedSharding(mesh, P())


def put_batch(mesh: Mesh, batch: HostBatch) -> dict[str, jax.Array]:
  """Moves a batch to the devices, its rows split over them."""
  return jax.device_put(dict(batch), NamedSharding(mesh, P(BATCH)))
