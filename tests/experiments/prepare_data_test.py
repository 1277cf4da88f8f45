import errno
import functools
import json
import os

import pytest

from sparsek.data.batches import open_data
from sparsek.experiments import prepare_data
from tests.helpers import run_command, spm

run = functools.partial(run_command, prepare_data.main, prepare_data.FLAGS)


@pytest.fixture
def source(tmp_path):
  path = tmp_path / "texts.jsonl"
  path.write_text(
    "".join(json.dumps({"body": f"the quick brown fox no. {i}"}) + "\n" for i in range(50))
  )
  return str(path)


def test_bytes_then_verify(source, tmp_path, capsys):
  output = str(tmp_path / "made" / "here")
  assert run(f"--sources={source}", "--text_field=body", f"--output={output}") == 0
  dataset = open_data(output, "byte")
  assert sum(dataset.split(name).num_documents for name in ("train", "heldout")) == 50
  assert "heldout: " in capsys.readouterr().out
  assert run(f"--verify={output}") == 0
  assert "checksums agree" in capsys.readouterr().out
  with open(f"{output}/tokens.bin", "r+b") as file:
    file.write(b"\x00")
  assert run(f"--verify={output}") == 2
  assert "tokens.bin is damaged" in capsys.readouterr().err


def test_what_begins_a_document_is_said(source, tmp_path, capsys):
  spm().save(str(tmp_path))
  made = lambda name, *extra: run(
    f"--sources={source}", "--text_field=body", f"--output={tmp_path}/{name}", *extra
  )
  assert made("pieces", f"--tokenizer={tmp_path}/tokenizer.json") == 0
  assert ", each document begins with <s> and ends with </s>\n" in capsys.readouterr().out
  assert made("bytes") == 0
  assert (
    " with 257 ids, each document begins with its text and ends with eos\n"
    in capsys.readouterr().out
  )


def test_bpe_trained_then_loaded(source, tmp_path, capsys):
  first, second = str(tmp_path / "first"), str(tmp_path / "second")
  assert (
    run(
      f"--sources={source}",
      "--text_field=body",
      "--train_bpe=280",
      "--heldout_fraction=0.2",
      f"--output={first}",
    )
    == 0
  )
  dataset = open_data(first)
  assert dataset.vocab_size == 280
  assert dataset.tokenizer.decode(dataset.split("heldout").document(0)).startswith(
    "the quick brown fox no. "
  )
  assert (
    run(
      f"--sources={source}",
      "--text_field=body",
      f"--tokenizer={first}",
      "--heldout_fraction=0.2",
      f"--output={second}",
    )
    == 0
  )
  assert open_data(second, first).fingerprint == dataset.fingerprint


def test_what_comes_out_is_compared_with_a_record(source, tmp_path, capsys):
  """Made again it is the same; with another split it is not, and the folder stays."""
  made = lambda name, *extra: run(
    f"--sources={source}", "--text_field=body", f"--output={tmp_path}/{name}", *extra
  )
  record = f"--expect={tmp_path}/first/meta.json"
  assert made("first") == 0 and made("second", record) == 0
  assert f"Tokens and split are those of {tmp_path}/first/meta.json" in capsys.readouterr().out
  assert made("third", record, "--heldout_fraction=0.5") == 1 and open_data(f"{tmp_path}/third")
  assert "meta.json in heldout; made with {'python': " in capsys.readouterr().err
  assert (
    run(f"--verify={tmp_path}/third", record) == 1
    and run(f"--verify={tmp_path}/second", record) == 0
  )


def test_text_and_tasks_mixed(source, tmp_path, capsys):
  """Text counts in full, tasks in their answers; the least length is for text; documents that are
  there twice count once.
  """
  assert (
    run(
      f"--sources={source},{source},tasks:1200:10",
      "--text_field=body",
      "--min_document_bytes=26",
      "--deduplicate",
      "--answers_only",
      f"--output={tmp_path}/mix",
    )
    == 0
  )
  documents = [
    json.loads(line) for line in (tmp_path / "mix" / "documents.jsonl").read_text().splitlines()
  ]
  assert [document["name"].rpartition(":")[2] for document in documents[:-10]] == [
    str(i) for i in range(11, 51)
  ]
  assert [document["name"] for document in documents[-10:]][::9] == ["passkey 0", "copy 9"]
  dataset = open_data(str(tmp_path / "mix"))
  for name in ("train", "heldout"):
    split = dataset.split(name)
    counted = [split.document(i)[~split.uncounted(i)] for i in range(split.num_documents)]
    assert sum(map(len, counted)) == split.num_counted
  assert "the loss counts" in capsys.readouterr().out


