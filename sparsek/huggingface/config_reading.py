"""Reading config.json as a TransformerConfig, with all that is wrong with it in one message."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sparsek.config import ATTENTION_KINDS, TransformerConfig, parse_rope_scaling
from sparsek.errors import UsageError
from sparsek.huggingface.config_fields import (
  ACTIVATIONS,
  BOUNDS,
  DTYPES,
  MAX_SIZE,
  NO_EFFECT,
  NO_EFFECT_NAMES,
  NULLABLE,
  ROPE_KEYS,
  SCALINGS,
  SPARSEK_FIELDS,
)
from sparsek.huggingface.families import FAMILIES, SPARSE, Family
from sparsek.storage.files import shown

MAX_NAMED = 10  # fields that one message names


def read_config(fields: Mapping[str, Any], path: str) -> TransformerConfig:
  """Returns the model that a config.json describes.

  Absent fields have the values of transformers' classes. Its attention is full or a sliding window,
  or that of the section "sparsek".

  Args:
    fields: the JSON object.
    path: of the file, for messages.
  Raises:
    UsageError: for a family, fields or values that this library does not support, naming them all.
  """
  name = fields.get("model_type")
  if not isinstance(name, str) or name not in FAMILIES:
    raise UsageError(f"{path}: model_type={shown(name)} is not one of {', '.join(FAMILIES)}")
  family, reader = FAMILIES[name], _Reader(fields)
  values = _read_fields(family, reader)
  if family.activation is not None:
    values["mlp"] = _read_activation(name, family.activation, reader)
  values["dtype"] = _read_dtype(reader)
  values |= _read_attention(name, values["num_layers"], reader)
  sparsek_values = _read_sparsek_section(family, reader)
  if name == SPARSE:
    reader.unread.pop("auto_map", None)  # of the modelling file that lies in the folder
  _refuse_unknown(name, reader)
  reader.check(path)  # from here on, all values are good
  heads, width = values["num_heads"], values["embed_dim"]
  if values.get("head_dim") is None and width % heads:
    raise UsageError(
      f"{path}: {family.fields['num_heads'][0]}={heads} must divide the width {width}"
    )
  values["num_kv_heads"] = values.get("num_kv_heads") or heads
  values["head_dim"] = values.get("head_dim") or width // heads
  values["mlp_dim"] = values["mlp_dim"] or 4 * width
  all_values: dict[str, Any] = {**family.fixed, **values, **sparsek_values}
  try:
    return TransformerConfig(**all_values)
  except (ValueError, TypeError, AttributeError) as error:
    raise UsageError(f"{path} describes no model: {str(error)[:500]}") from None


class _Spelling(NamedTuple):
  """A value that a file gives a field under one of its names.

  Attributes:
    name: in the file.
    value: there.
    counts: whether transformers reads this name; if not, the value must agree with those it reads.
  """

  name: str
  value: Any
  counts: bool


class _Reader:
  """A config.json while it is read.

  Attributes:
    unread: the fields that are not read yet.
    problems: of the fields that were read.
  """

  def __init__(self, fields: Mapping[str, Any]):
    self.unread = dict(fields)
    self.problems: list[str] = []

  def refuse(self, name: str, value: object, reason: str) -> None:
    """Adds a problem, which `check` will raise."""
    problem = f"{_printable(name)}={shown(value)} {reason}"
    if problem not in self.problems:  # one name may stand for two of our fields
      self.problems.append(problem)

  def typed(
    self, name: str, value: Any, kind: type, low: float = 1, high: float = MAX_SIZE
  ) -> Any | None:
    """Returns a value as bool, or as int or float within bounds; refuses others, returning None."""
    has_type = type(value) is kind or (kind is float and type(value) is int)
    if not has_type:
      self.refuse(name, value, f"is no {kind.__name__}")
    elif kind is not bool and not low <= value <= high:
      self.refuse(name, value, f"must be {low}" if low == high else f"must be from {low} to {high}")
    else:
      return kind(value)
    return None

  def single_value(
    self, key: str, default: object, spellings: list[_Spelling], kind: type, *bounds: float
  ) -> Any:
    """Returns the value of a field that may have several names, and refuses contradictions.

    Args:
      key: the field's first name, for messages.
      default: the value if no spelling counts.
      spellings: all that the file has.
      kind, bounds: see `typed`.
    """
    spellings = [
      spelling._replace(
        value=None
        if spelling.value is None and key in NULLABLE
        else self.typed(spelling.name, spelling.value, kind, *bounds)
      )
      for spelling in spellings
    ]
    first = next((spelling for spelling in spellings if spelling.counts), None)
    name, result = (first.name, first.value) if first else (key, default)
    for spelling in spellings:
      if None not in (spelling.value, result) and spelling.value != result:
        self.refuse(
          spelling.name, spelling.value, f"and {name}={shown(result)} disagree: remove one of them"
        )
    return result

  def check(self, path: str) -> None:
    """Raises UsageError with all problems so far."""
    if self.problems:
      rest = len(self.problems) - MAX_NAMED
      named = "; ".join(self.problems[:MAX_NAMED]) + (f"; and {rest} more" if rest > 0 else "")
      raise UsageError(f"{path}: {named}")


def _printable(name: str) -> str:
  return name if name.isprintable() and len(name) <= 80 else repr(name[:80])


class _RopeSection(NamedTuple):
  """The section rope_scaling or rope_parameters.

  Attributes:
    name: of the section.
    fields: of it that are not read yet.
    counts: False for the second one: transformers 4 and 5 prefer rope_scaling.
  """

  name: str
  fields: dict[str, Any]
  counts: bool


def _read_fields(family: Family, reader: _Reader) -> dict[str, Any]:
  """Returns the fields of the family's table, and the rotary embedding."""
  has_rope = family.fixed.get("positions") != "learned" and "rope_theta" not in family.section
  sections = _rope_sections(reader) if has_rope else []
  fields = dict(family.fields)
  if has_rope:
    fields.setdefault("rope_fraction", ("partial_rotary_factor", 1.0))
  values: dict[str, Any] = {}
  read: dict[str, Any] = {}  # a name may stand for several fields
  for field, (key, default) in fields.items():
    names = ((key, True), *family.others.get(field, ()))
    spellings = [
      _Spelling(name, read.setdefault(name, reader.unread.pop(name, None)), counts)
      for name, counts in names
      if name in reader.unread or name in read
    ]
    rope_key = ROPE_KEYS.get(field)
    spellings += [
      _Spelling(f"{section.name}.{rope_key}", section.fields.pop(rope_key), section.counts)
      for section in sections
      if rope_key is not None and rope_key in section.fields
    ]
    kind = type(getattr(TransformerConfig, field))
    bounds = (0.0, 1.0) if field == "rope_fraction" else BOUNDS.get(field, (1, MAX_SIZE))
    fixed: Any = family.fixed.get(field)
    if fixed is not None:
      bounds = (fixed, fixed)
    values[field] = reader.single_value(key, default, spellings, kind, *bounds)
  if has_rope:
    values["rope_scaling"] = _read_scaling(sections, values["max_positions"], reader)
  return values


