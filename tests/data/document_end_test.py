"""The token that ends a document, as the files of a folder and of its copies name it."""

import hashlib
import json
import shutil

import pytest
import tokenizers

from sparsek.data import document_end, token_files
from sparsek.data.corpus import Document
from sparsek.data.tokenizer import load_tokenizer
from sparsek.errors import UsageError

ODD = "<\uff5cend\u2581of\u2581sentence\uff5c>"
MODEL = {"model_type": "llama"}


def write(folder, special=("<unk>", "</s>", ODD, "<|im_end|>"), **contents):
  """Writes JSON files and a tokenizer of single letters, with special tokens as ids 0, 1, ..."""
  names = [*special, *"abc "]
  model = tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="a")
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.add_special_tokens(list(special))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  folder.mkdir(exist_ok=True)
  tokenizer.save(str(folder / "tokenizer.json"))
  for name, content in contents.items():
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / f"{name}.json").write_text(text)
  return str(folder)


@pytest.mark.parametrize(
  "contents, end",
  [
    ({}, 1),  # </s>, a known name
    ({"tokenizer_config": {"eos_token": ODD}, "config": MODEL | {"eos_token_id": 1}}, 2),
    ({"tokenizer_config": {"eos_token": {"__type": "AddedToken", "content": ODD}}}, 2),
    ({"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": ODD}}, 2),
    ({"special_tokens_map": {"eos_token": {"content": "<|im_end|>"}}}, 3),
    ({"tokenizer_config": {"eos_token": "b"}}, 5),  # an ordinary token, named
    ({"config": MODEL | {"eos_token_id": 2}}, 2),
    ({"config": MODEL | {"eos_token_id": [3, 2]}}, 3),
    ({"config": MODEL, "generation_config": {"eos_token_id": [2, 3]}}, 2),
    ({"config": MODEL | {"eos_token_id": 5}}, 1),  # "b" is ordinary text, so this id is a default
    ({"config": MODEL | {"eos_token_id": 10**9}}, 1),
    ({"config": MODEL | {"eos_token_id": -1}}, 1),
    ({"config": MODEL | {"eos_token_id": None}}, 1),
  ],
)
def test_the_files_name_the_end(tmp_path, contents, end):
  folder = write(tmp_path / "model", **contents)
  tokenizer = load_tokenizer(folder)
  assert (tokenizer.eos_id, tokenizer.vocab_size) == (end, 8), "nothing is added"
  assert load_tokenizer(folder + "/tokenizer.json").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
  "contents, words",
  [
    ({"tokenizer_config": {"eos_token": "<eos>"}}, "tokenizer_config.json: eos_token='<eos>' is"),
    ({"tokenizer_config": {"eos_token": "\ud800"}}, "tokenizer_config.json: eos_token="),
    ({"tokenizer_config": {"eos_token": 3}}, "tokenizer_config.json: eos_token=3 is no token"),
    ({"tokenizer_config": {"eos_token": ""}}, "tokenizer_config.json: eos_token=''"),
    ({"special_tokens_map": {"eos_token": {"content": [1]}}}, "special_tokens_map.json: eos_token"),
    ({"tokenizer_config": "{,"}, "tokenizer_config.json: no JSON"),
    ({"tokenizer_config": "[]"}, "tokenizer_config.json holds a JSON list"),
    ({"config": MODEL | {"eos_token_id": "2"}}, "config.json: eos_token_id='2' is no token id"),
    ({"config": MODEL | {"eos_token_id": True}}, "config.json: eos_token_id=True"),
    ({"config": MODEL | {"eos_token_id": [2, None]}}, "config.json: eos_token_id="),
    ({"config": MODEL | {"eos_token_id": 10**30}}, "config.json: eos_token_id=1000"),
    ({"generation_config": '{"eos_token_id": 2,}'}, "generation_config.json: no JSON"),
  ],
)
def test_names_that_are_none_are_refused(tmp_path, contents, words):
  with pytest.raises(UsageError, match=words) as error:
    load_tokenizer(write(tmp_path / "model", **contents))
  assert len(str(error.value).splitlines()) == 1


def test_a_token_is_added_to_a_tokenizer_but_not_to_a_model(tmp_path):
  alone = load_tokenizer(write(tmp_path / "tokenizer", ("<unk>",)))
  assert (alone.eos_id, alone.vocab_size) == (5, 6)
  with pytest.raises(UsageError, match="does not name the token that ends a document"):
    load_tokenizer(write(tmp_path / "model", ("<unk>",), config=MODEL | {"eos_token_id": 3}))


@pytest.mark.parametrize(
  "contents",
  [
    {},
    {"tokenizer_config": {"eos_token": ODD, "model_max_length": 7}},
    {"config": MODEL | {"eos_token_id": 3}},
    {"special_tokens_map": {"eos_token": ODD}},
  ],
)
def test_copies_have_the_same_end(tmp_path, contents):
  """A tokenizer that is saved, and token files, which are opened without the model's folder."""
  tokenizer = load_tokenizer(write(tmp_path / "model", **contents))
  (tmp_path / "copy").mkdir()
  tokenizer.save(str(tmp_path / "copy"))
  token_files.write_token_files(str(tmp_path / "data"), [Document("", "ab c", False)], tokenizer)
  shutil.rmtree(tmp_path / "model")
  data = token_files.verify_token_files(str(tmp_path / "data"))
  for copy in (load_tokenizer(str(tmp_path / "copy")), data.tokenizer):
    assert (copy.eos_id, copy.fingerprint) == (tokenizer.eos_id, tokenizer.fingerprint)
  assert data.split("train").document(0)[-1] == tokenizer.eos_id


def test_the_fingerprint_tells_ends_apart_and_is_what_it_was(tmp_path):
  write(tmp_path / "model")
  fingerprint = lambda **contents: load_tokenizer(write(tmp_path / "model", **contents)).fingerprint
  content = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
  del content["version"]
  before = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
  assert fingerprint() == before, "of datasets that exist"
  assert fingerprint(tokenizer_config={"eos_token": "</s>"}) == before
  assert fingerprint(tokenizer_config={"eos_token": ODD}) != before


def test_token_files_that_lost_their_end_are_refused(tmp_path):
  tokenizer = load_tokenizer(write(tmp_path / "model", tokenizer_config={"eos_token": ODD}))
  token_files.write_token_files(str(tmp_path / "data"), [Document("", "ab c", False)], tokenizer)
  (tmp_path / "data" / document_end.TOKENIZER_CONFIG).unlink()
  with pytest.raises(
    UsageError, match="its documents end with token 2, and the files beside tokenizer.json name 1"
  ):
    token_files.open_token_files(str(tmp_path / "data"))


def test_an_import_of_an_older_version_keeps_its_end(tmp_path):
  folder = write(tmp_path / "model", tokenizer_config={"eos_token": ODD})
  (tmp_path / "alone").mkdir()
  shutil.copy(folder + "/tokenizer.json", tmp_path / "alone")
  older, now = load_tokenizer(str(tmp_path / "alone")), load_tokenizer(folder)
  assert (older.eos_id, now.eos_id) == (1, 2)
  assert load_tokenizer(folder, older.fingerprint).eos_id == 1
  assert load_tokenizer(folder, now.fingerprint).eos_id == 2
  assert load_tokenizer(folder, "of another version of the library").eos_id == 2
