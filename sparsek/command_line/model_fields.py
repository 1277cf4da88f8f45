"""The flag --model, which sets the fields of a model that have no flag of their own.

Such fields describe the architecture of pretrained models: an imported configuration sets them,
and hardly anybody gives them by hand.
"""

from collections.abc import Mapping
from typing import Any

from absl import flags

from sparsek import config as config_lib

FIELDS = (
  "positions",
  "max_positions",
  "rope_fraction",
  "rope_scaling",
  "norm",
  "norm_eps",
  "qk_norm",
  "mlp",
  "use_bias",
  "out_bias",
  "mlp_bias",
  "parallel_residual",
  "tie_embeddings",
)
CHOICES = {"positions": config_lib.POSITIONS, "norm": config_lib.NORMS, "mlp": config_lib.MLPS}
MAX_NUMBER = 2**31 - 1
HELP = (
  "Fields of the model, separated by commas, that have no flag of their own: "
  "--model=norm=layer_norm,use_bias=true. "
  "positions: rope, a rotary embedding, or learned, a table that is added to the tokens. "
  "max_positions: rows of that table, which is the longest row of tokens. "
  "rope_fraction: share of the head dimension that is rotated, above 0 and at most 1. "
  "rope_scaling: stretches the rotary embedding, linear:FACTOR or llama3:FACTOR:LOW:HIGH:ORIGINAL. "
  "norm: rms_norm or layer_norm. norm_eps: its epsilon. "
  "qk_norm: RMSNorm over the head dimension of queries and keys. "
  "mlp: swiglu, gelu or gelu_tanh. "
  "use_bias, out_bias, mlp_bias: biases on the query, key and value projections, on attention's "
  "output projection, in the MLP. "
  "parallel_residual: attention and MLP of a block read the same input. "
  "tie_embeddings: the output matrix is the embedding. "
  "A field that has a flag may be given here too, and is then the same as that flag. May be given "
  "several times; the values of different fields add up."
)


def parse_field(text: str) -> tuple[str, Any]:
  """Returns (field, value) of "FIELD=VALUE".

  Raises:
    ValueError: for text of another form, a field that --model does not set, or a value that is not
      of the field's type; ranges are checked by `TransformerConfig`.
  """
  name, equals, value = text.partition("=")
  if not equals:
    raise ValueError("must be FIELD=VALUE, or several separated by commas")
  if name not in FIELDS:
    raise ValueError(f"{name!r} must be one of {', '.join(FIELDS)}, or a field that has a flag")
  default = getattr(config_lib.TransformerConfig, name)
  if name in CHOICES and value not in CHOICES[name]:
    raise ValueError(f"must be one of {', '.join(CHOICES[name])}")
  if isinstance(default, bool):
    try:
      return name, flags.BooleanParser().parse(value)
    except ValueError:
      raise ValueError("must be true or false") from None
  if isinstance(default, (int, float)):
    kind, words = (int, "an integer") if isinstance(default, int) else (float, "a number")
    try:
      number = kind(value)
    except ValueError:
      number = 0
    if not 0 < number <= MAX_NUMBER:  # NaN neither
      raise ValueError(f"must be {words} above 0, at most {MAX_NUMBER}")
    return name, number
  if not value:
    raise ValueError("must not be empty")
  return name, value


class _Parser(flags.ArgumentParser):
  """A parser of one FIELD=VALUE; `flagfiles.expand` has parted those of a list."""

  syntactic_help = "FIELD=VALUE,FIELD=VALUE"

  def parse(self, argument: str) -> dict[str, Any]:
    return dict([parse_field(argument)])

  def flag_type(self) -> str:
    return "fields"


class _Serializer(flags.ArgumentSerializer):
  """The text of given fields, in the order of FIELDS, whatever the order in which they came."""

  def serialize(self, value: Mapping[str, Any]) -> str:
    texts = {
      name: str(given).lower() if isinstance(given, bool) else str(given)
      for name, given in value.items()
    }
    return ",".join(f"{name}={texts[name]}" for name in FIELDS if name in texts)


class ModelFlag(flags.Flag[dict[str, Any]]):
  """The flag --model, which collects the fields of all its occurrences; a later value wins."""

  def __init__(self) -> None:
    super().__init__(_Parser(), _Serializer(), "model", None, HELP)

  def parse(self, argument: str | dict[str, Any]) -> None:
    self.value = {**(self.value or {}), **(self._parse(argument) or {})}
    self.present += 1


def given_fields(flag_values: flags.FlagValues) -> dict[str, Any]:
  """Returns the fields that --model gives, none where it is not defined."""
  return (flag_values["model"].value or {}) if "model" in flag_values else {}


def as_flag(field: str) -> str:
  """Returns how a field of the model is given on a command line: "--k" or "--model=norm"."""
  return f"--model={field}" if field in FIELDS else f"--{field}"
