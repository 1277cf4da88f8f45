"""Runs the kernels of the scorers' loss by interpretation and prints their errors as JSON:
python -m tests.kernels.hopper.interpreted_scorer_loss.
"""

import json
import sys

import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from sparsek.attention.documents import document_bounds
from sparsek.kernels.hopper.scorer_loss import attention_mass
from tests.attention.scorer_loss_base import CASES as SHARED
from tests.attention.scorer_loss_base import Case, changed_scores, example, written_out

CASES = {
  "documents": Case(
    n=300, heads=4, groups=2, head_dim=40, window=7, documents=((1, 240), (2, 10), (0, 50))
  ),
  "window_0": Case(n=129, heads=1, groups=1, head_dim=128, window=0, scale=-0.1, queries=70),
}


def errors(case: Case, change: str | None = None) -> dict[str, float]:
  """Returns the relative error of the loss, and the error of the gradient as a part of its largest
  element.
  """
  (scores, query, key), queries = example(case, "bfloat16")
  scores = changed_scores(scores, change) if change else scores
  ids, n = case.segment_ids, case.n
  at = lambda x: jnp.take_along_axis(jnp.asarray(x), queries, axis=1)
  start, _ = document_bounds(None if ids is None else jnp.asarray(ids), 2, n)
  counted = at(np.ones((2, n)) if ids is None else ids != 0).astype(jnp.float32)
  loss, gradient = attention_mass(
    scores,
    jnp.take_along_axis(query, queries[..., None, None], axis=1),
    key,
    queries,
    at(start),
    counted / jnp.sum(counted, axis=1, keepdims=True) / case.groups,
    window=case.window,
    scale=case.head_dim**-0.5 if case.scale is None else case.scale,
    interpret=InterpretGPUParams(),
  )
  want, expected = written_out(scores, query, key, queries, case.window, ids, case.scale)
  return {
    "loss": abs(float(loss) / want - 1),
    "gradient": float(np.max(np.abs(gradient - expected)) / np.max(np.abs(expected))),
  }


if __name__ == "__main__":
  results = {name: errors(case) for name, case in CASES.items()}
  results |= {name: errors(SHARED["scores"], name) for name in sys.argv[1:]}
  print(json.dumps(results))
