"""How Hugging Face's model families are written down: their tensors and the fields of config.json,
one table a family, read in both directions.

A tensor's row is (its name, our parameter, layout). The layout names axes by letters: "HD E -> EHD"
is a matrix [H * D, E] there and an array [E, H, D] here. V vocabulary, P positions, E width, H
heads, G key/value heads, D head dimension, F width of the MLP; "3" holds query, key and value of a
fused projection. `*` is the layer's number; rows whose parameter the configuration does not have (a
bias, the head of tied embeddings) are left out.
"""

import dataclasses
import re
from typing import NamedTuple

from sparsek.config import ATTENTION_KINDS, TransformerConfig
from sparsek.errors import UsageError
from sparsek.storage.files import shown

MAX_LAYERS = 10_000
MAX_SIZE = 2**31 - 1
MAX_NAMED = 10  # fields that one message names


class Family(NamedTuple):
  """One model_type.

  Attributes:
    architecture: the class in transformers.
    prefix: of all names but the output matrix's; checkpoints of the bare model lack it.
    tensors: (name, our parameter, layout).
    fields: our field -> (name in config.json, value of transformers' class where it is absent).
    fixed: our fields that the family has no choice in.
    activation: the name of its field for the MLP's function, and its value where it is absent.
    others: our field -> further names in config.json, each with whether transformers reads it;
      one that it does not read must agree with what it reads.
    attention: fields of the sliding window and their values where they are absent.
  """

  architecture: str
  prefix: str
  tensors: tuple[tuple[str, str, str], ...]
  fields: dict[str, tuple[str, object]]
  fixed: dict[str, object]
  activation: tuple[str, str] = ("hidden_act", "silu")
  others: dict[str, tuple[tuple[str, bool], ...]] = {}
  attention: dict[str, object] = {}


