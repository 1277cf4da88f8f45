"""How Hugging Face's model families are written down: their tensors and the fields of config.json, one table a family, read in both directions.

A tensor's row is (its name, our parameter, layout). The layout names axes by letters: "HD E -> EHD" is a matrix [H * D, E] there and an array [E, H, D] here.
V vocabulary, P positions, E width, H heads, G key/value heads, D head dimension, F width of the MLP; "3" holds query, key and value of a fused projection.
`*` is the layer's number; rows whose parameter the configuration does not have (a bias, the head of tied embeddings) are left out.
"""

import dataclasses
import math
from typing import NamedTuple

from sparsek.config import ATTENTION_KINDS, TransformerConfig
from sparsek.errors import UsageError

REQUIRED = object()
MAX_LAYERS = 10_000


class Family(NamedTuple):
  """One model_type.

  Attributes:
    architecture: the class in transformers.
    prefix: of all names but the output matrix's; checkpoints of the bare model lack it.
    tensors: (name, our parameter, layout).
    fields: our field -> (name in config.json, value where it is absent). Absent means what transformers takes it for; None is worked out in `read_config`.
    fixed: our fields that the family has no choice in.
    activation: the name of its field for the MLP's function.
  """
  architecture: str
  prefix: str
  tensors: tuple[tuple[str, str, str], ...]
  fields: dict[str, tuple[str, object]]
  fixed: dict[str, object]
  activation: str = "hidden_act"


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
    ("gpt_neox.layers.*.attention.query_key_value.weight", "layers_*/attention/query|key|value/kernel", "H3D E -> EHD"),
    ("gpt_neox.layers.*.attention.query_key_value.bias", "layers_*/attention/query|key|value/bias", "H3D -> HD"),
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
    ("transformer.h.*.attn.c_attn.weight", "layers_*/attention/query|key|value/kernel", "E 3HD -> EHD"),
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
IGNORED_TENSORS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias")

_SIZES = {"vocab_size": ("vocab_size", REQUIRED), "embed_dim": ("hidden_size", REQUIRED), "num_layers": ("num_hidden_layers", REQUIRED),
          "num_heads": ("num_attention_heads", REQUIRED), "mlp_dim": ("intermediate_size", REQUIRED)}
_LLAMA_FIELDS = {**_SIZES, "num_kv_heads": ("num_key_value_heads", None), "head_dim": ("head_dim", None), "max_positions": ("max_position_embeddings", 2048),
                 "norm_eps": ("rms_norm_eps", 1e-6), "tie_embeddings": ("tie_word_embeddings", False), "rope_theta": ("rope_theta", 10000.0)}
_LLAMA_FIXED = dict(norm="rms_norm", positions="rope", rope_fraction=1.0, parallel_residual=False, mlp="swiglu")
_NEOX_FIELDS = {**_SIZES, "max_positions": ("max_position_embeddings", 2048), "norm_eps": ("layer_norm_eps", 1e-5),
                "tie_embeddings": ("tie_word_embeddings", False), "rope_theta": ("rotary_emb_base", 10000.0), "rope_fraction": ("rotary_pct", 0.25),
                "parallel_residual": ("use_parallel_residual", True), "use_bias": ("attention_bias", True), "out_bias": ("attention_bias", True)}
_GPT2_FIELDS = {"vocab_size": ("vocab_size", REQUIRED), "embed_dim": ("n_embd", REQUIRED), "num_layers": ("n_layer", REQUIRED),
                "num_heads": ("n_head", REQUIRED), "mlp_dim": ("n_inner", None), "max_positions": ("n_positions", 1024),
                "norm_eps": ("layer_norm_epsilon", 1e-5), "tie_embeddings": ("tie_word_embeddings", True)}
