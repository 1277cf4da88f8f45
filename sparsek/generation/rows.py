"""Texts of a batch spread over the devices of a mesh.

Parameters stay split over `fsdp`: a device gathers a layer when it needs it, and holds the whole
model at no time. The texts, and what is kept of each, are spread over all devices where they are a
multiple of them; otherwise every device computes all texts. Tokens of a text are split in
`sparsek.generation.sharded_prompt` only.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsek.config import TransformerConfig
from sparsek.generation.inference import inference_specs
from sparsek.parallel.mesh import CONTEXT, DATA, FSDP

PARAMS, ROW, STEPS, SAME = "params", "row", "steps", "same"  # kinds of arguments and results


def without_context(mesh: Mesh | None) -> Mesh | None:
  """Returns a mesh of the same devices, in the same order, that splits no text."""
  if mesh is None or mesh.shape[CONTEXT] == 1:
    return mesh
  return Mesh(mesh.devices, (DATA, FSDP, "replica"), axis_types=(AxisType.Auto,) * 3)


def _row_axes(mesh: Mesh, batch: int) -> tuple[str, ...] | None:
  """Returns the mesh axes over which the texts are spread, None for none."""
  return None if batch % mesh.size else mesh.axis_names


def place_rows(mesh: Mesh | None, tree: Any, batch: int) -> Any:
  """Spreads arrays [batch, ...] over the devices of a mesh; without one they stay as they are."""
  if mesh is None:
    return tree
  return jax.device_put(tree, NamedSharding(mesh, P(_row_axes(mesh, batch))))


def over_rows(
  function: Callable,
  config: TransformerConfig,
  mesh: Mesh | None,
  kinds: tuple[str, ...],
  result: Any,
) -> Callable:
  """Returns a function of texts that computes them on the devices of a mesh.

  Args:
    function: of the texts that are on a device.
    config: of the model.
    mesh: from `without_context`; None returns the function as it is.
    kinds: of the arguments: PARAMS, an InferenceParams; ROW, arrays [B, ...]; STEPS, arrays
      [steps, B]; SAME, arrays without texts. The second argument is of kind ROW.
    result: a tree of kinds.
  """
  if mesh is None:
    return function

  def computed(*args):
    axes = _row_axes(mesh, len(jax.tree.leaves(args[1])[0]))
    specs = {
      PARAMS: inference_specs(config, mesh.shape[FSDP]),
      ROW: P(axes),
      STEPS: P(None, axes),
      SAME: P(),
    }
    return jax.shard_map(
      function,
      mesh=mesh,
      in_specs=tuple(specs[kind] for kind in kinds),
      out_specs=jax.tree.map(specs.__getitem__, result),
      check_vma=False,
    )(*args)

  return computed
