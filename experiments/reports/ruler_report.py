"""Scores of RULER by several programs side by side, from the records of recipes.ruler_tools.

python -m experiments.reports.ruler_report A.json A_lm_eval.json A_transformers.json
"""

import argparse
import os
import textwrap
from collections.abc import Mapping

from sparsek.errors import UsageError
from sparsek.evaluation.ruler import Score
from sparsek.experiments import script
from sparsek.experiments.reports.results_tables import markdown
from sparsek.storage import files

Key = tuple[str, int, int]  # task, length and index of a prompt
OWN = "evaluate-ruler"


def run_named(record: Mapping, name: str) -> Mapping:
  """Returns the run of a record whose folder has this name."""
  for label, run in record["runs"].items():
    if os.path.basename(label) == name:
      return run
  raise UsageError(f"the record has no run {name}: it has {', '.join(record['runs'])}")


def scores_of(run: Mapping) -> dict[Key, float]:
  """Returns {prompt: score in percent} of a run."""
  return {(row["task"], row["length"], row["index"]): row["score"] for row in run["answers"]}


def lines(*made: Mapping) -> list[str]:
  """Returns a table for each run, and how many prompts the programs score otherwise.

  Args:
    made: the records, evaluate-ruler's first.
  """
  own, *others = made
  page: list[str] = []
  for label, run in own["runs"].items():
    name = os.path.basename(label)
    columns = {OWN: scores_of(run)} | {
      record["program"]: scores_of(record["runs"][name])
      for record in others
      if name in record["runs"]
    }
    page += ["", f"{name}:", "", *_table(columns), "", *_apart(columns)]
  return page[1:]


def at_length(record: Mapping) -> list[str]:
  """Returns the scores of runs at one length, and what took how many seconds."""
  names = [os.path.basename(label) for label in record["runs"]]
  rows = [
    [task, *(str(Score(**_fields(run, task))) for run in record["runs"].values())]
    for task in dict.fromkeys(
      row["task"] for run in record["runs"].values() for row in run["results"]
    )
  ]
  means = [
    f"{sum(row['score'] for row in run['results']) / len(run['results']):.1f}"
    for run in record["runs"].values()
  ]
  page = [*markdown(["task", *names], [*rows, ["mean", *means]]), ""]
  for name, run in zip(names, record["runs"].values()):
    seconds = run["seconds"]
    page += _wrapped(
      f"- {name}: {seconds['process']:.0f} s in all, start and compilation included; "
      f"{seconds['loading']:.0f} s of loading, {seconds['answering']:.0f} s of answers, "
      f"{seconds['waiting']:.0f} s of waiting for prompts."
    )
  alone = record["prompts_seconds"]
  page += _wrapped(f"- A process that only makes and writes the prompts takes {alone:.0f} s.")
  return page


def _wrapped(item: str) -> list[str]:
  """Returns the lines of an item of a list."""
  return textwrap.wrap(item, 100, subsequent_indent="  ", break_on_hyphens=False)


def _fields(run: Mapping, task: str) -> dict:
  """Returns the fields of a run's score of a task."""
  (row,) = (row for row in run["results"] if row["task"] == task)
  return {name: value for name, value in row.items() if name not in ("task", "length")}


def _table(columns: Mapping[str, Mapping[Key, float]]) -> list[str]:
  """Returns the mean score of each task and length by each program."""
  keys = list(columns[OWN])
  lengths = sorted({length for _, length, _ in keys})
  head = ["task", *(f"{program}, {length}" for length in lengths for program in columns)]
  rows = [
    [task, *(_mean(scores, task, length) for length in lengths for scores in columns.values())]
    for task in dict.fromkeys(task for task, _, _ in keys)
  ]
  means = [sum(column) / len(column) for column in zip(*(row[1:] for row in rows))]
  cells = [[row[0], *(f"{value:.1f}" for value in row[1:])] for row in [*rows, ["mean", *means]]]
  return markdown(head, cells)


def _mean(scores: Mapping[Key, float], task: str, length: int) -> float:
  values = [score for key, score in scores.items() if key[:2] == (task, length)]
  return sum(values) / len(values)


def _apart(columns: Mapping[str, Mapping[Key, float]]) -> list[str]:
  """Returns a line for each other program: how its scores differ from evaluate-ruler's."""
  own, page = columns[OWN], list[str]()
  for program, scores in columns.items():
    if program != OWN:
      page += _wrapped(
        f"- {program}: {sum(scores[key] != own[key] for key in own)} of {len(own)} prompts have "
        f"another score than by {OWN}, the mean over all differs by "
        f"{_average(scores) - _average(own):+.2f}."
      )
  return page


def _average(scores: Mapping[Key, float]) -> float:
  return sum(scores.values()) / len(scores)


def main(options: argparse.Namespace) -> None:
  """Prints the tables."""
  print("\n".join(lines(*map(files.read_json_object, options.records))))


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the script's options."""
  parser = script.parser(__doc__)
  parser.add_argument("records", nargs="+", type=script.path, help="evaluate-ruler's first")
  return parser


if __name__ == "__main__":
  script.run(main, make_parser())
