"""Extension of Griffe: examples in docstrings, indented by two spaces here, become code."""

import re

import griffe

PARAGRAPH = re.compile(r"(?<=\n\n)(?: {2,}\S.*(?:\n|\Z)|\n(?= {2,}))+")


def marked(text: str) -> str:
  """Returns a docstring whose indented paragraphs after unindented ones are blocks of code."""

  def indent(match):
    before = match.string[: match.start()].rstrip("\n").rpartition("\n")[2]
    if before.startswith(" "):  # inside Args or the like
      return match[0]
    return re.sub(r"^(?=.)", "    ", match[0], flags=re.M)

  # The section "Example:" of this style would be text.
  return PARAGRAPH.sub(indent, re.sub(r"^Example:\n(?= )", "**Example:**\n\n", text, flags=re.M))


class IndentedCode(griffe.Extension):
  """The extension, which mkdocs.yml names."""

  def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
    """Marks the code of an object's docstring."""
    if obj.docstring:
      obj.docstring.value = marked(obj.docstring.value)
