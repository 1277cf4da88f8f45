"""The tasks of RULER: templates, room for the answer and scores, as they were published."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

ESSAYS, SQUAD, HOTPOTQA = "PaulGrahamEssays.json", "squad.json", "hotpotqa.json"
NOUNS, ADJECTIVES, VERBS = "nounlist.txt", "adjectivelist.txt", "verblist.txt"


@dataclasses.dataclass(frozen=True)
class Template:
  """Texts around what a task generates.

  Attributes:
    question: what the user says, with {context} and {query}.
    answer_prefix: the beginning of the answer, which follows a chat template's own words.
    new_tokens: room for the answer.
  """

  question: str
  answer_prefix: str
  new_tokens: int


NEEDLES = Template(
  "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize "
  "it. I will quiz you about the {type_needle_v} afterwards.\n{context}\nWhat are all the special "
  "magic {type_needle_v} for {query} mentioned in the provided text?",
  " The special magic {type_needle_v} for {query} mentioned in the provided text are",
  128,
)
VARIABLES = Template(
  "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
  "{context}\nQuestion: Find all variables that are assigned the value {query} in the text above.",
  " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables "
  "are assgined the value {query}, they are: ",
  30,
)
COMMON_WORDS = Template(
  "Below is a numbered list of words. In these words, some appear more often than others. Memorize "
  "the ones that appear most often.\n{context}\nQuestion: What are the 10 most common words in the "
  "above list?",
  " Answer: The top 10 words that appear most often in the list are:",
  120,
)
CODED_WORDS = Template(
  "Read the following coded text and track the frequency of each coded word. Find the three most "
  "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
  "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
  "text?",
  " Answer: According to the coded text above, the three most frequently appeared words are:",
  50,
)
QUESTIONS = Template(
  "Answer the question based on the given documents. Only give me the answer and do not output any "
  "other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on "
  "the given documents. Only give me the answer and do not output any other words.\n\nQuestion: "
  "{query}",
  " Answer:",
  32,
)


@dataclasses.dataclass(frozen=True)
class Task:
  """One of the tasks.

  Attributes:
    template: its texts.
    files: the data that it needs.
    arguments: of its generator.
  """

  template: Template
  files: tuple[str, ...] = ()
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _needles(haystack: str, keys: str = "words", values: str = "numbers", **numbers: int) -> Task:
  essays = (ESSAYS,) if haystack == "essay" else ()
  words = (NOUNS, ADJECTIVES) if "words" in (keys, values) else ()
  return Task(
    NEEDLES, essays + words, {"haystack": haystack, "keys": keys, "values": values, **numbers}
  )


TASKS = {
  "niah_single_1": _needles("repeat"),
  "niah_single_2": _needles("essay"),
  "niah_single_3": _needles("essay", values="uuids"),
  "niah_multikey_1": _needles("essay", num_keys=4),
  "niah_multikey_2": _needles("needle"),
  "niah_multikey_3": _needles("needle", keys="uuids", values="uuids"),
  "niah_multivalue": _needles("essay", num_values=4),
  "niah_multiquery": _needles("essay", num_queries=4),
  "vt": Task(VARIABLES),
  "cwe": Task(COMMON_WORDS, (NOUNS, ADJECTIVES, VERBS)),
  "fwe": Task(CODED_WORDS),
  "qa_1": Task(QUESTIONS, (SQUAD,)),
  "qa_2": Task(QUESTIONS, (HOTPOTQA,)),
}


def score(task: str, answer: str, references: Sequence[str]) -> float:
  """Returns the score of an answer in percent.

  Letters count alike in upper and lower case. In qa_1 and qa_2 one of the references must occur in
  the answer (string_match_part); in the others it is the share of those that do (string_match_all).
  """
  text = re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip().lower()
  right = [reference.lower() in text for reference in references]
  if TASKS[task].template is QUESTIONS:
    return 100.0 * any(right)
  return 100.0 * sum(right) / len(right)
