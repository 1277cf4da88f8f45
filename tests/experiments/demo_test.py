import json
import sys
import types

import jax
import numpy as np
import pytest

from sparsek.config import TransformerConfig
from sparsek.data.token_files import open_token_files, write_token_files
from sparsek.experiments import demo, demo_commands, demo_documents, demo_text
from sparsek.experiments.reports import demo_picture
from sparsek.model.transformer import init_params
from tests.helpers import run_command

TOKENIZER = demo_documents.tokenizer()
CONFIG = TransformerConfig(
  vocab_size=TOKENIZER.vocab_size,
  num_layers=2,
  embed_dim=8,
  num_heads=1,
  num_kv_heads=1,
  head_dim=8,
  mlp_dim=8,
  k=2,
  window=2,
)


def test_training_documents_fill_their_rows_and_mark_only_answers(tmp_path):
  documents = list(demo_documents.training_documents(127, 25))
  for document in documents:
    words = document.text.split(" ")
    assert len(words) == 127
    answers = {document.text[begin:end] for begin, end in document.answers}
    assert len(answers) == 1 and answers <= set(demo_documents.ANIMALS)
    assert words.count(answers.pop()) == len(document.answers) + 1  # and in the fact
  write_token_files(str(tmp_path / "data"), documents, TOKENIZER)
  split = open_token_files(str(tmp_path / "data")).split("train")
  assert {int(length) for length in split.lengths} == {128}  # with the end of the document
  assert split.num_documents == 23  # two are held out
  counted = sum(len(d.answers) for d in documents if not d.held_out)
  assert split.num_counted == counted


@pytest.mark.parametrize("distance", (8, 12, 31))
def test_questions_are_as_far_from_their_facts_as_asked(distance):
  lengths = set()
  for seed in range(20):
    words = demo_documents.question(np.random.default_rng(seed), 60, distance)
    fact, answer = (i for i, word in enumerate(words) if word in demo_documents.ANIMALS)
    assert answer == len(words) - 1 and words[fact] == words[answer]
    assert words[fact - 4 : fact] == demo_documents.FACT.split()
    assert answer - 1 - fact == distance
    lengths.add(len(words))
  assert len(lengths) > 5 and max(lengths) <= 60  # models cannot count positions


def test_a_word_is_a_token():
  words = demo_documents.question(np.random.default_rng(0), 60, 20)
  ids = TOKENIZER.encode(" ".join(words))
  assert [TOKENIZER.decode([i]) for i in ids] == words


def test_accuracies_count_the_answers_that_the_model_gives(monkeypatch):
  monkeypatch.setattr(demo, "DISTANCES", (8, 12))

  def predicted(config, mesh, params, tokens, positions):
    right = np.take_along_axis(np.asarray(tokens), np.asarray(positions), axis=1)
    return np.where(np.arange(len(right))[:, None] % 2, right, -1)

  monkeypatch.setattr(demo.tasks, "predicted", predicted)
  assert demo.accuracies(CONFIG, {}, TOKENIZER) == [0.5, 0.5]


def test_the_cache_of_full_attention_grows_and_sparseks_does_not(monkeypatch):
  monkeypatch.setattr(demo, "LENGTHS", (64, 256))
  monkeypatch.setattr(demo, "ROUNDS", 1)
  params = init_params(CONFIG, jax.random.key(0))
  ours, full = (
    demo.costs(demo.decoding.under(kind, CONFIG), params) for kind in ("sparsek", "full")
  )
  assert ours[0]["bytes"] == ours[1]["bytes"] and full[0]["bytes"] < full[1]["bytes"]
  assert all(row["seconds"] > 0 for row in (*ours, *full))


def test_the_picture_is_drawn_and_a_kept_pass_key_is_dark(tmp_path):
  answers = {kind: {8: [1.0, 1.0], 64: [0.5, 0.25]} for kind in demo.KINDS}
  rows = [{"tokens": 1024 * 4**i, "bytes": 4.0**i, "seconds": 2.0**-i} for i in range(2)]
  figure = demo_picture.plots.new_figure()
  axes = figure.add_subplot()
  demo_picture.draw_words(axes, ["a", "fox", "is", "here"], np.array([0, 2, 1, -1]))
  colours = [patch.get_facecolor()[:3] for patch in axes.patches]
  assert colours[0] == pytest.approx(demo_picture.plots.DARKEST_KEPT)
  assert colours[1] == pytest.approx(demo_picture.plots.LIGHTEST_KEPT)
  assert len(colours) == 3
  path = tmp_path / "demo.png"
  demo_picture.save(
    str(path),
    demo_picture.Answers(answers, 8, 0.03, 16),
    (["a", "fox"], np.array([0, 2])),
    {"sparsek": rows, "full": rows},
  )
  assert path.read_bytes().startswith(b"\x89PNG")


