"""Files that flags name to be written: those of a user or a run stay."""

import pytest

from sparsek.command_line import outputs
from sparsek.errors import UsageError
from sparsek.experiments.reports import plots
from sparsek.runs import run_record, set_aside

KIND = outputs.record("record of a test", "rows", "flags")


@pytest.mark.parametrize("content", ("", '{"flags": [], "rows": [], "more": 1}'))
def test_our_files_and_empty_ones_may_be_replaced(content, tmp_path):
  (tmp_path / "a.json").write_text(content)
  outputs.check_record("record", str(tmp_path / "a.json"), KIND, has_picture=True)


@pytest.mark.parametrize("content", ("notes", "[1]", '{"rows": []}', '{"rows": '))
def test_other_files_are_refused(content, tmp_path):
  path = tmp_path / "a.json"
  path.write_text(content)
  words = f"--record={path} exists and is no record of a test: it would be lost"
  with pytest.raises(UsageError, match=words):
    outputs.check_record("record", str(path), KIND, has_picture=False)


def test_the_picture_beside_a_record_is_one_that_was_drawn(tmp_path):
  record, picture = str(tmp_path / "a.json"), str(tmp_path / "a.png")
  for name in (picture, str(tmp_path / "a.svg")):
    plots.save(plots.new_figure(), name)
    outputs.check("--output", name, outputs.PICTURE)
  outputs.check_record("record", record, KIND, has_picture=True)
  (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n of a camera")
  outputs.check_record("record", record, KIND, has_picture=False)
  with pytest.raises(UsageError, match=r"its picture .*a\.png exists and is no picture"):
    outputs.check_record("record", record, KIND, has_picture=True)


@pytest.mark.parametrize("name", ("flags.txt", "checkpoints/4/x.json", "tokenizer/x", "lock"))
def test_what_a_run_keeps_is_no_output(name, tmp_path):
  assert (outputs.RUN, set_aside.FOLDER) == (run_record.FILE, "set_aside")
  (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
  outputs.check("--save_cache=x", str(tmp_path / name), KIND)
  (tmp_path / outputs.RUN).write_text("{}")
  with pytest.raises(UsageError, match=f"--save_cache=x is a file of the run in {tmp_path}: take"):
    outputs.check("--save_cache=x", str(tmp_path / name), KIND)
  outputs.check("--output=x", str(tmp_path / "plot.png"), KIND)  # beside what it keeps


def test_a_broken_link_and_a_folder_are_no_outputs(tmp_path):
  (tmp_path / "link").symlink_to("nowhere")
  (tmp_path / "folder").mkdir()
  for name in ("link", "folder"):
    with pytest.raises(UsageError, match=name):
      outputs.check("--record=x", str(tmp_path / name), KIND)
