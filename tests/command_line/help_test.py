"""The short help of every command: whole sentences, on one line each, in the order of use."""

import importlib
import re

import pytest

from sparsek.__main__ import commands
from sparsek.command_line import help as help_text
from sparsek.command_line import invocation
from sparsek.command_line.definer import names_of

LONG_DEFAULT = 40  # characters of a default that may stand on a line of its own


@pytest.fixture(params=commands())
def module(request, monkeypatch):
  monkeypatch.setenv(invocation.STARTED_BY, "sparsek")
  return importlib.import_module(f"sparsek.experiments.{request.param}")


def listed(module):
  """Returns the flags that --help lists, in its order."""
  groups = help_text.groups(module.FLAGS)
  return [flag for members in groups.values() for flag in members if flag.common]


def lines_of(text, flag):
  """Returns the lines of a flag in the text of --help."""
  found = re.search(rf"^  {re.escape(flag.usage)} +\S.*(\n {{5,}}.*)*", text, re.MULTILINE)
  return [line.strip() for line in found[0].removeprefix(f"  {flag.usage}").splitlines()]


def test_each_flag_has_its_first_sentence_and_default_on_a_line(module):
  text = help_text.help_of(module.FLAGS, module.__doc__)
  assert "..." not in text and max(map(len, text.splitlines())) <= help_text.WIDTH
  for flag in listed(module):
    default = f" [{flag.default}]" if flag.default else ""
    lines = lines_of(text, flag)
    sentence = " ".join(lines).removesuffix(default)
    whole = invocation.as_typed(flag.text)
    assert re.match(rf"{re.escape(sentence)}(\.|\. .*)$", whole, re.DOTALL), flag.name
    assert len(lines) == (2 if len(default) > LONG_DEFAULT else 1), flag.name


def test_the_flags_of_a_command_come_in_the_order_of_their_definition(module):
  own = [flag.name for flag in help_text.groups(module.FLAGS).get("command", ())]
  assert own == [name for name in names_of(module.FLAGS) if name in own]


def test_the_size_of_an_imported_model_is_no_common_flag():
  shown = {
    name: {flag.name for flag in listed(importlib.import_module(f"sparsek.experiments.{name}"))}
    for name in ("import_hf", "pretrain")
  }
  assert not shown["import_hf"] & set(help_text.OF_SIZE) and "k" in shown["import_hf"]
  assert shown["pretrain"] >= set(help_text.OF_SIZE)


def test_paragraphs_are_filled_and_commands_stay_as_they_are(module):
  described = help_text.help_of(module.FLAGS, module.__doc__).split("\n\n")
  for before in module.__doc__.strip().split("\n\n"):
    typed = invocation.as_typed(before)
    found = [text for text in described if text.split() == typed.split()]
    assert len(found) == 1, before
    if before.startswith(" "):
      assert found == [typed]
    else:  # no word would fit on the line before
      lines = found[0].splitlines()
      for line, after in zip(lines, lines[1:]):
        assert len(line) + 1 + len(after.split()[0]) > help_text.WIDTH, line
