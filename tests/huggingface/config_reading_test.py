"""config.json: what is read from it, what is refused, and what is written."""

import dataclasses
import json

import pytest

from sparsek.config import TransformerConfig
from sparsek.errors import UsageError
from sparsek.huggingface.config_reading import read_config
from sparsek.huggingface.config_writing import describe
from tests.huggingface.example_models import CASES, LLAMA, NEOX, ODD_VALUES

LLAMA_JSON = describe(LLAMA)
QWEN_JSON = describe(CASES["qwen2"][1])


@pytest.mark.parametrize(
  "fields, words",
  [
    (LLAMA_JSON | {"model_type": "bert"}, "model_type='bert' is not one of llama"),
    (
      LLAMA_JSON | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
      "rope_scaling.rope_type='yarn' is not one of default, linear, llama3",
    ),
    (LLAMA_JSON | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type='dynamic'"),
    (LLAMA_JSON | {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor=None is missing"),
    (
      LLAMA_JSON | {"rope_scaling": {"type": "linear", "factor": "4"}},
      "rope_scaling.factor='4' is no float",
    ),
    (
      LLAMA_JSON | {"rope_scaling": {"type": "linear", "factor": 4.0, "attention_factor": 2.0}},
      "rope_scaling.attention_factor=2.0 is not supported",
    ),
    (
      LLAMA_JSON | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
      "partial_rotary_factor=0.5",
    ),
    (LLAMA_JSON | {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported in llama"),
    (LLAMA_JSON | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
    (
      LLAMA_JSON | {"quantization_config": {"bits": 4}},
      "quantization_config={'bits': 4} is not supported",
    ),
    (LLAMA_JSON | {"sliding_window": 8}, "sliding_window=8 is not supported in llama"),
    (LLAMA_JSON | {"hidden_size": None}, "hidden_size=None is no int"),
    (LLAMA_JSON | {"hidden_size": True}, "hidden_size=True is no int"),
    (LLAMA_JSON | {"rms_norm_eps": float("inf")}, "rms_norm_eps=inf must be from 0.0 to 1.0"),
    (LLAMA_JSON | {"num_key_value_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
    (LLAMA_JSON | {"num_attention_heads": 0}, "num_attention_heads=0 must be from 1"),
    (LLAMA_JSON | {"sparsek": {"embed_dim": 3}}, "sparsek.embed_dim=3 is not known"),
    (LLAMA_JSON | {"sparsek": {"k": "x"}}, "sparsek.k='x' is no int"),
    (QWEN_JSON | {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types=.*chunked"),
    (QWEN_JSON | {"use_sliding_window": False}, "asks for sliding_attention without"),
    (QWEN_JSON | {"layer_types": None, "max_window_layers": None}, "max_window_layers=None"),
    (
      describe(CASES["gpt2"][1]) | {"scale_attn_by_inverse_layer_idx": True},
      "scale_attn_by_inverse_layer_idx=True",
    ),
    (describe(CASES["gpt2"][1]) | {"scale_attn_weights": False}, "scale_attn_weights=False"),
  ],
)
def test_fields_without_a_counterpart_are_refused(fields, words):
  with pytest.raises(UsageError, match=words):
    read_config(fields, "config.json")


def test_rope_is_read_as_transformers_4_and_5_write_it():
  scaling = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
  }
  old = LLAMA_JSON | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}}
  new = {**LLAMA_JSON, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
  del new["rope_theta"]
  want = dataclasses.replace(LLAMA, rope_theta=5e5, rope_scaling=("llama3", 8, 1, 4, 16))
  assert read_config(old, "old") == read_config(new, "new") == want
  neox = describe(NEOX)
  del neox["rotary_pct"], neox["rotary_emb_base"]
  assert (
    read_config(
      neox
      | {
        "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4, "rope_type": "default"}
      },
      "new",
    )
    == NEOX
  )


PLAIN = {"model_type": "llama", "num_hidden_layers": 2}  # the rest by default
LINEAR = {"rope_type": "linear", "factor": 4.0}
NEOX_451 = {
  "model_type": "gpt_neox",
  "rope_theta": 500,
  "rotary_emb_base": 500,
  "rotary_pct": 0.5,
  "partial_rotary_factor": 0.5,
  "rope_scaling": None,
  "attention_bias": True,
}


@pytest.mark.parametrize(
  "fields, expected",
  [
    (
      {"model_type": "mistral"},
      {"attention": ("sliding_window",), "window": 4096, "mlp_dim": 14336},
    ),
    ({"model_type": "mistral", "sliding_window": None}, {"attention": ("full",)}),
    (
      {"model_type": "qwen2", "use_sliding_window": True, "num_hidden_layers": 29},
      {"attention": ("full",) * 28 + ("sliding_window",), "window": 4096, "max_positions": 32768},
    ),
    ({"model_type": "qwen3"}, {"head_dim": 128, "qk_norm": True, "attention": ("full",)}),
    ({"model_type": "gpt2", "n_layer": 1}, {"mlp": "gelu_tanh", "mlp_dim": 3072}),
    ({"model_type": "gpt2", "num_hidden_layers": 3, "n_inner": None}, {"num_layers": 3}),
    ({"model_type": "gpt_neox"}, {"mlp": "gelu", "rope_fraction": 0.25, "parallel_residual": True}),
    (NEOX_451, {"rope_theta": 500.0, "rope_fraction": 0.5}),
    (PLAIN, {"mlp": "swiglu", "num_kv_heads": 32, "rope_theta": 1e4, "tie_embeddings": False}),
    (
      PLAIN | {"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 1e4}},
      {"rope_scaling": ("linear", 4.0)},
    ),
    (
      PLAIN
      | {"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "rope_theta": 7.0}, "rope_theta": 7},
      {"rope_scaling": ("linear", 4.0), "rope_theta": 7.0},
    ),
    (
      PLAIN
      | {"rope_scaling": {}, "rope_parameters": {**LINEAR, "type": "linear", "rope_theta": 7}},
      {"rope_scaling": ("linear", 4.0), "rope_theta": 7.0},
    ),
    (
      PLAIN
      | {
        "rope_parameters": {
          "rope_type": "llama3",
          "factor": 8.0,
          "low_freq_factor": 1.0,
          "high_freq_factor": 4.0,
        }
      },
      {"rope_scaling": ("llama3", 8.0, 1.0, 4.0, 2048.0)},
    ),
    (PLAIN | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    (
      PLAIN
      | {
        "attention_dropout": 0.1,
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.5,
        "use_cache": True,
        "output_attentions": True,
        "is_decoder": True,
        "temperature": 0.6,
        "_attn_implementation": "sdpa",
        "unk_token_id": 3,
        "max_sequence_length": 2048,
        "chunk_size_feed_forward": 8,
        "rope_interleaved": False,
        "pruned_heads": {},
      },
      {},
    ),
  ],
)
def test_absent_fields_and_other_spellings_are_read_as_transformers_does(fields, expected):
  """defaults_parity_test.py compares with transformers itself."""
  config = read_config(fields, "config.json")
  assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize(
  "fields, words",
  [
    (NEOX_451 | {"rope_theta": 7}, "rope_theta=7.0 and rotary_emb_base=500.0 disagree"),
    ({"model_type": "gpt_neox", "rope_theta": 7}, "rope_theta=7.0 and rotary_emb_base=10000.0 dis"),
    (NEOX_451 | {"partial_rotary_factor": 1.0}, "partial_rotary_factor=1.0 and rotary_pct=0.5 "),
    (
      {"model_type": "gpt2", "n_layer": 1, "num_hidden_layers": 2},
      "num_hidden_layers=2 and n_layer=1 disagree",
    ),
    (
      PLAIN | {"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "factor": 2.0}},
      "rope_scaling=.*4.0.* and rope_parameters=.*2.0.* disagree",
    ),
    (
      PLAIN | {"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 5e5}},
      "rope_parameters.rope_theta=500000.0 and rope_theta=10000.0 disagree",
    ),
    (
      PLAIN | {"rope_theta": 7, "rope_parameters": {"rope_theta": 8}},
      "rope_parameters.rope_theta=8.0 and rope_theta=7.0 disagree",
    ),
    (PLAIN | {"rope_scaling": LINEAR | {"type": "dynamic"}}, "'linear' and type='dynamic' dis"),
    (PLAIN | {"dtype": "float16", "torch_dtype": "bfloat16"}, "dtype='float16' and torch_dtype="),
    (
      {"model_type": "mistral", "num_hidden_layers": 1, "layer_types": ["full_attention"]},
      "layer_types=.* and sliding_window=4096 disagree",
    ),
    (PLAIN | {"auto_map": {"AutoModel": "modeling.Model"}}, "auto_map=.* is not supported in ll"),
    (
      PLAIN
      | {"hidden_size": -1, "rope_theta": 0, "dtype": 3, "hidden_act": [], "sparsek": {"k": 0}},
      "hidden_size=-1.*rope_theta=0 .*hidden_act=.*dtype=3.*sparsek.k=0",
    ),
    (PLAIN | {"soft": 1, "cap": 2}, r"soft=1 is not .*; cap=2 is not .*\(remove what changes no"),
    (PLAIN | {"num_hidden_layers": 0, "soft": 1}, "num_hidden_layers=0 must be .*; soft=1 is not"),
    (PLAIN | {"sparsek": 0}, "sparsek=0 is no object"),
    (PLAIN | {"hidden_size": 30}, "num_attention_heads=32 must divide the width 30"),
    (PLAIN | {f"x{i}": i + 1 for i in range(30)}, "; and 20 more$"),
  ],
)
def test_what_disagrees_is_refused_all_in_one_message(fields, words):
  with pytest.raises(UsageError, match=words) as error:
    read_config(fields, "config.json")
  assert "\n" not in str(error.value)


def test_any_value_of_any_field_ends_in_a_model_or_in_one_sentence():
  """Tries all odd values of all fields, also of those in sections."""
  rope = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
  }
  extra_fields = {"rope_parameters": rope, "dtype": "float32", "eos_token_id": 2, "a\nb": 0}
  bases = [
    describe(config) | (extra_fields if family == "qwen2" else {})
    for family, config in CASES.values()
  ]
  single = [(base, (key,), value) for base in bases for key in base for value in ODD_VALUES]
  sections = ("sparsek", "rope_parameters")
  single += [
    (base, (outer, key), value)
    for base in bases
    for outer in sections
    for key in base.get(outer, ())
    for value in ODD_VALUES
  ]
  models = 0
  for base, path, value in single:
    fields = json.loads(json.dumps(base))
    target = fields if len(path) == 1 else fields[path[0]]
    target[path[-1]] = value
    try:
      assert isinstance(read_config(fields, "config.json"), TransformerConfig)
      models += 1
    except UsageError as error:
      assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000
  print(f"{models} models of {len(single)}")
  assert models > 100


def test_qwen2_upper_layers_slide():
  fields = QWEN_JSON | {
    "layer_types": None,
    "max_window_layers": 1,
    "use_sliding_window": True,
    "sliding_window": 3,
  }
  assert read_config(fields, "config.json").layer_kinds == ("full", "sliding_window")
  assert read_config(fields | {"use_sliding_window": False}, "config.json").layer_kinds == (
    "full",
    "full",
  )


def test_models_without_a_family_are_refused():
  with pytest.raises(UsageError, match="llama has no norm=layer_norm;.*gpt_neox: hidden_act"):
    describe(dataclasses.replace(LLAMA, norm="layer_norm"))
  with pytest.raises(UsageError, match="no qk_norm=True"):
    describe(dataclasses.replace(LLAMA, qk_norm=True), family="llama")
  with pytest.raises(UsageError, match="family='bert' is not one of"):
    describe(LLAMA, family="bert")
