"""Streams that nobody reads, Ctrl-C, and a process whose threads do not end."""

import os
import signal
import subprocess
import sys
import time

import pytest
from absl import flags as absl_flags

from sparsek.command_line import terminal
from sparsek.command_line.main import run
from sparsek.errors import RunError

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture
def unread():
  """Returns a text stream into a pipe that nobody reads."""
  reader, writer = os.pipe()
  os.close(reader)
  with open(writer, "w") as stream:
    yield stream


def test_a_pipe_that_nobody_reads_costs_what_is_printed(unread):
  stream = terminal.Lenient(unread, "standard output", BrokenPipeError)
  for _ in range(3):
    print("x" * 100_000, file=stream, flush=True)
  assert not stream.isatty()


@pytest.mark.parametrize("forgiven, raises", [(OSError, False), (BrokenPipeError, True)])
def test_a_full_disk_costs_the_progress_but_fails_what_is_asked_for(forgiven, raises):
  with open("/dev/full", "w") as full:
    stream = terminal.Lenient(full, "standard output", forgiven)
    print("a line", file=stream)
    if raises:
      with pytest.raises(RunError, match="standard output cannot be written: No space left"):
        stream.flush()
    stream.flush()


def test_an_interrupt_is_one_line_and_code_130(capsys):
  def main():
    signal.raise_signal(signal.SIGINT)

  with pytest.raises(SystemExit) as exit_info:
    run(main, absl_flags.FlagValues(), ["script"])
  assert exit_info.value.code == 130
  assert capsys.readouterr().err == "interrupted\n"


def test_a_command_keeps_ignoring_an_ignored_interrupt():
  """Behaves as in the background of a shell script."""
  old = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    with pytest.raises(SystemExit) as exit_info:
      run(lambda: signal.raise_signal(signal.SIGINT), absl_flags.FlagValues(), ["script"])
    assert exit_info.value.code == 0 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGINT, old)


@pytest.mark.slow
def test_a_process_ends_whatever_its_threads_wait_for_and_keeps_low_descriptors_free(tmp_path):
  """A process of its own, without standard input and output, which ends by os._exit.

  What is printed, as by libraries in C, must not land in the first file that a run opens.
  """
  code = f"""
import os, threading
from absl import flags
from sparsek.command_line import terminal
from sparsek.command_line.main import run
from sparsek.errors import RunError
terminal.END_SECONDS = 0.5
def main():
  file = open({str(tmp_path / "file")!r}, "w")
  os.write(1, b"noise")
  print("more noise", flush=True)
  threading.Thread(target=threading.Event().wait).start()
  raise RunError("the last save failed")
run(main, flags.FlagValues())
"""
  done = subprocess.run(
    ["sh", "-c", 'exec "$0" -c "$1" <&- >&-', sys.executable, code],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
    timeout=60,
  )
  assert (done.returncode, done.stderr) == (1, "error: the last save failed\n")
  assert (tmp_path / "file").read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize("words", [["experiments.pretrain"], ["sparsek", "pretrain"]])
def test_an_interrupt_while_a_command_imports_is_one_line_and_code_130(words, tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-X", "importtime", "-m", *words, f"--workdir={tmp_path}"],
    cwd=ROOT,
    text=True,
    stderr=subprocess.PIPE,
  )
  for line in process.stderr:
    if line.split()[-1] == "jax.version":  # flags are parsed; now come the slow imports
      break
  process.send_signal(signal.SIGINT)
  rest = process.stderr.read()
  assert process.wait(60) == 130
  assert "interrupted\n" in rest and "Traceback" not in rest


class Interrupted:
  """An object in whose destructor Ctrl-C arrives, where Python drops the exception."""

  def __del__(self):
    raise KeyboardInterrupt


def test_an_interrupt_in_a_destructor_counts(monkeypatch, capfd):
  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    terminal.keep_interrupts()
    with pytest.raises(KeyboardInterrupt):
      thing = Interrupted()
      del thing
      time.sleep(5)
  finally:
    signal.signal(signal.SIGINT, before)
  assert capfd.readouterr().err == ""


def test_warnings_that_are_logged_are_lines_like_the_others():
  code = (
    "from sparsek.command_line import terminal\n"
    "from absl import logging\n"
    "terminal.shorten_warnings()\n"
    "logging.warning('the data are %d', 7)\n"
    "logging.info('not said')\n"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert (done.stdout, done.stderr) == ("", "warning: the data are 7\n")
