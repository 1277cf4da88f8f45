"""Every file format that is read: a good example, its readers, and what a file now says.

The last is found by other means than these readers.
"""

import collections
import dataclasses
import gzip
import json
import os
import pathlib
import random
import shutil
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from sparsek.errors import RunError, UsageError
from tests.experiments.mutations import mutate_bytes, mutate_json, mutate_lines, mutate_value

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


def _same(value, now, what: str) -> str | None:
  return (
    None
    if _equal(value, now)
    else f"{what}: read {str(value)[:200]}, the file says {str(now)[:200]}"
  )


def _equal(a, b) -> bool:
  """Equality of JSON values: NaN is itself, and true is no 1."""
  if isinstance(a, bool) != isinstance(b, bool):
    return False
  if isinstance(a, float) and isinstance(b, float) and a != a and b != b:
    return True
  if isinstance(a, dict) and isinstance(b, dict):
    return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
  if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
    return len(a) == len(b) and all(map(_equal, a, b))
  return a == b


def _config(**fields):
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


def _params(config):
  import jax

  from sparsek.model import init_params

  return init_params(config, jax.random.key(0))


def _run(folder: pathlib.Path, config) -> None:
  from sparsek.config import DataConfig
  from sparsek.tokenizer import ByteTokenizer

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


# metrics.jsonl


def make_metrics(folder):
  records = [
    {"step": step, "loss": 5 / step, "grad_norm": 0.5, "tokens_per_second": 10.0}
    for step in range(1, 7)
  ]
  records.insert(4, {"step": 4, "heldout_loss": 1.25})
  (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def _loads(line: bytes):
  try:
    return json.loads(line.decode("utf-8"))
  except (ValueError, RecursionError):
    return None


def _records(lines) -> list[dict]:
  values = map(_loads, lines)
  return [
    value
    for value in values
    if isinstance(value, dict)
    and isinstance(value.get("step"), int)
    and not isinstance(value["step"], bool)
  ]


def read_metrics(folder):
  from sparsek import metrics

  before = (folder / "metrics.jsonl").read_bytes()
  records = metrics.read_metrics(str(folder / "metrics.jsonl"))
  metrics.MetricsWriter(str(folder), 10**30).close()
  return before, records, (folder / "metrics.jsonl").read_bytes()


def check_metrics(value, folder, good):
  before, records, after = value
  *lines, last = before.split(b"\n")
  wanted = _records([*lines, last])
  missing = [record for record in wanted if not any(_equal(record, other) for other in records)]
  if missing:
    return f"{len(missing)} records are not read, such as {str(missing[0])[:150]}"
  kept = after.split(b"\n")
  values = [value for value in map(_loads, kept) if value is not None]
  lost = [
    line
    for line in lines
    if line.strip()
    and line not in kept
    and line.rstrip(b"\r") not in kept
    and not any(_equal(_loads(line), x) for x in values)
  ]
  return f"resuming loses {len(lost)} lines, such as {lost[0][:100]}" if lost else None


# model.json


def make_model_json(folder):
  _run(
    folder,
    _config(
      attention=("sparsek", "full"), num_layers=2, vocab_size=257, rope_scaling=("linear", 2.0)
    ),
  )


def read_model_json(folder):
  from sparsek import checkpoint

  config, run = checkpoint.load_run_config(str(folder))
  checkpoint.load_run_tokenizer(str(folder))
  return json.loads(json.dumps(dataclasses.asdict(config)))


def check_model_json(value, folder, good):
  now = json.loads((folder / "model.json").read_bytes())["model"]
  for name, said in now.items():
    if name in ("attention", "rope_scaling"):  # texts of these become tuples
      from sparsek.config import parse_layer_pattern, parse_rope_scaling

      said = json.loads(
        json.dumps(
          {"attention": parse_layer_pattern, "rope_scaling": parse_rope_scaling}[name](said)
        )
      )
    if not _equal(value[name], said):
      return _same(value[name], said, name)
    if (
      said is not None
      and good[name] is not None
      and type(said) is not type(good[name])
      and not {type(said), type(good[name])} <= {int, float}
    ):
      return f"{name}={said!r} was taken"
    if isinstance(good[name], int) and isinstance(said, float):
      return f"{name}={said!r} was taken"
  return None


# flagfiles


def make_flagfile(folder):
  (folder / "run.flags").write_text(
    "# a comment\n--k=8\n--window=16\n--learning_rate=0.01\n--num_steps=40\n--gate=value\n"
    "--qk_norm\n--nosegment_documents\n"
    "--workdir=/tmp/some where\n--layer_pattern=sparsek*2,full\n\n--seed=3\n"
  )


def read_flagfile(folder):
  from absl import flags as absl_flags

  from sparsek import flags

  values = absl_flags.FlagValues()
  for define in (flags.define_model_flags, flags.define_data_flags, flags.define_train_flags):
    define(values)
  flags.parse(["fuzz", f"--flagfile={folder}/run.flags"], values)
  return {
    name: values[name].value for name in flags.OUR_FLAGS if name in values and values[name].present
  }


def check_flagfile(value, folder, good):
  raw = (folder / "run.flags").read_bytes()
  try:
    text = raw.decode("utf-8-sig")
  except UnicodeDecodeError:
    return None if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "it is no UTF-8"
  said = {}
  for line in map(str.strip, text.split("\n")):
    name, equals, argument = line.removeprefix("--").partition("=")
    if line.startswith("--") and equals and name in value:
      said[name] = argument
  for name, argument in said.items():
    found = value[name]
    if name == "workdir":
      argument = os.path.normpath(argument)
    if type(found) in (int, float):
      argument = type(found)(argument)
    if not isinstance(found, bool) and found != argument:
      return _same(found, argument, f"--{name}")
  return None


# checkpoints


def _abstract_optimizer():
  import jax

  from sparsek.checkpoint import abstract_params
  from sparsek.config import OptimizerConfig
  from sparsek.optimizer import make_optimizer

  return jax.eval_shape(make_optimizer(OptimizerConfig()).init, abstract_params(_config()))


def make_checkpoint(folder):
  from sparsek import checkpoint
  from sparsek.config import OptimizerConfig
  from sparsek.optimizer import make_optimizer

  params = _params(_config())
  _run(folder, _config())
  writer = checkpoint.CheckpointWriter(str(folder), keep=3)
  writer.save(
    7, params, make_optimizer(OptimizerConfig()).init(params), {"next_index": 12, "seed": 0}
  )
  writer.close()


def read_checkpoint(folder):
  import jax

  from sparsek import checkpoint

  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with checkpoint.quiet_orbax():
    found = checkpoint.restore_newest(
      str(folder), _config(), _abstract_optimizer(), sharding, lambda line: None
    )
  arrays = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((found.params, found.opt_state))]
  return found.step, arrays, found.data_state


