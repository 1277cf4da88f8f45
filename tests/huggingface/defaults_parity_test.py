"""Absent fields of config.json against transformers' config classes; needs transformers, no torch.

pip install -e '.[test,parity]'
"""

import json

import pytest

from sparsek.huggingface.config_fields import ACTIVATIONS
from sparsek.huggingface.config_reading import read_config
from sparsek.huggingface.families import FAMILIES, SPARSE

reason = "compares with transformers, which is not installed here: pip install -e '.[parity]'"
transformers = pytest.importorskip("transformers", reason=reason)

SIZES = {
  "vocab_size": 61,
  "hidden_size": 1024,
  "num_hidden_layers": 3,
  "num_attention_heads": 32,
  "intermediate_size": 48,
  "max_position_embeddings": 64,
  "tie_word_embeddings": True,
}
LLAMA = {
  **SIZES,
  "num_key_value_heads": 16,
  "head_dim": 10,
  "rms_norm_eps": 1e-3,
  "rope_theta": 500.0,
  "hidden_act": "silu",
}
QWEN = {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
# All fields that are read, with other values than their defaults.
FULL = {
  "llama": {**LLAMA, "attention_bias": True, "mlp_bias": True},
  "mistral": {**LLAMA, "sliding_window": 7},
  "qwen2": QWEN,
  "qwen3": {**QWEN, "attention_bias": True},
  "gpt_neox": {
    **SIZES,
    "layer_norm_eps": 1e-3,
    "rotary_emb_base": 500,
    "rotary_pct": 0.5,
    "use_parallel_residual": False,
    "attention_bias": False,
    "hidden_act": "gelu_new",
  },
  "gpt2": {
    "vocab_size": 61,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 6,
    "n_positions": 64,
    "n_inner": 40,
    "layer_norm_epsilon": 1e-3,
    "tie_word_embeddings": False,
    "activation_function": "gelu",
  },
}


def theirs(name, fields):
  """Returns the values of our fields in transformers' configuration."""
  config = transformers.AutoConfig.for_model(name, **json.loads(json.dumps(fields)))
  get = lambda *keys: next(
    (v for v in (getattr(config, key, None) for key in keys) if v is not None), None
  )
  rope = get("rope_scaling", "rope_parameters") or {}
  heads, width, layers = config.num_attention_heads, config.hidden_size, config.num_hidden_layers
  window = get("sliding_window") if get("use_sliding_window") is not False else None
  first = get("max_window_layers") or 0
  kinds = get("layer_types") or [
    "sliding_attention" if window and i >= first else "" for i in range(layers)
  ]
  slides = tuple("sliding" in kind for kind in kinds)
  values = {
    "vocab_size": config.vocab_size,
    "embed_dim": width,
    "num_layers": layers,
    "num_heads": heads,
    "num_kv_heads": get("num_key_value_heads") or heads,
    "head_dim": get("head_dim") or width // heads,
    "mlp_dim": get("intermediate_size", "n_inner") or 4 * width,
    "max_positions": config.max_position_embeddings,
    "norm_eps": get("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "tie_embeddings": config.tie_word_embeddings,
    "slides": slides,
    "window": window if any(slides) else None,
    "function": get("hidden_act", "activation_function"),
  }
  if name != "gpt2":
    values["rope_theta"] = rope.get("rope_theta", get("rope_theta", "rotary_emb_base"))
    values["rope_fraction"] = rope.get("partial_rotary_factor", get("rotary_pct") or 1.0)
    values["rope_type"] = rope.get("rope_type", "default")
  values |= {
    field: getattr(config, key)
    for field, key in (
      ("use_bias", "attention_bias"),
      ("mlp_bias", "mlp_bias"),
      ("parallel_residual", "use_parallel_residual"),
    )
    if hasattr(config, key)
  }
  return values


def assert_the_same(name, fields):
  config = read_config({"model_type": name, **fields}, name)
  slides = tuple(kind == "sliding_window" for kind in config.layer_kinds)
  ours = {
    "slides": slides,
    "window": config.window if any(slides) else None,
    "rope_type": (config.rope_scaling or ("default",))[0],
  }
  for field, value in theirs(name, fields).items():
    if field == "function":
      assert value in ACTIVATIONS[config.mlp], field
    else:
      assert ours.get(field, getattr(config, field, None)) == value, field


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != SPARSE])
def test_absent_fields_are_what_the_classes_say(name):
  assert_the_same(name, FULL[name])
  assert_the_same(name, {})
  for field in FULL[name]:
    assert_the_same(name, {key: value for key, value in FULL[name].items() if key != field})
  table = FAMILIES[name]
  read = {key for key, _ in table.fields.values()} | {table.activation[0], *table.attention}
  assert read - {"head_dim"} <= set(FULL[name]), "a field of the table is not tried here"


@pytest.mark.parametrize(
  "name, fields",
  [
    (
      "llama",
      {
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
      },
    ),
    ("llama", {"num_key_value_heads": None, "head_dim": None}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": None}),
    ("gpt2", {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 1}),
    (
      "gpt_neox",
      {
        "rope_theta": 10000,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "partial_rotary_factor": 0.25,
      },
    ),
    ("gpt_neox", {"rotary_emb_base": 500, "partial_rotary_factor": 0.25}),
  ],
)
def test_null_and_other_spellings_mean_what_they_mean_there(name, fields):
  assert_the_same(name, fields)
