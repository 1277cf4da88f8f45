"""The layers of a model that need distant tokens, and a layer pattern that follows from them.

A layer needs distant tokens if the loss rises when this layer alone sees recent tokens only.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sparsek.config import TransformerConfig
from sparsek.model.layers import make_norm
from sparsek.model.transformer import Block, Params, Transformer, layer_params, output_matrix
from sparsek.parallel.mesh import ROWS, make_mesh, put_batch, replicated
from sparsek.training.loss import Batch, chunked_cross_entropy, next_token_targets


def losses(
  config: TransformerConfig,
  params: Params,
  batches: Iterable[dict],
  term: str,
  loss_chunk: int = 1024,
  progress: Callable = iter,
) -> tuple[float, list[float]]:
  """Returns the loss of a model, and its loss when a single layer has another kind of attention.

  It takes the time of num_layers / 2 forward passes, and the memory of the hidden states of all
  layers for a batch; few functions are compiled.

  Args:
    config, params: the model.
    batches: of held-out rows, "tokens" and "segment_ids" [B, n + 1]; rows are spread over all
      devices.
    term: of a layer pattern, for the changed layer; of a kind without parameters, such as
      "sliding_window:w256" or "attention_sinks:k4:w252".
    loss_chunk: number of tokens whose logits exist at the same time.
    progress: wraps the batches, as tqdm does.
  Returns:
    the mean loss of the unchanged model, and a list of those with layer 0, 1, ... changed, in nats
    per token.
  """
  mesh = make_mesh()
  params = jax.device_put(params, replicated(mesh))

  def over_rows(function: Callable, out_specs: P) -> Callable:
    in_specs = (P(), P(ROWS), P(ROWS))
    return jax.jit(
      jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    )

  @functools.cache
  def block(layer_term: str) -> Callable:
    def apply(args, x, segment_ids):
      layer, i = args
      return Block(config, layer_term).apply({"params": layer}, x, segment_ids, i)

    return over_rows(apply, P(ROWS))

  def embedded(params, tokens, segment_ids):
    return Transformer(config).apply({"params": params}, tokens, segment_ids, method="embedded")

  embed = over_rows(embedded, P(ROWS))
  loss_and_count = over_rows(functools.partial(_loss_and_count, config, loss_chunk), P())
  layers = [layer_params(config, params, i) for i in range(config.num_layers)]
  # sums of (loss, count)
  unchanged, changed = np.zeros(2, np.float32), np.zeros((config.num_layers, 2), np.float32)
  for batch in progress(batches):
    batch = put_batch(mesh, batch)
    segment_ids = batch["segment_ids"][:, :-1]
    step = lambda i, x, layer_term: block(layer_term)((layers[i], jnp.int32(i)), x, segment_ids)
    inputs = [embed(params, batch["tokens"][:, :-1], segment_ids)]
    for i, layer_term in enumerate(config.layer_terms):
      inputs.append(step(i, inputs[-1], layer_term))
    unchanged += jax.device_get(loss_and_count(params, inputs[-1], batch))
    for i in range(config.num_layers):
      x = step(i, inputs[i], term)
      for j in range(i + 1, config.num_layers):
        x = step(j, x, config.layer_terms[j])
      changed[i] += jax.device_get(loss_and_count(params, x, batch))
  return float(unchanged[0] / unchanged[1]), [float(loss / count) for loss, count in changed]


def _loss_and_count(
  config: TransformerConfig, loss_chunk: int, params: Params, x_BxNxE: jax.Array, batch: Batch
) -> jax.Array:
  """Returns the summed loss and the number of targets over all devices, float32 [2].

  Args:
    x_BxNxE: output of the last layer.
  """
  hidden = make_norm(config).apply({"params": params["final_norm"]}, x_BxNxE)
  assert isinstance(hidden, jax.Array)
  targets, counted = (x.reshape(-1) for x in next_token_targets(batch))
  loss = chunked_cross_entropy(
    hidden.reshape(-1, config.embed_dim),
    output_matrix(config, params),
    targets,
    counted,
    loss_chunk,
  )
  return jax.lax.psum(jnp.stack([loss, jnp.sum(counted).astype(jnp.float32)]), ROWS)


def pattern(rises: Sequence[float], long_layers: int, k: int, window: int, budget: int) -> str:
  """Returns a pattern of sparsek layers that see `budget` keys per query on average.

  All layers have this window, most have this k, and those whose loss rises most share the rest of
  the budget.

  Args:
    rises: of the loss, when layer 0, 1, ... alone sees recent tokens only.
    long_layers: number of layers that share the rest.
    k, window, budget: numbers of keys.
  Raises:
    ValueError: if their k would be less than k.
  """
  longest = set(sorted(range(len(rises)), key=lambda i: -rises[i])[:long_layers])
  rest = len(rises) * (budget - window) - (len(rises) - long_layers) * k
  if rest // long_layers < k:
    raise ValueError(
      f"budget={budget} must be at least {window + k}, for a window of {window} "
      f"and k={k} in every layer"
    )
  terms = [
    f"sparsek:k{rest // long_layers if i in longest else k}:w{window}" for i in range(len(rises))
  ]
  runs = [(term, len(list(same))) for term, same in itertools.groupby(terms)]
  return ",".join(term + f"*{times}" * (times > 1) for term, times in runs)
