"""The recipe that compares what scorers are taught: its plan, its record and its documents."""

import json
import random
import re
import types

import pytest
from absl import flags as absl_flags

from sparsek.command_line.configs import model_config, train_config
from sparsek.command_line.main import parse
from sparsek.command_line.training_flags import define_pretrain_flags
from sparsek.errors import UsageError
from sparsek.experiments import evaluate_tasks
from sparsek.experiments.recipes import rare_letters_task, scorer_teaching, stages

NAMES = list(scorer_teaching.VARIANTS)


def options(**changes):
  given = scorer_teaching.make_parser().parse_args([])
  return types.SimpleNamespace(**{**vars(given), "seeds": 2, **changes})


def test_every_command_parses_and_variants_differ_in_their_flags_alone():
  values = absl_flags.FlagValues()
  define_pretrain_flags(values)
  plan = scorer_teaching.stages(options(tasks="needle,copy", lengths="300", sparsek="--k=9"))
  settings = {}
  for name, (command, *words) in plan.items():
    known = values if command == "pretrain" else evaluate_tasks.FLAGS
    for flag in known:
      known[flag].unparse()
    parse([command, *words], known)
    if command == "pretrain" and not name.startswith("dense"):
      train = train_config(values)
      assert train.init_from.endswith(f"dense_s{train.seed}") and name.endswith(f"_s{train.seed}")
      settings[name] = model_config(values).k, train.data, train.optimizer.num_steps
  assert len(set(settings.values())) == 2  # data has the seed
  assert {k for k, *_ in settings.values()} == {9}
  assert stages.needed(plan, "tasks_max_s1") == {"max_s1"}
  assert stages.needed(plan, "distill_s0") == {"dense_s0"}


def made(folder, name, loss, answers):
  """Writes what a finished run leaves."""
  (folder / name).mkdir(parents=True)
  lines = [{"step": 9, "loss": 4.0, "layer_0/gate_mass": 0.5}, {"step": 9, "heldout_loss": loss}]
  (folder / name / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  (folder / name / scorer_teaching.ANSWERS).write_text(json.dumps(answers))
  done = folder / "minutes.json"
  minutes = json.loads(done.read_text()) if done.exists() else {}
  done.write_text(json.dumps({**minutes, name: 1.0}))


def test_a_record_holds_what_is_finished_and_keeps_what_another_folder_made(tmp_path, capsys):
  record = tmp_path / "record.json"
  collect = lambda folder: scorer_teaching.main(
    options(workdir=str(tmp_path / folder), record=str(record), collect=True)
  )
  for folder, seed in (("a", 0), ("b", 1)):
    for name, loss, once in ((NAMES[0], 1.0, 0.5), ("max", 0.9, (0.7, 0.8)[seed])):
      made(tmp_path / folder, f"{name}_s{seed}", loss, {"once": once})
    collect(folder)
  runs = json.loads(record.read_text())["runs"]
  assert list(runs) == [NAMES[0], "max"] and list(runs["max"]["seeds"]) == ["0", "1"]
  assert runs["max"]["seeds"]["1"]["answers"] == {"once": 0.8}
  printed = capsys.readouterr().out
  assert "| max | 0.900 (0.900 to 0.900) | 0.750 (0.115 to 1.385) |" in printed
  assert "+0.250 (-0.385 to +0.885), p 0.126 |" in printed
  changed = record.read_text().replace("--scorer_target=max", "--scorer_target=mean")
  record.write_text(changed)
  with pytest.raises(UsageError, match="max had other flags"):
    collect("b")
  assert record.read_text() == changed


@pytest.mark.parametrize("alike", (False, True))
def test_documents_of_letters_answer_their_questions(alike):
  rng = random.Random(0)
  for _ in range(50):
    text, answers = rare_letters_task.document(rng, 255, alike)
    assert 190 < len(text) <= 255 and max(answers) < len(text)
    for position, once in answers.items():
      mark, capital = text[position - 1], text[position]
      facts = re.findall("(?<![?!])[A-H]" if mark == "?" else "(?<![?!])[I-P]", text)
      assert facts == [capital] and once == (mark == "!") and text.index(capital) < position - 20
    assert alike or sum(answers.values()) <= 1 < len(answers)
