"""The kinds of attention over several rounds of experiments/recipes/rivals.py, and how far SPARSEK's are ahead of others between runs that share their start.

  python -m experiments.recipes.rivals_pairs experiments/results/rivals.json experiments/results/rivals_first.json
"""

import json
import sys

from sparsek import rivals_report

KINDS = ("sparsek_512_last", "sparsek_512", "sparsek_1024_last", "sparsek_1024")


def main(records: list[str]) -> None:
  rounds = []
  for path in records:
    with open(path, encoding="utf-8") as file:
      rounds.append(json.load(file)["runs"])
  runs = rivals_report.pool(rounds)
  print(rivals_report.table(runs), rivals_report.by_start(runs), *(rivals_report.differences(runs, name) for name in KINDS), sep="\n\n")


if __name__ == "__main__":
  if not sys.argv[1:]:
    sys.exit("records of rivals.py are to be named, such as experiments/results/rivals.json")
  main(sys.argv[1:])
