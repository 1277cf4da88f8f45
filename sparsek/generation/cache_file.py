"""Caches on disk: a .npz file without pickles, which holds the configuration of the cache."""

import dataclasses
import functools
import json
import math
import os
import zipfile
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsek.config import TransformerConfig
from sparsek.errors import UsageError
from sparsek.generation.cache import Cache, init_cache
from sparsek.generation.cache_sizes import clip_sizes
from sparsek.generation.cached_attention import parts_of
from sparsek.kernels.sentinels import NOWHERE
from sparsek.storage.files import MAX_JSON, atomic_file, check_regular, parse_json

# fields that do not change a cache
FREE_FIELDS = (
  "implementation",
  "remat",
  "scan_layers",
  "scorer_noise",
  "scorer_loss_queries",
  "scorer_loss_kind",
  "scorer_init_scale",
  "scorer_init_slope",
  "lora_rank",
  "lora_alpha",
)
MAX_SIZE = 2**31  # of a dimension of an array
# Errors of zipfile, zlib and NumPy for files that are damaged or of another kind; RuntimeError for
# an encrypted one.
_UNREADABLE = (
  OSError,
  ValueError,
  KeyError,
  EOFError,
  zipfile.BadZipFile,
  zlib.error,
  NotImplementedError,
  RuntimeError,
  MemoryError,
)


def _fields(config: TransformerConfig) -> dict[str, Any]:
  """Returns the fields that a cache depends on, as JSON values."""
  fields = {
    name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_FIELDS
  }
  if config.scorer == "random":
    fields |= {name: getattr(config, name) for name in ("scorer_init_scale", "scorer_init_slope")}
  return json.loads(json.dumps(fields | {"attention": config.layer_terms}))


def save(
  path: str,
  config: TransformerConfig,
  cache: Cache,
  note: dict[str, Any] | None = None,
  length: int | None = None,
) -> None:
  """Writes a cache to `path` atomically.

  Args:
    path: of the file to make or to replace.
    config: that the cache was made for.
    cache: from `init_cache`, `prefill` or `decode_step`.
    note: JSON values, returned by `load`.
    length: of texts, to which `sparsek.generation.cache_sizes.clip_sizes` clipped the cache's
      sizes; None: they are those of `config`.
  Raises:
    OSError: where it cannot be written; then the file that was at `path` stays.
  """
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(cache)]
  sizes = {
    "max_length": _size(config, cache, "full", lambda layer: layer.key.shape[2]),
    "support_size": _size(config, cache, "sparsek", lambda layer: layer.support.shape[2]),
  }
  head = {
    "config": _fields(config),
    "note": note,
    "rows": len(cache.seen),
    "length": length,
    **sizes,
  }
  arrays: dict[str, Any] = {
    f"leaf_{i}": x.view(np.uint16) if x.dtype == jnp.bfloat16 else x for i, x in enumerate(leaves)
  }
  with atomic_file(path) as file:
    np.savez(file, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)


def _size(config, cache, kind, size):
  """Returns the size that all heads of a kind have, or None where there is none or they differ.

  Only supports of the default sizes differ.
  """
  sizes = {
    size(part)
    for layer, of in zip(cache.layers, config.layer_configs)
    for part, group in zip(parts_of(layer), of.head_groups)
    if group.kind == kind
  }
  return sizes.pop() if len(sizes) == 1 else None


def is_cache(path: str) -> bool:
  """Returns whether a file looks like one that `save` wrote, however damaged its arrays are."""
  try:
    with zipfile.ZipFile(path) as archive:
      return {"head.npy", "leaf_0.npy"} <= set(archive.namelist())
  except _UNREADABLE:
    return False


def load(path: str, config: TransformerConfig) -> tuple[Cache, dict[str, Any] | None, int | None]:
  """Returns the cache that `save` wrote, its note, and the length that its sizes are clipped to.

  Every array is checked to have the size that the configuration needs before it is read.

  Raises:
    UsageError: where the file cannot be read or is not a saved cache, or was saved under another
      configuration, with the fields that differ.
  """
  if os.path.exists(path):
    check_regular(path, "cache")
  try:
    with zipfile.ZipFile(path) as archive:
      head = _read_head(archive)
      _check_config(head["config"], config)
      wanted, structure = jax.tree.flatten(_shapes(head, config))
      leaves = [
        _read_array(archive, f"leaf_{i}.npy", kind.shape, kind.dtype)
        for i, kind in enumerate(wanted)
      ]
  except UsageError as error:
    raise UsageError(f"{path} {error}") from None
  except _UNREADABLE as error:
    reason = str(error)[:200] or type(error).__name__
    raise UsageError(f"{path} cannot be read as a cache: {reason}") from None
  cache = jax.tree.unflatten(structure, list(map(jnp.asarray, leaves)))
  _check_seen(path, head, config, np.asarray(cache.seen))
  return cache, head["note"], head["length"]


