"""The kinds of attention over several rounds of experiments/recipes/rivals.py, and how far SPARSEK's are ahead of others between runs that share their start.

  python -m experiments.recipes.rivals_pairs experiments/results/rivals.json experiments/results/rivals_first.json
"""

import json
import sys

from sparsek import rivals_report

KINDS = [f"sparsek_{budget}{layout}" for budget in (512, 1024) for layout in ("_last", "_local", "")]


def main(records: list[str]) -> None:
  rounds = []
  for path in records:
    with open(path, encoding="utf-8") as file:
      rounds.append(json.load(file)["runs"])
  runs = rivals_report.pool(rounds)
  print(rivals_report.table(runs), rivals_report.by_start(runs), *(rivals_report.differences(runs, name) for name in KINDS if name in runs), sep="\n\n")


if __name__ == "__main__":
  if not sys.argv[1:]:
    sys.exit("records of rivals.py are to be named, such as experiments/results/rivals.json")
  main(sys.argv[1:])
