# ruff: noqa: E402 (see sparsek.command_line.main)
"""Preparation of token files, which `python -m experiments.pretrain --data=FOLDER` trains on.

  python -m experiments.prepare_data --sources=stdlib --train_bpe=8192 --output=data/stdlib_bpe
  python -m experiments.prepare_data --sources=books,articles.jsonl --tokenizer=tokenizer.json \\
    --output=data/mine
  python -m experiments.prepare_data --sources=books,tasks:32768:200 --answers_only \\
    --output=data/mix
  python -m experiments.prepare_data --verify=data/mine

A model sees every token once an epoch, in shuffled documents: sources mix in the proportion of
their tokens (OUTPUT/documents.jsonl lists them). Name a source twice to give it double weight.
Training cuts documents where its rows end, which can separate a question from its facts: generated
documents should be much shorter than a row. With --answers_only and generated documents alone, a
batch that holds no answer has a loss of 0.
"""

import sys
from collections.abc import Iterable

from absl import flags as absl_flags

from sparsek.command_line import outputs
from sparsek.command_line.definer import Definer, names_of
from sparsek.command_line.main import parse_first, run
from sparsek.command_line.terminal import said_if_slow
from sparsek.config import DEFAULT_EXTENSIONS
from sparsek.errors import UsageError


def define_flags(flag_values: absl_flags.FlagValues) -> None:
  """Defines the flags of this command."""
  define = Definer(flag_values)
  # Relative paths stay relative: they name the documents, wherever the corpus is made.
  define.paths(
    "sources",
    "Files and folders of text, separated by commas. Text files (one document each), .jsonl files "
    '(one document a line), folders (recursive), "stdlib", the source text of Python\'s standard '
    "library, or tasks:LENGTH:COUNT, generated documents that need recall, of at most LENGTH "
    "bytes. A path with a comma is given alone.",
    words=("stdlib", "tasks:"),
    absolute=False,
  )
  _define_choice_of_documents(define)
  define.path("output", None, "Folder to make.")
  define.path(
    "tokenizer", None, '"byte", a tokenizer.json or its folder. By default "byte".', words=("byte",)
  )
  define.integer(
    "train_bpe",
    None,
    "Train a byte-level BPE with this many ids. It learns from documents that are not held out.",
    lower=257,
    upper=2**20,
  )
  define.real(
    "heldout_fraction",
    0.05,
    "About this share of the documents is held out. A hash of the text decides which.",
    lower=0,
    upper=0.99,
  )
  define.path("verify", None, "Only compare the checksums of this folder of token files.")
  define.path(
    "expect",
    None,
    "A meta.json, or a copy of one, that tokens and split must match. If they do not, the command "
    "ends with an error.",
  )


def _define_choice_of_documents(define: Definer) -> None:
  define.integer(
    "min_document_bytes", 0, "Leave out shorter documents; generated ones stay.", lower=0
  )
  define.boolean("deduplicate", False, "Of equal documents keep only the first.")
  define.boolean(
    "skip_bad_lines",
    False,
    "Leave out lines and rows that have no text, and count them. They are lines of .jsonl, "
    "elements of .json and rows of .parquet. By default the command stops at the first.",
  )
  define.boolean(
    "answers_only",
    False,
    "In generated documents the loss counts only the answers. This is so in training and held-out "
    "evaluation; each token counts as much as one of text.",
  )
  define.words(
    "extensions",
    DEFAULT_EXTENSIONS,
    "Endings of the files taken from folders. Upper case is the same; .gz and .zst may follow.",
  )
  define.string(
    "text_field", "text", "Field of JSON objects, or column of .parquet files, of the text."
  )
  define.choice(
    "errors",
    "strict",
    ("strict", "replace"),
    "What to do about text that is not UTF-8. strict: stop. replace: put U+FFFD.",
  )


FLAGS = absl_flags.FlagValues()
define_flags(FLAGS)


