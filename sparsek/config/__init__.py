"""Frozen dataclasses that configure the library, and the presets.

`sparsek.command_line.configs` makes them from flags; nothing here reads a flag.
"""

from sparsek.config.checks import check_at_least, check_choice, whole_number
from sparsek.config.layer_patterns import ATTENTION_KINDS, parse_layer_pattern, parse_term
from sparsek.config.model import (
  DTYPES,
  GATES,
  IMPLEMENTATIONS,
  MLPS,
  NEED_WINDOW,
  NORMS,
  POSITIONS,
  REMAT_POLICIES,
  ROPE_SCALINGS,
  SCORERS,
  TransformerConfig,
  parse_rope_scaling,
)
from sparsek.config.presets import PRESETS, QUICK, preset
from sparsek.config.training import (
  DEFAULT_EXTENSIONS,
  ON_SPIKE,
  TRAINABLE,
  DataConfig,
  OptimizerConfig,
  TrainConfig,
  parse_profile_steps,
)

__all__ = [
  "ATTENTION_KINDS",
  "DEFAULT_EXTENSIONS",
  "DTYPES",
  "GATES",
  "IMPLEMENTATIONS",
  "MLPS",
  "NEED_WINDOW",
  "NORMS",
  "ON_SPIKE",
  "POSITIONS",
  "PRESETS",
  "QUICK",
  "REMAT_POLICIES",
  "ROPE_SCALINGS",
  "SCORERS",
  "TRAINABLE",
  "DataConfig",
  "OptimizerConfig",
  "TrainConfig",
  "TransformerConfig",
  "check_at_least",
  "check_choice",
  "parse_layer_pattern",
  "parse_profile_steps",
  "parse_rope_scaling",
  "parse_term",
  "preset",
  "whole_number",
]
