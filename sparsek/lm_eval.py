"""The model `sparsek` of lm-eval, EleutherAI's evaluation harness, which is a package of its own.

lm-eval 0.4 finds no models of other packages by itself. Importing this module makes the model known
to its function simple_evaluate, as model="sparsek", model_args="workdir=runs/mini". The command
`sparsek lm-eval` makes it known to lm-eval's own program.
"""

from typing import Any

import lm_eval.models  # noqa: F401  lm-eval registers its own models only where there are no others
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string

from sparsek.evaluation.harness import HarnessModel


@register_model("sparsek")
class SparsekLM(HarnessModel, LM):
  """A run that lm-eval evaluates; its arguments are those of `HarnessModel`."""

  @classmethod
  def create_from_arg_obj(
    cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
  ) -> "SparsekLM":
    """Returns the model of some arguments; `additional_config` gives way to `arg_dict`."""
    return cls(**{**(additional_config or {}), **arg_dict})

  @classmethod
  def create_from_arg_string(
    cls, arg_string: str, additional_config: dict[str, Any] | None = None
  ) -> "SparsekLM":
    """Returns the model of arguments in the form NAME=VALUE,..."""
    return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

  def remember(self, kind: str, arguments: tuple, answer: Any) -> None:
    """Gives an answer to lm-eval's cache of answers, --use_cache."""
    self.cache_hook.add_partial(kind, arguments, answer)
