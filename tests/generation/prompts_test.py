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
@pytest.mark.parametrize("late", (0.0, 0.9, 1e4), ids=("at once", "in the group's time", "later"))
@pytest.mark.parametrize("reading", (0.0, 0.5, 3.0))
def test_the_speed_is_that_which_lasts(reading, late, group, rows, monkeypatch, capsys):
  """The host may be late for the first group, and the second be ready; too few tokens tell none."""
  clock = SimpleNamespace(now=0.0)
  monkeypatch.setattr(prompts, "time", SimpleNamespace(perf_counter=lambda: clock.now))
  seconds = group / 4  # that a group takes on the device, and `reading` times as many to read

  def turn(steps):
    """Draws the first tokens with the prompt, the others in groups as `Session` dispatches them."""
    if not steps:
      return
    clock.now += 1e3
    yield [ord("a")] * rows
    ready = clock.now + seconds  # when the device has computed the group that comes next
    for first in range(1, steps, group):
      now = clock.now
      clock.now = max(now, ready) + late * seconds * (first == 1)
      # the group after it was dispatched before this one was read, where they come in groups
      ready = (max(now, ready) if group > 1 else clock.now + reading * seconds) + seconds
      for _ in range(first, min(first + group, steps)):
        yield [ord("a")] * rows
        clock.now += reading * seconds / group

  lasting = max(seconds, reading * seconds) if group > 1 else seconds * (1 + reading)
  least = prompts.LEAST_GROUPS * AHEAD + 1
  for steps in (0, 1, 2, 2 * AHEAD + 1, least - 1, least, least + 1, least + AHEAD, 200):
    streams = [TextStream(ByteTokenizer()) for _ in range(rows)]
    session = SimpleNamespace(stop=None)
    told = prompts.write_texts(session, turn(steps), streams, [""] * rows, False)
    speed = f", {rows * group / lasting:,.1f} tokens/s" if steps >= least else ""
    assert told == f"{steps * rows} new ones{speed}"
    assert capsys.readouterr().out.count("a") == steps * rows
