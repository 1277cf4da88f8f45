"""Low-rank adapters beside the frozen matrices of a pretrained model: LoRA (Hu et al. 2021, arXiv
2106.09685).

With `config.lora_rank` R every projection of attention and MLPs computes x W + alpha / R (x A) B
(`sparsek.model.projections.AdaptedProjection`), and A and B lie in the tree of parameters beside W,
as `lora_a` and `lora_b`. Adapters learn, and so do the modules that no pretrained model has, such
as scorers. Code that uses a model without training it needs to know nothing of adapters: `merge`
adds them to the matrices, W + alpha / R A B.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from sparsek.config import TransformerConfig
from sparsek.model.transformer import Params, init_params
from sparsek.parallel.sharding import computed_on

ADAPTERS = ("lora_a", "lora_b")
# names of the leaves that tokens are multiplied with, except embeddings
MATRICES = ("kernel", *ADAPTERS)
# modules that kinds of attention add to those of a pretrained model; they learn too
NEW = ("scorer", "decay")


def merged_config(config: TransformerConfig) -> TransformerConfig:
  """Returns the configuration of the model whose parameters `merge` returns."""
  return dataclasses.replace(config, lora_rank=0, lora_alpha=None)


def split(params: Params) -> tuple[Params, Params]:
  """Splits parameters into (learned, frozen).

  Adapters, scorers and linear attention's decay learn; without adapters all parameters do. Only
  those that learn have gradients and moments. Norms, biases and embeddings are frozen like the
  matrices, as in PEFT by default.
  """
  flat = flatten_dict(params)
  if not any(path[-1] in ADAPTERS for path in flat):
    return params, {}
  learned = {path for path in flat if path[-1] in ADAPTERS or set(NEW) & set(path)}
  return tuple(
    unflatten_dict({path: leaf for path, leaf in flat.items() if (path in learned) == wanted})
    for wanted in (True, False)
  )


def describe_size(parameters: int, learned: int) -> str:
  """Describes the size of a model in words."""
  return f"{parameters:,} parameters" + (
    f", {learned:,} of them learn" if learned < parameters else ""
  )


def join(learned: Params, frozen: Params) -> Params:
  """Undoes `split`."""
  return unflatten_dict(flatten_dict(learned) | flatten_dict(frozen)) if frozen else learned


def extend(
  config: TransformerConfig, params: Params, key: jax.Array, mesh: Mesh | None = None
) -> Params:
  """Adds new adapters to a pretrained model's parameters, which change no result yet: A is normal
  with variance 1 / fan-in, B is 0.

  Args:
    config: with a lora_rank.
    params: of `merged_config(config)`.
    key: PRNG key.
    mesh: devices over which the adapters are spread; None puts them on the first device.
  """

  def draw(key):
    flat = flatten_dict(init_params(config, key))
    return unflatten_dict({path: leaf for path, leaf in flat.items() if path[-1] in ADAPTERS})

  return join(computed_on(mesh, draw, key), params)


def merge(config: TransformerConfig, params: Params) -> Params:
  """Returns the parameters of `merged_config(config)` that compute the same: W + alpha / R A B, in
  the dtype of W, for each W with adapters.
  """
  flat = flatten_dict(params)
  product = functools.partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
  product = jax.vmap(product) if config.scan_layers else product

  def merged(path, leaf):
    a, b = (flat.get((*path[:-1], name)) for name in ADAPTERS)
    return (
      leaf
      if path[-1] != "kernel" or a is None
      else leaf + (config.lora_scale * product(a, b)).astype(leaf.dtype)
    )

  return unflatten_dict(
    {path: merged(path, leaf) for path, leaf in flat.items() if path[-1] not in ADAPTERS}
  )
