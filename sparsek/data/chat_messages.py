"""Chat templates: texts in Jinja that turn messages into the prompt that a model was trained on.

They are those of the files beside a tokenizer.json: chat_template.jinja, or the "chat_template" of
tokenizer_config.json, one template or several with names. Rendering needs the package jinja2.
"""

import dataclasses
import datetime
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from sparsek.errors import UsageError
from sparsek.storage import files

FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
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
      UsageError: where the template cannot be read, or refuses the messages.
    """
    chat = [dict(message) for message in messages]
    if not add_generation_prompt:
      chat[-1]["content"] += _END
    import jinja2

    try:
      text = _compiled(self.text).render(
        messages=chat, add_generation_prompt=add_generation_prompt, **self.tokens
      )
    except (jinja2.TemplateError, TypeError) as error:
      raise UsageError(f"the chat template refuses the messages: {error}") from None
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
  config_path, path = (os.path.join(folder, name) for name in (TOKENIZER_CONFIG, FILE))
  config = files.read_json_object(config_path) if os.path.lexists(config_path) else {}
  tokens = {name: _content(value) for name, value in config.items() if name.endswith("_token")}
  tokens = {name: text for name, text in tokens.items() if isinstance(text, str)}
  if os.path.lexists(path):
    try:
      given: Any = files.read_at_most(path, _MAX_BYTES, FILE).decode("utf-8")
    except UnicodeDecodeError:
      raise UsageError(f"{path} is not UTF-8") from None
  else:
    given = config.get("chat_template")
  if given is None:
    return {}
  named = [{"name": DEFAULT, "template": given}] if isinstance(given, str) else given
  try:
    return {str(of["name"]): ChatTemplate(_text(of["template"]), tokens) for of in named}
  except (KeyError, TypeError):
    raise UsageError(f"{config_path}: chat_template is no text and no list of named ones") from None


def bos_token(folder: str) -> str | None:
  """Returns the bos_token of a folder's tokenizer_config.json, or None."""
  path = os.path.join(folder, TOKENIZER_CONFIG)
  token = _content(files.read_json_object(path).get("bos_token")) if os.path.lexists(path) else None
  return token if isinstance(token, str) else None


def _content(token: Any) -> Any:
  return token.get("content") if isinstance(token, dict) else token


def _text(value: Any) -> str:
  if not isinstance(value, str):
    raise TypeError
  return value


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
