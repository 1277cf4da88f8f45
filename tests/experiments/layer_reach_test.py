"""The script: its table, its record, and what it refuses before any work."""

import dataclasses
import functools
import json

import jax
import pytest

from sparsek.config import TransformerConfig, parse_layer_pattern
from sparsek.data.corpus import Document
from sparsek.data.token_files import write_token_files
from sparsek.data.tokenizer import ByteTokenizer
from sparsek.experiments import layer_reach
from sparsek.model.transformer import init_params
from tests.experiments.evaluate_test import write_run
from tests.helpers import run_command

CONFIG = TransformerConfig(
  num_layers=2, embed_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8, attention="full"
)
run = functools.partial(run_command, layer_reach.main, layer_reach.FLAGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs")
  write_token_files(
    str(folder / "data"),
    [Document(str(i), f"{i}: {i**9}\n" * 9, i % 2 == 0) for i in range(20)],
    ByteTokenizer(),
  )
  (folder / "folder.json").mkdir()
  for name, fields in (
    ("dense", {}),
    ("sparse", {"attention": "sparsek"}),
    ("heads", {"num_heads": 4, "num_kv_heads": 2}),
  ):
    config = dataclasses.replace(CONFIG, **fields)
    write_run(folder / name, folder / "data", config, 32, init_params(config, jax.random.key(0)))
  return folder


def test_table_and_record(folder, capsys):
  assert (
    run(
      f"--workdir={folder}/dense",
      "--seq_len=64",
      "--batch_size=1",
      "--eval_batches=2",
      "--window=8",
      "--sinks=2",
      "--k=3",
      "--budget=20",
      f"--record={folder}/reach.json",
    )
    == 0
  )
  out = capsys.readouterr().out
  record = json.loads((folder / "reach.json").read_text())
  assert (
    record["term"] == "attention_sinks:k2:w6" and len(record["rises"]) == 2 and record["step"] == 7
  )
  assert (
    record["layer_pattern"] in out
    and f"loss {record['loss']:.4f}" in out
    and all(f"{rise:+.4f}" in out for rise in record["rises"])
  )
  first = record["rises"][0] >= record["rises"][1]
  assert parse_layer_pattern(record["layer_pattern"]) == (
    ("sparsek:k21:w8", "sparsek:k3:w8") if first else ("sparsek:k3:w8", "sparsek:k21:w8")
  )


def test_layers_that_get_most_of_the_keys(folder, capsys):
  words = ["--seq_len=64", "--eval_batches=1", "--window=8", "--k=3", "--budget=20"]
  assert run(f"--workdir={folder}/dense", *words, "--long_layers=2") == 0
  (line,) = [line for line in capsys.readouterr().out.splitlines() if "--layer_pattern" in line]
  assert parse_layer_pattern(line.partition("=")[2]) == ("sparsek:k12:w8",) * 2


def test_heads_that_get_most_of_the_keys(folder, capsys):
  words = ["--seq_len=64", "--eval_batches=1", "--window=8", "--k=0", "--budget=20", "--by_heads"]
  record = folder / "heads.json"
  assert run(f"--workdir={folder}/heads", *words, "--long_heads=1", f"--record={record}") == 0
  out, kept = capsys.readouterr().out, json.loads(record.read_text())
  rises = {(i, g): kept["rises"][i][g] for i in range(2) for g in range(2)}
  assert all(f"{i:4} {g:3} {rise:+.4f}" in out for (i, g), rise in rises.items())
  layer, head = max(rises, key=lambda place: rises[place])
  terms = ["sliding_window:w8", "sliding_window:w8"]
  terms[layer] = f"sparsek:k48:w8:h{1 - head}:k0"
  assert f"--layer_pattern={kept['layer_pattern']}" in out
  assert list(parse_layer_pattern(kept["layer_pattern"])) == terms
  # A head has the rise of its layer where it is the only one.
  assert run(f"--workdir={folder}/dense", *words) == 0
  assert run(f"--workdir={folder}/dense", *words[:-1]) == 0
  tables = [
    [line.split()[-1] for line in out.splitlines() if line.startswith("   ")]
    for out in capsys.readouterr().out.split("loss")[1:]
  ]
  assert tables[0] == tables[1]


@pytest.mark.parametrize(
  "given, message",
  [
    (["--workdir={}/dense", "--long_heads=2"], "--long_heads=2 needs --by_heads"),
    (
      ["--workdir={}/dense", "--by_heads", "--long_layers=2"],
      "--long_layers=2 does not go with --by_heads",
    ),
    (["--workdir={}/nowhere"], "--workdir={}/nowhere: must be the folder of a run"),
    (["--workdir={}/sparse"], "all layers must have full attention; it has sparsek"),
    (["--workdir={}/dense", "--budget=9", "--window=8", "--k=3"], "--budget=9 must be at least 11"),
    (["--workdir={}/dense", "--sinks=8", "--window=8"], "--sinks=8 must be below --window=8"),
    (["--workdir={}/dense", "--context=77"], "--fsdp=1 x --context=77 must divide the number of"),
    (
      ["--workdir={}/dense", "--record={}/nowhere/x.json"],
      "--record={}/nowhere/x.json: must be a .json file in a folder that exists",
    ),
    (["--workdir={}/dense", "--record={}/folder.json"], "{}/folder.json is a folder"),
    (
      ["--workdir={}/dense", "--record={}/dense/model.json"],
      "--record={}/dense/model.json is a file of the run in",
    ),
  ],
)
def test_refusals(given, message, folder, capsys):
  assert run(*(words.format(folder) for words in given)) == 2
  assert message.format(folder) in capsys.readouterr().err
