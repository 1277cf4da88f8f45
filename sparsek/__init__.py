"""SPARSEK attention in JAX."""

from sparsek.attention import sliding_window_attention, sparsek_attention
from sparsek.config import TransformerConfig, preset
from sparsek.operator import CausalSelection, causal_sparsek, sparsek

__version__ = "0.1.0"
