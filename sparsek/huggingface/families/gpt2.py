"""GPT-2."""

from sparsek.huggingface.families.family import Family

_TENSORS = (
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

GPT2 = Family(
  architecture="GPT2LMHeadModel",
  prefix="transformer.",
  tensors=_TENSORS,
  fields={
    "vocab_size": ("vocab_size", 50257),
    "embed_dim": ("n_embd", 768),
    "num_layers": ("n_layer", 12),
    "num_heads": ("n_head", 12),
    "mlp_dim": ("n_inner", None),
    "max_positions": ("n_positions", 1024),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "tie_embeddings": ("tie_word_embeddings", True),
  },
  fixed=dict(
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
  ),
  activation=("activation_function", "gelu_new"),
  # The attribute_map of transformers' class.
  others={
    "embed_dim": (("hidden_size", True),),
    "num_layers": (("num_hidden_layers", True),),
    "num_heads": (("num_attention_heads", True),),
    "max_positions": (("max_position_embeddings", True),),
  },
)
