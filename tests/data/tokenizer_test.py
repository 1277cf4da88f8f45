import copy
import functools
import json
import os

import numpy as np
import pytest
import tokenizers

from sparsek.config import TrainConfig, TransformerConfig
from sparsek.data import task_documents
from sparsek.data.batches import opening
from sparsek.data.corpus import Document
from sparsek.data.token_files import open_token_files, verify_token_files, write_token_files
from sparsek.data.tokenizer import ByteTokenizer, describe_documents, load_tokenizer, train_bpe
from sparsek.errors import UsageError
from sparsek.runs import run_record
from tests.helpers import metaspace, spm

TEXT = "Hello world"


def byte_ids(*values):
  return [3 + value for value in values]


def test_what_is_no_character_leaves_its_neighbours_alone():
  """A wrong byte does not lose the rest of its run of byte tokens, as it does in the library.

  Ids that decode to nothing do not end a run.
  """
  ids = byte_ids(0x41, 0xE2, 0xE2, 0x82, 0xAC, 0x80) + [1]
  ids += byte_ids(0xE2) + [2, 999] + byte_ids(0x82, 0xAC)
  assert spm().decode(ids) == "A\ufffd€\ufffd€"
  content = bytes(np.random.default_rng(0).integers(256, size=500).tolist()) + "€".encode()
  assert spm().decode(byte_ids(*content)) == content.decode(errors="replace").removeprefix(" ")


@pytest.mark.parametrize(
  "tokenizer", [spm, metaspace, lambda: train_bpe([TEXT], 260), ByteTokenizer]
)
def test_a_text_that_continues_gets_no_space(tokenizer):
  tokenizer = tokenizer()
  for cut in range(len(TEXT)):
    ids = tokenizer.encode(TEXT[:cut]) + tokenizer.encode(TEXT[cut:], continues=bool(cut))
    assert tokenizer.decode(ids) == TEXT
  special = functools.partial(tokenizer.encode, "<s>", special_tokens=True)
  assert special(continues=True) == special()


def test_special_tokens_at_both_ends_are_told_apart():
  assert spm().bos_ids == [1] and spm().eos_id == 2
  ids = spm().encode(TEXT, special_tokens=True)
  assert ids == spm().encode(TEXT), "they belong to documents, not to calls"
  assert train_bpe([TEXT], 260).bos_ids == ByteTokenizer().bos_ids == []
  assert describe_documents(spm()) == "each document begins with <s> and ends with </s>"
  assert (
    describe_documents(ByteTokenizer()) == "each document begins with its text and ends with eos"
  )


@pytest.fixture
def folder(tmp_path):
  documents = [
    Document("0", TEXT, False),
    Document("1", "world", True),
    Document("2", "Hello 12", False, ((5, 8),)),
  ]
  write_token_files(str(tmp_path / "data"), documents, spm())
  return tmp_path / "data"


def edit(path, change):
  """Changes a JSON file, and removes the checksum of a meta.json, as in older versions."""
  record = json.loads(path.read_text())
  change(record)
  record.pop("meta_sha256", None)
  path.write_text(json.dumps(record))


def test_documents_begin_as_the_tokenizer_says(folder):
  train_split, heldout = map(verify_token_files(str(folder)).split, ("train", "heldout"))
  assert train_split.document(0).tolist() == [1, *spm().encode(TEXT), 2]
  marked = train_split.document(1)
  assert marked.tolist() == [1, *spm().encode("Hello 12"), 2], "answers are no texts of their own"
  assert heldout.document(0).tolist() == [1, *spm().encode("world"), 2]
  uncounted = train_split.uncounted(1)
  assert spm().decode(marked[~uncounted]) == "12" and uncounted[0] and uncounted[-1]
  assert heldout.num_counted == len(heldout.document(0)) - 1, "no token predicts the first"
  assert json.loads((folder / "meta.json").read_text())["tokenizer"]["bos_ids"] == [1]


def test_what_documents_begin_with_is_kept_by_data_and_runs(folder):
  """Also for token files of older versions, whose documents begin with no bos."""

  def record():
    dataset = open_token_files(str(folder))
    model = run_record.model_record(TransformerConfig(), TrainConfig(workdir=""), dataset)
    return model["tokenizer"]["bos_ids"]

  assert record() == [1]
  edit(folder / "meta.json", lambda meta: meta.pop("meta_sha256"))
  edit(folder / "meta.json", lambda meta: meta["tokenizer"].pop("bos_ids"))
  assert record() == [] and open_token_files(str(folder)).tokenizer.bos_ids == []
  for wrong in (None, 1, [True], [-1], [10**9], ["<s>"], {}):
    edit(folder / "meta.json", lambda meta: meta["tokenizer"].update(bos_ids=wrong))
    with pytest.raises(UsageError, match="meta.json: bos_ids must be a list of ids from 0 to"):
      open_token_files(str(folder))


def test_a_corpus_that_was_cached_without_them_is_made_anew(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  documents = [Document("0", TEXT, False), Document("1", "world", True)]
  monkeypatch.setattr(opening, "documents", lambda sources: documents)
  older = copy.copy(spm())
  older.bos_ids = []
  first_ids = [
    opening._open_stdlib(tokenizer).split("train").document(0)[0] for tokenizer in (older, spm())
  ]
  assert first_ids == [spm().encode(TEXT)[0], 1]


@pytest.mark.parametrize("task", task_documents.TASKS)
def test_asked_documents_begin_as_those_of_the_data(task):
  tokenizer = copy.copy(spm())
  example = lambda: task_documents.make_example(task, tokenizer, 1000, np.random.default_rng(0))
  tokens, answers = example()
  assert tokens[0] == 1 and len(tokens) <= 1000 and not np.any(tokens[1:] == 1)
  answered = [tokenizer.decode(tokens[positions]) for positions in answers]
  assert "  " not in tokenizer.decode(tokens)
  assert all(answer.strip() == answer for answer in answered)
  tokenizer.bos_ids = []
  assert example()[0][0] != 1


BROKEN = {
  "a key that its template lacks": (["post_processor", "special_tokens"], {}),
  "a prefix longer than tokens": (["model", "continuing_subword_prefix"], "ééééé"),
  "a table that is none": (["normalizer"], {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
  "chunks of nothing": (["pre_tokenizer"], {"type": "FixedLength", "length": 0}),
  "an id of 4e9": (["model", "vocab", "zzz"], 4 * 10**9),
  "an id beyond int64": (["model", "vocab", "zzz"], 10**30),
  "no model": (["model"], None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tokenizers_end_in_a_sentence(name, tmp_path, capfd):
  """Also if the library panics, which is no Exception and prints a backtrace."""
  (*path, last), value = BROKEN[name]
  content = section = json.loads(spm()._tokenizer.to_str())
  for key in path:
    section = section[key]
  section[last] = value
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  message = f"tokenizer file {tmp_path}/tokenizer.json cannot be read: .+"
  with pytest.raises(UsageError, match=message):
    load_tokenizer(str(tmp_path))
  assert capfd.readouterr().err == ""
  os.write(2, b"still here")
  assert capfd.readouterr().err == "still here"


def test_a_text_that_the_library_cannot_encode_ends_in_a_sentence(tmp_path):
  model = tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]")
  tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
  tokenizer = load_tokenizer(str(tmp_path))
  for action in (tokenizer.encode, lambda text: tokenizer.encode_documents([text])):
    with pytest.raises(UsageError, match="the tokenizer cannot encode a .*UNK"):
      action("b")