def _rope_sections(reader: _Reader) -> list[_RopeSection]:
  sections: list[_RopeSection] = []
  for name in ("rope_scaling", "rope_parameters"):
    fields = reader.unread.pop(name, None)
    if fields is not None and not isinstance(fields, dict):
      reader.refuse(name, fields, "is no object")
    elif fields:
      sections.append(_RopeSection(name, dict(fields), not sections))
  return sections


def _read_scaling(
  sections: list[_RopeSection], max_positions: int | None, reader: _Reader
) -> tuple | None:
  """Returns the rope_scaling of the section that counts.

  The other section must have the same or none. theta and fraction are already read from both.
  """
  scalings = [_parse_scaling(section, max_positions, reader) for section in sections]
  if len(scalings) == 2 and scalings[1] not in (None, scalings[0]):
    first, second = sections
    reader.refuse(
      first.name,
      first.fields,
      f"and {second.name}={shown(second.fields)} disagree: remove one of them",
    )
  return scalings[0] if scalings else None


def _parse_scaling(
  section: _RopeSection, max_positions: int | None, reader: _Reader
) -> tuple | None:
  fields = section.fields
  names = {key: fields[key] for key in ("rope_type", "type") if key in fields}
  kind, *others = names.values() or ["default"]
  if others and others[0] != kind:
    reader.refuse(f"{section.name}.rope_type", kind, f"and type={shown(others[0])} disagree")
  if not isinstance(kind, str) or kind not in SCALINGS:
    reader.refuse(f"{section.name}.rope_type", kind, f"is not one of {', '.join(SCALINGS)}")
    return None
  for key in fields:
    if key not in (*SCALINGS[kind], *names) and fields[key] is not None:
      reader.refuse(f"{section.name}.{key}", fields[key], f"is not supported with rope_type {kind}")
  numbers = []
  for key in SCALINGS[kind]:
    name = f"{section.name}.{key}"
    if key == "original_max_position_embeddings":  # transformers has this default for it
      numbers.append(reader.typed(name, fields.get(key, max_positions or 1), int))
    elif key not in fields:
      reader.refuse(name, None, f"is missing, and needed with rope_type {kind}")
    else:
      numbers.append(reader.typed(name, fields[key], float, 1e-6, 1e6))
  return None if kind == "default" else (kind, *numbers)


def _read_activation(name: str, activation: tuple[str, str], reader: _Reader) -> str | None:
  """Returns the kind of the MLP."""
  family, (key, default) = FAMILIES[name], activation
  function = reader.unread.pop(key, default)
  for mlp, names in ACTIVATIONS.items():
    if function in names and (mlp == "swiglu") == ("mlp" in family.fixed):
      return mlp
  reader.refuse(key, function, f"is not supported in {name}")
  return None


