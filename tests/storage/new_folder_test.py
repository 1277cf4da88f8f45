"""New folders appear complete or not at all, and failures leave nothing."""

import contextlib
import fcntl
import os
import threading
import time

import pytest

from sparsek.errors import RunError, UsageError
from sparsek.storage.new_folder import check_new_folder, new_folder, temporary_name


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
  path = tmp_path / "to" / "new"
  full = OSError(28, "No space left on device")
  for error, raised, words in (
    (full, RunError, "to/new cannot be written: No space"),
    (KeyboardInterrupt, KeyboardInterrupt, None),
  ):
    with pytest.raises(raised, match=words):
      with new_folder(str(path)) as folder:
        with open(os.path.join(folder, "a"), "w") as file:
          file.write("half")
        assert os.path.dirname(folder) == str(tmp_path / "to")
        raise error
    assert os.listdir(tmp_path / "to") == []
  with pytest.raises(RunError, match=f"^{path}/a cannot be written$"):
    with new_folder(str(path)) as folder:
      raise RunError(f"{folder}/a cannot be written")
  os.makedirs(os.path.join(temporary_name(str(path)), "sub"))  # of a process that was killed
  path.mkdir()
  with new_folder(str(path)) as folder:
    assert os.listdir(folder) == os.listdir(path) == [] and len(os.listdir(path.parent)) == 2
    with pytest.raises(UsageError, match="to/new is being written by another process"):
      with new_folder(str(path)):
        pass
    with open(os.path.join(folder, "a"), "w") as file:
      file.write("whole")
  assert os.listdir(path.parent) == ["new"] and os.listdir(path) == ["a"]


def test_a_failed_new_folder_goes_though_a_thread_still_writes(tmp_path):
  def write(folder):
    for i in range(30):
      with contextlib.suppress(OSError):
        os.makedirs(os.path.join(folder, "sub", str(i)))
      time.sleep(0.005)

  with pytest.raises(RunError, match="No space"):
    with new_folder(str(tmp_path / "new")) as folder:
      thread = threading.Thread(target=write, args=(folder,))
      thread.start()
      raise OSError(28, "No space left on device")
  thread.join()
  assert os.listdir(tmp_path) == []


def _no_permission(path):
  raise PermissionError(13, "Permission denied")


def test_what_a_new_folder_cannot_replace(tmp_path, monkeypatch):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "note").write_text("mine")
  (tmp_path / "file").write_text("mine")
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  for path, words in (
    ("../full", "is not empty"),
    ("../file", "is no folder"),
    (".", "working"),
    ("/proc", "mount point"),
    ("../file/x", "cannot be written: Not a dir"),
  ):
    with pytest.raises(UsageError, match=words):
      with new_folder(path):
        pass
  with monkeypatch.context() as patch, pytest.raises(UsageError, match="full cannot be read: Perm"):
    patch.setattr(os, "listdir", _no_permission)
    check_new_folder("../full")
  with pytest.raises(UsageError, match="late is not empty"):  # another process made it
    with new_folder(str(tmp_path / "late")):
      (tmp_path / "full").rename(tmp_path / "late")
  assert sorted(os.listdir(tmp_path)) == ["file", "here", "late"]
  assert (tmp_path / "late" / "note").read_text() == "mine"


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
  def without_locks(*_):
    raise OSError(37, "No locks available")

  monkeypatch.setattr(fcntl, "flock", without_locks)
  other = temporary_name(str(tmp_path / "new"))  # its process may still be running
  os.mkdir(other)
  with new_folder(str(tmp_path / "new")):
    pass
  assert sorted(os.listdir(tmp_path)) == sorted(["new", os.path.basename(other)])


def test_of_two_that_need_not_be_alone_the_first_to_end_has_it(tmp_path):
  with pytest.raises(UsageError, match="new is not empty"):
    with new_folder(str(tmp_path / "new"), alone=False):
      with new_folder(str(tmp_path / "new"), alone=False) as faster:
        os.mkdir(os.path.join(faster, "whole"))
  assert os.listdir(tmp_path) == ["new"] and os.listdir(tmp_path / "new") == ["whole"]
