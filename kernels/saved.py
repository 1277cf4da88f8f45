"""The name of attention's outputs: a block that is otherwise computed again in its backward pass
may keep what has it.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

NAME = "sparsek_attention"  # for `jax.checkpoint_policies.save_only_these_names`


def saved(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Returns the same arrays, named."""
  return tuple(checkpoint_name(x, NAME) for x in arrays)
