"""Parsed flags, turned into the frozen dataclasses of `sparsek.config`."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from sparsek import config as config_lib
from sparsek.command_line import model_fields
from sparsek.command_line.definer import names_of
from sparsek.errors import UsageError

# Flags without effect where no scorer learns.
OF_LEARNED_SCORERS = (
  "scorer_loss",
  "scorer_loss_queries",
  "scorer_loss_kind",
  "scorer_lr_multiplier",
)


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


def unused_flags(
  config: config_lib.TransformerConfig, flag_values: flags.FlagValues
) -> dict[str, str]:
  """Returns the flags of attention and scorers that no layer takes, as "--k=5", and why.

  Flags that were not given, or have their default value, are left out.
  """
  reasons = {
    name: config.why_unused(name)
    for name in model_overrides(flag_values)
    if name in ("k", "window", "gate") or name.startswith("scorer")
  }
  if not config.learns_scores:
    of_learning = [name for name in OF_LEARNED_SCORERS if name in flag_values]
    for name in of_learning:
      if flag_values[name].value not in (None, 0, flag_values[name].default):
        reasons[name] = config.why_unused("scorer") or f"scorer={config.scorer} learns nothing"
  return {
    f"--{name}={flag_values[name].value}": reason for name, reason in reasons.items() if reason
  }


def warn_of_unused(unused: Mapping[str, str]) -> None:
  """Prints a line for each flag of attention and scorers that changes nothing.

  Args:
    unused: as `unused_flags` or `unused_by_all` returns them.
  """
  for flag, reason in unused.items():
    print(f"warning: {flag} has no effect: {reason}", file=sys.stderr)


def unused_by_all(unused: Sequence[Mapping[str, str]]) -> dict[str, str]:
  """Returns the flags that none of several models takes, and why the first does not.

  Args:
    unused: what `unused_flags` returns for each model.
  """
  return {flag: why for flag, why in unused[0].items() if all(flag in of for of in unused)}


def refuse_unused(
  configs: Sequence[config_lib.TransformerConfig], flag_values: flags.FlagValues
) -> None:
  """Raises UsageError for a flag of attention that none of these models takes."""
  unused = unused_by_all([unused_flags(config, flag_values) for config in configs])
  for flag, reason in unused.items():
    raise UsageError(f"{flag} has no effect: {reason}")


def data_config(flag_values: flags.FlagValues) -> config_lib.DataConfig:
  """Returns the configuration of the data; its seed is --seed where that flag is defined.

  Raises:
    UsageError: for values that do not go together.
  """
  names = ("data", "seq_len", "batch_size", "segment_documents", "seed")
  fields = {name: flag_values[name].value for name in names if name in flag_values}
  return _build(flag_values, config_lib.DataConfig, **fields)


def warmup_steps(flag_values: flags.FlagValues) -> int:
  """Returns the value of --warmup_steps, which derives from --num_steps where it is not given."""
  values: dict[str, Any] = {name: flag_values[name].value for name in ("warmup_steps", "num_steps")}
  given = values["warmup_steps"]
  return min(100, values["num_steps"] // 10) if given is None else given


def train_config(flag_values: flags.FlagValues) -> config_lib.TrainConfig:
  """Returns the configuration of the whole run without the model.

  Raises:
    UsageError: for a missing --workdir and for values that do not go together.
  """
  values: dict[str, Any] = {name: flag_values[name].value for name in names_of(flag_values)}
  if not values["workdir"] and not values.get("dry_run"):
    raise UsageError("--workdir is required: the folder for this run's checkpoints and metrics")
  values["warmup_steps"] = warmup_steps(flag_values)
  values["workdir"] = values["workdir"] or ""
  names = [field.name for field in dataclasses.fields(config_lib.OptimizerConfig)]
  optimizer = _build(
    flag_values, config_lib.OptimizerConfig, **{name: values[name] for name in names}
  )
  names = [field.name for field in dataclasses.fields(config_lib.TrainConfig)]
  values |= {"data": data_config(flag_values), "optimizer": optimizer}
  return _build(flag_values, config_lib.TrainConfig, **{name: values[name] for name in names})
