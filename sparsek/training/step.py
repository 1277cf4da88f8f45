"""One optimizer step over all devices of a mesh, and the evaluation of a batch.

The forward and backward passes of a step run in one `jax.shard_map`: each device computes with its
rows, or its part of their tokens, and gathers a layer's parameters when it needs them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.stages import Wrapped

from sparsek.attention.diagnostics import selection_statistics
from sparsek.config import HeadGroup, TrainConfig, TransformerConfig
from sparsek.model import lora
from sparsek.model.head_groups import take_heads
from sparsek.model.transformer import (
  Params,
  Transformer,
  layer_params,
  parameter_specs,
  select_params,
)
from sparsek.parallel.mesh import AXES, CONTEXT, FSDP, ROWS, axis_size, batch_specs, replicated
from sparsek.parallel.sharding import partition_specs, placements
from sparsek.training import spikes
from sparsek.training.loss import cut_targets
from sparsek.training.objective import Teacher, scorer_warmup_loss, summed_losses, token_losses
from sparsek.training.optimizer import keep_frozen, learning_rate_schedule, trainable_mask
from sparsek.training.spikes import Spikes


class TrainState(NamedTuple):
  """State that an update reads and writes.

  Attributes:
    step: updates made so far.
    params, opt_state: parameters and the optimizer's state.
    seed: of the run; part of the state, so that all seeds share one compiled program.
    spikes: as `sparsek.training.spikes.start` returns it.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  seed: jax.Array | int = 0
  spikes: Spikes | tuple[()] = ()


def abstract_state(
  params: Params, optimizer: optax.GradientTransformation, mesh: Mesh, spike_factor: float = 0.0
) -> TrainState:
  """Returns the shapes and placement of the state of a run.

  Args:
    params: shapes of the parameters.
    optimizer, mesh: of the run.
    spike_factor: `TrainConfig.spike_factor`.
  """
  number: Any = jax.ShapeDtypeStruct((), jnp.int32)
  opt_state = jax.eval_shape(optimizer.init, params)
  state = TrainState(number, params, opt_state, number, spikes.start(spike_factor))
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    state,
    state_placements(mesh, state),
  )


def state_placements(mesh: Mesh, state: TrainState) -> TrainState:
  """Returns the placement of each array of a state: parameters and moments split over `fsdp`."""
  everywhere = jax.tree.map(lambda _: replicated(mesh), state)
  return everywhere._replace(
    params=placements(mesh, state.params), opt_state=placements(mesh, state.opt_state)
  )


def num_counted(batch: Any) -> jax.Array:
  """Returns the number of counted targets of the whole batch, from each device's part."""
  return jax.lax.psum(jnp.sum(batch["counted"], dtype=jnp.int32), AXES)


