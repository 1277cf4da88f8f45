"""SPARSEK and sliding-window attention: a public function each, over all implementations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsek.attention.backends import (
  LAST_QUERIES,
  PALLAS,
  choose_implementation,
  choose_window_implementation,
  pallas_attention,
)
from sparsek.attention.documents import document_bounds
from sparsek.attention.prefix_selection import select
from sparsek.config import GATES, IMPLEMENTATIONS, check_at_least, check_choice
from sparsek.kernels import cudnn, devices, reference, xla

MAX_TOKENS = 2**26
WINDOW_IMPLEMENTATIONS = ("xla", *PALLAS, "cudnn")


def check_arguments(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  scores: jax.Array | None,
  k: int,
  window: int,
  gate: str,
  scale: float | None,
  segment_ids: jax.Array | None,
) -> None:
  """Raises ValueError for arguments that do not fit, naming them."""
  for name, x in (("query", query), ("key", key), ("value", value)):
    if x.ndim != 4:
      raise ValueError(f"{name} must have shape [batch, n, heads, head_dim], got {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name} must be floating point, got {x.dtype}")
  batch, n, heads, head_dim = query.shape
  groups = key.shape[2]
  if n < 1:
    raise ValueError(f"query must hold at least one token, got shape {query.shape}")
  if n > MAX_TOKENS:
    raise ValueError(f"query must hold at most 2^26 tokens a row, got {n}")
  for name, x in (("key", key), ("value", value)):
    if x.shape != (batch, n, groups, head_dim):
      raise ValueError(
        f"{name} must have shape {(batch, n, groups, head_dim)} to go with query {query.shape} "
        f"and key {key.shape}, got {x.shape}"
      )
    if x.dtype != query.dtype:
      raise ValueError(f"{name} must have query's dtype {query.dtype}, got {x.dtype}")
  if heads < 1 or head_dim < 1:
    raise ValueError(f"query must have at least one head and head_dim 1, got shape {query.shape}")
  if groups < 1 or heads % groups:
    raise ValueError(f"query's {heads} heads must be a multiple of key's {groups}")
  if scores is not None:
    if scores.shape != (batch, n, groups):
      raise ValueError(
        f"scores must have shape {(batch, n, groups)}, one per token and key "
        f"head, got {scores.shape}"
      )
    if not jnp.issubdtype(scores.dtype, jnp.floating):
      raise ValueError(f"scores must be floating point, got {scores.dtype}")
  for name, number, minimum in (("k", k, 1), ("window", window, 0)):
    if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
      raise ValueError(f"{name}={number!r} must be a Python integer")
    check_at_least(name, int(number), minimum)
  check_choice("gate", gate, GATES)
  if scale is not None and not isinstance(scale, (int, float, np.number)):
    raise ValueError(f"scale={scale!r} must be a Python number or None")
  if segment_ids is not None and (
    segment_ids.shape != (batch, n) or not jnp.issubdtype(segment_ids.dtype, jnp.integer)
  ):
    raise ValueError(
      f"segment_ids must be integers of shape {(batch, n)}, got "
      f"{segment_ids.dtype} {segment_ids.shape}"
    )


def resolve_window(
  implementation: str | None,
  query: jax.Array,
  segment_ids: jax.Array | None,
  window: int | None = None,
) -> str:
  """Returns the implementation of a sliding window, or of full attention (window=None), to run.

  Raises:
    NotImplementedError: if the one asked for cannot run here.
  """
  return choose_window_implementation(implementation, query, segment_ids, window).implementation


def sparsek_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  scores: jax.Array,
  *,
  k: int,
  window: int,
  gate: str = "straight_through",
  scale: float | None = None,
  segment_ids: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  r"""Attends, causally, from every query to its `window` latest tokens and to the k best-scored
  tokens before them.

  .. math:: o_i = \sum_j \mathrm{softmax}_j(\ell_{ij})\, m_{ij}\, v_j, \qquad
     p_{ij} = \mathrm{clip}(u_j - \tau_i, 0, 1)

  Token j is in the window of query i for `i - window < j <= i` and a candidate once it has left,
  for `i >= j + window`. The k candidates of highest score (equal scores: the earlier token) and the
  window share one softmax. tau_i is the causal SPARSEK threshold of all candidates; window keys
  have gate 1. The gates:

    "straight_through": logit `scale q.k`, m = 1; query, key and value get the gradient of that, and
      the scores the one that "value" would give them.
    "value": logit `scale q.k`, m = p (the paper's hard-key, soft-value form).
    "key_value": logit `p scale q.k`, m = p (the paper's Select(Diag(p)) form).

  With k >= n or window >= n this is dense causal attention.

  Args:
    query: [batch, n, H, D] float.
    key, value: [batch, n, G, D], of query's dtype; H must be a multiple of G. A key or value that
      is not finite makes the outputs that see it NaN and, under "reference" and "xla", no others.
      The kernels for GPUs and TPUs, cuDNN's too, multiply whole tiles, with weight 0 where a query
      must not look, and 0 * NaN is NaN: padding must hold finite numbers there.
    scores: [batch, n, G] float; computed on in float32. NaN and infinities: see
      `sparsek.causal_sparsek`.
    k: selected keys per query, >= 1.
    window: latest tokens that every query sees, itself included, >= 0.
    gate: see above.
    scale: of the logits; 1 / sqrt(D) by default.
    segment_ids: [batch, n] integers; every run of equal ids is a document, and nothing crosses from
      one to the next.
    implementation: "reference" (O(n^2)), "xla" (linear, any device), "mosaic_gpu", "mosaic_mma",
      "mosaic_tpu"; by default the fastest that can run here.

  Returns:
    [batch, n, H, D] in query's dtype; a query that sees no key (window 0 and every score -inf) gets
    0. The batch may be empty.

  Raises:
    ValueError: for arguments that do not fit, naming them.
    NotImplementedError: if the implementation asked for by name cannot run here, with the reason.

  Reference: Lou, Jia, Zheng, Tu. Sparser is Faster and Less is More, arXiv 2406.16747.
  """
  query, key, value, scores = (jnp.asarray(x) for x in (query, key, value, scores))
  segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
  check_arguments(query, key, value, scores, k, window, gate, scale, segment_ids)
  check_choice("implementation", implementation, (None, *IMPLEMENTATIONS))
  n = query.shape[1]
  k, window = min(int(k), n), min(int(window), n)  # before any int32 is computed with them
  if not query.size:  # no rows
    return query
  options = Options(k, window, gate, query.shape[-1] ** -0.5 if scale is None else float(scale))
  chosen = choose_implementation(implementation, query, segment_ids, window).implementation
  return _sparsek_attention(chosen, query, key, value, scores, segment_ids, options)


class Options(NamedTuple):
  """Settings of attention, checked; k and window are at most the length."""

  k: int
  window: int
  gate: str
  scale: float


def _sparsek_attention(
  chosen: str,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  scores: jax.Array,
  segment_ids: jax.Array | None,
  options: Options,
) -> jax.Array:
  """Runs the chosen implementation."""
  k, window, _, scale = options
  if chosen == "cudnn":
    return cudnn.attention(query, key, value, window=window, scale=scale)
  if chosen == "reference":
    return reference.attention(
      query, key, value, scores, segment_ids=segment_ids, **options._asdict()
    )
  scores = jnp.swapaxes(scores.astype(jnp.float32), 1, 2)
  start, end = document_bounds(segment_ids, *query.shape[:2])
  selection = select(
    scores, start, end, k, window, segment_ids is not None, devices.can_run_portable()
  )
  return attend_selected(chosen, query, key, value, scores, selection, start, end, options)


def attend_selected(
  chosen: str,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  scores: jax.Array,
  selection: tuple[jax.Array, jax.Array, jax.Array],
  start: jax.Array,
  end: jax.Array,
  options: Options,
) -> jax.Array:
  """Runs "xla" or a Pallas implementation, given the selection.

  Args:
    chosen: the implementation.
    query: [batch, m, H, D], of the last m tokens.
    key, value: as in `sparsek_attention`.
    scores: [batch, G, n] float32.
    selection: threshold, expiry and order, [batch, G, n] each, as from `select`.
    start, end: [batch, n], from `document_bounds`.
    options: settings.
  """
  attention = pallas_attention(chosen) if chosen in PALLAS else _xla_attention
  # The others need a query for each token.
  missing = 0 if chosen in LAST_QUERIES else key.shape[1] - query.shape[1]
  query = jnp.pad(query, ((0, 0), (missing, 0), (0, 0), (0, 0)))
  out = attention(query, key, value, scores, *selection, start, end, **options._asdict())
  return out[:, missing:]


def _xla_attention(query, key, value, scores, threshold, expiry, order, start, end, **options):
  """Runs "xla" with the arguments of the Pallas implementations."""
  del order, end
  scores, threshold, expiry = (jnp.swapaxes(x, 1, 2) for x in (scores, threshold, expiry))
  return xla.attention(query, key, value, scores, threshold, expiry, start, **options)


def attend_window(
  chosen: str,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  start: jax.Array,
  end: jax.Array,
  window: int,
  scale: float,
) -> jax.Array:
  """Runs an implementation of the sliding window on documents, or "cudnn" on whole rows."""
  if chosen == "cudnn":
    return cudnn.attention(query, key, value, window=window, scale=scale)
  batch, n, groups = key.shape[:3]
  zeros = jnp.zeros((batch, groups, n), jnp.float32)
  never = zeros.astype(jnp.int32)
  options = Options(0, window, "straight_through", scale)
  return attend_selected(
    chosen, query, key, value, zeros, (zeros, never, never), start, end, options
  )


def sliding_window_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  window: int,
  scale: float | None = None,
  segment_ids: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Attends, causally, from every query to its `window` latest tokens, in time linear in n.

  Arguments, result and errors are as in `sparsek_attention`, except the implementation: "xla",
  "mosaic_gpu", "mosaic_mma", "mosaic_tpu", "cudnn" (without segment_ids), or None for the fastest
  that can run.
  """
  check_at_least("window", window, 1)
  check_choice("implementation", implementation, (None, *WINDOW_IMPLEMENTATIONS))
  query, key, value = (jnp.asarray(x) for x in (query, key, value))
  segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
  check_arguments(query, key, value, None, 1, window, "straight_through", scale, segment_ids)
  scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
  batch, n = key.shape[:2]
  window = min(int(window), n)
  if not query.size:
    return query
  start, end = document_bounds(segment_ids, batch, n)
  chosen = resolve_window(implementation, query, segment_ids, window)
  return attend_window(chosen, query, key, value, start, end, window, scale)
