import dataclasses
import errno
import functools
import json
import os
import shutil

import jax
import numpy as np
import pytest

from sparsek.config import TransformerConfig
from sparsek.data.corpus import Document
from sparsek.data.token_files import write_token_files
from sparsek.data.tokenizer import ByteTokenizer, byte_level, load_tokenizer, train_bpe
from sparsek.experiments import evaluate, generate, import_hf, pretrain
from sparsek.huggingface import pretrained, tokenizer_files
from sparsek.model.transformer import init_params
from sparsek.runs import checkpoint, checkpoint_writer, run_record
from sparsek.storage import files
from sparsek.storage.new_folder import temporary_name
from tests.experiments.evaluate_test import write_run
from tests.helpers import run_command

CONFIG = TransformerConfig(
  vocab_size=300,
  num_layers=1,
  embed_dim=8,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=8,
  k=4,
  window=4,
  max_positions=64,
  attention="sliding_window",
)
run = functools.partial(run_command, import_hf.main, import_hf.FLAGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Makes run/, trained here; model/, exported from it; imported/, imported from that."""
  folder = tmp_path_factory.mktemp("hf")
  write_run(folder / "run", "data", CONFIG, 32, init_params(CONFIG, jax.random.key(0)))
  tokenizer = train_bpe(["some text, some more text; " * 9], 280)
  (folder / "run" / "tokenizer").mkdir()
  tokenizer.save(str(folder / "run" / "tokenizer"))
  record = json.loads((folder / "run" / "model.json").read_text())
  record["tokenizer"] = {
    "name": "bpe",
    "fingerprint": tokenizer.fingerprint,
    "vocab_size": tokenizer.vocab_size,
  }
  (folder / "run" / "model.json").write_text(json.dumps(record))
  assert run(f"--workdir={folder}/run", f"--export={folder}/model") == 0
  assert run(f"--workdir={folder}/imported", f"--from={folder}/model") == 0
  return folder


def test_a_run_comes_back_from_its_export(folder):
  config, record = run_record.load_run_config(str(folder / "imported"))
  assert config == CONFIG
  eos = load_tokenizer(str(folder / "run" / "tokenizer")).eos_id
  assert json.loads((folder / "model" / "config.json").read_text())["eos_token_id"] == eos
  assert (
    record["tokenizer"]["eos_ids"] == [eos]
    and run_record.load_run_tokenizer(str(folder / "imported")).fingerprint
    == record["tokenizer"]["fingerprint"]
  )
  want, got = (
    checkpoint.load_params(str(folder / name), CONFIG)[0] for name in ("run", "imported")
  )
  jax.tree.map(np.testing.assert_array_equal, got, want)
  jax.tree.map(np.testing.assert_array_equal, pretrained.load(str(folder / "model"))[1], want)


def test_an_export_tells_transformers_how_to_use_its_tokenizer(folder):
  """tests/huggingface/modeling_sparsek_parity_test.py reads it there."""
  path = folder / "model" / "tokenizer_config.json"
  fields = json.loads(path.read_text())
  assert fields["eos_token"] == fields["pad_token"] == "<|endoftext|>"
  assert (fields["padding_side"], fields["model_max_length"]) == ("left", CONFIG.max_positions)
  assert "bos_token" not in fields
  again = folder / "again"
  assert run(f"--workdir={folder}/imported", f"--export={again}") == 0
  assert (again / path.name).read_bytes() == path.read_bytes()


def test_what_a_tokenizer_config_lacks_is_added_to_what_it_holds(folder, tmp_path):
  """One that names a class is that of a model of Hugging Face's, and stays byte for byte."""
  target, eos = tmp_path / "tokenizer", "<|endoftext|>"
  tokenizer_files.copy(str(folder / "run" / "tokenizer"), str(target))
  library = json.loads((target / "tokenizer.json").read_text())
  library["added_tokens"].append(library["added_tokens"][0] | {"content": "<pad>", "id": 290})
  (target / "tokenizer.json").write_text(json.dumps(library))
  path = target / "tokenizer_config.json"

  def written(text=None):
    if text is not None:
      path.write_text(text)
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    tokenizer_files.write(str(out), str(target), load_tokenizer(str(target)), 64)
    return (out / path.name).read_text()

  whole = '{"tokenizer_class": "LlamaTokenizer",\n "eos_token": "<|endoftext|>"}'
  assert written(whole) == whole
  fields = json.loads(written(json.dumps({"eos_token": eos, "padding_side": "right"})))
  assert (fields["pad_token"], fields["padding_side"]) == ("<pad>", "right")
  path.unlink()
  (target / "special_tokens_map.json").write_text(json.dumps({"pad_token": eos, "eos_token": "a"}))
  fields = json.loads(written())
  assert (fields["pad_token"], fields["eos_token"], fields["padding_side"]) == (eos, "a", "left")


def test_a_run_on_bytes_comes_back_from_its_export(tmp_path):
  """Its tokenizer.json, which other programs read, is that of bytes, and known as such again."""
  write_run(tmp_path / "run", "data", CONFIG, 32, init_params(CONFIG, jax.random.key(0)))
  source = tmp_path / "run"
  for name in ("first", "second"):
    assert run(f"--workdir={source}", f"--export={tmp_path}/model {name}") == 0
    source = tmp_path / name
    assert run(f"--workdir={source}", f"--from={tmp_path}/model {name}") == 0
    assert sorted(os.listdir(tmp_path / f"model {name}")) == MODEL_FILES
  record = json.loads((source / "model.json").read_text())["tokenizer"]
  assert record["name"] == "byte" and record["eos_ids"] == [ByteTokenizer.eos_id]
  assert isinstance(run_record.load_run_tokenizer(str(source)), ByteTokenizer)
  library = byte_level()
  for text in ("h\u00e9llo  w\u00f6rld\n\n", "".join(map(chr, range(0x300))), "\U0001f600 \u65e5"):
    assert library.encode(text).ids == ByteTokenizer().encode(text)
    assert library.decode(ByteTokenizer().encode(text)) == text


def test_an_imported_model_writes(folder, capsys):
  assert (
    run_command(
      generate.main,
      generate.FLAGS,
      f"--workdir={folder}/imported",
      "--prompt=some",
      "--max_new_tokens=1",
      "--special_tokens",
    )
    == 0
  )
  assert capsys.readouterr().out.startswith("some")


@pytest.fixture(scope="module")
def data(folder):
  tokenizer = load_tokenizer(str(folder / "model"))
  documents = [Document(str(i), "some text, more text; " * 9, i % 2 == 0) for i in range(8)]
  write_token_files(str(folder / "data"), documents, tokenizer)
  write_token_files(str(folder / "bytes"), documents, ByteTokenizer())
  return folder / "data"


def test_conversion(folder, data):
  """A dense model is imported with SPARSEK attention, its scorers are warmed up, and it is trained
  on with a teacher, whatever names it; runs resume.
  """
  assert (
    run(
      f"--workdir={folder}/before",
      f"--from={folder}/model",
      "--attention=sparsek",
      "--k=2",
      "--window=4",
      "--scorer_init_sink=3",
    )
    == 0
  )
  train = lambda name, *flags_: run_command(
    pretrain.main,
    pretrain.FLAGS,
    f"--workdir={folder}/{name}",
    f"--data={data}",
    "--seq_len=16",
    "--batch_size=2",
    "--checkpoint_every=1",
    "--log_every=1",
    "--eval_every=0",
    "--implementation=reference",  # compiles fast
    *flags_,
  )
  config_of = lambda name: run_record.load_run_config(str(folder / name))[0]
  params_of = lambda name: checkpoint.load_params(str(folder / name), config_of(name))[0]
  warmup = [
    "--scorer_warmup",
    "--scorer_loss=1",
    "--trainable=scorer",
    f"--init_from={folder}/before",
    "--num_steps=2",
  ]
  assert train("warmup", *warmup, "--dry_run") == 0 and train("warmup", *warmup) == 0
  same = jax.tree.map(np.array_equal, params_of("before"), params_of("warmup"))
  moved = {
    jax.tree_util.keystr(path)
    for path, same in jax.tree_util.tree_leaves_with_path(same)
    if not same
  }
  assert moved == {
    f"['layers_0']['attention']['scorer']{leaf}"
    for leaf in ("['linear']['kernel']", "['scale']", "['slope']", "['sink']")
  }
  tune = lambda teacher: [
    f"--init_from={folder}/warmup",
    "--distill=.5",
    f"--distill_from={teacher}",
    "--scorer_loss=.1",
    "--num_steps=2",
  ]
  assert (
    train("tuned", *tune(f"hf:{folder}/model"), "--dry_run") == 0
    and train("tuned", *tune(f"hf:{folder}/model")) == 0
  )
  assert (
    train("stopped", *tune(f"{folder}/imported@0"), "--stop_at=1") == 0
    and train("stopped", *tune(f"{folder}/imported@0")) == 0
  )
  jax.tree.map(np.testing.assert_array_equal, params_of("tuned"), params_of("stopped"))
  assert set(json.loads((folder / "tuned" / "metrics.jsonl").read_text().splitlines()[0])) >= {
    "loss",
    "scorer_loss",
    "divergence",
  }
  config = config_of("tuned")
  assert (config.attention, config.k, config.scorer_init_sink, config.vocab_size) == (
    ("sparsek",),
    2,
    3.0,
    300,
  )


def test_conversion_by_adapters(folder, data, tmp_path, capsys):
  """Adapters and new scorers learn beside a folder's matrices; what is exported, generated and
  evaluated is the merged model.
  """
  train = lambda name, *flags_: run_command(
    pretrain.main,
    pretrain.FLAGS,
    f"--workdir={tmp_path}/{name}",
    f"--data={data}",
    "--seq_len=16",
    "--batch_size=2",
    "--learning_rate=0.1",
    "--warmup_steps=0",
    "--num_steps=2",
    "--eval_every=2",
    "--eval_batches=1",
    "--implementation=reference",
    *flags_,
  )
  adapted = [
    f"--init_from=hf:{folder}/model",
    "--attention=sparsek",
    "--lora_rank=2",
    "--lora_alpha=3",
    "--scorer_loss=.1",
  ]
  assert train("lora", *adapted, "--dry_run") == 0 and "of them learn" in capsys.readouterr().out
  assert train("lora", *adapted) == 0
  config, _ = run_record.load_run_config(str(tmp_path / "lora"))
  params, _ = checkpoint.load_params(str(tmp_path / "lora"), config)
  assert run(f"--workdir={tmp_path}/lora", f"--export={tmp_path}/model") == 0
  exported, back = pretrained.load(str(tmp_path / "model"))
  assert exported == config and config.lora_rank == 0
  jax.tree.map(np.testing.assert_array_equal, back, params)
  assert not np.array_equal(
    params["layers_0"]["mlp"]["up"]["kernel"],
    pretrained.load(str(folder / "model"))[1]["layers_0"]["mlp"]["up"]["kernel"],
  )
  heldout = json.loads((tmp_path / "lora" / "metrics.jsonl").read_text().splitlines()[-1])[
    "heldout_loss"
  ]
  assert (
    run_command(evaluate.main, evaluate.FLAGS, f"--workdir={tmp_path}/lora", "--eval_batches=1")
    == 0
  )
  assert json.loads((tmp_path / "lora" / "evaluation.jsonl").read_text())["loss"] == pytest.approx(
    heldout, abs=1e-5
  )
  assert (
    run_command(
      generate.main,
      generate.FLAGS,
      f"--workdir={tmp_path}/lora",
      "--prompt=some",
      "--max_new_tokens=1",
    )
    == 0
  )
  teacher = ["--distill=.5", f"--distill_from={tmp_path}/lora"]
  # without --lora_rank: from the merged model
  assert train("next", f"--init_from={tmp_path}/lora", *teacher) == 0
  assert (
    json.loads((tmp_path / "next" / "metrics.jsonl").read_text().splitlines()[0])["divergence"]
    < 1e-3
  )


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--preset=mini"], "--preset=mini and a pretrained model's architecture exclude each other"),
    (["--embed_dim=16"], "embed_dim=16 here, 8 there"),
    (["--trainable=scorer"], "--trainable=scorer: no layer has such parameters"),
    (["--distill=1", "--distill_from={folder}/model"], "{folder}/model holds no run"),
    (
      [
        "--distill=1",
        "--distill_from=hf:{folder}/model",
        "--data={folder}/bytes",
        "--init_from={folder}/none",
        "--preset=tiny",
      ],
      "--distill_from=hf:{folder}/model: its tokenizer",
    ),
    (
      ["--data={folder}/bytes"],
      "the tokenizer of --data={folder}/bytes is not that of --init_from=hf:{folder}/model",
    ),
    (["--lora_rank=-1"], "--lora_rank=-1: must be an integer of at least 0"),
    (["--lora_rank=9"], "--lora_rank=9 must be at most 8"),
    (["--lora_alpha=4"], "--lora_alpha=4.0 must go with a lora_rank above 0; lora_rank=0"),
    (["--lora_rank=2", "--lora_alpha=0"], "--lora_alpha=0: must be a number above 0"),
    (
      ["--lora_rank=2", "--trainable=scorer"],
      "--lora_rank=2 and --trainable=scorer exclude each other",
    ),
    (
      ["--lora_rank=2", "--trainable=scorer", "--scorer_warmup", "--scorer_loss=1"],
      "--lora_rank=2 and --scorer_warmup and --trainable=scorer exclude each",
    ),
    (["--init_from=hf:{folder}/nowhere"], "{folder}/nowhere/config.json cannot be read"),
  ],
)
def test_bad_training_of_a_pretrained_model(folder, data, capsys, arguments, words):
  arguments = [argument.format(folder=folder) for argument in arguments]
  base = [
    f"--workdir={folder}/bad",
    f"--init_from=hf:{folder}/model",
    f"--data={data}",
    "--seq_len=16",
    "--batch_size=1",
    "--num_steps=1",
  ]
  assert run_command(pretrain.main, pretrain.FLAGS, *base, *arguments) == 2
  assert words.format(folder=folder) in capsys.readouterr().err


