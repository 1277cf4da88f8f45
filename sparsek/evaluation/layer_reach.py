"""Which layers of a model need what stands far back: its loss where one layer at a time sees the
latest tokens only, and a pattern of layers that follows.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sparsek.config import TransformerConfig
from sparsek.model.layers import make_norm
from sparsek.model.transformer import Block, Params, Transformer, layer_params, output_matrix
from sparsek.parallel.mesh import BATCH, make_mesh, put_batch, replicated
from sparsek.training.loss import chunked_cross_entropy, next_token_targets


def losses(
  config: TransformerConfig,
  params: Params,
  batches: Iterable[dict],
  term: str,
  loss_chunk: int = 1024,
  progress: Callable = iter,
) -> tuple[float, list[float]]:
  """Mean loss in nats a token of the model as it is, and where layer i alone attends as `term`
  says, for every i.

  Time is that of num_layers / 2 forward passes, memory that of the hidden states of all layers for
  a batch; few functions are compiled.

  Args:
    config, params: the model.
    batches: of held-out rows, "tokens" and "segment_ids" [B, n + 1]; rows are spread over all
      devices.
    term: of an attention pattern, of a kind that has no parameters of its own, such as
      "sliding_window:w256" or "attention_sinks:k4:w252".
    loss_chunk: tokens whose logits exist at once.
    progress: wraps the batches, as tqdm does.
  """
  mesh = make_mesh()
  params = jax.device_put(params, replicated(mesh))
  over_rows = lambda function, out: jax.jit(
    jax.shard_map(
      function, mesh=mesh, in_specs=(P(), P(BATCH), P(BATCH)), out_specs=out, check_vma=False
    )
  )

  def summed(params, x_BxNxE, batch):
    hidden = (
      make_norm(config)
      .apply({"params": params["final_norm"]}, x_BxNxE)
      .reshape(-1, config.embed_dim)
    )
    targets, counted = (x.reshape(-1) for x in next_token_targets(batch))
    loss = chunked_cross_entropy(
      hidden, output_matrix(config, params), targets, counted, loss_chunk
    )
    return jax.lax.psum(jnp.stack([loss, jnp.sum(counted).astype(jnp.float32)]), BATCH)

  @functools.cache
  def block(term):
    return over_rows(
      lambda args, x, segment_ids: Block(config, term).apply(
        {"params": args[0]}, x, segment_ids, args[1]
      ),
      P(BATCH),
    )

  embed = over_rows(
    lambda params, tokens, segment_ids: Transformer(config).apply(
      {"params": params}, tokens, segment_ids, method="embedded"
    ),
    P(BATCH),
  )
  total = over_rows(summed, P())
  layers = [layer_params(config, params, i) for i in range(config.num_layers)]
  dense, short = 0.0, [0.0] * config.num_layers
  for batch in progress(batches):
    batch = put_batch(mesh, batch)
    segment_ids = batch["segment_ids"][:, :-1]
    step = lambda i, x, term: block(term)((layers[i], jnp.int32(i)), x, segment_ids)
    before = [embed(params, batch["tokens"][:, :-1], segment_ids)]
    for i, own in enumerate(config.layer_terms):
      before.append(step(i, before[-1], own))
    dense += jax.device_get(total(params, before[-1], batch))
    for i in range(config.num_layers):
      x = step(i, before[i], term)
      for j in range(i + 1, config.num_layers):
        x = step(j, x, config.layer_terms[j])
      short[i] += jax.device_get(total(params, x, batch))
  return float(dense[0] / dense[1]), [float(loss / count) for loss, count in short]


def pattern(rises: Sequence[float], long_layers: int, k: int, window: int, budget: int) -> str:
  """A pattern of sparsek layers with `budget` keys a query in the mean: all have this window, most
  have k, and those whose loss rises most have what is left.

  Raises:
    ValueError: where that is less than k.
  """
  longest = set(sorted(range(len(rises)), key=lambda i: -rises[i])[:long_layers])
  left = len(rises) * (budget - window) - (len(rises) - long_layers) * k
  if left // long_layers < k:
    raise ValueError(
      f"budget={budget} must be at least {window + k}, for a window of {window} "
      f"and k={k} in every layer"
    )
  terms = [
    f"sparsek:k{left // long_layers if i in longest else k}:w{window}" for i in range(len(rises))
  ]
  runs = [(term, len(list(same))) for term, same in itertools.groupby(terms)]
  return ",".join(term + f"*{times}" * (times > 1) for term, times in runs)
