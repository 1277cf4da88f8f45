"""The README.md of an exported model: what it is, what it has seen, its figures, how to load it."""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from sparsek.config import HeadGroup, TransformerConfig, heads_text
from sparsek.huggingface.config_writing import MODELLING
from sparsek.runs import run_record
from sparsek.runs.metrics import read_metrics
from sparsek.storage.files import exists

CARD = "README.md"
# Fields of a model that change no figure but by rounding, or that an export sets.
_NEUTRAL = (
  "implementation",
  "dtype",
  "remat",
  "scan_layers",
  "max_positions",
  "scorer_loss_queries",
  "scorer_loss_kind",
)
_HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- sparsek
---
"""
_SPARSE = f"""`{MODELLING}.py` beside this file computes the model in plain PyTorch, with
transformers 5 and nothing else. `trust_remote_code=True` runs it: read it first. The cache of
`generate` has a constant size, except in layers with full attention. Batches may be padded, on the
left in generation; packed rows are refused.
"""
_DENSE = """transformers reads this folder as a dense model with the same matrices, without the
SPARSEK attention that the section "sparsek" of config.json describes and whose scorers lie beside
the matrices. The figures above are not those of that dense model.
"""


def model_card(
  name: str, workdir: str, config: TransformerConfig, run: Mapping[str, Any], step: int, family: str
) -> str:
  """Returns the card of a run's model; a README.md in the run's folder is taken as it is.

  Args:
    name: of the model, its title.
    workdir: of the run, whose records the figures are taken from.
    config, run: as `sparsek.runs.run_record.load_run_config` returned them.
    step: of the checkpoint.
    family: that the model is written in.
  """
  own = os.path.join(workdir, CARD)
  if os.path.isfile(own):
    with open(own, encoding="utf-8", errors="surrogateescape", newline="") as file:
      return file.read()
  is_sparse, has_sparsek = family == "sparsek", "sparsek" in config.layer_kinds
  rows = [*_facts(workdir, config, run, step), *_heldout_losses(workdir, step)]
  parts = [f"{_HEADER}\n# {name}\n\n", _table(("", ""), rows), *_figures(workdir, config, step)]
  note = _SPARSE if is_sparse else _DENSE if has_sparsek else ""
  return "".join([*parts, "\n## Use\n\n", _example(is_sparse), "\n" * bool(note), note])


def _facts(workdir, config, run, step) -> list[tuple[str, str]]:
  """Returns rows (what, value) about the model and its training."""
  layers = [
    f"{len(list(terms))} x {term}"
    for term, terms in itertools.groupby(map(_term, config.layer_configs))
  ]
  heads = f"{config.num_heads} query heads, {config.num_kv_heads} key/value heads"
  rows = [
    ("attention, layer by layer", ", ".join(layers)),
    ("size", f"width {config.embed_dim}, {heads} of {config.head_dim}"),
  ]
  if "sparsek" in config.layer_kinds:
    rows += [("scorer, gate", f"{config.scorer}, {config.gate}")]
  rows += [("tokenizer", f"{run['tokenizer']['name']}, {config.vocab_size} tokens")]
  if base := _base(workdir):
    rows += [("started from", base)]
  data = run["data"]
  if step and data["data"]:
    parts = run_record.trained_parts(run, step)
    tokens = sum(steps * data["batch_size"] * data["seq_len"] for steps, data in parts)
    row = ", then ".join(
      f"{steps:,} steps of {data['batch_size']} rows of {data['seq_len']:,} tokens"
      for steps, data in parts
    )
    names = dict.fromkeys(_last_part(data["data"]) for _, data in parts)
    rows += [("data", ", ".join(map(str, names))), ("tokens seen", f"{tokens:,}: {row}")]
  return rows


def _term(layer: TransformerConfig) -> str:
  """Returns a layer's kind with its k and window, where it uses them; each of its groups of heads
  has them.
  """
  groups = layer.head_groups
  return " and ".join(
    _sizes(group) + f" in KV heads {heads_text(group.heads)}" * (len(groups) > 1)
    for group in groups
  )


def _sizes(group: HeadGroup) -> str:
  """Returns the kind of some heads with their k and window, where they use them."""
  kind, config = group.kind, group.config
  sizes = {"full": "", "sliding_window": f" (window {config.window})"}
  return kind + sizes.get(kind, f" (k {config.k}, window {config.window})")


def _base(workdir: str) -> str | None:
  """Returns the name of the folder that a run started from, as its flags say."""
  path = os.path.join(workdir, "flags.txt")
  if not exists(path):
    return None
  with open(path, encoding="utf-8", errors="replace") as file:
    flags = dict(line.strip().split("=", 1) for line in file if "=" in line)
  return _last_part((flags.get("--from") or flags.get("--init_from") or "").removeprefix("hf:"))


def _last_part(path: str) -> str:
  """Returns the last part of a path; those before it say nothing on another machine."""
  return os.path.basename(path.rstrip("/")) or path


def _heldout_losses(workdir: str, step: int) -> list[tuple[str, str]]:
  """Returns the row of the held-out loss of training at this step, if there was an evaluation."""
  records = read_metrics(os.path.join(workdir, "metrics.jsonl"), step)
  losses = [record for record in records if _number(record.get("heldout_loss"))]
  if not losses or losses[-1]["step"] != step:
    return []
  return [("held-out loss", f"{losses[-1]['heldout_loss']:.4f} nats a token")]


def _number(value: object) -> bool:
  return isinstance(value, (int, float)) and math.isfinite(value)


def _is_of(record: Mapping[str, Any], config: TransformerConfig, step: int) -> bool:
  """Returns whether a record is of this step and of this model, not of another k or gate."""
  model = record.get("model")
  if record["step"] != step or not isinstance(model, dict):
    return False
  own = json.loads(json.dumps(dataclasses.asdict(config)))
  return all(
    own[name] == value for name, value in model.items() if name in own and name not in _NEUTRAL
  )


def _figures(workdir: str, config: TransformerConfig, step: int) -> list[str]:
  """Returns the tables of `evaluate` and `evaluate-tasks` of this model, the last of each."""
  losses, tasks = {}, {}
  for record in read_metrics(os.path.join(workdir, "evaluation.jsonl"), step):
    data = record.get("data")
    if not _is_of(record, config, step) or not _number(record.get("loss")):
      continue
    if isinstance(data, dict):
      size, count = str(data.get("seq_len", "")), record.get("num_targets", "")
      what = _last_part(str(data.get("data"))), size, f"{count:,}" if count else ""
      losses[what] = *what, f"{record['loss']:.4f}"
  for record in read_metrics(os.path.join(workdir, "tasks.jsonl"), step):
    results = record.get("results")
    if _is_of(record, config, step) and isinstance(results, list):
      for result in filter(lambda result: isinstance(result, dict), results):
        task = str(result.get("task")), str(result.get("length"))
        tasks[task] = *task, f"{result.get('right')} of {result.get('total')}"
  parts = []
  if losses:
    names = "data", "tokens a row", "tokens", "held-out loss, nats a token"
    parts += ["\n## Held-out loss\n\n", _table(names, losses.values())]
  if tasks:
    parts += ["\n## Tasks with known answers\n\n"]
    parts += [_table(("task", "tokens", "right"), tasks.values())]
  return parts


def _table(names: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
  """Returns a table in Markdown."""
  lines = (names, ("---",) * len(names), *rows)
  escaped = ([cell.replace("|", "\\|") for cell in cells] for cells in lines)
  return "".join(f"| {' | '.join(cells)} |\n" for cells in escaped)


def _example(is_sparse: bool) -> str:
  """Returns a Python block that generates text."""
  trust = ", trust_remote_code=True" if is_sparse else ""
  lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
  lines += [f'model = AutoModelForCausalLM.from_pretrained("."{trust})  # this folder']
  lines += [f'tokenizer = AutoTokenizer.from_pretrained("."{trust})']
  lines += ['ids = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=32)']
  lines += ["print(tokenizer.decode(ids[0]))"]
  return "\n".join(["```python", *lines, "```", ""])
