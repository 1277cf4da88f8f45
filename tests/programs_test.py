"""Training, loading, evaluation and generation from Python, beside the commands."""

import dataclasses
import os

import jax
import numpy as np
import orbax.checkpoint
import pytest
from orbax.checkpoint import v1

from sparsek import programs
from sparsek.data.corpus import Document
from sparsek.data.token_files import write_token_files
from sparsek.data.tokenizer import ByteTokenizer
from sparsek.errors import UsageError
from sparsek.experiments import evaluate as evaluate_command
from sparsek.experiments import generate as generate_command
from sparsek.runs.metrics import read_metrics
from tests.helpers import SMALLEST as CONFIG
from tests.helpers import run_command

SETTINGS = {"seq_len": 16, "batch_size": 2, "eval_every": 0, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Makes data/, and run/ with checkpoints of steps 1 and 2, by two calls."""
  folder = tmp_path_factory.mktemp("programs")
  documents = [Document(str(i), f"Document {i}: {i**7}.\n" * 4, i % 2 == 0) for i in range(40)]
  write_token_files(str(folder / "data"), documents, ByteTokenizer())
  small = dataclasses.replace(CONFIG, vocab_size=300)  # the data's has 257 ids
  for stop_at, step in ((1, 1), (None, 2)):
    result = programs.train(
      small, folder / "data", folder / "run", num_steps=2, stop_at=stop_at, **SETTINGS
    )
    assert result.step == step and result.stopped == (step == 1)
  return folder


@pytest.fixture(scope="module")
def run(folder):
  return programs.load(folder / "run")


def test_training_leaves_compiled_programs_where_others_do(folder):
  assert os.path.abspath(jax.config.jax_compilation_cache_dir or "") != str(folder / "run")


def test_a_loaded_run_has_what_it_was_trained_with(folder, run):
  assert run.step == 2 and run.config == dataclasses.replace(CONFIG, vocab_size=257)
  assert run.tokenizer.decode(run.tokenizer.encode("def")) == "def"
  first = programs.load(folder / "run", 1, k=2, window=3)
  assert (first.step, first.config.k, first.config.window) == (1, 2, 3)
  differ = jax.tree.map(lambda a, b: bool((a != b).any()), first.params, run.params)
  assert any(jax.tree.leaves(differ))
  with pytest.raises(UsageError, match="no checkpoint of step 7; it has 1, 2"):
    programs.load(folder / "run", 7)


def test_evaluate_gives_what_the_command_records(folder, run):
  result = programs.evaluate(run, seq_len=24, eval_batches=2, k=2)
  flags = ("--seq_len=24", "--eval_batches=2", "--k=2")
  main, values = evaluate_command.main, evaluate_command.FLAGS
  assert run_command(main, values, f"--workdir={folder}/run", *flags) == 0
  recorded = read_metrics(str(folder / "run" / "evaluation.jsonl"))[-1]
  for name in ("loss", "bits_per_byte", "num_targets", "step", "data"):
    assert result[name] == recorded[name], name
  assert list(result["buckets"]) == recorded["buckets"] and recorded["model"]["k"] == 2
  assert programs.evaluate(run, seq_len=24, eval_batches=2)["loss"] != result["loss"]


def test_evaluate_takes_other_parameters(run):
  zero = run._replace(params=jax.tree.map(np.zeros_like, run.params))
  assert programs.evaluate(zero, eval_batches=1)["loss"] == pytest.approx(np.log(257), rel=1e-5)


def test_generate_continues_as_the_command_does(folder, run, capsys):
  text = programs.generate(run, "Docu", max_new_tokens=12, seed=3, top_k=9)
  flags = ("--prompt=Docu", "--max_new_tokens=12", "--sampling_seed=3", "--top_k=9")
  main, values = generate_command.main, generate_command.FLAGS
  assert run_command(main, values, f"--workdir={folder}/run", *flags) == 0
  assert capsys.readouterr().out == f"Docu{text}\n" and text
  assert programs.generate(folder / "run", "Docu", max_new_tokens=12, seed=4, top_k=9) != text
  assert (
    programs.generate(run, "Docu", max_new_tokens=12, seed=3, top_k=9, stop=[text[2:]])
    == (text[:2])
  )
  with pytest.raises(UsageError, match="stop='ab' must be a sequence of texts"):
    programs.generate(run, stop="ab")


def test_seed_is_that_of_the_data_too(monkeypatch, folder):
  monkeypatch.setattr(programs.loop, "train", lambda *arguments: arguments)
  config, train_config, dataset = programs.train(
    CONFIG, folder / "data", "w", num_steps=50, seed=5, learning_rate=0.5
  )
  assert config.vocab_size == dataset.vocab_size == 257
  assert (train_config.seed, train_config.data.seed) == (5, 5)
  assert train_config.optimizer.warmup_steps == 5
  assert train_config.optimizer.learning_rate == 0.5


def test_an_unknown_setting_is_refused(folder):
  for name, advice in (("seqlen", "did you mean seq_len"), ("zzz", "known are b1, b2")):
    with pytest.raises(UsageError, match=f"{name}=8 is no setting of a run: {advice}"):
      programs.train(CONFIG, folder / "data", folder / "new", num_steps=1, **{name: 8})
  with pytest.raises(ValueError, match="seq_len=0 must be at least 1"):
    programs.train(CONFIG, folder / "data", folder / "new", num_steps=1, seq_len=0)
  assert not os.path.exists(folder / "new")


def from_manager(step, args=None):
  with orbax.checkpoint.CheckpointManager(step.parent) as manager:
    return manager.restore(int(step.name), args=args)["params"]


def restore_some(**items):
  return orbax.checkpoint.args.Composite(**items)


def from_checkpointer(step):
  with v1.training.Checkpointer(step.parent) as checkpointer:
    return checkpointer.load(int(step.name), checkpointable_name="params")


STANDARD, PYTREE, JSON = (
  orbax.checkpoint.args.StandardRestore,
  orbax.checkpoint.args.PyTreeRestore,
  orbax.checkpoint.args.JsonRestore,
)
WAYS = {
  "v1.load": v1.load,
  "v1.load by name": lambda step: v1.load(step, checkpointable_name="params"),
  "v1.load_checkpointables": lambda step: v1.load_checkpointables(step)["params"],
  "v1.training.Checkpointer": from_checkpointer,
  "CheckpointManager": from_manager,
  "CheckpointManager, StandardRestore": lambda step: from_manager(
    step, restore_some(params=STANDARD())
  ),
  "CheckpointManager, PyTreeRestore and JsonRestore": lambda step: from_manager(
    step, restore_some(params=PYTREE(), data=JSON())
  ),
  "StandardCheckpointer": lambda step: orbax.checkpoint.StandardCheckpointer().restore(
    step / "params"
  ),
  "PyTreeCheckpointer": lambda step: orbax.checkpoint.PyTreeCheckpointer().restore(step / "params"),
}


@pytest.mark.parametrize("way", WAYS)
def test_orbax_opens_a_checkpoint(folder, run, way):
  params = WAYS[way](folder / "run" / "checkpoints" / "2")
  jax.tree.map(np.testing.assert_array_equal, params, run.params)


def test_a_manager_restores_the_training_state_and_the_position_in_the_data(folder):
  with orbax.checkpoint.CheckpointManager(folder / "run" / "checkpoints") as manager:
    assert manager.latest_step() == 2
    restored = manager.restore(2)
  assert restored["data"]["epoch"] == 0 and restored["integrity"]["step"] == 2
  assert jax.tree.leaves(restored["training_state"])
