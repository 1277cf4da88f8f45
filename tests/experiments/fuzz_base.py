"""Pieces that the formats of `fuzz_formats` share."""

import dataclasses
import json
import pathlib
import random
from collections.abc import Callable
from typing import Any

from sparsek.errors import RunError, UsageError
from tests.experiments.mutations import mutate_bytes, mutate_json

REFUSALS = (UsageError, RunError)
TEXT = "some text, some more text; "


@dataclasses.dataclass(frozen=True)
class Format:
  """A format to damage.

  Attributes:
    make: writes good files into a folder.
    files: patterns of those of which one is damaged.
    damage: (bytes, rng) -> other bytes.
    read: what the readers say of a folder.
    check: (what they said, the folder, what they say of the good files) -> what is wrong, or None.
  """

  make: Callable[[pathlib.Path], None]
  files: tuple[str, ...]
  damage: Callable[[bytes, random.Random], bytes]
  read: Callable[[pathlib.Path], Any]
  check: Callable[[Any, pathlib.Path, Any], str | None]


def difference(value, now, what: str) -> str | None:
  return (
    None
    if equal(value, now)
    else f"{what}: read {str(value)[:200]}, the file says {str(now)[:200]}"
  )


def equal(a, b) -> bool:
  """Returns whether JSON values are equal: NaN equals itself, and true is not 1."""
  if isinstance(a, bool) != isinstance(b, bool):
    return False
  if isinstance(a, float) and isinstance(b, float) and a != a and b != b:
    return True
  if isinstance(a, dict) and isinstance(b, dict):
    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
  if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
    return len(a) == len(b) and all(map(equal, a, b))
  return a == b


def small_config(**fields):
  from sparsek.config import TransformerConfig

  return TransformerConfig(
    **{
      "vocab_size": 300,
      "num_layers": 1,
      "embed_dim": 8,
      "num_heads": 2,
      "num_kv_heads": 1,
      "head_dim": 4,
      "mlp_dim": 8,
      "k": 4,
      "window": 4,
      "max_positions": 64,
      "implementation": "reference",
      **fields,
    }
  )


def params_of(config):
  import jax

  from sparsek.model.transformer import init_params

  return init_params(config, jax.random.key(0))


def write_model_json(folder: pathlib.Path, config) -> None:
  from sparsek.config import DataConfig
  from sparsek.data.tokenizer import ByteTokenizer

  tokenizer = ByteTokenizer()
  record = {
    "model": dataclasses.asdict(config),
    "data": dataclasses.asdict(DataConfig(data="tokens", seq_len=32, batch_size=2)),
    "tokenizer": {
      "name": tokenizer.name,
      "fingerprint": tokenizer.fingerprint,
      "vocab_size": tokenizer.vocab_size,
    },
  }
  (folder / "model.json").write_text(json.dumps(record, indent=2))


def damage_any(content: bytes, rng: random.Random) -> bytes:
  try:
    json.loads(content)
  except ValueError:
    return mutate_bytes(content, rng)
  return mutate_json(content, rng)
