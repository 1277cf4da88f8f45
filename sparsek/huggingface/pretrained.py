"""Models in Hugging Face's folders, dense or SPARSEK: `load` reads one, `save` writes one.

A folder holds config.json, model.safetensors (or shards and their index) and tokenizer.json.
Families: `sparsek.huggingface.families.FAMILIES`. The family "sparsek" expresses every model, and
its folders hold modeling_sparsek.py, with which transformers runs them. Fields that another family
cannot express go into the section "sparsek" of config.json, and parameters that it does not have
(scorers) are saved as "sparsek.layers.0.attention.scorer...". transformers reads such a folder as
the dense model that it was made from; `load` reads it with its SPARSEK attention.
"""

import functools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sparsek.config import TransformerConfig, check_choice
from sparsek.data.tokenizer import load_tokenizer
from sparsek.errors import UsageError
from sparsek.huggingface import safetensors, tokenizer_files
from sparsek.huggingface.config_fields import ARCHITECTURE
from sparsek.huggingface.config_reading import read_config
from sparsek.huggingface.config_writing import MODELLING, describe
from sparsek.huggingface.families import SPARSE
from sparsek.huggingface.model_card import CARD
from sparsek.huggingface.safetensors import SafetensorsFile
from sparsek.huggingface.tensor_layouts import (
  Layout,
  Piece,
  StoredPiece,
  aligned_empty,
  axis_sizes,
  check_sizes,
  check_tensors,
  is_scorer,
  join_tensor,
  model_layouts,
  pieces,
  read_tensor,
  tensor_shape,
)
from sparsek.model import lora
from sparsek.model.transformer import Params, init_params
from sparsek.parallel.sharding import computed_on, placements
from sparsek.runs.checkpoint import abstract_params
from sparsek.runs.parameter_table import FREE_FIELDS, Comparison, parameter_shapes
from sparsek.storage.files import read_json_object
from sparsek.storage.new_folder import new_folder

CONFIG = "config.json"
MODELLING_FILE = os.path.join(os.path.dirname(__file__), f"{MODELLING}.py")  # not imported here
PARAMETER_DTYPES = ("float32", "bfloat16", "float16", None)
PREFIX = "hf:"  # of a folder as --init_from


def load_config(folder: str) -> TransformerConfig:
  """Returns the model of a folder, without its parameters; raises UsageError like `load`."""
  path = os.path.join(folder, CONFIG)
  return read_config(read_json_object(path), path)


def load(
  folder: str,
  *,
  dtype: str | None = "float32",
  config: TransformerConfig | None = None,
  key: jax.Array | None = None,
  mesh: Mesh | None = None,
  progress: Callable = iter,
) -> tuple[TransformerConfig, Params]:
  """Reads a model.

  Attention is full or a sliding window, as config.json says, or that of its section "sparsek".
  Activations (`config.dtype`) are bfloat16 if the checkpoint says so, and float32 otherwise;
  `dataclasses.replace(config, dtype=...)` changes them.

  Args:
    folder: with config.json and safetensors. Nothing outside it is read, and no code in it is run.
    dtype: of the parameters. Training and checkpoints need "float32"; None keeps the dtype of each
      tensor (float64 becomes float32), so that memory is that of the checkpoint.
    config: a model of the same architecture that is to have these parameters, for example with
      SPARSEK attention; None: the model that config.json describes. Parameters that the folder
      lacks (scorers) are initialised with `key` as by `init_params`, and scorers that the model
      lacks are ignored.
    key: PRNG key, for `config`.
    mesh: devices over which they are spread; None puts them on the first device.
    progress: wraps the list of parameters that are read, as tqdm does.
  Returns:
    (config, params); without `config`, the layers are not stacked unless the section "sparsek" says
    so. Beside the parameters it needs memory for a few blocks of 16 MiB
    (tests/huggingface/pretrained_test.py limits it to 1.3 times the checkpoint).
  Raises:
    UsageError (a ValueError): for a folder that is damaged, incomplete or hostile, tensors that are
      missing, superfluous, of another shape or not finite, and fields of config.json that this
      library does not support; names the file and what is wrong with it.
  """
  check_choice("dtype", dtype, PARAMETER_DTYPES)
  path = os.path.join(folder, CONFIG)
  files = safetensors.open_folder(folder)
  fields = read_json_object(path)
  stored_config = read_config(fields, path)
  is_converted = config is not None
  config = stored_config if config is None else config
  _check_same_architecture(folder, config, stored_config)
  tensors = {name: file.tensors[name] for name, file in files.items()}
  check_sizes(config, tensors, path)
  shapes = parameter_shapes(abstract_params(config))
  wanted = model_layouts(config, fields["model_type"], shapes, tensors)
  leaves: dict[str, jax.Array] = {}
  if is_converted:
    known = {layout.name for layout in wanted.values()}
    files = {name: file for name, file in files.items() if name in known or not is_scorer(name)}
    new = _leaves_to_initialise(config, shapes, wanted, files)
    leaves = _new_parameters(config, new, key, dtype, mesh)
    shapes = {leaf: shape for leaf, shape in shapes.items() if leaf not in leaves}
  check_tensors(folder, CONFIG, config, shapes, wanted, files)
  where = _flat(placements(mesh, abstract_params(config)))

  def read(target: np.ndarray, name: str) -> None:
    read_tensor(target, wanted[name], axis_sizes(config), files[wanted[name].name])

  for leaf, shape in progress(list(shapes.items())):
    parts = pieces(config, leaf, shape)
    stored_dtype = tensors[wanted[parts[0].path].name].dtype
    kept_dtype = stored_dtype if stored_dtype.itemsize < 8 else np.dtype("float32")
    kept_dtype = kept_dtype if dtype is None else np.dtype(dtype)
    leaves[leaf] = _read_onto(where[leaf], shape, kept_dtype, parts, read)
  return config, _nested(leaves)


