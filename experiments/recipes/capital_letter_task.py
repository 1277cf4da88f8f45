"""Documents with one letter worth keeping, as texts for experiments.prepare_data.

  python -m experiments.recipes.capital_letter_task LENGTH COUNT FILE

A document repeats the letters a to h. Somewhere a capital stands among them, and after each later h
a question mark and that capital again, further back than a short window reaches. A scorer can tell
capitals from other letters, and only they are worth keeping: this is the smallest test of a scorer
that has to learn. Lengths vary from LENGTH / 2 to LENGTH, otherwise a model could count positions.
FILE is .jsonl.
"""

import argparse
import json
import random
import re
import string

from sparsek.command_line import outputs
from sparsek.errors import UsageError
from sparsek.experiments import script
from sparsek.storage import files

CYCLE = "abcdefgh"
_BEGINNING = re.compile(rb'\{"text": "[a-hA-Z?]+("\}\n.*)?', re.DOTALL)
DOCUMENTS = outputs.Kind(
  "file of capital_letter_task", lambda path: bool(_BEGINNING.fullmatch(outputs.head(path)))
)


def document(rng: random.Random, length: int) -> str:
  """Returns a document of at most `length` letters, whose capital is in the first half."""
  length = rng.randrange(length // 2, length + 1)
  start = rng.randrange(len(CYCLE))
  position = rng.randrange(length // 2)
  capital = rng.choice(string.ascii_uppercase)
  text = ""
  for i in range(length):
    text += CYCLE[(start + i) % len(CYCLE)]
    if i == position:
      text += capital
    elif i > position and text[-1] == CYCLE[-1]:
      text += "?" + capital
  return text[:length]


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the script's arguments."""
  parser = script.parser(__doc__)
  parser.add_argument("length", type=int, help="of the longest document, at least 4")
  parser.add_argument("count", type=int, help="of documents")
  parser.add_argument(
    "path", type=script.Output(DOCUMENTS), metavar="FILE", help="to write, .jsonl"
  )
  return parser


def main(options: argparse.Namespace) -> None:
  """Writes the documents."""
  if options.length < 4:
    raise UsageError(f"LENGTH={options.length} must be at least 4")
  rng = random.Random(0)
  lines = (json.dumps({"text": document(rng, options.length)}) + "\n" for _ in range(options.count))
  files.save(options.path, "".join(lines))


if __name__ == "__main__":
  script.run(main, make_parser())
