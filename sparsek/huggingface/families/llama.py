"""Llama, and the families with its names: Mistral, Qwen 2 and Qwen 3."""

from sparsek.huggingface.families.family import Family, Fields, bias_fields, common_fields

LLAMA_TENSORS = (
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
_FIXED = dict(
  norm="rms_norm", positions="rope", rope_fraction=1.0, parallel_residual=False, mlp="swiglu"
)


def _fields(kv_heads: int | None, head_dim: int | None, *sizes: int) -> Fields:
  return {
    **common_fields(*sizes),
    "num_kv_heads": ("num_key_value_heads", kv_heads),
    "head_dim": ("head_dim", head_dim),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "rope_theta": ("rope_theta", 10000.0),
  }


LLAMA = Family(
  architecture="LlamaForCausalLM",
  prefix="model.",
  tensors=LLAMA_TENSORS,
  fields={
    **_fields(None, None, 32000, 4096, 32, 32, 11008, 2048),
    **bias_fields(False),
    "mlp_bias": ("mlp_bias", False),
  },
  fixed={**_FIXED, "qk_norm": False},
)
MISTRAL = Family(
  architecture="MistralForCausalLM",
  prefix="model.",
  tensors=LLAMA_TENSORS,
  fields=_fields(8, None, 32000, 4096, 32, 32, 14336, 131072),
  fixed={**_FIXED, "qk_norm": False, "use_bias": False, "out_bias": False, "mlp_bias": False},
  attention={"sliding_window": 4096},
)

_QWEN_SIZES = (151936, 4096, 32, 32, 22016, 32768)
_QWEN_ATTENTION = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
QWEN2 = Family(
  architecture="Qwen2ForCausalLM",
  prefix="model.",
  tensors=LLAMA_TENSORS,
  fields=_fields(32, None, *_QWEN_SIZES),
  fixed={**_FIXED, "qk_norm": False, "use_bias": True, "out_bias": False, "mlp_bias": False},
  attention=_QWEN_ATTENTION,
)
QWEN3 = Family(
  architecture="Qwen3ForCausalLM",
  prefix="model.",
  tensors=LLAMA_TENSORS,
  fields={**_fields(32, 128, *_QWEN_SIZES), **bias_fields(False)},
  fixed={**_FIXED, "qk_norm": True, "mlp_bias": False},
  attention=_QWEN_ATTENTION,
)