_LLAMA_TENSORS = (
  ("model.embed_tokens.weight", "embed/embedding", "V E -> VE"),
  ("model.layers.*.input_layernorm.weight", "layers_*/attention_norm/scale", "E -> E"),
  ("model.layers.*.self_attn.q_proj.weight", "layers_*/attention/query/kernel", "HD E -> EHD"),
  ("model.layers.*.self_attn.q_proj.bias", "layers_*/attention/query/bias", "HD -> HD"),
  ("model.layers.*.self_attn.k_proj.weight", "layers_*/attention/key/kernel", "GD E -> EGD"),
  ("model.layers.*.self_attn.k_proj.bias", "layers_*/attention/key/bias", "GD -> GD"),
  ("model.layers.*.self_attn.v_proj.weight", "layers_*/attention/value/kernel", "GD E -> EGD"),
  ("model.layers.*.self_attn.v_proj.bias", "layers_*/attention/value/bias", "GD -> GD"),
  ("model.layers.*.self_attn.q_norm.weight", "layers_*/attention/query_norm/scale", "D -> D"),
  ("model.layers.*.self_attn.k_norm.weight", "layers_*/attention/key_norm/scale", "D -> D"),
  ("model.layers.*.self_attn.o_proj.weight", "layers_*/attention/out/kernel", "E HD -> HDE"),
  ("model.layers.*.self_attn.o_proj.bias", "layers_*/attention/out/bias", "E -> E"),
  ("model.layers.*.post_attention_layernorm.weight", "layers_*/mlp_norm/scale", "E -> E"),
  ("model.layers.*.mlp.gate_proj.weight", "layers_*/mlp/gate/kernel", "F E -> EF"),
  ("model.layers.*.mlp.gate_proj.bias", "layers_*/mlp/gate/bias", "F -> F"),
  ("model.layers.*.mlp.up_proj.weight", "layers_*/mlp/up/kernel", "F E -> EF"),
  ("model.layers.*.mlp.up_proj.bias", "layers_*/mlp/up/bias", "F -> F"),
  ("model.layers.*.mlp.down_proj.weight", "layers_*/mlp/down/kernel", "E F -> FE"),
  ("model.layers.*.mlp.down_proj.bias", "layers_*/mlp/down/bias", "E -> E"),
  ("model.norm.weight", "final_norm/scale", "E -> E"),
  ("lm_head.weight", "lm_head/kernel", "V E -> EV"),
)
_NEOX_TENSORS = (
  ("gpt_neox.embed_in.weight", "embed/embedding", "V E -> VE"),
  ("gpt_neox.layers.*.input_layernorm.weight", "layers_*/attention_norm/scale", "E -> E"),
  ("gpt_neox.layers.*.input_layernorm.bias", "layers_*/attention_norm/bias", "E -> E"),
  (
    "gpt_neox.layers.*.attention.query_key_value.weight",
    "layers_*/attention/query|key|value/kernel",
    "H3D E -> EHD",
  ),
  (
    "gpt_neox.layers.*.attention.query_key_value.bias",
    "layers_*/attention/query|key|value/bias",
    "H3D -> HD",
  ),
  ("gpt_neox.layers.*.attention.dense.weight", "layers_*/attention/out/kernel", "E HD -> HDE"),
  ("gpt_neox.layers.*.attention.dense.bias", "layers_*/attention/out/bias", "E -> E"),
  ("gpt_neox.layers.*.post_attention_layernorm.weight", "layers_*/mlp_norm/scale", "E -> E"),
  ("gpt_neox.layers.*.post_attention_layernorm.bias", "layers_*/mlp_norm/bias", "E -> E"),
  ("gpt_neox.layers.*.mlp.dense_h_to_4h.weight", "layers_*/mlp/up/kernel", "F E -> EF"),
  ("gpt_neox.layers.*.mlp.dense_h_to_4h.bias", "layers_*/mlp/up/bias", "F -> F"),
  ("gpt_neox.layers.*.mlp.dense_4h_to_h.weight", "layers_*/mlp/down/kernel", "E F -> FE"),
  ("gpt_neox.layers.*.mlp.dense_4h_to_h.bias", "layers_*/mlp/down/bias", "E -> E"),
  ("gpt_neox.final_layer_norm.weight", "final_norm/scale", "E -> E"),
  ("gpt_neox.final_layer_norm.bias", "final_norm/bias", "E -> E"),
  ("embed_out.weight", "lm_head/kernel", "V E -> EV"),
)
_GPT2_TENSORS = (
  ("transformer.wte.weight", "embed/embedding", "V E -> VE"),
  ("transformer.wpe.weight", "positions/embedding", "P E -> PE"),
  ("transformer.h.*.ln_1.weight", "layers_*/attention_norm/scale", "E -> E"),
  ("transformer.h.*.ln_1.bias", "layers_*/attention_norm/bias", "E -> E"),
  (
    "transformer.h.*.attn.c_attn.weight",
    "layers_*/attention/query|key|value/kernel",
    "E 3HD -> EHD",
  ),
  ("transformer.h.*.attn.c_attn.bias", "layers_*/attention/query|key|value/bias", "3HD -> HD"),
  ("transformer.h.*.attn.c_proj.weight", "layers_*/attention/out/kernel", "HD E -> HDE"),
  ("transformer.h.*.attn.c_proj.bias", "layers_*/attention/out/bias", "E -> E"),
  ("transformer.h.*.ln_2.weight", "layers_*/mlp_norm/scale", "E -> E"),
  ("transformer.h.*.ln_2.bias", "layers_*/mlp_norm/bias", "E -> E"),
  ("transformer.h.*.mlp.c_fc.weight", "layers_*/mlp/up/kernel", "E F -> EF"),
  ("transformer.h.*.mlp.c_fc.bias", "layers_*/mlp/up/bias", "F -> F"),
  ("transformer.h.*.mlp.c_proj.weight", "layers_*/mlp/down/kernel", "F E -> FE"),
  ("transformer.h.*.mlp.c_proj.bias", "layers_*/mlp/down/bias", "E -> E"),
  ("transformer.ln_f.weight", "final_norm/scale", "E -> E"),
  ("transformer.ln_f.bias", "final_norm/bias", "E -> E"),
  ("lm_head.weight", "lm_head/kernel", "V E -> EV"),
)
# Buffers that old checkpoints hold and no model needs.
IGNORED_TENSORS = (
  ".rotary_emb.inv_freq",
  ".attention.bias",
  ".attention.masked_bias",
  ".attn.bias",
  ".attn.masked_bias",
)


