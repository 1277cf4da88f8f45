"""The timing of meshes, on the devices that are here."""

import json

import pytest

from sparsek.errors import UsageError
from sparsek.experiments.bench import many_devices


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--cases=data,none"], "--cases=data,none: no case 'none'; there are data, context"),
    (["--kinds=lsh"], "--kinds=lsh: no kind 'lsh'; there are sparsek"),
  ],
)
def test_what_is_not_known_is_refused(arguments, message):
  with pytest.raises(UsageError, match=message):
    many_devices.main(many_devices.make_parser().parse_args(arguments))


def test_a_case_that_is_recorded_is_shown_and_not_timed_again(tmp_path, capsys):
  record = tmp_path / "many.json"
  row = {"case": "data", "kind": "sparsek", "mesh": "one device", "ms": 2.0, "mib": 1024.0}
  rows = [
    row | {"tokens_per_second": 1000.0},
    row | {"mesh": "data 2", "tokens_per_second": 1900.0},
    row | {"kind": "full", "failed": "out of memory"},
  ]
  record.write_text(json.dumps({"device": "cpu", "versions": {}, "rows": rows}))
  options = many_devices.make_parser().parse_args(["--cases=data", f"--record={record}"])
  many_devices.main(options)
  lines = capsys.readouterr().out.splitlines()
  assert lines[2].split() == ["data", "sparsek", "data", "2", "2.0", "1,900", "1.900", "1.00"]
  assert lines[3].endswith("out of memory")
  assert json.loads(record.read_text())["rows"] == rows
