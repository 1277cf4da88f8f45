"""A few damaged files of tests/experiments/fuzz.py: refused in a sentence, or read as they are."""

import dataclasses
import json
import random

import pytest

from tests.experiments import fuzz_formats, mutations
from tests.experiments.fuzz import SEED

# a tenth of a second each, or more
COMPUTES = ("checkpoint", "config.json", "safetensors", "shards", "cache.npz")


@pytest.mark.parametrize("name", fuzz_formats.FORMATS)
def test_damaged_files_are_refused_or_read_as_they_are(name, tmp_path):
  (tmp_path / "good").mkdir()
  good = fuzz_formats.make_good(name, tmp_path)
  for case in range(3 if name in COMPUTES else 12):
    kind, why = fuzz_formats.try_case(name, tmp_path, good, SEED, case)
    assert kind in ("refused", "read"), f"case {case}: {why}"


def test_a_case_is_the_same_each_time_and_damage_is_damage():
  content = json.dumps({"a": [1, 2.5, {"b": "text"}], "c": None}).encode()
  for mutate in (mutations.mutate_bytes, mutations.mutate_json):
    changed = [mutate(content, random.Random(case)) for case in range(50)]
    assert changed == [mutate(content, random.Random(case)) for case in range(50)]
    assert len(set(changed)) > 40
    assert sum(json_or_none(x) == json.loads(content) for x in changed) < 10


def json_or_none(content):
  try:
    return json.loads(content)
  except ValueError:
    return None


def test_a_reader_that_guesses_is_found(tmp_path, monkeypatch):
  """The checks find a reader that ends by no refusal, and one that makes things up."""
  (tmp_path / "good").mkdir()
  good = fuzz_formats.make_good("source.txt", tmp_path)
  form = fuzz_formats.FORMATS["source.txt"]

  def broken(folder):
    raise KeyError("x")

  for read, words in ((broken, "KeyError"), (lambda folder: ["another text"], "the file says")):
    monkeypatch.setitem(
      fuzz_formats.FORMATS,
      "source.txt",
      dataclasses.replace(form, read=read, damage=lambda content, rng: content),
    )
    kind, why = fuzz_formats.try_case("source.txt", tmp_path, good, SEED, 0)
    assert kind == "wrong" and words in why
