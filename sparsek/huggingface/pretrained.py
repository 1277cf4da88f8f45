"""Models in Hugging Face's folders: `load` reads one as a Transformer, `save` writes one, dense or
SPARSEK.

A folder holds config.json, model.safetensors (or shards and their index) and tokenizer.json.
Families: `sparsek.huggingface.families.FAMILIES`. What a family has no words for goes into the
section "sparsek" of config.json, and parameters that it does not know (scorers) are saved as
"sparsek.layers.0.attention.scorer...": transformers reads such a folder as the dense model that it
was made from, and `load` as what it is.
"""

import functools
import json
import math
import os
import re
import shutil

import jax
import numpy as np

from sparsek.config import TransformerConfig, check_choice
from sparsek.errors import UsageError
from sparsek.huggingface import safetensors
from sparsek.huggingface.families import (
  ARCHITECTURE,
  FAMILIES,
  IGNORED_TENSORS,
  Layout,
  describe,
  layouts,
  read_config,
)
from sparsek.model import lora
from sparsek.model.transformer import Params, init_params
from sparsek.runs.checkpoint import abstract_params
from sparsek.runs.parameter_table import FREE_FIELDS, Comparison, parameter_shapes
from sparsek.storage.files import read_json_object
from sparsek.storage.new_folder import new_folder

CONFIG = "config.json"
PARAMETER_DTYPES = ("float32", "bfloat16", "float16", None)
ALIGNMENT = 64  # of buffers that JAX takes over on a CPU instead of copying them
PREFIX = "hf:"  # of a folder as --init_from
TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "chat_template.jinja",
)
OURS = "sparsek."  # before the names of parameters that no family knows


def load_config(folder: str) -> TransformerConfig:
  """The model of a folder, without its parameters. Raises UsageError as `load` does."""
  path = os.path.join(folder, CONFIG)
  return read_config(read_json_object(path), path)


def load(
  folder: str,
  *,
  dtype: str | None = "float32",
  config: TransformerConfig | None = None,
  key: jax.Array | None = None,
  sharding=None,
  progress=iter,
) -> tuple[TransformerConfig, Params]:
  """Reads a model.

  Attention is as config.json says: full or of a sliding window, or that of its section "sparsek".
  Activations (`config.dtype`) are bfloat16 where the checkpoint says so, else float32;
  `dataclasses.replace(config, dtype=...)` changes them.

  Args:
    folder: with config.json and safetensors. Nothing outside it is read, and no code of it is run.
    dtype: of the parameters: "float32" is what training and checkpoints want; None keeps that of
      each tensor (float64 becomes float32), so that memory is the checkpoint's.
    config: a model of the same architecture to read it as, with SPARSEK attention for example.
      Parameters that the folder lacks (scorers) are drawn with `key` as `init_params` draws them,
      and scorers that the model lacks are left out.
    key: PRNG key, for `config`.
    sharding: of every parameter; None puts them on the first device.
    progress: wraps the list of parameters that are read, as tqdm does.
  Returns:
    (config, params), without `config` with layers unstacked unless the section "sparsek" says
    otherwise. Beside the parameters it needs memory for a few blocks of 16 MiB
    (tests/huggingface/pretrained_test.py holds it to 1.3 times the checkpoint).
  Raises:
    UsageError (a ValueError): for a folder that is damaged, incomplete or hostile, tensors that are
    missing, left over, of another shape or not finite,
      and fields of config.json with no counterpart here; names the file and what is wrong with it.
  """
  check_choice("dtype", dtype, PARAMETER_DTYPES)
  path = os.path.join(folder, CONFIG)
  files = safetensors.open_folder(folder)
  fields = read_json_object(path)
  there = read_config(fields, path)
  converted, config = config is not None, there if config is None else config
  fixed = (
    set(ARCHITECTURE)
    - set(FREE_FIELDS)
    - ({"max_positions"} if config.positions != "learned" else set())
  )
  differ = [
    f"{field}={getattr(config, field)} here, {getattr(there, field)} there"
    for field in ARCHITECTURE
    if field in fixed and getattr(config, field) != getattr(there, field)
  ]
  if differ:
    raise UsageError(f"{folder} holds another model than the one asked for: {'; '.join(differ)}")
  tensors = {name: file.tensors[name] for name, file in files.items()}
  _check_sizes(config, tensors, path)
  shapes = parameter_shapes(abstract_params(config))
  wanted = _layouts(config, fields["model_type"], shapes, tensors)
  leaves = {}
  if converted:
    known = {layout.name for layout in wanted.values()}
    files = {
      name: file for name, file in files.items() if name in known or not name.startswith(OURS)
    }
    names = {
      leaf: [wanted[ours].name for _, ours in _pieces(config, leaf, shape)]
      for leaf, shape in shapes.items()
    }
    new = [
      leaf
      for leaf in shapes
      if any(name.startswith(OURS) and name not in files for name in names[leaf])
    ]
    leaves = _new_parameters(config, new, key, dtype, sharding)
    shapes = {leaf: shape for leaf, shape in shapes.items() if leaf not in leaves}
  _check_tensors(folder, config, shapes, wanted, files)
  for leaf, shape in progress(list(shapes.items())):
    pieces = _pieces(config, leaf, shape)
    stored = tensors[wanted[pieces[0][1]].name].dtype
    array = _aligned_empty(shape, np.dtype(dtype or (stored if stored.itemsize < 8 else "float32")))
    for place, ours in pieces:
      _read(array[place], wanted[ours], _sizes(config), files[wanted[ours].name])
    leaves[leaf] = jax.device_put(array, sharding)
    del array
  return config, _nested(leaves)


