"""How far one kind of attention is ahead of another, over several rounds of experiments/recipes/rivals.py, between runs that share their start.

  python -m experiments.recipes.rivals_pairs experiments/results/rivals.json experiments/results/rivals_first.json
"""

import argparse
import json

from sparsek import rivals_report


def main(records: list[str], kinds: str) -> None:
  rounds = []
  for path in records:
    with open(path, encoding="utf-8") as file:
      rounds.append(json.load(file)["runs"])
  runs = rivals_report.pool(rounds)
  print("\n\n".join(rivals_report.differences(runs, name) for name in kinds.split(",") if name in runs))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("records", nargs="+", help="records of rivals.py")
  parser.add_argument("--kinds", default="sparsek_512_last,sparsek_512,sparsek_1024_last,sparsek_1024", help="whose losses to compare; default: %(default)s")
  options = parser.parse_args()
  main(options.records, options.kinds)
