"""Token files, tokenizers and sources of the fuzz: made, damaged, read and checked."""

import gzip
import json
import shutil

import numpy as np

from tests.experiments.fuzz_base import REFUSALS, TEXT, difference, equal

# token files


def make_tokens(folder):
  from sparsek.data.corpus import documents
  from sparsek.data.token_files import write_token_files
  from sparsek.data.tokenizer import ByteTokenizer

  (folder / "a.txt").write_text(TEXT * 30)
  write_token_files(
    str(folder / "tokens"),
    documents([str(folder / "a.txt"), "tasks:1024:4"], answers_only=True),
    ByteTokenizer(),
  )


def make_bpe_tokens(folder):
  from sparsek.data.corpus import Document
  from sparsek.data.token_files import write_token_files
  from sparsek.data.tokenizer import train_bpe

  write_token_files(
    str(folder / "tokens"),
    [Document(str(i), TEXT * 5 + str(i), i % 2 == 0) for i in range(6)],
    train_bpe([TEXT * 9], 280),
  )


def read_tokens(folder):
  from sparsek.data.token_files import open_token_files, verify_token_files

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
  for name, split in value["splits"].items():
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
      if not equal(split[key], said):
        return difference(split[key], said, f"{name} {key}")
    if not all(isinstance(split[key], int) and 0 <= split[key] for key in ("bytes", "counted")):
      return f"{name}: bytes {split['bytes']}, counted {split['counted']}"
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
  """Keeps a copy of what is made, to compare with."""

  def made(folder):
    make(folder)
    shutil.copytree(folder / "tokens", folder / "good")

  return made


# tokenizer.json


def make_tokenizer(folder):
  from sparsek.data.tokenizer import train_bpe

  train_bpe([TEXT * 9], 280).save(str(folder))


def read_tokenizer(folder):
  from sparsek.data.tokenizer import load_tokenizer

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


def source(name: str, content: bytes):
  return lambda folder: (folder / name).write_bytes(content) and None


def read_source(folder):
  from sparsek.data.corpus import documents

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
  return difference(value, [text for text in now if text], "texts")
