"""The implementations of attention that a model runs with on the present device, and why faster
ones do not.
"""

import jax
import jax.numpy as jnp

from sparsek.attention.backends import Choice, choose_implementation, choose_window_implementation
from sparsek.attention.eviction import RULES
from sparsek.config import TransformerConfig, heads_text
from sparsek.kernels.devices import first_device
from sparsek.model import layers
from sparsek.model.baselines import BASELINES
from sparsek.model.head_groups import window_implementation

# The kinds of the library, before any is registered.
KINDS = (*layers.ATTENTION_MODULES, *BASELINES)
# The faster implementations that there are for a platform.
FASTER = {"gpu": ("cudnn", "mosaic_gpu", "mosaic_mma"), "tpu": ("mosaic_tpu",)}


def attention_choices(
  config: TransformerConfig, seq_len: int, batch: int = 1, *, packed: bool = True
) -> dict[str, Choice]:
  """Chooses the implementation of attention of each different layer.

  Args:
    config: the model.
    seq_len: tokens of a row.
    batch: rows of a device.
    packed: whether rows may hold more than one document, as in training by default.

  Returns:
    Choices by the layer's term of the attention pattern, such as "sparsek" or "sparsek:k64:w32". A
    layer that has heads with another k or window has two, such as "heads 0 of sparsek:h1:k9".

  Raises:
    NotImplementedError: if the implementation that `config` asks for cannot run here.
  """
  choices = {}
  for term in dict.fromkeys(config.layer_terms):
    groups = config.for_term(term).head_groups
    for group in groups:
      name = f"heads {heads_text(group.heads)} of {term}" if len(groups) > 1 else term
      choices[name] = _choice(group.config, group.kind, seq_len, batch, packed)
  return choices


def _choice(config: TransformerConfig, kind: str, seq_len: int, batch: int, packed: bool) -> Choice:
  """Chooses as the attention module of that kind does."""
  groups, heads = config.num_kv_heads, config.num_heads
  row = lambda batch, heads: jax.ShapeDtypeStruct(
    (batch, seq_len, heads, config.head_dim), config.activation_dtype
  )
  ids = lambda batch: jax.ShapeDtypeStruct((batch, seq_len), jnp.int32)
  segment_ids = ids(batch) if packed else None
  if kind not in KINDS:  # registered: what runs is its own affair
    return Choice("its own code", {})
  if kind == "block_topk":  # it has no kernels
    return Choice("xla", {})
  if kind == "lsh":  # the heads of a group are a row, and buckets are its documents
    reach = min(config.k + config.window, seq_len)
    query, buckets = row(batch * groups, heads // groups), ids(batch * groups)
    return choose_window_implementation(window_implementation(config), query, buckets, reach)
  if kind in ("full", "sliding_window", "linear"):
    window = seq_len if kind == "full" else min(config.window, seq_len)
    implementation = window_implementation(config)
    return choose_window_implementation(implementation, row(batch, heads), segment_ids, window)
  window = min(config.window, seq_len)
  implementation = window_implementation(config) if kind in RULES else config.implementation
  return choose_implementation(implementation, row(batch, heads), segment_ids, window)


def describe_choice(
  config: TransformerConfig, seq_len: int, batch: int = 1, *, packed: bool = True
) -> list[str]:
  """Describes `attention_choices`, with one sentence for all layers of the same choice.

  On a CPU a sentence is like "attention: xla on cpu, for which there are no kernels". On
  accelerators it goes on with the reasons why faster implementations for such a device cannot run.
  """
  choices = attention_choices(config, seq_len, batch, packed=packed)
  device = first_device()
  name = device.device_kind
  if device.platform == "cpu":
    name = "cpu, for which there are no kernels"
  endings: dict[str, list[str]] = {}
  for term, choice in choices.items():
    reasons = "".join(
      f"; {faster} cannot run here: {reason}"
      for faster, reason in choice.refusals.items()
      if faster in FASTER.get(device.platform, ())
    )
    asked = ", as asked for" if choice.implementation == config.implementation else ""
    endings.setdefault(f"{choice.implementation} on {name}{asked}{reasons}", []).append(term)
  if len(endings) == 1:
    return [f"attention: {ending}" for ending in endings]
  return [f"attention of {', '.join(terms)}: {ending}" for ending, terms in endings.items()]
