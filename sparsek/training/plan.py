"""Plan of a training run: parameters, operations, memory and collectives of the compiled step."""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsek.config import TrainConfig, TransformerConfig
from sparsek.errors import RunError
from sparsek.model import flops, implementations, lora
from sparsek.model.transformer import count_params
from sparsek.parallel.collectives import Traffic, collectives
from sparsek.parallel.hardware import Rates, rates
from sparsek.parallel.mesh import AXES, ROWS, make_mesh
from sparsek.parallel.topology import compiling_for
from sparsek.runs import checkpoint
from sparsek.runs.orbax_errors import first_line
from sparsek.training import teacher
from sparsek.training.activations import activation_bytes
from sparsek.training.checks import check_run
from sparsek.training.optimizer import make_optimizer
from sparsek.training.stages import Stage
from sparsek.training.start import attention_shape, may_be_packed
from sparsek.training.step import abstract_state, make_train_step

GB = 1e9
# Share of the peak rate that a step of a sparsek model reached: 110M parameters in rows of 32768
# tokens on an H100, experiments/results/train_h100.json.
RECORDED_SHARE = 0.315
GPU_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # of a GPU's memory, what JAX takes; by default 3/4


@dataclasses.dataclass(frozen=True)
class Plan:
  """Costs of one optimizer step; memory is per device, in bytes.

  Attributes:
    devices: their number, kind and mesh.
    attention: sentences that say how attention is computed.
    parameters: their number.
    learned: the number of those that learn; a model with adapters has frozen ones too.
    tokens: in a batch.
    step_flops, full_flops: operations of forward and backward passes over documents as long as the
      rows; the latter with full attention in every layer.
    num_devices: number of devices.
    rates: of a device, or None where they are not known.
    collectives: of a step, by kind.
    compile_seconds: of the step.
    arguments: bytes of what the step gets: parameters, moments, batch, and a teacher.
    activation_bytes: kept from the forward pass for the backward pass; part of `temporary_bytes`.
    temporary_bytes: all memory but the arguments, or None where the backend does not say.
    limit_bytes: memory that JAX may take, or None where that is not known.
  """

  devices: str
  attention: Sequence[str]
  parameters: int
  learned: int
  tokens: int
  step_flops: int
  full_flops: int
  num_devices: int
  rates: Rates | None
  collectives: Mapping[str, Traffic]
  compile_seconds: float
  arguments: Mapping[str, int]
  activation_bytes: int
  temporary_bytes: int | None
  limit_bytes: int | None

  @property
  def state_bytes(self) -> int:
    """All that the step gets."""
    return sum(self.arguments.values())

  @property
  def total_bytes(self) -> int | None:
    """Arguments and temporaries, or None where the backend does not say."""
    return None if self.temporary_bytes is None else self.state_bytes + self.temporary_bytes

  @property
  def fits(self) -> bool | None:
    """True where it should fit into memory, None where that is not known."""
    if self.total_bytes is None or self.limit_bytes is None:
      return None
    return self.total_bytes <= self.limit_bytes

  @property
  def seconds_at_peak(self) -> float | None:
    """Time for step_flops at the devices' peak rate, or None where that is not known."""
    return self.rates and self.step_flops / (self.rates.flops * self.num_devices)

  @property
  def collective_seconds(self) -> float | None:
    """Time in which a device receives what collectives send, or None where rates are not known."""
    if self.rates is None:
      return None
    received, between = (
      sum(getattr(traffic, name) for traffic in self.collectives.values())
      for name in ("received", "between_nodes")
    )
    return (received - between) / self.rates.link + between / self.rates.network

  def lines(self) -> list[str]:
    """Returns the plan as lines of text."""
    at_peak = (
      ""
      if self.seconds_at_peak is None
      else f", {self.seconds_at_peak:.3g} s at the devices' peak rate"
    )
    return [
      f"{lora.describe_size(self.parameters, self.learned)}, {self.devices}",
      f"{self.tokens:,} tokens a step: {self.step_flops / 1e12:,.3g} TFLOP forward and "
      f"backward{at_peak} (with full attention "
      f"{self.full_flops / 1e12:,.3g})",
      *self.attention,
      f"compiled in {self.compile_seconds:.0f} s",
      *self._collective_lines(),
      *self._time_lines(),
      *self._memory_lines(),
    ]

  def _collective_lines(self) -> list[str]:
    if self.num_devices == 1:
      return []
    lines = [f"collectives of a step: {'' if self.collectives else 'none'}".rstrip()]
    for kind, traffic in sorted(self.collectives.items()):
      far = traffic.between_nodes
      between = f", {_giga(far)} of it between nodes" if far else ""
      lines.append(
        f"  {traffic.number} {kind}: a device receives {_giga(traffic.received)} GB{between}"
      )
    return lines

  def _time_lines(self) -> list[str]:
    if self.seconds_at_peak is None or self.rates is None:
      return []
    compute = self.seconds_at_peak / RECORDED_SHARE
    share = f"{RECORDED_SHARE:.1%} of the peak rate, as recorded for 110M parameters on an H100"
    if not self.collective_seconds:
      return [f"a step should take {compute:.3g} s: operations at {share}"]
    network = (
      f" ({self.rates.network / GB:.0f} between nodes)"
      if any(traffic.between_nodes for traffic in self.collectives.values())
      else ""
    )
    longest = compute + self.collective_seconds
    return [
      f"a step should take {max(compute, self.collective_seconds):.3g} to {longest:.3g} s: "
      f"operations {compute:.3g} s at {share}; collectives {self.collective_seconds:.3g} s at "
      f"{self.rates.link / GB:.0f} GB/s{network}, which may run at the same time"
    ]

  def _memory_lines(self) -> list[str]:
    if self.total_bytes is None or self.temporary_bytes is None:
      return []
    of = (
      ""
      if self.limit_bytes is None
      else f" of {self.limit_bytes / GB:.3g}: {'it fits' if self.fits else 'it does not fit'}"
    )
    # The compiler may need less than what JAX keeps.
    activations = min(self.activation_bytes, self.temporary_bytes)
    parts = [
      *self.arguments.items(),
      ("activations", activations),
      ("other temporaries", self.temporary_bytes - activations),
    ]
    return [
      f"memory per device in GB: {' + '.join(f'{_giga(size)} {name}' for name, size in parts)} "
      f"= {_giga(self.total_bytes)}{of}"
    ]