def save(
  folder: str,
  config: TransformerConfig,
  params: Params,
  *,
  family: str | None = None,
  fields: dict | None = None,
  tokenizer: str | None = None,
  max_shard_bytes: int = 5 * 10**9,
  progress=iter,
) -> None:
  """Writes a model, tensor by tensor, in the dtypes of its parameters: `load(folder, dtype=None)`
  gives them back bit by bit.

  Args:
    folder: appears when all is written, or not at all; must not exist or be empty.
    config, params: the model; adapters are merged.
    family: a key of FAMILIES; None takes the one whose config.json says most.
    fields: further fields of config.json, such as eos_token_id.
    tokenizer: a folder whose tokenizer is copied.
    max_shard_bytes: size of a file; larger models are split.
    progress: wraps the list of tensors of each file that is written.
  Raises:
    UsageError: where no family holds such a model, the parameters are another model's, or the
      folder is not empty or cannot be made.
    RunError: where writing fails, as on a full disk.
  """
  described = describe(config, family, str(params["embed"]["embedding"].dtype))
  comparison = Comparison(parameter_shapes(params), parameter_shapes(abstract_params(config)))
  if not comparison.fits:
    raise UsageError(f"params are not those of this configuration\n{comparison.table()}")
  params, config = lora.merge(config, params), lora.merged_config(config)
  leaves = {
    "/".join(key.key for key in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  there, stored = {}, {}
  shapes = parameter_shapes(params)
  for name, shape in shapes.items():
    for place, ours in _pieces(config, name, shape):
      stored[ours] = leaves[name], place
  for ours, layout in _layouts(config, described["model_type"], shapes, None).items():
    there.setdefault(layout.name, []).append((layout, *stored[ours]))
  sizes = _sizes(config)
  tensors = {}
  for name, parts in there.items():
    parts.sort(key=lambda part: part[0].part or 0)
    layout, leaf, place = parts[0]
    shape = _shape(layout, sizes) if layout.there else leaf.shape[0 if place is Ellipsis else 1 :]
    tensors[name] = safetensors.Pending(
      np.dtype(leaf.dtype), shape, functools.partial(_join, parts, shape)
    )
  with new_folder(folder) as unfinished:
    safetensors.write_folder(unfinished, tensors, max_shard_bytes, progress)
    with open(os.path.join(unfinished, CONFIG), "w", encoding="utf-8") as file:
      json.dump({**described, **(fields or {})}, file, indent=2)
      file.write("\n")
    if tokenizer is not None:
      copy_tokenizer(tokenizer, unfinished)


def _new_parameters(
  config: TransformerConfig, leaves: list[str], key, dtype: str | None, sharding
) -> dict[str, jax.Array]:
  """Those of `init_params` with these paths; the others are never made."""
  if not leaves:
    return {}
  if key is None:
    raise ValueError(
      f"key=None: the folder lacks {len(leaves)} parameters ({leaves[0]}, ...), and "
      "drawing them needs a PRNG key"
    )

  def draw(key):
    flat = {
      "/".join(entry.key for entry in path): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(init_params(config, key))
    }
    return {leaf: flat[leaf].astype(dtype or "float32") for leaf in leaves}

  return jax.jit(draw, out_shardings=sharding)(key)


def _sizes(config: TransformerConfig) -> dict[str, int]:
  return {
    "V": config.vocab_size,
    "P": config.max_positions,
    "E": config.embed_dim,
    "H": config.num_heads,
    "G": config.num_kv_heads,
    "D": config.head_dim,
    "F": config.mlp_dim,
    "3": 3,
  }


def _shape(layout: Layout, sizes: dict[str, int]) -> tuple[int, ...]:
  return tuple(math.prod(sizes[letter] for letter in group) for group in layout.there)


def _pieces(config: TransformerConfig, leaf: str, shape: tuple[int, ...]) -> list[tuple]:
  """[(index, path)]: leaf[index] is the parameter `path` of the model with layers unstacked."""
  stacked = re.fullmatch(r"layers/blocks_(\d+)/(.*)", leaf)
  if not stacked:
    return [(Ellipsis, leaf)]
  return [
    (group, f"layers_{group * len(config.attention) + int(stacked[1])}/{stacked[2]}")
    for group in range(shape[0])
  ]


def _layouts(config: TransformerConfig, family: str, shapes: dict, tensors) -> dict[str, Layout]:
  """Path of every parameter (layers unstacked) -> where it lies in the tensors of a folder; a bare
  model's names lack the family's prefix.
  """
  known, prefix = layouts(FAMILIES[family], config.num_layers), FAMILIES[family].prefix
  bare = tensors is not None and not any(name.startswith(prefix) for name in tensors)
  found = {}
  for leaf, shape in shapes.items():
    for _, ours in _pieces(config, leaf, shape):
      layout = known.get(
        ours, Layout(OURS + ours.replace("/", ".").replace("layers_", "layers."), (), "", None)
      )
      found[ours] = layout._replace(name=layout.name.removeprefix(prefix)) if bare else layout
  return found


def _check_sizes(config: TransformerConfig, tensors, path: str) -> None:
  """Before any shape is made of them: sizes that cannot be those of these tensors."""
  numbers = sum(math.prod(tensor.shape) for tensor in tensors.values())
  names = ["vocab_size", "mlp_dim", "num_heads", "head_dim"]
  names += ["max_positions"] if config.positions == "learned" else []
  for name in names:  # each with embed_dim in one matrix
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


def _check_tensors(
  folder: str, config: TransformerConfig, shapes: dict, wanted: dict[str, Layout], files
) -> None:
  """Raises UsageError unless the tensors are those that the model needs."""
  sizes, expected = _sizes(config), {}
  for leaf, shape in shapes.items():
    for place, path in _pieces(config, leaf, shape):
      layout = wanted[path]
      expected[layout.name] = (
        _shape(layout, sizes) if layout.there else shape[0 if place is Ellipsis else 1 :]
      )
  missing = [name for name in expected if name not in files]
  if missing:
    raise UsageError(
      f"{folder} lacks {len(missing)} of the {len(expected)} tensors that its {CONFIG} "
      f"asks for: {', '.join(missing[:5])}"
    )
  for name, shape in expected.items():
    tensor = files[name].tensors[name]
    if tensor.shape != tuple(shape):
      raise UsageError(
        f"{files[name].path}: tensor {name!r} has shape {tensor.shape}, and {CONFIG} "
        f"asks for {tuple(shape)}"
      )
    if tensor.dtype.kind not in "fV" or tensor.dtype.itemsize < 2:
      raise UsageError(
        f"{files[name].path}: tensor {name!r} has dtype {tensor.dtype}, expected float32, "
        "float16 or bfloat16; quantised models are not read"
      )
  left = [name for name in files if name not in expected and not name.endswith(IGNORED_TENSORS)]
  embedding = wanted["embed/embedding"].name
  # some write the tied matrix twice
  for name in [
    name
    for name in left
    if config.tie_embeddings and name in ("lm_head.weight", "embed_out.weight")
  ]:
    if not np.array_equal(files[name].view(name), files[embedding].view(embedding)):
      raise UsageError(
        f"{folder}: tie_word_embeddings is true, and {name} differs from {embedding}"
      )
    for file in (files[name], files[embedding]):
      file.release()
    left.remove(name)
  if left:
    raise UsageError(
      f"{folder} holds {len(left)} tensors that a model of this {CONFIG} has no "
      f"place for: {', '.join(left[:5])!r:.400}"
    )


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  size = math.prod(shape) * dtype.itemsize
  buffer = np.empty(size + ALIGNMENT, np.uint8)
  start = -buffer.ctypes.data % ALIGNMENT
  return buffer[start : start + size].view(dtype).reshape(shape)


def _orders(layout: Layout, sizes: dict[str, int]) -> tuple[list[int], list[int], int | None]:
  """Sizes of the tensor's axes, letter by letter; the order of our axes there; the axis "3"."""
  letters = "".join(layout.there)
  return (
    [sizes[letter] for letter in letters],
    [layout.here.index(letter) for letter in letters if letter != "3"],
    letters.index("3") if layout.part is not None else None,
  )


def _read(
  target: np.ndarray, layout: Layout, sizes: dict[str, int], file: safetensors.SafetensorsFile
) -> None:
  """Fills one of our parameters from its tensor, block by block, so that no more of the file is in
  memory at once.
  """
  source = file.view(layout.name)
  if layout.there:
    shape, order, axis = _orders(layout, sizes)
    source, target = source.reshape(shape), target.transpose(order)
    if axis is not None:
      source = source[(slice(None),) * axis + (layout.part,)]
  for rows in safetensors.blocks(source):
    block = target[rows]
    block[...] = source[rows]
    # Sums of finite numbers are finite in float64 (but for float64 tensors), and any inf or NaN
    # makes them not so.
    if not np.isfinite(np.sum(block, dtype=np.float64)):
      raise UsageError(
        f"{file.path}: tensor {layout.name!r} holds NaN or infinite numbers (as {target.dtype})"
      )
    file.release()


def _join(parts, shape: tuple[int, ...]) -> np.ndarray:
  """One tensor from our parameters: [(layout, leaf, index)]."""
  arrays = []
  for layout, leaf, place in parts:
    array = np.asarray(leaf if place is Ellipsis else leaf[place])
    if layout.there:
      letters = "".join(layout.there).replace("3", "")
      array = array.transpose([layout.here.index(letter) for letter in letters])
    arrays.append(array)
  if len(arrays) == 1:
    return arrays[0].reshape(shape)
  return np.stack(arrays, axis="".join(parts[0][0].there).index("3")).reshape(shape)


def _nested(leaves: dict[str, jax.Array]) -> Params:
  tree = {}
  for path, leaf in leaves.items():
    *folders, name = path.split("/")
    node = tree
    for key in folders:
      node = node.setdefault(key, {})
    node[name] = leaf
  return tree


def copy_tokenizer(source: str, target: str) -> None:
  """Copies the files of a folder that say how text becomes tokens."""
  os.makedirs(target, exist_ok=True)
  for name in TOKENIZER_FILES:
    if os.path.isfile(os.path.join(source, name)):
      shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
