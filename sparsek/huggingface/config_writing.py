"""Writing a model's config.json."""

from typing import Any

from sparsek.attention.scoring import KINDS
from sparsek.config import TransformerConfig
from sparsek.errors import UsageError
from sparsek.huggingface.config_fields import ACTIVATIONS, ARCHITECTURE, SPARSEK_FIELDS
from sparsek.huggingface.config_reading import read_config
from sparsek.huggingface.families import FAMILIES, SPARSE

MODELLING = "modeling_sparsek"  # the file beside this one that is copied into a folder
CODE = {
  "AutoConfig": f"{MODELLING}.SparsekConfig",
  "AutoModel": f"{MODELLING}.SparsekModel",
  "AutoModelForCausalLM": f"{MODELLING}.SparsekForCausalLM",
}
SPARSE_KINDS = ("sparsek", "sliding_window", "full")  # of attention that the file has


def why_not_sparse(config: TransformerConfig) -> str:
  """Returns why the modelling file cannot compute a model, "" where it can."""
  kinds = [kind for kind in dict.fromkeys(config.layer_kinds) if kind not in SPARSE_KINDS]
  if kinds:
    return f"{MODELLING}.py has no attention={','.join(kinds)}"
  if "sparsek" in config.layer_kinds and config.scorer not in KINDS:
    return f"{MODELLING}.py has no scorer={config.scorer}"
  return ""


def written_family(config: TransformerConfig, family: str | None, dense: bool) -> str | None:
  """Returns the family that a model is to be written in, None for the dense one that fits best.

  Args:
    config: the model.
    family: the one asked for, a key of FAMILIES, or None.
    dense: whether a SPARSEK model is to be written as the dense one that has its matrices.
  Raises:
    UsageError: for a family that there is not, or that cannot hold the model.
  """
  if family is not None and family not in FAMILIES:
    raise UsageError(f"family={family!r} is not one of {', '.join(FAMILIES)}")
  if family == SPARSE and (dense or why_not_sparse(config)):
    raise UsageError(f"family={family!r}: {why_not_sparse(config) or 'it is no dense one'}")
  is_sparse = "sparsek" in config.layer_kinds and not why_not_sparse(config)
  return SPARSE if family is None and is_sparse and not dense else family


def describe(
  config: TransformerConfig, family: str | None = None, dtype: str = "float32", dense: bool = False
) -> dict[str, Any]:
  """Returns the config.json of a model.

  Its section "sparsek" holds what the family cannot express.

  Args:
    config, family, dense: see `written_family`.
    dtype: of the parameters.
  Raises:
    UsageError: if no family (or not this one) can hold the model; names the fields that prevent it.
  """
  family = written_family(config, family, dense)
  candidates, reasons = [], []  # (number of fields in the section "sparsek", config.json)
  for name in [name for name in FAMILIES if name != SPARSE] if family is None else (family,):
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
    if not_expressed or name == SPARSE:
      own = (*FAMILIES[name].section, *SPARSEK_FIELDS)
      fields["sparsek"] = {field: getattr(config, field) for field in own}
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
  fields |= {"model_type": name, "architectures": [family.architecture], "torch_dtype": dtype}
  if family.activation is not None:
    fields[family.activation[0]] = ACTIVATIONS[config.mlp][0]
  if family.section:
    fields["auto_map"] = CODE
    section = {field: getattr(config, field) for field in family.section}
    # lists, as in JSON, since it is read back
    fields["sparsek"] = {k: list(v) if isinstance(v, tuple) else v for k, v in section.items()}
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
