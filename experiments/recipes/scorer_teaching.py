r"""Comparison of what scorers are taught, by the answers that a model finds far back.

Protocol, set before any of it was run. For each seed a dense model learns the documents; each
variant goes on from it with SPARSEK attention and the same tokens in the same order. A variant is
one change of the defaults: no loss of the scorers; targets of maximum attention, alone, times the
norm of the value, with a ranking loss, with a pinball loss; soft gates, and soft ones that become
hard; a teacher, which is the dense model. Measured are right answers and held-out loss of each
seed, with 95 % t intervals over seeds, and each variant minus the default, paired by seed, with p
values corrected (Holm) for all variants and measures. A variant replaces the default if it finds
more answers (p < .05) and its loss is not above the default's (p < .05). It loses, and is taken
out, if it finds fewer answers or has a higher loss (p < .05), and is better in nothing.

On a CPU, with documents that take minutes to learn, of which two letters are worth keeping:

  python -m experiments.recipes.rare_letters_task --alike 255 30000 letters.jsonl
  python -m experiments.prepare_data --sources=letters.jsonl --output=data/letters_alike
  python -m experiments.recipes.rare_letters_task 255 30000 rare.jsonl
  python -m experiments.prepare_data --sources=rare.jsonl --output=data/rare_letters
  python -m experiments.recipes.scorer_teaching --record=experiments/results/scorer_teaching.json

On a GPU, with the models, data and tasks of experiments/recipes/baselines.py:

  python -m experiments.recipes.scorer_teaching --start=baselines_dense --tune=baselines_tune \
    --short=data/baselines_short --long=data/baselines_long --tasks=passkey,needle,recall,copy \
    --lengths=4096 --sparsek="--k=256 --window=256" --workdir=runs/teaching_gpu --record=FILE

Finished stages are skipped: if the command is killed, the same command goes on. --at_once runs
stages side by side, --devices spreads them over GPUs, --only=REGEX begins only some of them. The
record holds what is finished, and keeps the seeds that it had: on machines that are lent for half
an hour, --only=_s0, _s1, ... make one record in as many folders.
"""

import argparse
import json
import os
import random
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sparsek.command_line import outputs
from sparsek.errors import UsageError
from sparsek.evaluation.statistics import holm, p_words, paired_t
from sparsek.evaluation.tasks import predicted
from sparsek.experiments import script
from sparsek.experiments.recipes.rare_letters_task import document
from sparsek.experiments.recipes.stages import MINUTES, run_stages
from sparsek.experiments.reports import records
from sparsek.experiments.reports.baselines_report import with_interval
from sparsek.parallel.mesh import make_mesh
from sparsek.runs import checkpoint, run_directory, run_record
from sparsek.runs.metrics import read_metrics
from sparsek.storage import files

RECORD = outputs.record("record of scorer_teaching", "runs", "stages")
DEFAULT = "default"
VARIANTS: dict[str, tuple[str, ...]] = {
  DEFAULT: (),
  "no_loss": ("--scorer_loss=0", "--scorer_init_scale=4"),
  "max": ("--scorer_target=max",),
  "max_value": ("--scorer_target=max", "--scorer_target_value_norm"),
  "ranking": ("--scorer_target=max", "--scorer_loss_kind=ranking"),
  "pinball": ("--scorer_target=max", "--scorer_loss_kind=pinball"),
  "soft": ("--gate=value",),
  "anneal": ("--gate_anneal=30",),
  "distill": ("--distill=0.5",),
}
ASKED, LETTERS = 200, 255  # documents of letters to ask about, and their length
ANSWERS = "answers.json"  # in the folder of a run: what it found in them
Figures = Mapping[str, Mapping[str, Mapping[str, float]]]  # variant -> measure -> seed -> figure


