"""Runs the kernels of the scorers' loss by interpretation and prints their errors as JSON:
python -m tests.kernels.hopper.interpreted_scorer_loss.
"""

import json
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from sparsek.attention.documents import document_bounds
from sparsek.kernels.hopper import scorer_loss
from sparsek.kernels.hopper.scorer_loss import attention_mass, largest_attention
from tests.attention.scorer_loss_base import CASES as SHARED
from tests.attention.scorer_loss_base import Case, changed_scores, example, written_out

CASES = {
  "documents": Case(
    n=300, heads=4, groups=2, head_dim=40, window=7, documents=((1, 240), (2, 10), (0, 50))
  ),
  "wide": Case(n=200, heads=2, groups=1, head_dim=160, window=20, queries=70),
  "window_0": Case(n=129, heads=1, groups=1, head_dim=128, window=0, scale=-0.1, queries=70),
}


def in_turn(run: Callable, arguments: list) -> list:
  """Returns run(*args) for each of `arguments`, whose collectives reduce over all of these calls.

  Only one thread computes at a time: interpreted kernels share what stands for the GPU's memory.
  """
  turn, meeting, shard = threading.Lock(), threading.Barrier(len(arguments)), threading.local()
  parts: list = [None] * len(arguments)

  def collective(reduce):
    def meet(x, axis_name):
      parts[shard.index] = jax.block_until_ready(x)
      turn.release()
      meeting.wait()
      reduced = reduce(jnp.stack(parts), axis=0)
      meeting.wait()
      turn.acquire()
      return reduced

    return meet

  def start(index):
    shard.index = index
    with turn:
      return jax.block_until_ready(run(*arguments[index]))

  collectives = {"pmax": collective(jnp.max), "psum": collective(jnp.sum)}
  with (
    mock.patch.multiple(scorer_loss.lax, **collectives),
    ThreadPoolExecutor(len(arguments)) as threads,
  ):
    return list(threads.map(start, range(len(arguments))))


def errors(case: Case, change: str | None = None, shards: int = 1) -> dict[str, float]:
  """Returns the relative errors of the loss and of the targets, and the error of the gradient as a
  part of its largest element.
  """
  (scores, query, key), queries = example(case, "bfloat16")
  scores = changed_scores(scores, change) if change else scores
  ids, n = case.segment_ids, case.n
  at = lambda x: jnp.take_along_axis(jnp.asarray(x), queries, axis=1)
  start, _ = document_bounds(None if ids is None else jnp.asarray(ids), 2, n)
  counted = at(np.ones((2, n)) if ids is None else ids != 0).astype(jnp.float32)
  positions, start = queries, at(start)
  asked = jnp.take_along_axis(query, queries[..., None, None], axis=1)
  weight = counted / jnp.sum(counted, axis=1, keepdims=True) / case.groups
  length = n // shards
  scale = case.head_dim**-0.5 if case.scale is None else case.scale

  def run(shard, scores, key):
    places = positions - shard * length, start - shard * length
    options = {
      "window": case.window,
      "scale": scale,
      "axis": "context" if shards > 1 else None,
      "interpret": InterpretGPUParams(),
    }
    targets = largest_attention(asked, key, *places, weight, **options)
    return *attention_mass(scores, asked, key, *places, weight, **options), targets

  if shards == 1:
    loss, gradient, targets = run(0, scores, key)
  else:
    cut = lambda x: jnp.split(x, shards, axis=1)
    results = in_turn(run, list(zip(range(shards), cut(scores), cut(key))))
    loss, gradients, parts = zip(*results)
    loss, gradient, targets = loss[0], jnp.concatenate(gradients, 1), jnp.concatenate(parts, 2)
  exact = targets_written_out(query, key, positions, case.window, ids, scale)
  want, expected = written_out(scores, query, key, queries, case.window, ids, case.scale)
  return {
    "loss": abs(float(loss) / want - 1),
    "targets": float(np.max(np.abs(targets - exact) / np.where(exact > 0, exact, 1))),
    "gradient": float(np.max(np.abs(gradient - expected)) / np.max(np.abs(expected))),
  }


def targets_written_out(query, key, queries, window, ids, scale):
  """Returns the largest attention that is paid to each token, [B, G, n], in float64."""
  query, key = (np.asarray(jnp.asarray(x, jnp.float32), np.float64) for x in (query, key))
  (batch, n, heads, _), groups = query.shape, key.shape[2]
  result, token = np.zeros((batch, groups, n)), np.arange(n)
  for b in range(batch):
    of = np.ones(n, int) if ids is None else ids[b]
    document = np.cumsum(np.append(True, of[1:] != of[:-1]))
    for i in (i for i in np.asarray(queries)[b] if of[i]):
      seen = (document == document[i]) & (token <= i)
      for g in range(groups):
        of_group = query[b, i, g * heads // groups : (g + 1) * heads // groups]
        logits = np.where(seen, scale * of_group @ key[b, :, g].T, -np.inf)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        attention = np.mean(weights / weights.sum(axis=1, keepdims=True), axis=0)
        attention = np.where(seen & (token + window <= i), attention, 0)
        result[b, g] = np.maximum(result[b, g], attention)
  return result


if __name__ == "__main__":
  results = {name: errors(case) for name, case in CASES.items()}
  results["shards"] = errors(CASES["documents"], shards=2)
  results |= {name: errors(SHARED["scores"], name) for name in sys.argv[1:]}
  print(json.dumps(results))
