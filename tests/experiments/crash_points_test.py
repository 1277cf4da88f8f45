"""A few of the crash points and drawn command lines, so that these measures keep working."""

import subprocess
import sys

import pytest

from tests.experiments import io_faults
from tests.experiments.crash_points import chosen
from tests.experiments.pretrain_test import ROOT


def measure(name, *arguments):
  done = subprocess.run(
    [sys.executable, "-m", f"tests.experiments.{name}", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.mark.slow
def test_failing_operations_of_preparation_and_training_lose_nothing():
  # A new process, since the library that makes operations fail is preloaded.
  out = measure(
    "crash_points",
    "--scenarios=prepare,train",
    "--every=1",
    "--only=meta.json|rename run/checkpoints/1$|write run/metrics.jsonl$",
  )
  assert "0 wrong" in out.splitlines()[-2] and "kill" in out, out


@pytest.mark.slow
def test_drawn_command_lines_end_with_a_sentence():
  out = measure("fuzz", "--flags=prepare_data", "--combinations=8")
  assert "flags of prepare_data: 8 cases" in out, out


def test_recorded_operations_are_numbered_by_key(tmp_path):
  log = tmp_path / "log"
  log.write_text("write a\nfsync a\nwrite a\n")
  assert io_faults.recorded(str(log)) == [("write a", 0), ("fsync a", 0), ("write a", 1)]


def test_each_kind_of_operation_fails_in_each_mode():
  operations = [("write step 1", 0), ("write step 1", 1), ("write step 2", 0), ("fsync b", 0)]
  points = chosen(operations, ["ENOSPC", "EIO", "kill"])
  # Its first, its last and the one in the middle; flushing needs no space.
  assert points == [
    (("write step 1", 0), "ENOSPC"),
    (("write step 2", 0), "EIO"),
    (("write step 1", 1), "kill"),
    (("fsync b", 0), "EIO"),
    (("fsync b", 0), "kill"),
  ]