def _read_onto(
  sharding: jax.sharding.Sharding,
  shape: tuple[int, ...],
  dtype: np.dtype,
  parts: Sequence[Piece],
  read: Callable[[np.ndarray, str], None],
) -> jax.Array:
  """Reads a parameter piece by piece; the host holds the devices' parts of it and one piece.

  Args:
    sharding: of the parameter.
    shape, dtype: of the whole.
    parts: the pieces, of a layer each.
    read: fills an array from the piece of a name.
  """
  indices = sharding.addressable_devices_indices_map(shape)
  shard_shape = sharding.shard_shape(shape)
  shards = {str(index): aligned_empty(shard_shape, dtype) for index in indices.values()}
  for item, name in parts:
    if shard_shape == shape:
      (shard,) = shards.values()
      read(shard[item], name)
      continue
    piece = np.empty(shape if item is ... else shape[1:], dtype)
    read(piece, name)
    for index in {str(index): index for index in indices.values()}.values():
      assert index is not None
      shards[str(index)][item] = piece[index if item is ... else index[1:]]
  arrays = [jax.device_put(shards[str(index)], device) for device, index in indices.items()]
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def save(
  folder: str,
  config: TransformerConfig,
  params: Params,
  *,
  family: str | None = None,
  dense: bool = False,
  fields: dict[str, Any] | None = None,
  tokenizer: str | None = None,
  card: str | None = None,
  max_shard_bytes: int = 5 * 10**9,
  progress: Callable = iter,
) -> None:
  """Writes a model, tensor by tensor, in the dtypes of its parameters.

  `load(folder, dtype=None)` returns exactly the same parameters.

  Args:
    folder: must not exist or be empty; appears when everything is written, or not at all.
    config, params: the model; adapters are merged.
    family: a key of FAMILIES. None chooses "sparsek" for a SPARSEK model, with the file that
      transformers runs it with, unless that file lacks a kind of attention or a scorer of it; else
      the dense one whose config.json can express most.
    dense: with family=None, choose a dense one for a SPARSEK model too.
    fields: further fields of config.json, such as eos_token_id.
    tokenizer: a folder whose tokenizer is copied, or "byte"; tokenizer_config.json is completed, so
      that transformers' AutoTokenizer pads on the left and knows the end of a text.
    card: contents of README.md, or None.
    max_shard_bytes: size of a file; larger models are split.
    progress: wraps the list of tensors of each file that is written.
  Raises:
    UsageError: if no family can hold the model, the parameters belong to another model, or the
      folder is not empty or cannot be made.
    RunError: if writing fails, as on a full disk.
  """
  described = describe(config, family, str(params["embed"]["embedding"].dtype), dense)
  ours = None if tokenizer is None else load_tokenizer(tokenizer)
  comparison = Comparison(parameter_shapes(params), parameter_shapes(abstract_params(config)))
  if not comparison.fits:
    raise UsageError(f"params are not those of this configuration\n{comparison.table()}")
  params, config = lora.merge(config, params), lora.merged_config(config)
  tensors = _pending_tensors(config, params, described["model_type"])
  with new_folder(folder) as unfinished:
    safetensors.write_folder(unfinished, tensors, max_shard_bytes, progress)
    with open(os.path.join(unfinished, CONFIG), "w", encoding="utf-8") as file:
      json.dump({**described, **(fields or {})}, file, indent=2)
      file.write("\n")
    if described["model_type"] == SPARSE:
      shutil.copyfile(MODELLING_FILE, os.path.join(unfinished, os.path.basename(MODELLING_FILE)))
    if card is not None:
      path = os.path.join(unfinished, CARD)
      with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(card)
    if tokenizer is not None and ours is not None:
      tokenizer_files.write(unfinished, tokenizer, ours, config.max_positions)