@pytest.mark.parametrize(
  "arguments,message",
  [
    (["--output={out}"], "--sources is required"),
    (["--sources={source}"], "--output is required"),
    (
      ["--sources={source}", "--output={out}"],
      "texts.jsonl:1: expected text in the field 'text', found the fields 'body'",
    ),
    (
      [
        "--sources={source}",
        "--output={out}",
        "--text_field=body",
        "--tokenizer=byte",
        "--train_bpe=300",
      ],
      "exclude each other",
    ),
    (
      ["--sources={source}", "--output={out}", "--text_field=body", "--tokenizer=nowhere"],
      "nowhere",
    ),
    (["--sources=nowhere", "--output={out}"], "'nowhere': no such file"),
    (["--sources=txt/*.txt", "--output={out}"], "patterns are not expanded: give --sources=txt, "),
    (["--sources={source},?.md", "--output={out}"], "source '?.md': no such file"),
    (["--sources={source},?.md", "--output={out}"], "give --sources=., of which all files with"),
    (["--sources", "a.txt", "b.txt", "--output={out}"], "'b.txt': every option is written --name"),
    (["--sources", "a.txt", "b.txt"], "and several values are separated by commas"),
    (["--sources={source}", "--output={source}", "--text_field=body"], "there already"),
    (["--sources={source}", "--output={source}/x", "--text_field=body"], "cannot be written"),
    (["--train_bpe=10"], "--train_bpe=10"),
    (["--train_bpe=2147483647", "--sources={source}", "--output={out}"], "--train_bpe=2147483647"),
    (
      ["--sources=tasks:4096:999999999999999999999", "--output={out}"],
      "must be tasks:LENGTH:COUNT",
    ),
    (["--sources=/dev/zero", "--output={out}"], "source /dev/zero is a device"),
    (
      ["--sources={source},nowhere", "--train_bpe=300", "--output={out}"],
      "'nowhere': no such file",
    ),
    (["--expect=/dev/zero", "--sources={source}", "--output={out}"], "/dev/zero is a device"),
    (
      ["--sources={source}", "--output={out}", "--text_field=body", "--min_document_bytes=999"],
      "of at least 999 bytes",
    ),
    (
      ["--sources={source}", "--output={out}", "--text_field=body", "--expect=nowhere.json"],
      "nowhere.json cannot be read",
    ),
    (["--no_such_flag=1"], "no_such_flag"),
    (["--verify=nowhere"], "nowhere"),
    (["--verify=nowhere", "--output={out}"], "takes only --expect: leave out --output"),
  ],
)
def test_bad_input_exits_with_2_and_one_sentence(source, tmp_path, capsys, arguments, message):
  out = str(tmp_path / "out")
  assert run(*(argument.format(out=out, source=source) for argument in arguments)) == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith("error: ") and message in error
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  "function,train_bpe",
  [
    ("os.fsync", False),
    ("os.rename", False),
    ("json.dump", False),
    ("numpy.save", True),
    ("sparsek.data.tokenizer.write_atomically", True),
  ],
)
def test_a_full_disk_ends_in_a_sentence_and_leaves_nothing(
  source, tmp_path, capsys, monkeypatch, function, train_bpe
):
  def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  arguments = [f"--sources={source}", "--text_field=body", f"--output={tmp_path}/made"]
  arguments += ["--train_bpe=280"] * train_bpe
  with monkeypatch.context() as patch:
    patch.setattr(function, full)
    assert run(*arguments) == 1
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error == f"error: {tmp_path}/made cannot be written: No space left on device"
  assert os.listdir(tmp_path) == ["texts.jsonl"]
  assert run(*arguments) == 0


def test_an_output_that_cannot_be_made_is_found_before_the_tokenizer_is_trained(
  source, capsys, monkeypatch
):
  monkeypatch.setattr(prepare_data, "train_bpe", lambda *_: 1 / 0)
  assert (
    run(f"--sources={source}", "--text_field=body", "--train_bpe=300", f"--output={source}/a/b")
    == 2
  )
  assert "/a/b cannot be written: Not a directory" in capsys.readouterr().err


def test_what_was_left_out_is_told(tmp_path, capsys):
  folder = tmp_path / "texts"
  folder.mkdir()
  for name, text in (
    ("a.txt", "one"),
    ("b.TXT", "two"),
    ("c.json", "{}"),
    ("d.jsonl", '{"text": "three"}\n{"text": 3}\n'),
  ):
    (folder / name).write_text(text)
  assert run(f"--sources={folder}", "--skip_bad_lines", f"--output={tmp_path}/made") == 0
  dataset, printed = open_data(f"{tmp_path}/made"), capsys.readouterr().out
  assert sum(dataset.split(name).num_documents for name in ("train", "heldout")) == 3
  assert f"left out: 1 files ending in .json (the first: {folder}/c.json)" in printed
  assert (
    f"left out: 1 lines without a text that could be read (the first: {folder}/d.jsonl:2: "
    f"expected text"
  ) in printed


def test_text_that_is_not_utf8_stops_or_is_replaced(tmp_path, capsys):
  (tmp_path / "text.txt").write_bytes("café".encode("latin-1"))
  words = (f"--sources={tmp_path}/text.txt", f"--output={tmp_path}/made", "--heldout_fraction=0")
  assert run(*words) == 2
  assert "text.txt: not UTF-8: byte 0xe9" in capsys.readouterr().err
  assert run(*words, "--errors=replace") == 0
  dataset = open_data(f"{tmp_path}/made")
  assert dataset.tokenizer.decode(dataset.split("train").document(0)) == "caf\ufffd"


def test_verify_takes_no_flags_of_making(source, tmp_path, capsys):
  output = f"{tmp_path}/tokens"
  assert run(f"--sources={source}", "--text_field=body", f"--output={output}") == 0
  assert run(f"--verify={output}", "--train_bpe=300", "--deduplicate") == 2
  words = "takes only --expect: leave out --deduplicate, --train_bpe"
  assert words in capsys.readouterr().err


def test_a_tokenizer_with_fewer_ids_than_asked_for_is_said(source, tmp_path, capsys):
  arguments = (f"--sources={source}", "--text_field=body", f"--output={tmp_path}/tokens")
  assert run(*arguments, "--train_bpe=100000") == 0
  told = capsys.readouterr()
  (line,) = [line for line in told.err.splitlines() if line.startswith("warning")]
  assert "the text is too short for --train_bpe=100000: the tokenizer has " in line
  assert f"with {line.split()[-2]} ids" in told.out
