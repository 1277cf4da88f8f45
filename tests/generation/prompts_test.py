"""Prompts as experiments.generate reads, encodes and shows them."""

from types import SimpleNamespace

import pytest

from sparsek.data.tokenizer import ByteTokenizer
from sparsek.errors import UsageError
from sparsek.generation import prompts
from sparsek.generation.session import AHEAD
from sparsek.generation.text_stream import TextStream
from tests.helpers import spm


def test_a_text_begins_once():
  w = spm().encode("w")[0]
  rows = prompts.new_texts(spm(), ["w", "<s>w", ""], special_tokens=True)
  assert [ids[:2] for ids in rows] == [[1, w], [1, w], [1]]


def test_names_of_special_tokens_are_text_by_default():
  (ids,) = prompts.new_texts(spm(), ["<s>w"])
  assert ids[0] == 1 and ids[1] != spm().encode("w")[0]


@pytest.mark.parametrize(
  "content, texts",
  [
    (b"a\nb", ["a", "b"]),
    (b"a\r\n\r\nb\r\n", ["a", "", "b"]),
    (b"\xef\xbb\xbfa\n", ["a"]),
    (b"\n", [""]),
  ],
)
def test_prompts_are_lines(content, texts, tmp_path):
  (tmp_path / "prompts").write_bytes(content)
  assert prompts.read_prompts(str(tmp_path / "prompts")) == texts


def test_a_file_of_prompts_that_is_refused(tmp_path):
  (tmp_path / "prompts").write_bytes(b"a\ncaf\xe9\n")
  with pytest.raises(UsageError, match="is not UTF-8: byte 0xe9 in line 2"):
    prompts.read_prompts(str(tmp_path / "prompts"))


@pytest.mark.parametrize("rows", (1, 2))
@pytest.mark.parametrize("group", (1, AHEAD))
def test_the_speed_is_that_of_whole_groups_without_compiling(group, rows, monkeypatch, capsys):
  """Too few tokens have none: the first group compiles, and a part of one takes as long as all."""
  clock = SimpleNamespace(now=0.0)
  monkeypatch.setattr(prompts, "time", SimpleNamespace(perf_counter=lambda: clock.now))

  def turn(steps):
    """Draws the first tokens with the prompt, the others in groups of 4 steps a second."""
    for step in range(steps):
      if step == 0:
        clock.now += 1e3
      elif (step - 1) % group == 0:
        clock.now += group / 4 + 1e4 * (step == 1)
      yield [ord("a")] * rows

  for steps in (0, 1, 2, 3, AHEAD, AHEAD + 1, 2 * AHEAD, 2 * AHEAD + 1, 2 * AHEAD + 2, 100):
    streams = [TextStream(ByteTokenizer()) for _ in range(rows)]
    session = SimpleNamespace(stop=None)
    told = prompts.write_texts(session, turn(steps), streams, [""] * rows, False)
    speed = f", {4 * rows}.0 tokens/s" if steps > 2 * AHEAD else ""
    assert told == f"{steps * rows} new ones{speed}"
    assert capsys.readouterr().out.count("a") == steps * rows
