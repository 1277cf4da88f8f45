"""Checkpoints: round trips, other settings, the table of a refusal, damage, failing saves."""

import dataclasses
import errno
import glob
import json
import os
import resource
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from sparsek.config import OptimizerConfig
from sparsek.errors import RunError, UsageError
from sparsek.model.transformer import init_params
from sparsek.runs import checkpoint, checkpoint_writer, integrity, run_record
from sparsek.training.optimizer import make_optimizer
from tests.runs.run_record_test import CONFIG, RECORD

OPTIMIZER = make_optimizer(OptimizerConfig(num_steps=200))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Makes a run with checkpoints of steps 10 and 20 (three were saved, two are kept).

  Returns (workdir, {step: params}).
  """
  workdir = str(tmp_path_factory.mktemp("run"))
  with open(os.path.join(workdir, "model.json"), "w") as file:
    json.dump(RECORD, file)
  saved = {}
  writer = checkpoint_writer.CheckpointWriter(workdir, keep=2)
  for step in (5, 10, 20):
    saved[step] = init_params(CONFIG, jax.random.key(step))
    writer.save(
      step, saved[step], OPTIMIZER.init(saved[step]), {"examples": step, "note": "any JSON"}
    )
  writer.wait()
  writer.close()
  return workdir, saved


@pytest.fixture
def copy(run, tmp_path):
  """Returns a copy of the run, to be spoilt."""
  workdir = str(tmp_path / "copy")
  shutil.copytree(run[0], workdir)
  return workdir, run[1]


def restore(workdir, config=CONFIG, lines=None):
  opt_state = jax.eval_shape(OPTIMIZER.init, checkpoint.abstract_params(config))
  return checkpoint.restore_newest(
    workdir, config, opt_state, None, (lines if lines is not None else []).append
  )


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
  other = dataclasses.replace(
    CONFIG, num_layers=3, mlp_dim=16, k=9, qk_norm=True, attention=("sparsek", "sparsek", "full")
  )
  with pytest.raises(UsageError) as error:
    restore(run[0], other)
  message = str(error.value)
  for words in (
    "--num_layers=3 here, 2 there",
    "--mlp_dim=16 here, 8 there",
    "--model=qk_norm=True here, False there",
    "other shape",
    "missing",
    "loaded",
    "layers_*/mlp/up/kernel (2 layers)",
    "8x8",
    "8x16",
  ):
    assert words in message, message
  assert "--k" not in message
  with pytest.raises(UsageError, match="unused"):
    restore(run[0], dataclasses.replace(CONFIG, num_layers=1))


def test_load_params_for_evaluation(run):
  workdir, saved = run
  config, record = run_record.load_run_config(workdir)
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
    run_record.load_run_config(str(tmp_path))
  with pytest.raises(UsageError, match="holds no checkpoint"):
    checkpoint.load_params(str(tmp_path), CONFIG)
  (tmp_path / "model.json").write_text("{")
  with pytest.raises(UsageError, match="no JSON that can be understood"):
    run_record.load_run_config(str(tmp_path))


def truncate(path):
  os.truncate(path, os.path.getsize(path) // 2)


def flip_a_bit(path):
  with open(path, "r+b") as file:
    data = bytearray(file.read())
    data[len(data) // 2] ^= 0x10
    file.seek(0)
    file.write(data)


def array_files(step_folder):
  return [
    path
    for path in glob.glob(step_folder + "/params/**", recursive=True)
    if "/d/" in path and os.path.isfile(path)
  ]


def change_integrity(step_folder):
  path = step_folder + "/integrity/metadata"
  with open(path) as file:
    integrity = json.load(file)
  integrity["checksums"]["params"]["['embed']['embedding']"] += 1
  with open(path, "w") as file:
    json.dump(integrity, file)


def replace(path, old, new):
  with open(path, "rb") as file:
    content = file.read()
  assert old in content
  with open(path, "wb") as file:
    file.write(content.replace(old, new))


DAMAGE = {
  "truncated arrays": lambda step: [truncate(path) for path in array_files(step)],
  "flipped bit in the arrays": lambda step: [flip_a_bit(path) for path in array_files(step)],
  "other checksum": change_integrity,
  "truncated tree": lambda step: truncate(step + "/params/_METADATA"),
  "no tree": lambda step: os.remove(step + "/training_state/_METADATA"),
  "no optimizer": lambda step: shutil.rmtree(step + "/training_state"),
  "no data state": lambda step: shutil.rmtree(step + "/data"),
  "empty data state": lambda step: open(step + "/data/metadata", "w").close(),
  "other position in the data": lambda step: replace(step + "/data/metadata", b"20", b"21"),
  "no checksums": lambda step: replace(step + "/integrity/metadata", b"checksums", b"checksumt"),
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
  # The step can be saved again, and the damaged checkpoint is still there for inspection.
  assert os.path.exists(os.path.join(workdir, "damaged", "20.0"))
  writer = checkpoint_writer.CheckpointWriter(workdir, keep=2)
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


def test_a_step_under_another_number_is_damaged(copy):
  workdir, _ = copy
  folder = os.path.join(workdir, "checkpoints")
  os.rename(os.path.join(folder, "20"), os.path.join(folder, "30"))
  with pytest.raises(UsageError, match="checkpoints/30 is damaged: .* are those of step 20"):
    checkpoint.load_params(workdir, CONFIG)
  lines = []
  assert restore(workdir, lines=lines).step == 10
  assert len(lines) == 1 and "those of step 20" in lines[0]
  assert os.listdir(os.path.join(workdir, "damaged")) == ["30.0"]


def test_checkpoints_of_earlier_versions_load(copy):
  workdir, saved = copy
  path = os.path.join(workdir, "checkpoints", "20", "integrity", "metadata")
  with open(path) as file:
    integrity = json.load(file)
  sums = integrity["checksums"]
  with open(path, "w") as file:
    json.dump({"checksums": {"params": sums["params"], "optimizer": sums["training_state"]}}, file)
  step = os.path.dirname(os.path.dirname(path))
  os.rename(os.path.join(step, "training_state"), os.path.join(step, "optimizer"))
  restored = restore(workdir)
  assert restored.data_state == {"examples": 20, "note": "any JSON"}
  assert_equal(restored.opt_state, OPTIMIZER.init(saved[20]))
  assert_equal(checkpoint.load_params(workdir, CONFIG)[0], saved[20])


def test_measuring_never_falls_back_unasked(copy):
  workdir, saved = copy
  change_integrity(os.path.join(workdir, "checkpoints", "20"))
  message = (
    "checkpoints/20 is damaged: a checksum of params differs; the run has others .10.: "
    "give --step=10 .DIR@10 in --init_from and --distill_from. or --allow_older_step"
  )
  with pytest.raises(UsageError, match=message):
    checkpoint.load_params(workdir, CONFIG)
  lines = []
  params, step = checkpoint.load_params(workdir, CONFIG, report=lines.append, allow_older=True)
  assert step == 10 and checkpoint.saved_steps(workdir) == [10, 20]
  assert_equal(params, saved[10])
  assert len(lines) == 1 and "checkpoints/20 is damaged and is not used: a checksum" in lines[0]
  with pytest.raises(UsageError, match="checkpoints/20 is damaged"):
    checkpoint.load_params(workdir, CONFIG, 20, allow_older=True)


def no_damage(workdir, message):
  """Checks that a checkpoint which cannot be read ends restoring and loading, and stays."""
  message = f"checkpoints/20 cannot be read; it stays where it is: .*{message}"
  with pytest.raises(RunError, match=message):
    restore(workdir)
  with pytest.raises(RunError, match=message):
    checkpoint.load_params(workdir, CONFIG, allow_older=True)
  assert checkpoint.saved_steps(workdir) == [10, 20]
  assert not os.path.exists(os.path.join(workdir, "damaged"))


@pytest.mark.parametrize(
  "name", ["params/_METADATA", "params/manifest.ocdbt", "params/d/*", "integrity/metadata"]
)
@pytest.mark.parametrize(
  "target, message",
  [("/proc/self/mem", "Input/output error"), (None, "Too many levels of symbolic links")],
)
def test_a_file_that_cannot_be_read_is_no_damage(copy, name, target, message):
  workdir, _ = copy
  (path,) = glob.glob(os.path.join(workdir, "checkpoints", "20", name))
  os.remove(path)
  os.symlink(target or path, path)
  no_damage(workdir, message)


def raise_from_load(monkeypatch, error):
  def fail(*_):  # as Orbax does
    raise KeyError("Failed to load checkpointable: params due to incompatible handler") from error

  monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", fail)


@pytest.mark.parametrize(
  "error, message",
  [
    (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
    (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    (OSError(errno.ESTALE, "Stale file handle"), "Stale file handle"),
    (ValueError("UNKNOWN: Error reading [os_error_code='5'] [spec]"), "Input/output error"),
    (ValueError("RESOURCE_EXHAUSTED: out of memory\nwhere"), "RESOURCE_EXHAUSTED: out of memory"),
    (MemoryError(), "MemoryError"),
    (jax.errors.JaxRuntimeError("INTERNAL: a device is gone"), "INTERNAL: a device is gone"),
  ],
)
def test_what_says_nothing_of_the_contents_is_no_damage(copy, error, message, monkeypatch):
  raise_from_load(monkeypatch, error)
  no_damage(copy[0], message)


@pytest.mark.parametrize(
  "error",
  [
    FileNotFoundError(errno.ENOENT, "No such file"),
    FileNotFoundError("no errno"),
    ValueError("NOT_FOUND: [os_error_code='2']"),
    ValueError("DATA_LOSS: x"),
    EOFError(),
  ],
)
def test_what_is_missing_or_no_checkpoint_is_damage(run, error, monkeypatch):
  raise_from_load(monkeypatch, error)
  message = f"checkpoints/20 is damaged: params: {type(error).__name__}"
  with pytest.raises(UsageError, match=message):
    checkpoint.load_params(run[0], CONFIG)


@pytest.mark.parametrize(
  "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")]
)
def test_want_of_memory_for_the_checksums_is_no_damage(run, error, monkeypatch):
  def fail(tree):
    raise error

  monkeypatch.setattr(integrity, "checksums", fail)
  with pytest.raises(RunError, match="checkpoints/20 cannot be read; it stays where it is"):
    restore(run[0])


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_ends_a_load_and_moves_nothing(run, error, monkeypatch):
  def interrupt(*_):
    raise error

  monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", interrupt)
  with pytest.raises(error):
    restore(run[0])
  assert checkpoint.saved_steps(run[0]) == [10, 20]


def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path, monkeypatch):
  (tmp_path / "checkpoints").mkdir()

  def refuse(_):
    raise PermissionError(errno.EACCES, "Permission denied")

  monkeypatch.setattr(os, "listdir", refuse)
  for use in (restore, checkpoint.saved_steps, checkpoint_writer.remove_half_written):
    with pytest.raises(RunError, match="checkpoints cannot be read: Permission denied"):
      use(str(tmp_path))


def test_names_that_are_no_steps_are_left_alone(tmp_path):
  for name in ("7", "07", "+8", "\u0663", "8 ", "8.old", "tmp"):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
  assert checkpoint.saved_steps(str(tmp_path)) == [7]


def test_a_damaged_checkpoint_that_cannot_be_moved_is_said(copy):
  workdir, _ = copy
  change_integrity(os.path.join(workdir, "checkpoints", "20"))
  open(os.path.join(workdir, "damaged"), "w").close()
  with pytest.raises(RunError, match="20 is damaged and cannot be moved to .*damaged: File exists"):
    restore(workdir)
  assert checkpoint.saved_steps(workdir) == [10, 20]


def test_half_written_remains_are_reported_and_removed(copy):
  workdir, _ = copy
  remains = os.path.join(workdir, "checkpoints", "30" + checkpoint_writer.HALF_WRITTEN)
  shutil.copytree(os.path.join(workdir, "checkpoints", "20"), remains)
  lines = []
  checkpoint_writer.remove_half_written(workdir, lines.append)
  assert len(lines) == 1 and "half-written" in lines[0]
  assert not os.path.exists(remains)
  assert checkpoint.saved_steps(workdir) == [10, 20]


def test_half_written_remains_that_cannot_be_removed_are_said(tmp_path, monkeypatch):
  os.makedirs(tmp_path / "checkpoints" / f"30{checkpoint_writer.HALF_WRITTEN}")

  def refuse(_):
    raise PermissionError(errno.EACCES, "Permission denied")

  monkeypatch.setattr(shutil, "rmtree", refuse)
  with pytest.raises(RunError, match="half-written, cannot be removed: Permission denied"):
    checkpoint_writer.remove_half_written(str(tmp_path))


@pytest.mark.parametrize(
  "reference, folder, step",
  [
    ("a/b@30", "a/b", 30),
    ("a@b/c", "a@b/c", None),
    ("a@b/c@0", "a@b/c", 0),
    ("a@4@5", "a@4", 5),
    ("@4", "@4", None),
    ("a@", "a@", None),
    ("a@-1", "a@-1", None),
    ("a@\u0663", "a@\u0663", None),
    ("a@" + "9" * 5000, "a@" + "9" * 5000, None),
  ],
)
def test_run_reference(reference, folder, step):
  assert checkpoint.parse_run_reference(reference) == (folder, step)


def test_a_folder_of_exactly_that_name_is_meant(tmp_path):
  there = str(tmp_path / "run@4")
  os.mkdir(there)
  assert checkpoint.parse_run_reference(there) == (there, None)
  assert checkpoint.parse_run_reference(f"{there}@6") == (there, 6)
  run = str(tmp_path / "run")
  open(run, "w").close()
  assert checkpoint.parse_run_reference(there) == (there, None)
  os.remove(run)
  os.makedirs(f"{run}/checkpoints/3")
  assert checkpoint.parse_run_reference(there) == (there, None)
  os.mkdir(f"{run}/checkpoints/4")
  message = (
    f"{there} is ambiguous: write {there}/ for the folder of that name, "
    f"or {run}/@4 for step 4 of {run}"
  )
  with pytest.raises(UsageError, match=message):
    checkpoint.parse_run_reference(there)
  assert checkpoint.parse_run_reference(f"{there}/") == (f"{there}/", None)
  assert checkpoint.parse_run_reference(f"{run}/@4") == (f"{run}/", 4)


def test_a_failing_save_loses_nothing(copy):
  workdir, saved = copy
  writer = checkpoint_writer.CheckpointWriter(workdir, keep=2)
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


LOAD = """
import sys
from sparsek.runs import checkpoint, run_record
config, _ = run_record.load_run_config(sys.argv[1])
print(checkpoint.load_params(sys.argv[1], config, allow_older=True)[1])
"""


@pytest.mark.slow
def test_a_process_that_meets_damage_says_one_sentence(copy):
  """Takes a process of its own: Orbax's threads and coroutines may complain until its end."""
  workdir, _ = copy
  for path in array_files(os.path.join(workdir, "checkpoints", "20")):
    truncate(path)
  command = [sys.executable, "-c", LOAD, workdir]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert done.stdout == "10\n"
  assert len(done.stderr.splitlines()) == 1, done.stderr
  assert "checkpoints/20 is damaged and is not used: params: " in done.stderr
