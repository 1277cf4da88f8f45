"""The kinds of attention over several rounds of experiments/recipes/rivals.py, and how far SPARSEK's are ahead of others between runs that share their start.

  python -m experiments.recipes.rivals_pairs experiments/results/rivals.json experiments/results/rivals_first.json
"""

import argparse

from experiments import script
from sparsek import files, rivals_report

KINDS = [f"sparsek_{budget}{layout}" for budget in (512, 1024) for layout in ("_last", "_local", "")]


def main(records: list[str]) -> None:
  runs = rivals_report.pool([files.read_json_object(path)["runs"] for path in records])
  print(rivals_report.table(runs), rivals_report.by_start(runs), *(rivals_report.differences(runs, name) for name in KINDS if name in runs), sep="\n\n")


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the script's arguments."""
  parser = script.parser(__doc__)
  parser.add_argument("records", nargs="+", type=script.path,
                      help="of rivals.py, such as experiments/results/rivals.json")
  return parser


if __name__ == "__main__":
  script.run(lambda options: main(options.records), make_parser())
