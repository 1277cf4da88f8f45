"""Token files, and the sources and tokenizers from which they are made."""

import fcntl
import hashlib
import json
import os
import pathlib
import random
import re
import signal

import numpy as np
import pytest

from sparsek.data import batches
from sparsek.data.corpus import Document, documents
from sparsek.data.token_files import open_token_files, verify_token_files, write_token_files
from sparsek.data.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer, train_bpe
from sparsek.errors import UsageError
from sparsek.storage.new_folder import remove_abandoned, temporary_name

TEXTS = [
  "def f(x):\n  return x\n" * 5,
  "Grüße, 世界! 👋🏽\r\n\tÅngström",
  " spaces around ",
  "a<|endoftext|>b",
  "\u0000\u200b\ufeff",
]


@pytest.fixture(scope="module")
def bpe():
  return train_bpe(TEXTS, 300)


@pytest.fixture
def folder(tmp_path):
  path = str(tmp_path / "tokens")
  write_token_files(
    path,
    [Document(str(i), text, i == 2) for i, text in enumerate(TEXTS)],
    ByteTokenizer(),
    ["here"],
  )
  return path


def edit_meta(folder, **changes):
  """Changes meta.json, and removes its own checksum, which older versions did not write."""
  path = os.path.join(folder, "meta.json")
  with open(path) as file:
    meta = json.load(file)
  del meta["meta_sha256"]
  with open(path, "w") as file:
    json.dump({**meta, **changes}, file)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_round_trip(kind, bpe, tmp_path):
  tokenizer = {"byte": ByteTokenizer(), "bpe": bpe}[kind]
  rng = random.Random(0)
  texts = TEXTS + [
    "".join(
      chr(rng.choice([rng.randrange(128), rng.randrange(0xE000, 0x10FFFF)])) for _ in range(50)
    )
    for _ in range(20)
  ]
  for text, with_eos in zip(texts, tokenizer.encode_documents(texts)):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids + [tokenizer.eos_id]) == text
    assert with_eos.tolist() == ids + [tokenizer.eos_id]
    assert tokenizer.eos_id not in ids, "text that spells the end of document does not end it"
    assert 0 <= min(ids) and max(ids) < tokenizer.vocab_size
  assert tokenizer.decode([]) == "" and tokenizer.encode("") == []

  path = str(tmp_path / "tokens")
  write_token_files(
    path, [Document("", text, i % 5 == 0) for i, text in enumerate(texts)], tokenizer
  )
  dataset = verify_token_files(path)
  assert dataset.vocab_size == tokenizer.vocab_size
  assert dataset.tokenizer.fingerprint == load_tokenizer(path).fingerprint == tokenizer.fingerprint
  for name, expected in (
    ("train", [t for i, t in enumerate(texts) if i % 5]),
    ("heldout", texts[::5]),
  ):
    split = dataset.split(name)
    actual = [split.document(i) for i in range(split.num_documents)]
    assert [dataset.tokenizer.decode(ids) for ids in actual] == expected
    assert all(ids[-1] == tokenizer.eos_id for ids in actual)
    assert split.num_tokens == sum(map(len, actual))
    assert split.num_bytes == sum(len(text.encode()) for text in expected)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_the_loss_counts_marked_answers_only(kind, bpe, tmp_path):
  tokenizer, path = {"byte": ByteTokenizer(), "bpe": bpe}[kind], str(tmp_path / "tokens")
  text, answers = "Who? 世界. Where? return x", ((4, 7), (15, 24))
  four = [
    Document("a", "plain", False),
    Document("b", text, False, answers),
    Document("c", "no answer", True, ()),
    Document("d", "plain", True),
  ]
  write_token_files(path, four, tokenizer)
  dataset = verify_token_files(path)
  train, heldout = dataset.split("train"), dataset.split("heldout")
  counted = lambda split, i: tokenizer.decode(split.document(i)[~split.uncounted(i)])
  assert [counted(train, 0), counted(train, 1), counted(heldout, 0), counted(heldout, 1)] == [
    "plain",
    " 世界 return x",
    "",
    "plain",
  ]
  assert (
    tokenizer.decode(train.document(1)) == text
    and train.document(1)[-1] == tokenizer.eos_id
    and train.uncounted(1)[-1]
  )
  assert train.num_counted == sum(
    np.count_nonzero(~train.uncounted(i)) for i in range(2)
  ) and train.num_bytes == len("plain 世界 return x".encode())
  os.truncate(os.path.join(path, "uncounted.bin"), 3)
  with pytest.raises(ValueError, match=r"uncounted.bin is damaged: expected \d+ bytes, found 3"):
    open_token_files(path)
  with pytest.raises(ValueError, match="must be .begin, end., ascending, within its 5"):
    Document("e", "plain", False, ((3, 4), (2, 5)))