def check_checkpoint(value, folder, good):
  differing = sum(a != b for a, b in zip(value[1], good[1], strict=True))
  return (
    _same(value[0], good[0], "step")
    or _same(value[2], good[2], "data")
    or (f"{differing} arrays are others" if differing else None)
  )


def damage_any(content: bytes, rng: random.Random) -> bytes:
  try:
    json.loads(content)
  except ValueError:
    return mutate_bytes(content, rng)
  return mutate_json(content, rng)


# token files


def make_tokens(folder):
  from sparsek.corpus import documents
  from sparsek.token_files import write_token_files
  from sparsek.tokenizer import ByteTokenizer

  (folder / "a.txt").write_text(TEXT * 30)
  write_token_files(
    str(folder / "tokens"),
    documents([str(folder / "a.txt"), "tasks:1024:4"], answers_only=True),
    ByteTokenizer(),
  )


def make_bpe_tokens(folder):
  from sparsek.corpus import Document
  from sparsek.token_files import write_token_files
  from sparsek.tokenizer import train_bpe

  write_token_files(
    str(folder / "tokens"),
    [Document(str(i), TEXT * 5 + str(i), i % 2 == 0) for i in range(6)],
    train_bpe([TEXT * 9], 280),
  )


def read_tokens(folder):
  from sparsek.token_files import open_token_files, verify_token_files

  dataset = open_token_files(str(folder / "tokens"))
  splits = {}
  for name in ("train", "heldout"):
    split = dataset.split(name)
    documents = [split.document(i) for i in range(split.num_documents)]
    uncounted = (
      [split.uncounted(i).view(np.uint8) for i in range(split.num_documents)]
      if split.marked
      else []
    )
    splits[name] = {
      "starts": split.starts.tolist(),
      "lengths": split.lengths.tolist(),
      "bytes": split.num_bytes,
      "counted": split.num_counted,
      "ids": [ids.tolist() for ids in documents],
      "uncounted": [marks.tolist() for marks in uncounted],
    }
  try:
    verify_token_files(str(folder / "tokens"))
    verified = True
  except REFUSALS:
    verified = False
  return {"splits": splits, "vocab_size": dataset.vocab_size, "verified": verified}


