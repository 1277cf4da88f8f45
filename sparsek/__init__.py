"""SPARSEK attention in JAX: learned top-k sparse attention with linear training and constant-memory
generation (arXiv 2406.16747).
"""

from sparsek.attention.api import sliding_window_attention, sparsek_attention
from sparsek.attention.diagnostics import selection_statistics
from sparsek.attention.operator import CausalSelection, causal_sparsek, sparsek
from sparsek.attention.scoring import ScoringNetwork
from sparsek.config import DataConfig, OptimizerConfig, TrainConfig, TransformerConfig, preset
from sparsek.generation.cache import Cache, decode_step, init_cache, lost_scores, prefill
from sparsek.generation.inference import inference_params
from sparsek.generation.session import Session
from sparsek.model.layers import SparseKAttention
from sparsek.model.transformer import Transformer, count_params, init_params

__version__ = "0.1.0"
__all__ = [
  "Cache",
  "CausalSelection",
  "DataConfig",
  "OptimizerConfig",
  "ScoringNetwork",
  "Session",
  "SparseKAttention",
  "TrainConfig",
  "Transformer",
  "TransformerConfig",
  "causal_sparsek",
  "count_params",
  "decode_step",
  "inference_params",
  "init_cache",
  "init_params",
  "lost_scores",
  "prefill",
  "preset",
  "selection_statistics",
  "sliding_window_attention",
  "sparsek",
  "sparsek_attention",
]
