"""Every field of a configuration is checked by its annotation, as the flag of its name is."""

import dataclasses
import math

import numpy as np
import pytest

from sparsek.config import (
  MAX_INT,
  DataConfig,
  OptimizerConfig,
  TrainConfig,
  TransformerConfig,
  number_ranges,
  preset,
)
from sparsek.config.checks import field_kinds
from sparsek.functional import Options

CLASSES = {
  DataConfig: {},
  OptimizerConfig: {},
  TrainConfig: {"workdir": "w"},
  TransformerConfig: {},
  Options: {"features": 32},
}
FIELDS = [(cls, field.name) for cls in CLASSES for field in dataclasses.fields(cls)]


@pytest.mark.parametrize("cls, name", FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_a_field_takes_no_value_of_another_type(cls, name):
  kinds = field_kinds(cls)
  assert name in kinds or (cls, name) == (Options, "dtype")
  numeric = name in number_ranges(cls)
  is_int = numeric and any(int in (kind, *getattr(kind, "__args__", ())) for kind in kinds[name])
  bad = [object(), {"a": 1}, b"x", 1j]
  bad += ["3", True, math.nan, math.inf] if numeric else []
  bad += [1.5, np.float32(1)] if is_int else []
  bad += [MAX_INT + 1] if is_int and name not in ("k", "window") else []
  for value in bad:
    with pytest.raises(ValueError, match=name):
      cls(**{**CLASSES[cls], name: value})


@pytest.mark.parametrize(
  "cls, name, value, words",
  [
    (OptimizerConfig, "num_steps", 2.5, "num_steps=2.5 must be an integer of at least 1"),
    (OptimizerConfig, "final_lr_ratio", 2, "final_lr_ratio=2 must be at least 0 and at most 1"),
    (OptimizerConfig, "grad_clip", 10**400, "must be a finite number"),
    (OptimizerConfig, "b1", 1, "b1=1 must be at least 0 and below 1"),
    (OptimizerConfig, "b2", math.nan, "b2=nan must be at least 0 and below 1"),
    (OptimizerConfig, "warmup_steps", "3", "warmup_steps='3' must be an integer of at least 0"),
    (TrainConfig, "stop_at", 1.5, "stop_at=1.5 must be an integer of at least 1, or None"),
    (TrainConfig, "seed", 2**40, "seed=1099511627776 must be at most 2147483647"),
    (TrainConfig, "workdir", None, "workdir=None must be a string"),
    (TrainConfig, "profile_steps", (1, 2, 3), "A:B"),
    (DataConfig, "segment_documents", "no", "segment_documents='no' must be True or False"),
    (TransformerConfig, "rope_theta", 0, "rope_theta=0 must be at least 1"),
    (TransformerConfig, "norm_eps", -1, "norm_eps=-1 must be above 0"),
    (TransformerConfig, "rope_fraction", 0, "rope_fraction=0 must be above 0 and at most 1"),
    (TransformerConfig, "vocab_size", 1.5, "vocab_size=1.5 must be an integer of at least 1"),
    (TransformerConfig, "attention", 5, "attention=5 must be a string or a tuple"),
    (TransformerConfig, "attention", (), "attention pattern"),
    (TransformerConfig, "attention", (5,), "attention pattern"),
    (TransformerConfig, "rope_scaling", (), "rope_scaling"),
    (Options, "dtype", "number", "dtype='number' is no dtype"),
  ],
)
def test_a_refusal_names_field_value_and_what_is_allowed(cls, name, value, words):
  with pytest.raises(ValueError) as error:
    cls(**{**CLASSES[cls], name: value})
  assert words in str(error.value)


def test_a_preset_refuses_the_same():
  for name, value in (("num_layers", "x"), ("attention", 5), ("tie_embeddings", "no")):
    with pytest.raises(ValueError, match=name):
      preset("tiny", **{name: value})
  assert preset("tiny").scan_layers and not preset("tiny", scan_layers=False).scan_layers


def test_numbers_of_numpy_become_those_of_python():
  config = TransformerConfig(k=np.int64(7), norm_eps=np.float32(0.5), scorer_init_slope=1)
  assert [type(x) for x in (config.k, config.norm_eps, config.scorer_init_slope)] == [
    int,
    float,
    int,
  ]
