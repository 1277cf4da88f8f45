"""Prompts by the generators of nvidia-long-context-eval, run as they are:

  python -m tests.data.ruler_reference PACKAGE WORDS TOKENIZER LENGTH COUNT TASK...

PACKAGE is the folder of the unpacked wheel. What its scripts import is replaced: the tokenizer by
ours, NLTK's sentences by ours, and the words by those of the folder WORDS. Prints a JSON object
{task: [{"input", "outputs", "length"}, ...]}.
"""

import contextlib
import io
import json
import math
import os
import pathlib
import re
import runpy
import sys
import tempfile
import types

from sparsek.data.ruler.needles import sentences
from sparsek.data.tokenizer import load_tokenizer


def _module(name, **members):
  module = sys.modules[name] = types.ModuleType(name)
  module.__dict__.update(members)
  return module


def replace_imports(words, tokenizer):
  """Puts our modules where the package's scripts look for others."""

  def read(name):
    return [line.rstrip() for line in pathlib.Path(words, name).read_text().splitlines()]

  select = lambda *_: types.SimpleNamespace(text_to_tokens=tokenizer.encode)
  _module("nltk"), _module("nltk.tokenize", sent_tokenize=sentences)
  _module("scipy"), _module("scipy.special", zeta=lambda alpha: math.pi**2 / 6)
  random_word = _module("wonderwords.random_word", _get_words_from_text_file=read)
  _module("wonderwords", random_word=random_word)
  _module("tokenizer", select_tokenizer=select)
  _module("long_context_eval.data.tokenizer", select_tokenizer=select)


def arguments_of(yaml, task):
  """Returns the name of a task's script, and its arguments."""
  block = re.search(rf"^{task}:\n((?:  .*\n?)+)", yaml, re.M).group(1)
  script = re.search(r"task: (\w+)", block).group(1)
  pairs = re.findall(r"^    (\w+): (\S+)", block, re.M)
  return script, [word for name, value in pairs for word in (f"--{name}", value)]


def prompts(package, task, length, count):
  """Returns what the script of a task writes."""
  synthetic = os.path.join(package, "long_context_eval", "data", "synthetic")
  yaml = pathlib.Path(package, "long_context_eval", "synthetic.yaml").read_text()
  script, arguments = arguments_of(yaml, task)
  of = runpy.run_path(os.path.join(synthetic, "constants.py"))["TASKS"][script]
  with tempfile.TemporaryDirectory() as folder:
    sys.argv = [
      *(script, f"--save_dir={folder}", "--save_name=x", "--tokenizer_path=x"),
      *(f"--max_seq_length={length}", f"--tokens_to_generate={of['tokens_to_generate']}"),
      *(f"--num_samples={count}", f"--template={of['template'] + of['answer_prefix']}"),
      *arguments,
    ]
    runpy.run_path(os.path.join(synthetic, f"{script}.py"), run_name="__main__")
    lines = pathlib.Path(folder, "x", "validation.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def main():
  package, words, tokenizer, length, count, *tasks = sys.argv[1:]
  sys.path[:0] = [package, os.path.join(package, "long_context_eval", "data", "synthetic")]
  replace_imports(words, load_tokenizer(tokenizer))
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    found = {task: prompts(package, task, int(length), int(count)) for task in tasks}
  print(json.dumps(found))


if __name__ == "__main__":
  main()
