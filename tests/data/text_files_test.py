"""Files of all kinds from which texts are read, and those that are refused."""

import contextlib
import functools
import gzip
import json
import os
import random
import socket
import sys
import types
import zlib

import pytest

from sparsek.data.corpus import LeftOut, documents
from sparsek.data.text_files import texts
from sparsek.errors import UsageError

ONE_TWO = b'{"text": "one"}\n{"text": "two"}\n'
DEEP = b'{"text": "ok", "meta": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n"
gz = functools.partial(gzip.compress, mtime=0)  # a time would become part of the tests' names
HUGE = b'{"text": "ok", "id": ' + b"1" * 5000 + b"}\n"


def read(path, **options):
  return [text for _, text in texts(str(path), **options)]


@pytest.mark.parametrize(
  "name,content,expected",
  [
    ("a.jsonl", ONE_TWO, ["one", "two"]),
    ("a.JSONL", ONE_TWO, ["one", "two"]),
    ("a.ndjson", b"\xef\xbb\xbf" + ONE_TWO, ["one", "two"]),
    ("a.json", ONE_TWO, ["one", "two"]),
    ("a.json", b"\xef\xbb\xbf" + ONE_TWO, ["one", "two"]),
    ("a.json", b'[{"text": "one"},\n {"text": "two"}]', ["one", "two"]),
    ("a.Json", b'["one", "two"]', ["one", "two"]),
    ("a.json", b'{"text":\n "one"}', ["one"]),
    ("a.jsonl.gz", gz(ONE_TWO), ["one", "two"]),
    ("a.NDJSON.GZ", gz(ONE_TWO[:16]) + gz(ONE_TWO[16:]), ["one", "two"]),
    ("a.txt.gz", gz(ONE_TWO), [ONE_TWO.decode()]),
    ("a.txt", b"\xef\xbb\xbfone\n\xef\xbb\xbf", ["one\n\ufeff"]),
    ("a.TXT", b"one\r\n", ["one\r\n"]),
    (
      "README",
      b"GIF89a, RIFF and PAR1 are magic numbers",
      ["GIF89a, RIFF and PAR1 are magic numbers"],
    ),
    ("a.jsonl", b'{"text": "\\u0000"}', ["\0"]),
  ],
)
def test_files_are_what_their_names_say(tmp_path, name, content, expected):
  (tmp_path / name).write_bytes(content)
  assert read(tmp_path / name) == expected


@pytest.mark.parametrize(
  "name,content,message",
  [
    ("a.txt", gz(b"one"), "is gzip data .then its name should end in .gz"),
    ("a.jsonl", gz(b"one"), "is gzip data"),
    ("a.txt", b"\x28\xb5\x2f\xfd1234", "is zstd data"),
    ("a.txt", b"PAR1\x00", "is Parquet"),
    ("a.txt", b"PK\x03\x04", "is a zip archive"),
    ("a.txt", b"%PDF-1.7", "is a PDF"),
    ("a.txt", b"\x80\x04K\x01.", "is a pickle"),
    ("a.txt", bytes([9] + [0] * 7) + b'{"a":1}  ', "is safetensors"),
    ("a.txt", b"name" + b"\0" * 253 + b"ustar", "is a tar archive"),
    ("a.txt.gz", gz(b"\x7fELF\x02"), "is an ELF program"),
    ("a.txt", "text".encode("utf-16"), "is text in UTF-16"),
    ("a.jsonl", "text".encode("utf-32"), "is text in UTF-32"),
    ("a.txt", b"text\0text", r"holds NUL bytes .the first at offset 4"),
    ("a.json", b'{"text": "\0"}', "holds NUL bytes"),
    ("a.txt", "text".encode("utf-16-le"), "holds NUL bytes"),
    ("a.jsonl", ONE_TWO + b"\0\0\0\n", "a.jsonl:3: NUL bytes"),
    ("a.gz", b"one", "is damaged, or not compressed as its name says: Not a gzipped file"),
    ("a.jsonl.gz", gz(ONE_TWO)[:-9], "a.jsonl.gz is damaged"),
    ("a.txt.gz", gz(b"one")[:-8] + b"12345678", "a.txt.gz is damaged"),
    ("a.jsonl", ONE_TWO + DEEP, "a.jsonl:3: JSON that is nested too deeply"),
    ("a.jsonl", ONE_TWO + HUGE, "a.jsonl:3: .* an integer of too many digits"),
    ("a.json", DEEP, "a.json: JSON that is nested too deeply"),
    ("a.json", HUGE, "a.json: .* an integer of too many digits"),
    ("a.json", ONE_TWO + b"{", "a.json:3: no JSON that can be understood"),
    ("a.json", b"one\ntwo", "a.json: no JSON that can be understood"),
    ("a.json", b"", "a.json: no JSON that can be understood"),
    ("a.json", b"5", "a.json: expected an array or objects, found a int"),
    ("a.json", b'["one", 5]', r"a.json\[1\]: expected text in the field 'text', found a int"),
    (
      "a.json",
      b'[{"body": "one"}]',
      r"a.json\[0\]: expected text in the field 'text', found the fields 'body'",
    ),
  ],
)
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_what_is_no_text_is_refused_by_name(tmp_path, name, content, message, errors):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UsageError, match=message) as error:
    read(tmp_path / name, errors=errors)
  assert "\n" not in str(error.value) and len(str(error.value)) < 500