def check_tokens(value, folder, good):
  root = folder / "tokens"
  meta = json.loads((root / "meta.json").read_bytes())
  index = np.load(root / "index.npy")
  tokens = np.fromfile(root / "tokens.bin", {"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])
  marks = (
    np.fromfile(root / "uncounted.bin", np.uint8) if "uncounted.bin" in meta["sha256"] else None
  )
  held = set(meta["heldout"])
  for name, found in value["splits"].items():
    chosen = [i for i in range(len(index) - 1) if (i in held) == (name == "heldout")]
    now = {
      "starts": index[chosen].tolist(),
      "bytes": meta["num_bytes"][name],
      "ids": [tokens[index[i] : index[i + 1]].tolist() for i in chosen],
      "uncounted": []
      if marks is None
      else [marks[index[i] : index[i + 1]].tolist() for i in chosen],
    }
    if name in meta.get("num_counted", {}):
      now["counted"] = meta["num_counted"][name]
    for key, said in now.items():
      if not _equal(found[key], said):
        return _same(found[key], said, f"{name} {key}")
    if not all(isinstance(found[key], int) and 0 <= found[key] for key in ("bytes", "counted")):
      return f"{name}: bytes {found['bytes']}, counted {found['counted']}"
  if value["verified"]:
    strange = next(
      (
        name
        for name in (
          "tokens.bin",
          "index.npy",
          "uncounted.bin",
          "tokenizer.json",
          "documents.jsonl",
        )
        if (root / name).exists()
        and (root / name).read_bytes() != (folder / "good" / name).read_bytes()
      ),
      None,
    )
    if strange:
      return f"{strange} is verified, and is another file"
  return None


def keep_good(make):
  """Also keeps a copy of what is made, to compare with."""

  def made(folder):
    make(folder)
    shutil.copytree(folder / "tokens", folder / "good")

  return made


# tokenizer.json


def make_tokenizer(folder):
  from sparsek.tokenizer import train_bpe

  train_bpe([TEXT * 9], 280).save(str(folder))


def read_tokenizer(folder):
  from sparsek.tokenizer import load_tokenizer

  tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
  ids = tokenizer.encode("some text é")
  return {
    "vocab_size": tokenizer.vocab_size,
    "ids": ids,
    "eos_id": tokenizer.eos_id,
    "text": tokenizer.decode(ids),
  }


def check_tokenizer(value, folder, good):
  now = json.loads((folder / "tokenizer.json").read_bytes())
  vocab = now["model"]["vocab"]
  ids = {
    *(vocab.values() if isinstance(vocab, dict) else range(len(vocab))),
    *(token["id"] for token in now["added_tokens"]),
  }
  if (
    value["vocab_size"] not in (max(ids) + 1, max(ids) + 2, len(vocab) + 1, len(vocab) + 2)
    or value["vocab_size"] > 2**24
  ):
    return f"vocab_size {value['vocab_size']}, the largest id is {max(ids)}"
  return (
    None
    if all(0 <= i < value["vocab_size"] for i in [*value["ids"], value["eos_id"]])
    else f"ids {value['ids']} of {value['vocab_size']}"
  )


# sources

LINES = "".join(json.dumps({"text": f"{TEXT}{i} é\n", "n": i}) + "\n" for i in range(5)).encode()
RECORDS = json.dumps([{"text": f"{TEXT}{i}"} for i in range(5)]).encode()


def _source(name: str, content: bytes):
  return lambda folder: (folder / name).write_bytes(content) and None


def read_source(folder):
  from sparsek.corpus import documents

  (path,) = (path for path in folder.iterdir() if path.name.startswith("data."))
  return [document.text for document in documents([str(path)], heldout_fraction=0.0)]


def _source_texts(name: str, content: bytes) -> list[str]:
  """Returns what a file says, read as plainly as can be."""
  if name.endswith(".gz"):
    return _source_texts(name.removesuffix(".gz"), gzip.decompress(content))
  text = content.decode("utf-8").removeprefix("\ufeff")
  if name.endswith(".txt"):
    return [text]
  if name.endswith(".json"):
    try:
      value = json.loads(text)
      records = value if isinstance(value, list) else [value]
      return [record if isinstance(record, str) else record["text"] for record in records]
    except ValueError:
      pass
  return [json.loads(line)["text"] for line in text.split("\n") if line.strip()]


def check_source(value, folder, good):
  (path,) = (path for path in folder.iterdir() if path.name.startswith("data."))
  try:
    now = _source_texts(path.name, path.read_bytes())
  except Exception as error:
    return f"it was read, and cannot be: {type(error).__name__}: {str(error)[:100]}"
  return _same(value, [text for text in now if text], "texts")


# models of others


def make_model(folder):
  from sparsek import pretrained
  from sparsek.tokenizer import train_bpe

  config = _config(attention="sliding_window", num_layers=2)
  pretrained.save(str(folder / "model"), config, _params(config), fields={"eos_token_id": 256})
  train_bpe([TEXT * 9], 280).save(str(folder / "model"))
  (folder / "model" / "generation_config.json").write_text(
    json.dumps({"eos_token_id": [256, 2], "do_sample": False})
  )
  (folder / "model" / "tokenizer_config.json").write_text(
    json.dumps({"eos_token": "<|endoftext|>", "add_bos_token": False, "model_max_length": 64})
  )


def make_sharded(folder):
  from sparsek import pretrained

  config = _config(attention="sliding_window", num_layers=2)
  pretrained.save(str(folder / "model"), config, _params(config), max_shard_bytes=6000)


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

  from sparsek import pretrained

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
  found = {}
  for path in folder.glob("*.safetensors"):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    for name, entry in header.items():
      if name != "__metadata__":
        begin, end = entry["data_offsets"]
        dtype = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}.get(entry["dtype"])
        if dtype:
          found[name] = (
            np.frombuffer(raw[8 + length :][begin:end], dtype)
            .reshape(entry["shape"])
            .astype(np.float32)
          )
  return found


def check_model(value, folder, good):
  now = json.loads((folder / "model" / "config.json").read_bytes())
  for theirs, ours in NAMES.items():
    if (
      now.get(theirs) is not None
      and not (theirs == "max_position_embeddings" and "sparsek" in now)
      and not _equal(value["config"][ours], now[theirs])
    ):
      return _same(value["config"][ours], now[theirs], theirs)
  tensors = _tensors(folder / "model")
  embedding = tensors.get("model.embed_tokens.weight")
  if embedding is not None and not np.array_equal(
    value["leaves"]["['embed']['embedding']"], embedding
  ):
    return "the embedding is not the file's"
  known = sorted(
    digest for digest in (np.sort(tensor, axis=None).tobytes() for tensor in tensors.values())
  )
  found = sorted(np.sort(leaf, axis=None).tobytes() for leaf in value["leaves"].values())
  if collections.Counter(found) - collections.Counter(known):
    return "a parameter is none of the file's tensors"
  return None


def read_ends(folder):
  from experiments import import_hf
  from sparsek.tokenizer import load_tokenizer

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
  """Bytes anywhere, or the header as JSON, with the right length before it."""
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


# saved caches


def make_cache(folder):
  from sparsek.generate import Session

  config = _config(vocab_size=257)
  session = Session(config, _params(config), 1)
  list(session.generate([[1, 2, 3, 4, 5, 6]], max_new_tokens=3, temperature=0.0))
  session.save(str(folder / "cache.npz"))


def read_cache(folder):
  import jax

  from sparsek import cache_file
  from sparsek.generate import Session

  config = _config(vocab_size=257)
  cache, note, *_ = cache_file.load(str(folder / "cache.npz"), config)
  Session.load(str(folder / "cache.npz"), config, _cached_params())
  return [np.asarray(leaf) for leaf in jax.tree.leaves(cache)], note


_PARAMS = []


def _cached_params():
  if not _PARAMS:
    _PARAMS.append(_params(_config(vocab_size=257)))
  return _PARAMS[0]


def check_cache(value, folder, good):
  with np.load(folder / "cache.npz", allow_pickle=False) as file:
    leaves = [file[f"leaf_{i}"] for i in range(len(file.files) - 1)]
    head = json.loads(file["head"].tobytes())
  if len(leaves) != len(value[0]) or not all(
    a.tobytes() == b.tobytes() for a, b in zip(leaves, value[0])
  ):
    return "its arrays are not the file's"
  return _same(value[1], head["note"], "note")


def damage_cache(content, rng):
  """Damages bytes anywhere, or the head as JSON, or arrays, then with right checksums."""
  if rng.random() < 0.4:
    return mutate_bytes(content, rng)
  import io

  with np.load(io.BytesIO(content), allow_pickle=False) as file:
    arrays = {name: file[name] for name in file.files}
  if rng.random() < 0.6:
    head = mutate_value(json.loads(arrays["head"].tobytes()), rng)
    arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
  else:
    name = rng.choice(sorted(arrays))
    array = arrays.pop(name)
    kind = rng.randrange(6)
    if kind == 0:
      arrays[name + "x"] = array
    elif kind == 1:
      arrays[name] = array.astype(rng.choice((np.float64, np.int64, np.uint8, np.complex64)))
    elif kind == 2:
      arrays[name] = array[..., :-1] if array.ndim else array.reshape(1)
    elif kind == 3:
      arrays[name] = array.reshape(-1)
    elif kind == 4:
      most = np.iinfo(array.dtype).max if array.dtype.kind in "iu" else 3
      arrays[name] = np.full_like(array, most)
  out = io.BytesIO()
  np.savez(out, **arrays)
  return out.getvalue()


# records of grids, of recipes and of the benchmark


def _cells():
  from sparsek import ablation

  return ablation.grid(["sparsek", "full"], [8], [8], ["straight_through"], ["linear"], 1)


def make_grid(folder):
  for i, cell in enumerate(_cells()):
    (folder / cell.name).mkdir()
    (folder / cell.name / "result.json").write_text(
      json.dumps({"heldout_loss": 5.0 + i, "step": 4, "tokens_per_second": 10.0})
    )


def read_grid(folder):
  from sparsek import ablation

  rows = ablation.collect(str(folder), _cells())
  ablation.markdown(ablation.summarize(rows))
  if rows:
    ablation.as_csv(rows)
  return rows


def check_grid(value, folder, good):
  paths = [folder / cell.name / "result.json" for cell in _cells()]
  # A cell without a result is not finished.
  now = {path: json.loads(path.read_bytes()) for path in paths if path.exists()}
  if len(value) != len(now):
    return "a result was left out"
  for row, said in zip(value, now.values()):
    for key in ("heldout_loss", "step", "tokens_per_second"):
      if not _equal(row.get(key), said.get(key)):
        return _same(row.get(key), said.get(key), key)
      if isinstance(row.get(key), bool) or not isinstance(row.get(key), (int, float)):
        return f"{key}={row.get(key)!r} was taken"
  return None


def make_minutes(folder):
  (folder / "minutes.json").write_text(json.dumps({"full_s0": 1.5, "sparsek_s0": 2.25}))


def read_minutes(folder):
  from experiments.recipes import stages

  return stages.run_stages({}, str(folder))


def check_minutes(value, folder, good):
  now = json.loads((folder / "minutes.json").read_bytes())
  if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value.values()):
    return f"minutes {str(value)[:100]} were taken"
  return _same(value, now, "minutes")


