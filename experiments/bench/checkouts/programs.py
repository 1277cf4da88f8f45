"""Programs of a checkout, lowered and not compiled."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir
from jaxlib.mlir import ir

import sparsek

from .access import Training, abstract_params, attention_inputs, attention_pass, find_for_step

_KERNEL = re.compile(r'kernel_hash = "(?:[^"\\]|\\.)*", module = "((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(rb"\\(\\|[0-9A-F]{2})")


def tiny(**changes: Any) -> sparsek.TransformerConfig:
  """Returns a configuration of two layers, which are not scanned unless `changes` say so."""
  return sparsek.preset(
    "tiny", **{"num_layers": 2, "k": 16, "window": 16, "scan_layers": False, **changes}
  )


def lower_step(
  config: sparsek.TransformerConfig | None = None, *, apply: bool = False, **options: Any
) -> jax.stages.Lowered:
  """Returns a lowered training step.

  Args:
    config: of the model; None: `tiny()`.
    apply: passes the argument of that name, as the training loop does.
    options: of `Training`.
  """
  config, teacher = config or tiny(), options.get("teacher")
  training = Training(config, **{"n": 64, "batch_size": 2, **options})
  arguments = [training.abstract_state(), training.batch]
  if teacher is not None:
    arguments.append(
      jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), abstract_params(teacher)
      )
    )
  chosen = {"apply": jax.ShapeDtypeStruct((), jnp.bool_)} if apply else {}
  return training.step.lower(*arguments, **chosen)


def lower_evaluation() -> jax.stages.Lowered:
  """Returns the lowered evaluation of a batch of packed documents."""
  training = Training(tiny(), n=64, batch_size=2, documents=3)
  make = find_for_step("make_eval_step")
  documents = {"documents": training.batch["segment_ids"]}  # which older ones do not read
  return make(training.config, 32, training.mesh).lower(
    abstract_params(training.config), {**training.batch, **documents}
  )


def lower_diagnosis() -> jax.stages.Lowered:
  """Returns the lowered statistics of the selection."""
  training = Training(tiny(), n=64, batch_size=2, documents=3)
  make = find_for_step("make_diagnose")
  mesh = [training.mesh] * (len(inspect.signature(make).parameters) - 1)  # older ones take none
  return make(training.config, *mesh).lower(abstract_params(training.config), training.batch)


def lower_init(config: sparsek.TransformerConfig | None = None) -> jax.stages.Lowered:
  """Returns the lowered initialisation of parameters."""
  make = functools.partial(sparsek.init_params, config or tiny())
  return jax.jit(make).lower(jax.random.key(0))


def lower_generation(
  kind: str, config: sparsek.TransformerConfig | None = None
) -> jax.stages.Lowered:
  """Returns a lowered part of generation.

  Args:
    kind: "params" (what `inference_params` makes), "decode" (a step) or "prefill" (of a cache
      that is empty, and of one that is not).
    config: of the model; None: `tiny()`.
  """
  config, batch = config or tiny(), 2
  convert = functools.partial(sparsek.inference_params, config)
  if kind == "params":
    return jax.jit(convert).lower(abstract_params(config))
  params = jax.eval_shape(convert, abstract_params(config))
  cache = sparsek.init_cache(config, batch, max_length=256)
  if kind == "decode":
    step = functools.partial(sparsek.decode_step, config)
    return jax.jit(step).lower(params, cache, jax.ShapeDtypeStruct((batch,), jnp.int32))

  # NumPy's arrays, because `prefill` looks at the values of a cache to see whether it is empty.
  empty = jax.tree.map(np.asarray, cache)

  def prefill_both(params, tokens):
    prefill = functools.partial(sparsek.prefill, config, params, chunk_size=32)
    logits, filled = prefill(empty, tokens)
    return logits, prefill(filled, tokens, last_only=True)

  return jax.jit(prefill_both).lower(params, jax.ShapeDtypeStruct((batch, 48), jnp.int32))


def lower_attention(
  *,
  shape: tuple[int, int, int, int] = (64, 4, 2, 16),
  dtype: str = "float32",
  packed: bool = False,
  **options: Any,
) -> jax.stages.Lowered:
  """Returns lowered attention, forward and backward.

  Args:
    shape: tokens, query heads, key/value heads, head_dim.
    dtype: of query, key and value.
    packed: passes segment_ids.
    options: of `sparsek.sparsek_attention`.
  """
  inputs, cotangent = attention_inputs(*shape, dtype, batch=2)
  segments = jnp.ones((2, shape[0]), jnp.int32) if packed else None
  attend = attention_pass(True, **{"k": 8, "window": 8, "implementation": "xla", **options})
  return jax.jit(attend).lower(inputs, cotangent, segments)


def lower_window() -> jax.stages.Lowered:
  """Returns lowered attention to a sliding window, forward and backward."""
  inputs, cotangent = attention_inputs(64, 4, 2, 16, "float32")
  attend = functools.partial(sparsek.sliding_window_attention, window=8, implementation="xla")

  def both(query, key, value, cotangent):
    output, pull = jax.vjp(attend, query, key, value)
    return output, pull(cotangent)

  return jax.jit(both).lower(*inputs[:3], cotangent)


def lower_operators() -> jax.stages.Lowered:
  """Returns the lowered operator and its causal form, forward and backward."""

  def both(scores):
    gates, pull_gates = jax.vjp(lambda z: sparsek.sparsek(z, 8), scores)
    threshold, pull, expiry = jax.vjp(
      lambda z: sparsek.causal_sparsek(z, 8, delay=4), scores, has_aux=True
    )
    return gates, pull_gates(gates), threshold, pull(threshold), expiry

  return jax.jit(both).lower(jax.ShapeDtypeStruct((2, 64, 3), jnp.float32))


def take_kernels(text: str) -> tuple[str, list[str]]:
  """Returns the text of a program without its Mosaic GPU kernels, and the text of each of them.

  A program holds kernels as bytecode with the lines of their source.
  """

  def byte(match):
    return b"\\" if match[1] == b"\\" else bytes([int(match[1], 16)])

  from jax.experimental.mosaic import gpu as mosaic  # only where there are kernels

  kernels = []
  for bytecode in _KERNEL.findall(text):
    with mlir.make_ir_context() as context:
      context.allow_unregistered_dialects = True
      mosaic.dialect.register_dialect(context)
      kernels.append(str(ir.Module.parse(_ESCAPED.sub(byte, bytecode.encode()))))
  return _KERNEL.sub("kernel", text), kernels


def kernel_programs() -> dict[str, Callable]:
  """Returns programs by name, of the sizes and dtype that the kernels for GPUs take."""

  def attention(head_dim, **options):
    sizes = {"k": 512, "window": 512, "implementation": None}
    shape = (4096, 8, 2, head_dim)
    return lambda: lower_attention(shape=shape, dtype="bfloat16", **{**sizes, **options})

  def generation(kind, name, **changes):
    return lambda: lower_generation(kind, sparsek.preset(name, num_layers=2, **changes))

  def step(**options):
    return lambda: lower_step(
      sparsek.preset("gpt2_small", num_layers=2), n=4096, batch_size=1, **options
    )

  return {
    "step, gpt2_small": step(),
    "step, gpt2_small, packed documents": step(documents=3),
    "attention, heads of 64": attention(64),
    "attention, heads of 128": attention(128),
    "attention, heads of 128, packed documents": attention(128, packed=True),
    "attention, heads of 128, gate value": attention(128, gate="value"),
    "attention, heads of 128, gate key_value": attention(128, gate="key_value"),
    "decode step, gpt2_small": generation("decode", "gpt2_small"),
    "decode step, gpt2_small, full attention": generation("decode", "gpt2_small", attention="full"),
    "decode step, 1b": generation("decode", "1b"),
    "prefill, gpt2_small": generation("prefill", "gpt2_small"),
  }


def programs() -> dict[str, Callable]:
  """Returns all programs that are lowered on this device, by name."""

  def step(changes=None, **options):
    return lambda: lower_step(tiny(**(changes or {})), **options)

  def generation(kind, **changes):
    return lambda: lower_generation(kind, tiny(**changes))

  def attention(**options):
    return functools.partial(lower_attention, **options)

  baselines = "random,attention_sinks,strided,lsh,block_topk,linear"
  other_family = {
    "norm": "layer_norm",
    "mlp": "gelu_tanh",
    "positions": "learned",
    "use_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "parallel_residual": True,
    "tie_embeddings": False,
  }
  llama = {"qk_norm": True, "rope_scaling": "llama3:8:1:4:64", "rope_fraction": 0.5}
  scorer = {
    "scorer": "conv",
    "scorer_init_noise": 0.1,
    "scorer_init_sink": 1.0,
    "scorer_noise": 0.1,
    "scorer_shared": True,
  }
  return {
    "step": step(),
    "step, applied or not": step(apply=True),
    "step, scanned layers": step({"scan_layers": True}),
    "step, packed documents": step(documents=3),
    "step, conv scorer with noise and a sink": step(scorer),
    "step, random scorer": step({"scorer": "random"}),
    "step, remat attention": step({"remat": "attention"}),
    "step, remat dots": step({"remat": "dots"}),
    "step, remat full": step({"remat": "full"}),
    "step, grad_accumulation 2": step(grad_accumulation=2),
    "step, sliding window": step({"attention": "sliding_window"}),
    "step, full attention": step({"attention": "full"}),
    "step, sparsek and full, bfloat16": step(
      {"attention": "sparsek:k8:w8,full", "dtype": "bfloat16"}
    ),
    "step, gate value": step({"gate": "value"}),
    "step, gate key_value": step({"gate": "key_value"}),
    "step, baselines": step({"attention": baselines, "num_layers": 6}),
    "step, other family": step(other_family),
    "step, qk_norm and scaled rope": step(llama),
    "step, LoRA": step({"lora_rank": 4, "lora_alpha": 8.0}),
    "step, no scorer loss": step(scorer_loss=0.0),
    "step, scorer warm-up": step(scorer_warmup=True, optimizer={"trainable": "scorer"}),
    "step, trainable attention": step(optimizer={"trainable": "attention"}),
    "step, distillation": lambda: lower_step(teacher=tiny(attention="full", dtype="bfloat16")),
    "step, spike_factor 2": step(spike_factor=2.0),
    "evaluation": lower_evaluation,
    "selection statistics": lower_diagnosis,
    "initial parameters": lower_init,
    "initial parameters, LoRA": lambda: lower_init(tiny(lora_rank=4)),
    "inference parameters": generation("params", scan_layers=True),
    "inference parameters, bfloat16": generation("params", dtype="bfloat16"),
    "decode step": generation("decode"),
    "decode step, bfloat16": generation("decode", dtype="bfloat16"),
    "decode step, gate value, conv scorer": generation("decode", gate="value", scorer="conv"),
    "decode step, sliding window and full": generation("decode", attention="sliding_window,full"),
    "decode step, other family": generation("decode", **other_family),
    "prefill": generation("prefill"),
    "prefill, gate value, conv scorer": generation("prefill", gate="value", scorer="conv"),
    "prefill, sliding window and full": generation("prefill", attention="sliding_window,full"),
    "attention": attention(),
    "attention, packed documents": attention(packed=True),
    "attention, gate value": attention(gate="value"),
    "attention, gate key_value": attention(gate="key_value"),
    "attention, reference": attention(implementation="reference"),
    "sliding-window attention": lower_window,
    "operators": lower_operators,
  } | (kernel_programs() if jax.default_backend() == "gpu" else {})