def _fields(vocab: int, width: int, layers: int, heads: int, mlp: int, positions: int, **more):
  """The fields that most families call alike, with the defaults of a family, and its own."""
  return {
    "vocab_size": ("vocab_size", vocab),
    "embed_dim": ("hidden_size", width),
    "num_layers": ("num_hidden_layers", layers),
    "num_heads": ("num_attention_heads", heads),
    "mlp_dim": ("intermediate_size", mlp),
    "max_positions": ("max_position_embeddings", positions),
    "tie_embeddings": ("tie_word_embeddings", False),
    **more,
  }


def _llama_fields(kv_heads: int | None, head_dim: int | None, *sizes: int, **more):
  return _fields(
    *sizes,
    num_kv_heads=("num_key_value_heads", kv_heads),
    head_dim=("head_dim", head_dim),
    norm_eps=("rms_norm_eps", 1e-6),
    rope_theta=("rope_theta", 10000.0),
    **more,
  )


def _biases(default: bool):
  return {"use_bias": ("attention_bias", default), "out_bias": ("attention_bias", default)}


_LLAMA_FIXED = dict(
  norm="rms_norm", positions="rope", rope_fraction=1.0, parallel_residual=False, mlp="swiglu"
)
_GPT2_FIXED = dict(
  norm="layer_norm",
  positions="learned",
  parallel_residual=False,
  qk_norm=False,
  use_bias=True,
  out_bias=True,
  mlp_bias=True,
  rope_theta=10000.0,
  rope_fraction=1.0,
  rope_scaling=None,
)
_GPT2_FIELDS = {
  "vocab_size": ("vocab_size", 50257),
  "embed_dim": ("n_embd", 768),
  "num_layers": ("n_layer", 12),
  "num_heads": ("n_head", 12),
  "mlp_dim": ("n_inner", None),
  "max_positions": ("n_positions", 1024),
  "norm_eps": ("layer_norm_epsilon", 1e-5),
  "tie_embeddings": ("tie_word_embeddings", True),
}
# transformers' attribute_map.
_GPT2_OTHERS = {
  "embed_dim": (("hidden_size", True),),
  "num_layers": (("num_hidden_layers", True),),
  "num_heads": (("num_attention_heads", True),),
  "max_positions": (("max_position_embeddings", True),),
}
_NEOX_FIELDS = _fields(
  50432,
  6144,
  44,
  64,
  24576,
  2048,
  norm_eps=("layer_norm_eps", 1e-5),
  rope_theta=("rotary_emb_base", 10000.0),
  rope_fraction=("rotary_pct", 0.25),
  parallel_residual=("use_parallel_residual", True),
  **_biases(True),
)
# transformers 4 writes these beside the names that it reads.
_NEOX_OTHERS = {
  "rope_theta": (("rope_theta", False),),
  "rope_fraction": (("partial_rotary_factor", False),),
}
_QWEN_SIZES = (151936, 4096, 32, 32, 22016, 32768)
_QWEN_ATTENTION = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES = {
  "llama": Family(
    "LlamaForCausalLM",
    "model.",
    _LLAMA_TENSORS,
    _llama_fields(
      None, None, 32000, 4096, 32, 32, 11008, 2048, **_biases(False), mlp_bias=("mlp_bias", False)
    ),
    {**_LLAMA_FIXED, "qk_norm": False},
  ),
  "mistral": Family(
    "MistralForCausalLM",
    "model.",
    _LLAMA_TENSORS,
    _llama_fields(8, None, 32000, 4096, 32, 32, 14336, 131072),
    {**_LLAMA_FIXED, "qk_norm": False, "use_bias": False, "out_bias": False, "mlp_bias": False},
    attention={"sliding_window": 4096},
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM",
    "model.",
    _LLAMA_TENSORS,
    _llama_fields(32, None, *_QWEN_SIZES),
    {**_LLAMA_FIXED, "qk_norm": False, "use_bias": True, "out_bias": False, "mlp_bias": False},
    attention=_QWEN_ATTENTION,
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    "model.",
    _LLAMA_TENSORS,
    _llama_fields(32, 128, *_QWEN_SIZES, **_biases(False)),
    {**_LLAMA_FIXED, "qk_norm": True, "mlp_bias": False},
    attention=_QWEN_ATTENTION,
  ),
  "gpt_neox": Family(
    "GPTNeoXForCausalLM",
    "gpt_neox.",
    _NEOX_TENSORS,
    _NEOX_FIELDS,
    dict(norm="layer_norm", positions="rope", qk_norm=False, mlp_bias=True),
    ("hidden_act", "gelu"),
    _NEOX_OTHERS,
  ),
  "gpt2": Family(
    "GPT2LMHeadModel",
    "transformer.",
    _GPT2_TENSORS,
    _GPT2_FIELDS,
    _GPT2_FIXED,
    ("activation_function", "gelu_new"),
    _GPT2_OTHERS,
  ),
}
# Our MLP -> what a config.json may call its function; the first is written.
ACTIVATIONS = {
  "swiglu": ("silu", "swish"),
  "gelu": ("gelu",),
  "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
}
# Fields of ours that config.json has words for; all others go into its section "sparsek", but for
# the attention of dense models and adapters, which are merged.
ARCHITECTURE = (
  "vocab_size",
  "embed_dim",
  "num_layers",
  "num_heads",
  "num_kv_heads",
  "head_dim",
  "mlp_dim",
  "max_positions",
  "norm",
  "norm_eps",
  "positions",
  "rope_theta",
  "rope_fraction",
  "rope_scaling",
  "qk_norm",
  "mlp",
  "use_bias",
  "out_bias",
  "mlp_bias",
  "parallel_residual",
  "tie_embeddings",
)
SPARSEK_FIELDS = tuple(
  field.name
  for field in dataclasses.fields(TransformerConfig)
  if field.name not in (*ARCHITECTURE, "lora_rank", "lora_alpha")
)
# Fields that change no logit, most of them of transformers' base class.
NO_EFFECT = set(
  """
    _name_or_path name_or_path _commit_hash _attn_implementation attn_implementation
    _attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled
    architectures model_type transformers_version use_bfloat16 torchscript
    use_cache return_dict chunk_size_feed_forward is_decoder tie_encoder_decoder tf_legacy_loss
    pretraining_tp gradient_checkpointing reorder_and_upcast_attn xla_device use_flash_attn
    id2label label2id num_labels problem_type task_specific_params finetuning_task
    tokenizer_class prefix n_ctx max_sequence_length model_max_length is_llama_config
    custom_pipelines _num_labels output_past use_return_dict
    transformers.js_config unsloth_version unsloth_fixed predict_special_tokens layerdrop
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    return_dict_in_generate remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens""".split()
)
_NO_EFFECT_NAMES = re.compile(
  r".*dropout.*|.*_pdrop|initializer_.*|output_(attentions|hidden_states|scores|logits)"
  r"|.*_token_ids?|summary_.*"
)
# null stands for "work it out"; elsewhere it is no value.
_NULLABLE = ("num_key_value_heads", "head_dim", "n_inner")
# Our fields -> smallest and largest value. What lies outside overflows or means nothing.
_BOUNDS = {
  "num_layers": (1, MAX_LAYERS),
  "norm_eps": (0.0, 1.0),
  "rope_theta": (1.0, 1e30),
  "scorer_lookback": (0, 4096),
  "scorer_lookahead": (0, 4096),
  "window": (0, MAX_SIZE),
}
_DTYPES = ("float32", "bfloat16", "float16", "float64", "auto", None)
_ROPE_KEYS = {"rope_theta": "rope_theta", "rope_fraction": "partial_rotary_factor"}
_SCALINGS = {
  "default": (),
  "linear": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class _Reader:
  """The fields of a config.json that are not read yet, and what is wrong with those that are."""

  def __init__(self, fields: dict):
    self.left, self.problems = dict(fields), []

  def refuse(self, name: str, value, why: str) -> None:
    problem = f"{_printable(name)}={shown(value)} {why}"
    if problem not in self.problems:  # one name may stand for two of our fields
      self.problems.append(problem)

  def typed(self, name: str, value, kind: type, low=1, high=MAX_SIZE):
    """Returns a value as bool, or as int or float within bounds; None where it is none."""
    if type(value) is not kind and not (kind is float and type(value) is int):
      self.refuse(name, value, f"is no {kind.__name__}")
    elif kind is not bool and not low <= value <= high:
      self.refuse(name, value, f"must be {low}" if low == high else f"must be from {low} to {high}")
    else:
      return kind(value)

  def one(self, key: str, default, spelled: list[tuple], kind: type, *bounds):
    """Returns the one value that a file gives a field.

    Args:
      key: the field's first name, for messages.
      default: where no spelling counts.
      spelled: (name, value, counts); one that does not count must agree all the same.
      kind, bounds: see `typed`.
    """
    spelled = [
      (
        name,
        None if value is None and key in _NULLABLE else self.typed(name, value, kind, *bounds),
        counts,
      )
      for name, value, counts in spelled
    ]
    first = next(((name, value) for name, value, counts in spelled if counts), (key, default))
    for name, value, _ in spelled:
      if None not in (value, first[1]) and value != first[1]:
        self.refuse(name, value, f"and {first[0]}={shown(first[1])} disagree: remove one of them")
    return first[1]

  def check(self, path: str) -> None:
    """Raises UsageError with all that is wrong so far."""
    if self.problems:
      more = len(self.problems) - MAX_NAMED
      named = "; ".join(self.problems[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")
      raise UsageError(f"{path}: {named}")


def _printable(name: str) -> str:
  return name if name.isprintable() and len(name) <= 80 else repr(name[:80])


def read_config(fields: dict, path: str) -> TransformerConfig:
  """Returns the model that a config.json describes, absent fields as transformers' classes say.

  Its attention is full or of a sliding window, or that of the section "sparsek".

  Args:
    fields: the JSON object.
    path: of the file, for messages.
  Raises:
    UsageError: for a family, fields or values that this library has no words for, naming them all.
  """
  name = fields.get("model_type")
  if not isinstance(name, str) or name not in FAMILIES:
    raise UsageError(f"{path}: model_type={shown(name)} is not one of {', '.join(FAMILIES)}")
  family, reader = FAMILIES[name], _Reader(fields)
  values = _read_fields(family, reader)
  values["mlp"] = _read_activation(name, reader)
  values["dtype"] = _read_dtype(reader)
  values |= _read_attention(name, values["num_layers"], reader)
  ours = _read_ours(reader)
  _refuse_unknown(name, reader)
  reader.check(path)  # what follows builds on these values
  heads, width = values["num_heads"], values["embed_dim"]
  if values.get("head_dim") is None and width % heads:
    raise UsageError(
      f"{path}: {family.fields['num_heads'][0]}={heads} must divide the width {width}"
    )
  values["num_kv_heads"] = values.get("num_kv_heads") or heads
  values["head_dim"] = values.get("head_dim") or width // heads
  values["mlp_dim"] = values["mlp_dim"] or 4 * width
  try:
    return TransformerConfig(**{**family.fixed, **values, **ours})
  except (ValueError, TypeError, AttributeError) as error:
    raise UsageError(f"{path} describes no model: {str(error)[:500]}") from None


def _read_fields(family: Family, reader: _Reader) -> dict:
  """Returns the fields of the family's table, and the rotary embedding."""
  learned = family.fixed.get("positions") == "learned"
  sections = [] if learned else _rope_sections(reader)
  fields = dict(family.fields)
  if not learned:
    fields.setdefault("rope_fraction", ("partial_rotary_factor", 1.0))
  values, taken = {}, {}
  for field, (key, default) in fields.items():
    names = ((key, True), *family.others.get(field, ()))
    spelled = [
      (name, taken.setdefault(name, reader.left.pop(name, None)), counts)
      for name, counts in names
      if name in reader.left or name in taken
    ]
    spelled += [
      (f"{where}.{_ROPE_KEYS[field]}", section.pop(_ROPE_KEYS[field]), wins)
      for where, section, wins in sections
      if _ROPE_KEYS.get(field) in section
    ]
    fixed = family.fixed.get(field)
    kind = type(getattr(TransformerConfig, field))
    bounds = (0.0, 1.0) if field == "rope_fraction" else _BOUNDS.get(field, (1, MAX_SIZE))
    bounds = bounds if fixed is None else (fixed, fixed)
    values[field] = reader.one(key, default, spelled, kind, *bounds)
  if not learned:
    values["rope_scaling"] = _read_scaling(sections, values["max_positions"], reader)
  return values


def _rope_sections(reader: _Reader) -> list[tuple[str, dict, bool]]:
  """Returns (name, section, whether it counts): transformers 4 and 5 prefer rope_scaling."""
  sections = []
  for where in ("rope_scaling", "rope_parameters"):
    section = reader.left.pop(where, None)
    if section is not None and not isinstance(section, dict):
      reader.refuse(where, section, "is no object")
    elif section:
      sections.append((where, dict(section), not sections))
  return sections


def _read_scaling(sections, max_positions: int, reader: _Reader) -> tuple | None:
  """Returns the scaling of the section that counts; another one must not have a scaling of its own.

  theta and fraction are taken out of the sections already.
  """
  scalings = [
    _parse_scaling(where, section, max_positions, reader) for where, section, _ in sections
  ]
  if len(scalings) == 2 and scalings[1] not in (None, scalings[0]):
    (one, first, _), (other, second, _) = sections
    reader.refuse(one, first, f"and {other}={shown(second)} disagree: remove one of them")
  return scalings[0] if scalings else None


def _parse_scaling(where: str, section: dict, max_positions: int, reader: _Reader) -> tuple | None:
  names = {key: section[key] for key in ("rope_type", "type") if key in section} or {"": "default"}
  kind, *others = names.values()
  if others and others[0] != kind:
    reader.refuse(f"{where}.rope_type", kind, f"and type={shown(others[0])} disagree")
  if not isinstance(kind, str) or kind not in _SCALINGS:
    reader.refuse(f"{where}.rope_type", kind, f"is not one of {', '.join(_SCALINGS)}")
    return None
  for key in section:
    if key not in (*_SCALINGS[kind], *names) and section[key] is not None:
      reader.refuse(f"{where}.{key}", section[key], f"is not supported with rope_type {kind}")
  numbers = []
  for key in _SCALINGS[kind]:
    if key == "original_max_position_embeddings":  # transformers' class, where it is absent
      default, *bounds = max_positions or 1, int
    else:
      default, *bounds = None, float, 1e-6, 1e6
    if key not in section and default is None:
      reader.refuse(f"{where}.{key}", None, f"is missing, and needed with rope_type {kind}")
    else:
      numbers.append(reader.typed(f"{where}.{key}", section.get(key, default), *bounds))
  return None if kind == "default" else (kind, *numbers)


def _read_activation(name: str, reader: _Reader) -> str | None:
  """Returns the kind of the MLP."""
  family = FAMILIES[name]
  key, default = family.activation
  function = reader.left.pop(key, default)
  for mlp, names in ACTIVATIONS.items():
    if function in names and (mlp == "swiglu") == ("mlp" in family.fixed):
      return mlp
  reader.refuse(key, function, f"is not supported in {name}")


def _read_dtype(reader: _Reader) -> str:
  """Returns the dtype of activations."""
  spelled = {key: reader.left.pop(key) for key in ("dtype", "torch_dtype") if key in reader.left}
  for key, value in spelled.items():
    if not (value is None or isinstance(value, str)) or value not in _DTYPES:
      reader.refuse(key, value, f"is not one of {', '.join(filter(None, _DTYPES))}")
  given = {value for value in spelled.values() if isinstance(value, str)}
  if len(given) > 1:
    reader.refuse(
      "dtype",
      spelled["dtype"],
      f"and torch_dtype={shown(spelled['torch_dtype'])} disagree: remove one of them",
    )
  return "bfloat16" if given == {"bfloat16"} else "float32"


def _read_ours(reader: _Reader) -> dict:
  """Returns the section "sparsek", its values of the right types and within bounds."""
  ours = reader.left.pop("sparsek", None)
  ours = {} if ours is None else ours
  if not isinstance(ours, dict):
    reader.refuse("sparsek", ours, "is no object")
    return {}
  values = dict(ours)
  for field, value in ours.items():
    name = f"sparsek.{field}"
    if field not in SPARSEK_FIELDS:
      reader.refuse(name, value, f"is not known; expected {', '.join(SPARSEK_FIELDS)}")
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
      values[field] = reader.typed(name, value, kind, *_BOUNDS.get(field, bounds))
    elif kind is bool:
      reader.typed(name, value, bool)
    elif not isinstance(value, str) and not (value is None and field == "implementation"):
      reader.refuse(name, value, "is no string")
  return values


def _is_term(term) -> bool:
  """Returns whether it is a term of a layer pattern with numbers of at most nine digits."""
  return isinstance(term, str) and "*" not in term and not re.search(r"\d{10}", term)


def _refuse_unknown(name: str, reader: _Reader) -> None:
  if (scaled := reader.left.pop("scale_attn_weights", True)) is not True:
    reader.refuse("scale_attn_weights", scaled, "is not supported")
  unknown = [
    (field, value)
    for field, value in reader.left.items()
    if field not in NO_EFFECT
    and not _NO_EFFECT_NAMES.fullmatch(field)
    and value not in (None, False, [], {}, "")
  ]
  why = ": this library does not know what it does (remove what changes no logit)"
  for i, (field, value) in enumerate(unknown):
    reader.refuse(field, value, f"is not supported in {name}{why if i == len(unknown) - 1 else ''}")


def _read_attention(name: str, num_layers: int | None, reader: _Reader) -> dict:
  """Returns full attention or a sliding window, layer by layer; {} where that cannot be said."""
  defaults = FAMILIES[name].attention
  if not defaults:
    return {"attention": "full"}
  fields = {key: reader.left.pop(key, default) for key, default in defaults.items()}
  kinds = reader.left.pop("layer_types", None)
  window = fields["sliding_window"]
  if window is not None:
    reader.typed("sliding_window", window, int)
  slides = window is not None
  first = 0
  if "use_sliding_window" in fields:
    use = reader.typed("use_sliding_window", fields["use_sliding_window"], bool)
    slides = slides and use is True
    first = reader.typed("max_window_layers", fields["max_window_layers"], int, 0) or 0
  if num_layers is None:
    return {}
  expected = [
    "sliding_attention" if slides and i >= first else "full_attention" for i in range(num_layers)
  ]
  kinds = expected if kinds is None else kinds
  known = {"full_attention": "full", "sliding_attention": "sliding_window"}
  if (
    not isinstance(kinds, list)
    or len(kinds) != num_layers
    or not all(isinstance(kind, str) and kind in known for kind in kinds)
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
  if name == "mistral" and kinds != expected:
    reader.refuse(
      "layer_types",
      kinds,
      f"and sliding_window={shown(window)} disagree: in mistral all layers have it",
    )
  kinds = tuple(known[kind] for kind in kinds)
  attention = kinds if len(set(kinds)) > 1 else kinds[0]
  return {"attention": attention, **({"window": window} if "sliding_window" in kinds else {})}


def write_config(name: str, config: TransformerConfig, dtype: str) -> dict:
  """The config.json of a model in the family `name`, as far as the family has words for it."""
  family = FAMILIES[name]
  fields = {key: getattr(config, field) for field, (key, _) in family.fields.items()}
  fields |= {
    "model_type": name,
    "architectures": [family.architecture],
    "torch_dtype": dtype,
    family.activation[0]: ACTIVATIONS[config.mlp][0],
  }
  if config.rope_scaling is not None and "rope_theta" in family.fields:
    kind, *numbers = config.rope_scaling
    keys = ("factor", "low_freq_factor", "high_freq_factor")
    fields["rope_scaling"] = {"rope_type": kind, **dict(zip(keys, numbers))}
    if kind == "llama3":
      fields["rope_scaling"]["original_max_position_embeddings"] = int(numbers[3])
  if name in ("mistral", "qwen2", "qwen3"):
    slides = "sliding_window" in config.layer_kinds
    fields["sliding_window"] = config.window if slides else None
    kinds = [
      {"sliding_window": "sliding_attention"}.get(kind, "full_attention")
      for kind in config.layer_kinds
    ]
    if name != "mistral":
      first = kinds.index("sliding_attention") if slides else config.num_layers
      fields |= {"use_sliding_window": slides, "layer_types": kinds, "max_window_layers": first}
  return fields


def describe(config: TransformerConfig, family: str | None = None, dtype: str = "float32") -> dict:
  """The config.json of a model, with what the family has no words for in its section "sparsek".

  Args:
    family: a key of FAMILIES; None takes the one with words for most.
    dtype: of the parameters.
  Raises:
    UsageError: where no family (or not this one) can hold such a model; names the fields that stand
      in the way.
  """
  if family is not None and family not in FAMILIES:
    raise UsageError(f"family={family!r} is not one of {', '.join(FAMILIES)}")
  found, reasons = [], []
  for name in FAMILIES if family is None else (family,):
    fields = write_config(name, config, dtype)
    try:
      back = read_config(fields, name)
    except UsageError as error:
      reasons.append(str(error))
      continue
    differ = [
      field
      for field in ARCHITECTURE
      if getattr(back, field) != getattr(config, field) and not _unused(config, field)
    ]
    if differ:
      reasons.append(
        f"{name} has no " + ", ".join(f"{field}={getattr(config, field)}" for field in differ)
      )
      continue
    ours = [field for field in SPARSEK_FIELDS if getattr(config, field) != getattr(back, field)]
    if ours:
      fields["sparsek"] = {field: getattr(config, field) for field in SPARSEK_FIELDS}
    found.append((len(ours), fields))
  if not found:
    raise UsageError("no family of Hugging Face's holds this model: " + "; ".join(reasons))
  return min(found, key=lambda pair: pair[0])[1]


def _unused(config: TransformerConfig, field: str) -> bool:
  """Whether a field changes nothing in this model."""
  return config.positions == "learned" and field.startswith("rope_")


class Layout(NamedTuple):
  """Where one of our parameters lies in a tensor: its name, the letters of its axes there, here,
  and its place on the axis "3".
  """

  name: str
  there: tuple[str, ...]
  here: str
  part: int | None


def layouts(family: Family, num_layers: int) -> dict[str, Layout]:
  """Our parameter (layers unstacked) -> where it lies, for every parameter a model of this family
  may have.
  """
  found = {}
  for name, path, layout in family.tensors:
    there, here = layout.split(" -> ")
    for i in range(num_layers if "*" in name else 1):
      for part, kind in (
        enumerate(("query", "key", "value")) if "|" in path else ((None, "query|key|value"),)
      ):
        ours = path.replace("query|key|value", kind).replace("*", str(i))
        found[ours] = Layout(name.replace("*", str(i)), tuple(there.split()), here, part)
  return found
