"""Flags that name files and folders, which all commands read alike.

A path is absolute from the moment it is parsed: records hold it so, messages say from where a
relative one was looked up, and `~` is expanded once. Words such as "stdlib" stay words.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

from absl import flags

from sparsek.storage.files import local_path

HF_PREFIX = "hf:"  # the same as huggingface.pretrained.PREFIX, which is slow to import
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_FOLDER_LIKE_A_STEP = re.compile(r"@[0-9]+/+$")  # the slash says that DIR@4/ is no step of DIR


def parse_path(
  text: str, words: Sequence[str] = (), reference: bool = False, absolute: bool = True
) -> str:
  """Returns the path that the text of a flag means.

  Args:
    text: the value of the flag.
    words: values that are not paths; a word that ends in a colon stands for all values that begin
      with it.
    reference: "hf:DIR" and "DIR@STEP" name models; prefix and step stay as they are.
    absolute: False leaves a relative path as it is.
  Raises:
    ValueError: with the reason, for a path that a run could not keep in its records.
  """
  if any(text.startswith(word) if word.endswith(":") else text == word for word in words):
    return text
  prefix = HF_PREFIX if reference and text.startswith(HF_PREFIX) else ""
  text = text.removeprefix(prefix)
  if not text:
    raise ValueError("must be a path, it is empty")
  if _UNPRINTABLE.search(text):
    raise ValueError(
      f"a path must be UTF-8 without control characters, or flags.txt could not hold it: {text!r}"
    )
  if text != text.strip():
    raise ValueError("a path must not begin or end with a space, which flags.txt could not hold")
  try:
    path = local_path(text, "path")
  except ValueError as error:
    raise ValueError(str(error).removeprefix(f"--path={text}: ")) from None
  if path.startswith("~"):
    raise ValueError(f"there is no user {text.split('/')[0]}; ./{text} is a file of this name")
  if absolute:
    is_folder = reference and _FOLDER_LIKE_A_STEP.search(path)
    path = _absolute(path) + (os.sep if is_folder else "")
  return prefix + path


def _absolute(path: str) -> str:
  """Returns an absolute path; ".." behind a link is the folder above the link's target."""
  try:
    return os.path.realpath(path) if ".." in path.split(os.sep) else os.path.abspath(path)
  except FileNotFoundError:
    raise ValueError("a relative path, and the working directory is gone") from None


def parse_paths(text: str, words: Sequence[str] = (), absolute: bool = True) -> list[str]:
  """Returns the paths of a list separated by commas, or one existing path that has commas."""
  parts = [text]
  if "," in text and not os.path.exists(os.path.expanduser(text)):
    parts = text.split(",")
  return [parse_path(part, words, absolute=absolute) for part in parts]


class _Path(flags.ArgumentParser):
  """A parser of one path: `parse_path`."""

  syntactic_help = "a path of this machine's file system"

  def __init__(self, **options):
    self._options = options

  def parse(self, argument: str) -> Any:
    return parse_path(argument, **self._options)

  def flag_type(self) -> str:
    return "path"


class _Paths(_Path):
  """A parser of several paths: `parse_paths`."""

  syntactic_help = "paths of this machine's file system, separated by commas"

  def parse(self, argument: str) -> list[str]:
    return parse_paths(argument, **self._options)


class _PathsFlag(flags.MultiFlag):
  """A flag of paths that may be given several times."""

  def __init__(self, parser: _Paths, name: str, help_text: str):
    super().__init__(parser, flags.ArgumentSerializer(), name, [], help_text)
    self.help = f"{help_text} May be given several times."  # absl's own words break the line

  def _parse(self, arguments):
    lists = super()._parse(arguments)
    return lists and [path for paths in lists for path in paths]


def path_flag(name: str, default: str | None, help_text: str, **options) -> flags.Flag:
  """Returns a flag that holds a path; `options` are those of `parse_path`."""
  return flags.Flag(_Path(**options), flags.ArgumentSerializer(), name, default, help_text)


def paths_flag(name: str, help_text: str, **options) -> flags.Flag:
  """Returns a flag that holds a list of paths, empty by default.

  It may be given several times, each time with one path or several separated by commas. A path that
  has a comma in its name is given alone. `options` are those of `parse_paths`.
  """
  return _PathsFlag(_Paths(**options), name, help_text)


def is_path(flag: flags.Flag) -> bool:
  """Returns whether a flag holds a path or paths."""
  return isinstance(flag.parser, _Path)


def shown(path: str) -> str:
  """Returns a path as a label: relative where it lies below the working directory."""
  relative = os.path.relpath(path)
  return path if relative.startswith("..") else relative
