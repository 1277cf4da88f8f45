"""Chat templates: the words around what a user says, up to where the model's answer begins."""

from collections.abc import Callable

from sparsek.data.chat_messages import DEFAULT, FILE, ChatTemplate, find_templates, special_tokens
from sparsek.data.document_end import TOKENIZER_CONFIG
from sparsek.errors import UsageError
from sparsek.storage import files

NONE, OF_MODEL = "none", "model"
PLACE = "{prompt}"  # of what the user says, in a template that is a plain text
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
  templates = find_templates(folder)
  if DEFAULT not in templates:
    raise UsageError(
      f"--chat_template={OF_MODEL}: {folder} holds no {FILE}, and no chat_template in "
      f"{TOKENIZER_CONFIG}; give a file, or {NONE}"
    )
  return templates[DEFAULT].text


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
  of_messages = ChatTemplate(template, special_tokens(folder))

  def render(prompt: str) -> str:
    return of_messages.render([{"role": "user", "content": prompt}])

  try:
    render("a")
  except UsageError as error:
    raise UsageError(f"--chat_template: {error}") from None
  return render


def _read(path: str) -> str:
  """Returns the content of a file with a template."""
  try:
    content = files.read_at_most(path, MAX_BYTES, "--chat_template").decode()
  except UnicodeDecodeError:
    raise UsageError(f"--chat_template={path} is not UTF-8") from None
  if PLACE not in content and not any(mark in content for mark in _JINJA):
    raise UsageError(f"--chat_template={path}: holds no {PLACE}, and is no template of Jinja")
  return content