def stages(options: argparse.Namespace) -> dict[str, tuple[str, ...]]:
  """Returns {name of a run or an evaluation: words of its command}, in order."""
  run = lambda name: os.path.join(options.workdir, name)
  more, plan = shlex.split(options.more), {}
  for seed in range(options.seeds):
    plan[f"dense_s{seed}"] = (
      "pretrain",
      f"--flagfile=experiments/recipes/{options.start}.flags",
      f"--data={options.short}",
      "--attention=full",
      f"--seed={seed}",
      *more,
      f"--workdir={run(f'dense_s{seed}')}",
    )
  for name, flags in VARIANTS.items():
    for seed in range(options.seeds):
      dense = run(f"dense_s{seed}")
      plan[f"{name}_s{seed}"] = (
        "pretrain",
        f"--flagfile=experiments/recipes/{options.tune}.flags",
        f"--data={options.long}",
        f"--init_from={dense}",
        "--attention=sparsek",
        *shlex.split(options.sparsek),
        *flags,
        *([f"--distill_from={dense}"] * (name == "distill")),
        f"--seed={seed}",
        *more,
        f"--workdir={run(f'{name}_s{seed}')}",
      )
      if options.tasks:
        plan[f"tasks_{name}_s{seed}"] = (
          "evaluate_tasks",
          f"--workdir={run(f'{name}_s{seed}')}",
          f"--tasks={options.tasks}",
          f"--lengths={options.lengths}",
          f"--examples={options.examples}",
          f"--min_distance={options.min_distance}",
          "--batch_size=8",
        )
  return plan


def answers(folder: str) -> dict[str, float]:
  """Returns the shares of right answers of a run, in documents of letters or in tasks."""
  if asked := read_metrics(os.path.join(folder, "tasks.jsonl")):
    rows = asked[-1]["results"]
    return {f"{row['task']} {row['length']}": row["right"] / row["total"] for row in rows}
  path = os.path.join(folder, ANSWERS)
  if not os.path.exists(path):
    files.save(path, json.dumps(_letters(folder)))
  return files.read_json_object(path)


def _letters(folder: str) -> dict[str, float]:
  """Asks a run for the letters of documents that no run was trained on."""
  config, _ = run_record.load_run_config(folder)
  tokenizer, mesh = run_record.load_run_tokenizer(folder), make_mesh(devices=jax.devices()[:1])
  params, _ = checkpoint.load_params(folder, config, mesh=mesh)
  rng = random.Random(1)
  made = [document(rng, LETTERS) for _ in range(ASKED)]
  tokens = np.zeros((ASKED, LETTERS), np.int32)
  positions = np.ones((ASKED, max(len(where) for _, where in made)), np.int32)
  for row, (text, where) in enumerate(made):
    tokens[row, : len(text)] = tokenizer.encode(text)
    positions[row, : len(where)] = list(where)
  found = np.asarray(predicted(config, mesh, params, tokens, positions))
  right: dict[bool, list[bool]] = {False: [], True: []}
  for row, (_, where) in enumerate(made):
    for at, (position, once) in enumerate(where.items()):
      right[once].append(bool(found[row, at] == tokens[row, position]))
  return {"often": float(np.mean(right[False])), "once": float(np.mean(right[True]))}


def describe(folder: str) -> dict[str, Any]:
  """Returns what a run found, its held-out loss, and statistics of its selection at the end."""
  lines = read_metrics(os.path.join(folder, "metrics.jsonl"))
  return {
    "loss": [line["heldout_loss"] for line in lines if "heldout_loss" in line][-1],
    "answers": answers(folder),
    "selection": {
      key: value
      for key, value in [line for line in lines if "loss" in line][-1].items()
      if key.startswith("layer_")
    },
  }


def figures(runs: Mapping[str, Mapping]) -> Figures:
  """Returns the figures of a record's runs, by variant, measure and seed."""
  return {
    name: {
      measure: {
        seed: run["loss"] if measure == "loss" else run["answers"][measure]
        for seed, run in of_seeds["seeds"].items()
      }
      for measure in ("loss", *next(iter(of_seeds["seeds"].values()))["answers"])
    }
    for name, of_seeds in runs.items()
  }


def comparisons(of: Figures) -> dict[tuple[str, str], tuple[float, float, float, float]]:
  """Returns {(variant, measure): (difference from the default, its interval, corrected p)}."""
  pairs = {}
  for name, measures in of.items():
    for measure, by_seed in measures.items() if name != DEFAULT else ():
      base = of.get(DEFAULT, {}).get(measure, {})
      if len(seeds := sorted(set(base) & set(by_seed))) > 1:
        first, second = ([x[seed] for seed in seeds] for x in (by_seed, base))
        pairs[name, measure] = paired_t(first, second)
  corrected = holm([pair.p_value for pair in pairs.values()])
  return {key: (*pair[:3], p) for (key, pair), p in zip(pairs.items(), corrected)}


