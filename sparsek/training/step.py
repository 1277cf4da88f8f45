"""One optimizer step, data-parallel over all devices, and the evaluation of a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sparsek.attention.diagnostics import selection_statistics
from sparsek.config import TrainConfig, TransformerConfig
from sparsek.errors import UsageError
from sparsek.model import lora
from sparsek.model.transformer import Transformer, layer_params
from sparsek.parallel.mesh import BATCH, replicated
from sparsek.training import spikes
from sparsek.training.loss import next_token_targets
from sparsek.training.objective import Teacher, scorer_warmup_loss, summed_losses
from sparsek.training.optimizer import learning_rate_schedule, trainable_mask
from sparsek.training.spikes import Spikes


class TrainState(NamedTuple):
  """Everything an update reads and writes: `step` updates were made so far.

  The run's seed is among it and no constant: all seeds share what is compiled. `spikes` is what
  `sparsek.training.spikes.start` returns.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  seed: jax.Array | int = 0
  spikes: Spikes | tuple[()] = ()


def abstract_state(
  params, optimizer: optax.GradientTransformation, mesh: Mesh, spike_factor: float = 0.0
) -> TrainState:
  """Shapes and placement of the state of a run whose parameters have these shapes."""
  number = jax.ShapeDtypeStruct((), jnp.int32)
  state = TrainState(
    number, params, jax.eval_shape(optimizer.init, params), number, spikes.start(spike_factor)
  )
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), state
  )


def check_batch(mesh: Mesh, batch_size: int, grad_accumulation: int = 1) -> None:
  """Raises UsageError unless every device gets the same number of rows in every micro-batch."""
  parts = mesh.size * grad_accumulation
  if batch_size % parts:
    devices = f"{mesh.size} device(s) x grad_accumulation={grad_accumulation}"
    raise UsageError(f"--batch_size={batch_size} must be a multiple of {parts}: {devices}")


def check_length(config: TransformerConfig, seq_len: int, flag: str = "seq_len") -> None:
  """Raises UsageError where rows are longer than a table of learned positions."""
  if config.positions == "learned" and seq_len > config.max_positions:
    raise UsageError(
      f"--{flag}={seq_len} must be at most {config.max_positions}, the model's learned positions"
    )


def check_implementation(config: TransformerConfig, seq_len: int, params) -> None:
  """Raises UsageError where the implementation of attention that `config` names cannot run here;
  `params` may be shapes.
  """
  if config.implementation is not None:
    try:
      jax.eval_shape(
        Transformer(config).apply, {"params": params}, jax.ShapeDtypeStruct((1, seq_len), jnp.int32)
      )
    except NotImplementedError as error:
      raise UsageError(f"--implementation={config.implementation}: {error}") from None


def check_adapters(config: TransformerConfig, train: TrainConfig) -> None:
  """Raises UsageError where adapters could not learn, or would be larger than what they
  stand for.
  """
  if config.lora_rank and train.optimizer.trainable == "scorer":
    why = "--scorer_warmup and --trainable=scorer" if train.scorer_warmup else "--trainable=scorer"
    raise UsageError(
      f"--lora_rank={config.lora_rank} and {why} exclude each other: no adapter would learn; "
      "warm up scorers before, without adapters"
    )
  if config.lora_rank > config.embed_dim:
    raise UsageError(
      f"--lora_rank={config.lora_rank} must be at most {config.embed_dim}, the model's width"
    )


def _num_targets(batch) -> jax.Array:
  """Counted targets of the whole batch; called on each device's rows."""
  return jax.lax.psum(jnp.sum(next_token_targets(batch)[1], dtype=jnp.int32), BATCH)


