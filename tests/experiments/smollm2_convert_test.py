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
from sparsek.evaluation import statistics
from sparsek.experiments import evaluate, evaluate_tasks, import_hf
from sparsek.experiments.recipes import smollm2_convert, stages
from sparsek.experiments.reports import conversion_report

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
      "sparsek_warm_s1": run(3.15),
      "block_topk": run(3.2),
      "sparsek_tuned": run(2.1, 4),
      "sparsek_tuned_s1": run(2.5, 1),
    }
  ).splitlines()
  of = {line.split()[0]: line for line in lines}
  rise = statistics.paired_t([2.1, 2.5], [2.0, 2.2])
  before = statistics.paired_t([3.05, 3.15], [3.0, 3.0])
  p_values = map(statistics.p_words, statistics.holm([rise.p_value, before.p_value]))
  text = dict(zip(("tuned", "warm"), p_values))
  assert (
    "2 runs  loss 2.3000 (-0.2412 to 4.8412)  above dense +0.2000 (-1.0706 to 1.4706), "
    f"{text['tuned']}, perplexity x 1.2214  passkey 2048: 62%"
  ).replace("to 1.4706", "to +1.4706") in of["sparsek_tuned"]
  assert f"above dense +0.1000 (-0.5353 to +0.7353), {text['warm']}" in of["sparsek_warm"]
  assert "above dense +0.1000, perplexity" in of["sparsek"]
  assert "1 runs  loss 3.2000  above dense +0.2000" in of["block_topk"]
  assert "for these 2 comparisons. Where no interval is over documents, " in lines[-1]


def test_differences_are_of_common_seeds_and_over_documents_where_these_are_known():
  def run(*documents):
    sums = {"index": [4, 7], "loss_sum": list(documents), "num_targets": [10, 30]}
    return {"loss": sum(documents) / 40, "tasks": [], "documents": sums}

  runs = {
    "dense_tuned": run(20.0, 60.0),
    "dense_tuned_s2": run(22.0, 60.0),
    "sparsek_tuned": run(24.0, 66.0),
    "sparsek_tuned_s1": run(99.0, 99.0),
    "sparsek_tuned_s2": run(26.0, 68.0),
  }
  pair = "sparsek_tuned", "dense_tuned"
  made = conversion_report.differences(runs, [pair, ("window_tuned", "dense_tuned")])
  (difference,) = made.values()
  assert difference.values == pytest.approx([0.25, 0.3])
  assert difference.over_documents == statistics.paired_bootstrap(
    [25.0, 67.0], [21.0, 60.0], [10, 30]
  )
  assert "; over documents +" in str(difference)
  assert conversion_report.about(made).endswith("the bootstrap over 2 of them.")


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
