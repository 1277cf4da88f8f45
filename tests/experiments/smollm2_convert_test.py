"""The recipe of the conversion: its commands parse, its picture is drawn.

import_hf_test.py runs such commands.
"""

import os
import types

import pytest
from absl import flags as absl_flags

from sparsek.command_line.configs import model_config, train_config
from sparsek.command_line.main import parse
from sparsek.command_line.training_flags import define_pretrain_flags
from sparsek.config import TransformerConfig
from sparsek.experiments import evaluate, evaluate_tasks, import_hf
from sparsek.experiments.recipes import smollm2_convert, stages

OPTIONS = types.SimpleNamespace(
  model="model",
  text="text",
  tasks="tasks",
  workdir="runs",
  dtype="bfloat16",
  lengths="2048,8192",
  scorer="--scorer=conv",
  more="",
  k=256,
  window=768,
  seq_len=8192,
  eval_batches=64,
  examples=100,
  seeds=2,
)
SMOLLM2 = TransformerConfig(
  vocab_size=49152,
  num_layers=30,
  embed_dim=576,
  num_heads=9,
  num_kv_heads=3,
  head_dim=64,
  mlp_dim=1536,
  attention="full",
)


def test_every_command_parses_and_less_than_ten_million_tokens_train_a_model():
  values = absl_flags.FlagValues()
  define_pretrain_flags(values)
  known = {
    "import_hf": import_hf.FLAGS,
    "evaluate": evaluate.FLAGS,
    "evaluate_tasks": evaluate_tasks.FLAGS,
    "pretrain": values,
  }
  tokens = {}
  for name, (module, *words) in smollm2_convert.stages(OPTIONS).items():
    for flag in known[module]:
      known[module][flag].unparse()
    parse([module, *words], known[module])
    config = (
      model_config(known[module], pretrained=SMOLLM2)
      if module in ("import_hf", "pretrain")
      else None
    )
    if name == "sparsek":
      assert (config.attention, config.k, config.window, config.scorer, config.scan_layers) == (
        ("sparsek",),
        256,
        768,
        "conv",
        True,
      )
    if module == "pretrain":
      train = train_config(values)
      start = os.path.basename(train.init_from)
      tokens[name] = (
        tokens.get(start, 0)
        + train.optimizer.num_steps * train.data.batch_size * train.data.seq_len
      )
  assert (
    9e6 < max(tokens.values()) < 1e7
    and tokens["window_recall"]
    == tokens["dense_recall"]
    == tokens["sparsek_recall"] - tokens["sparsek_warm"]
  )


def test_what_a_stage_waits_for():
  plan = smollm2_convert.stages(OPTIONS)
  needs = {name: stages.needed(plan, name) for name in plan}
  assert (
    needs["dense"] == set()
    and needs["sparsek_warm"] == {"sparsek"}
    and needs["window_recall"] == {"window_tuned"}
  )
  assert needs["tasks_sparsek"] == {
    "sparsek",
    "sparsek_warm",
    "sparsek_tuned",
    "sparsek_distilled",
    "sparsek_recall",
    "sparsek_recall_s1",
  }
  assert needs["sparsek_recall_s1"] == {"sparsek_tuned_s1"} and needs["sparsek_tuned_s1"] == {
    "sparsek_warm_s1"
  }


def test_table_is_of_means_over_seeds_beside_the_dense_model_of_the_same_stage():
  run = lambda loss, right=0: {
    "loss": loss,
    "tasks": [{"task": "passkey", "length": 2048, "right": right, "total": 4}],
  }
  lines = smollm2_convert.table(
    {
      "dense": run(3.0),
      "dense_tuned": run(2.0),
      "dense_tuned_s1": run(2.2),
      "sparsek": run(3.1),
      "sparsek_warm": run(3.05),
      "sparsek_tuned": run(2.1, 4),
      "sparsek_tuned_s1": run(2.5, 1),
    }
  ).splitlines()
  of = {line.split()[0]: line for line in lines}
  assert (
    "2 runs  loss 2.3000 ± 0.2000  above dense +0.2000 ± 0.1000, perplexity x "
    "1.2214  passkey 2048: 62%"
  ) in of["sparsek_tuned"]
  assert (
    "above dense +0.0500 ± nan" in of["sparsek_warm"] and "above dense +0.1000" in of["sparsek"]
  )


def test_picture(tmp_path):
  pytest.importorskip("matplotlib")
  buckets = [
    {"last": 63, "loss": 3.0, "num_targets": 9},
    {"last": 127, "loss": None, "num_targets": 0},
  ]
  asked = [{"task": task, "length": 2048, "right": 1, "total": 2} for task in ("passkey", "needle")]
  names = [
    name for name in smollm2_convert.stages(OPTIONS) if not name.startswith(("loss", "tasks"))
  ]
  smollm2_convert.draw(
    {name: {"buckets": buckets, "tasks": asked} for name in names}, str(tmp_path / "picture.png")
  )
  assert (tmp_path / "picture.png").stat().st_size > 10_000