def test_files_without_what_was_added_later_are_read(folder):
  with open(os.path.join(folder, "meta.json")) as file:
    meta = json.load(file)
  for key in ("num_counted", "versions", "meta_sha256"):
    del meta[key]
  os.remove(os.path.join(folder, "documents.jsonl"))
  del meta["sha256"]["documents.jsonl"]
  with open(os.path.join(folder, "meta.json"), "w") as file:
    json.dump(meta, file)
  split = verify_token_files(folder).split("train")
  assert split.num_counted == split.num_tokens and not split.marked


def test_broken_text_does_not_stop_a_prompt(bpe):
  for tokenizer in (ByteTokenizer(), bpe):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"
    assert tokenizer.decode(tokenizer.encode("🦊")[:1]) == "\ufffd", "the beginning of a character"


def test_tokenizer_settings_that_lose_text_are_undone(bpe, tmp_path):
  import tokenizers

  bpe.save(str(tmp_path))
  plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  plain.enable_truncation(3)
  plain.enable_padding(length=1000)
  plain.save(str(tmp_path / "tokenizer.json"))
  loaded = load_tokenizer(str(tmp_path))
  assert loaded.encode(TEXTS[0]) == bpe.encode(TEXTS[0])
  assert loaded.fingerprint == bpe.fingerprint


@pytest.mark.parametrize("token,added", [("</s>", 0), ("x", 1)])
def test_eos_is_found_or_added(tmp_path, token, added):
  import tokenizers

  model = tokenizers.models.WordLevel({"a": 0, token: 1, "[UNK]": 2}, unk_token="[UNK]")
  tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
  loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
  assert (loaded.vocab_size, loaded.eos_id) == (3 + added, 3 if added else 1)


def test_special_tokens_are_read_where_asked():
  import tokenizers

  plain = tokenizers.Tokenizer(
    tokenizers.models.BPE({"a": 0, "<": 1, "s": 2, ">": 3, "<s>": 4}, [])
  )
  plain.add_special_tokens(["<s>"])
  plain.post_processor = tokenizers.processors.TemplateProcessing(
    "<s> $A", special_tokens=[("<s>", 4)]
  )
  tokenizer = BPETokenizer(plain)
  for _ in range(2):
    assert tokenizer.encode("a<s>") == [0, 1, 2, 3]
    assert tokenizer.encode("a<s>", special_tokens=True) == [0, 4] and tokenizer.bos_ids == [4]
  assert ByteTokenizer().encode("a", special_tokens=True) == [97]


def test_bad_tokenizers_are_refused(tmp_path):
  with pytest.raises(ValueError, match="vocab_size=256"):
    train_bpe(["a"], 256)
  with pytest.raises(ValueError, match="nowhere"):
    load_tokenizer(str(tmp_path / "nowhere"))
  with pytest.raises(ValueError, match="tokenizer.json"):
    load_tokenizer(str(tmp_path))
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
    load_tokenizer(str(tmp_path))


def test_a_tokenizer_of_other_data_is_refused(folder, bpe, tmp_path):
  bpe.save(str(tmp_path))
  assert batches.open_data(folder, "byte").vocab_size == batches.open_data(folder).vocab_size == 257
  with pytest.raises(
    ValueError, match=rf"{bpe.fingerprint[:12]}.*{ByteTokenizer.fingerprint[:12]}"
  ):
    batches.open_data(folder, str(tmp_path))


