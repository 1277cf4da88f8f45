"""Commands in processes of their own, forked from one that has imported what commands need."""

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Imports take a third of a small command's time.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
  [
    "sparsek.training.loop",
    "sparsek.evaluation.tasks",
    "sparsek.generation.session",
    "sparsek.huggingface.pretrained",
    "experiments.reports.plots",
  ]
)


def run_forked(
  words: list[str], folder: pathlib.Path, outputs: pathlib.Path
) -> subprocess.CompletedProcess:
  """Runs `python -m WORDS` in a folder, with its output in files of another folder."""
  process = FORKS.Process(target=become, args=(words, str(folder), str(outputs)))
  process.start()
  process.join()
  stdout, stderr = ((outputs / name).read_text() for name in ("stdout", "stderr"))
  return subprocess.CompletedProcess(words, process.exitcode, stdout, stderr)


def become(words, folder, outputs, environment=None):
  """Does what `python -m` does with these words."""
  os.environ.update(environment or {})
  os.environ.update(XDG_CACHE_HOME=f"{outputs}/cache", PYTHONPATH=str(ROOT))
  os.chdir(folder)
  for name, number in (("stdout", 1), ("stderr", 2)):
    with open(os.path.join(outputs, name), "wb") as output:
      os.dup2(output.fileno(), number)
  sys.path.insert(0, str(ROOT))
  sys.argv[:] = words
  runpy.run_module(words[0], run_name="__main__", alter_sys=True)