def make_train_step(
  config: TransformerConfig,
  train: TrainConfig,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  teacher: TransformerConfig | None = None,
  begin: int = 0,
) -> Wrapped:
  """Compiles a training step: (state, batch[, teacher's parameters][, apply]) -> (state, metrics).

  The old state is donated. `apply` is a bool scalar on the devices: with False the same program
  computes the loss and the gradient norm of a state and leaves it unchanged.

  The loss is the mean over all counted targets of the whole batch, in nats: each device computes
  the gradients of its part, micro-batch by micro-batch, already divided by the number of all
  targets. They are summed over the devices where they arise, layer by layer
  (`sparsek.parallel.sharding.gather`).

  Only the parameters that `train.optimizer.trainable` names and `config` has change, with their
  moments, and only their gradients count. The state may hold others, which the model of another
  stage has. With adapters, only the learned parameters have gradients (`sparsek.model.lora.split`).

  Noise on the scores and the queries of the scorers' loss derive from (state.seed, step, row of the
  batch, layer): a resumed run repeats them, on any mesh.

  The metrics are float32 scalars, by name:
    loss: the cross-entropy alone; in the scorers' warm-up, which has none, the scorers' loss.
    grad_norm: before clipping.
    learning_rate: of this update.
    num_targets: int32, counted targets of the batch.
    scorer_loss: where its weight is above 0 and a scorer learns; before that weight.
    divergence: from the teacher, where there is one; before its weight.
    skipped: int32, updates of the run so far that were spikes, with `train.spike_factor`.

  Args:
    config, train, optimizer, mesh: of the run, or of one of its stages.
    teacher: the model of the teacher, or None.
    begin: steps of the run before the stage.
  """
  schedule, trainable = learning_rate_schedule(train.optimizer, begin), train.optimizer.trainable
  local_gradients, parts = _make_local_gradients(config, train, teacher, begin), mesh.shape[FSDP]
  for model in filter(None, (in_training(config, train), teacher)):
    parameter_specs(model, parts)

  def train_step(state: TrainState, batch, teacher_params=None, apply=None):
    learned, frozen = lora.split(state.params)
    arguments = learned, frozen, teacher_params
    specs = partition_specs(arguments, parts)
    losses, grads, num_targets = jax.shard_map(
      local_gradients,
      mesh=mesh,
      in_specs=(*specs, batch_specs(), P()),
      out_specs=(P(), specs[0], P()),
      check_vma=False,  # gradients are summed over the devices explicitly
    )(*arguments, cut_targets(batch), (state.seed, state.step))
    metrics = {
      **losses,
      "grad_norm": optax.tree.norm(grads),
      "learning_rate": schedule(state.step),
      "num_targets": num_targets,
    }
    updates, opt_state = optimizer.update(grads, state.opt_state, learned)
    # Frozen parameters have moments that are not 0 if an earlier stage trained them.
    changes = trainable_mask(learned, trainable, config)
    opt_state = keep_frozen(changes, state.opt_state, opt_state)
    learned = jax.tree.map(
      lambda new, old, changes: new if changes else old,
      optax.apply_updates(learned, updates),
      learned,
      changes,
    )
    new = TrainState(state.step + 1, lora.join(learned, frozen), opt_state, state.seed)
    if train.spike_factor:
      assert isinstance(state.spikes, Spikes)
      is_spike, counted = spikes.judge(
        state.spikes, train.spike_factor, metrics["loss"], metrics["grad_norm"]
      )
      new = new._replace(
        params=spikes.keep(is_spike, state.params, new.params),
        opt_state=spikes.keep(is_spike, state.opt_state, new.opt_state),
        spikes=counted,
      )
      metrics["skipped"] = counted.skipped
    if apply is not None:
      new = jax.tree.map(lambda new, old: jnp.where(apply, new, old), new, state)
    return jax.lax.with_sharding_constraint(new, state_placements(mesh, new)), metrics

  return jax.jit(train_step, donate_argnums=0, compiler_options=_compiler_options(mesh))


def _compiler_options(mesh: Mesh) -> dict[str, bool | int] | None:
  """Returns the options of XLA for a training step: those with which it is compiled sooner.

  On GPUs, cuBLAS multiplies in place of XLA's own fused products, which would be tuned one by one.
  On CPUs, LLVM optimizes at its first level.
  """
  platform = mesh.devices.flat[0].platform
  if platform == "cpu" and not jax.config.read("jax_disable_most_optimizations"):
    return {"xla_backend_optimization_level": 1}
  return {"xla_gpu_enable_triton_gemm": False} if platform == "gpu" else None


def _freeze(params: Params, trainable: str) -> Params:
  """Stops the gradients of parameters that do not change, so that none are computed."""
  return jax.tree.map(
    lambda leaf, changes: leaf if changes else jax.lax.stop_gradient(leaf),
    params,
    trainable_mask(params, trainable),
  )


def in_training(config: TransformerConfig, train: TrainConfig) -> TransformerConfig:
  """Returns the model with its gates in training."""
  return dataclasses.replace(config, gate="value") if train.gate_anneal else config


