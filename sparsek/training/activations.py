"""Memory that the backward pass needs from the forward pass."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sparsek.config import TrainConfig, TransformerConfig
from sparsek.model import lora
from sparsek.model.transformer import parameter_specs
from sparsek.parallel.mesh import FSDP, batch_specs
from sparsek.parallel.sharding import partition_specs
from sparsek.training.loss import cut_targets
from sparsek.training.step import (
  TrainState,
  in_training,
  make_objective,
  micro_batches,
  num_counted,
)


def activation_bytes(
  config: TransformerConfig,
  train: TrainConfig,
  mesh: Mesh,
  state: TrainState,
  batch: Any,
  teacher: TransformerConfig | None = None,
  teacher_params: Any = None,
) -> int:
  """Counts the bytes that a device keeps from the forward pass of a micro-batch for the backward
  pass, as JAX differentiates the step; the compiler may find that it needs less.

  Args:
    config, train, mesh: of the run.
    state, batch: shapes of a step's arguments.
    teacher, teacher_params: of distillation, or None.
  """
  objective, parts, sizes = make_objective(config, train, teacher), mesh.shape[FSDP], []
  for model in filter(None, (in_training(config, train), teacher)):
    parameter_specs(model, parts)

  def keep(learned, frozen, teacher_params, batch, seed_and_step):
    given = {id(x) for x in jax.tree.leaves((learned, frozen, teacher_params, batch))}
    rows = jax.tree.map(lambda x: x[0], micro_batches(train, batch))

    def forward(learned):
      return objective(learned, frozen, teacher_params, rows, seed_and_step, num_counted(batch))

    _, backward, _ = jax.vjp(forward, learned, has_aux=True)
    kept = {id(x): x for x in jax.tree.leaves(backward) if id(x) not in given}
    sizes.append(sum(x.size * x.dtype.itemsize for x in kept.values()))
    return jnp.zeros(())

  def step(state, batch, teacher_params):
    arguments = *lora.split(state.params), teacher_params
    return jax.shard_map(
      keep,
      mesh=mesh,
      in_specs=(*partition_specs(arguments, parts), batch_specs(), P()),
      out_specs=P(),
      check_vma=False,
    )(*arguments, cut_targets(batch), (state.seed, state.step))

  jax.eval_shape(step, state, batch, teacher_params)
  return sizes[-1]
