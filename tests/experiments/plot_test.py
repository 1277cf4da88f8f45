"""The picture of runs: what is drawn of which records, and what is refused."""

import json
import sys

import jax
import pytest

from sparsek.config import TransformerConfig
from sparsek.data.tokenizer import ByteTokenizer
from sparsek.experiments import plot
from sparsek.experiments.reports import plots, run_plots
from sparsek.model.transformer import init_params
from tests.helpers import run_command

CONFIG = TransformerConfig(
  vocab_size=257,
  num_layers=2,
  embed_dim=8,
  num_heads=2,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=8,
  k=3,
  window=2,
  attention="sparsek,full",
  implementation="reference",
)


def metrics(num_layers, offset=0.0):
  """Returns records of three steps; a layer's statistics are its index and the step."""
  records = []
  for step in (1, 2, 3):
    layers = {
      f"layer_{layer}/{name}": 10.0 * layer + step
      for layer in range(num_layers)
      for name in run_plots.STATISTICS
      if name != "share_older_than_1k"
    }
    old = {f"layer_{layer}/share_older_than_1k": 0.0 for layer in range(num_layers)}
    records.append({"step": step, "loss": 5.0 - step + offset, **layers, **old})
  return [*records, {"step": 3, "heldout_loss": 3.0}]


def evaluation(num_targets=64):
  buckets = [
    {"first": 0, "last": 31, "loss": 3.5, "num_targets": 32},
    {"first": 32, "last": 63, "loss": 2.5, "num_targets": 32},
    {"first": 64, "last": 127, "loss": None, "num_targets": 0},
    {"first": 128},
  ]
  data = {"fingerprint": "abc", "seq_len": 64}
  return {"step": 3, "loss": 3.0, "num_targets": num_targets, "buckets": buckets, "data": data}


