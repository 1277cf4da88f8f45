"""Models of sparsek/huggingface/modeling_sparsek.py, which transformers runs with their attention.

The family can express every model. The names are those of Llama where it has them.
"""

from sparsek.huggingface.families.family import Family, common_fields
from sparsek.huggingface.families.llama import LLAMA_TENSORS

_NORMS = {
  "model.layers.*.input_layernorm": "layers_*/attention_norm",
  "model.layers.*.post_attention_layernorm": "layers_*/mlp_norm",
  "model.norm": "final_norm",
}
_SCORER = {
  "linear.weight": ("linear/kernel", "S E -> ES"),
  "conv_in.weight": ("conv_in/kernel", "C E -> EC"),
  "conv.weight": ("conv/kernel", "C T -> TC"),
  "conv_out.weight": ("conv_out/kernel", "S C -> CS"),
  **{name: (name, "S -> S") for name in ("scale", "slope", "amplitude", "sink")},
}
_TENSORS = (
  *LLAMA_TENSORS,
  ("model.embed_positions.weight", "positions/embedding", "P E -> PE"),
  *((f"{name}.bias", f"{path}/bias", "E -> E") for name, path in _NORMS.items()),
  *(
    (f"model.layers.*.self_attn.scorer.{name}", f"layers_*/attention/scorer/{path}", layout)
    for name, (path, layout) in _SCORER.items()
  ),
)

SPARSEK = Family(
  architecture="SparsekForCausalLM",
  prefix="model.",
  tensors=_TENSORS,
  fields={
    **common_fields(257, 128, 4, 4, 384, 2048),
    "num_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "norm_eps": ("norm_eps", 1e-6),
    "qk_norm": ("qk_norm", False),
    "use_bias": ("attention_bias", False),
    "out_bias": ("attention_out_bias", False),
    "mlp_bias": ("mlp_bias", False),
    "parallel_residual": ("use_parallel_residual", False),
  },
  fixed={},
  activation=None,
  section=("norm", "mlp", "positions", "rope_theta", "rope_fraction", "rope_scaling"),
)
