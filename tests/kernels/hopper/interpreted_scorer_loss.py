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
from sparsek.kernels.hopper.scorer_loss import attention_mass
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
  """Returns the relative error of the loss, and the error of the gradient as a part of its largest
  element.
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

  def run(shard, scores, key):
    return attention_mass(
      scores,
      asked,
      key,
      positions - shard * length,
      start - shard * length,
      weight,
      window=case.window,
      scale=case.head_dim**-0.5 if case.scale is None else case.scale,
      axis="context" if shards > 1 else None,
      interpret=InterpretGPUParams(),
    )

  if shards == 1:
    loss, gradient = run(0, scores, key)
  else:
    cut = lambda x: jnp.split(x, shards, axis=1)
    results = in_turn(run, list(zip(range(shards), cut(scores), cut(key))))
    loss, gradient = results[0][0], jnp.concatenate([part for _, part in results], axis=1)
  want, expected = written_out(scores, query, key, queries, case.window, ids, case.scale)
  return {
    "loss": abs(float(loss) / want - 1),
    "gradient": float(np.max(np.abs(gradient - expected)) / np.max(np.abs(expected))),
  }


if __name__ == "__main__":
  results = {name: errors(case) for name, case in CASES.items()}
  results["shards"] = errors(CASES["documents"], shards=2)
  results |= {name: errors(SHARED["scores"], name) for name in sys.argv[1:]}
  print(json.dumps(results))
