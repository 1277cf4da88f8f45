"""Writes documents whose last letter stands at a random place before, for experiments.prepare_data: `python -m experiments.letters LENGTH COUNT FILE`.

A document is a cycle of small letters with one capital in it, and at the end a question mark and that capital. A scorer can tell it by its looks, and only it
is worth keeping: the smallest test of learning what to keep. FILE is .jsonl.
"""

import json
import random
import string
import sys

CYCLE = "abcdefgh"


def document(rng, length):
  """`length` letters; the capital is in the first three quarters, so that it has left a short window when it is asked for."""
  start, place, capital = rng.randrange(len(CYCLE)), rng.randrange(length * 3 // 4), rng.choice(string.ascii_uppercase)
  cycle = [CYCLE[(start + i) % len(CYCLE)] for i in range(length - 3)]
  return "".join((*cycle[:place], capital, *cycle[place:], "?", capital))


def main(length, count, path):
  rng = random.Random(0)
  with open(path, "w", encoding="utf-8") as file:
    for _ in range(int(count)):
      file.write(json.dumps({"text": document(rng, int(length))}) + "\n")


if __name__ == "__main__":
  main(*sys.argv[1:])
