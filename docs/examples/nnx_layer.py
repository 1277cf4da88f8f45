"""Puts the layer into a model of Flax NNX and trains it for a few steps."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import sparsek.nnx


class Model(nnx.Module):
  def __init__(self, width: int, rngs: nnx.Rngs):
    self.norm = nnx.RMSNorm(width, rngs=rngs)
    self.attention = sparsek.nnx.SparseKAttention(width, num_heads=4, k=8, window=8, rngs=rngs)

  def __call__(self, x):
    return x + self.attention(self.norm(x))


@nnx.jit
def train_step(model, optimizer, x, y):
  loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
  optimizer.update(model, grads)
  return loss


model = Model(32, nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
x = jax.random.normal(jax.random.key(0), (2, 64, 32))
losses = [float(train_step(model, optimizer, x, jnp.roll(x, 1, axis=1))) for _ in range(5)]
