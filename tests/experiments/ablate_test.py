"""The grid and its report; one small grid of real runs, stopped and continued."""

import os
import signal
import subprocess
import sys
import time

import pytest

from sparsek import ablation
from sparsek.ablation import Cell
from sparsek.errors import UsageError
from tests.experiments.pretrain_test import ROOT, sharing_compiled, write_documents

SETTINGS = ("--num_layers=1 --embed_dim=16 --num_heads=2 --num_kv_heads=1 --head_dim=8 --mlp_dim=16 --seq_len=32 --batch_size=2 --num_steps=6 --eval_every=3 "
            "--eval_batches=1 --log_every=2 --implementation=reference --noscan_layers")


def test_a_grid_has_no_two_cells_that_mean_the_same():
  cells = ablation.grid(["sparsek", "random", "sliding_window", "full"], [1, 2], [3, 4], ["value", "straight_through"], ["linear"], 2)
  assert len(cells) == len(set(cells)) == 2 * (8 + 4 + 2 + 1) and [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
  assert {cell.name for cell in cells if cell.seed == 0 and cell.attention != "sparsek"} == {
      "random-k1-w3-s0", "random-k1-w4-s0", "random-k2-w3-s0", "random-k2-w4-s0", "sliding_window-w3-s0", "sliding_window-w4-s0", "full-s0"}
  cell = Cell("sparsek", 1, 0, "value", "conv", 7)
  assert cell.name == "sparsek-k1-w0-value-conv-s7" and cell.budget == 1
  assert cell.flags() == ["--attention=sparsek", "--k=1", "--window=0", "--gate=value", "--scorer=conv", "--seed=7"]
  hybrids = ablation.grid(["sparsek*5+full", "sliding_window+linear"], [1, 2], [3], ["value"], ["conv"], 1)
  assert [(cell.name, cell.budget) for cell in hybrids] == [
      ("sparsekx5+full-k1-w3-value-conv-s0", None), ("sparsekx5+full-k2-w3-value-conv-s0", None), ("sliding_window+linear-w3-s0", 3)]
  assert hybrids[0].flags() == ["--k=1", "--window=3", "--gate=value", "--scorer=conv", "--seed=0", "--layer_pattern=sparsek*5,full"]
  uneven, half = ablation.grid(["sliding_window:w256*5+sparsek:k1280:w512", "linear:w8+sparsek:k4"], [1, 2], [3], ["value"], ["conv"], 1)
  assert (uneven.name, uneven.budget) == ("sliding_window_w256x5+sparsek_k1280_w512-value-conv-s0", 512)
  assert (half.name, half.budget) == ("linear_w8+sparsek_k4-w3-value-conv-s0", round((8 + 4 + 3) / 2))
  assert "--layer_pattern=sliding_window:w256*5,sparsek:k1280:w512" in uneven.flags()
  with pytest.raises(UsageError, match=r"'sparsek\*0\+full' must be one of sparsek, .*, or of these a pattern"):
    ablation.patterns("full,sparsek*0+full")
  assert sorted(sum((ablation.share(cells, f"{i}/4") for i in range(4)), []), key=cells.index) == cells
  with pytest.raises(UsageError, match="--job=4/4: must be i/N"):
    ablation.share(cells, "4/4")


def test_report(tmp_path):
  row = lambda kind, k, window, seed, loss: {"attention": kind, "k": k, "window": window, "gate": None, "scorer": None, "seed": seed,
                                             "budget": window and window + (k or 0), "heldout_loss": loss, "step": 9, "tokens_per_second": 1000.}
  rows = [row("random", 2, 4, 0, 3.), row("random", 2, 4, 1, 4.), row("random", 8, 4, 0, 2.5), row("full", None, None, 0, 2.)]
  summary = ablation.summarize(rows)
  assert [(x["attention"], x["k"], x["seeds"], x["heldout_loss"], x["standard_error"]) for x in summary] == [
      ("full", None, 1, 2., None), ("random", 8, 1, 2.5, None), ("random", 2, 2, 3.5, .5)]
  ablation.write_report(str(tmp_path), rows, "--a=<1>")
  assert "| random | 2 | 4 |  |  | 6 | 2 | 3.5000 ± 0.5000 | 1,000 |" in (tmp_path / "table.md").read_text()
  assert (tmp_path / "table.csv").read_text().splitlines()[1] == "random,2,4,,,0,6,3.0,9,1000.0"
  assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
  page = (tmp_path / "report.html").read_text()
  assert page.count("data:image/png;base64,iVBOR") == 1 and "--a=&lt;1&gt;" in page and "http" not in page and "<td>3.5000 ± 0.5000</td>" in page


def command(tmp_path, *arguments):
  return [sys.executable, "-m", "experiments.ablate", f"--workdir={tmp_path}/grid", f"--more={SETTINGS} --data={tmp_path}/tokens", "--k=4", "--window=4",
          "--attention=sliding_window,sparsek", *arguments]


@pytest.mark.slow
def test_a_grid_is_stopped_continued_and_not_done_twice(tmp_path):
  write_documents(str(tmp_path / "tokens"))
  environment = sharing_compiled(str(tmp_path / "cache"))
  with subprocess.Popen(command(tmp_path), env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
    result = tmp_path / "grid" / "cells" / "sliding_window-w4-s0" / ablation.RESULT
    while not result.exists():
      assert process.poll() is None
      time.sleep(.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
  first = result.stat().st_mtime_ns
  done = subprocess.run(command(tmp_path), env=environment, cwd=ROOT, text=True, capture_output=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "cell 1 of 2: sliding_window-w4-s0, finished before" in done.stdout and "2 of 2 cells" in done.stdout and result.stat().st_mtime_ns == first
  assert "| sparsek | 4 | 4 | straight_through | linear | 8 | 1 |" in (tmp_path / "grid" / "table.md").read_text()
  assert sorted(os.listdir(tmp_path / "grid")) == ["cells", "report.html", "report.png", "table.csv", "table.md"]


@pytest.mark.slow
def test_bad_grids_are_refused_before_any_run(tmp_path):
  for argument, words in (("--attention=sparse", "'sparse' must be one of sparsek"), ("--k=0", "must be numbers of at least 1"),
                          ("--more=--eval_every=0", "must be above 0"), ("--base=nowhere", "there is no such file")):
    done = subprocess.run(command(tmp_path, argument), env=sharing_compiled(str(tmp_path)), cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 2 and argument[-12:] in done.stderr and words in done.stderr and not os.path.exists(tmp_path / "grid"), done.stderr