def test_large_vocabularies_take_32_bits(tmp_path):
  class Large(ByteTokenizer):
    vocab_size = 2**16 + 1

    def encode_documents(self, texts):
      return [np.array([2**16, 5], np.uint32) for _ in texts]

  path = str(tmp_path / "tokens")
  write_token_files(path, [Document("", "a", False), Document("", "b", True)], Large())
  # The vocabulary of the byte tokenizer, with which the folder is opened.
  edit_meta(path, vocab_size=257)
  assert open_token_files(path).split("train").document(0).tolist() == [2**16, 5]


def test_existing_folders_are_kept_and_failures_leave_nothing(folder, tmp_path):
  with pytest.raises(ValueError, match="is not empty"):
    write_token_files(folder, [Document("", "a", False)], ByteTokenizer())
  verify_token_files(folder)

  def failing():
    yield Document("", "a", False)
    raise ValueError("stop")

  for bad in (failing(), []):
    with pytest.raises(ValueError):
      write_token_files(str(tmp_path / "new"), bad, ByteTokenizer())
  assert os.listdir(tmp_path) == ["tokens"]


def truncate(name, size):
  return lambda folder: os.truncate(os.path.join(folder, name), size)


def remove(name):
  return lambda folder: os.remove(os.path.join(folder, name))


def flip(name, offset):
  def damage(folder):
    path = pathlib.Path(folder, name)
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)

  return damage


def fifo(name):
  def damage(folder):
    remove(name)(folder)
    os.mkfifo(os.path.join(folder, name))

  return damage


def overwrite_index(change):
  def damage(folder):
    path = os.path.join(folder, "index.npy")
    np.save(path, change(np.load(path)))
    with open(os.path.join(folder, "meta.json")) as file:
      sums = json.load(file)["sha256"]
    with open(path, "rb") as file:
      edit_meta(folder, sha256={**sums, "index.npy": hashlib.sha256(file.read()).hexdigest()})

  return damage


def swap_first_documents(index):
  index[1], index[2] = index[2], index[1]
  return index


@pytest.mark.parametrize(
  "damage,message",
  [
    (truncate("tokens.bin", 11), r"tokens.bin is damaged: expected \d+ bytes .* found 11"),
    (truncate("tokens.bin", 0), "tokens.bin is damaged"),
    (truncate("tokens.bin", 5000), "tokens.bin is damaged.* found 5000"),
    (truncate("index.npy", 150), "index.npy is damaged"),
    (truncate("index.npy", 0), "index.npy is damaged"),
    (
      overwrite_index(lambda index: index[:-1]),
      r"index.npy is damaged: expected int64 of shape \(6,\), found int64 of shape \(5,\)",
    ),
    (overwrite_index(lambda index: index.astype(np.int32)), "index.npy is damaged: expected int64"),
    (
      overwrite_index(lambda index: index + 1),
      "index.npy is damaged: expected rising offsets from 0",
    ),
    (overwrite_index(swap_first_documents), "index.npy is damaged: expected rising offsets"),
    (truncate("meta.json", 20), "meta.json: no JSON that can be understood"),
    (flip("index.npy", -1), "index.npy is damaged: expected sha256"),
    (flip("index.npy", 20), "index.npy is damaged: expected sha256"),
    (fifo("index.npy"), "index.npy is a FIFO"),
    (fifo("meta.json"), "meta.json is a FIFO"),
    (fifo("tokens.bin"), "tokens.bin is damaged"),
    (remove("tokens.bin"), "tokens.bin cannot be read: No such file"),
    (remove("index.npy"), "index.npy cannot be read: No such file"),
    (remove("meta.json"), "meta.json cannot be read: No such file .*prepare-data"),
    (
      lambda folder: edit_meta(folder, format_version=2),
      "expected format sparsek-tokens version 1, found format 'sparsek-tokens' version 2",
    ),
    (
      lambda folder: edit_meta(folder, num_tokens="7"),
      "expected 'num_tokens' of type int, found '7'",
    ),
    (
      lambda folder: edit_meta(folder, num_counted=7),
      "expected 'num_counted' of type dict, found 7",
    ),
    (
      lambda folder: edit_meta(folder, dtype="int8"),
      "expected dtype uint16 or uint32, found 'int8'",
    ),
    (lambda folder: edit_meta(folder, heldout=[99]), "held-out documents from 0 to 4, found 99"),
    (
      lambda folder: edit_meta(folder, tokenizer={}),
      "expected name, fingerprint in 'tokenizer', found nothing",
    ),
    (
      lambda folder: edit_meta(folder, tokenizer={"name": "byte", "fingerprint": "0"}),
      "another byte tokenizer",
    ),
    (
      lambda folder: edit_meta(folder, tokenizer={"name": "bpe", "fingerprint": "0"}),
      "tokenizer.json cannot be read",
    ),
    (
      lambda folder: edit_meta(folder, vocab_size=300),
      "expected a tokenizer with 300 ids, found 257",
    ),
  ],
)
def test_damaged_folders_are_refused(folder, damage, message):
  damage(folder)
  with pytest.raises(ValueError, match=message):
    open_token_files(folder)