_PLAIN_ROPE = dict(rope_theta=10000.0, rope_fraction=1.0, rope_scaling=None)
_BIASES = {"use_bias": ("attention_bias", False), "out_bias": ("attention_bias", False)}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", "model.", _LLAMA_TENSORS, {**_LLAMA_FIELDS, **_BIASES, "mlp_bias": ("mlp_bias", False)},
                    {**_LLAMA_FIXED, "qk_norm": False}),
    "mistral": Family("MistralForCausalLM", "model.", _LLAMA_TENSORS, {**_LLAMA_FIELDS, "num_kv_heads": ("num_key_value_heads", 8)},
                      {**_LLAMA_FIXED, "qk_norm": False, "use_bias": False, "out_bias": False, "mlp_bias": False}),
    "qwen2": Family("Qwen2ForCausalLM", "model.", _LLAMA_TENSORS, {**_LLAMA_FIELDS, "num_kv_heads": ("num_key_value_heads", 32)},
                    {**_LLAMA_FIXED, "qk_norm": False, "use_bias": True, "out_bias": False, "mlp_bias": False}),
    "qwen3": Family("Qwen3ForCausalLM", "model.", _LLAMA_TENSORS,
                    {**_LLAMA_FIELDS, **_BIASES, "num_kv_heads": ("num_key_value_heads", 32), "head_dim": ("head_dim", 128)},
                    {**_LLAMA_FIXED, "qk_norm": True, "mlp_bias": False}),
    "gpt_neox": Family("GPTNeoXForCausalLM", "gpt_neox.", _NEOX_TENSORS, _NEOX_FIELDS, dict(norm="layer_norm", positions="rope", qk_norm=False, mlp_bias=True)),
    "gpt2": Family("GPT2LMHeadModel", "transformer.", _GPT2_TENSORS, _GPT2_FIELDS,
                   {**_PLAIN_ROPE, **dict(norm="layer_norm", positions="learned", parallel_residual=False, qk_norm=False, use_bias=True, out_bias=True,
                                          mlp_bias=True)}, "activation_function"),
}
# Our MLP -> what a config.json may call its function; the first is written.
ACTIVATIONS = {"swiglu": ("silu", "swish"), "gelu": ("gelu",), "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")}
# Fields of ours that config.json has words for; all others go into its section "sparsek", but for the attention of dense models and adapters, which are merged.
ARCHITECTURE = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "max_positions", "norm", "norm_eps", "positions",
                "rope_theta", "rope_fraction", "rope_scaling", "qk_norm", "mlp", "use_bias", "out_bias", "mlp_bias", "parallel_residual", "tie_embeddings")
SPARSEK_FIELDS = tuple(field.name for field in dataclasses.fields(TransformerConfig) if field.name not in (*ARCHITECTURE, "lora_rank", "lora_alpha"))
# Fields that change no logit.
NO_EFFECT = set("""
    _name_or_path architectures model_type transformers_version torch_dtype dtype use_cache bos_token_id eos_token_id pad_token_id attention_dropout
    hidden_dropout classifier_dropout resid_pdrop embd_pdrop attn_pdrop initializer_range pretraining_tp return_dict id2label label2id problem_type summary_type
    summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout task_specific_params n_ctx tokenizer_class is_llama_config
    transformers.js_config reorder_and_upcast_attn num_labels torchscript sparsek""".split())


