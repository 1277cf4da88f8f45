"""Chat templates: the words around what a user says, up to where the model's answer begins."""

import json
import os
from collections.abc import Callable

from sparsek.data.document_end import TOKENIZER_CONFIG
from sparsek.errors import UsageError
from sparsek.storage import files

NONE, OF_MODEL = "none", "model"
PLACE = "{prompt}"  # of what the user says, in a template that is a plain text
TEMPLATE_FILE = "chat_template.jinja"
MAX_BYTES = 2**20
_JINJA = ("{{", "{%")

Chat = Callable[[str], str]


def check_template(value: str) -> None:
  """Raises UsageError unless --chat_template is none, model, or a file with a template."""
  if value not in (NONE, OF_MODEL):
    _read(value)


def template_text(value: str, folder: str) -> str:
  """Returns the text of a chat template, "" for none.

  Args:
    value: "none", "model", or the path of a file with a Jinja template, or with a text in which
      {prompt} is what the user says.
    folder: of the model's tokenizer, which may hold its own template.
  Raises:
    UsageError: where there is no such template.
  """
  if value == NONE:
    return ""
  if value != OF_MODEL:
    return _read(value)
  path = os.path.join(folder, TEMPLATE_FILE)
  if os.path.isfile(path):
    return files.read_at_most(path, MAX_BYTES).decode("utf-8", "replace")
  template = _config(folder).get("chat_template")
  if isinstance(template, list):  # several by name
    named = [row.get("template") for row in template if row.get("name") == "default"]
    template = named[0] if named else None
  if not isinstance(template, str):
    raise UsageError(
      f"--chat_template={OF_MODEL}: {folder} holds no {TEMPLATE_FILE}, and no chat_template in "
      f"{TOKENIZER_CONFIG}; give a file, or {NONE}"
    )
  return template


def in_template(template: str, folder: str) -> Chat:
  """Returns a function that puts what a user says into a template.

  Args:
    template: from `template_text`. One of Jinja is rendered, without access to anything else, as
      transformers does: a single message of the user, then the beginning of the answer.
    folder: of the tokenizer, whose configuration names bos and eos.
  Raises:
    UsageError: for a template that cannot be rendered, and where Jinja is not installed.
  """
  if not template:
    return str
  if not any(mark in template for mark in _JINJA):
    return lambda prompt: template.replace(PLACE, prompt)
  try:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment
  except ImportError:
    raise UsageError("--chat_template is one of Jinja: pip install jinja2") from None

  def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)

  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
  )
  environment.filters["tojson"] = lambda value, **options: json.dumps(
    value, ensure_ascii=False, indent=options.get("indent")
  )
  environment.globals["raise_exception"] = refuse
  names = {name: _token(_config(folder).get(name)) for name in ("bos_token", "eos_token")}

  def render(prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    try:
      return compiled.render(messages=messages, add_generation_prompt=True, **names)
    except Exception as error:  # a template may fail in any way
      raise UsageError(f"--chat_template cannot be rendered: {error}") from None

  try:
    compiled = environment.from_string(template)
  except jinja2.TemplateError as error:
    raise UsageError(f"--chat_template is no template of Jinja: {error}") from None
  render("a")
  return render


def _read(path: str) -> str:
  """Returns the content of a file with a template."""
  content = files.read_at_most(path, MAX_BYTES, "--chat_template").decode("utf-8", "replace")
  if PLACE not in content and not any(mark in content for mark in _JINJA):
    raise UsageError(f"--chat_template={path}: holds no {PLACE}, and is no template of Jinja")
  return content


def _config(folder: str) -> dict:
  path = os.path.join(folder, TOKENIZER_CONFIG)
  return files.read_json_object(path) if os.path.isfile(path) else {}


def _token(value: object) -> str:
  """Returns the text of a special token as tokenizer_config.json names it."""
  content = value.get("content") if isinstance(value, dict) else value
  return content if isinstance(content, str) else ""