WRONG_VALUES = (
  None,
  True,
  -1,
  0,
  7,
  10**30,
  1.5,
  float("nan"),
  "",
  "x",
  "\ud800",
  [],
  [-1],
  [[]],
  {},
  {"x": -1},
  {"../x": "y"},
)


def mutations(text):
  """Yields damaged versions of the text of a meta.json."""
  meta = json.loads(text)
  for holder in (meta, *(value for value in meta.values() if isinstance(value, dict))):
    for key, value in list(holder.items()):
      for wrong in WRONG_VALUES:
        holder[key] = wrong
        yield json.dumps(meta)
      del holder[key]
      yield json.dumps(meta)
      holder[key] = value
  for key in meta:
    yield f"{text.rstrip()[:-1]}, {json.dumps(key)}: 7}}"  # the key twice
  yield from ('"x": ' + "[" * 10**5, '{"num_tokens": ' + "1" * 5000 + "}", "[]", "", "null")
  rng = random.Random(0)
  for _ in range(200):
    at = rng.randrange(len(text))
    yield text[:at] + chr(rng.randrange(32, 127)) + text[at + 1 :]


def test_no_mutation_of_meta_json_passes_or_ends_in_a_traceback(folder):
  """Each one is refused in a sentence, or changes nothing that is read from it."""

  def read():
    dataset = open_token_files(folder)
    return dataset.fingerprint, [
      (split.num_bytes, split.num_counted, split.starts.tolist(), split.lengths.tolist())
      for split in map(dataset.split, ("train", "heldout"))
    ]

  path, expected, refused = pathlib.Path(folder, "meta.json"), read(), 0
  text = path.read_text()
  for mutated in mutations(text):
    path.write_text(mutated)
    try:
      actual = read()
    except UsageError as error:
      refused += 1
      assert len(str(error)) < 800 and "\n" not in str(error) and str(error).encode()
    else:
      assert actual == expected, mutated
  assert refused > 400


@pytest.mark.parametrize(
  "changes",
  [
    {"num_bytes": {"train": -1, "heldout": 3}},
    {"num_counted": {"train": 1.5}},
    {"num_bytes": {"train": True, "heldout": 3}},
    {"heldout": [True]},
    {"num_documents": True},
    {"sha256": {"tokens.bin": "", "index.npy": "", "../x": ""}},
    {"sha256": {"tokens.bin": 5, "index.npy": ""}},
    {"num_tokens": 10**30},
    {"vocab_size": 10**4000},
  ],
)
def test_wrong_values_are_refused_without_a_checksum_too(folder, changes):
  edit_meta(folder, **changes)
  with pytest.raises(UsageError, match="meta.json is damaged: expected"):
    open_token_files(folder)


