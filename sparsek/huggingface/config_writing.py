"""Writing a model's config.json."""

from typing import Any

from sparsek.config import TransformerConfig
from sparsek.errors import UsageError
from sparsek.huggingface.config_fields import ACTIVATIONS, ARCHITECTURE, SPARSEK_FIELDS
from sparsek.huggingface.config_reading import read_config
from sparsek.huggingface.families import FAMILIES


def describe(
  config: TransformerConfig, family: str | None = None, dtype: str = "float32"
) -> dict[str, Any]:
  """Returns the config.json of a model.

  Its section "sparsek" holds what the family cannot express.

  Args:
    config: the model.
    family: a key of FAMILIES; None chooses the one that can express most.
    dtype: of the parameters.
  Raises:
    UsageError: if no family (or not this one) can hold the model; names the fields that prevent it.
  """
  if family is not None and family not in FAMILIES:
    raise UsageError(f"family={family!r} is not one of {', '.join(FAMILIES)}")
  candidates, reasons = [], []  # (number of fields in the section "sparsek", config.json)
  for name in FAMILIES if family is None else (family,):
    fields = _write_config(name, config, dtype)
    try:
      back = read_config(fields, name)
    except UsageError as error:
      reasons.append(str(error))
      continue
    differ = [
      field
      for field in ARCHITECTURE
      if getattr(back, field) != getattr(config, field) and not _has_no_effect(config, field)
    ]
    if differ:
      reasons.append(
        f"{name} has no " + ", ".join(f"{field}={getattr(config, field)}" for field in differ)
      )
      continue
    not_expressed = [
      field for field in SPARSEK_FIELDS if getattr(config, field) != getattr(back, field)
    ]
    if not_expressed:
      fields["sparsek"] = {field: getattr(config, field) for field in SPARSEK_FIELDS}
    candidates.append((len(not_expressed), fields))
  if not candidates:
    raise UsageError("no family of Hugging Face's holds this model: " + "; ".join(reasons))
  return min(candidates, key=lambda pair: pair[0])[1]


def _write_config(name: str, config: TransformerConfig, dtype: str) -> dict[str, Any]:
  """Returns the config.json of a model in the family `name`, as far as it can express it."""
  family = FAMILIES[name]
  fields: dict[str, Any] = {
    key: getattr(config, field) for field, (key, _) in family.fields.items()
  }
  fields |= {
    "model_type": name,
    "architectures": [family.architecture],
    "torch_dtype": dtype,
    family.activation[0]: ACTIVATIONS[config.mlp][0],
  }
  if isinstance(config.rope_scaling, tuple) and "rope_theta" in family.fields:
    kind, *numbers = config.rope_scaling
    keys = ("factor", "low_freq_factor", "high_freq_factor")
    fields["rope_scaling"] = {"rope_type": kind, **dict(zip(keys, numbers))}
    if kind == "llama3":
      fields["rope_scaling"]["original_max_position_embeddings"] = int(numbers[3])
  if family.attention:
    slides = "sliding_window" in config.layer_kinds
    fields["sliding_window"] = config.window if slides else None
    if "use_sliding_window" in family.attention:
      kinds = [
        "sliding_attention" if kind == "sliding_window" else "full_attention"
        for kind in config.layer_kinds
      ]
      first = kinds.index("sliding_attention") if slides else config.num_layers
      fields |= {"use_sliding_window": slides, "layer_types": kinds, "max_window_layers": first}
  return fields


def _has_no_effect(config: TransformerConfig, field: str) -> bool:
  """Returns whether a field changes nothing in this model."""
  return config.positions == "learned" and field.startswith("rope_")