def read_config(fields: dict, path: str) -> TransformerConfig:
  """The model that a config.json describes, with the attention it describes, full or of a sliding window, or that of its section "sparsek".

  Args:
    fields: the JSON object.
    path: of the file, for messages.
  Raises:
    UsageError: for a family or a field that this library has no words for, naming the field and its value.
  """
  name, left = fields.get("model_type"), dict(fields)

  def refuse(field, value, why):
    raise UsageError(f"{path}: {field}={str(value)[:200]!r} {why}" if isinstance(value, str) else f"{path}: {field}={str(value)[:200]} {why}")
  if name not in FAMILIES:
    refuse("model_type", name, f"is not one of {', '.join(FAMILIES)}")
  family = FAMILIES[name]
  values = {}
  if family.fixed.get("positions") != "learned":
    values |= _read_rope(family, left, refuse)
  for field, (key, default) in family.fields.items():
    value = fields.get(key)
    left.pop(key, None)
    if field in values:                                      # from rope_parameters
      continue
    if value is None:
      if default is REQUIRED:
        refuse(key, value, "is missing, and needed")
      value = default
    values[field] = _typed(key, value, type(getattr(TransformerConfig, field)), refuse)
  heads, width = values["num_heads"], values["embed_dim"]
  if values["num_layers"] > MAX_LAYERS:
    refuse(family.fields["num_layers"][0], values["num_layers"], f"must be at most {MAX_LAYERS}")
  if heads < 1 or (values.get("head_dim") is None and width % heads):
    refuse("number of heads", heads, f"must divide the width {width}")
  values["num_kv_heads"] = values.get("num_kv_heads") or heads
  values["head_dim"] = values.get("head_dim") or width // heads
  values["mlp_dim"] = values["mlp_dim"] or 4 * width
  activation = left.pop(family.activation, None)
  known = [mlp for mlp, names in ACTIVATIONS.items() if activation in names and (mlp == "swiglu") == ("mlp" in family.fixed)]
  if not known:
    refuse(family.activation, activation, f"is not supported in {name}")
  values |= {**family.fixed, "mlp": known[0], **_read_attention(name, values["num_layers"], left, refuse)}
  if left.pop("scale_attn_weights", True) is not True:
    refuse("scale_attn_weights", fields["scale_attn_weights"], "is not supported")
  for field, value in left.items():
    if field not in NO_EFFECT and value not in (None, False, [], {}, ""):
      refuse(field, value, f"is not supported in {name}: this library does not know what it does (remove the field if it changes no logit)")
  values["dtype"] = "bfloat16" if (fields.get("dtype") or fields.get("torch_dtype")) == "bfloat16" else "float32"
  ours = fields.get("sparsek") or {}
  if not isinstance(ours, dict):
    refuse("sparsek", ours, "is no object")
  for field, value in ours.items():
    if field not in SPARSEK_FIELDS:
      refuse(f"sparsek.{field}", value, f"is not known; expected {', '.join(SPARSEK_FIELDS)}")
    if field == "attention" and not (isinstance(value, list) and all(isinstance(term, str) and "*" not in term for term in value)):
      refuse("sparsek.attention", value, f"is no list of {', '.join(ATTENTION_KINDS)}, with a k or a window of their own or not")
  try:
    return TransformerConfig(**{**values, **ours})
  except (ValueError, TypeError, AttributeError) as error:
    raise UsageError(f"{path} describes no model: {error}") from None


def _typed(key: str, value, kind: type, refuse):
  """The value of a field as int, float or bool; None stays."""
  if value is None:
    return None
  right = type(value) in ((int, float) if kind is float else (kind,))
  if not right or not 0 <= value < math.inf:
    refuse(key, value, f"is no {kind.__name__}" if not right else "must not be negative, and finite")
  return kind(value)


def _read_rope(family: Family, left: dict, refuse) -> dict:
  """theta, fraction and scaling, from "rope_parameters" (transformers 5) or "rope_scaling" beside fields of their own (before)."""
  values = {"rope_scaling": None}
  for where in ("rope_scaling", "rope_parameters"):
    rope = left.pop(where, None)
    if rope is None:
      continue
    if not isinstance(rope, dict):
      refuse(where, rope, "is no object")
    rope = dict(rope)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    for field, key in (("rope_theta", "rope_theta"), ("rope_fraction", "partial_rotary_factor")):
      if key in rope:
        values[field] = _typed(f"{where}.{key}", rope.pop(key), float, refuse)
    keys = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if not isinstance(kind, str) or kind not in keys:
      refuse(f"{where}.rope_type", kind, f"is not one of {', '.join(keys)}")
    for key in keys[kind]:
      if rope.get(key) is None:
        refuse(f"{where}.{key}", None, f"is missing, and needed with rope_type {kind}")
    numbers = [_typed(f"{where}.{key}", rope.pop(key), float, refuse) for key in keys[kind]]
    for key, value in rope.items():
      refuse(f"{where}.{key}", value, f"is not supported with rope_type {kind}")
    values["rope_scaling"] = None if kind == "default" else (kind, *numbers)
  fraction = values.get("rope_fraction")
  if fraction not in (None, 1.0) and "rope_fraction" not in family.fields:
    refuse("partial_rotary_factor", fraction, f"is not supported in {family.architecture}")
  return values


