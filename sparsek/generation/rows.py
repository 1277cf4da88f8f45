"""Texts of a batch spread over the devices of a mesh.

Parameters stay split over `fsdp`: a device gathers a layer when it needs it, and holds the whole
model at no time. The texts, and what is kept of each, are spread over all devices where they are a
multiple of them; otherwise every device computes all texts. Tokens of a text are split in
`sparsek.generation.sharded_prompt` only.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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
    batch = len(jax.tree.leaves(args[1])[0])
    axes = _row_axes(mesh, batch)
    specs = {
      PARAMS: inference_specs(config, mesh.shape[FSDP]),
      ROW: P(axes),
      STEPS: P(None, axes),
      SAME: P(),
    }
    in_specs = tuple(specs[kind] for kind in kinds)
    out_specs = jax.tree.map(specs.__getitem__, result)
    return map_shards(function, mesh, in_specs, out_specs, batch, axes or ())(*args)

  return computed


def map_shards(
  function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any, batch: int, axes: tuple[str, ...]
) -> Callable:
  """Returns what `jax.shard_map` does of a function of arrays [batch, ...] and others.

  No array without elements, which caches have, gets to `jax.shard_map`: XLA's compiler for GPUs
  ends the process there, with JAX 0.11.

  Args:
    function, mesh, in_specs, out_specs: as in `jax.shard_map`.
    batch: number of texts.
    axes: over which they are split.
  """
  shapes_of = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))

  def computed(*args):
    shapes, out_shapes = shapes_of(args), []

    def local(*parts):
      out = function(*_with_empty(parts, shapes, batch // math.prod(map(mesh.shape.get, axes))))
      out_shapes.append(shapes_of(out))
      return _without_empty(out)

    sharded = jax.shard_map(
      local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    out = sharded(*_without_empty(args))
    return _with_empty(out, out_shapes[-1], batch)

  return computed


def _without_empty(tree: Any) -> Any:
  """Replaces arrays without elements by None."""
  return jax.tree.map(lambda x: x if x.size else None, tree)


def _with_empty(tree: Any, shapes: Any, batch: int) -> Any:
  """Undoes `_without_empty`, for this number of texts."""

  def leaf(shape, x):
    if x is not None:
      return x
    # A first axis that is not empty counts texts.
    dims = (batch, *shape.shape[1:]) if shape.shape[0] else shape.shape
    return jnp.zeros(dims, shape.dtype)

  return jax.tree.map(leaf, shapes, tree)
