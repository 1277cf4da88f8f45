"""Chat templates: texts in Jinja that turn messages into the prompt that a model was trained on.

They are those of the files beside a tokenizer.json: chat_template.jinja, or the "chat_template" of
tokenizer_config.json, one template or several with names. Rendering needs the package jinja2.
"""

import dataclasses
import datetime
import functools
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from sparsek.data.document_end import TOKENIZER_CONFIG
from sparsek.errors import UsageError
from sparsek.storage import files

FILE = "chat_template.jinja"
DEFAULT = "default"
_MAX_BYTES = 2**22
_END = "CONTINUE_FINAL_MESSAGE_TAG "  # marks where an unfinished message ends


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A template and what it may refer to.

  Attributes:
    text: in Jinja.
    tokens: special tokens by name: bos_token, eos_token, ...
  """

  text: str
  tokens: Mapping[str, str]

  def render(
    self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """Returns the prompt of messages, each with a "role" and a "content".

    Args:
      messages: of a chat.
      add_generation_prompt: end with what begins an answer; False: the last message is unfinished,
        and the prompt ends with it.
    Raises:
      UsageError: where the template cannot be read or refuses the messages, and where jinja2 is not
        installed.
    """
    chat = [dict(message) for message in messages]
    if not add_generation_prompt:
      chat[-1]["content"] += _END
    if importlib.util.find_spec("jinja2") is None:
      raise UsageError("the chat template is one of Jinja: pip install jinja2")
    try:
      text = _compiled(self.text).render(
        messages=chat, add_generation_prompt=add_generation_prompt, **self.tokens
      )
    except Exception as error:  # a template may fail in any way
      raise UsageError(f"the chat template cannot be rendered: {error}") from None
    if add_generation_prompt:
      return text
    end = text.rfind(_END.strip())
    if end < 0:
      raise UsageError("the chat template leaves out the last message, which is to be continued")
    # A template that trims messages has taken the spaces away with the mark's own.
    return text[:end] if text.startswith(_END, end) else text[:end].rstrip()


def find_templates(folder: str) -> dict[str, ChatTemplate]:
  """Returns the templates of a tokenizer's folder by name; the only one is called "default".

  Raises:
    UsageError: where a file cannot be understood.
  """
  path = os.path.join(folder, FILE)
  if os.path.lexists(path):
    given: Any = files.read_at_most(path, _MAX_BYTES, FILE).decode("utf-8", "replace")
  else:
    given = _config(folder).get("chat_template")
  if given is None:
    return {}
  named = [{"name": DEFAULT, "template": given}] if isinstance(given, str) else given
  tokens = special_tokens(folder)
  try:
    return {str(of["name"]): ChatTemplate(_text(of["template"]), tokens) for of in named}
  except (KeyError, TypeError):
    path = os.path.join(folder, TOKENIZER_CONFIG)
    raise UsageError(f"{path}: chat_template is no text and no list of named ones") from None


def special_tokens(folder: str) -> dict[str, str]:
  """Returns the special tokens that a folder's tokenizer_config.json names: bos_token, ..."""
  named = {name: token for name, token in _config(folder).items() if name.endswith("_token")}
  texts = {
    name: token.get("content") if isinstance(token, dict) else token
    for name, token in named.items()
  }
  return {name: text for name, text in texts.items() if isinstance(text, str)}


def _config(folder: str) -> dict:
  path = os.path.join(folder, TOKENIZER_CONFIG)
  return files.read_json_object(path) if os.path.lexists(path) else {}


def _text(value: Any) -> str:
  if not isinstance(value, str):
    raise TypeError
  return value


@functools.lru_cache(maxsize=8)
def _compiled(text: str) -> Any:
  """Returns the template of a text, which sees what templates see in transformers."""
  import jinja2
  import jinja2.ext
  import jinja2.sandbox

  def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)

  def to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = to_json
  environment.globals["raise_exception"] = refuse
  environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  return environment.from_string(text)