def make_train_step(
  config: TransformerConfig,
  train: TrainConfig,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  teacher: TransformerConfig | None = None,
) -> Callable:
  """Compiles (state, batch) -> (state, metrics); the old state is donated. With a teacher: (state,
  batch, its parameters).

  With `apply`, a bool scalar on the devices, the same program can also find out the loss and the
  gradient norm of a state and leave it as it is: False.

  The loss is the mean over all counted targets of the whole batch, in nats: each device sums its
  rows' gradients, micro-batch by micro-batch, already divided by the number of targets of all, and
  one sum over the devices ends it.

  Only the parameters that `train.optimizer.trainable` names change, and only their gradients count.
  With adapters, gradients are formed of the learned ones only, `sparsek.model.lora.split`.

  metrics: float32 scalars "loss" (the cross-entropy alone; in the scorers' warm-up, where there is
  none, the scorers' loss), "grad_norm" (before clipping), "learning_rate", int32 "num_targets",
  and, before their weights, "scorer_loss" where its weight is above 0 and a scorer learns, and
  "divergence" from the teacher. Noise on the scores and the queries of the scorers' loss derive
  from (state.seed, step, device, micro-batch, layer), so that a resumed run has the same. With
  `train.spike_factor` also int32 "skipped": the run's updates so far that were spikes.
  """
  schedule, trainable = learning_rate_schedule(train.optimizer), train.optimizer.trainable
  scorer_weight = train.scorer_loss if config.learns_scores else 0.0
  logged = ["loss"] + ["scorer_loss"] * (scorer_weight > 0) + ["divergence"] * (teacher is not None)

  def freeze(params):
    """No gradients are computed for parameters that do not change."""
    return jax.tree.map(
      lambda leaf, changes: leaf if changes else jax.lax.stop_gradient(leaf),
      params,
      trainable_mask(params, trainable),
    )

  def local_gradients(learned, frozen, batch, moment, teacher_params):
    num_targets = _num_targets(batch)
    per_target = lambda x: x / jnp.maximum(num_targets, 1)

    def objective(learned, rows, i):
      params, key = lora.join(freeze(learned), frozen), None
      if config.scorer_noise or scorer_weight:
        seed, step = moment
        key = jax.random.fold_in(
          jax.random.fold_in(jax.random.key(seed), step),
          jax.lax.axis_index(BATCH) * train.grad_accumulation + i,
        )
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

    def micro_batch(sums, rows):
      grads, losses = jax.grad(objective, has_aux=True)(learned, *rows)
      return jax.tree.map(jnp.add, sums, (losses, grads)), None

    if train.grad_accumulation == 1:
      grads, losses = jax.grad(objective, has_aux=True)(learned, batch, 0)
    else:
      rows = jax.tree.map(lambda x: x.reshape(train.grad_accumulation, -1, x.shape[-1]), batch)
      sums = dict.fromkeys(logged, jnp.zeros(())), jax.tree.map(jnp.zeros_like, learned)
      (losses, grads), _ = jax.lax.scan(
        micro_batch, sums, (rows, jnp.arange(train.grad_accumulation))
      )
    return *jax.lax.psum((losses, grads), BATCH), num_targets

  # check_vma=False: params come in unvaried and their gradients are summed here, once, and not
  # inside every loop of the backward pass.
  gradients = jax.shard_map(
    local_gradients,
    mesh=mesh,
    in_specs=(P(), P(), P(BATCH), P(), P()),
    out_specs=P(),
    check_vma=False,
  )

  def train_step(state: TrainState, batch, teacher_params=None, apply=None):
    learned, frozen = lora.split(state.params)
    losses, grads, num_targets = gradients(
      learned, frozen, batch, (state.seed, state.step), teacher_params
    )
    metrics = {
      **losses,
      "grad_norm": optax.tree.norm(grads),
      "learning_rate": schedule(state.step),
      "num_targets": num_targets,
    }
    updates, opt_state = optimizer.update(grads, state.opt_state, learned)
    # Also where moments of a run that trained more are not 0.
    learned = jax.tree.map(
      lambda new, old, changes: new if changes else old,
      optax.apply_updates(learned, updates),
      learned,
      trainable_mask(learned, trainable),
    )
    new = TrainState(state.step + 1, lora.join(learned, frozen), opt_state, state.seed)
    if train.spike_factor:
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
    return new, metrics

  return jax.jit(train_step, donate_argnums=0)


def make_eval_step(
  config: TransformerConfig, loss_chunk: int, mesh: Mesh, packed: bool = True
) -> Callable:
  """Compiles (params, batch) -> (summed loss in nats, number of counted targets); `packed` as in
  `summed_losses`.
  """

  def local_loss(params, batch):
    return jax.lax.psum(
      summed_losses(config, params, batch, loss_chunk, packed).cross_entropy, BATCH
    ), _num_targets(batch)

  return jax.jit(
    jax.shard_map(local_loss, mesh=mesh, in_specs=(P(), P(BATCH)), out_specs=P(), check_vma=False)
  )


@jax.jit
def all_finite(tree) -> jax.Array:
  """Returns a bool scalar: no array of the tree holds a NaN or an infinity."""
  return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def make_diagnose(config: TransformerConfig) -> Callable:
  """Compiles (params, batch of a row or more) -> {"layer_0/gate_mass": scalar, ...}: what each
  sparsek layer selects.

  It costs a forward pass of the rows given, so the loop gives it one row per logged step.
  """

  def diagnose(params, batch):
    tokens, segment_ids = batch["tokens"][:, :-1], batch["segment_ids"][:, :-1]
    _, sown = Transformer(config).apply(
      {"params": params}, tokens, segment_ids=segment_ids, method="hidden", mutable=["diagnostics"]
    )
    statistics = {}
    for i, (kind, layer) in enumerate(zip(config.layer_kinds, config.layer_configs)):
      if kind == "sparsek":
        (scores,) = layer_params(config, sown["diagnostics"], i)["attention"]["scores"]
        for name, value in selection_statistics(scores, layer.k, layer.window, segment_ids).items():
          statistics[f"layer_{i}/{name}"] = value
    return statistics

  return jax.jit(diagnose)
