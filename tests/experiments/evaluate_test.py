import dataclasses
import functools
import math

import jax
import pytest

from sparsek.config import DataConfig
from sparsek.data.corpus import Document
from sparsek.data.token_files import write_token_files
from sparsek.data.tokenizer import ByteTokenizer
from sparsek.errors import UsageError
from sparsek.experiments import (
  evaluate,
  evaluate_ruler,
  evaluate_tasks,
  generate,
  import_hf,
  layer_reach,
)
from sparsek.model.transformer import init_params
from sparsek.runs import checkpoint, checkpoint_writer, run_directory
from sparsek.runs.metrics import read_metrics
from tests.helpers import SMALLEST as CONFIG
from tests.helpers import run_command, spm


def text(i):
  return f"Document {i}: {i**7} {i**11}.\n" * 4


run = functools.partial(run_command, evaluate.main, evaluate.FLAGS)


def write_run(folder, data, config, seq_len, params, steps=(7,)):
  """Writes a run as pretraining leaves it and evaluation reads it."""
  tokenizer = ByteTokenizer()
  folder.mkdir()
  record = {
    "model": dataclasses.asdict(config),
    "data": dataclasses.asdict(DataConfig(data=str(data), seq_len=seq_len, batch_size=2)),
    "tokenizer": {
      "name": tokenizer.name,
      "fingerprint": tokenizer.fingerprint,
      "vocab_size": tokenizer.vocab_size,
    },
  }
  run_directory.write_record(str(folder), "model.json", run_directory.to_json(record))
  writer = checkpoint_writer.CheckpointWriter(str(folder), keep=len(steps))
  for step in steps:
    writer.save(step, params, params, {})
  writer.close()
  return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Makes data/, other_data/, and the runs a (trained on rows of 32 tokens), b (48) and empty (no
  checkpoint).
  """
  folder = tmp_path_factory.mktemp("runs")
  for name, number in (("data", 40), ("other_data", 30)):
    documents = [Document(str(i), text(i), i % 2 == 0) for i in range(number)]
    write_token_files(str(folder / name), documents, ByteTokenizer())
  params = init_params(CONFIG, jax.random.key(0))
  write_run(folder / "a", folder / "data", CONFIG, 32, params)
  write_run(folder / "b", folder / "data", dataclasses.replace(CONFIG, gate="value"), 48, params)
  write_run(folder / "elsewhere", folder / "other_data", CONFIG, 32, params)
  record = write_run(folder / "unsegmented", folder / "data", CONFIG, 32, params) / "model.json"
  record.write_text(
    record.read_text().replace('"segment_documents": true', '"segment_documents": false')
  )
  write_run(folder / "empty", folder / "data", CONFIG, 32, params)
  (folder / "empty" / "checkpoints" / "7").rename(folder / "moved")
  full = dataclasses.replace(CONFIG, attention="full")
  write_run(
    folder / "damaged",
    folder / "data",
    full,
    32,
    init_params(full, jax.random.key(0)),
    steps=(7, 9),
  )
  (folder / "damaged" / "checkpoints" / "9" / "params" / "_METADATA").unlink()
  write_run(folder / "no_record", folder / "data", CONFIG, 32, params)
  (folder / "no_record" / "evaluation.jsonl").mkdir()
  return folder


def records(workdir):
  return read_metrics(str(workdir / "evaluation.jsonl"))


def test_runs_side_by_side_then_one_with_another_k(folder, capsys):
  a, b = folder / "a", folder / "b"
  assert run(f"--workdir={a},{b}", "--eval_batches=2", "--seq_len=96") == 0
  out = capsys.readouterr().out
  assert "at positions 32 to 47" in out and "* beyond the training length" in out
  row = next(line for line in out.splitlines() if "at positions 32 to 47" in line)
  # beyond a's training length, not beyond b's
  assert row.split()[-2].endswith("*") and not row.endswith("*")
  (first,), (second,) = records(a), records(b)
  assert (
    first["step"] == 7
    and first["model"]["k"] == 4
    and "--seq_len=96" in first["flags"]
    and first["versions"]["packages"]["jax"]
  )
  assert first["loss"] == pytest.approx(math.log(257), rel=0.2)
  assert (
    first["num_targets"]
    == sum(bucket["num_targets"] for bucket in first["buckets"])
    == second["num_targets"]
  )
  assert f"interval over {len(first['documents']['index'])} documents" in out
  assert sum(first["documents"]["num_targets"]) == first["num_targets"]
  assert sum(first["documents"]["loss_sum"]) == pytest.approx(first["loss"] * first["num_targets"])
  assert "minus the first run" in out and "p of 2 comparisons, corrected (Holm)" in out
  far = first["far_repeats"]
  assert (far["distance"], far["ngram"], far["most"]) == (24, 4, 8) and far["num_targets"] > 50
  assert f"repeats over 24 tokens back ({far['num_targets']} tokens)" in out
  assert f"{far['loss']:.4f}" in out
  bytes_per_token = 1 - 20 / sum(len(text(i)) + 1 for i in range(0, 40, 2))
  assert first["bits_per_byte"] == pytest.approx(first["loss"] / math.log(2) / bytes_per_token)
  assert f"{first['loss']:.4f}" in out and f"{second['loss']:.4f}" in out
  assert run(f"--workdir={a}", "--k=9", "--window=0", "--eval_batches=1", "--step=7") == 0
  third = records(a)[1]
  assert records(a)[0] == first and third["model"]["k"] == 9 and third["data"]["seq_len"] == 32
  assert "beyond" not in capsys.readouterr().out


def test_data_that_begin_otherwise_are_told(capsys):
  def say(**record):
    run = evaluate.Run("run", None, {"tokenizer": record})
    evaluate._say_how_documents_begin(run, spm())
    return capsys.readouterr().err

  assert say(bos_ids=[1]) == "run: each document begins with <s> and ends with </s>\n"
  assert "warning: the documents of run began with nothing" in say()
  assert "warning: the documents of run began with </s>" in say(bos_ids=[2])


@pytest.mark.parametrize(
  "arguments, words",
  [
    ([], "--workdir is required"),
    (["--workdir={folder}/nowhere"], "nowhere: there is no such folder"),
    (["--workdir={folder}/a,{folder}/data"], "data holds no run"),
    (["--workdir={folder}/empty"], "empty holds no checkpoint"),
    (["--workdir={folder}/a", "--step=8"], "no checkpoint of step 8; it has 7"),
    (["--workdir={folder}/a", "--seq_len=100000"], "--seq_len=100000 must be at most "),
    (["--workdir={folder}/a", "--seq_len=0"], "--seq_len=0"),
    (["--workdir={folder}/a", "--k=0"], "--k=0"),
    (["--workdir={folder}/a", "--far_repeats=-1"], "--far_repeats=-1: must be an integer of"),
    (["--workdir={folder}/a", "--far_repeats_ngram=0"], "--far_repeats_ngram=0: must be"),
    (["--workdir={folder}/a", "--far_repeats_most=1.5"], "--far_repeats_most=1.5: must be"),
    (["--workdir={folder}/a", "--fsdp=77"], "--fsdp=77 x --context=1 must divide the number of"),
    (["--workdir={folder}/a", "--data={folder}/no_data"], "no_data"),
    (["--workdir={folder}/a", "--implementation=mosaic_tpu"], "--implementation=mosaic_tpu: "),
    (["--workdir={folder}/a,{folder}/elsewhere"], "read different tokens"),
    (
      ["--workdir={folder}/a,{folder}/unsegmented"],
      "see different context, as only one was trained",
    ),
    (["--workdir={folder}/a", "--eval_steps=3"], "eval_steps"),
    (["--workdir={folder}/a,{folder}/no_record"], "no_record/evaluation.jsonl is a folder"),
    (["{folder}/a"], "--name=value"),
  ],
)
def test_bad_input_exits_with_2_and_one_sentence(folder, capsys, arguments, words):
  assert run(*(argument.format(folder=folder) for argument in arguments)) == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith("error: ") and words in error


def test_a_damaged_run_is_refused_and_costs_no_other_its_figures(folder, capsys):
  b, damaged = folder / "b", folder / "damaged"
  before = len(records(b))
  arguments = (f"--workdir={b},{damaged}", "--eval_batches=1", "--seq_len=32")
  assert run(*arguments) == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert "checkpoints/9 is damaged: params: FileNotFoundError" in error
  assert "give --step=7 " in error and error.endswith(" or --allow_older_step")
  assert len(records(b)) == before + 1 and not (damaged / "evaluation.jsonl").exists()
  assert run(*arguments, "--allow_older_step") == 0
  assert "checkpoints/9 is damaged and is not used" in capsys.readouterr().err
  assert [record["step"] for record in records(damaged)] == [7]


COMMANDS = {
  "evaluate": (evaluate, []),
  "evaluate_tasks": (evaluate_tasks, ["--tasks=copy", "--lengths=256"]),
  "evaluate_ruler": (evaluate_ruler, ["--tasks=fwe", "--lengths=512", "--prompts=1"]),
  "generate": (generate, []),
  "layer_reach": (layer_reach, ["--seq_len=64"]),
  "import_hf": (import_hf, ["--export={folder}/exported"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_takes_an_older_step_unasked(name, folder, monkeypatch, capsys):
  asked = []

  def load(*_, allow_older=False):
    asked.append(allow_older)
    raise UsageError("enough")

  script, arguments = COMMANDS[name]
  monkeypatch.setattr(checkpoint, "load_params", load)
  for flag in ((), ("--allow_older_step",)):
    words = [argument.format(folder=folder) for argument in arguments]
    values = script.FLAGS
    assert run_command(script.main, values, f"--workdir={folder}/damaged", *words, *flag) == 2
    assert capsys.readouterr().err.endswith("error: enough\n")
  assert asked == [False, True]


def test_documents_that_take_hours_to_make_are_refused():
  with pytest.raises(UsageError, match="--lengths=2147483648: must be at most 16777216"):
    evaluate_tasks.check_lengths([128, 2**31])


@pytest.fixture(scope="module")
def patterns(folder):
  """Makes the runs own (layers with their own k and window), full, and hybrid."""
  names = {
    "own": "sparsek:k3:w4",
    "full": "full",
    "hybrid": "sliding_window:w9,sparsek",
    "both": "sparsek:k3,sliding_window",
  }
  for name, attention in names.items():
    config = dataclasses.replace(CONFIG, attention=attention, num_layers=len(attention.split(",")))
    params = init_params(config, jax.random.key(0))
    write_run(folder / f"of_{name}", folder / "data", config, 32, params)
  return {name: folder / f"of_{name}" for name in names}


def test_the_table_has_the_k_and_window_of_the_layers(patterns, capsys):
  folders = ",".join(map(str, patterns.values()))
  assert run(f"--workdir={folders}", "--eval_batches=1", "--k=6", "--window=5") == 0
  rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
  assert [cell.strip() for cell in rows["k"].split("  ") if cell][1:] == ["3", "-", "6", "3"]
  cells = [cell.strip() for cell in rows["window"].split("  ") if cell][1:]
  assert cells == ["4", "-", "9, 5", "5"]


@pytest.mark.parametrize("module", [evaluate, evaluate_tasks, generate])
@pytest.mark.parametrize(
  "name, flag, words",
  [
    (
      "own",
      "--k=300",
      "--k=300 has no effect: each layer of attention=sparsek:k3:w4 has its own k",
    ),
    ("own", "--window=5", "--window=5 has no effect: each layer"),
    ("full", "--window=2", "--window=2 has no effect: no layer of attention=full has a window"),
    ("full", "--k=2", "--k=2 has no effect: no layer of attention=full has a k"),
    ("full", "--gate=value", "--gate=value has no effect: no layer of attention=full has a gate"),
  ],
)
def test_a_flag_that_no_layer_takes_is_refused(module, name, flag, words, patterns, capsys):
  arguments = ["--lengths=1024", "--examples=1"] if module is evaluate_tasks else []
  code = run_command(module.main, module.FLAGS, f"--workdir={patterns[name]}", flag, *arguments)
  assert code == 2 and f"error: {words}" in capsys.readouterr().err
