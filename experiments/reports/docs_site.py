"""Hooks of the site that `make docs` builds: files outside docs/, and drawings of kernels.

Pages in docs/ link to files of the repository as `../PATH`, as readers of the repository need it.
The site gets a copy of each such file, and the links lead there. A comment `<!-- docstring: PATH
-->` is followed on the site by the docstring of that module, as text.
"""

import ast
import os
import re
from typing import Any

OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
DOCSTRING = re.compile(r"<!-- docstring: (\S+) -->")


def address(path: str) -> str:
  """Returns where the site has its copy of a file; Markdown is copied as text, not as a page."""
  return f"files/{path}" + ".txt" * path.endswith(".md")


def outside_links(markdown: str) -> list[str]:
  """Returns the paths, from the repository's root on, that a page links to outside docs/."""
  return [path for path, _ in OUTSIDE.findall(markdown)]


def docstring(path: str) -> str:
  """Returns the docstring of a module."""
  with open(path, encoding="utf-8") as file:
    return ast.get_docstring(ast.parse(file.read())) or ""


def with_docstrings(markdown: str, root: str) -> str:
  """Adds the docstrings that comments of a page name."""

  def text(match):
    return f"```text\n{docstring(os.path.join(root, match[1]))}\n```"

  return DOCSTRING.sub(text, markdown)


def on_files(files: Any, config: Any) -> Any:
  """Adds the files that pages link to outside docs/; mkdocs calls it."""
  from mkdocs.structure.files import File

  root = os.path.dirname(config.config_file_path)
  linked: set[str] = set()
  for page in files.documentation_pages():
    linked.update(outside_links(page.content_string))
  for path in sorted(linked):
    files.append(
      File.generated(config, address(path), abs_src_path=os.path.normpath(os.path.join(root, path)))
    )
  return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
  """Leads links to the copies, and adds docstrings; mkdocs calls it."""
  root = os.path.dirname(config.config_file_path)
  markdown = OUTSIDE.sub(lambda match: f"]({address(match[1])})", markdown)
  return with_docstrings(markdown, root)
