"""Checksums that show whether a checkpoint holds what was saved."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


class DamagedCheckpoint(Exception):
  """A checkpoint that cannot be read in full, or whose contents are not what was saved."""


@jax.jit
def _sums(tree):
  def bits_sum(x):
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

  return jax.tree.map(bits_sum, tree)


def checksums(tree: Any) -> dict[str, int]:
  """Returns path -> the sum modulo 2^32 of the bits of each array.

  The sum does not depend on the devices, and changes with any single bit.
  """
  sums = jax.device_get(_sums(tree))
  return {
    jax.tree_util.keystr(path): int(value)
    for path, value in jax.tree_util.tree_leaves_with_path(sums)
  }


def digest(data_state: Mapping) -> str:
  """Returns a digest of a data state as JSON keeps it, with tuples as lists and keys as strings."""
  saved = json.loads(json.dumps(data_state))
  return hashlib.sha256(json.dumps(saved, sort_keys=True).encode()).hexdigest()


def integrity_record(step: int, arrays: Mapping[str, Any], data_state: Mapping) -> dict:
  """Returns the record that `verify` compares a loaded checkpoint with."""
  sums = {name: checksums(tree) for name, tree in arrays.items()}
  return {"step": step, "data": digest(data_state), "checksums": sums}


def verify(step: int, loaded: Mapping[str, Any], abstract: Mapping[str, Any]) -> None:
  """Compares a loaded checkpoint with its record "integrity", which `integrity_record` made.

  The record of a checkpoint of an earlier version holds checksums of arrays only.

  Args:
    step: of the checkpoint.
    loaded: name -> checkpointable, "integrity" among them.
    abstract: name -> shapes of the arrays that were asked for, None for JSON.
  Raises:
    DamagedCheckpoint: where they differ.
  """
  integrity = loaded["integrity"] if isinstance(loaded["integrity"], dict) else {}
  if integrity.get("step", step) != step:
    raise DamagedCheckpoint(f"its contents are those of step {integrity['step']}")
  if "data" in integrity and "data" in loaded and integrity["data"] != digest(loaded["data"]):
    raise DamagedCheckpoint("the position in the data is not what was saved")
  sums = integrity.get("checksums")
  for name, tree in loaded.items():
    if abstract.get(name) is None:
      continue
    if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree)):
      raise DamagedCheckpoint(f"arrays of {name} are missing")
    if not isinstance(sums, dict) or sums.get(name) != checksums(tree):
      raise DamagedCheckpoint(f"a checksum of {name} differs")
