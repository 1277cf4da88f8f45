"""Hugging Face's model families: the names of their tensors and of the fields of config.json.

A family is a table that is used in both directions. To add one, write its module and its line in
FAMILIES.
"""

from sparsek.huggingface.families.family import IGNORED_TENSORS, Family, Layout, layouts
from sparsek.huggingface.families.gpt2 import GPT2
from sparsek.huggingface.families.gpt_neox import GPT_NEOX
from sparsek.huggingface.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from sparsek.huggingface.families.sparsek import SPARSEK

SPARSE = "sparsek"  # the family that transformers runs with SPARSEK attention
# By the model_type of config.json.
FAMILIES = {
  "llama": LLAMA,
  "mistral": MISTRAL,
  "qwen2": QWEN2,
  "qwen3": QWEN3,
  "gpt_neox": GPT_NEOX,
  "gpt2": GPT2,
  SPARSE: SPARSEK,
}

__all__ = ["FAMILIES", "IGNORED_TENSORS", "SPARSE", "Family", "Layout", "layouts"]
