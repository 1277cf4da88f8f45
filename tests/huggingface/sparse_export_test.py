"""Export of SPARSEK models with the file that transformers runs them with, and their cards.

tests/huggingface/modeling_sparsek_parity_test.py runs them, where PyTorch is installed.
"""

import ast
import dataclasses
import functools
import json
import sys

import jax
import numpy as np
import pytest

import sparsek.experiments.import_hf as import_hf
from sparsek.errors import UsageError
from sparsek.huggingface import pretrained
from sparsek.huggingface.config_writing import CODE, MODELLING, describe
from sparsek.model.transformer import init_params
from sparsek.runs.metrics import append_record
from tests.experiments.evaluate_test import write_run
from tests.helpers import SMALLEST, run_command

CONFIG = dataclasses.replace(
  SMALLEST,
  num_layers=2,
  attention=("sparsek:k6", "full"),
  rope_scaling="linear:2",
  implementation=None,
)
run = functools.partial(run_command, import_hf.main, import_hf.FLAGS)


@pytest.fixture(scope="module")
def params():
  return init_params(CONFIG, jax.random.key(0))


@pytest.fixture
def workdir(tmp_path, params):
  """Makes a run that was imported, trained and evaluated."""
  workdir = tmp_path / "run"
  write_run(workdir, "data", CONFIG, 32, params)
  (workdir / "flags.txt").write_text("--init_from=hf:/somewhere/Base-1B/\n--num_steps=1\n")
  append_record(str(workdir / "metrics.jsonl"), {"step": 7, "heldout_loss": 5.4321})
  model = json.loads(json.dumps(dataclasses.asdict(CONFIG)))
  others = model | {"gate": "value"}, model | {"k": 2}
  data = {"data": "/a/bo|oks", "seq_len": 64}
  evaluation = {"step": 7, "loss": 4.25, "num_targets": 1234, "data": data, "model": model}
  append_record(str(workdir / "evaluation.jsonl"), evaluation)
  for other in others:
    append_record(str(workdir / "evaluation.jsonl"), evaluation | {"loss": 9.0, "model": other})
  append_record(str(workdir / "evaluation.jsonl"), {"step": 7, "loss": "odd", "data": []})
  task = {"task": "passkey", "length": 128, "right": 3, "total": 4}
  append_record(str(workdir / "tasks.jsonl"), {"step": 7, "results": [task, 3], "model": model})
  for other in others:
    results = [task | {"right": 1}]
    append_record(str(workdir / "tasks.jsonl"), {"step": 7, "results": results, "model": other})
  append_record(str(workdir / "tasks.jsonl"), {"step": 7, "results": 7})
  return workdir


def read_json(path):
  return json.loads(path.read_text())


def test_a_sparsek_run_is_exported_as_a_sparsek_model(workdir, params, tmp_path, capsys):
  assert run(f"--workdir={workdir}", f"--export={tmp_path}/model") == 0
  assert "warning" not in capsys.readouterr().err
  fields = read_json(tmp_path / "model" / "config.json")
  assert (fields["model_type"], fields["auto_map"]) == ("sparsek", CODE)
  with open(pretrained.MODELLING_FILE, encoding="utf-8") as file:
    assert (tmp_path / "model" / f"{MODELLING}.py").read_text() == file.read()
  config, back = pretrained.load(str(tmp_path / "model"))
  assert config == CONFIG
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_the_card_says_what_the_records_hold(workdir, tmp_path):
  assert run(f"--workdir={workdir}", f"--export={tmp_path}/model") == 0
  card = (tmp_path / "model" / "README.md").read_text()
  for words in (
    "# model\n",
    "| 1 x sparsek (k 6, window 4), 1 x full |",
    "| started from | Base-1B |",
    "| data | data |",
    "| held-out loss | 5.4321 nats a token |",
    "| bo\\|oks | 64 | 1,234 | 4.2500 |",
    "| passkey | 128 | 3 of 4 |",
    "trust_remote_code=True",
  ):
    assert words in card, (words, card)
  assert "9.0000" not in card and "1 of 4" not in card  # of another gate or k
  assert "odd" not in card and "/a/" not in card and "/somewhere" not in card
  ast.parse(card.partition("```python\n")[2].partition("```")[0])


def test_the_card_names_the_heads_that_have_their_own_k_and_window(tmp_path):
  attention = ("sparsek:k6:h1:k0:w9", "full")
  config = dataclasses.replace(CONFIG, num_heads=2, num_kv_heads=2, attention=attention)
  write_run(tmp_path / "run", "data", config, 32, init_params(config, jax.random.key(0)))
  assert run(f"--workdir={tmp_path}/run", f"--export={tmp_path}/model") == 0
  heads = "sparsek (k 6, window 4) in KV heads 0 and sliding_window (window 9) in KV heads 1"
  assert f"| 1 x {heads}, 1 x full |" in (tmp_path / "model" / "README.md").read_text()
  assert pretrained.load(str(tmp_path / "model"))[0] == config