@pytest.mark.parametrize(
  "number,expected",
  [(signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit), (signal.SIGINT, KeyboardInterrupt)],
)
def test_signals_leave_nothing(tmp_path, number, expected):
  def stopped():
    yield Document("", "a", False)
    assert len(os.listdir(tmp_path)) == 1
    os.kill(os.getpid(), number)
    yield Document("", "b", False)

  handler = signal.getsignal(number)
  with pytest.raises(expected):
    write_token_files(str(tmp_path / "new"), stopped(), ByteTokenizer())
  assert os.listdir(tmp_path) == [] and signal.getsignal(number) == handler


def test_what_killed_processes_left_is_removed_and_what_runs_is_kept(tmp_path):
  folder = str(tmp_path / "new")
  abandoned, running = temporary_name(folder), temporary_name(folder)
  others = [
    temporary_name(str(tmp_path / "new.other")),
    str(tmp_path / ".new.x.unfinished"),
    str(tmp_path / ".new.tmp"),
  ]
  for path in (abandoned, running, *others):
    os.mkdir(path)
  handle = os.open(running, os.O_RDONLY)
  fcntl.flock(handle, fcntl.LOCK_EX)
  write_token_files(folder, [Document("", "a", False)], ByteTokenizer())
  assert sorted(os.listdir(tmp_path)) == sorted(map(os.path.basename, (folder, running, *others)))
  os.close(handle)


def test_a_folder_in_the_making_is_locked(tmp_path):
  folder = str(tmp_path / "new")

  def texts():
    remove_abandoned(folder)
    yield Document("", "a", False)

  write_token_files(folder, texts(), ByteTokenizer())
  verify_token_files(folder)
  assert os.listdir(tmp_path) == ["new"]


def test_a_damaged_tokenizer_is_refused(bpe, tmp_path):
  path = str(tmp_path / "tokens")
  write_token_files(path, [Document("", "a", False)], bpe)
  with open(os.path.join(path, "tokenizer.json"), "a") as file:
    file.write(" ")
  with pytest.raises(ValueError, match="tokenizer.json is damaged: expected sha256"):
    open_token_files(path)


def test_verify_finds_what_sizes_do_not_show(folder):
  with open(os.path.join(folder, "tokens.bin"), "r+b") as file:
    file.write(b"\x00")
  open_token_files(folder)
  with pytest.raises(ValueError, match="tokens.bin is damaged: expected sha256"):
    verify_token_files(folder)


def test_no_such_folder():
  with pytest.raises(ValueError, match="nowhere.*no such folder.*prepare-data"):
    batches.open_data("nowhere")


def test_a_text_is_no_folder_of_token_files(tmp_path):
  (tmp_path / "a b.txt").write_text("text")
  advice = f"is a file; `sparsek prepare-data '--sources={tmp_path}/a b.txt' --output=FOLDER` makes"
  with pytest.raises(ValueError, match=re.escape(advice)):
    batches.open_data(str(tmp_path / "a b.txt"))


def test_no_such_split(folder):
  with pytest.raises(ValueError, match="split='test' is not one of train, heldout"):
    open_token_files(folder).split("test")


def test_sources(tmp_path):
  (tmp_path / "b").mkdir()
  (tmp_path / ".hidden").mkdir()
  for name in ("b/x.txt", "a.md", "c.bin", ".hidden/h.txt", ".h.txt"):
    (tmp_path / name).write_text(name)
  (tmp_path / "empty.txt").touch()
  (tmp_path / "d.jsonl").write_text(
    '{"text": "one"}\n\n{"text": "two\\u00e9", "id": 3}\n{"text": ""}\n'
  )
  folder = str(tmp_path)

  def texts(*sources, **options):
    return [document.text for document in documents(sources, **options)]

  assert texts(folder) == ["a.md", "one", "twoé", "b/x.txt"]
  assert texts(folder, extensions=[".bin", ".md"]) == ["a.md", "c.bin"]
  assert texts(str(tmp_path / "c.bin"), str(tmp_path / "d.jsonl")) == ["c.bin", "one", "twoé"]
  names = [document.name for document in documents([folder])]
  assert names[1:3] == [f"{folder}/d.jsonl:1", f"{folder}/d.jsonl:3"]
  assert "".join(texts(str(tmp_path / ".hidden"))) == ".hidden/h.txt", (
    "what is named outright is read"
  )
  for sources in ([str(tmp_path / "empty.txt")], []):
    with pytest.raises(ValueError, match="no documents"):
      list(documents(sources))
  with pytest.raises(ValueError, match="missing.*no such file"):
    list(documents([str(tmp_path / "missing")]))


