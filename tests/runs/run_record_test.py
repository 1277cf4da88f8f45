"""The record of a run, model.json: contents that cannot be understood are refused in a sentence."""

import dataclasses
import json
import os

import pytest

from sparsek.config import DataConfig, TransformerConfig
from sparsek.errors import UsageError
from sparsek.runs import run_record

CONFIG = TransformerConfig(
  vocab_size=11,
  num_layers=2,
  embed_dim=8,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=8,
  k=3,
  window=2,
)
RECORD = {
  "model": dataclasses.asdict(CONFIG),
  "data": dataclasses.asdict(DataConfig(data="")),
  "tokenizer": {"name": "byte", "fingerprint": "f", "vocab_size": 11},
}


@pytest.mark.parametrize(
  "content, words",
  [
    (b'{"model": 3}', "cannot be understood"),
    (b"{}", "cannot be understood: it has no 'model'"),
    (b"[]", "holds a JSON list"),
    (b'{"model": ' + b"[" * 100000, "nested too deeply"),
    (b"\xff\xfe\xff", "no JSON that can be understood"),
    (None, "is a FIFO"),
  ],
)
def test_a_model_json_that_cannot_be_read_is_said(content, words, tmp_path):
  if content is None:
    os.mkfifo(tmp_path / "model.json")
  else:
    (tmp_path / "model.json").write_bytes(content)
  with pytest.raises(UsageError, match=f"model.json.* {words}"):
    run_record.load_run_config(str(tmp_path))


def staged(**fields):
  """Returns the record of a run of two stages; the fields are other ones of the first."""
  stages = [
    {"name": "warmup", "flags": "", "steps": [1, 5], "data": dataclasses.asdict(DataConfig())},
    {"name": "joint", "flags": "--k=3", "steps": [6, 8], "data": RECORD["data"]},
  ]
  return {**RECORD, "stages": [{**stages[0], **fields}, stages[1]]}


def test_the_parts_of_a_run_are_its_stages_as_far_as_they_went():
  first, second = staged()["stages"][0]["data"], RECORD["data"]
  for step, parts in (
    (0, []),
    (5, [(5, first)]),
    (6, [(5, first), (1, second)]),
    (8, [(5, first), (3, second)]),
  ):
    assert run_record.trained_parts(staged(), step) == parts
  assert run_record.trained_parts(RECORD, 4) == [(4, second)]


@pytest.mark.parametrize(
  "record",
  [
    {**RECORD, "stages": 3},
    {**RECORD, "stages": None},
    {**RECORD, "stages": ["a"]},
    staged(name=3),
    staged(flags=None),
    staged(steps=[1]),
    staged(steps=5),
    staged(steps=[1, "x"]),
    staged(data={}),
    staged(data=[]),
  ],
)
def test_damaged_stages_in_a_model_json_are_refused(record, tmp_path):
  (tmp_path / "model.json").write_text(json.dumps(record))
  with pytest.raises(UsageError, match="model.json cannot be understood: "):
    run_record.load_run_config(str(tmp_path))


@pytest.mark.parametrize("section", RECORD)
def test_no_other_value_in_a_model_json_ends_in_a_traceback(section, tmp_path):
  values = (None, -1, 2**70, 1.5, "x", [], {}, True, [1], {"a": 1})
  others = [{**RECORD[section], name: value} for name in RECORD[section] for value in values]
  others += [
    {key: value for key, value in RECORD[section].items() if key != name}
    for name in RECORD[section]
  ]
  refused = 0
  for other in (*others, None, 3, [], {**RECORD[section], "extra": 1}):
    (tmp_path / "model.json").write_text(json.dumps({**RECORD, section: other}))
    try:
      run_record.load_run_config(str(tmp_path))
    except UsageError as error:
      assert "model.json cannot be understood: " in str(error)
      refused += 1
  assert refused > len(others) // 2
