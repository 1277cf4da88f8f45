"""Named sizes of models."""

import dataclasses

from sparsek.config.checks import check_choice
from sparsek.config.model import TransformerConfig

# The fields of a row of PRESETS, in order.
_FIELDS = (
  "num_layers",
  "embed_dim",
  "num_heads",
  "num_kv_heads",
  "head_dim",
  "mlp_dim",
  "vocab_size",
  "k",
  "window",
)
PRESETS = {
  "tiny": (4, 128, 4, 2, 32, 384, 257, 64, 64),
  "mini": (8, 384, 6, 2, 64, 1024, 8192, 256, 256),
  "gpt2_small": (12, 768, 12, 12, 64, 2048, 50257, 512, 512),
  "gpt2_medium": (24, 1024, 16, 16, 64, 2736, 50257, 512, 512),
  "1b": (20, 2048, 32, 8, 64, 5632, 50257, 1024, 1024),
}
QUICK = ("tiny", "mini")  # small presets, for trying things out


def preset(name: str, **overrides) -> TransformerConfig:
  """Returns the configuration called `name` with some fields replaced.

  Presets: "tiny" (1M parameters, byte tokens, for a CPU), "mini" (16M), "gpt2_small" (124M),
  "gpt2_medium" (355M), "1b" (1.0B). The two small ones scan over the layers where the attention
  pattern allows it, which compiles faster; the others do not, which runs faster and needs less
  memory.

  Raises:
    ValueError: for an unknown preset, an unknown field or a value out of range.
  """
  check_choice("preset", name, PRESETS)
  known = [f.name for f in dataclasses.fields(TransformerConfig)]
  for field in overrides:
    check_choice("configuration field", field, known)
  values = {
    **dict(zip(_FIELDS, PRESETS[name])),
    "dtype": "float32" if name == "tiny" else "bfloat16",
    **overrides,
  }
  config = TransformerConfig(**values)
  if "scan_layers" in overrides or name not in QUICK or config.num_layers % len(config.attention):
    return config
  return dataclasses.replace(config, scan_layers=True)
