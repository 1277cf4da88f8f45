"""Files are replaced completely or not at all; messages name paths and JSON that are refused."""

import errno
import multiprocessing
import os
import stat

import pytest

from sparsek.errors import UsageError
from sparsek.storage import files


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


@pytest.mark.parametrize(
  "content, words",
  [
    (b"[1]", "JSON list"),
    (b"{", "no JSON"),
    (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
    (b'{"a": ' + b"1" * 10_000 + b"}", "too many digits"),
    (b"\xff\xfe", "no JSON"),
    (b'{"a": {"b": 1, "b": 1}}', "a key twice"),
  ],
)
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
  for path, words in (
    (tmp_path / "pipe", "is a FIFO"),
    (tmp_path, "is a folder"),
    (tmp_path / "nowhere" / "a", "cannot be written"),
  ):
    with pytest.raises(UsageError, match=f"{path}.* {words}"):
      files.check_writable(str(path))
  monkeypatch.setattr(os, "access", lambda path, mode: False)  # permissions do not stop root
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


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  files.make_folder(str(tmp_path / "a" / "b"))
  with pytest.raises(UsageError, match="file/b cannot be made: Not a directory"):
    files.make_folder(str(tmp_path / "file" / "b"))


def test_what_could_be_read_for_ever_is_refused(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  for path, kind in (
    (str(tmp_path / "pipe"), "FIFO"),
    ("/dev/zero", "device"),
    (str(tmp_path), "folder"),
  ):
    with pytest.raises(UsageError, match=f"is a {kind}"):
      files.check_regular(path)


def test_what_a_killed_process_left_goes_with_the_next_write_and_what_one_is_writing_stays(
  tmp_path,
):
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
