import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from sparsek.data.tokenizer import ByteTokenizer, train_bpe
from sparsek.generation.text_stream import TextStream, stream_text
from tests.helpers import metaspace, spm

TEXT = "naïve €5 — 日本語 🙂!"


@functools.cache
def bpe():
  return train_bpe([TEXT * 3, "日本 €🙂🙂 words and words"], 300)


TOKENIZERS = {"byte": ByteTokenizer, "bpe": bpe, "spm": spm, "metaspace": metaspace}


def some_ids(tokenizer, rng, count):
  """Ids of text, single bytes that are no text, and ids that write nothing."""
  text = tokenizer.encode("".join(rng.choice(list(TEXT + "world Hello"), count)))
  ids = [int(rng.integers(tokenizer.vocab_size + 9)) if rng.random() < 0.3 else i for i in text]
  return ids[:count]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_of_all_turns_are_the_text_of_all_tokens(name):
  """Whatever the tokens, prompts and turns, and however their state travels."""
  tokenizer, rng = TOKENIZERS[name](), np.random.default_rng(0)
  for _ in range(60):
    ids, shown, state = [], "", {}
    for _ in range(rng.integers(1, 5)):
      stream = TextStream(tokenizer, **json.loads(json.dumps(state)))
      prompt = tokenizer.encode("".join(rng.choice(list(TEXT), rng.integers(4))))
      drawn = some_ids(tokenizer, rng, rng.integers(12))
      shown += stream.turn(prompt) + "".join(map(stream.push, drawn)) + stream.end_turn()
      ids, state = [*ids, *prompt, *drawn], stream.state
      assert len(state["before"]) <= 8 and shown == tokenizer.decode(ids)[: len(shown)]
      assert len(tokenizer.decode(ids)) - len(shown) == state["unfinished"]
    assert shown + stream.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_stream_knows_the_text_before_it(name):
  tokenizer, rng = TOKENIZERS[name](), np.random.default_rng(1)
  for _ in range(60):
    prompt = some_ids(tokenizer, rng, rng.integers(30))
    drawn = some_ids(tokenizer, rng, rng.integers(20))
    before = tokenizer.decode(prompt)
    text = tokenizer.decode([*prompt, *drawn])[len(before) :]
    assert "".join(stream_text(tokenizer, drawn, before=prompt)) == text
    if text:
      begin = int(rng.integers(len(text)))
      stop = text[begin : begin + int(rng.integers(1, 4))]
      pieces = stream_text(tokenizer, drawn, [stop, "never there"], prompt)
      assert "".join(pieces) == text[: text.find(stop)]


def test_the_space_of_the_first_new_token_is_shown_and_stops():
  tokenizer = spm()
  ids = tokenizer.encode("Hello world")
  prompt, drawn = ids[:-4], ids[-4:]
  assert list(stream_text(tokenizer, drawn, before=prompt)) == [" w", "or", "l", "d"]
  assert list(stream_text(tokenizer, drawn, [" world"], prompt)) == []
  assert tokenizer.encode("lo", continues=True) == tokenizer.encode("Hello", continues=True)[3:]


def test_of_several_stop_strings_the_first_complete_one_counts():
  """However the text is cut into tokens."""
  for size in range(1, 5):
    pieces = ["xabcd"[at : at + size] for at in range(0, 5, size)]
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(pieces[i] for i in ids))
    assert "".join(stream_text(tokenizer, range(len(pieces)), ["abcd", "bc", "c"])) == "xa"


def test_a_turn_loses_nothing_that_was_kept_back():
  stream = TextStream(ByteTokenizer(), ["never"])
  assert "".join(map(stream.push, b"so nev")) == "so " and stream.turn(b" or") == "nev or"


def test_tokens_that_write_nothing_part_no_character():
  stream = TextStream(spm())
  ids = [3 + 0xE2, *[1, 10**6] * 20, 3 + 0x82, 2, 3 + 0xAC]
  assert "".join(map(stream.push, ids)) == spm().decode(ids) == "€"


@pytest.mark.parametrize(
  "name, ids", [("byte", [0xE2]), ("spm", [3 + 0xE2]), ("spm", [3 + 0xE2, 1]), ("bpe", None)]
)
def test_unfinished_characters_take_constant_time(name, ids):
  """Each token is decoded with a few others; nothing but the last one can become a character."""
  tokenizer, decoded = TOKENIZERS[name](), []
  ids = ids or tokenizer.encode("Ω")[:1]
  counting = SimpleNamespace(decode=lambda ids: decoded.append(len(ids)) or tokenizer.decode(ids))
  stream = TextStream(counting)
  text = "".join(stream.push(i) for i in ids * 300)
  assert text + stream.finish() == tokenizer.decode(ids * 300) == "\ufffd" * 300
  assert max(decoded) <= 9 and len(decoded) <= 3 * 300 * len(ids) + 1 and len(text) == 299


@pytest.mark.parametrize("text", ["plain", "naïve €5 — 日本語 🙂!", "🙂", ""])
def test_streamed_text_never_holds_half_a_character(text):
  pieces = list(stream_text(ByteTokenizer(), text.encode()))
  assert pieces == list(text)


def test_streamed_text_keeps_what_is_no_text():
  broken = b"a\xff\xfeb\xe2\x82"
  assert "".join(stream_text(ByteTokenizer(), broken)) == broken.decode(errors="replace")


@pytest.mark.parametrize(
  "stop, text",
  [
    (["€"], "naïve "),
    (["5 — 日"], "naïve €"),
    (["x", "e €", " €"], "naïv"),
    (["—!"], TEXT),
    (["🙂!?"], TEXT),
    ([""], TEXT),
  ],
)
def test_stop_strings_are_found_across_tokens(stop, text):
  taken = []
  pieces = list(
    stream_text(ByteTokenizer(), (taken.append(token) or token for token in TEXT.encode()), stop)
  )
  assert "".join(pieces) == text
  assert text == TEXT or len(taken) <= len((text + max(stop, key=len)).encode())


class WordTokenizer:
  """Writes a space between words, so that a token reads differently after another."""

  def decode(self, ids):
    return " ".join("word" + str(i) for i in ids)


def test_streamed_text_of_tokens_that_join():
  assert list(stream_text(WordTokenizer(), [1, 2, 3])) == ["word1", " word2", " word3"]
