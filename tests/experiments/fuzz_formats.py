"""All file formats that are read: a good example, its readers, and what a damaged file says.

What a damaged file says is determined by other means than these readers.
"""

import gzip
import pathlib
import random
import shutil
from typing import Any

from tests.experiments.fuzz_base import REFUSALS, TEXT, Format, damage_any
from tests.experiments.fuzz_data_formats import (
  LINES,
  RECORDS,
  check_source,
  check_tokenizer,
  check_tokens,
  keep_good,
  make_bpe_tokens,
  make_tokenizer,
  make_tokens,
  read_source,
  read_tokenizer,
  read_tokens,
  source,
)
from tests.experiments.fuzz_model_formats import (
  check_ends,
  check_model,
  damage_model,
  damage_safetensors,
  make_model,
  make_sharded,
  read_ends,
  read_model,
)
from tests.experiments.fuzz_run_formats import (
  check_cache,
  check_checkpoint,
  check_flagfile,
  check_grid,
  check_metrics,
  check_minutes,
  check_model_json,
  check_record,
  copy_record,
  damage_cache,
  make_cache,
  make_checkpoint,
  make_flagfile,
  make_grid,
  make_metrics,
  make_minutes,
  make_model_json,
  read_cache,
  read_checkpoint,
  read_flagfile,
  read_grid,
  read_metrics,
  read_minutes,
  read_model_json,
  read_record,
)
from tests.experiments.mutations import mutate_bytes, mutate_json, mutate_lines

MODEL = (
  "model/config.json",
  "model/model.safetensors",
  "model/tokenizer.json",
  "model/tokenizer_config.json",
  "model/generation_config.json",
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
    source("data.jsonl", LINES), ("data.*",), mutate_lines, read_source, check_source
  ),
  "source.json": Format(
    source("data.json", RECORDS), ("data.*",), mutate_json, read_source, check_source
  ),
  "source.txt": Format(
    source("data.txt", (TEXT * 3 + "é\n").encode()),
    ("data.*",),
    mutate_bytes,
    read_source,
    check_source,
  ),
  "source.jsonl.gz": Format(
    source("data.jsonl.gz", gzip.compress(LINES, mtime=0)),
    ("data.*",),
    mutate_bytes,
    read_source,
    check_source,
  ),
  "source.txt.gz": Format(
    source("data.txt.gz", gzip.compress((TEXT * 3).encode(), mtime=0)),
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
    copy_record("attention_h100.json"), ("record.json",), mutate_json, read_record, check_record
  ),
  "train_benchmark.json": Format(
    copy_record("train_h100_packed.json"), ("record.json",), mutate_json, read_record, check_record
  ),
  "decode_benchmark.json": Format(
    copy_record("decode_h100.json"), ("record.json",), mutate_json, read_record, check_record
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
