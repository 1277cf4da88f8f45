"""The layers or KV heads of a model that need distant tokens, and a layer pattern for them.

A layer needs distant tokens if the loss rises when this layer alone sees recent tokens only; so
does a KV head with the query heads that read it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sparsek.config import TransformerConfig, heads_text
from sparsek.model.transformer import (
  Params,
  Transformer,
  output_matrix,
  parameter_specs,
  unstack_layers,
)
from sparsek.parallel.mesh import AXES, CONTEXT, FSDP, ROWS, batch_specs, make_mesh, put_batch
from sparsek.parallel.sharding import computed_on, placements
from sparsek.training.loss import Batch, chunked_cross_entropy, cut_targets

Change = tuple[int, str]  # a layer, and the term of the layer pattern that it gets instead


def of_layers(config: TransformerConfig, term: str) -> list[Change]:
  """Returns the changes that give each layer in turn a term, such as "sliding_window:w256" or
  "attention_sinks:k4:w252".
  """
  return [(i, term) for i in range(config.num_layers)]


def of_heads(config: TransformerConfig, term: str, length: int) -> list[Change]:
  """Returns the changes that give each KV head of each layer in turn a term.

  The other heads of the layer see everything: their window is as long as a row.

  Args:
    config: of the model.
    term: as in `of_layers`.
    length: tokens of a row.
  """
  heads = range(config.num_kv_heads)
  others = [heads_text([head for head in heads if head != changed]) for changed in heads]
  terms = [f"{term}:h{text}:w{length}" if text else term for text in others]
  return [(i, of_head) for i in range(config.num_layers) for of_head in terms]


def losses(
  config: TransformerConfig,
  params: Params,
  batches: Iterable[dict],
  changes: Sequence[Change],
  loss_chunk: int = 1024,
  progress: Callable = iter,
  mesh: Mesh | None = None,
) -> tuple[float, list[float]]:
  """Returns the loss of a model, and its loss after each of several changes of a single layer.

  A change takes the time of half a forward pass in the mean over layers, and all take the memory of
  the hidden states of all layers for a batch; few functions are compiled.

  Args:
    config, params: the model.
    batches: of held-out rows, "tokens" and "segment_ids" [B, n + 1].
    changes: from `of_layers` or `of_heads`; of kinds without parameters.
    loss_chunk: number of tokens whose logits exist at the same time.
    progress: wraps the batches, as tqdm does.
    mesh: devices over which parameters, rows and their tokens are spread; None: rows over all.
  Returns:
    the mean loss of the unchanged model, and a list of those after each change, in nats per token.
  """
  mesh = make_mesh() if mesh is None else mesh
  flat, parts = dataclasses.replace(config, scan_layers=False), mesh.shape[FSDP]
  params = jax.device_put(params, placements(mesh, params))
  if config.scan_layers:
    params = computed_on(mesh, functools.partial(unstack_layers, config), params)
  specs, x_spec = parameter_specs(flat, parts), P(ROWS, CONTEXT)

  def on_mesh(function: Callable, in_specs: tuple, out_specs: P) -> Callable:
    return jax.jit(
      jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    )

  @functools.cache
  def block(layer_term: str) -> Callable:
    one = dataclasses.replace(flat, num_layers=1, attention=layer_term)
    layer_specs = {"layers_0": parameter_specs(one, parts)["layers_0"]}

    def apply(layer, i, x, segment_ids):
      return Transformer(one).apply({"params": layer}, x, segment_ids, i, method=_only_block)

    return on_mesh(apply, (layer_specs, P(), x_spec, P(ROWS)), x_spec)

  def embedded(params, batch):
    return Transformer(flat).apply(
      {"params": params}, batch["tokens"], batch["segment_ids"], method="embedded"
    )

  cut, embed = jax.jit(cut_targets), on_mesh(embedded, (specs, batch_specs()), x_spec)
  loss_and_count = on_mesh(
    functools.partial(_loss_and_count, flat, loss_chunk), (specs, x_spec, batch_specs()), P()
  )
  layers = [{"layers_0": params[f"layers_{i}"]} for i in range(config.num_layers)]
  # sums of (loss, count)
  unchanged, changed = np.zeros(2, np.float32), np.zeros((len(changes), 2), np.float32)
  for batch in progress(batches):
    batch = cut(put_batch(mesh, batch))
    step = lambda i, x, term: block(term)(layers[i], jnp.int32(i), x, batch["segment_ids"])
    inputs = [embed(params, batch)]
    for i, layer_term in enumerate(config.layer_terms):
      inputs.append(step(i, inputs[-1], layer_term))
    unchanged += jax.device_get(loss_and_count(params, inputs[-1], batch))
    for number, (i, term) in enumerate(changes):
      x = step(i, inputs[i], term)
      for j in range(i + 1, config.num_layers):
        x = step(j, x, config.layer_terms[j])
      changed[number] += jax.device_get(loss_and_count(params, x, batch))
  return float(unchanged[0] / unchanged[1]), [float(loss / count) for loss, count in changed]


def _only_block(model: Transformer, x: jax.Array, segment_ids: jax.Array, i: jax.Array) -> Any:
  """Returns the output of the block of a model that has one, as if it were the i-th."""
  blocks: Any = model.layers
  return blocks[0](x, segment_ids, i)


def _loss_and_count(
  config: TransformerConfig, loss_chunk: int, params: Params, x_BxNxE: jax.Array, batch: Batch
) -> jax.Array:
  """Returns the summed loss and the number of targets over all devices, float32 [2].

  Args:
    x_BxNxE: output of the last layer.
  """
  hidden = Transformer(config).apply(
    {"params": params}, x_BxNxE, method=lambda model, x: model.final_norm(x)
  )
  assert isinstance(hidden, jax.Array)
  loss = chunked_cross_entropy(
    hidden.reshape(-1, config.embed_dim),
    output_matrix(config, params),
    batch["targets"].reshape(-1),
    batch["counted"].reshape(-1),
    loss_chunk,
  )
  count = jnp.sum(batch["counted"]).astype(jnp.float32)
  return jax.lax.psum(jnp.stack([loss, count]), AXES)


def pattern(rises: Sequence[Sequence[float]], long: int, k: int, window: int, budget: int) -> str:
  """Returns a pattern of sparsek layers that see `budget` keys per query on average.

  All heads have this window, most have this k, and those whose loss rises most share the rest of
  the budget.

  Args:
    rises: of the loss, when KV head 0, 1, ... of layer 0, 1, ... alone sees recent tokens only; a
      single number for a layer stands for all its heads.
    long: number of heads, or of layers, that share the rest.
    k, window, budget: numbers of keys. With k=0 most heads see the window alone.
  Raises:
    ValueError: if their k would be less than k, or 0.
  """
  heads = len(rises[0])
  order = sorted(
    ((i, head) for i in range(len(rises)) for head in range(heads)),
    key=lambda place: -rises[place[0]][place[1]],
  )
  rest = len(order) * (budget - window) - (len(order) - long) * k
  if rest // long < max(k, 1):
    raise ValueError(
      f"budget={budget} must be at least {window + max(k, 1)}, for a window of {window} "
      f"and k={k} in every {'layer' if heads == 1 else 'head'}"
    )
  far: list[list[int]] = [[] for _ in rises]
  for i, head in order[:long]:
    far[i].append(head)
  terms = [_term(sorted(of_layer), heads, k, rest // long, window) for of_layer in far]
  runs = [(term, len(list(same))) for term, same in itertools.groupby(terms)]
  return ",".join(term + f"*{times}" * (times > 1) for term, times in runs)


def _term(far: list[int], heads: int, k: int, far_k: int, window: int) -> str:
  """Returns the term of a layer of which some heads have far_k and the others k."""
  if len(far) == heads or far_k == k:
    return f"sparsek:k{far_k}:w{window}"
  if not far:
    return f"sparsek:k{k}:w{window}" if k else f"sliding_window:w{window}"
  if k:
    return f"sparsek:k{k}:w{window}:h{heads_text(far)}:k{far_k}"
  near = [head for head in range(heads) if head not in far]
  return f"sparsek:k{far_k}:w{window}:h{heads_text(near)}:k0"
