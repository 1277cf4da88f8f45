"""Record of a run's model, data, settings and tokenizer: WORKDIR/model.json."""

import dataclasses
import json
import os
from collections.abc import Mapping

from sparsek.config import (
  DataConfig,
  Index,
  TrainConfig,
  TransformerConfig,
  check_number,
  check_type,
)
from sparsek.data.token_files import TokenDataset
from sparsek.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, read_bos
from sparsek.errors import UsageError
from sparsek.model import lora
from sparsek.storage.files import exists, read_json_object

FILE = "model.json"
STAGES = "stages"  # key of the record of a run that has stages
RECORDED_DATA = ("data", "seq_len", "batch_size", "segment_documents")
RECORDED_TOKENIZER = {"name": str, "fingerprint": str, "vocab_size": int}
# Fields of TrainConfig that are no settings: where a run is, and how it got its state. Those of the
# data and of the optimizer are listed under their own names.
NO_SETTINGS = ("workdir", "init_from", "restore_step", "data", "optimizer")


def model_record(config: TransformerConfig, train: TrainConfig, dataset: TokenDataset) -> dict:
  """Returns the contents of a run's model.json."""
  tokenizer = dataset.tokenizer
  return {
    "model": dataclasses.asdict(config),
    "data": dataclasses.asdict(train.data),
    "train": _settings(train),
    "tokenizer": {
      "name": tokenizer.name,
      "fingerprint": tokenizer.fingerprint,
      "vocab_size": tokenizer.vocab_size,
      "bos_ids": tokenizer.bos_ids,
    },
  }


def _settings(train: TrainConfig) -> dict:
  """Returns the flags of a run that are neither the model's nor the data's."""
  fields = dataclasses.asdict(train)
  return {
    name: value for name, value in (fields | fields["optimizer"]).items() if name not in NO_SETTINGS
  }


def changed_settings(run: Mapping, train: TrainConfig) -> dict[str, tuple]:
  """Returns the flags that have changed since a run was last started: name -> (old, new).

  Args:
    run: its model.json; those of older versions hold the data's flags only.
    train: the configuration it is started with now.
  """
  old = {**run["data"], **run.get("train", {})}
  new = json.loads(json.dumps({**dataclasses.asdict(train.data), **_settings(train)}))
  return {
    name: (old[name], value) for name, value in new.items() if name in old and old[name] != value
  }


def _check_tokenizer(recorded: dict) -> None:
  """Raises KeyError or TypeError where a record of a tokenizer lacks something that is read."""
  for name, kind in RECORDED_TOKENIZER.items():
    if type(recorded[name]) is not kind:
      raise TypeError(f"{name}={recorded[name]!r} must be of type {kind.__name__}")
  ends = recorded.get("eos_ids", [])
  if not (isinstance(ends, list) and all(type(end) is int for end in ends)):
    raise TypeError(f"eos_ids={ends!r} must be a list of token ids")


def trained_parts(run: Mapping, step: int) -> list[tuple[int, Mapping]]:
  """Returns (number of steps, `DataConfig` fields) of each stage of a run up to a step.

  Args:
    run: its model.json; a run without stages is one part.
    step: of a checkpoint.
  """
  if STAGES not in run:
    return [(step, run["data"])]
  ends = [(*stage["steps"], stage["data"]) for stage in run[STAGES]]
  return [(min(step, last) - first + 1, data) for first, last, data in ends if first <= step]


def _check_stages(stages: list) -> None:
  """Raises KeyError, TypeError or ValueError where a record of stages lacks what is read."""
  check_type("stages", stages, list, "a list")
  for stage in stages:
    for name in ("name", "flags"):
      check_type(name, stage[name], str, "a string")
    for step in stage["steps"]:
      check_number("steps", step, Index)
    _, _ = stage["steps"]
    DataConfig(**{name: stage["data"][name] for name in RECORDED_DATA})


def load_run_config(workdir: str, adapters: bool = False) -> tuple[TransformerConfig, dict]:
  """Returns the model of a run, and its model.json.

  Args:
    workdir: of the run.
    adapters: True for the model as it is trained, perhaps with adapters; False for the model that
      `sparsek.runs.checkpoint.load_params` gives parameters for, with adapters merged.
  Returns:
    the configuration, and {"model": TransformerConfig fields, "data": DataConfig fields, "train":
    other settings (not in older files), "tokenizer": {...}}; of a run with stages those of the last
    one, and "stages": a list of {"name", "flags", "steps": [first, last], "data"}.
  Raises:
    UsageError: where `workdir` holds no run or its model.json cannot be understood.
  """
  path = os.path.join(workdir, FILE)
  if not exists(path):
    raise UsageError(f"{workdir} holds no run: there is no {path}")
  run = read_json_object(path)
  try:
    config = TransformerConfig(**run["model"])
    DataConfig(**{name: run["data"][name] for name in RECORDED_DATA})
    _check_tokenizer(run["tokenizer"])
    _check_stages(run.get(STAGES, []))
  except KeyError as error:
    raise UsageError(f"{path} cannot be understood: it has no {error}") from None
  except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
    raise UsageError(f"{path} cannot be understood: {error}") from None
  return config if adapters else lora.merged_config(config), run


def load_run_tokenizer(workdir: str) -> Tokenizer:
  """Returns the tokenizer that a run was trained with, which its workdir keeps.

  Its `bos_ids` are those of the run's documents.

  Raises:
    UsageError: where there is none or it cannot be read.
  """
  _, run = load_run_config(workdir)
  recorded = run["tokenizer"]
  is_byte = recorded["name"] == ByteTokenizer.name
  source = ByteTokenizer.name if is_byte else os.path.join(workdir, "tokenizer")
  tokenizer = load_tokenizer(source, recorded["fingerprint"])
  tokenizer.bos_ids = read_bos(recorded, tokenizer, os.path.join(workdir, FILE))
  return tokenizer