@pytest.mark.parametrize(
  "line,message",
  [
    (b"{", "lines.jsonl:2: no JSON that can be understood"),
    (b'"text"', "lines.jsonl:2: expected a JSON object with the field 'text', found a str"),
    (b'{"body": "x"}', "lines.jsonl:2: expected text in the field 'text', found the fields 'body'"),
    (b'{"text": 5}', "lines.jsonl:2: expected text in the field 'text', found a int"),
    (b'{"text": "\xff"}', "lines.jsonl:2: not UTF-8: byte 0xff at offset 10"),
    (b'{"text": "\\ud800"}', "lines.jsonl:2: the text has a lone surrogate"),
  ],
)
def test_bad_json_lines_are_named(tmp_path, line, message):
  path = tmp_path / "lines.jsonl"
  path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
  with pytest.raises(ValueError, match=message):
    list(documents([str(path)]))


def test_what_is_not_utf8_is_named_or_replaced(tmp_path):
  path = tmp_path / "latin1.txt"
  path.write_bytes("café au lait".encode("latin1"))
  with pytest.raises(ValueError, match="latin1.txt: not UTF-8: byte 0xe9 at offset 3"):
    list(documents([str(path)]))
  assert (
    "".join(document.text for document in documents([str(path)], errors="replace"))
    == "caf\ufffd au lait"
  )
  (tmp_path / "x.jsonl").write_bytes(b'{"text": "a\xff"}\n{"text": "\\udc00"}')
  assert [
    document.text for document in documents([str(tmp_path / "x.jsonl")], errors="replace")
  ] == ["a\ufffd", "?"]
  with pytest.raises(ValueError, match="errors='ignore'"):
    list(documents([str(path)], errors="ignore"))


def test_split_follows_the_text(tmp_path):
  lines = [json.dumps({"text": f"document {i}"}) for i in range(400)]
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  (tmp_path / "b.jsonl").write_text("\n".join(reversed(lines)))
  a, b = (
    {d.text for d in documents([str(tmp_path / name)]) if d.held_out}
    for name in ("a.jsonl", "b.jsonl")
  )
  assert a == b and 8 <= len(a) <= 35
  assert not any(d.held_out for d in documents([str(tmp_path / "a.jsonl")], heldout_fraction=0))
  larger = {d.text for d in documents([str(tmp_path / "a.jsonl")], heldout_fraction=0.3)}
  assert a <= larger
  with pytest.raises(ValueError, match="heldout_fraction=1"):
    list(documents([str(tmp_path)], heldout_fraction=1))


def test_few_documents_still_have_two_sides(tmp_path):
  path = tmp_path / "one.txt"
  text = "".join(f"line {i}\n" for i in range(1000))
  path.write_text(text)
  first, second = documents([str(path)])
  assert (first.held_out, second.held_out) == (False, True)
  assert (
    first.text + second.text == text
    and first.text.endswith("\n")
    and 0.04 < len(second.text) / len(text) < 0.06
  )
  assert [d.text for d in documents([str(path)], heldout_fraction=0)] == [text]
  path.write_text("x")
  assert [(d.text, d.held_out) for d in documents([str(path)])] == [("x", False)]
  for i in range(10):
    pair = [tmp_path / "first.txt", tmp_path / "second.txt"]
    for file in pair:
      file.write_text(f"{file.name} {i}")
    assert {d.held_out for d in documents(list(map(str, pair)))} == {False, True}
