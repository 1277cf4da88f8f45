"""Checks of a run's configuration, made before any long work."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sparsek.config import TrainConfig, TransformerConfig
from sparsek.errors import UsageError
from sparsek.model.baselines import context_refusal
from sparsek.model.transformer import Params, Transformer
from sparsek.parallel.mesh import CONTEXT
from sparsek.runs import writers
from sparsek.training.optimizer import trainable_mask


def check_run(
  config: TransformerConfig,
  train: TrainConfig,
  mesh: Mesh,
  params: Params,
  others: Sequence[TrainConfig] = (),
) -> None:
  """Raises UsageError where a model cannot be trained as `train` asks on the devices of `mesh`.

  Args:
    config: the model.
    train: everything else.
    mesh: the devices of the run.
    params: of the model; shapes suffice.
    others: what the other stages of the run are trained with.
  """
  writers.check(train)
  check_batch(mesh, train.data.batch_size, train.grad_accumulation)
  check_adapters(config, train, *others)
  check_gates(config, train)
  check_length(config, train.data.seq_len)
  check_context(config, mesh, train.data.seq_len)
  check_implementation(config, train.data.seq_len, params)
  if not any(jax.tree.leaves(trainable_mask(params, train.optimizer.trainable))):
    raise UsageError(f"--trainable={train.optimizer.trainable}: no layer has such parameters")


def check_batch(mesh: Mesh, batch_size: int, grad_accumulation: int = 1) -> None:
  """Raises UsageError unless every device gets the same number of rows in every micro-batch."""
  groups = mesh.size // mesh.shape[CONTEXT]
  parts = groups * grad_accumulation
  if batch_size % parts:
    devices = f"{groups} device(s)"
    if mesh.shape[CONTEXT] > 1:
      devices = f"{groups} group(s) of {mesh.shape[CONTEXT]} devices"
    devices += f" x grad_accumulation={grad_accumulation}"
    raise UsageError(f"--batch_size={batch_size} must be a multiple of {parts}: {devices}")


def check_context(
  config: TransformerConfig, mesh: Mesh, seq_len: int, flag: str = "seq_len"
) -> None:
  """Raises UsageError where the tokens of a row cannot be split over `context`."""
  parts = mesh.shape[CONTEXT]
  if seq_len % parts:
    raise UsageError(f"--{flag}={seq_len} must be a multiple of --context={parts}")
  refusal = context_refusal(config) if parts > 1 else ""
  if refusal:
    raise UsageError(f"--context={parts}: {refusal}")


def check_adapters(config: TransformerConfig, train: TrainConfig, *others: TrainConfig) -> None:
  """Raises UsageError where adapters could not learn, or would be larger than their matrices.

  `others` are further stages of the run: adapters learn in one of them at least.
  """
  trainable = {stage.optimizer.trainable for stage in (train, *others)}
  if config.lora_rank and trainable == {"scorer"}:
    why = "--scorer_warmup and --trainable=scorer" if train.scorer_warmup else "--trainable=scorer"
    raise UsageError(
      f"--lora_rank={config.lora_rank} and {why} exclude each other: no adapter would learn; "
      "warm up scorers before, without adapters"
    )
  if config.lora_rank > config.embed_dim:
    raise UsageError(
      f"--lora_rank={config.lora_rank} must be at most {config.embed_dim}, the model's width"
    )


def check_gates(config: TransformerConfig, train: TrainConfig) -> None:
  """Raises UsageError where gates cannot become those of the model in the course of a run."""
  if not train.gate_anneal:
    return
  flag = f"--gate_anneal={train.gate_anneal}"
  if "sparsek" not in config.layer_kinds:
    raise UsageError(f"{flag}: no layer has gates")
  if config.gate != "straight_through":
    raise UsageError(f"{flag} needs --gate=straight_through, which is hard; --gate={config.gate}")
  if train.scorer_warmup:
    raise UsageError(f"{flag} and --scorer_warmup exclude each other: a warm-up has no gates")


def check_length(config: TransformerConfig, seq_len: int, flag: str = "seq_len") -> None:
  """Raises UsageError where rows are longer than a table of learned positions."""
  if config.positions == "learned" and seq_len > config.max_positions:
    raise UsageError(
      f"--{flag}={seq_len} must be at most {config.max_positions}, the model's learned positions"
    )


def check_implementation(config: TransformerConfig, seq_len: int, params: Params) -> None:
  """Raises UsageError where the implementation of attention that `config` names cannot run here.

  The parameters may be shapes.
  """
  if config.implementation is not None:
    try:
      jax.eval_shape(
        Transformer(config).apply, {"params": params}, jax.ShapeDtypeStruct((1, seq_len), jnp.int32)
      )
    except NotImplementedError as error:
      raise UsageError(f"--implementation={config.implementation}: {error}") from None