def make_objective(
  config: TransformerConfig, train: TrainConfig, teacher: TransformerConfig | None, begin: int = 0
) -> Callable:
  """Returns what a training step differentiates, on each device's rows.

  Args:
    config, train, teacher, begin: as in `make_train_step`.

  Returns:
    (learned, frozen, teacher's parameters, rows, (seed, step), number of counted targets of the
    whole batch) -> (objective, losses).
  """
  scorer_weight = _scorer_weight(config, train)
  config = in_training(config, train)
  logged = logged_losses(config, train, teacher)

  def objective(learned, frozen, teacher_params, rows, seed_and_step, num_targets):
    def per_target(total):
      return total / jnp.maximum(num_targets, 1)

    params = select_params(config, lora.join(_freeze(learned, train.optimizer.trainable), frozen))
    seed, step = seed_and_step
    key = None
    if config.scorer_noise or scorer_weight:
      key = jax.random.fold_in(jax.random.key(seed), step)
    if train.scorer_warmup:
      scorer_loss = (
        scorer_warmup_loss(config, params, rows, train.data.segment_documents, key)
        / train.data.batch_size
      )
      return scorer_weight * scorer_loss, {"loss": scorer_loss, "scorer_loss": scorer_loss}
    losses = summed_losses(
      config,
      params,
      rows,
      train.loss_chunk,
      train.data.segment_documents,
      scorer_loss=scorer_weight > 0,
      key=key,
      teacher=None if teacher is None else Teacher(teacher, teacher_params, train.distill),
      score_factor=train.gate_anneal ** ((step - begin) / train.optimizer.num_steps)
      if train.gate_anneal
      else None,
    )
    scorer_loss = losses.scorers / train.data.batch_size
    metrics = {
      "loss": per_target(losses.cross_entropy),
      "scorer_loss": scorer_loss,
      "divergence": per_target(losses.divergence),
    }
    return per_target(losses.objective) + scorer_weight * scorer_loss, {
      name: metrics[name] for name in logged
    }

  return objective


def _scorer_weight(config: TransformerConfig, train: TrainConfig) -> float:
  """Returns the weight of the scorers' loss; 0 where no scorer learns by it.

  Those of kvzap layers learn in the warm-up only.
  """
  learns = train.scorer_warmup or "sparsek" in config.layer_kinds
  return train.scorer_loss if learns and config.learns_scores else 0.0


def logged_losses(
  config: TransformerConfig, train: TrainConfig, teacher: TransformerConfig | None
) -> list[str]:
  """Returns the names of the losses that `make_objective` gives."""
  scorers = _scorer_weight(config, train) > 0
  return ["loss"] + ["scorer_loss"] * scorers + ["divergence"] * (teacher is not None)


def micro_batches(train: TrainConfig, batch: Any) -> Any:
  """Returns the rows of a batch [micro-batches, rows, ...]."""
  return jax.tree.map(lambda x: x.reshape(train.grad_accumulation, -1, *x.shape[1:]), batch)


def _make_local_gradients(
  config: TransformerConfig, train: TrainConfig, teacher: TransformerConfig | None, begin: int
) -> Callable:
  """Returns the part of a training step that runs on each device's rows.

  Returns:
    (learned, frozen, teacher's parameters, batch, (seed, step)) -> (losses, gradients of `learned`,
    number of counted targets), all summed over the devices.
  """
  gradient = jax.grad(make_objective(config, train, teacher, begin), has_aux=True)
  logged = logged_losses(config, train, teacher)

  def local_gradients(learned, frozen, teacher_params, batch, seed_and_step):
    num_targets = num_counted(batch)

    def micro_batch(sums, rows):
      grads, losses = gradient(learned, frozen, teacher_params, rows, seed_and_step, num_targets)
      return jax.tree.map(jnp.add, sums, (losses, grads)), None

    if train.grad_accumulation == 1:
      grads, losses = gradient(learned, frozen, teacher_params, batch, seed_and_step, num_targets)
    else:
      sums = dict.fromkeys(logged, jnp.zeros(())), jax.tree.map(jnp.zeros_like, learned)
      (losses, grads), _ = jax.lax.scan(micro_batch, sums, micro_batches(train, batch))
    return jax.lax.psum(losses, AXES), grads, num_targets

  return local_gradients