def test_the_users_own_card_is_kept(workdir, tmp_path):
  (workdir / "README.md").write_bytes(b"mine\r\n\xff\n")
  assert run(f"--workdir={workdir}", f"--export={tmp_path}/model") == 0
  assert (tmp_path / "model" / "README.md").read_bytes() == b"mine\r\n\xff\n"


def test_the_dense_model_is_written_where_it_is_asked_for(workdir, params, tmp_path):
  assert run(f"--workdir={workdir}", f"--export={tmp_path}/model", "--export_dense") == 0
  fields = read_json(tmp_path / "model" / "config.json")
  assert fields["model_type"] == "llama" and "auto_map" not in fields
  assert not (tmp_path / "model" / f"{MODELLING}.py").exists()
  card = (tmp_path / "model" / "README.md").read_text()
  assert "without the\nSPARSEK attention" in card and "trust_remote_code" not in card
  config, back = pretrained.load(str(tmp_path / "model"))
  assert config == CONFIG
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_what_the_file_lacks_is_written_dense_with_a_warning(tmp_path, capsys):
  config = dataclasses.replace(CONFIG, attention=("sparsek", "lsh"))
  write_run(tmp_path / "run", "data", config, 32, init_params(config, jax.random.key(0)))
  assert run(f"--workdir={tmp_path}/run", f"--export={tmp_path}/model") == 0
  warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
  assert len(warnings) == 1 and f"{MODELLING}.py has no attention=lsh" in warnings[0], warnings
  assert read_json(tmp_path / "model" / "config.json")["model_type"] == "llama"
  with pytest.raises(UsageError, match=f"{MODELLING}.py has no attention=lsh"):
    describe(config, family="sparsek")


def test_the_flag_says_where_it_does_nothing(tmp_path, capsys):
  config = dataclasses.replace(CONFIG, attention="full")
  write_run(tmp_path / "run", "data", config, 32, init_params(config, jax.random.key(0)))
  assert run(f"--workdir={tmp_path}/run", f"--export={tmp_path}/model", "--export_dense") == 0
  assert "warning: --export_dense has no effect" in capsys.readouterr().err
  card = (tmp_path / "model" / "README.md").read_text()
  assert "SPARSEK" not in card and "2 x full" in card
  assert run("--workdir=run", "--from=model", "--export_dense") == 2
  assert "--export_dense goes with --export=FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
  "changes", [{"attention": "full"}, {"scorer": "conv", "attention": "sparsek"}]
)
def test_it_is_converted_like_other_models(changes, params, tmp_path):
  """Scorers that another kind of attention does not need are ignored, and missing ones made."""
  pretrained.save(str(tmp_path / "model"), CONFIG, params)
  config = dataclasses.replace(CONFIG, **changes)
  _, back = pretrained.load(str(tmp_path / "model"), config=config, key=jax.random.key(0))
  assert ("scorer" in back["layers_0"]["attention"]) == ("scorer" in changes)
  np.testing.assert_array_equal(back["embed"]["embedding"], params["embed"]["embedding"])


def test_every_native_model_fits():
  """Norms, MLPs and positions that no family of transformers joins."""
  config = dataclasses.replace(CONFIG, norm="layer_norm", mlp="gelu", positions="learned")
  assert describe(config)["sparsek"]["norm"] == "layer_norm"
  with pytest.raises(UsageError, match="no family"):
    describe(config, dense=True)


def test_the_file_is_short_and_needs_pytorch_and_transformers_only():
  with open(pretrained.MODELLING_FILE, encoding="utf-8") as file:
    text = file.read()
  tree, other = ast.parse(text), set()
  docs = [
    node.body[0]
    for node in ast.walk(tree)
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
  ]
  for doc in docs:
    other |= set(range(doc.lineno, doc.end_lineno + 1))
  code = [line for i, line in enumerate(text.splitlines(), 1) if line.strip() and i not in other]
  assert len(code) <= 420
  modules = {
    name.split(".")[0]
    for node in ast.walk(tree)
    for name in (
      [alias.name for alias in node.names]
      if isinstance(node, ast.Import)
      else [node.module]
      if isinstance(node, ast.ImportFrom)
      else []
    )
  }
  assert modules - sys.stdlib_module_names == {"torch", "transformers"}
  classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
  assert {name.partition(".")[2] for name in CODE.values()} <= classes
