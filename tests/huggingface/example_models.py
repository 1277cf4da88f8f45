"""Small models of every family, and values that no field of config.json should have."""

import dataclasses

from sparsek.config import TransformerConfig

LLAMA = TransformerConfig(
  vocab_size=19,
  num_layers=2,
  embed_dim=8,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_dim=10,
  attention="full",
  tie_embeddings=False,
  max_positions=32,
)
NEOX = dataclasses.replace(
  LLAMA,
  num_kv_heads=4,
  head_dim=4,
  embed_dim=16,
  norm="layer_norm",
  mlp="gelu",
  rope_fraction=0.5,
  use_bias=True,
  out_bias=True,
  mlp_bias=True,
  parallel_residual=True,
)
CASES = {
  "llama": ("llama", LLAMA),
  "llama, biases, llama3": (
    "llama",
    dataclasses.replace(
      LLAMA, use_bias=True, out_bias=True, mlp_bias=True, rope_scaling="llama3:8:1:4:16"
    ),
  ),
  "mistral": ("mistral", dataclasses.replace(LLAMA, attention="sliding_window", window=5)),
  "qwen2": (
    "qwen2",
    dataclasses.replace(
      LLAMA, use_bias=True, attention=("full", "sliding_window"), window=3, tie_embeddings=True
    ),
  ),
  "qwen3": ("qwen3", dataclasses.replace(LLAMA, qk_norm=True, rope_theta=5e5, norm_eps=1e-5)),
  "gpt_neox": ("gpt_neox", NEOX),
  "gpt2": (
    "gpt2",
    dataclasses.replace(
      NEOX,
      parallel_residual=False,
      rope_fraction=1.0,
      positions="learned",
      mlp="gelu_tanh",
      tie_embeddings=True,
    ),
  ),
  "sparsek": (
    "sparsek",
    dataclasses.replace(
      LLAMA,
      attention="sparsek,full",
      k=3,
      window=4,
      scorer="conv",
      gate="value",
      tie_embeddings=True,
    ),
  ),
  "sparsek, layers of their own k and window": (
    "sparsek",
    dataclasses.replace(LLAMA, attention="sliding_window:w3,sparsek:k5:w2", k=3, window=4),
  ),
  "sparsek, fused, scanned": (
    "gpt_neox",
    dataclasses.replace(
      NEOX,
      num_layers=4,
      attention="sparsek,linear",
      k=3,
      window=4,
      scan_layers=True,
      dtype="bfloat16",
    ),
  ),
}
ODD_VALUES = [
  None,
  True,
  False,
  0,
  1,
  -1,
  3,
  2**31,
  10**18,
  10**400,
  -0.5,
  16.0,
  1e308,
  float("inf"),
  float("nan"),
  "",
  "4",
  "\ud800",
  "a\nb",
  [],
  [1],
  ["full"],
  [[[]]],
  {},
  {"a": 1},
  "bfloat16",
  "full*99",
  ["sparsek:k99999999999"],
  {"rope_type": "linear", "factor": 2.0},
  {"k": -1},
]
