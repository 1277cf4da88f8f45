"""Documents of the demo: filler with one pass key, and a question for it further on.

A token is a word, so that what a model keeps can be read. Pass keys are names of animals, which
stand nowhere else: a scorer can learn to recognise them, and only they are worth keeping.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from sparsek.data.corpus import Document
from sparsek.data.tokenizer import BPETokenizer

FILLER = (
  "The grass is green.",
  "The sky is blue.",
  "The sun is yellow.",
  "Here we go.",
  "There and back again.",
  "Time went by.",
  "Somebody opened a window.",
  "It rained for most of the day.",
  "The train was late again.",
  "We had tea and bread at noon.",
)
ANIMALS = (
  "badger bear beaver bison camel cobra crane crow deer eagle falcon ferret fox gecko goose heron "
  "horse hyena koala lemur lion lynx mole moose otter owl panda rabbit raven tiger walrus wolf"
).split()
CHANCE = 1 / len(ANIMALS)
FACT, QUESTION = "The pass key is", "What is the pass key?"
END = "<eos>"
_FILLER = tuple(sentence.split() for sentence in FILLER)
_FACT, _QUESTION = FACT.split(), QUESTION.split()


def tokenizer() -> BPETokenizer:
  """Returns a tokenizer whose tokens are the words of these documents."""
  import tokenizers

  words = dict.fromkeys(
    word for text in (*FILLER, FACT, QUESTION, *ANIMALS) for word in text.split()
  )
  vocabulary = {word: index for index, word in enumerate((END, *words))}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=END))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return BPETokenizer(made, END)


def training_documents(length: int, count: int, seed: int = 0) -> Iterator[Document]:
  """Yields documents of exactly `length` words, in which only the answers count; 5 % held out.

  The question is asked again and again, half of the time soon after the last mention of the pass
  key: one answer a document would teach little.
  """
  for i in range(count):
    rng = np.random.default_rng([seed, i])
    key = str(rng.choice(ANIMALS))
    words, answers = [*_filler(rng, int(rng.integers(length // 4))), *_FACT, key], []
    while True:
      gap = rng.integers(5 if rng.random() < 0.5 else 40)
      asked = [*_filler(rng, int(gap)), *_QUESTION, key]
      if len(words) + len(asked) > length:
        break
      words += asked
      answers.append(len(words) - 1)
    missing = length - len(words)
    words = _filler(rng, missing)[:missing] + words
    spans = (_span(words, missing + answer) for answer in answers)
    yield Document(str(i), " ".join(words), held_out=i % 20 == 0, answers=tuple(spans))


def question(rng: np.random.Generator, length: int, distance: int) -> list[str]:
  """Returns the words of a document of at most `length` words that ends with question and answer.

  Args:
    rng: determines the document.
    length: at least distance + 6.
    distance: from the fact's pass key to the last word of the question; at least 8, or 5.
  """
  key, after = str(rng.choice(ANIMALS)), distance - len(_QUESTION)
  filler = _filler(rng, after)
  while len(filler) != after:  # whole sentences only
    filler = _filler(rng, after)
  words = [*_FACT, key, *filler, *_QUESTION, key]
  before = int(rng.integers(max(length - len(words), 0) + 1))
  return _filler(rng, before)[:before] + words


def _filler(rng: np.random.Generator, least: int) -> list[str]:
  """Returns whole sentences of at least `least` words together."""
  words: list[str] = []
  while len(words) < least:
    words += _FILLER[rng.integers(len(_FILLER))]
  return words


def _span(words: Sequence[str], index: int) -> tuple[int, int]:
  """Returns where a word begins and ends in the text."""
  begin = sum(len(word) + 1 for word in words[:index])
  return begin, begin + len(words[index])
