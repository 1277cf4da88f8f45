"""Files are replaced whole or not at all; paths and JSON that cannot be used are refused by name."""

import contextlib
import errno
import multiprocessing
import os
import stat
import threading
import time

import pytest

from sparsek import files
from sparsek.errors import RunError, UsageError


def _rewrite(path, content):
  for _ in range(50):
    files.write_atomically(path, content)


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://b/run", "file:///tmp/run", "hdfs:/x"])
def test_urls_are_refused_and_not_made_folders(url):
  with pytest.raises(UsageError, match=f"--workdir={url}"):
    files.local_path(url, "workdir")


@pytest.mark.parametrize("path", ["runs/a", "/tmp/a:b", "a@4", "C:", "./gs:/x"])
def test_paths_stay_what_they_are(path):
  assert files.local_path(path, "workdir") == path


def test_home_is_expanded(monkeypatch):
  monkeypatch.setenv("HOME", "/home/someone")
  assert files.local_path("~/run", "workdir") == "/home/someone/run"


def test_a_failed_write_leaves_the_file_and_nothing_else(tmp_path):
  path = tmp_path / "a.json"
  path.write_text("old")
  with pytest.raises(OSError):
    with files.atomic_file(path) as file:
      file.write(b"ne")
      raise OSError("disk full")
  assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_processes_that_write_the_same_file_do_not_disturb_each_other(tmp_path):
  path, contents = str(tmp_path / "a"), [c * 100_000 for c in "abc"]
  context = multiprocessing.get_context("fork")
  workers = [context.Process(target=_rewrite, args=(path, content)) for content in contents]
  for worker in workers:
    worker.start()
  for worker in workers:
    worker.join()
  assert [worker.exitcode for worker in workers] == [0, 0, 0]
  assert (tmp_path / "a").read_text() in contents and os.listdir(tmp_path) == ["a"]


def test_permissions_are_those_of_the_file_before(tmp_path):
  path = tmp_path / "a"
  path.write_text("x")
  path.chmod(0o640)
  files.write_atomically(path, "y")
  assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("content, words", [
    (b"[1]", "JSON list"), (b"{", "no JSON"), (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
    (b'{"a": ' + b"1" * 10_000 + b"}", "too many digits"), (b"\xff\xfe", "no JSON"),
    (b'{"a": {"b": 1, "b": 1}}', "a key twice"),
])
def test_json_that_cannot_be_used_is_named(tmp_path, content, words):
  path = tmp_path / "a.json"
  path.write_bytes(content)
  with pytest.raises(UsageError, match=f"{path}.*{words}"):
    files.read_json_object(str(path))


def test_what_cannot_be_looked_at_may_exist(tmp_path, monkeypatch):
  path = str(tmp_path / "a")
  assert not files.exists(path)
  os.symlink("nowhere", path)
  assert files.exists(path)

  def refuse(_):
    raise PermissionError(errno.EACCES, "Permission denied")
  monkeypatch.setattr(os, "lstat", refuse)
  with pytest.raises(UsageError, match=f"{path} cannot be read: Permission denied"):
    files.exists(path)


def test_what_cannot_be_written_is_refused_before(tmp_path, monkeypatch):
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "a").write_text("")
  for name in ("a", "new"):
    files.check_writable(str(tmp_path / name))
  assert not (tmp_path / "new").exists()
  for path, words in ((tmp_path / "pipe", "is a FIFO"), (tmp_path, "is a folder"),
                      (tmp_path / "nowhere" / "a", "cannot be written")):
    with pytest.raises(UsageError, match=f"{path}.* {words}"):
      files.check_writable(str(path))
  monkeypatch.setattr(os, "access", lambda path, mode: False)     # permissions do not stop root
  for name in ("a", "new"):
    with pytest.raises(UsageError, match=f"{tmp_path / name} cannot be written"):
      files.check_writable(str(tmp_path / name))


def test_values_are_shown_on_one_short_line():
  nested = []
  for _ in range(100_000):
    nested = [nested]
  for value in (nested, "a\nb" * 999, list(range(999)), {"a\n" * 99: nested}, 10**4000, "\ud800"):
    text = files.shown(value)
    assert len(text) <= 83 and text.isprintable()
  assert files.shown({"a": [1, "x"]}) == "{'a': [1, 'x']}"


def test_what_could_be_read_for_ever_is_refused(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  for path, kind in ((str(tmp_path / "pipe"), "FIFO"), ("/dev/zero", "device"),
                     (str(tmp_path), "folder")):
    with pytest.raises(UsageError, match=f"is a {kind}"):
      files.check_regular(path)


def test_what_a_killed_process_left_goes_with_the_next_write_and_what_one_is_writing_stays(tmp_path):
  path = tmp_path / "a"
  (tmp_path / ".a.abcdefgh.tmp").write_text("half")
  others = [tmp_path / name for name in (".b.abcdefgh.tmp", "a.tmp", ".a.tmp")]
  for other in others:
    other.write_text("another's")
  with files.atomic_file(path) as file:
    files.write_atomically(path, "second")
    file.write(b"first")
  assert path.read_text() == "first"
  assert sorted(os.listdir(tmp_path)) == sorted(["a", *(other.name for other in others)])


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
  path, seen = tmp_path / "to" / "new", []
  full = OSError(28, "No space left on device")
  for error, raised, words in ((full, RunError, "to/new cannot be written: No space"),
                               (KeyboardInterrupt, KeyboardInterrupt, None)):
    with pytest.raises(raised, match=words):
      with files.new_folder(str(path)) as folder:
        (path.parent / ".new.unfinished" / "a").write_text("half")
        seen.append(folder)
        raise error
    assert os.listdir(tmp_path / "to") == []
  (path.parent / ".new.unfinished" / "sub").mkdir(parents=True)      # of a process that was killed
  (path.parent / ".new.unfinished" / "sub" / "old").write_text("half")
  path.mkdir()
  with files.new_folder(str(path)) as folder:
    assert os.listdir(folder) == [".lock"] and os.listdir(path) == []
    with pytest.raises(UsageError, match="to/new is being written by another process"):
      with files.new_folder(str(path)):
        pass
    with open(os.path.join(folder, "a"), "w") as file:
      file.write("whole")
  assert os.listdir(path.parent) == ["new"] and os.listdir(path) == ["a"]
  assert seen == [folder] * 2


def test_a_failed_new_folder_goes_though_a_thread_still_writes(tmp_path):
  def write(folder):
    for i in range(30):
      with contextlib.suppress(OSError):
        os.makedirs(os.path.join(folder, "sub", str(i)))
      time.sleep(0.005)

  with pytest.raises(RunError, match="No space"):
    with files.new_folder(str(tmp_path / "new")) as folder:
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
  for path, words in (("../full", "is not empty"), ("../file", "is no folder"), (".", "working"),
                      ("/proc", "mount point"), ("../file/x", "cannot be written: Not a dir")):
    with pytest.raises(UsageError, match=words):
      with files.new_folder(path):
        pass
  with monkeypatch.context() as patch, pytest.raises(UsageError, match="full cannot be read: Perm"):
    patch.setattr(os, "listdir", _no_permission)
    files.check_new_folder("../full")
  with pytest.raises(UsageError, match="late is not empty"):         # another process made it
    with files.new_folder(str(tmp_path / "late")):
      (tmp_path / "full").rename(tmp_path / "late")
  assert sorted(os.listdir(tmp_path)) == ["file", "here", "late"]
  assert (tmp_path / "late" / "note").read_text() == "mine"