def _result(name: str):
  source = pathlib.Path(__file__).parents[2] / "experiments" / "results" / name
  return lambda folder: shutil.copy(source, folder / "record.json") and None


def read_record(folder):
  from experiments import benchmark

  return benchmark.load(str(folder / "record.json"))


def check_record(value, folder, good):
  return _same(value, json.loads((folder / "record.json").read_bytes()), "record")


MODEL = (
  "model/config.json", "model/model.safetensors", "model/tokenizer.json",
  "model/tokenizer_config.json", "model/generation_config.json"
)
FORMATS = {
  "metrics.jsonl": Format(
    make_metrics, ("metrics.jsonl",), mutate_lines, read_metrics, check_metrics
  ),
  "model.json": Format(
    make_model_json, ("model.json",), mutate_json, read_model_json, check_model_json
  ),
  "flagfile": Format(make_flagfile, ("run.flags",), mutate_bytes, read_flagfile, check_flagfile),
  "checkpoint": Format(
    make_checkpoint, ("checkpoints/7/**/*",), damage_any, read_checkpoint, check_checkpoint
  ),
  "tokens": Format(
    keep_good(make_tokens),
    ("tokens/tokens.bin", "tokens/index.npy", "tokens/uncounted.bin"),
    mutate_bytes,
    read_tokens,
    check_tokens,
  ),
  "meta.json": Format(
    keep_good(make_tokens), ("tokens/meta.json",), mutate_json, read_tokens, check_tokens
  ),
  "tokens_bpe": Format(
    keep_good(make_bpe_tokens), ("tokens/*",), damage_any, read_tokens, check_tokens
  ),
  "tokenizer.json": Format(
    make_tokenizer, ("tokenizer.json",), mutate_json, read_tokenizer, check_tokenizer
  ),
  "source.jsonl": Format(
    _source("data.jsonl", LINES), ("data.*",), mutate_lines, read_source, check_source
  ),
  "source.json": Format(
    _source("data.json", RECORDS), ("data.*",), mutate_json, read_source, check_source
  ),
  "source.txt": Format(
    _source("data.txt", (TEXT * 3 + "é\n").encode()),
    ("data.*",),
    mutate_bytes,
    read_source,
    check_source,
  ),
  "source.jsonl.gz": Format(
    _source("data.jsonl.gz", gzip.compress(LINES, mtime=0)),
    ("data.*",),
    mutate_bytes,
    read_source,
    check_source,
  ),
  "source.txt.gz": Format(
    _source("data.txt.gz", gzip.compress((TEXT * 3).encode(), mtime=0)),
    ("data.*",),
    mutate_bytes,
    read_source,
    check_source,
  ),
  "config.json": Format(make_model, MODEL[:1], mutate_json, read_model, check_model),
  "safetensors": Format(make_model, MODEL[1:2], damage_safetensors, read_model, check_model),
  "shards": Format(
    make_sharded,
    ("model/*.safetensors", "model/*.index.json"),
    damage_model,
    read_model,
    check_model,
  ),
  "generation_config.json": Format(make_model, MODEL[3:], mutate_json, read_ends, check_ends),
  "cache.npz": Format(make_cache, ("cache.npz",), damage_cache, read_cache, check_cache),
  "result.json": Format(make_grid, ("*/result.json",), mutate_json, read_grid, check_grid),
  "minutes.json": Format(make_minutes, ("minutes.json",), mutate_json, read_minutes, check_minutes),
  "benchmark.json": Format(
    _result("attention_h100.json"), ("record.json",), mutate_json, read_record, check_record
  ),
  "train_benchmark.json": Format(
    _result("train_h100_packed.json"), ("record.json",), mutate_json, read_record, check_record
  ),
  "decode_benchmark.json": Format(
    _result("decode_h100.json"), ("record.json",), mutate_json, read_record, check_record
  ),
}


