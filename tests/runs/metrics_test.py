"""Files of records: lines that are kept, skipped or cut; files that are refused."""

import errno
import os
import types

import pytest

from sparsek.errors import RunError, UsageError
from sparsek.runs import metrics
from sparsek.runs.metrics import MetricsWriter, append_record, read_metrics

ONE, TWO, THREE = (b'{"step": %d, "loss": 2.5}\n' % step for step in (1, 2, 3))
FOREIGN = {
  "object": b'{"comment": "moved to node 7"}\n',
  "string": b'"note: changed node"\n',
  "text": b"node 7 from here on\n",
  "no UTF-8": b"caf\xe9 \xff\xfe\n",
  "binary": b"\0\1\2\0\n",
  "other step": b'{"step": "three"}\n',
  "step true": b'{"step": true}\n',
  "step of a fraction": b'{"step": 2.5}\n',
  "list": b"[1, 2]\n",
  "null": b"null\n",
  "nested": b"[" * 100000 + b"\n",
  "huge integer": b'{"step": 1, "x": ' + b"1" * 5000 + b"}\n",
  "carriage return inside": b'{"note": 1}\r{"step": 1}\n',
}


def write(tmp_path, content):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(content)
  return path


@pytest.mark.parametrize("foreign", FOREIGN)
def test_what_is_no_record_stays_and_costs_no_record(foreign, tmp_path, capsys):
  line = FOREIGN[foreign]
  path = write(tmp_path, ONE + line + TWO + THREE)
  assert [record["step"] for record in read_metrics(str(path))] == [1, 2, 3]
  assert [record["step"] for record in read_metrics(str(path), 2)] == [1, 2]
  writer = MetricsWriter(str(tmp_path), 2)
  assert [record["step"] for record in writer.records_kept] == [1, 2]
  writer.write({"step": 3, "loss": 2.5})
  writer.close()
  assert path.read_bytes() == ONE + line + TWO + THREE
  said = capsys.readouterr().err.splitlines()
  assert said == [f"warning: {path}: 1 line is no record (line 2 is the first): skipped and kept"]


def test_foreign_lines_behind_records_that_are_removed_stay(tmp_path, capsys):
  path = write(tmp_path, ONE + FOREIGN["text"] + TWO + FOREIGN["no UTF-8"] + THREE)
  MetricsWriter(str(tmp_path), 1).close()
  assert path.read_bytes() == ONE + FOREIGN["text"] + FOREIGN["no UTF-8"]
  assert "2 lines are no records (line 2 is the first)" in capsys.readouterr().err


@pytest.mark.parametrize(
  "end, kept",
  [
    (b'{"step": 2, "lo', b""),  # torn: the only thing that is cut
    (b"{", b""),
    (b'{"step": 2}', b'{"step": 2}\n'),  # whole but for its end
    (b'{"comment": "moved"}', b'{"comment": "moved"}\n'),
    (b"a note", b"a note\n"),
    (b"\0\0\0", b"\0\0\0\n"),
    (b"\n\n", b"\n\n"),
  ],
)
def test_only_a_torn_last_line_is_cut(end, kept, tmp_path):
  path = write(tmp_path, ONE + end)
  writer = MetricsWriter(str(tmp_path), 2)
  writer.write({"step": 3, "loss": 2.5})
  writer.close()
  assert path.read_bytes() == ONE + kept + THREE


def test_a_torn_last_line_is_not_told(tmp_path, capsys):
  assert read_metrics(str(write(tmp_path, ONE + b'{"step": 2, "lo'))) == [{"step": 1, "loss": 2.5}]
  assert not capsys.readouterr().err


def test_cutting_needs_no_room(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics, "write_atomically", lambda *_: pytest.fail("rewritten"))
  path = write(tmp_path, b'{"step":1}\n' + TWO + THREE)
  MetricsWriter(str(tmp_path), 1).close()
  assert path.read_bytes() == b'{"step":1}\n'


def test_no_file_is_no_records(tmp_path):
  assert read_metrics(str(tmp_path / "none" / "metrics.jsonl")) == []


@pytest.mark.parametrize(
  "make, message",
  [
    (os.mkdir, "is a folder, expected a regular file"),
    (os.mkfifo, "is a FIFO, expected a regular file"),
    (lambda path: os.symlink("/dev/zero", path), "is a device, expected a regular file"),
    (lambda path: os.symlink(path, path), "cannot be read: Too many levels of symbolic links"),
  ],
)
def test_what_is_no_file_is_refused(make, message, tmp_path):
  path = str(tmp_path / "metrics.jsonl")
  make(path)
  for use in (read_metrics, lambda _: MetricsWriter(str(tmp_path), 0)):
    with pytest.raises(UsageError, match=f"metrics.jsonl {message}"):
      use(path)


def test_a_file_without_permission_is_refused_and_stays(tmp_path, monkeypatch):
  path = write(tmp_path, ONE)

  def refuse(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied")

  monkeypatch.setattr("builtins.open", refuse)
  with pytest.raises(UsageError, match="metrics.jsonl cannot be read: Permission denied"):
    MetricsWriter(str(tmp_path), 0)
  with pytest.raises(RunError, match="metrics.jsonl cannot be written: Permission denied"):
    append_record(str(path), {})
  monkeypatch.undo()
  assert path.read_bytes() == ONE


def test_a_full_disk_is_one_sentence(tmp_path):
  writer = MetricsWriter(str(tmp_path), 0)
  os.dup2(os.open("/dev/full", os.O_WRONLY), writer._file.fileno())
  with pytest.raises(RunError, match="metrics.jsonl cannot be written: No space left on device"):
    writer.write({"step": 1})
  writer.close()  # raises nothing more


def test_a_failing_sync_is_one_sentence(tmp_path, monkeypatch):
  def fail(_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  writer = MetricsWriter(str(tmp_path), 0)
  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(RunError, match="metrics.jsonl cannot be written: Input/output error"):
    writer.sync()


@pytest.mark.parametrize(
  "before, after",
  [
    (b"", b""),
    (ONE, ONE),
    (b'{"st', b""),
    (ONE + b'{"st', ONE),
    (b"a note", b"a note\n"),
    (ONE[:-1], ONE),
  ],
)
def test_a_record_is_not_glued_to_a_torn_one(before, after, tmp_path):
  path = write(tmp_path, before)
  append_record(str(path), {"step": 2, "loss": 2.5})
  assert path.read_bytes() == after + TWO


def test_metrics_are_cut_back_to_the_restored_step(tmp_path):
  path = write(tmp_path, ONE + TWO + b'{"step": 3, "lo')
  writer = MetricsWriter(str(tmp_path), 1)
  writer.write({"step": 2, "loss": float("nan")})
  writer.close()
  assert path.read_bytes() == ONE + b'{"step": 2, "loss": null}\n'


def test_copies_get_every_record_and_the_end(tmp_path):
  written = []
  copy = types.SimpleNamespace(
    write=lambda step, scalars: written.append((step, scalars)), close=lambda: written.append("end")
  )
  writer = MetricsWriter(str(tmp_path), 0, [copy])
  writer.write({"step": 3, "loss": 2.0, "heldout_documents": {"index": [0]}})  # no scalar
  writer.close()
  assert written == [(3, {"loss": 2.0}), "end"]