def table(runs: Mapping[str, Mapping]) -> str:
  """Returns a table in Markdown: each figure, and in a second row minus the default's."""
  of = figures(runs)
  measures: Sequence[str] = list(dict.fromkeys(key for by in of.values() for key in by))
  compared = comparisons(of)
  lines = ["| taught | " + " | ".join(measures) + " |", "|" + "---|" * (1 + len(measures))]
  for name, by_measure in of.items():
    cells = [with_interval([*by_measure[key].values()], ".3f") for key in measures]
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if any((name, key) in compared for key in measures):
      words = []
      for key in measures:
        difference, low, high, p_value = compared[name, key]
        words.append(f"{difference:+.3f} ({low:+.3f} to {high:+.3f}), {p_words(p_value)}")
      lines.append("| minus the default | " + " | ".join(words) + " |")
  return "\n".join(lines)


def main(options: argparse.Namespace) -> None:
  """Runs the stages, then prints their table and writes the record."""
  plan = stages(options)
  earlier(options.record)
  if not options.collect:
    run_stages(
      plan, options.workdir, options.devices, options.at_once, options.only, options.retrain
    )
  folder = lambda name: os.path.join(options.workdir, name)
  minutes = files.read_json_object(folder(MINUTES))
  record = earlier(options.record)
  last = "tasks_{}" if options.tasks else "{}"
  for name, flags in VARIANTS.items():
    seeds = record["runs"].get(name, {}).get("seeds", {})
    for seed in range(options.seeds):
      if last.format(f"{name}_s{seed}") in minutes:
        seeds[str(seed)] = describe(folder(f"{name}_s{seed}"))
    if seeds:
      record["runs"][name] = {"flags": flags, "seeds": seeds}
  for name, (command, *words) in plan.items():
    if name in minutes:
      record["stages"][name] = {
        "minutes": round(minutes[name], 2),
        "command": shlex.join(["python", "-m", f"experiments.{command}", *words]),
      }
  record["versions"] = run_directory.versions()
  files.save(options.record, records.dumps(record, 4) + "\n")
  print(table(record["runs"]))


def earlier(path: str) -> dict[str, Any]:
  """Returns the record so far, which is empty at first."""
  if not os.path.exists(path):
    return {"runs": {}, "stages": {}}
  record = files.read_json_object(path)
  flags = {name: tuple(run["flags"]) for name, run in record["runs"].items()}
  if changed := [name for name in flags if flags[name] != VARIANTS.get(name)]:
    raise UsageError(f"--record={path}: {', '.join(changed)} had other flags; name another file")
  return record


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the recipe's options."""
  parser = script.parser(__doc__)
  for option, default, text in (
    ("short", "data/letters_alike", "token files of the dense model"),
    ("long", "data/rare_letters", "token files of the variants"),
    ("workdir", "runs/scorer_teaching", "folder for all runs"),
  ):
    parser.add_argument(
      f"--{option}", default=default, type=script.path, help=f"{text}; default: {default!r}"
    )
  for option, default, text in (
    ("sparsek", "", "further flags of the variants, such as --k and --window"),
    ("more", "", "further flags of all training, as for a rehearsal"),
  ):
    parser.add_argument(
      f"--{option}", default=default, type=script.words, help=f"{text}; default: {default!r}"
    )
  for option, default, text in (
    ("start", "scorer_teaching_dense", "recipe of the dense model"),
    ("tune", "scorer_teaching_tune", "recipe of the variants"),
    ("tasks", "", "tasks of experiments.evaluate_tasks to ask; default: letters"),
    ("lengths", "4096", "tokens of the tasks"),
    ("devices", "", "GPUs to spread stages over, such as 0,1; default: JAX's"),
    ("only", "", "a regular expression: begin only stages whose names it matches"),
  ):
    parser.add_argument(f"--{option}", default=default, help=f"{text}; default: {default!r}")
  for option, number, text in (
    ("examples", 100, "of each task and length"),
    ("min_distance", 1024, "tokens at least between facts and questions"),
    ("seeds", 5, "runs of each variant"),
    ("at_once", 1, "stages that run side by side; above 1 they write WORKDIR/NAME.log"),
  ):
    parser.add_argument(f"--{option}", default=number, type=int, help=f"{text}; default: {number}")
  parser.add_argument(
    "--record",
    default="scorer_teaching.json",
    type=script.Output(RECORD),
    help="file for the record",
  )
  parser.add_argument(
    "--collect",
    action="store_true",
    help="train nothing: only write the record of what is finished",
  )
  parser.add_argument(
    "--retrain",
    action="store_true",
    help="move what other flags made to WORKDIR/replaced, and do it again",
  )
  return parser


if __name__ == "__main__":
  script.run(main, make_parser())
