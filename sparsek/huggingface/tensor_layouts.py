"""Conversion between the tensors of a checkpoint and our parameters: layouts, checks and copies."""

import math
import re
from collections.abc import Collection, Mapping
from types import EllipsisType
from typing import NamedTuple

import jax
import numpy as np

from sparsek.attention.scoring import CHANNELS
from sparsek.config import TransformerConfig
from sparsek.errors import UsageError
from sparsek.huggingface import safetensors
from sparsek.huggingface.families import FAMILIES, IGNORED_TENSORS, Layout, layouts
from sparsek.huggingface.safetensors import SafetensorsFile

SPARSEK_PREFIX = "sparsek."  # of the names of parameters that no family knows
ALIGNMENT = 64  # of buffers that JAX uses on a CPU without copying them

Shapes = Mapping[str, tuple[int, ...]]


class Piece(NamedTuple):
  """A part of one of our parameters: `leaf[item]` is the parameter `path` of unstacked layers."""

  item: int | EllipsisType
  path: str


class StoredPiece(NamedTuple):
  """A part of a tensor: `leaf[item]` in this layout."""

  layout: Layout
  leaf: jax.Array
  item: int | EllipsisType


def pieces(config: TransformerConfig, leaf: str, shape: tuple[int, ...]) -> list[Piece]:
  """Returns the parameters of single layers that a parameter holds; itself if it is not stacked."""
  stacked = re.fullmatch(r"layers/blocks_(\d+)/(.*)", leaf)
  if not stacked:
    return [Piece(..., leaf)]
  return [
    Piece(group, f"layers_{group * len(config.attention) + int(stacked[1])}/{stacked[2]}")
    for group in range(shape[0])
  ]


def model_layouts(
  config: TransformerConfig, family: str, shapes: Shapes, tensors: Collection[str] | None
) -> dict[str, Layout]:
  """Returns {parameter (layers unstacked): its layout} of all parameters of a model.

  Args:
    config: the model.
    family: a key of FAMILIES.
    shapes: of the model's parameters.
    tensors: names of the tensors of a folder; those of a bare model lack the family's prefix. None
      for a folder that is written.
  """
  known, prefix = layouts(FAMILIES[family], config.num_layers), FAMILIES[family].prefix
  is_bare = tensors is not None and not any(name.startswith(prefix) for name in tensors)
  result = {}
  for leaf, shape in shapes.items():
    for _, path in pieces(config, leaf, shape):
      unknown = Layout(
        SPARSEK_PREFIX + path.replace("/", ".").replace("layers_", "layers."), (), "", None
      )
      layout = known.get(path, unknown)
      result[path] = layout._replace(name=layout.name.removeprefix(prefix)) if is_bare else layout
  return result


def is_scorer(name: str) -> bool:
  """Returns whether a tensor belongs to a scorer, which other models of the architecture lack."""
  return name.startswith(SPARSEK_PREFIX) or ".self_attn.scorer." in name


def axis_sizes(config: TransformerConfig) -> dict[str, int]:
  """Returns the size of the axis of each letter in a layout."""
  return {
    "V": config.vocab_size,
    "P": config.max_positions,
    "E": config.embed_dim,
    "H": config.num_heads,
    "G": config.num_kv_heads,
    "D": config.head_dim,
    "F": config.mlp_dim,
    "3": 3,
    "S": 1 if config.scorer_shared else config.num_kv_heads,
    "C": CHANNELS,
    "T": (config.scorer_lookback + config.scorer_lookahead + 1) * CHANNELS,
  }


def tensor_shape(
  layout: Layout, sizes: dict[str, int], leaf_shape: tuple[int, ...], item: int | EllipsisType
) -> tuple[int, ...]:
  """Returns the shape of the tensor that holds `leaf[item]` of one of our parameters."""
  if layout.tensor_axes:
    return tuple(math.prod(sizes[letter] for letter in group) for group in layout.tensor_axes)
  return tuple(leaf_shape if item is ... else leaf_shape[1:])


def check_sizes(
  config: TransformerConfig, tensors: Mapping[str, safetensors.Tensor], path: str
) -> None:
  """Raises UsageError if the tensors are too small for a model of these sizes.

  It is called before arrays of these sizes are made.
  """
  numbers = sum(math.prod(tensor.shape) for tensor in tensors.values())
  names = ["vocab_size", "mlp_dim", "num_heads", "head_dim"]
  names += ["max_positions"] if config.positions == "learned" else []
  for name in names:  # each is the size of an axis in a matrix with embed_dim
    size = getattr(config, name)
    if config.embed_dim * size > numbers:
      raise UsageError(
        f"{path} says embed_dim={config.embed_dim}, {name}={size}, but the tensors "
        f"hold {numbers} numbers together"
      )
  if config.num_layers > len(tensors):
    raise UsageError(
      f"{path} says num_layers={config.num_layers}, but there are {len(tensors)} tensors"
    )