def _read_attention(name: str, num_layers: int, left: dict, refuse) -> dict:
  """Full attention or a sliding window, layer by layer."""
  if name not in ("mistral", "qwen2", "qwen3"):
    return {"attention": "full"}
  window, kinds = left.pop("sliding_window", None), left.pop("layer_types", None)
  if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
    refuse("sliding_window", window, "is no positive integer")
  if name == "mistral":
    slides = window is not None
  else:
    slides = window is not None and left.pop("use_sliding_window", False) is True
    first = left.pop("max_window_layers", None)
    if slides and kinds is None:
      if not isinstance(first, int):
        refuse("max_window_layers", first, "is no integer")
      kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
  if kinds is not None:
    known = {"full_attention": "full", "sliding_attention": "sliding_window"}
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
      refuse("layer_types", kinds, f"must name full_attention or sliding_attention for each of {num_layers} layers")
    if "sliding_attention" in kinds and not slides:
      refuse("layer_types", kinds, "asks for sliding_attention without a sliding_window in use")
    kinds = tuple(known[kind] for kind in kinds)
    if len(set(kinds)) > 1:
      return {"attention": kinds, "window": window}
    slides = kinds[0] == "sliding_window"
  return {"attention": "sliding_window", "window": window} if slides else {"attention": "full"}


def write_config(name: str, config: TransformerConfig, dtype: str) -> dict:
  """The config.json of a model in the family `name`, as far as the family has words for it."""
  family = FAMILIES[name]
  fields = {key: getattr(config, field) for field, (key, _) in family.fields.items()}
  fields |= {"model_type": name, "architectures": [family.architecture], "torch_dtype": dtype, family.activation: ACTIVATIONS[config.mlp][0]}
  if config.rope_scaling is not None and "rope_theta" in family.fields:
    kind, *numbers = config.rope_scaling
    keys = ("factor", "low_freq_factor", "high_freq_factor")
    fields["rope_scaling"] = {"rope_type": kind, **dict(zip(keys, numbers))}
    if kind == "llama3":
      fields["rope_scaling"]["original_max_position_embeddings"] = int(numbers[3])
  if name in ("mistral", "qwen2", "qwen3"):
    slides = "sliding_window" in config.layer_kinds
    fields["sliding_window"] = config.window if slides else None
    kinds = [{"sliding_window": "sliding_attention"}.get(kind, "full_attention") for kind in config.layer_kinds]
    if name != "mistral":
      fields |= {"use_sliding_window": slides, "layer_types": kinds, "max_window_layers": 0 if slides else config.num_layers}
  return fields


def describe(config: TransformerConfig, family: str | None = None, dtype: str = "float32") -> dict:
  """The config.json of a model, with what the family has no words for in its section "sparsek".

  Args:
    family: a key of FAMILIES; None takes the one with words for most.
    dtype: of the parameters.
  Raises:
    UsageError: where no family (or not this one) can hold such a model; names the fields that stand in the way.
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
    differ = [field for field in ARCHITECTURE if getattr(back, field) != getattr(config, field) and not _unused(config, field)]
    if differ:
      reasons.append(f"{name} has no " + ", ".join(f"{field}={getattr(config, field)}" for field in differ))
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
  """Where one of our parameters lies in a tensor: its name, the letters of its axes there, here, and its place on the axis "3"."""
  name: str
  there: tuple[str, ...]
  here: str
  part: int | None


def layouts(family: Family, num_layers: int) -> dict[str, Layout]:
  """Our parameter (layers unstacked) -> where it lies, for every parameter a model of this family may have."""
  found = {}
  for name, path, layout in family.tensors:
    there, here = layout.split(" -> ")
    for i in range(num_layers if "*" in name else 1):
      for part, kind in enumerate(("query", "key", "value")) if "|" in path else ((None, "query|key|value"),):
        ours = path.replace("query|key|value", kind).replace("*", str(i))
        found[ours] = Layout(name.replace("*", str(i)), tuple(there.split()), here, part)
  return found
