"""SPARSEK attention in JAX: learned top-k sparse attention (arXiv 2406.16747).

Training takes time that is linear in the length, generation constant memory. A name is imported
when it is first used, so that `import sparsek`, which every command does, is fast.
"""

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from sparsek.attention.api import sliding_window_attention, sparsek_attention
  from sparsek.attention.diagnostics import selection_statistics
  from sparsek.attention.operator import CausalSelection, causal_sparsek, sparsek
  from sparsek.attention.scoring import ScoringNetwork
  from sparsek.config import DataConfig, OptimizerConfig, TrainConfig, TransformerConfig, preset
  from sparsek.generation.cache import Cache, decode_step, init_cache, lost_scores, prefill
  from sparsek.generation.inference import inference_params
  from sparsek.generation.session import Session
  from sparsek.model.layers import Attention, SparseKAttention, Tokens
  from sparsek.model.registration import register_attention, register_scorer
  from sparsek.model.transformer import Transformer, count_params, init_params
  from sparsek.programs import LoadedRun, evaluate, generate, load, train

if not os.path.isdir(os.path.join(os.path.dirname(__file__), "kernels")):
  # An environment may then offer the kernels of another checkout.
  raise ImportError(
    f"{os.path.dirname(__file__)}/kernels is no folder: in git it is a link to ../kernels; check "
    "it out with core.symlinks=true"
  )

__version__ = "0.2.0"
__all__ = [
  "Attention",
  "Cache",
  "CausalSelection",
  "DataConfig",
  "LoadedRun",
  "OptimizerConfig",
  "ScoringNetwork",
  "Session",
  "SparseKAttention",
  "Tokens",
  "TrainConfig",
  "Transformer",
  "TransformerConfig",
  "causal_sparsek",
  "count_params",
  "decode_step",
  "evaluate",
  "generate",
  "inference_params",
  "init_cache",
  "init_params",
  "load",
  "lost_scores",
  "prefill",
  "preset",
  "register_attention",
  "register_scorer",
  "selection_statistics",
  "sliding_window_attention",
  "sparsek",
  "sparsek_attention",
  "train",
]

MODULES = ("functional", "linen", "nnx")  # public ones, imported like a name
# The module of each public name.
_HOMES = {
  "Attention": "sparsek.model.layers",
  "Cache": "sparsek.generation.cache",
  "CausalSelection": "sparsek.attention.operator",
  "DataConfig": "sparsek.config",
  "LoadedRun": "sparsek.programs",
  "OptimizerConfig": "sparsek.config",
  "ScoringNetwork": "sparsek.attention.scoring",
  "Session": "sparsek.generation.session",
  "SparseKAttention": "sparsek.model.layers",
  "Tokens": "sparsek.model.layers",
  "TrainConfig": "sparsek.config",
  "Transformer": "sparsek.model.transformer",
  "TransformerConfig": "sparsek.config",
  "causal_sparsek": "sparsek.attention.operator",
  "count_params": "sparsek.model.transformer",
  "decode_step": "sparsek.generation.cache",
  "evaluate": "sparsek.programs",
  "generate": "sparsek.programs",
  "inference_params": "sparsek.generation.inference",
  "init_cache": "sparsek.generation.cache",
  "init_params": "sparsek.model.transformer",
  "load": "sparsek.programs",
  "lost_scores": "sparsek.generation.cache",
  "prefill": "sparsek.generation.cache",
  "preset": "sparsek.config",
  "register_attention": "sparsek.model.registration",
  "register_scorer": "sparsek.model.registration",
  "selection_statistics": "sparsek.attention.diagnostics",
  "sliding_window_attention": "sparsek.attention.api",
  "sparsek": "sparsek.attention.operator",
  "sparsek_attention": "sparsek.attention.api",
  "train": "sparsek.programs",
}

if not TYPE_CHECKING:  # a type checker that saw `__getattr__` would accept any name

  def __getattr__(name):
    if name in MODULES:
      return importlib.import_module(f"sparsek.{name}")
    if name not in _HOMES:
      raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__, *MODULES})
