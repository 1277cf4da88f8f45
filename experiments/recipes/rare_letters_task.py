"""Documents with two letters worth keeping, one asked for often and one once, as texts for
experiments.prepare_data.

  python -m experiments.recipes.rare_letters_task [--alike] LENGTH COUNT FILE

A document repeats the letters a to h, with digits that mean nothing between them. In its first
third stand two capitals, one of A to H and one of I to P. From then on a question mark comes after
each h, and the first capital again; an exclamation mark asks once for the second one, in the second
half. A scorer that keeps what is read most need not keep the second one: this is the smallest test
of what scorers are taught. With --alike either mark comes after an h, from which a model learns to
find both capitals. Lengths vary from 3/4 LENGTH to LENGTH. FILE is .jsonl.
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

CYCLE, MARKS, OFTEN = "abcdefgh", "?!", "?"
GROUP = 8  # capitals that a mark may ask for
MIN_LENGTH = 96
_BEGINNING = re.compile(rb'\{"text": "[a-hA-P0-9?!]+("\}\n.*)?', re.DOTALL)
DOCUMENTS = outputs.Kind(
  "file of rare_letters_task", lambda path: bool(_BEGINNING.fullmatch(outputs.head(path)))
)


def document(rng: random.Random, length: int, alike: bool = False) -> tuple[str, dict[int, bool]]:
  """Returns a document of at most `length` letters, and {position of an answer: asked for once}."""
  length = rng.randrange(3 * length // 4, length + 1)
  capitals = {
    mark: string.ascii_uppercase[GROUP * i + rng.randrange(GROUP)] for i, mark in enumerate(MARKS)
  }
  cycles = 2 * length // 3  # letters of the cycle, of which the text needs fewer
  first = dict(zip(rng.sample(range(1, cycles // 3), len(MARKS)), rng.sample(MARKS, len(MARKS))))
  rare = MARKS.replace(OFTEN, "")
  asked = dict(zip(rng.sample(range(cycles // 2, 5 * cycles // 6), len(rare)), rare))
  text, answers, begin = "", {}, rng.randrange(len(CYCLE))
  for i in range(length):
    text += CYCLE[(begin + i) % len(CYCLE)]
    if i in first:
      text += capitals[first[i]]
    elif rng.random() < 0.1:
      text += rng.choice(string.digits)
    marks = "" if alike else asked.get(i, "")
    if i > cycles // 3 and text[-1] == CYCLE[-1]:
      marks += rng.choice(MARKS) if alike else OFTEN
    for mark in marks:
      answers[len(text) + 1] = mark != OFTEN
      text += mark + capitals[mark]
  return text[:length], {i: once for i, once in answers.items() if i < length}


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the script's arguments."""
  parser = script.parser(__doc__)
  parser.add_argument("length", type=int, help=f"of the longest document, at least {MIN_LENGTH}")
  parser.add_argument("--alike", action="store_true", help="ask for all capitals as often")
  parser.add_argument("count", type=int, help="of documents")
  parser.add_argument(
    "path", type=script.Output(DOCUMENTS), metavar="FILE", help="to write, .jsonl"
  )
  return parser


def main(options: argparse.Namespace) -> None:
  """Writes the documents."""
  if options.length < MIN_LENGTH:
    raise UsageError(f"LENGTH={options.length} must be at least {MIN_LENGTH}")
  rng = random.Random(0)
  texts = (document(rng, options.length, options.alike)[0] for _ in range(options.count))
  files.save(options.path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


if __name__ == "__main__":
  script.run(main, make_parser())
