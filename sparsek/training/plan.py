"""Plan of a training run: parameters, operations and memory of the compiled step."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparsek.config import TrainConfig, TransformerConfig
from sparsek.errors import RunError
from sparsek.model import flops, lora
from sparsek.model.transformer import count_params
from sparsek.parallel.mesh import ROWS, make_mesh
from sparsek.runs import checkpoint
from sparsek.runs.orbax_errors import first_line
from sparsek.training import teacher
from sparsek.training.checks import check_run
from sparsek.training.optimizer import make_optimizer
from sparsek.training.step import abstract_state, make_train_step

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Plan:
  """Costs of one optimizer step; memory is per device, in bytes.

  Attributes:
    parameters: their number.
    learned: the number of those that learn; a model with adapters has frozen ones too.
    tokens: in a batch.
    step_flops, full_flops: operations of forward and backward passes over documents as long as the
      rows; the latter with full attention in every layer.
    seconds_at_peak: time for step_flops at the devices' peak rate, or None where that is not known.
    compile_seconds: of the step.
    state_bytes: parameters, optimizer state and batch, or None where the backend does not say.
    temporary_bytes: all other memory, or None where the backend does not say.
    limit_bytes: memory that JAX may take, or None where the backend does not say.
  """

  parameters: int
  learned: int
  tokens: int
  step_flops: int
  full_flops: int
  seconds_at_peak: float | None
  compile_seconds: float
  state_bytes: int | None
  temporary_bytes: int | None
  limit_bytes: int | None

  @property
  def total_bytes(self) -> int | None:
    """State and temporaries, or None where the backend does not say."""
    if self.state_bytes is None or self.temporary_bytes is None:
      return None
    return self.state_bytes + self.temporary_bytes

  @property
  def fits(self) -> bool | None:
    """True where it should fit into memory, None where that is not known."""
    if self.total_bytes is None or self.limit_bytes is None:
      return None
    return self.total_bytes <= self.limit_bytes

  def lines(self) -> list[str]:
    """Returns the plan as lines of text."""
    at_peak = (
      ""
      if self.seconds_at_peak is None
      else f", {self.seconds_at_peak:.3g} s at the devices' peak rate"
    )
    lines = [
      f"{lora.describe_size(self.parameters, self.learned)}, {jax.device_count()} x "
      f"{jax.devices()[0].device_kind}",
      f"{self.tokens:,} tokens a step: {self.step_flops / 1e12:,.3g} TFLOP forward and "
      f"backward{at_peak} (with full attention "
      f"{self.full_flops / 1e12:,.3g})",
      f"compiled in {self.compile_seconds:.0f} s",
    ]
    if self.total_bytes is not None:
      assert self.state_bytes is not None and self.temporary_bytes is not None
      of = (
        ""
        if self.limit_bytes is None
        else f" of {self.limit_bytes / GB:.3g}: {'it fits' if self.fits else 'it does not fit'}"
      )
      lines.append(
        f"memory per device in GB: {self.state_bytes / GB:.3g} parameters, optimizer and batch "
        f"+ {self.temporary_bytes / GB:.3g} temporaries = {self.total_bytes / GB:.3g}{of}"
      )
    return lines


def memory_limit() -> int | None:
  """Returns the bytes that JAX may take of a device, or None where the backend does not say."""
  return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def remat_that_fits(config: TransformerConfig, train: TrainConfig, limit: int | None) -> str:
  """Returns the rematerialisation for a memory of `limit` bytes a device: "none" or "attention".

  It is "none" where everything that the backward pass needs should fit, or `limit` is None.

  It is an estimate, which tests/kernels/hopper/compile_test.py compares with the compiler's figure.
  Per token and layer it counts the block's input and two norms, queries, keys, values and the
  attention's output, and four arrays of the MLP's width, all twice for scanned layers; beside them
  the parameters, the gradients and two moments of those that learn, and a chunk of logits.
  """
  per_token = (
    3 * config.embed_dim
    + 2 * config.head_dim * (config.num_heads + config.num_kv_heads)
    + 4 * config.mlp_dim
  )
  tokens = train.data.seq_len * -(
    -train.data.batch_size // (train.grad_accumulation * jax.device_count())
  )
  activations = (
    (2 if config.scan_layers else 1)
    * tokens
    * config.num_layers
    * per_token
    * config.activation_dtype.itemsize
  )
  params = checkpoint.abstract_params(config)
  state = (
    4 * count_params(params)
    + 12 * count_params(lora.split(params)[0])
    + 6 * min(train.loss_chunk, tokens) * config.vocab_size
  )
  return "none" if limit is None or activations + state <= 0.9 * limit else "attention"


def make_plan(config: TransformerConfig, train: TrainConfig) -> Plan:
  """Compiles the training step and returns its costs.

  Raises:
    UsageError: as `sparsek.training.checks.check_run`.
    RunError: where the compiler finds that the memory does not suffice.
  """
  mesh, optimizer = make_mesh(train.fsdp, train.context), make_optimizer(train.optimizer)
  params = checkpoint.abstract_params(config)
  check_run(config, train, mesh, params)
  rows, n = train.data.batch_size, train.data.seq_len
  batch = {
    name: jax.ShapeDtypeStruct((rows, n + 1), jnp.int32, sharding=NamedSharding(mesh, P(ROWS)))
    for name in ("tokens", "segment_ids")
  }
  teacher_model = teacher.teacher_config(train.distill_from) if train.distill_from else None
  teacher_params = (
    [teacher.abstract_teacher(train.distill_from, mesh)] if train.distill_from else []
  )
  begin = time.perf_counter()
  try:
    step = make_train_step(config, train, optimizer, mesh, teacher_model)
    state = abstract_state(params, optimizer, mesh, train.spike_factor)
    compiled = step.lower(state, batch, *teacher_params).compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise RunError(f"the step does not fit into memory: {first_line(error)}") from None
  seconds, memory = time.perf_counter() - begin, compiled.memory_analysis()
  lengths = np.full(rows, n)
  step_flops, full_flops = (
    flops.training_flops(c, params, lengths)
    for c in (config, dataclasses.replace(config, attention="full"))
  )
  peak = flops.peak(jax.devices()[0])
  return Plan(
    parameters=count_params(params),
    learned=count_params(lora.split(params)[0]),
    tokens=rows * n,
    step_flops=step_flops,
    full_flops=full_flops,
    compile_seconds=seconds,
    seconds_at_peak=peak and step_flops / (peak * mesh.size),
    limit_bytes=memory_limit(),
    state_bytes=memory and memory.argument_size_in_bytes,
    temporary_bytes=memory
    and memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
  )
