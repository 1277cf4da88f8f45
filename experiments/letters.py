"""Writes documents with one letter worth keeping, for experiments.prepare_data: `python -m experiments.letters LENGTH COUNT FILE`.

A document repeats the letters a to h. Somewhere a capital stands among them, and after every later h a question mark and that capital again, further back than
a short window reaches. A scorer can tell capitals by their looks, and only they are worth keeping: the smallest test of learning what to keep. Lengths vary
from LENGTH / 2 to LENGTH, or landmarks that count positions would help. FILE is .jsonl.
"""

import json
import random
import string
import sys

CYCLE = "abcdefgh"


def document(rng, length):
  """The capital is in the first half."""
  length = rng.randrange(length // 2, length + 1)
  start, place, capital = rng.randrange(len(CYCLE)), rng.randrange(length // 2), rng.choice(string.ascii_uppercase)
  text = ""
  for i in range(length):
    text += CYCLE[(start + i) % len(CYCLE)]
    if i == place:
      text += capital
    elif i > place and text[-1] == CYCLE[-1]:
      text += "?" + capital
  return text[:length]


def main(length, count, path):
  rng = random.Random(0)
  with open(path, "w", encoding="utf-8") as file:
    for _ in range(int(count)):
      file.write(json.dumps({"text": document(rng, int(length))}) + "\n")


if __name__ == "__main__":
  main(*sys.argv[1:])