def check_tensors(
  folder: str,
  config_name: str,
  config: TransformerConfig,
  shapes: Shapes,
  wanted: Mapping[str, Layout],
  files: Mapping[str, SafetensorsFile],
) -> None:
  """Raises UsageError unless the tensors are exactly those that the model needs.

  Args:
    folder, config_name: of the checkpoint and its configuration, for messages.
    config: the model.
    shapes: of the parameters that are read.
    wanted: their layouts.
    files: {name of a tensor: its file}.
  """
  sizes, expected = axis_sizes(config), {}
  for leaf, shape in shapes.items():
    for item, path in pieces(config, leaf, shape):
      layout = wanted[path]
      expected[layout.name] = tensor_shape(layout, sizes, shape, item)
  missing = [name for name in expected if name not in files]
  if missing:
    raise UsageError(
      f"{folder} lacks {len(missing)} of the {len(expected)} tensors that its {config_name} "
      f"asks for: {', '.join(missing[:5])}"
    )
  for name, shape in expected.items():
    tensor = files[name].tensors[name]
    if tensor.shape != shape:
      raise UsageError(
        f"{files[name].path}: tensor {name!r} has shape {tensor.shape}, and {config_name} "
        f"asks for {shape}"
      )
    if tensor.dtype.kind not in "fV" or tensor.dtype.itemsize < 2:
      raise UsageError(
        f"{files[name].path}: tensor {name!r} has dtype {tensor.dtype}, expected float32, "
        "float16 or bfloat16; quantised models are not read"
      )
  unused = [name for name in files if name not in expected and not name.endswith(IGNORED_TENSORS)]
  if config.tie_embeddings:
    unused = _without_tied_matrix(folder, unused, wanted["embed/embedding"].name, files)
  if unused:
    raise UsageError(
      f"{folder} holds {len(unused)} tensors that a model of this {config_name} has no "
      f"place for: {', '.join(unused[:5])!r:.400}"
    )


def _without_tied_matrix(
  folder: str, names: list[str], embedding: str, files: Mapping[str, SafetensorsFile]
) -> list[str]:
  """Returns the names of tensors except the output matrix, which must be equal to the embedding.

  Some checkpoints hold the tied matrix twice.
  """
  outputs = [name for name in names if name in ("lm_head.weight", "embed_out.weight")]
  for name in outputs:
    if not np.array_equal(files[name].view(name), files[embedding].view(embedding)):
      raise UsageError(
        f"{folder}: tie_word_embeddings is true, and {name} differs from {embedding}"
      )
    for file in (files[name], files[embedding]):
      file.release()
  return [name for name in names if name not in outputs]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Returns an array like `np.empty`, at an address that JAX can use without a copy."""
  size = math.prod(shape) * dtype.itemsize
  buffer = np.empty(size + ALIGNMENT, np.uint8)
  start = -buffer.ctypes.data % ALIGNMENT
  return buffer[start : start + size].view(dtype).reshape(shape)


def read_tensor(
  target: np.ndarray, layout: Layout, sizes: dict[str, int], file: SafetensorsFile
) -> None:
  """Fills one of our parameters from its tensor, block by block to save memory.

  Raises:
    UsageError: for numbers that are not finite.
  """
  source = file.view(layout.name)
  if layout.tensor_axes:
    letters = "".join(layout.tensor_axes)
    source = source.reshape([sizes[letter] for letter in letters])
    target = target.transpose(_our_axes_there(layout))
    if layout.part is not None:
      source = source[(slice(None),) * letters.index("3") + (layout.part,)]
  for rows in safetensors.blocks(source):
    block = target[rows]
    block[...] = source[rows]
    # A sum in float64 is finite if all numbers are (except for float64 tensors), and is not if one
    # of them is inf or NaN.
    if not np.isfinite(np.sum(block, dtype=np.float64)):
      raise UsageError(
        f"{file.path}: tensor {layout.name!r} holds NaN or infinite numbers (as {target.dtype})"
      )
    file.release()


def join_tensor(parts: list[StoredPiece], shape: tuple[int, ...]) -> np.ndarray:
  """Returns the tensor of this shape that holds these parts of our parameters."""
  arrays = []
  for layout, leaf, item in parts:
    array = np.asarray(leaf if item is ... else leaf[item])
    if layout.tensor_axes:
      array = array.transpose(_our_axes_there(layout))
    arrays.append(array)
  if len(arrays) == 1:
    return arrays[0].reshape(shape)
  axis = "".join(parts[0].layout.tensor_axes).index("3")
  return np.stack(arrays, axis=axis).reshape(shape)


def _our_axes_there(layout: Layout) -> list[int]:
  """Returns the numbers of our axes in the order of the tensor's letters."""
  return [layout.our_axes.index(letter) for letter in "".join(layout.tensor_axes) if letter != "3"]
