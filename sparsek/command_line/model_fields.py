"""The flag --model, which sets the fields of a model that have no flag of their own.

Such fields describe the architecture of pretrained models: an imported configuration sets them,
and hardly anybody gives them by hand.
"""

from collections.abc import Mapping
from typing import Any

from absl import flags

from sparsek import config as config_lib

FIELDS = {  # field -> its description in --help
  "positions": "rope, a rotary embedding, or learned, a table that is added to the tokens",
  "max_positions": "rows of the learned table, which is the longest row of tokens",
  "rope_fraction": "share of the head dimension that is rotated, above 0 and at most 1",
  "rope_scaling": "stretches the embedding: linear:FACTOR or llama3:FACTOR:LOW:HIGH:ORIGINAL",
  "norm": "rms_norm or layer_norm",
  "norm_eps": "epsilon of the norms",
  "qk_norm": "RMSNorm over the head dimension of queries and keys",
  "mlp": "hidden layer of a block: swiglu, gelu or gelu_tanh",
  "use_bias": "biases on the query, key and value projections",
  "out_bias": "a bias on attention's output projection",
  "mlp_bias": "biases in the MLP",
  "parallel_residual": "attention and MLP of a block read the same input",
  "tie_embeddings": "the output matrix is the embedding",
}
CHOICES = {"positions": config_lib.POSITIONS, "norm": config_lib.NORMS, "mlp": config_lib.MLPS}
MAX_NUMBER = 2**31 - 1


def _help() -> str:
  """Returns the help of --model, a line for each field."""
  return "\n".join(
    (
      "Fields of the model that have no flag of their own, separated by commas, as in "
      "--model=norm=layer_norm,use_bias=true. May be given several times: a later value of a "
      "field wins. A field that has a flag is the same here as that flag. By default the value of "
      "the preset or run. The fields, and their values in presets:",
      *(
        f"{name} ({_text(getattr(config_lib.TransformerConfig, name))}): {text}"
        for name, text in FIELDS.items()
      ),
    )
  )


def _text(value: object) -> str:
  return str(value).lower() if isinstance(value, bool) else str(value)


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
  """A parser of one FIELD=VALUE; `flagfiles.expand` has already split lists."""

  syntactic_help = "FIELD=VALUE,FIELD=VALUE"

  def parse(self, argument: str) -> dict[str, Any]:
    return dict([parse_field(argument)])

  def flag_type(self) -> str:
    return "fields"


class _Serializer(flags.ArgumentSerializer):
  """The text of given fields, in the order of FIELDS, whatever the order in which they came."""

  def serialize(self, value: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={_text(value[name])}" for name in FIELDS if name in value)


class ModelFlag(flags.Flag[dict[str, Any]]):
  """The flag --model, which collects the fields of all its occurrences; a later value wins."""

  def __init__(self) -> None:
    super().__init__(_Parser(), _Serializer(), "model", None, _help())

  def parse(self, argument: str | dict[str, Any]) -> None:
    self.value = {**(self.value or {}), **(self._parse(argument) or {})}
    self.present += 1


def given_fields(flag_values: flags.FlagValues) -> dict[str, Any]:
  """Returns the fields that --model gives, none where it is not defined."""
  return (flag_values["model"].value or {}) if "model" in flag_values else {}


def as_flag(field: str) -> str:
  """Returns how a field of the model is given on a command line: "--k" or "--model=norm"."""
  return f"--model={field}" if field in FIELDS else f"--{field}"