def test_a_run_is_stopped_at_its_first_checkpoint_and_resumed(monkeypatch, capsys):
  saved, calls = [], []

  def run(name, *arguments, stop_when=None):
    calls.append((name, arguments, stop_when is not None))
    if stop_when is not None:
      assert not stop_when()
      saved.append(70)
      assert stop_when()
      saved.append(73)

  monkeypatch.setattr(demo_commands, "run", run)
  monkeypatch.setattr(demo_commands.checkpoint, "saved_steps", lambda workdir: saved)
  demo_commands.pretrain_in_two("demo/x", "--num_steps=140")
  arguments = ("--workdir=demo/x", "--num_steps=140")
  assert calls == [("pretrain", arguments, True), ("pretrain", arguments, False)]
  assert "after its checkpoint of step 70; it ended with one of step 73" in capsys.readouterr().out
  demo_commands.pretrain_in_two("demo/x", "--num_steps=140")  # was stopped before: only resumes
  assert calls[2:] == [("pretrain", arguments, False)]


def test_complete_runs_are_not_trained_again(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(demo, "DATA", str(tmp_path))  # is there already
  trained = []
  done = demo.workdir("full", 1)
  steps = {done: [70, demo.NUM_STEPS]}
  monkeypatch.setattr(demo.checkpoint, "saved_steps", lambda folder: steps.get(folder, []))

  def run(name, *words, **_):
    trained.append(words[0])
    steps.setdefault(words[0].removeprefix("--workdir="), [70])

  monkeypatch.setattr(demo_commands, "run", run)
  demo.train()
  folders = [demo.workdir(kind, seed) for kind in demo.KINDS for seed in demo.SEEDS]
  assert set(trained) == {f"--workdir={folder}" for folder in folders} - {f"--workdir={done}"}
  assert trained[:2] == [f"--workdir={folders[0]}"] * 2  # stopped and resumed
  assert f"{done} is complete" in capsys.readouterr().out


@pytest.mark.slow
def test_a_command_that_fails_ends_the_demo(tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(demo_commands, "CACHE", str(tmp_path))
  with pytest.raises(demo_commands.RunError, match="pretrain ended with exit code 2"):
    demo_commands.run("pretrain", "--no_such_flag")
  out, err = capfd.readouterr()
  assert out.startswith("$ ") and "no_such_flag" in err


def test_the_text_demo_says_who_is_ahead(tmp_path, monkeypatch):
  for name, loss in (("SPARSEK", 1.993), ("SLIDING_WINDOW", 1.908)):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "evaluation.jsonl").write_text(json.dumps({"step": 240, "loss": loss}) + "\n")
    monkeypatch.setattr(demo_text, name, str(folder))
  assert demo_text.ahead().startswith("On this text the sliding window is ahead by 0.085 nats")


@pytest.fixture
def shortened(monkeypatch, tmp_path):
  """Replaces what takes long in the demos, which run in a folder of their own."""
  monkeypatch.chdir(tmp_path)
  row = {"tokens": 1024, "bytes": 1.0, "seconds": 0.5}
  answers = {kind: dict.fromkeys(demo.DISTANCES, [1.0, 0.5]) for kind in demo.KINDS}
  monkeypatch.setattr(demo, "LENGTHS", (1024,))
  monkeypatch.setattr(demo, "train", lambda: None)
  monkeypatch.setattr(demo, "evaluate", lambda tokenizer: answers)
  monkeypatch.setattr(demo, "kept_words", lambda tokenizer: (["a", "fox"], np.array([0, 2])))
  monkeypatch.setattr(demo, "load", lambda kind, seed: (CONFIG, {}))
  monkeypatch.setattr(demo, "costs", lambda config, params: [row])
  monkeypatch.setattr(demo_commands, "run", lambda *_, **options: None)
  monkeypatch.setattr(demo_commands, "pretrain_in_two", lambda *_: None)
  documents = types.SimpleNamespace(num_documents=1, num_tokens=2)
  corpus = types.SimpleNamespace(split=lambda name: documents)
  monkeypatch.setattr(demo_text, "open_data", lambda name: corpus)
  monkeypatch.setattr(demo_text, "ahead", lambda: "The window is ahead.")
  return tmp_path / demo.FOLDER


@pytest.mark.parametrize("module", (demo, demo_text))
def test_without_matplotlib_all_but_the_picture_is_made(module, shortened, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  assert run_command(module.main, module.FLAGS) == 0
  told = capsys.readouterr()
  assert told.err == (
    "pictures need matplotlib: pip install matplotlib; the demo goes on, and prints its tables\n"
  )
  assert ".png" not in told.out and " 0 s." in told.out
  if module is demo:
    assert "| random keys |" in told.out and "| full attention: cache, MB | " in told.out
    assert json.loads((shortened / "demo.json").read_text())["examples"] == demo.EXAMPLES


def test_the_demo_replaces_its_own_files_only(shortened, capsys):
  assert run_command(demo.main, demo.FLAGS) == 0 == run_command(demo.main, demo.FLAGS)
  assert "demo/demo.png, demo/demo.json: done in" in capsys.readouterr().out
  for name, kind in (("demo.png", "picture that Matplotlib drew"), ("demo.json", "record of the")):
    (shortened / name).write_text('{"mine": 1}')
    assert run_command(demo.main, demo.FLAGS) == 2
    assert f"demo/{name} exists and is no {kind}" in capsys.readouterr().err
    (shortened / name).unlink()


@pytest.mark.parametrize("module", (demo, demo_text))
def test_the_demos_take_no_flags(module, capsys):
  assert run_command(module.main, module.FLAGS, "--k=3") == 2
  assert "unknown flag --k" in capsys.readouterr().err
