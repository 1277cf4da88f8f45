"""Access to the parts of a checkout by name: modules move between versions."""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sparsek


def find(name: str, *modules: str) -> Any:
  """Returns `name` from the first of `modules` that the checkout has with that name in it.

  Raises:
    LookupError: where none has it.
  """
  for module in modules:
    # An editable install of another checkout would offer the modules that this one lacks.
    path = Path(*module.split("."))
    if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
      loaded = importlib.import_module(module)
      if hasattr(loaded, name):
        return getattr(loaded, name)
  raise LookupError(f"none of {', '.join(modules)} has {name}")


def find_for_step(name: str) -> Any:
  """Returns what training steps are made with."""
  return find(
    name,
    "sparsek.training.step",
    "sparsek.train_step",
    "sparsek.training.optimizer",
    "sparsek.optimizer",
    "sparsek.parallel.mesh",
    "sparsek.parallel.sharding",
  )


class Training:
  """A checkout's training step and what it reads.

  Attributes:
    config: of the model.
    step: the jitted step.
    batch: on the devices, of random tokens.
  """

  def __init__(
    self,
    config,
    *,
    n: int,
    batch_size: int = 1,
    documents: int = 1,
    teacher=None,
    optimizer: dict | None = None,
    **train,
  ):
    if teacher is not None:
      train |= {"distill": 0.5, "distill_from": "teacher"}
    self.config = config
    self.train = sparsek.TrainConfig(
      workdir="",
      optimizer=sparsek.OptimizerConfig(**(optimizer or {})),
      data=sparsek.DataConfig(seq_len=n, batch_size=batch_size, segment_documents=documents > 1),
      **train,
    )
    self.mesh = find_for_step("make_mesh")()
    self.optimizer = find_for_step("make_optimizer")(self.train.optimizer)
    self.step = find_for_step("make_train_step")(
      config, self.train, self.optimizer, self.mesh, teacher
    )
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch_size, n + 1))
    segments = np.arange(n + 1) * documents // (n + 1) + 1
    self.batch = find_for_step("put_batch")(
      self.mesh,
      {
        "tokens": tokens.astype(np.int32),
        "segment_ids": np.tile(segments.astype(np.int32), (batch_size, 1)),
      },
    )

  def abstract_state(self) -> Any:
    """Returns shapes of the state."""
    make = find_for_step("abstract_state")
    return make(abstract_params(self.config), self.optimizer, self.mesh, self.train.spike_factor)

  def initial_state(self) -> Any:
    """Returns a new state, on the devices."""
    everywhere = find_for_step("replicated")(self.mesh)
    make = functools.partial(sparsek.init_params, self.config)
    params = jax.jit(make, out_shardings=everywhere)(jax.random.key(0))
    opt_state = jax.jit(self.optimizer.init, out_shardings=everywhere)(params)
    step, seed = jax.device_put((jnp.int32(0), jnp.int32(0)), everywhere)
    return find_for_step("TrainState")(step, params, opt_state, seed)


def abstract_params(config: sparsek.TransformerConfig) -> Any:
  """Returns shapes of a model's parameters."""
  return jax.eval_shape(functools.partial(sparsek.init_params, config), jax.random.key(0))


def attention_inputs(
  n: int, heads: int, kv_heads: int, head_dim: int, dtype: str, batch: int = 1
) -> tuple[list[jax.Array], jax.Array]:
  """Returns random (query, key, value, scores) and a cotangent of the output."""
  shapes = [
    (batch, n, heads, head_dim),
    *2 * [(batch, n, kv_heads, head_dim)],
    (batch, n, kv_heads),
    (batch, n, heads, head_dim),
  ]
  dtypes = [*3 * [dtype], "float32", dtype]
  keys = jax.random.split(jax.random.key(0), len(shapes))
  *inputs, cotangent = (
    jax.random.normal(key, shape).astype(kind)
    for key, shape, kind in zip(keys, shapes, dtypes, strict=True)
  )
  return inputs, cotangent


def attention_pass(backward: bool, **options: Any) -> Callable:
  """Returns (inputs, cotangent, segment_ids) -> output, or the output and all gradients."""

  def forward(inputs, cotangent, segment_ids=None):
    return sparsek.sparsek_attention(*inputs, segment_ids=segment_ids, **options)

  def both(inputs, cotangent, segment_ids=None):
    attend = functools.partial(forward, cotangent=None, segment_ids=segment_ids)
    output, pull = jax.vjp(attend, inputs)
    return output, pull(cotangent)

  return both if backward else forward
