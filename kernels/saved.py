"""The name by which `jax.checkpoint` recognises attention's outputs, so that a block may keep them
and recompute the rest in its backward pass.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

NAME = "sparsek_attention"  # for `jax.checkpoint_policies.save_only_these_names`


def saved(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Returns the same arrays, marked with NAME."""
  return tuple(checkpoint_name(x, NAME) for x in arrays)
