"""The description on a package index: README.md with links that lead there from anywhere."""

import pathlib
import re

import setuptools

HOME = "https://github.com/sparsek/sparsek"
PICTURES = "https://raw.githubusercontent.com/sparsek/sparsek/main"


def absolute(match: re.Match) -> str:
  """Returns a Markdown link with an absolute target."""
  text, target = match.groups()
  base = PICTURES if target.endswith(".png") else f"{HOME}/blob/main"
  return f"{text}({base}/{target})"


readme = pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8")
setuptools.setup(
  long_description=re.sub(r"(!?\[[^]]*\])\((?!https?:|#)([^)\s]+)\)", absolute, readme)
)
