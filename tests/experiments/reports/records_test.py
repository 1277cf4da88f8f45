"""The form of records: the same content, one line a run or row."""

import json

import pytest

from sparsek.experiments.reports import records

RECORD = {"rows": [{"n": 1, "rivals": {"a": [1.5, None]}}, {"n": 2}], "flags": ["a", "b"], 3: "é\n"}


@pytest.mark.parametrize("depth", range(5))
def test_content_stays_the_same(depth):
  assert json.loads(records.dumps(RECORD, depth)) == json.loads(json.dumps(RECORD))


def test_a_row_takes_a_line():
  assert records.dumps(RECORD).splitlines()[1:6] == [
    ' "rows": [',
    '  {"n": 1, "rivals": {"a": [1.5, null]}},',
    '  {"n": 2}',
    " ],",
    ' "flags": ["a", "b"],',
  ]
  runs = {"runs": {"full": {"seeds": {"0": {"loss": {"8": 1}}, "1": {}}}}}
  assert '    "0": {"loss": {"8": 1}},' in records.dumps(runs, 4).splitlines()
