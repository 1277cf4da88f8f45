"""Wraps the functional form in a class whose instances are pytrees, as Equinox has them.

With Equinox, Attention is an equinox.Module and `options` an equinox.field(static=True).
"""

import dataclasses

import jax
import jax.numpy as jnp

import sparsek.functional as sk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attention:
  params: dict
  options: sk.Options = dataclasses.field(metadata={"static": True})

  def __call__(self, x: jax.Array) -> jax.Array:
    return sk.apply(self.options, self.params, x)


options = sk.Options(features=32, num_heads=4, k=8, window=8)
layer = Attention(sk.init(options, jax.random.key(0)), options)
x = jax.random.normal(jax.random.key(1), (2, 40, 32))
loss, gradients = jax.jit(jax.value_and_grad(lambda layer: jnp.mean(layer(x) ** 2)))(layer)
layer = jax.tree.map(lambda weight, gradient: weight - 0.1 * gradient, layer, gradients)
