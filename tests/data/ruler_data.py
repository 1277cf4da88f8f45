"""Small data in the form of RULER's, made up, and a tokenizer that knows its words."""

import functools
import json
import random
import zipfile

from sparsek.data.ruler.needles import REPEATED
from sparsek.data.ruler.tasks import TASKS
from sparsek.data.tokenizer import train_bpe

NOUNS = ("lamp", "oak-tree", "river", "eyed-cat", "cat", "stone", "violin", "zebra", "apple")
ADJECTIVES = ("blue", "blue-eyed", "calm", "old", "quick", "warm")
VERBS = ("carry", "find", "walk", "apple")
_FILLER = "the of a man who saw many birds fly over old walls and sang to them in May".split()


def _sentence(rng):
  return " ".join(rng.choices(_FILLER, k=rng.randint(4, 9))).capitalize() + "."


def write_data(folder, words=100):
  """Writes the files to a folder: one of them as it is, the others in a wheel.

  Args:
    folder: exists.
    words: number of further nouns.
  """
  rng = random.Random(0)
  text = lambda count: " ".join(_sentence(rng) for _ in range(count))
  paragraphs = [
    {
      "context": f"Fact {i}. {text(3)}",
      "qas": [
        {"question": f"What is {i}?", "answers": [{"text": f"fact {i}"}], "is_impossible": False},
        {"question": "Why?", "answers": [], "is_impossible": True},
      ],
    }
    for i in range(240)
  ]
  squad = {"data": [{"paragraphs": paragraphs[i : i + 4]} for i in range(0, 240, 4)]}
  hotpotqa = [
    {
      "question": f"Who is {i}?",
      "answer": f"Person {i}",
      "context": [[f"Page {i} {j}", [_sentence(rng), f" Person {i}."]] for j in range(3)],
    }
    for i in range(150)
  ]
  nouns = (*NOUNS, *(f"noun{i}" for i in range(words)))
  files = {
    "PaulGrahamEssays.json": json.dumps({"text": text(900)}),
    "squad.json": json.dumps(squad),
    "hotpotqa.json": json.dumps(hotpotqa),
    "adjectivelist.txt": "\n".join(ADJECTIVES),
    "verblist.txt": "\n".join(VERBS),
  }
  (folder / "nounlist.txt").write_text("\n".join(nouns))
  with zipfile.ZipFile(folder / "data-1-py3-none-any.whl", "w") as wheel:
    for name, content in files.items():
      wheel.writestr(f"package/assets/{name}", content)
  return folder


@functools.cache
def tokenizer():
  """Returns a BPE that knows the words of prompts, but splits numbers and random letters."""
  texts = [f"{of.template.question} {of.template.answer_prefix}" for of in TASKS.values()]
  words = [" ".join((*NOUNS, *ADJECTIVES, *VERBS, *_FILLER))]
  needle = "One of the special magic numbers uuids for : is . Document: VAR = "
  numbers = " ".join(f"{i}. noun{i % 100}" for i in range(1000))
  return train_bpe([*(texts + words + [REPEATED, needle]) * 4, numbers], 1500)