def make_eval_step(
  config: TransformerConfig, loss_chunk: int, mesh: Mesh, packed: bool = True
) -> Wrapped:
  """Compiles (params, batch) -> (loss of each target in nats, number of its document), both [B, n].

  They are on every device. A target that does not count has the document -1. `packed` is that of
  `summed_losses`; the batch is one of `sparsek.data.batches.eval_batches`.
  """
  specs = parameter_specs(config, mesh.shape[FSDP])

  def local_losses(params, batch):
    return token_losses(config, params, batch, loss_chunk, packed)

  def eval_step(params, batch):
    cut, tokens = cut_targets(batch), P(ROWS, CONTEXT)
    losses = jax.shard_map(
      local_losses, mesh=mesh, in_specs=(specs, batch_specs()), out_specs=tokens, check_vma=False
    )(select_params(config, params), cut)
    return losses, jnp.where(cut["counted"], batch["documents"][:, 1:], -1)

  return jax.jit(eval_step, out_shardings=replicated(mesh))


@jax.jit
def all_finite(tree: Any) -> jax.Array:
  """Returns a bool scalar: True where no array of the tree holds a NaN or an infinity."""
  return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def make_diagnose(config: TransformerConfig, mesh: Mesh) -> Wrapped:
  """Compiles (params, batch of a row or more) -> {"layer_0/gate_mass": scalar, ...}.

  The figures describe the selection of each sparsek layer, the mean over its heads that select, by
  groups of them. They cost a forward pass of the rows given, so the loop gives one row per logged
  step, which all devices read.
  """
  specs = parameter_specs(config, mesh.shape[FSDP])

  def local_statistics(params, tokens, segment_ids):
    _, sown = Transformer(config, trace_once=True).apply(
      {"params": params}, tokens, segment_ids=segment_ids, method="hidden", mutable=["diagnostics"]
    )
    # scores by layer and group of its heads, of groups with equal settings
    alike: dict[Any, dict[tuple[int, HeadGroup], jax.Array]] = {}
    for i, (kind, layer) in enumerate(zip(config.layer_kinds, config.layer_configs)):
      if kind == "sparsek":
        (scores,) = layer_params(config, sown["diagnostics"], i)["attention"]["scores"]
        if axis_size(CONTEXT) > 1:
          scores = jax.lax.all_gather(scores, CONTEXT, axis=1, tiled=True)
        for group in layer.selecting_groups:
          own = take_heads(scores, group.heads, config.num_kv_heads)
          settings = group.config.k, group.config.window, own.shape, own.dtype
          alike.setdefault(settings, {})[i, group] = own
    statistics: dict[str, jax.Array] = {}
    for (k, window, *_), layers in alike.items():
      measure = functools.partial(selection_statistics, k=k, window=window, segment_ids=segment_ids)
      # A loop over the layers is compiled once, and not once for each layer.
      for name, values in jax.lax.map(measure, jnp.stack(list(layers.values()))).items():
        for at, (i, group) in enumerate(layers):
          selecting = config.layer_configs[i].selecting_groups
          share = len(group.heads) / sum(len(of.heads) for of in selecting)
          name_of_layer = f"layer_{i}/{name}"
          statistics[name_of_layer] = statistics.get(name_of_layer, 0) + share * values[at]
    return statistics

  def diagnose(params, batch):
    return jax.shard_map(
      local_statistics,
      mesh=mesh,
      in_specs=(specs, P(None, CONTEXT), P()),
      out_specs=P(),
      check_vma=False,
    )(select_params(config, params), batch["tokens"][:, :-1], batch["segment_ids"][:, :-1])

  return jax.jit(diagnose)
