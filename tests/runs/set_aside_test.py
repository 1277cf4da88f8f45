"""Return to an earlier checkpoint: files that are set aside, and repeated commands."""

import os

import pytest

from sparsek.errors import UsageError
from sparsek.runs import checkpoint, set_aside


@pytest.fixture
def workdir(tmp_path):
  """A run with checkpoints of steps 4, 8 and 12, one file each."""
  for step in (4, 8, 12):
    (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    (tmp_path / "checkpoints" / str(step) / "arrays").write_text(str(step))
  (tmp_path / "metrics.jsonl").write_text('{"step": 12}\n')
  return tmp_path


def go_back(workdir, step):
  """Goes back as a start with --restore_step; returns the step to restore, and the lines."""
  lines = []
  wanted = set_aside.step_to_restore(str(workdir), step, lines.append)
  if wanted is not None:
    set_aside.set_aside(str(workdir), wanted, lines.append)
  return wanted, lines


def test_later_checkpoints_and_the_metrics_are_set_aside(workdir):
  wanted, lines = go_back(workdir, 4)
  assert wanted == 4 and len(lines) == 1 and "steps 8, 12" in lines[0]
  assert checkpoint.saved_steps(str(workdir)) == [4]
  aside = workdir / "set_aside" / "0"
  assert [(aside / step / "arrays").read_text() for step in ("8", "12")] == ["8", "12"]
  assert (aside / "metrics.jsonl").read_text() == '{"step": 12}\n'


def test_a_repeated_command_goes_on(workdir):
  go_back(workdir, 4)
  (workdir / "checkpoints" / "6").mkdir()
  (workdir / "checkpoints" / "4").rename(workdir / "gone")  # as only the newest are kept
  wanted, lines = go_back(workdir, 4)
  assert wanted is None and "was done before" in lines[0]
  assert checkpoint.saved_steps(str(workdir)) == [6]


def test_going_back_again_needs_another_step_or_no_note(workdir):
  go_back(workdir, 8)
  assert go_back(workdir, 4)[0] == 4
  assert sorted(os.listdir(workdir / "set_aside")) == ["0", "1", "restored_step"]
  (workdir / "set_aside" / "restored_step").unlink()
  assert go_back(workdir, 4)[0] == 4


def test_the_newest_step_is_restored_once_too(workdir):
  assert go_back(workdir, 12) == (12, [])
  (workdir / "checkpoints" / "16").mkdir()
  assert go_back(workdir, 12)[0] is None


def test_a_command_killed_while_it_moves_can_be_repeated(workdir, monkeypatch):
  def killed(path, content):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(set_aside.files, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
      go_back(workdir, 4)
  assert go_back(workdir, 4)[0] == 4
  assert checkpoint.saved_steps(str(workdir)) == [4]


def test_a_step_that_is_not_there_is_refused(workdir):
  with pytest.raises(UsageError, match="--restore_step=5: .* it has 4, 8, 12"):
    go_back(workdir, 5)
  (workdir / "set_aside").mkdir()
  (workdir / "set_aside" / "restored_step").write_text("a note")
  with pytest.raises(UsageError, match="restored_step should hold the step"):
    go_back(workdir, 4)