def make_good(name: str, folder: pathlib.Path) -> Any:
  """Writes the good files of a format and returns what its readers rightly say of them."""
  form = FORMATS[name]
  form.make(folder / "good")
  shutil.copytree(folder / "good", folder / "case")
  good = form.read(folder / "case")
  wrong = form.check(good, folder / "case", good)
  assert wrong is None, f"{name}: the good files: {wrong}"
  return good


def try_case(name: str, folder: pathlib.Path, good: Any, seed: int, case: int) -> tuple[str, str]:
  """Returns what becomes of one damaged file: ("refused" or "read" or "wrong", why).

  The same (seed, case) is the same damage.
  """
  form, rng = FORMATS[name], random.Random(f"{seed} {name} {case}")
  shutil.rmtree(folder / "case")
  shutil.copytree(folder / "good", folder / "case")
  places = sorted(
    path for pattern in form.files for path in (folder / "case").glob(pattern) if path.is_file()
  )
  path = rng.choice(places)
  content = path.read_bytes()
  what = str(path.relative_to(folder / "case"))
  if len(places) > 1 and rng.random() < 0.03:
    path.unlink()
    what += " removed"
  else:
    path.write_bytes(form.damage(content, rng))
  try:
    value = form.read(folder / "case")
  except REFUSALS as error:
    message = str(error)
    # A table of what does not fit may follow the sentence.
    return (
      ("wrong", f"{what}: no sentence: {message[:200]!r}")
      if not message.strip()
      else ("refused", message)
    )
  except BaseException as error:
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
      raise
    return "wrong", f"{what}: {type(error).__name__}: {str(error)[:200]}"
  try:
    wrong = form.check(value, folder / "case", good)
  except Exception as error:
    wrong = f"it was read, and a plain reader cannot: {type(error).__name__}: {str(error)[:150]}"
  return ("wrong", f"{what}: {wrong}") if wrong else ("read", what)
