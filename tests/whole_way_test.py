"""The way of a newcomer, with the installed package and its program alone: own text, training that
is stopped and resumed, a grid, evaluation, export and import, Python, generation.

The wheel is installed in an environment of its own, which borrows other packages from this one. The
demo trains each kind from one start, and for a few steps only.
"""

import gzip
import json
import os
import pathlib
import signal
import site
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = (
  "--preset=tiny",
  "--num_layers=1",
  "--embed_dim=32",
  "--num_heads=2",
  "--num_kv_heads=1",
  "--head_dim=16",
  "--mlp_dim=32",
  "--noscan_layers",
  "--dtype=float32",
  "--implementation=reference",
)
ROWS = ("--seq_len=64", "--batch_size=2", "--eval_batches=1", "--warmup_steps=1", "--data=data/own")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> pathlib.Path:
  """Installs the wheel in a new environment; returns the path of `sparsek` there."""
  home = tmp_path_factory.mktemp("environment")
  build = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
  subprocess.run(
    [*build, "wheel", "--no-deps", "--no-build-isolation", "-w", home, ROOT], check=True
  )
  subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], check=True)
  (wheel,) = home.glob("sparsek-*.whl")
  python = home / "venv" / "bin" / "python"
  install = ("install", "--no-deps", "--no-index", "--ignore-installed", wheel)
  subprocess.run([*build, "--python", python, *install], check=True)
  (packages,) = (home / "venv").glob("lib/python*/site-packages")
  # Folders in a .pth file are not searched for further ones, such as that of this checkout.
  (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
  return home / "venv" / "bin" / "sparsek"


class Newcomer:
  """A user in an empty folder.

  Attributes:
    folder: where commands run.
  """

  def __init__(self, program: pathlib.Path, folder: pathlib.Path):
    self._program, self.folder = program, folder
    unset = ("PYTHONPATH", "SPARSEK_STARTED_BY", "SPARSEK_CHILD")
    self._environment = {k: v for k, v in os.environ.items() if k not in unset}
    self._environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}

  def start(self, *words: str) -> subprocess.Popen:
    """Starts `sparsek WORDS`."""
    return self._start(str(self._program), *words)

  def _start(self, *command: str) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=self.folder, env=self._environment, **pipes)

  def run(self, *words: str) -> str:
    """Runs `sparsek WORDS`, which must succeed; returns what it printed."""
    return self._end(self.start(*words), words)

  def python(self, code: str) -> str:
    """Runs code in the environment's interpreter."""
    return self._end(self._start(str(self._program.parent / "python"), "-c", code), code)

  def _end(self, process: subprocess.Popen, what: object) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f"{what}\n{out}\n{err}"
    assert "experiments." not in out + err, f"{what} names modules of a checkout:\n{out}\n{err}"
    return out


def interrupt_after_a_step(user: Newcomer, *words: str) -> str:
  """Runs a training that would take hours, and presses Ctrl-C once it has logged a step."""
  process = user.start("pretrain", *words, "--num_steps=1000000", "--log_every=1")
  metrics, end = user.folder / "runs" / "own" / "metrics.jsonl", time.monotonic() + 200
  while not (metrics.exists() and metrics.stat().st_size):
    assert process.poll() is None and time.monotonic() < end, process.communicate()
    time.sleep(0.05)
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=100)
  assert process.returncode == 0, err
  return out


DEMO = """
import os
os.environ["SPARSEK_STARTED_BY"] = "sparsek"  # as the program does
from sparsek.experiments import demo
demo.SEEDS, demo.NUM_STEPS, demo.NUM_DOCUMENTS, demo.EXAMPLES = (0,), 4, 99, 2
demo.DISTANCES, demo.LENGTHS, demo.ROUNDS = (8, 96), (1024, 2048), 1
few = ("--num_steps=4", "--warmup_steps=1", "--log_every=2", "--checkpoint_every=2")
small = ("--embed_dim=32", "--batch_size=2", "--implementation=reference")
demo.PRETRAIN = (*demo.PRETRAIN, *small, *few)
demo.main()
"""
PLACES = "import sparsek, sparsek.experiments as e; print(sparsek.__file__, e.__file__)"
PROGRAM = """
import sparsek
run = sparsek.load("runs/own")
print(run.step, run.config.k, type(sparsek.generate(run, "the", max_new_tokens=3)).__name__)
"""


@pytest.mark.slow
def test_the_whole_way(program, tmp_path):
  user = Newcomer(program, tmp_path)
  places = user.python(PLACES).split()
  assert len(places) == 2 and all(p.startswith(str(program.parent.parent)) for p in places)
  assert "--preset=tiny" in user.run("recipe", "tiny_stdlib")
  assert "tokens a step" in user.run("pretrain", "--flagfile=tiny_stdlib", "--dry_run", MODEL[-1])

  said = user.python(DEMO)
  assert "it ended with one of step" in said and "kept at the question:" in said
  assert all((tmp_path / "demo" / name).exists() for name in ("demo.png", "demo.json"))

  own = tmp_path / "own"
  own.mkdir()
  for i in range(6):
    (own / f"{i}.txt").write_text(f"chapter {i}\n" + "the cat sat on the mat. " * 60)
  with gzip.open(tmp_path / "more.jsonl.gz", "wt") as file:
    file.writelines(json.dumps({"text": f"note {i}: " + "a b c d " * 80}) + "\n" for i in range(20))
  user.run("prepare-data", "--sources=own,more.jsonl.gz", "--train_bpe=270", "--output=data/own")

  train = ("--workdir=runs/own", *MODEL, *ROWS, "--window=8", "--eval_every=0")
  out = interrupt_after_a_step(user, *train, "--k=8")
  assert "the same command resumes" in out
  metrics = (tmp_path / "runs" / "own" / "metrics.jsonl").read_text().splitlines()
  steps = json.loads(metrics[-1])["step"] + 3
  out = user.run("pretrain", *train, "--k=4", f"--num_steps={steps}")
  assert f"step {steps}:" in out

  more = " ".join((*MODEL, *ROWS, "--num_steps=1"))
  user.run(
    "ablate",
    "--workdir=runs/grid",
    "--attention=sparsek",
    "--k=4,8",
    "--window=4",
    "--seeds=1",
    f"--more={more}",
  )
  assert len(list((tmp_path / "runs" / "grid" / "cells").iterdir())) == 2

  user.run("evaluate", "--workdir=runs/own", "--eval_batches=1")
  user.run("plot", "--workdir=runs/own", "--output=own.png")
  assert (tmp_path / "own.png").stat().st_size
  user.run("import-hf", "--workdir=runs/own", "--export=exported")
  user.run("import-hf", "--from=exported", "--workdir=runs/imported")
  assert user.python(PROGRAM).split() == [str(steps), "4", "str"]
  assert user.run("generate", "--workdir=runs/imported", "--prompt=the", "--max_new_tokens=3")
