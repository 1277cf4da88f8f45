import functools
import json

import pytest

from experiments import prepare_data
from sparsek.data import open_data
from tests.sparsek.helpers import run_command

run = functools.partial(run_command, prepare_data.main, prepare_data.FLAGS)


@pytest.fixture
def source(tmp_path):
  path = tmp_path / "texts.jsonl"
  path.write_text("".join(json.dumps({"body": f"the quick brown fox no. {i}"}) + "\n" for i in range(50)))
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


def test_bpe_trained_then_loaded(source, tmp_path, capsys):
  first, second = str(tmp_path / "first"), str(tmp_path / "second")
  assert run(f"--sources={source}", "--text_field=body", "--train_bpe=280", "--heldout_fraction=0.2", f"--output={first}") == 0
  dataset = open_data(first)
  assert dataset.vocab_size == 280
  assert dataset.tokenizer.decode(dataset.split("heldout").document(0)).startswith("the quick brown fox no. ")
  assert run(f"--sources={source}", "--text_field=body", f"--tokenizer={first}", "--heldout_fraction=0.2", f"--output={second}") == 0
  assert open_data(second, first).fingerprint == dataset.fingerprint


@pytest.mark.parametrize("arguments,message", [
    (["--output={out}"], "--sources is required"),
    (["--sources={source}"], "--output is required"),
    (["--sources={source}", "--output={out}"], "texts.jsonl:1: expected text in the field 'text', found the fields body"),
    (["--sources={source}", "--output={out}", "--text_field=body", "--tokenizer=byte", "--train_bpe=300"], "exclude each other"),
    (["--sources={source}", "--output={out}", "--text_field=body", "--tokenizer=nowhere"], "nowhere"),
    (["--sources=nowhere", "--output={out}"], "'nowhere': no such file"),
    (["--sources={source}", "--output={source}", "--text_field=body"], "there already"),
    (["--sources={source}", "--output={source}/x", "--text_field=body"], "cannot be written"),
    (["--train_bpe=10"], "--train_bpe=10"),
    (["--no_such_flag=1"], "no_such_flag"),
    (["--verify=nowhere"], "nowhere"),
    (["--verify=nowhere", "--output={out}"], "neither"),
])
def test_bad_input_exits_with_2_and_one_sentence(source, tmp_path, capsys, arguments, message):
  out = str(tmp_path / "out")
  assert run(*(argument.format(out=out, source=source) for argument in arguments)) == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith("error: ") and message in error
  assert not (tmp_path / "out").exists()