def write(folder, records, evaluations=()):
  folder.mkdir(parents=True)
  for name, lines in (("metrics.jsonl", records), ("evaluation.jsonl", evaluations)):
    if lines:
      (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(folder)


def read(tmp_path, *layers, evaluations=()):
  return [
    run_plots.read_run(write(tmp_path / f"run_{i}", metrics(n), evaluations), f"run {i}")
    for i, n in enumerate(layers)
  ]


def run(*arguments):
  return run_command(plot.main, plot.FLAGS, *arguments)


def test_one_run_has_a_line_for_each_layer(tmp_path):
  lines = []
  (one,) = read(tmp_path, 20, evaluations=[evaluation()])
  panels = {panel.title: panel for panel in run_plots.panels([one], lines.append)}
  assert panels["Held-out loss by position"].lines == {"run 0": [(32, 3.5), (64, 2.5)]}
  assert panels["Held-out loss"].lines == {"run 0": [(3, 3.0)]}
  support = panels["Support"].lines
  assert list(support) == [f"layer {layer}" for layer in (0, 3, 5, 8, 11, 14, 16, 19)]
  assert support["layer 19"] == [(1, 191.0), (2, 192.0), (3, 193.0)]
  assert lines == [
    "8 of 20 layers are drawn",
    "left out: Selected keys older than 1,024 tokens (0 at all steps)",
    "not recorded: The scorers' loss",
  ]


def test_several_runs_have_the_mean_over_layers_and_what_they_lack_is_said(tmp_path):
  lines = []
  runs = read(tmp_path, 2, 0)
  panels = {panel.title: panel for panel in run_plots.panels(runs, lines.append)}
  assert panels["Age of the selected keys"].lines == {"run 0": [(1, 6.0), (2, 7.0), (3, 8.0)]}
  assert panels["Age of the selected keys"].bands["run 0"][0] == (1, 1.0, 11.0)
  assert list(panels["Training loss, smoothed"].lines) == ["run 0", "run 1"]
  assert "not recorded: Held-out loss by position; The scorers' loss" in lines
  assert any(line.startswith("not recorded by run 1: Gate mass") for line in lines)


def test_evaluations_on_other_rows_are_told_apart(tmp_path):
  said = []
  runs = read(tmp_path, 1, 1, evaluations=[evaluation()])
  run_plots.panels(runs, said.append)
  assert not any("different rows" in line for line in said)
  other = write(tmp_path / "other", metrics(1), [evaluation(), evaluation(32)])
  run_plots.panels([*runs, run_plots.read_run(other, "other")], said.append)
  assert any("different rows (run 0: 64 tokens, run 1: 64" in line for line in said)


def test_a_picture_has_one_legend(tmp_path, monkeypatch):
  figures = []
  monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
  runs = read(tmp_path, 2, 1)
  for some in (runs, runs[:1]):
    run_plots.save("x.png", some, run_plots.panels(some, lambda line: None))
  names = []
  for figure in figures:
    (part,) = figure.subfigs
    assert not any(axes.get_legend() for axes in part.axes)
    (legend,) = part.legends
    names.append([text.get_text() for text in legend.get_texts()])
  assert names == [["run 0, step 3", "run 1, step 3"], ["layer 0", "layer 1"]]


@pytest.mark.parametrize("name, begins", [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_the_command_draws_runs_and_kept_tokens(name, begins, tmp_path, monkeypatch, capsys):
  folders = [write(tmp_path / side / "run", metrics(1)) for side in ("left", "right")]
  configs = {folders[0]: CONFIG, folders[1]: TransformerConfig(attention="full")}
  monkeypatch.setattr(plot.run_record, "load_run_config", lambda folder: (configs[folder], {}))
  monkeypatch.setattr(plot.run_record, "load_run_tokenizer", lambda folder: ByteTokenizer())
  params = init_params(CONFIG, jax.random.key(0))
  monkeypatch.setattr(plot.checkpoint, "load_params", lambda *_, **__: (params, 3))
  path = tmp_path / name
  assert run(f"--workdir={','.join(folders)}", f"--output={path}", "--prompt=A name.") == 0
  out, err = capsys.readouterr()
  assert path.read_bytes().startswith(begins) and out == f"{path}\n"
  assert "kept tokens: right/run has no sparsek layer" in err
  (tmp_path / "long.txt").write_text("a" * 2000)
  arguments = (f"--workdir={folders[0]}", f"--prompt_file={tmp_path}/long.txt")
  assert run(*arguments, f"--output={tmp_path}/long.png") == 2
  assert "at most 1,024 can be drawn" in capsys.readouterr().err
  assert not (tmp_path / "long.png").exists()


@pytest.mark.parametrize(
  "arguments, words",
  [
    ("", "--workdir is required"),
    ("--workdir=HERE/none", "--workdir=HERE/none: there is no such folder"),
    ("--workdir=HERE/run,HERE/run", "names a folder twice"),
    ("--workdir=HERE/run" + ",HERE/run" * 8, "names 9 runs: at most 8 can be told apart"),
    ("--workdir=HERE/grid", "it is a grid, give folders in HERE/grid/cells"),
    ("--workdir=HERE/run --labels=a,b", "--labels=a,b: must be 1 different name(s)"),
    (
      "--workdir=HERE/run --output=HERE/a.pdf",
      "--output=HERE/a.pdf: must be a name that ends in .png or .svg",
    ),
    ("--workdir=HERE/run --output=HERE/.svg", "--output=HERE/.svg: must be a name that ends in"),
    ("--workdir=HERE/run --output=HERE/none/a.png", "HERE/none"),
    ("--workdir=HERE/run --prompt=a --prompt_file=HERE/x", "exclude each other"),
    ("--workdir=HERE/run --prompt=", "--prompt is empty"),
  ],
)
def test_bad_command_lines_are_refused(arguments, words, tmp_path, capsys):
  write(tmp_path / "run", metrics(1))
  (tmp_path / "grid" / "cells").mkdir(parents=True)
  output = [] if "--output" in arguments else [f"--output={tmp_path}/a.png"]
  assert run(*arguments.replace("HERE", str(tmp_path)).split(), *output) == 2
  assert words.replace("HERE", str(tmp_path)) in capsys.readouterr().err
  assert not list(tmp_path.glob("*.p*"))


@pytest.mark.parametrize("name", ("$x^$", r"\$", "_a", "a_$b_"))
def test_names_are_drawn_as_they_are(name, tmp_path):
  folders = [write(tmp_path / folder, metrics(1)) for folder in (name, "other")]
  for runs in (folders, folders[:1]):
    assert run(f"--workdir={','.join(runs)}", f"--output={tmp_path}/a.png") == 0
  figure = plots.new_figure()
  (line,) = figure.add_subplot().plot([1], [2], label=plots.literal(name))
  (text,) = figure.legend(handles=[line]).get_texts()
  assert text._preprocess_math(text.get_text()) == ("\u200b" * (name[0] == "_") + name, False)


def test_a_file_that_is_no_picture_stays(tmp_path, capsys):
  folder, path = write(tmp_path / "run", metrics(1)), tmp_path / "a.png"
  path.write_text("notes")
  assert run(f"--workdir={folder}", f"--output={path}") == 2 and path.read_text() == "notes"
  assert "a.png exists and is no picture that Matplotlib drew" in capsys.readouterr().err


def test_matplotlib_is_asked_for_before_any_work(tmp_path, monkeypatch, capsys):
  folder = write(tmp_path / "run", metrics(1))
  monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
  monkeypatch.setattr(run_plots, "read_run", None)
  assert run(f"--workdir={folder}", f"--output={tmp_path}/a.png") == 2
  assert "pip install matplotlib" in capsys.readouterr().err


def test_the_loss_of_a_stage_that_warms_scorers_up_is_no_training_loss():
  records = [
    {"step": 1, "stage": "dense", "loss": 5.0},
    {"step": 2, "stage": "warmup", "loss": 0.3, "scorer_loss": 0.3},
    {"step": 2, "stage": "warmup", "heldout_loss": 4.5},
    {"step": 3, "stage": "joint", "loss": 4.0, "scorer_loss": 0.2},
  ]
  run = run_plots.Run("a", "folder", records, [])
  assert run.points("loss") == [(1, 5.0), (3, 4.0)]
  assert run.points("scorer_loss") == [(2, 0.3), (3, 0.2)] and run.points("heldout_loss") == [
    (2, 4.5)
  ]
