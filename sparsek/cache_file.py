"""Caches on disk: a .npz file without pickles, with the configuration that it was made under."""

import dataclasses
import json
import os
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsek.cache import Cache, init_cache
from sparsek.config import TransformerConfig
from sparsek.errors import UsageError

FREE_FIELDS = ("implementation", "remat", "scan_layers", "scorer_noise", "scorer_loss_queries", "scorer_init_scale",
               "scorer_init_slope", "lora_rank", "lora_alpha")       # change nothing that a model keeps


def _fields(config: TransformerConfig) -> dict[str, Any]:
  """What a cache depends on, as JSON knows it."""
  fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_FIELDS}
  if config.scorer == "random":
    fields |= {name: getattr(config, name) for name in ("scorer_init_scale", "scorer_init_slope")}
  return json.loads(json.dumps(fields | {"attention": config.layer_terms}))


def save(path: str, config: TransformerConfig, cache: Cache, note: dict[str, Any] | None = None) -> None:
  """Writes a cache to `path`, in one go: a file that was there is replaced when the new one is whole.

  Args:
    config: that the cache was made for.
    cache: from `init_cache`, `prefill` or `decode_step`.
    note: anything that JSON holds, returned by `load`.
  """
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(cache)]
  sizes = {"max_length": _size(config, cache, "full", lambda layer: layer.key.shape[2]),
           "support_size": _size(config, cache, "sparsek", lambda layer: layer.support.shape[2])}
  head = {"config": _fields(config), "note": note, "rows": len(cache.seen), **sizes}
  arrays = {f"leaf_{i}": x.view(np.uint16) if x.dtype == jnp.bfloat16 else x for i, x in enumerate(leaves)}
  with open(path + ".new", "wb") as file:
    np.savez(file, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
  os.replace(path + ".new", path)


def _size(config, cache, kind, size):
  """Of the layers of that kind; None where there is none, or where they differ, as only supports of the default sizes do."""
  sizes = {size(layer) for layer, of in zip(cache.layers, config.layer_kinds) if of == kind}
  return sizes.pop() if len(sizes) == 1 else None


def load(path: str, config: TransformerConfig) -> tuple[Cache, dict[str, Any] | None]:
  """The cache that `save` wrote, and its note.

  Raises:
    UsageError: where the file cannot be read or is none of these, or was made under another configuration, with the fields that differ.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      head = json.loads(file["head"].tobytes())
      leaves = [file[f"leaf_{i}"] for i in range(len(file.files) - 1)]
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise UsageError(f"{path} cannot be read as a cache: {error}") from None
  had, has = head["config"], _fields(config)
  if had != has:
    names = [name for name in has | had if had.get(name) != has.get(name)]
    raise UsageError(f"{path} was saved under " + ", ".join(f"{name}={had.get(name)} (now {has.get(name)})" for name in names))
  empty = jax.eval_shape(lambda: init_cache(config, head["rows"], max_length=head["max_length"], support_size=head["support_size"]))
  wanted, structure = jax.tree.flatten(empty)
  leaves = [x.view(jnp.bfloat16) if kind.dtype == jnp.bfloat16 and x.dtype == np.uint16 else x for x, kind in zip(leaves, wanted)]
  if [(x.shape, x.dtype) for x in leaves] != [(kind.shape, kind.dtype) for kind in wanted]:
    raise UsageError(f"{path} cannot be read as a cache: its arrays are not those of its configuration")
  return jax.tree.unflatten(structure, [jnp.asarray(x) for x in leaves]), head["note"]