def check_flags() -> None:
  """Raises UsageError for flags that exclude each other or are missing, and for an old folder."""
  if FLAGS.verify is not None:
    others = [name for name in names_of(FLAGS) if FLAGS[name].present]
    if others := [f"--{name}" for name in others if name not in ("verify", "expect")]:
      raise UsageError(
        f"--verify={FLAGS.verify} makes nothing and takes only --expect: leave out "
        f"{', '.join(others)}"
      )
    return
  for name in ("sources", "output"):
    if not FLAGS[name].value:
      raise UsageError(f"--{name} is required: {FLAGS[name].help}")
  if FLAGS.tokenizer is not None and FLAGS.train_bpe is not None:
    raise UsageError(
      f"--tokenizer={FLAGS.tokenizer} and --train_bpe={FLAGS.train_bpe} exclude each other"
    )
  outputs.check_new_folder("output", FLAGS.output)


if __name__ == "__main__":
  parse_first(FLAGS, __doc__, check_flags)

from tqdm import tqdm

from sparsek.data.corpus import Document, LeftOut, documents
from sparsek.data.token_files import (
  TokenDataset,
  check_can_make,
  check_same,
  open_token_files,
  read_meta,
  verify_token_files,
  write_token_files,
)
from sparsek.data.tokenizer import Tokenizer, describe_documents, load_tokenizer, train_bpe


def _documents(description: str, left_out: LeftOut | None = None) -> Iterable[Document]:
  """Reads the documents of --sources, with a progress bar."""
  all_documents = documents(
    FLAGS.sources,
    extensions=FLAGS.extensions,
    left_out=left_out,
    heldout_fraction=FLAGS.heldout_fraction,
    text_field=FLAGS.text_field,
    errors=FLAGS.errors,
    min_document_bytes=FLAGS.min_document_bytes,
    deduplicate=FLAGS.deduplicate,
    answers_only=FLAGS.answers_only,
    skip_bad_lines=FLAGS.skip_bad_lines,
  )
  return tqdm(all_documents, description, unit=" documents", disable=None)


def _tokenizer() -> Tokenizer:
  if FLAGS.train_bpe is None:
    return load_tokenizer(FLAGS.tokenizer or "byte")
  tokenizer = train_bpe(
    (document.text for document in _documents("training the tokenizer") if not document.held_out),
    FLAGS.train_bpe,
  )
  if tokenizer.vocab_size < FLAGS.train_bpe:
    print(
      f"warning: the text is too short for --train_bpe={FLAGS.train_bpe}: the tokenizer has "
      f"{tokenizer.vocab_size} ids",
      file=sys.stderr,
    )
  return tokenizer


def _report(dataset: TokenDataset) -> None:
  print(
    f"{dataset.folder}: tokenizer {dataset.tokenizer.name} with {dataset.vocab_size} ids, "
    f"{describe_documents(dataset.tokenizer)}"
  )
  for name in ("train", "heldout"):
    split = dataset.split(name)
    counted = f"; the loss counts {split.num_counted:,} tokens," if split.marked else ","
    print(
      f"  {name}: {split.num_documents:,} documents, {split.num_tokens:,} "
      f"tokens{counted} {split.num_bytes:,} bytes"
    )
  if FLAGS.expect:
    check_same(dataset.folder, FLAGS.expect)
    print(f"Tokens and split are those of {FLAGS.expect}.")


def main() -> None:
  """Makes the token files, or only verifies those of --verify."""
  check_flags()
  if FLAGS.expect:
    read_meta(FLAGS.expect)  # a bad file is refused before any long work
  if FLAGS.verify is not None:
    _report(verify_token_files(FLAGS.verify))
    print("All checksums agree.")
    return
  check_can_make(FLAGS.output)  # before the tokenizer is trained
  tokenizer, left_out = _tokenizer(), LeftOut()
  with said_if_slow(f"tokenising into {FLAGS.output} ..."):
    write_token_files(FLAGS.output, _documents("tokenising", left_out), tokenizer, FLAGS.sources)
  for line in left_out.lines():
    print(line)
  _report(open_token_files(FLAGS.output))


if __name__ == "__main__":
  run(main, FLAGS)