def _check_same_architecture(
  folder: str, config: TransformerConfig, stored: TransformerConfig
) -> None:
  """Raises UsageError if the parameters in a folder do not fit a configuration."""
  free = {*FREE_FIELDS, *([] if config.positions == "learned" else ["max_positions"])}
  differ = [
    f"{field}={getattr(config, field)} here, {getattr(stored, field)} there"
    for field in ARCHITECTURE
    if field not in free and getattr(config, field) != getattr(stored, field)
  ]
  if differ:
    raise UsageError(f"{folder} holds another model than the one asked for: {'; '.join(differ)}")


def _leaves_to_initialise(
  config: TransformerConfig,
  shapes: dict[str, tuple[int, ...]],
  wanted: dict[str, Layout],
  files: dict[str, SafetensorsFile],
) -> list[str]:
  """Returns our parameters that no family has and that are not in these files."""

  def is_missing(name: str) -> bool:
    return is_scorer(name) and name not in files

  return [
    leaf
    for leaf, shape in shapes.items()
    if any(is_missing(wanted[path].name) for _, path in pieces(config, leaf, shape))
  ]


def _new_parameters(
  config: TransformerConfig,
  leaves: list[str],
  key: jax.Array | None,
  dtype: str | None,
  mesh: Mesh | None,
) -> dict[str, jax.Array]:
  """Returns those parameters of `init_params` that have these paths; the others are not made."""
  if not leaves:
    return {}
  if key is None:
    raise ValueError(
      f"key=None: the folder lacks {len(leaves)} parameters ({leaves[0]}, ...), and "
      "drawing them needs a PRNG key"
    )

  def draw(key):
    flat = _flat(init_params(config, key))
    return {leaf: flat[leaf].astype(dtype or "float32") for leaf in leaves}

  return computed_on(mesh, draw, key)


def _pending_tensors(
  config: TransformerConfig, params: Params, family: str
) -> dict[str, safetensors.Pending]:
  """Returns {name of a tensor: how to make it} of all tensors of a model."""
  leaves, shapes, sizes = _flat(params), parameter_shapes(params), axis_sizes(config)
  piece_of = {
    path: (leaves[leaf], item)
    for leaf, shape in shapes.items()
    for item, path in pieces(config, leaf, shape)
  }
  parts_of: dict[str, list[StoredPiece]] = {}
  for path, layout in model_layouts(config, family, shapes, None).items():
    parts_of.setdefault(layout.name, []).append(StoredPiece(layout, *piece_of[path]))
  tensors = {}
  for name, parts in parts_of.items():
    parts.sort(key=lambda part: part.layout.part or 0)
    layout, leaf, item = parts[0]
    shape = tensor_shape(layout, sizes, leaf.shape, item)
    tensors[name] = safetensors.Pending(
      np.dtype(leaf.dtype), shape, functools.partial(join_tensor, parts, shape)
    )
  return tensors


def _flat(params: Params) -> dict[str, Any]:
  """Returns {path: leaf} of a nested dict."""
  return {
    "/".join(key.key for key in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def _nested(leaves: dict[str, jax.Array]) -> Params:
  """Returns the nested dict of parameters with these paths."""
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *folders, name = path.split("/")
    node = tree
    for key in folders:
      node = node.setdefault(key, {})
    node[name] = leaf
  return tree