def test_tokens_that_end_a_text(folder, tmp_path):
  tokenizer = load_tokenizer(str(folder / "model"))
  (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
  assert import_hf.end_tokens(str(tmp_path), tokenizer) == [tokenizer.eos_id, 7]
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
  assert import_hf.end_tokens(str(tmp_path), tokenizer) == [tokenizer.eos_id, 8, 9]
  (tmp_path / "generation_config.json").write_text("{}")
  (tmp_path / "config.json").write_text("{}")
  assert import_hf.end_tokens(str(tmp_path), tokenizer) == [tokenizer.eos_id]


@pytest.mark.parametrize(
  "arguments, words",
  [
    ([], "--workdir is required"),
    (["--workdir={new}"], "give one of --from=FOLDER"),
    (["--workdir={new}", "--from={folder}/model", "--export={new}"], "give one of --from=FOLDER"),
    (
      ["--workdir={new}", "--from={folder}/nowhere"],
      "--from={folder}/nowhere: there is no such folder",
    ),
    (["--workdir={new}", "--from={folder}/run"], "found no file {folder}/run/tokenizer.json"),
    (
      ["--workdir={folder}/run", "--from={folder}/model"],
      "--workdir={folder}/run holds a run (model.json): give a new folder",
    ),
    (
      ["--workdir={folder}/run", "--export={folder}/model"],
      "--export={folder}/model holds a model in Hugging Face's format",
    ),
    (["--workdir={folder}/run", "--export={new}", "--step=3"], "no checkpoint of step 3"),
    (["--workdir={new}", "--export={new}/a"], "{new} holds no run"),
  ],
)
def test_bad_input_exits_with_2_and_one_sentence(folder, tmp_path, capsys, arguments, words):
  fill = lambda text: text.format(folder=folder, new=tmp_path / "new")
  assert run(*map(fill, arguments)) == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith("error: ") and fill(words) in error
  assert not (tmp_path / "new").exists()


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
NO_SPACE_SAID = "cannot be written: No space left on device"
RUN_FILES = ["checkpoints", "flags.txt", "model.json", "tokenizer", "versions.json"]
MODEL_FILES = [
  "README.md",
  "config.json",
  "model.safetensors",
  "tokenizer.json",
  "tokenizer_config.json",
]


def failing(*_, **__):
  raise NO_SPACE


def assert_fails(capsys, code, words, folder, *arguments):
  """Checks that the command ends in one sentence and makes nothing."""
  before = sorted(os.listdir(folder))
  assert run(*arguments) == code
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith("error: ") and words in error
  assert sorted(os.listdir(folder)) == before


def test_an_import_that_fails_leaves_nothing_and_repeats(folder, tmp_path, capsys, monkeypatch):
  shutil.copytree(folder / "model", tmp_path / "model")
  arguments = f"--from={tmp_path}/model", f"--workdir={tmp_path}/new"
  generation = tmp_path / "model" / "generation_config.json"
  generation.write_text('{"eos_token_id": 2,}')
  assert_fails(capsys, 2, f"{generation}: no JSON", tmp_path, *arguments)
  generation.write_text('{"eos_token_id": [2, 7]}')
  for target, name in (
    (checkpoint_writer.CheckpointWriter, "save"),
    (shutil, "copyfile"),
    (os, "fsync"),
    (files, "write_atomically"),
  ):
    with monkeypatch.context() as patch:
      patch.setattr(target, name, failing)
      assert_fails(capsys, 1, f"{tmp_path}/new {NO_SPACE_SAID}", tmp_path, *arguments)
  leftover = temporary_name(str(tmp_path / "new"))  # of one that was killed
  os.makedirs(os.path.join(leftover, "checkpoints", "0"))
  assert run(*arguments) == 0
  _, record = run_record.load_run_config(str(tmp_path / "new"))
  assert record["tokenizer"]["eos_ids"] == [0, 2, 7]
  checkpoint.load_params(str(tmp_path / "new"), CONFIG)
  assert sorted(os.listdir(tmp_path)) == ["model", "new"]
  assert sorted(os.listdir(tmp_path / "new")) == RUN_FILES


def test_an_export_that_fails_leaves_nothing_and_repeats(folder, tmp_path, capsys, monkeypatch):
  arguments = f"--workdir={folder}/run", f"--export={tmp_path}/out"
  for target, name in (
    (np, "ascontiguousarray"),
    (shutil, "copyfile"),
    (os, "fsync"),
    (os, "rename"),
  ):
    with monkeypatch.context() as patch:
      patch.setattr(target, name, failing)
      assert_fails(capsys, 1, f"{tmp_path}/out {NO_SPACE_SAID}", tmp_path, *arguments)
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("")
  assert_fails(capsys, 2, f"{tmp_path}/out is not empty", tmp_path, *arguments)
  (tmp_path / "out" / "mine").unlink()
  assert run(*arguments) == 0
  assert os.listdir(tmp_path) == ["out"]
  assert sorted(os.listdir(tmp_path / "out")) == MODEL_FILES


@pytest.mark.parametrize(
  "names", [{"tokenizer_config": {"eos_token": "e"}}, {"config": {"eos_token_id": [3, 0]}}]
)
def test_the_end_of_a_document_survives_import_and_export(folder, tmp_path, names):
  """Runs and what is exported of them end documents as the folder's files say."""
  shutil.copytree(folder / "model", tmp_path / "model")
  tokens = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
  special = dict(
    tokens["added_tokens"][0],
    id=3,
    content=next(token for token, i in tokens["model"]["vocab"].items() if i == 3),
  )
  tokens["added_tokens"].append(special)
  (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokens))
  (tmp_path / "model" / "tokenizer_config.json").unlink()
  for name, fields in names.items():
    path = tmp_path / "model" / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | fields))
  want = load_tokenizer(str(tmp_path / "model"))
  assert run(f"--from={tmp_path}/model", f"--workdir={tmp_path}/new") == 0
  assert run(f"--export={tmp_path}/out", f"--workdir={tmp_path}/new") == 0
  record = run_record.load_run_config(str(tmp_path / "new"))[1]["tokenizer"]
  assert (record["fingerprint"], record["eos_ids"]) == (want.fingerprint, [want.eos_id, 0])
  run_tokenizer = run_record.load_run_tokenizer(str(tmp_path / "new"))
  for copy in (run_tokenizer, load_tokenizer(str(tmp_path / "out"))):
    assert (copy.eos_id, copy.fingerprint) == (want.eos_id, want.fingerprint)


def test_a_tokenizer_with_more_ids_than_the_model(folder, tmp_path, capsys):
  shutil.copytree(folder / "model", tmp_path / "model")
  config, params = pretrained.load(str(folder / "model"))
  cut = {**params, "embed": {"embedding": params["embed"]["embedding"][:200]}}
  shutil.rmtree(tmp_path / "model")
  pretrained.save(str(tmp_path / "model"), dataclasses.replace(config, vocab_size=200), cut)
  shutil.copy(folder / "model" / "tokenizer.json", tmp_path / "model")
  assert run(f"--workdir={tmp_path}/new", f"--from={tmp_path}/model") == 2
  assert "and the model a vocab_size=200" in capsys.readouterr().err
