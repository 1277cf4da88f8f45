r"""Tables of several rounds of experiments/recipes/baselines.py together.

They compare the kinds of attention, also SPARSEK with each other kind in runs that share their
start:

  python -m experiments.recipes.baselines_pairs experiments/results/baselines.json \
    experiments/results/baselines_first.json
"""

import argparse

from sparsek.experiments import script
from sparsek.experiments.reports import baselines_report
from sparsek.storage import files

KINDS = [
  f"sparsek_{budget}{layout}" for budget in (512, 1024) for layout in ("_last", "_local", "")
]


def main(records: list[str]) -> None:
  """Prints the tables of some records of baselines.py, joined."""
  runs = baselines_report.pool([files.read_json_object(path)["runs"] for path in records])
  print(
    baselines_report.table(runs),
    baselines_report.by_start(runs),
    "\n".join(baselines_report.differences(runs, [name for name in KINDS if name in runs])),
    sep="\n\n",
  )


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the script's arguments."""
  parser = script.parser(__doc__)
  parser.add_argument(
    "records",
    nargs="+",
    type=script.path,
    help="of baselines.py, such as experiments/results/baselines.json",
  )
  return parser


if __name__ == "__main__":
  script.run(lambda options: main(options.records), make_parser())