def _giga(number: int) -> str:
  return f"{number / GB:.3g}"


def memory_limit(devices: Sequence[jax.Device] | None = None) -> int | None:
  """Returns the bytes that JAX may take of a device, or None where that is not known.

  Args:
    devices: from `sparsek.parallel.topology`, or None for the attached ones.
  """
  if devices is None:
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
  known = rates(devices[0])
  if known is None or devices[0].platform != "gpu":
    return known and int(known.memory_bytes)
  return int(float(os.environ.get(GPU_FRACTION, 0.75)) * known.memory_bytes)


def remat_that_fits(
  config: TransformerConfig, train: TrainConfig, limit: int | None, devices: int | None = None
) -> str:
  """Returns the rematerialisation for a memory of `limit` bytes a device: "none" or "attention".

  It is "none" where everything that the backward pass needs should fit, or `limit` is None.

  It is an estimate, which tests/kernels/hopper/compile_test.py compares with the compiler's figure.
  Per token and layer it counts the block's input and two norms, queries, keys, values and the
  attention's output, the lists of chosen keys and values, and four arrays of the MLP's width, all
  twice for scanned layers; beside them
  the parameters, the gradients and two moments of those that learn, a chunk of logits, and where
  parameters are split, an embedding and an output matrix that are whole.

  Args:
    config, train: the model and everything else.
    limit: bytes, or None where the backend does not say.
    devices: number of devices of the run; all that are attached by default.
  """
  if limit is None:
    return "none"
  selecting = (group for layer in config.layer_configs for group in layer.selecting_groups)
  lists = sum(len(group.heads) for group in selecting) / (config.num_layers * config.num_kv_heads)
  per_token = (
    3 * config.embed_dim
    + 2 * config.head_dim * (config.num_heads + (1 + lists) * config.num_kv_heads)
    + 4 * config.mlp_dim
  )
  groups = (devices or jax.device_count()) // train.context
  rows = -(-train.data.batch_size // (train.grad_accumulation * max(1, groups)))
  tokens = train.data.seq_len * rows // train.context
  activations = (
    (2 if config.scan_layers else 1)
    * tokens
    * config.num_layers
    * per_token
    * config.activation_dtype.itemsize
  )
  params = checkpoint.abstract_params(config)
  parameters = 4 * count_params(params) + 12 * count_params(lora.split(params)[0])
  whole = 8 * config.vocab_size * config.embed_dim if train.fsdp > 1 else 0
  state = parameters // train.fsdp + whole + 6 * min(train.loss_chunk, tokens) * config.vocab_size
  return "none" if activations + state <= 0.9 * limit else "attention"


def make_plan(
  config: TransformerConfig,
  train: TrainConfig,
  devices: Sequence[jax.Device] | None = None,
  run: Sequence[Stage] = (),
) -> Plan:
  """Compiles the training step and returns its costs.

  Args:
    config, train: the model and everything else.
    devices: from `sparsek.parallel.topology`, or None for the attached ones.
    run: the stages of which this is one, since its step gets the parameters of the last; () for a
      run without stages.

  Raises:
    UsageError: as `sparsek.training.checks.check_run`.
    RunError: where the compiler finds that the memory does not suffice.
  """
  with compiling_for(devices):
    return _make_plan(config, train, devices, run)


def _make_plan(config, train, devices, run) -> Plan:
  mesh = make_mesh(train.fsdp, train.context, devices)
  own = checkpoint.abstract_params(config)
  check_run(config, train, mesh, own, [stage.train for stage in run])
  params = checkpoint.abstract_params(run[-1].config) if run else own
  state, batch, teachers = _abstract_arguments(params, train, mesh)
  teacher_model = teacher.teacher_config(train.distill_from) if train.distill_from else None
  begin = time.perf_counter()
  try:
    step = make_train_step(config, train, make_optimizer(train.optimizer), mesh, teacher_model)
    compiled = step.lower(state, batch, *teachers).compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise RunError(f"the step does not fit into memory: {first_line(error)}") from None
  seconds, memory = time.perf_counter() - begin, compiled.memory_analysis()
  rows, n = train.data.batch_size, train.data.seq_len
  step_flops, full_flops = (
    flops.training_flops(c, own, np.full(rows, n))
    for c in (config, dataclasses.replace(config, attention="full"))
  )
  arguments = {"parameters": state.params, "moments": state.opt_state, "batch": batch}
  if teachers:
    arguments["teacher"] = teachers
  return Plan(
    devices=_describe(mesh),
    attention=implementations.describe_choice(
      *attention_shape(config, train, mesh), packed=may_be_packed(train, mesh)
    ),
    parameters=count_params(params),
    learned=count_params(lora.split(params)[0]),
    tokens=rows * n,
    step_flops=step_flops,
    full_flops=full_flops,
    num_devices=mesh.size,
    rates=rates(mesh.devices.flat[0]),
    collectives=_collectives(compiled, mesh, devices is None),
    compile_seconds=seconds,
    arguments={name: _bytes_per_device(tree) for name, tree in arguments.items()},
    activation_bytes=activation_bytes(config, train, mesh, state, batch, teacher_model, *teachers),
    temporary_bytes=memory
    and memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
    limit_bytes=memory_limit(devices),
  )


def _abstract_arguments(params, train: TrainConfig, mesh: Mesh) -> tuple[Any, Any, list[Any]]:
  """Returns the shapes and placement of a step's state and batch, and [the teacher's parameters]
  where there is a teacher.
  """
  state = abstract_state(params, make_optimizer(train.optimizer), mesh, train.spike_factor)
  shape = train.data.batch_size, train.data.seq_len + 1
  batch = {
    name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, P(ROWS)))
    for name in ("tokens", "segment_ids")
  }
  teachers = [teacher.abstract_teacher(train.distill_from, mesh)] if train.distill_from else []
  return state, batch, teachers


def _bytes_per_device(tree) -> int:
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def _describe(mesh: Mesh) -> str:
  """Returns a text such as "8 x NVIDIA H200 (data 2, fsdp 4, context 1)"."""
  kind = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
  if mesh.size == 1:
    return kind
  return f"{kind} ({', '.join(f'{axis} {mesh.shape[axis]}' for axis in AXES)})"


def _collectives(compiled: jax.stages.Compiled, mesh: Mesh, attached: bool) -> dict[str, Traffic]:
  if mesh.size == 1:
    return {}
  program = compiled.as_text()
  assert program is not None
  nodes = None
  if mesh.devices.flat[0].platform == "gpu":  # the chips of a TPU's slice are all linked
    node = "slice_index" if attached else "process_index"
    nodes = [getattr(device, node) for device in mesh.devices.flat]
  return collectives(program, nodes)
