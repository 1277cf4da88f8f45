"""Parameters split over `fsdp`: which axis of each, and how a layer gathers what it computes with.

A parameter is split along its largest axis that the mesh axis `fsdp` divides, and is replicated
where there is none. A layer gathers all its parameters in one collective just before it runs; the
backward pass sums their gradients over all devices in one more, and leaves each device its part.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from sparsek.parallel.mesh import AXES, CONTEXT, DATA, FSDP, axis_size, is_sharded

STACKED = "layers"  # the name above parameters whose first axis counts layers


def split_axis(shape: Sequence[int], parts: int) -> int | None:
  """Returns the largest axis that `parts` divides, the first of equal ones; None for no axis."""
  fitting = [axis for axis, size in enumerate(shape) if size and size % parts == 0]
  return max(fitting, key=lambda axis: shape[axis], default=None) if parts > 1 else None


def _spec(path: tuple, leaf: Any, parts: int) -> P:
  stacked = any(getattr(key, "key", None) == STACKED for key in path)
  axis = split_axis(leaf.shape[stacked:], parts)
  return P() if axis is None else P(*[None] * (stacked + axis), FSDP)


def partition_specs(tree: Any, parts: int) -> Any:
  """Returns how the leaves of a tree of parameters are split over `fsdp`, a tree of PartitionSpec.

  The tree may also be an optimizer's state: moments lie like their parameters.

  Args:
    tree: arrays or shapes. Under the name "layers" the first axis counts layers and stays whole.
    parts: the size of `fsdp`.
  """
  return jax.tree_util.tree_map_with_path(lambda path, leaf: _spec(path, leaf, parts), tree)


def placements(mesh: Mesh | None, tree: Any) -> Any:
  """Returns the sharding of each leaf of a tree of parameters or moments: on a mesh, or, without
  one, on the first device.
  """
  if mesh is None:
    first = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: first, tree)
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec), partition_specs(tree, mesh.shape[FSDP])
  )


def computed_on(mesh: Mesh | None, function: Callable, *args: Any) -> Any:
  """Returns function(*args), compiled: parameters or moments that lie as `placements` says.

  No device holds more of the result than its part.
  """
  shapes = jax.eval_shape(function, *args)
  return jax.jit(function, out_shardings=placements(mesh, shapes))(*args)


class _Leaf(NamedTuple):
  """The axis along which a parameter is split, or None; and the shape of its part."""

  axis: int | None
  shape: tuple[int, ...]


def gather(params: Any, specs: Any = None, x: Any = None) -> tuple[Any, Any]:
  """Returns (whole parameters, x), inside `jax.shard_map` over devices that hold a part of each.

  The transpose sums gradients over the whole mesh. It passes x's on when this device's share of the
  parameters' is computed: else the compiler may put that off to the end of the backward pass, and
  keep the activations of all layers until then. Elsewhere `gather` changes nothing.

  Args:
    params: a tree of this device's parts.
    specs: how they are split, as from `partition_specs`; None where `fsdp` has the size 1.
    x: the input of the layer that has these parameters, or None.
  """
  if not is_sharded():
    return params, x
  leaves, structure = jax.tree.flatten(params)
  axes = [None] * len(leaves) if specs is None else map(_axis, jax.tree.leaves(specs))
  layout = tuple(_Leaf(axis, leaf.shape) for axis, leaf in zip(axes, leaves, strict=True))
  whole, x = _gather(layout, tuple(leaves), x)
  return jax.tree.unflatten(structure, whole), x


def _axis(spec: P) -> int | None:
  return tuple(spec).index(FSDP) if FSDP in tuple(spec) else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(layout, leaves, x):
  whole = list(leaves)
  for dtype in sorted({leaf.dtype for leaf in leaves}, key=str):
    split = [i for i, x in enumerate(leaves) if x.dtype == dtype and layout[i].axis is not None]
    if split:
      parts = [jnp.moveaxis(leaves[i], layout[i].axis, 0).reshape(-1) for i in split]
      gathered = lax.all_gather(jnp.concatenate(parts), FSDP)
      sizes = [part.size for part in parts]
      for i, flat in zip(split, _cut(gathered, sizes), strict=True):
        axis, shape = layout[i]
        front = (-1, *shape[:axis], *shape[axis + 1 :])
        whole[i] = jnp.moveaxis(flat.reshape(front), 0, axis)
  return tuple(whole), x


def _cut(x: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
  """Cuts the last axis of x into parts of these sizes."""
  ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
  return [lax.slice_in_dim(x, end - size, end, axis=-1) for size, end in zip(sizes, ends)]


def _gather_forward(layout, leaves, x):
  return _gather(layout, *jax.tree.map(lambda primal: primal.value, (leaves, x))), None


def _gather_backward(layout, _, cotangents):
  """Sums the gradients of parameters that learn; the others have symbolic zeros."""
  gradients, d_x = cotangents
  is_zero = lambda x: x is None or isinstance(x, SymbolicZero)
  learned = [i for i, gradient in enumerate(gradients) if not is_zero(gradient)]
  split = [i for i in learned if layout[i].axis is not None]
  whole = [i for i in learned if layout[i].axis is None]
  front = lambda i: jnp.moveaxis(gradients[i], layout[i].axis, 0).reshape(axis_size(FSDP), -1)
  rows = [front(i) for i in split]
  flats = [gradients[i].reshape(-1) for i in whole]
  sums = {}
  if split:
    sums["split"] = jnp.concatenate(rows, axis=1)
  if whole:
    sums["whole"] = jnp.concatenate(flats)
  if sums and not is_zero(d_x):
    sums, d_x = lax.optimization_barrier((sums, d_x))
  result: list[Any] = [None] * len(layout)
  if split:
    total = _sum_over(lax.psum_scatter(sums["split"], FSDP), (DATA, CONTEXT))
    for i, flat in zip(split, _cut(total, [row.shape[1] for row in rows]), strict=True):
      axis, shape = layout[i]
      result[i] = jnp.moveaxis(
        flat.reshape(shape[axis], *shape[:axis], *shape[axis + 1 :]), 0, axis
      )
  if whole:
    total = _sum_over(sums["whole"], AXES)
    for i, flat in zip(whole, _cut(total, [flat.size for flat in flats]), strict=True):
      result[i] = flat.reshape(layout[i].shape)
  return tuple(result), None if is_zero(d_x) else d_x


def _sum_over(x: jax.Array, axes: Sequence[str]) -> jax.Array:
  axes = tuple(axis for axis in axes if axis_size(axis) > 1)
  return lax.psum(x, axes) if axes else x


_gather.defvjp(_gather_forward, _gather_backward, symbolic_zeros=True)