def _read_head(archive: zipfile.ZipFile) -> dict:
  """Returns the description that `save` wrote beside the arrays.

  Raises:
    UsageError, ValueError: where a value is missing or of a wrong type.
  """
  text = _read_array(archive, "head.npy", None, np.dtype(np.uint8)).tobytes()
  head = parse_json(text, "cannot be read as a cache: its head")
  needed = {"config", "note", "rows", "max_length", "support_size"}
  if not isinstance(head, dict) or not needed <= set(head):
    raise ValueError("its head is not one of a cache")
  if not isinstance(head["config"], dict):
    raise ValueError("its head holds no configuration")
  head.setdefault("length", None)  # missing in older files, whose sizes are never clipped
  least = {"rows": 1, "max_length": 1, "support_size": 0, "length": 0}
  for name, lowest in least.items():
    absent = head[name] is None and name != "rows"
    if not absent and not (type(head[name]) is int and lowest <= head[name] < MAX_SIZE):
      raise ValueError(
        f"its head has {name}={head[name]!r:.50}, expected a number of at least {lowest}"
      )
  return head


def _check_config(saved: dict, config: TransformerConfig) -> None:
  now = _fields(config)
  if saved != now:
    names = [name for name in now | saved if saved.get(name) != now.get(name)]
    differ = ", ".join(f"{name}={saved.get(name)!s:.80} (now {now.get(name)})" for name in names)
    raise UsageError(f"was saved under {differ:.1000}")


def _shapes(head: dict, config: TransformerConfig) -> Cache:
  """Returns the arrays' shapes and dtypes; raises ValueError where the head lacks a size."""
  if head["length"] is not None:
    config = clip_sizes(config, head["length"])
  if "full" in config.layer_kinds and head["max_length"] is None:
    raise ValueError("its head has no max_length")
  sizes = {name: head[name] for name in ("max_length", "support_size")}
  return jax.eval_shape(functools.partial(init_cache, config, head["rows"], **sizes))


def _read_array(
  archive: zipfile.ZipFile, name: str, shape: tuple[int, ...] | None, dtype: np.dtype
) -> np.ndarray:
  """Returns a member of the archive.

  Args:
    archive: that holds it.
    name: of the member.
    shape: that the array must have; None: one dimension of at most MAX_JSON elements.
    dtype: that it must have; bfloat16 is stored as uint16.
  Raises:
    ValueError: where shape or dtype differ, or the member holds more than the array.
  """
  stored = np.dtype(np.uint16) if dtype == jnp.bfloat16 else dtype
  if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
    raise ValueError(f"{name} is compressed")  # a small file could become an array of any size
  with archive.open(name) as file:
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
      raise ValueError(f"{name} is of version {version} of NumPy's format, expected (1, 0)")
    actual, is_fortran, kind = np.lib.format.read_array_header_1_0(file)
    fits = len(actual) == 1 and actual[0] <= MAX_JSON if shape is None else actual == shape
    if not fits or is_fortran or kind != stored:
      raise ValueError(
        f"{name} is {kind} {str(actual):.100}, expected {stored} "
        f"{'[bytes]' if shape is None else shape}"
      )
    size = math.prod(actual) * stored.itemsize
    content = file.read(size)
    if len(content) != size or file.read(1):  # the checksum is compared at the end
      raise ValueError(
        f"{name} holds {'more' if len(content) == size else 'fewer'} than {size} bytes"
      )
  return np.frombuffer(content, stored).reshape(actual).view(dtype)


def _check_seen(path: str, head: dict, config: TransformerConfig, seen: np.ndarray) -> None:
  """Raises UsageError where rows have seen more tokens than the cache or the model can hold."""
  limits = [NOWHERE]
  if head["length"] is not None:
    limits.append(head["length"])
  if "full" in config.layer_kinds:
    limits.append(head["max_length"])
  if config.positions == "learned":
    limits.append(config.max_positions)
  if not np.all((seen >= 0) & (seen <= min(limits))):
    raise UsageError(
      f"{path} cannot be read as a cache: its texts have {seen.tolist()!s:.100} "
      f"tokens, expected 0 to {min(limits)}"
    )
