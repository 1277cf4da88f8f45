"""GPT-NeoX, such as Pythia."""

from sparsek.huggingface.families.family import Family, bias_fields, common_fields

_TENSORS = (
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

GPT_NEOX = Family(
  architecture="GPTNeoXForCausalLM",
  prefix="gpt_neox.",
  tensors=_TENSORS,
  fields={
    **common_fields(50432, 6144, 44, 64, 24576, 2048),
    "norm_eps": ("layer_norm_eps", 1e-5),
    "rope_theta": ("rotary_emb_base", 10000.0),
    "rope_fraction": ("rotary_pct", 0.25),
    "parallel_residual": ("use_parallel_residual", True),
    **bias_fields(True),
  },
  fixed=dict(norm="layer_norm", positions="rope", qk_norm=False, mlp_bias=True),
  activation=("hidden_act", "gelu"),
  # transformers 4 writes these beside the names that it reads.
  others={
    "rope_theta": (("rope_theta", False),),
    "rope_fraction": (("partial_rotary_factor", False),),
  },
)
