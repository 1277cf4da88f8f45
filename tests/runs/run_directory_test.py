"""A run's folder: records of any content are kept; each failure is one sentence."""

import errno
import fcntl
import os
import types

import pytest

from sparsek.errors import RunError, UsageError
from sparsek.runs import run_directory


@pytest.mark.parametrize("old", [b"--notes=caf\xe9\n", b"\0\xff", b"line\r\n", b""])
def test_a_record_of_any_bytes_is_kept(old, tmp_path):
  (tmp_path / "flags.txt").write_bytes(old)
  run_directory.write_record(str(tmp_path), "flags.txt", "--a=\u00e9\n")
  assert (tmp_path / "flags.1.txt").read_bytes() == old
  assert (tmp_path / "flags.txt").read_bytes() == "--a=\u00e9\n".encode()
  assert len(list(tmp_path.iterdir())) == 2


def test_what_is_no_file_is_refused(tmp_path):
  (tmp_path / "folder.txt").mkdir()
  os.mkfifo(tmp_path / "fifo.txt")
  for name in ("folder", "fifo"):
    with pytest.raises(UsageError, match=f"(?i){name}.txt is a {name}"):
      run_directory.write_record(str(tmp_path), f"{name}.txt", "a")


def test_a_full_disk_is_one_sentence_and_keeps_the_record(tmp_path, monkeypatch):
  def fail(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  (tmp_path / "flags.txt").write_text("a")
  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(RunError, match="flags.txt cannot be written: No space left on device"):
    run_directory.write_record(str(tmp_path), "flags.txt", "b")
  assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("flags.txt", "a")]


def test_the_lock_says_what_is_wrong(tmp_path, monkeypatch):
  full = lambda path: os.symlink("/dev/full", path)
  for name, make in (("fifo", os.mkfifo), ("folder", os.mkdir), ("full", full)):
    (tmp_path / name).mkdir()
    make(tmp_path / name / "lock")
    with pytest.raises(UsageError, match=f"--workdir=.*{name} cannot be written: [A-Z]"):
      run_directory.lock(str(tmp_path / name))

  def fail(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, "flock", fail)
  with pytest.raises(UsageError, match="cannot be locked: No locks available"):
    run_directory.lock(str(tmp_path))


def test_a_refused_run_leaves_no_new_folder(tmp_path):
  def refuse(folder, error):
    with pytest.raises(type(error)), run_directory.locked(str(folder)):
      (folder / "checkpoints").mkdir(exist_ok=True)
      raise error

  refuse(tmp_path / "new", UsageError("no"))
  assert not (tmp_path / "new").exists()
  refuse(tmp_path / "failed", RuntimeError("no"))
  assert (tmp_path / "failed" / "lock").exists()
  (tmp_path / "there").mkdir()
  refuse(tmp_path / "there", UsageError("no"))
  assert (tmp_path / "there").exists()
  with pytest.raises(UsageError), run_directory.locked(str(tmp_path / "mine")):
    (tmp_path / "mine" / "notes.txt").write_text("of the user")
    raise UsageError("no")
  assert (tmp_path / "mine" / "notes.txt").exists()


def test_the_owner_of_a_lock_may_have_left_any_bytes(tmp_path):
  with run_directory.lock(str(tmp_path)):
    (tmp_path / "lock").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="in use by another run"):
      run_directory.lock(str(tmp_path))


def test_a_write_that_failed_after_the_old_record_was_kept_does_not_keep_it_twice(
  tmp_path, monkeypatch
):
  run_directory.write_record(str(tmp_path), "a.json", "old")
  real = run_directory.write_atomically

  def full(path, content):
    if content == b"new":
      raise OSError(errno.ENOSPC, "No space left on device")
    real(path, content)

  monkeypatch.setattr(run_directory, "write_atomically", full)
  with pytest.raises(RunError, match="No space left on device"):
    run_directory.write_record(str(tmp_path), "a.json", "new")
  monkeypatch.undo()
  run_directory.write_record(str(tmp_path), "a.json", "new")
  assert sorted(os.listdir(tmp_path)) == ["a.1.json", "a.json"]
  assert (tmp_path / "a.1.json").read_text() == "old"


def test_records_are_never_overwritten(tmp_path):
  for text in ("a", "a", "b", "c"):
    run_directory.write_record(str(tmp_path), "flags.txt", text)
  contents = {path.name: path.read_text() for path in tmp_path.iterdir()}
  assert contents == {"flags.txt": "c", "flags.1.txt": "a", "flags.2.txt": "b"}


def test_compiled_programs_are_kept_unless_asked_otherwise(monkeypatch, tmp_path):
  options = {}
  config = types.SimpleNamespace(jax_compilation_cache_dir=None, update=options.__setitem__)
  monkeypatch.setattr(run_directory.jax, "config", config)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  run_directory.use_compilation_cache()
  (folder,) = options.values()
  assert os.path.dirname(folder) == str(tmp_path / "sparsek" / "compiled")
  options.clear()
  config.jax_compilation_cache_dir = "/elsewhere"
  run_directory.use_compilation_cache()
  assert not options
  run_directory.use_compilation_cache("/flag")
  assert options == {"jax_compilation_cache_dir": "/flag"}
  options.clear()
  run_directory.use_compilation_cache("none")
  assert options == {"jax_enable_compilation_cache": False}
