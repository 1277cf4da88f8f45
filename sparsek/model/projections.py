"""Products with matrices in the activation dtype, with adapters, and several of one input."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sparsek.attention.joined_products import joined_products
from sparsek.config import TransformerConfig


def fan_in_init(scale: float = 1.0) -> nn.initializers.Initializer:
  """Returns an initializer: normal with standard deviation scale / sqrt(fan-in)."""
  return nn.initializers.variance_scaling(scale**2, "fan_in", "normal")


class AdaptedProjection(nn.DenseGeneral):
  """A product with a matrix and its low-rank adapter (`sparsek.model.lora`), x W + scale (x A) B,
  and a bias with `use_bias`; B is 0 at first.

  Parameters: kernel [*in, *features], bias [*features]; lora_a [*in, R], lora_b [R, *features].
  """

  rank: int = 1
  scale: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = super().__call__(x)
    axes, features = (
      axis if isinstance(axis, tuple) else (axis,) for axis in (self.axis, self.features)
    )
    a = self.param("lora_a", fan_in_init(), (*x.shape[-len(axes) :], self.rank), jnp.float32)
    b = self.param("lora_b", nn.initializers.zeros_init(), (self.rank, *features), jnp.float32)
    low = jnp.tensordot(x.astype(y.dtype), a.astype(y.dtype), len(axes))
    return y + self.scale * jnp.tensordot(low, b.astype(y.dtype), 1)


def projection(
  config: TransformerConfig,
  features: int | tuple[int, ...],
  use_bias: bool,
  init_scale: float = 1.0,
  **fields,
) -> nn.DenseGeneral:
  """Makes a module that multiplies by a matrix in the activation dtype, over the last axis by
  default; with an adapter if `config` has a lora_rank.
  """
  fields |= {
    "use_bias": use_bias,
    "dtype": config.activation_dtype,
    "kernel_init": fan_in_init(init_scale),
  }
  if not config.lora_rank:
    return nn.DenseGeneral(features, **fields)
  return AdaptedProjection(features, rank=config.lora_rank, scale=config.lora_scale, **fields)


def project_together(
  config: TransformerConfig,
  modules: tuple[nn.DenseGeneral, ...],
  x: jax.Array,
  scorer_matrix: jax.Array | None,
) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
  """Applies modules of `projection`, which have their parameters, to the same hidden states.

  In bfloat16 their gradients are computed together, and with them those of the scorer's product;
  else, and with adapters, one by one.

  Args:
    config, modules: as `projection` made them.
    x: [..., E].
    scorer_matrix: float32 [E, C], or None.

  Returns:
    What the modules return, and x times the scorer's matrix, float32, or None where it is not
    computed.
  """
  if config.lora_rank or not x.dtype == config.activation_dtype == jnp.bfloat16:
    return tuple(module(x) for module in modules), None
  kernels: Any = tuple(module.get_variable("params", "kernel") for module in modules)
  products, scorer_products = joined_products(x, kernels, scorer_matrix)
  if config.use_bias:
    biases: Any = (module.get_variable("params", "bias") for module in modules)
    products = tuple(y + bias.astype(y.dtype) for y, bias in zip(products, biases, strict=True))
  return products, scorer_products
