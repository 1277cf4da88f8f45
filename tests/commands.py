"""Commands in processes of their own, forked from one that has imported what commands need."""

import multiprocessing
import os
import pathlib
import re
import runpy
import subprocess
import sys

import jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Imports take a third of a small command's time.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
  [
    "sparsek.training.loop",
    "sparsek.evaluation.tasks",
    "sparsek.generation.session",
    "sparsek.huggingface.pretrained",
    "sparsek.experiments.reports.plots",
  ]
)


def simulated(devices: int) -> dict[str, str]:
  """Returns the environment of a process with some simulated devices."""
  count = f"--xla_force_host_platform_device_count={devices}"
  return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}"}


class Forked:
  """A command that runs in a forked process, with the methods of `subprocess.Popen`."""

  def __init__(
    self,
    words: list[str],
    folder: pathlib.Path,
    outputs: pathlib.Path,
    environment: dict[str, str] | None = None,
  ):
    """Starts `python -m WORDS` in a folder, with its output in files of another folder."""
    self._outputs = outputs
    arguments = (words, str(folder), str(outputs), environment)
    self._process = FORKS.Process(target=become, args=arguments)
    self._process.start()
    self.pid = self._process.pid
    self.kill = self._process.kill

  @property
  def returncode(self) -> int | None:
    """Returns the exit code, or None of a process that runs."""
    return self._process.exitcode

  poll = returncode.fget

  def send_signal(self, number: int) -> None:
    """Sends a signal to a process that runs."""
    if self.returncode is None:
      os.kill(self.pid, number)

  def communicate(self, timeout: float | None = None) -> tuple[str, str]:
    """Returns what the process has printed, at its end."""
    self._process.join(timeout)
    if self.returncode is None:
      self.kill()
      raise TimeoutError(f"still running after {timeout} s")
    stdout, stderr = ((self._outputs / name).read_text() for name in ("stdout", "stderr"))
    return stdout, stderr


def run_forked(
  words: list[str], folder: pathlib.Path, outputs: pathlib.Path
) -> subprocess.CompletedProcess:
  """Runs `python -m WORDS` in a folder, with its output in files of another folder."""
  process = Forked(words, folder, outputs)
  stdout, stderr = process.communicate()
  return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


def become(words, folder, outputs, environment=None):
  """Does what `python -m` does with these words."""
  os.environ.update(environment or {})
  for name, value in (environment or {}).items():
    if name.startswith("JAX_"):  # JAX, imported before, has read its environment
      number = re.fullmatch(r"[\d.]+", value)
      jax.config.update(name.lower(), float(value) if number else value)
  os.environ.update(XDG_CACHE_HOME=f"{outputs}/cache", PYTHONPATH=str(ROOT))
  os.chdir(folder)
  for name, number in (("stdout", 1), ("stderr", 2)):
    with open(os.path.join(outputs, name), "wb") as output:
      os.dup2(output.fileno(), number)
  sys.path.insert(0, str(ROOT))
  sys.argv[:] = words
  runpy.run_module(words[0], run_name="__main__", alter_sys=True)
