"""Models in Hugging Face's format of the fuzz: made, damaged, read and checked."""

import collections
import json
import pathlib
import struct

import numpy as np

from tests.experiments.fuzz_base import TEXT, damage_any, difference, equal, params_of, small_config
from tests.experiments.mutations import mutate_bytes, mutate_json

# models of others


def make_model(folder):
  from sparsek.data.tokenizer import train_bpe
  from sparsek.huggingface import pretrained

  config = small_config(attention="sliding_window", num_layers=2)
  pretrained.save(str(folder / "model"), config, params_of(config), fields={"eos_token_id": 256})
  train_bpe([TEXT * 9], 280).save(str(folder / "model"))
  (folder / "model" / "generation_config.json").write_text(
    json.dumps({"eos_token_id": [256, 2], "do_sample": False})
  )
  (folder / "model" / "tokenizer_config.json").write_text(
    json.dumps({"eos_token": "<|endoftext|>", "add_bos_token": False, "model_max_length": 64})
  )


def make_sharded(folder):
  from sparsek.huggingface import pretrained

  config = small_config(attention="sliding_window", num_layers=2)
  pretrained.save(str(folder / "model"), config, params_of(config), max_shard_bytes=6000)


NAMES = {
  "hidden_size": "embed_dim",
  "intermediate_size": "mlp_dim",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
  "num_key_value_heads": "num_kv_heads",
  "vocab_size": "vocab_size",
  "head_dim": "head_dim",
  "rope_theta": "rope_theta",
  "max_position_embeddings": "max_positions",
}


def read_model(folder):
  import jax

  from sparsek.huggingface import pretrained

  config, params = pretrained.load(str(folder / "model"))
  leaves = {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  return {
    "config": {ours: getattr(config, ours) for ours in NAMES.values()},
    "kinds": config.layer_kinds,
    "leaves": leaves,
    "window": config.window,
  }


def _tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
  result = {}
  for path in folder.glob("*.safetensors"):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    for name, entry in header.items():
      if name != "__metadata__":
        begin, end = entry["data_offsets"]
        dtype = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}.get(entry["dtype"])
        if dtype:
          result[name] = (
            np.frombuffer(raw[8 + length :][begin:end], dtype)
            .reshape(entry["shape"])
            .astype(np.float32)
          )
  return result


def check_model(value, folder, good):
  now = json.loads((folder / "model" / "config.json").read_bytes())
  for theirs, ours in NAMES.items():
    if (
      now.get(theirs) is not None
      and not (theirs == "max_position_embeddings" and "sparsek" in now)
      and not equal(value["config"][ours], now[theirs])
    ):
      return difference(value["config"][ours], now[theirs], theirs)
  tensors = _tensors(folder / "model")
  embedding = tensors.get("model.embed_tokens.weight")
  if embedding is not None and not np.array_equal(
    value["leaves"]["['embed']['embedding']"], embedding
  ):
    return "the embedding is not the file's"
  known = sorted(
    digest for digest in (np.sort(tensor, axis=None).tobytes() for tensor in tensors.values())
  )
  leaves = sorted(np.sort(leaf, axis=None).tobytes() for leaf in value["leaves"].values())
  if collections.Counter(leaves) - collections.Counter(known):
    return "a parameter is none of the file's tensors"
  return None


def read_ends(folder):
  from sparsek.data.tokenizer import load_tokenizer
  from sparsek.experiments import import_hf

  tokenizer = load_tokenizer(str(folder / "model"))
  return import_hf.end_tokens(str(folder / "model"), tokenizer), tokenizer.eos_id


def check_ends(value, folder, good):
  ends, eos = value
  for name in ("generation_config.json", "config.json"):
    path = folder / "model" / name
    said = json.loads(path.read_bytes()).get("eos_token_id") if path.exists() else None
    said = [said] if isinstance(said, int) and not isinstance(said, bool) else said
    if isinstance(said, list):
      # Some write -1 for none.
      said = [i for i in said if not (isinstance(i, int) and i < 0)]
    if isinstance(said, list) and said:
      return (
        None
        if set(ends) <= {*said, eos} and set(said) <= set(ends)
        else f"ends {ends}, {name} says {said}"
      )
  return (
    None if all(isinstance(i, int) and not isinstance(i, bool) for i in ends) else f"ends {ends}"
  )


def damage_safetensors(content, rng):
  """Damages bytes anywhere, or the header as JSON, with the right length before it."""
  if rng.random() < 0.4:
    return mutate_bytes(content, rng)
  (length,) = struct.unpack("<Q", content[:8])
  raw = mutate_json(content[8 : 8 + length], rng)
  return struct.pack("<Q", len(raw)) + raw + content[8 + length :]


def damage_model(content, rng):
  return (
    damage_safetensors(content, rng)
    if content[8:9] == b"{" and content[:1] != b"{"
    else damage_any(content, rng)
  )
