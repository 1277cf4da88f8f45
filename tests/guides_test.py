"""Runs the Python examples of docs/ and its notebook, with small models, data and few steps."""

import json
import os
import pathlib
import re

import numpy as np
import pytest

import sparsek
from sparsek import programs
from sparsek.config import presets
from sparsek.data.corpus import Document
from sparsek.data.token_files import write_token_files
from sparsek.data.tokenizer import ByteTokenizer

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
SMALLER = {
  r"seq_len=\d+": "seq_len=32",
  r"batch_size=\d+": "batch_size=2",
  r"\b(num_steps|NUM_STEPS)( ?= ?)\d+": r"\1\g<2>2",
  r"\bk=\d+, window=\d+": "k=4, window=4",
  r"\(32, 32\), \(8, 32\), \(32, 8\), \(1, 63\)": "(4, 4), (1, 8)",
  r'"stdlib"': '"data/stdlib"',
  # compiles fast
  r'preset\("tiny", (num_layers=2, )?': 'preset("tiny", implementation="reference", ',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Makes the folders that examples read: data/stdlib, and runs/mini with a checkpoint."""
  folder = tmp_path_factory.mktemp("guides")
  documents = [Document(str(i), f"Document {i}: {i**7}.\n" * 9, i % 2 == 0) for i in range(40)]
  (folder / "data").mkdir()
  write_token_files(str(folder / "data" / "stdlib"), documents, ByteTokenizer())
  with pytest.MonkeyPatch.context() as patch:
    shrink(patch)
    config = sparsek.preset("tiny", k=4, window=4, implementation="reference")
    data, workdir = folder / "data" / "stdlib", folder / "runs" / "mini"
    programs.train(config, data, workdir, num_steps=2, seq_len=32, batch_size=2, eval_every=0)
  return folder


def shrink(patch):
  """Makes the preset of the examples one that compiles fast."""
  patch.setitem(presets.PRESETS, "tiny", (1, 16, 2, 1, 8, 16, 257, 4, 4))


@pytest.fixture
def run(folder, monkeypatch):
  """Returns a function that runs pieces of code in one namespace, and returns their names."""
  monkeypatch.chdir(folder)
  shrink(monkeypatch)

  def run_pieces(pieces, name):
    names = {}
    for number, piece in enumerate(pieces):
      for pattern, smaller in SMALLER.items():
        piece = re.sub(pattern, smaller, piece)
      exec(compile(piece, f"{name}, piece {number}", "exec"), names)
    return names

  return run_pieces


def python_blocks(name):
  return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.S)


def test_checkpoints_open_as_the_table_says(run):
  names = run(python_blocks("checkpoints.md"), "checkpoints.md")
  expected = names["run"].params
  for params in (names["params"], names["only_params"]["params"], names["everything"]["params"]):
    for part in ("embed", "final_norm"):
      for name, array in expected[part].items():
        np.testing.assert_array_equal(params[part][name], array)
  assert set(np.load("params.npz")) == set(names["named"]) and names["named"]


def test_the_training_loop_learns(run):
  blocks = [
    block.replace("num_steps = 200", "num_steps = 2_0")
    for block in python_blocks("training_loop.md")
  ]
  names = run(blocks, "training_loop.md")
  assert len(names["losses"]) == 20 and names["losses"][-1] < names["losses"][0] - 0.1
  assert names["result"].step == 2 and np.isfinite(names["loss"])


def notebook():
  return json.loads((DOCS / "notebook.ipynb").read_text())["cells"]


def test_the_notebook_runs(run, capsys):
  cells = ["".join(cell["source"]) for cell in notebook() if cell["cell_type"] == "code"]
  names = run(cells, "notebook.ipynb")
  assert names["run"].step == names["result"].step == 2
  assert len(names["losses"]) == len(set(names["losses"].values())) == 2
  assert "tokens kept, 4 in the window" in capsys.readouterr().out
  assert os.path.isdir("runs/notebook/checkpoints/2")


def test_the_notebook_holds_no_outputs():
  for cell in notebook():
    assert not cell.get("outputs") and cell.get("execution_count") is None
