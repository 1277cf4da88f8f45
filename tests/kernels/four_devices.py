"""Gradients of attention over four devices and on one: python -m tests.kernels.four_devices."""

import jax
import jax.numpy as jnp
import numpy as np

import sparsek
from sparsek.kernels import specs


def main() -> None:
  """Compares them, and prints over how many devices they were spread."""
  spec = specs.Spec("sharded", n=100, batch=4, heads=4, groups=2, k=8, window=8, documents=(30, 50))
  inputs, ids = specs.make_inputs(spec), specs.segment_ids(spec)
  mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  part, rows = jax.sharding.PartitionSpec("data", None, "heads"), jax.sharding.PartitionSpec("data")

  def loss(ids, *inputs):
    out = sparsek.sparsek_attention(*inputs, k=8, window=8, gate="value", segment_ids=ids)
    return jnp.sum(out**2)

  grads = jax.grad(loss, argnums=(1, 2, 3, 4))
  sharded = jax.shard_map(grads, mesh=mesh, in_specs=(rows, *[part] * 4), out_specs=part)
  found = jax.jit(sharded)(ids, *inputs)
  for x, y in zip(found, jax.jit(grads)(ids, *inputs), strict=True):
    np.testing.assert_allclose(x, y, atol=2e-5)
  print(len(found[0].sharding.device_set), "devices agree")


if __name__ == "__main__":
  main()
