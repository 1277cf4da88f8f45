"""Reach of a new scorer: how far back the tokens stand that it selects.

`python -m experiments.recipes.scorer_reach [FILE]` prints a table, and writes it to FILE (.json).

Scores are those of an untrained scoring network: normal with the standard deviation
`scorer_init_scale`, plus `scorer_init_slope` per 1024 tokens. The query is the last token.
"fractional" is the share of the selected tokens whose scores get a gradient of their own.
"""

import argparse
import itertools

import jax.numpy as jnp
import numpy as np

from sparsek.attention.operator import sparsek
from sparsek.command_line import outputs
from sparsek.experiments import script
from sparsek.experiments.reports import records
from sparsek.runs import run_directory
from sparsek.storage import files

RECORD = outputs.record("record of scorer_reach", "rows", "versions", no_others=True)

LENGTHS, K, SCALES, SLOPES = (4096, 32768, 131072), 512, (4.0, 1.0), (1.0, 0.0)


def reach(n: int, scale: float, slope: float, rng: np.random.Generator) -> dict[str, float]:
  """Returns statistics of the tokens that a scorer selects out of n."""
  scores = (scale * rng.normal(size=n) + slope * np.arange(n) / 1024).astype(np.float32)
  selected = np.argsort(-scores)[:K]
  gates, age = np.asarray(sparsek(jnp.asarray(scores), K)), n - 1 - selected
  return {
    "n": n,
    "k": K,
    "scale": scale,
    "slope": slope,
    "mean_age": round(float(age.mean())),
    "oldest": int(np.max(age)),
    "fractional": round(float((gates[selected] < 1).mean()), 3),
    "gate_mass": round(float(gates[selected].sum() / K), 3),
  }


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the script's argument."""
  parser = script.parser(__doc__)
  parser.add_argument(
    "path", nargs="?", type=script.Output(RECORD), metavar="FILE", help="to write, .json"
  )
  return parser


def main(options: argparse.Namespace) -> None:
  """Prints the table, and writes it."""
  rng = np.random.default_rng(0)
  rows = [
    reach(n, scale, slope, rng) for n, scale, slope in itertools.product(LENGTHS, SCALES, SLOPES)
  ]
  print("\t".join(rows[0]))
  for row in rows:
    print("\t".join(map(str, row.values())))
  if options.path:
    record = {"rows": rows, "versions": run_directory.versions()}
    files.save(options.path, records.dumps(record) + "\n")


if __name__ == "__main__":
  script.run(main, make_parser())
