"""Comparison of the parameters in a checkpoint with those that a model needs, as a table."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax

from sparsek.command_line.model_fields import as_flag
from sparsek.config import TransformerConfig

Shapes = Mapping[str, tuple[int, ...]]  # "layers_0/attention/query/kernel" -> shape

# No parameter's shape depends on these: a checkpoint can be restored with other values of them.
FREE_FIELDS = (
  "k",
  "window",
  "gate",
  "dtype",
  "remat",
  "implementation",
  "norm_eps",
  "rope_theta",
  "rope_fraction",
  "rope_scaling",
  "parallel_residual",
  "scorer_init_scale",
  "scorer_init_slope",
  "scorer_normalize",
  "scorer_noise",
  "scorer_loss_queries",
  "scorer_loss_kind",
  "lora_alpha",
)


def parameter_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Returns path -> shape of the leaves of a tree.

  The leaves may be arrays, jax.ShapeDtypeStruct or metadata of a checkpoint.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
  return {
    "/".join(str(getattr(key, "key", key)) for key in path): tuple(leaf.shape)
    for path, leaf in leaves
  }


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Parameters of a checkpoint beside those of a model.

  Attributes:
    saved, wanted: shapes in the checkpoint and in the model.
  """

  saved: Shapes
  wanted: Shapes

  @property
  def status(self) -> dict[str, str]:
    """The status of each parameter, by path.

    It is "loaded", "missing" (not in the checkpoint), "unused" (not in the model) or "other shape".
    """
    both = {
      path: "loaded" if shape == self.saved[path] else "other shape"
      for path, shape in self.wanted.items()
      if path in self.saved
    }
    missing = {path: "missing" for path in self.wanted if path not in self.saved}
    return {**both, **missing, **{path: "unused" for path in self.saved if path not in self.wanted}}

  @property
  def fits(self) -> bool:
    """True where the checkpoint has exactly the parameters of the model."""
    return set(self.status.values()) <= {"loaded"}

  def table(self) -> str:
    """Returns a table with a line per parameter; those that do not fit come first.

    Parameters that differ only in the number of their layer share a line.
    """
    groups: dict[tuple, list[str]] = {}
    for path, status in self.status.items():
      there, here = self.saved.get(path), self.wanted.get(path)
      groups.setdefault((status, re.sub(r"(?<=_)\d+", "*", path), there, here), []).append(path)
    order = ("other shape", "missing", "unused", "loaded")
    rows = [("status", "parameter", "checkpoint", "this model")]
    for (status, pattern, there, here), paths in sorted(
      groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])
    ):
      name = paths[0] if len(paths) == 1 else f"{pattern} ({len(paths)} layers)"
      rows.append((status, name, _shape_text(there), _shape_text(here)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
      "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
      for row in rows
    )


def _shape_text(shape: tuple[int, ...] | None) -> str:
  return "-" if shape is None else "x".join(map(str, shape)) or "scalar"


def differing_fields(
  saved: TransformerConfig, wanted: TransformerConfig
) -> dict[str, tuple[object, object]]:
  """Returns the configuration fields whose values differ: name -> (saved, wanted)."""
  names = [field.name for field in dataclasses.fields(TransformerConfig)]
  return {
    name: (getattr(saved, name), getattr(wanted, name))
    for name in names
    if getattr(saved, name) != getattr(wanted, name)
  }


def explain_architecture(saved: TransformerConfig, wanted: TransformerConfig) -> str:
  """Returns the flags that explain why parameters do not fit: "--embed_dim=32 here, 16 there".

  Fields that no parameter's shape depends on are left out.
  """
  show = lambda value: ",".join(value) if isinstance(value, tuple) else value
  differing = {
    name: values
    for name, values in differing_fields(saved, wanted).items()
    if name not in FREE_FIELDS
  }
  return "; ".join(
    f"{as_flag(name)}={show(here)} here, {show(there)} there"
    for name, (there, here) in differing.items()
  )
