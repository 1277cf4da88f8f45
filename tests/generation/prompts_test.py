"""Prompts as experiments.generate reads, encodes and shows them."""

import pytest

from sparsek.errors import UsageError
from sparsek.generation import prompts
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