def _read_dtype(reader: _Reader) -> str:
  """Returns the dtype of activations."""
  spelled = {
    key: reader.unread.pop(key) for key in ("dtype", "torch_dtype") if key in reader.unread
  }
  for key, value in spelled.items():
    if not (value is None or isinstance(value, str)) or value not in DTYPES:
      reader.refuse(key, value, f"is not one of {', '.join(filter(None, DTYPES))}")
  given = {value for value in spelled.values() if isinstance(value, str)}
  if len(given) > 1:
    reader.refuse(
      "dtype",
      spelled["dtype"],
      f"and torch_dtype={shown(spelled['torch_dtype'])} disagree: remove one of them",
    )
  return "bfloat16" if given == {"bfloat16"} else "float32"


def _read_sparsek_section(family: Family, reader: _Reader) -> dict[str, Any]:
  """Returns the section "sparsek", its values of the right types and within bounds."""
  section = reader.unread.pop("sparsek", None)
  section = {} if section is None else section
  if not isinstance(section, dict):
    reader.refuse("sparsek", section, "is no object")
    return {}
  values, known = dict(section), (*family.section, *SPARSEK_FIELDS)
  for field, value in section.items():
    name = f"sparsek.{field}"
    if field not in known:
      reader.refuse(name, value, f"is not known; expected {', '.join(known)}")
      continue
    kind = type(getattr(TransformerConfig, field))
    if field == "attention":
      if not isinstance(value, list) or not value or not all(map(_is_term, value)):
        reader.refuse(
          name,
          value,
          f"is no list of {', '.join(ATTENTION_KINDS)}, with a k or a window of their own or not",
        )
    elif kind in (int, float):
      bounds = (-1e6, 1e6) if kind is float else (1, MAX_SIZE)
      values[field] = reader.typed(name, value, kind, *BOUNDS.get(field, bounds))
    elif kind is bool:
      reader.typed(name, value, bool)
    elif field == "rope_scaling":
      if not _is_scaling(value):
        reader.refuse(name, value, "is no name of a scaling with its numbers")
    elif not isinstance(value, str) and not (value is None and field == "implementation"):
      reader.refuse(name, value, "is no string")
  return values


def _is_scaling(value: object) -> bool:
  """Returns whether a value is a scaling of RoPE as TransformerConfig has it, or none."""
  try:
    parse_rope_scaling(value if isinstance(value, list) else None)
  except (ValueError, OverflowError):
    return False
  return value is None or isinstance(value, list)


def _is_term(term: object) -> bool:
  """Returns whether it may be a term of a layer pattern, with numbers of at most nine digits."""
  return isinstance(term, str) and "*" not in term and not re.search(r"\d{10}", term)


def _refuse_unknown(name: str, reader: _Reader) -> None:
  """Refuses all fields that are not read and may have an effect."""
  if (scaled := reader.unread.pop("scale_attn_weights", True)) is not True:
    reader.refuse("scale_attn_weights", scaled, "is not supported")
  unknown = [
    (field, value)
    for field, value in reader.unread.items()
    if field not in NO_EFFECT
    and not NO_EFFECT_NAMES.fullmatch(field)
    and value not in (None, False, [], {}, "")
  ]
  advice = ": this library does not know what it does (remove what changes no logit)"
  for i, (field, value) in enumerate(unknown):
    last = i == len(unknown) - 1
    reader.refuse(field, value, f"is not supported in {name}{advice if last else ''}")


def _read_attention(name: str, num_layers: int | None, reader: _Reader) -> dict[str, Any]:
  """Returns the fields of full attention or a sliding window, layer by layer; {} if unknown."""
  defaults = FAMILIES[name].attention
  if not defaults:
    return {"attention": "full"}
  fields = {key: reader.unread.pop(key, default) for key, default in defaults.items()}
  kinds = reader.unread.pop("layer_types", None)
  window = fields["sliding_window"]
  if window is not None:
    reader.typed("sliding_window", window, int)
  slides = window is not None
  first = 0
  layers_may_differ = "use_sliding_window" in fields
  if layers_may_differ:
    use = reader.typed("use_sliding_window", fields["use_sliding_window"], bool)
    slides = slides and use is True
    first = reader.typed("max_window_layers", fields["max_window_layers"], int, 0) or 0
  if num_layers is None:
    return {}
  expected = [
    "sliding_attention" if slides and i >= first else "full_attention" for i in range(num_layers)
  ]
  kinds = expected if kinds is None else kinds
  our_kinds = {"full_attention": "full", "sliding_attention": "sliding_window"}
  if (
    not isinstance(kinds, list)
    or len(kinds) != num_layers
    or not all(isinstance(kind, str) and kind in our_kinds for kind in kinds)
  ):
    reader.refuse(
      "layer_types",
      kinds,
      f"must name full_attention or sliding_attention for each of {num_layers} layers",
    )
    return {}
  if "sliding_attention" in kinds and not slides:
    reader.refuse(
      "layer_types", kinds, "asks for sliding_attention without a sliding_window in use"
    )
  if not layers_may_differ and kinds != expected:
    reader.refuse(
      "layer_types",
      kinds,
      f"and sliding_window={shown(window)} disagree: in {name} all layers have it",
    )
  pattern = tuple(our_kinds[kind] for kind in kinds)
  attention = pattern if len(set(pattern)) > 1 else pattern[0]
  return {"attention": attention, **({"window": window} if "sliding_window" in pattern else {})}
