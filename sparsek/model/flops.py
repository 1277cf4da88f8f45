"""Floating-point operations of a model, counted for the pairs that its kinds of attention need.

A multiplication and an addition are two operations. Only matrix products count, as is usual: those
with weights, and attention's q.k and p.v. The backward pass takes twice the operations of the
forward pass; what rematerialisation repeats does not count (Chowdhery et al., PaLM, arXiv
2204.02311, appendix B).
"""

import jax
import numpy as np

from sparsek.config import TransformerConfig
from sparsek.model import lora
from sparsek.model.transformer import Params
from sparsek.parallel.hardware import rates


def peak(device: jax.Device) -> float | None:
  """Returns the dense bfloat16 operations per second of a device; None where it is not known."""
  known = rates(device)
  return known and known.flops


def document_lengths(segment_ids: np.ndarray) -> np.ndarray:
  """Returns the lengths of all documents, which are runs of equal ids, in rows [batch, n]; padding
  is a document.
  """
  starts = np.ones(segment_ids.shape, bool)
  starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
  edges = np.append(np.flatnonzero(starts), segment_ids.size)
  return np.diff(edges)


def attended_pairs(kind: str, lengths: np.ndarray, k: int, window: int, head_dim: int) -> int:
  """Counts the pairs of a query and a key that it attends to, in documents of these lengths; an
  upper bound for kinds whose queries sometimes see fewer keys.

  The work of a linear layer on its state counts as head_dim keys.
  """

  def up_to(most, lengths):
    """Sums min(i, most) over i = 1, ..., length, of all documents."""
    short = np.minimum(lengths, most)
    return int(np.sum(short * (short + 1) // 2 + (lengths - short) * most))

  lengths = np.asarray(lengths, np.int64)
  if kind == "full":
    return up_to(lengths.max(initial=0), lengths)
  if kind == "lsh":
    return up_to(k + window, lengths)
  near = up_to(window, lengths)
  if kind == "linear":
    return near + head_dim * int(np.sum(lengths))
  return near if kind == "sliding_window" else near + up_to(k, np.maximum(lengths - window, 0))


def matrix_parameters(params: Params) -> int:
  """Counts the parameters that every token is multiplied with: those of matrices. Tied embeddings
  count once, as the output; untied ones are only looked up.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  kernels = sum(leaf.size for path, leaf in leaves if path[-1].key in lora.MATRICES)
  return kernels + ("lm_head" not in params) * params["embed"]["embedding"].size


def training_flops(config: TransformerConfig, params: Params, lengths: np.ndarray) -> int:
  """Counts the operations of one forward and backward pass over documents of these lengths; frozen
  matrices beside adapters have no gradients.

  Args:
    config: the model.
    params: its parameters, or their shapes.
    lengths: [documents], of all rows.
  """
  frozen = lora.split(params)[1]
  with_weights = (
    2
    * (3 * matrix_parameters(params) - (matrix_parameters(frozen) if frozen else 0))
    * int(np.sum(lengths))
  )
  pairs = sum(
    of.num_heads * attended_pairs(kind, lengths, of.k, of.window, config.head_dim)
    for layer in config.layer_configs
    for of, kind in ((group.config, group.kind) for group in layer.head_groups)
  )
  return with_weights + 3 * 4 * config.head_dim * pairs
