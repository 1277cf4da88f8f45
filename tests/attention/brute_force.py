"""SPARSEK in float64 NumPy, one query at a time: slow and obvious."""

import numpy as np


def threshold(z, k):
  """tau with sum clip(z - tau, 0, 1) = k; -inf for k or fewer entries; the lower end where a whole
  interval solves it.
  """
  z = np.asarray(z, np.float64)
  if len(z) <= k:
    return -np.inf
  points = np.sort(np.concatenate([z - 1, z]))
  total = np.array([np.clip(z - t, 0, 1).sum() for t in points])
  right = int(np.argmax(total <= k + 1e-12 * k))  # first breakpoint whose gates sum to at most k
  fractional = (z - 1 < points[right]) & (z >= points[right])
  return points[right] - (k - total[right]) / max(fractional.sum(), 1)


def gates(z, k):
  """[n] gates; -inf entries are out."""
  z = np.asarray(z, np.float64)
  p, present = np.zeros(len(z)), z > -np.inf
  p[present] = np.clip(z[present] - threshold(z[present], k), 0, 1)
  return p


def top_k(z, k):
  """Indices of the k largest, the earlier of equals first; -inf entries are out."""
  order = np.argsort(-np.asarray(z, np.float64), kind="stable")[:k]
  return {int(j) for j in order if z[j] > -np.inf}


def documents(segment_ids):
  """[(first, last + 1)] of the runs of equal ids."""
  cuts = np.flatnonzero(np.diff(segment_ids)) + 1
  return list(zip([0, *cuts], [*cuts, len(segment_ids)]))


def causal_gates(u, k, delay, segment_ids):
  """[n, n] gates p_ij, and the set of selected tokens of every query."""
  n = len(u)
  p, selected = np.zeros((n, n)), [set() for _ in range(n)]
  for first, end in documents(segment_ids):
    for i in range(first, end):
      candidates = slice(first, max(first, i - delay + 1))
      p[i, candidates] = gates(u[candidates], k)
      selected[i] = {first + j for j in top_k(u[candidates], k)}
  return p, selected
