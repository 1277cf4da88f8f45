"""The Mosaic GPU kernels: the shared behaviours on a Hopper GPU; elsewhere by interpretation (mosaic_interpret_test) and compilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsek
from sparsek.kernels import specs
from tests.kernels.attention_base import AttentionTest, error_beyond_rounding, output_and_gradients, problem, relative_error, truth
