"""Picture of a grid from its record, as the report of experiments.ablate shows it.

  python -m experiments.reports.grid_picture experiments/results/baselines_grid.json \\
    experiments/results/baselines_grid.png
"""

import argparse
from collections.abc import Mapping

from sparsek.command_line import outputs
from sparsek.experiments import script
from sparsek.experiments.reports import grid, grid_page, results_sections
from sparsek.storage import files


def rows(record: Mapping) -> list[dict]:
  """Returns the cells of a record of collect_grids as `grid.collect` does, without their speed.

  Gate and scorer are not told apart: those of a record are alike.
  """
  made = []
  for cell in record["cells"]:
    match = results_sections.GRID_CELL.fullmatch(cell["cell"])
    assert match, cell["cell"]
    k, window = (None if match[name] is None else int(match[name]) for name in ("k", "window"))
    made.append(
      {
        **dict.fromkeys(grid.COLUMNS),
        "attention": match["kind"],
        "k": k,
        "window": window,
        "seed": int(match["seed"]),
        "budget": None if window is None else window + (k or 0),
        "heldout_loss": results_sections.last_loss(cell),
        "tokens_per_second": 0.0,
      }
    )
  return made


def main(options: argparse.Namespace) -> None:
  """Reads the record and writes its picture."""
  summary = grid.summarize(rows(files.read_json_object(options.record)))
  files.save(options.picture, grid_page.png(grid_page.pictures(summary)))


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the script's arguments."""
  parser = script.parser(__doc__)
  parser.add_argument("record", type=script.path, metavar="RECORD", help="to read, .json")
  parser.add_argument(
    "picture", type=script.Output(outputs.PICTURE), metavar="PICTURE", help="to write, .png"
  )
  return parser


if __name__ == "__main__":
  script.run(main, make_parser())