def no_zstandard(monkeypatch):
  for name in ("compression", "zstandard"):
    monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def zstd(monkeypatch):
  """Returns a compressor of zstd frames, or one of zlib behind zstandard's interface without it."""
  with contextlib.suppress(ImportError):
    import zstandard

    return zstandard.compress
  no_zstandard(monkeypatch)
  fake = types.SimpleNamespace(
    ZstdError=zlib.error,
    ZstdDecompressor=lambda: types.SimpleNamespace(decompressobj=zlib.decompressobj),
  )
  monkeypatch.setitem(sys.modules, "zstandard", fake)
  return zlib.compress


def test_zstd_frames_are_read_to_the_end(tmp_path, zstd):
  long = "".join(map(chr, random.Random(0).choices(range(32, 127), k=300_000)))
  lines = [json.dumps({"text": text}).encode() + b"\n" for text in ("one", long, "two")]
  path = tmp_path / "a.jsonl.zst"
  path.write_bytes(b"".join(map(zstd, lines)))
  assert read(path) == ["one", long, "two"]
  (tmp_path / "a.txt.zst").write_bytes(zstd(long.encode()))
  assert read(tmp_path / "a.txt.zst") == [long]
  whole = path.read_bytes()
  for damaged in (whole[:-3], whole + zstd(b"more")[:5], b"\x77" + whole, whole[: len(whole) // 2]):
    path.write_bytes(damaged)
    with pytest.raises(UsageError, match="a.jsonl.zst is damaged"):
      read(path)


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
  no_zstandard(monkeypatch)
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  for name, package in (("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow")):
    (tmp_path / name).write_bytes(b"PAR1")
    message = f"{name}: reading .* needs {package}: pip install {package}"
    with pytest.raises(UsageError, match=message):
      read(tmp_path / name)


def test_parquet(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  import pyarrow.parquet  # noqa: F811

  path = tmp_path / "a.parquet"
  texts = [f"text {i}" for i in range(3000)] + [None]
  pyarrow.parquet.write_table(pyarrow.table({"text": texts, "id": range(3001)}), path)
  skipped = []
  assert read(path, bad=skipped.append) == [f"text {i}" for i in range(3000)]
  (error,) = map(str, skipped)
  assert error == f"{path}:3001: expected text in the field 'text', found a NoneType"
  message = "expected text in the column 'body', found the columns 'text', 'id'"
  with pytest.raises(UsageError, match=message):
    read(path, text_field="body")
  with pytest.raises(UsageError, match="a.parquet:1: expected text in the field 'id', found a int"):
    read(path, text_field="id")
  content = path.read_bytes()
  for damaged in (content[:1000], b"text", content[:-9] + b"12345PAR1"):
    path.write_bytes(damaged)
    with pytest.raises(UsageError, match="a.parquet cannot be read as Parquet: "):
      read(path)


def test_fifos_and_devices_are_refused(tmp_path, monkeypatch):
  os.mkfifo(tmp_path / "a.txt")
  with socket.socket(socket.AF_UNIX) as server:
    monkeypatch.chdir(tmp_path)  # such names are short
    server.bind("a.sock")
    for source, kind in (
      (str(tmp_path), "FIFO"),
      ("a.txt", "FIFO"),
      ("a.sock", "socket"),
      ("/dev/zero", "device"),
    ):
      with pytest.raises(UsageError, match=f"is a {kind}, expected a regular file"):
        list(documents([source], extensions=[".txt"]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_bad_lines_are_left_out_where_asked(tmp_path, name):
  path, left_out = tmp_path / name, LeftOut()
  bad = [
    b"{",
    b'{"body": "x"}',
    b'{"text": 5}',
    b'"text"',
    b'{"text": "\\ud800"}',
    DEEP.strip(),
    HUGE.strip(),
  ]
  bad += [b'{"text": "\xff"}'] * (name == "a.jsonl")
  path.write_bytes(b"\n".join([b'{"text": "one"}', *bad, b'{"text": "two"}']))
  kept = documents([str(path)], skip_bad_lines=True, left_out=left_out)
  assert [document.text for document in kept] == ["one", "two"]
  (line,) = left_out.lines()
  assert line.startswith(
    f"left out: {len(bad)} lines without a text that could be read (the first: {path}:2: no JSON"
  )
  with pytest.raises(UsageError, match=f"{name}:2: no JSON"):
    list(documents([str(path)]))


def test_where_everything_is_left_out_the_error_says_why(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'{"body": "x"}\n' * 3)
  with pytest.raises(
    UsageError, match=r"no documents in .*; left out: 3 lines .*a.jsonl:1: .*'body'"
  ):
    list(documents([str(path)], skip_bad_lines=True))


def test_folders_are_walked_once_and_what_is_left_out_is_counted(tmp_path):
  root, other = tmp_path / "with,comma", tmp_path / "other"
  for folder in (root / "sub", root / ".git", other / "deep"):
    folder.mkdir(parents=True)
  for name in (
    "A.TXT",
    "b.txt.gz",
    "c.bin",
    "d.Bin",
    "LICENSE",
    ".h.txt",
    "e.txt",
    "sub/f.NDJSON",
    "../other/g.md",
    "../other/deep/h.txt",
  ):
    (root / name).write_bytes(b'{"text": "%b"}' % name.encode())
  (root / "b.txt.gz").write_bytes(gz(b"b"))
  (root / "e.txt").write_bytes(b"")
  for link, target in (
    ("0", other),
    ("loop", root),
    ("up", tmp_path),
    ("same", other / "deep"),
    ("sub/file.txt", other / "g.md"),
  ):
    os.symlink(target, root / link)
  left_out = LeftOut()
  names = [
    os.path.relpath(document.name, root) for document in documents([str(root)], left_out=left_out)
  ]
  assert names == ["A.TXT", "b.txt.gz", "sub/f.NDJSON:1", "sub/file.txt", "0/g.md", "0/deep/h.txt"]
  assert sorted(line.partition(" (")[0] for line in left_out.lines()) == [
    "left out: 1 empty documents",
    "left out: 1 files without an ending",
    "left out: 1 hidden files",
    "left out: 1 hidden folders",
    "left out: 2 files ending in .bin",
    "left out: 4 linked folders that are read anyway",
  ]
  line = f"left out: 2 files ending in .bin (the first: {root / 'c.bin'}"
  assert line in left_out.lines()[1]
  assert left_out.lines(max_reasons=1)[1:] == ["left out: 6 for 5 other reasons"]


def test_a_missing_source_is_found_before_the_others_are_read(tmp_path):
  with pytest.raises(UsageError, match="nowhere.*no such file"):
    next(documents(["stdlib", str(tmp_path / "nowhere")]))


@pytest.mark.parametrize(
  "source",
  [
    "tasks:4096:" + "9" * 21,
    "tasks:" + "9" * 21 + ":5",
    "tasks:4096:" + "9" * 5000,
    "tasks:20000000:1",
    "tasks:4096:²",
    "tasks:4096",
    "tasks:4096:-1",
    "tasks:4096:5:5",
  ],
)
def test_absurd_numbers_of_tasks_are_refused(source):
  with pytest.raises(UsageError, match="must be tasks:LENGTH:COUNT") as error:
    next(documents([source]))
  assert len(str(error.value)) < 300
