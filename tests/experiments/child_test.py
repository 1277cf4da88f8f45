"""Child processes end with their parent, in whatever way it ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.experiments.pretrain_test import ROOT

# Says where it is, then waits; SIGTERM makes it write what a checkpoint would be.
CHILD = """
import os, signal, sys, time
def end(*_):
  open(sys.argv[1] + ".ended", "w").close()
  sys.exit(0)
signal.signal(signal.SIGTERM, end)
with open(sys.argv[1] + ".new", "w") as file:
  file.write(f"{os.getpid()} {sys.argv[1:]} {__name__}")
os.replace(sys.argv[1] + ".new", sys.argv[1])
time.sleep(60)
"""
PARENT = """
import sys
from sparsek.experiments import child
with child.ending_at_signals(7), child.running("waits", sys.argv[1:]) as process:
  process.wait()
"""


def wait_for(path):
  deadline = time.monotonic() + 60
  while not path.exists():
    assert time.monotonic() < deadline
    time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
  "number, code",
  [(signal.SIGKILL, -9), (signal.SIGTERM, 7), (signal.SIGHUP, 7), (signal.SIGUSR1, 7)],
)
def test_a_child_ends_with_its_parent(number, code, tmp_path):
  (tmp_path / "waits.py").write_text(CHILD)
  environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
  command = [sys.executable, "-c", PARENT, str(tmp_path / "said"), "more"]
  with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as parent:
    wait_for(tmp_path / "said")
    parent.send_signal(number)
    assert parent.wait() == code
  wait_for(tmp_path / "said.ended")
  assert (tmp_path / "said").read_text().endswith(f" {[str(tmp_path / 'said'), 'more']} __main__")
