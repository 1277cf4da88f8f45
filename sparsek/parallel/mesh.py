"""The devices of a run and where a batch and the parameters lie on them."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = "batch"  # the mesh axis


def make_mesh() -> Mesh:
  """All devices along one axis, over which the rows of a batch are spread."""
  return jax.make_mesh((jax.device_count(),), (BATCH,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Moves a batch to the devices, its rows spread over them."""
  return jax.device_put(batch, NamedSharding(mesh, P(BATCH)))
