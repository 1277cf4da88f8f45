"""Parsed flags, turned into the frozen dataclasses of `sparsek.config`."""

import dataclasses
from collections.abc import Callable
from typing import Any

from absl import flags

from sparsek import config as config_lib
from sparsek.command_line import model_fields
from sparsek.command_line.definer import names_of
from sparsek.errors import UsageError


def _build(flag_values: flags.FlagValues, constructor: Callable, *args: Any, **fields: Any) -> Any:
  """Calls a dataclass's constructor; raises UsageError for what it refuses."""
  try:
    return constructor(*args, **fields)
  except ValueError as error:
    name = str(error).split("=")[0]
    is_flag = name in flag_values or ("model" in flag_values and name in model_fields.FIELDS)
    text = str(error).removeprefix(name)
    raise UsageError(f"{model_fields.as_flag(name) if is_flag else name}{text}") from None


def model_overrides(flag_values: flags.FlagValues) -> dict[str, Any]:
  """Returns the fields of TransformerConfig that flags give."""
  names = [field.name for field in dataclasses.fields(config_lib.TransformerConfig)]
  given = {name: flag_values[name].value for name in names if name in flag_values}
  pattern = flag_values["layer_pattern"].value if "layer_pattern" in flag_values else None
  if pattern is not None:
    if given["attention"] is not None:
      raise UsageError(
        f"--attention={given['attention']} and --layer_pattern={pattern} exclude each "
        "other: give one of them"
      )
    given["attention"] = pattern
  given |= model_fields.given_fields(flag_values)
  return {name: value for name, value in given.items() if value is not None}


def model_config(
  flag_values: flags.FlagValues,
  vocab_size: int | None = None,
  pretrained: config_lib.TransformerConfig | None = None,
) -> config_lib.TransformerConfig:
  """Returns the preset with the given flags applied.

  Args:
    flag_values: parsed flags that include those of `flags.define_model_flags`.
    vocab_size: that of the data's tokenizer; None keeps the preset's, which is enough to check the
      other flags before any data is read.
    pretrained: a model to take instead of the preset, its vocabulary included.

  Raises:
    UsageError: for values that do not go together.
  """
  if pretrained is not None:
    if flag_values["preset"].present:
      raise UsageError(
        f"--preset={flag_values['preset'].value} and a pretrained model's architecture "
        "exclude each other: leave it out"
      )
    return override_config(pretrained, flag_values)
  overrides = model_overrides(flag_values)
  if vocab_size is not None:
    overrides["vocab_size"] = vocab_size
  return _build(flag_values, config_lib.preset, flag_values["preset"].value, **overrides)


def override_config(
  config: config_lib.TransformerConfig, flag_values: flags.FlagValues
) -> config_lib.TransformerConfig:
  """Returns a loaded run's configuration with the given flags applied.

  Raises:
    UsageError: for values that do not go together.
  """
  return _build(flag_values, dataclasses.replace, config, **model_overrides(flag_values))


def data_config(flag_values: flags.FlagValues) -> config_lib.DataConfig:
  """Returns the configuration of the data; its seed is --seed where that flag is defined.

  Raises:
    UsageError: for values that do not go together.
  """
  names = ("data", "seq_len", "batch_size", "segment_documents", "seed")
  fields = {name: flag_values[name].value for name in names if name in flag_values}
  return _build(flag_values, config_lib.DataConfig, **fields)


def train_config(flag_values: flags.FlagValues) -> config_lib.TrainConfig:
  """Returns the configuration of the whole run without the model.

  Raises:
    UsageError: for a missing --workdir and for values that do not go together.
  """
  values: dict[str, Any] = {name: flag_values[name].value for name in names_of(flag_values)}
  if not values["workdir"] and not values.get("dry_run"):
    raise UsageError("--workdir is required: the folder for this run's checkpoints and metrics")
  if values["warmup_steps"] is None:
    values["warmup_steps"] = min(100, values["num_steps"] // 10)
  values["workdir"] = values["workdir"] or ""
  names = [field.name for field in dataclasses.fields(config_lib.OptimizerConfig)]
  optimizer = _build(
    flag_values, config_lib.OptimizerConfig, **{name: values[name] for name in names}
  )
  names = [field.name for field in dataclasses.fields(config_lib.TrainConfig)]
  values |= {"data": data_config(flag_values), "optimizer": optimizer}
  return _build(flag_values, config_lib.TrainConfig, **{name: values[name] for name in names})
