"""Round trips, restoring under other settings, the refusal table, damaged and failing checkpoints."""

import dataclasses
import glob
import json
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek import checkpoint
from sparsek.config import OptimizerConfig, TransformerConfig
from sparsek.errors import RunError, UsageError
from sparsek.model import init_params
from sparsek.optimizer import make_optimizer

CONFIG = TransformerConfig(vocab_size=11, num_layers=2, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8, k=3, window=2)
OPTIMIZER = make_optimizer(OptimizerConfig(num_steps=200))
SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run with checkpoints of steps 10 and 20 (of three saved, keeping two); returns (workdir, {step: params})."""
  workdir = str(tmp_path_factory.mktemp("run"))
  with open(os.path.join(workdir, "model.json"), "w") as file:
    json.dump({"model": dataclasses.asdict(CONFIG), "data": {}, "tokenizer": {}}, file)
  saved = {}
  writer = checkpoint.CheckpointWriter(workdir, keep=2)
  for step in (5, 10, 20):
    saved[step] = init_params(CONFIG, jax.random.key(step))
    writer.save(step, saved[step], OPTIMIZER.init(saved[step]), {"examples": step, "note": "any JSON"})
  writer.wait()
  writer.close()
  return workdir, saved


@pytest.fixture
def copy(run, tmp_path):
  """A copy of the run that a test may spoil."""
  workdir = str(tmp_path / "copy")
  shutil.copytree(run[0], workdir)
  return workdir, run[1]


def restore(workdir, config=CONFIG, lines=None):
  opt_state = jax.eval_shape(OPTIMIZER.init, checkpoint.abstract_params(config))
  return checkpoint.restore_newest(workdir, config, opt_state, SHARDING, (lines if lines is not None else []).append)


def assert_equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_round_trip_keeps_the_newest(run):
  workdir, saved = run
  assert checkpoint.saved_steps(workdir) == [10, 20]
  restored = restore(workdir)
  assert restored.step == 20 and restored.data_state == {"examples": 20, "note": "any JSON"}
  assert_equal(restored.params, saved[20])
  assert_equal(restored.opt_state, OPTIMIZER.init(saved[20]))
  assert jax.tree.structure(restored.opt_state) == jax.tree.structure(OPTIMIZER.init(saved[20]))


def test_nothing_to_restore(tmp_path):
  assert restore(str(tmp_path)) is None


def test_restores_under_other_k_window_gate_and_dtype(run):
  other = dataclasses.replace(CONFIG, k=7, window=5, gate="value", dtype="bfloat16", remat="full")
  assert_equal(restore(run[0], other).params, run[1][20])


def test_another_architecture_is_refused_with_a_table(run):
  other = dataclasses.replace(CONFIG, num_layers=3, mlp_dim=16, k=9, qk_norm=True, attention=("sparsek", "sparsek", "full"))
  with pytest.raises(UsageError) as error:
    restore(run[0], other)
  message = str(error.value)
  for words in ("--num_layers=3 here, 2 there", "--mlp_dim=16 here, 8 there", "--qk_norm=True here, False there", "other shape", "missing",
                "loaded", "layers_*/mlp/up/kernel (2 layers)", "8x8", "8x16"):
    assert words in message, message
  assert "--k" not in message
  with pytest.raises(UsageError, match="unused"):
    restore(run[0], dataclasses.replace(CONFIG, num_layers=1))


def test_load_params_for_evaluation(run):
  workdir, saved = run
  config, record = checkpoint.load_run_config(workdir)
  assert config == CONFIG and set(record) == {"model", "data", "tokenizer"}
  for wanted, step in ((None, 20), (10, 10)):
    params, actual = checkpoint.load_params(workdir, config, wanted)
    assert actual == step
    assert_equal(params, saved[step])
  with pytest.raises(UsageError, match="no checkpoint of step 7; it has 10, 20"):
    checkpoint.load_params(workdir, config, 7)
  with pytest.raises(UsageError, match="embed_dim"):
    checkpoint.load_params(workdir, dataclasses.replace(config, embed_dim=16))


def test_no_run_is_said(tmp_path):
  with pytest.raises(UsageError, match="holds no run"):
    checkpoint.load_run_config(str(tmp_path))
  with pytest.raises(UsageError, match="holds no checkpoint"):
    checkpoint.load_params(str(tmp_path), CONFIG)
  (tmp_path / "model.json").write_text("{")
  with pytest.raises(UsageError, match="cannot be understood"):
    checkpoint.load_run_config(str(tmp_path))


def truncate(path):
  os.truncate(path, os.path.getsize(path) // 2)


def flip_a_bit(path):
  with open(path, "r+b") as file:
    data = bytearray(file.read())
    data[len(data) // 2] ^= 0x10
    file.seek(0)
    file.write(data)


def array_files(step_folder):
  return [path for path in glob.glob(step_folder + "/params/**", recursive=True) if "/d/" in path and os.path.isfile(path)]


def change_integrity(step_folder):
  path = step_folder + "/integrity/data.json"
  with open(path) as file:
    integrity = json.load(file)
  integrity["checksums"]["params"]["['embed']['embedding']"] += 1
  with open(path, "w") as file:
    json.dump(integrity, file)


DAMAGE = {
    "truncated arrays": lambda step: [truncate(path) for path in array_files(step)],
    "flipped bit in the arrays": lambda step: [flip_a_bit(path) for path in array_files(step)],
    "other checksum": change_integrity,
    "truncated tree": lambda step: truncate(step + "/params/_METADATA"),
    "no tree": lambda step: os.remove(step + "/optimizer/_METADATA"),
    "no optimizer": lambda step: shutil.rmtree(step + "/optimizer"),
    "no data state": lambda step: shutil.rmtree(step + "/data"),
    "empty data state": lambda step: open(step + "/data/data.json", "w").close(),
    "empty folder": lambda step: (shutil.rmtree(step), os.mkdir(step)),
    "a file": lambda step: (shutil.rmtree(step), open(step, "w").close()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(copy, damage):
  workdir, saved = copy
  DAMAGE[damage](os.path.join(workdir, "checkpoints", "20"))
  lines = []
  restored = restore(workdir, lines=lines)
  assert restored.step == 10
  assert_equal(restored.params, saved[10])
  assert len(lines) == 1 and "checkpoints/20 is damaged" in lines[0] and "\n" not in lines[0]
  # The step can be saved again, and the damaged one is still there to be looked at.
  assert os.path.exists(os.path.join(workdir, "damaged", "20.0"))
  writer = checkpoint.CheckpointWriter(workdir, keep=2)
  writer.save(20, saved[20], OPTIMIZER.init(saved[20]), {})
  writer.wait()
  writer.close()
  assert restore(workdir).step == 20


def test_all_damaged_is_refused_and_nothing_moved(copy):
  workdir, _ = copy
  for step in (10, 20):
    truncate(os.path.join(workdir, "checkpoints", str(step), "params", "_METADATA"))
  with pytest.raises(UsageError, match="no checkpoint in .* can be read"):
    restore(workdir)
  assert checkpoint.saved_steps(workdir) == [10, 20]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: out of memory\nwhere")])
def test_want_of_memory_is_no_damage(copy, error, monkeypatch):
  workdir, _ = copy

  def fail(tree):
    raise error
  monkeypatch.setattr(checkpoint, "checksums", fail)
  with pytest.raises(RunError, match="checkpoints/20 cannot be read for want of memory; it stays where it is"):
    restore(workdir)
  assert checkpoint.saved_steps(workdir) == [10, 20]


def test_half_written_remains_are_reported_and_removed(copy):
  workdir, _ = copy
  remains = os.path.join(workdir, "checkpoints", "30" + checkpoint.HALF_WRITTEN)
  shutil.copytree(os.path.join(workdir, "checkpoints", "20"), remains)
  lines = []
  checkpoint.remove_half_written(workdir, lines.append)
  assert len(lines) == 1 and "half-written" in lines[0]
  assert not os.path.exists(remains)
  assert restore(workdir).step == 20


def test_run_reference():
  assert checkpoint.parse_run_reference("a/b@30") == ("a/b", 30)
  assert checkpoint.parse_run_reference("a@b/c") == ("a@b/c", None)


def test_checksum_sees_any_bit():
  tree = {"a": jnp.ones((3, 4)), "b": jnp.zeros((), jnp.int32)}
  changed = {**tree, "a": tree["a"].at[1, 2].set(np.nextafter(np.float32(1), np.float32(2)))}
  assert checkpoint.checksums(tree)["['a']"] != checkpoint.checksums(changed)["['a']"]


def test_a_failing_save_loses_nothing(copy):
  workdir, saved = copy
  writer = checkpoint.CheckpointWriter(workdir, keep=2)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:  # Stands in for a full disk: no file may grow beyond 50 bytes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    with pytest.raises(Exception):
      writer.save(30, saved[20], OPTIMIZER.init(saved[20]), {})
      writer.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert restore(workdir).step == 20
  writer.save(40, saved[5], OPTIMIZER.init(saved[5]), {})
  writer.wait()
  writer.close()
  assert checkpoint.saved_steps(workdir) == [20, 40]
  assert_equal(restore(workdir).params, saved[5])
