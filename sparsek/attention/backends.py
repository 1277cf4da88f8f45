"""The choice of an implementation of attention, with the reasons why faster ones cannot run.

Kernels for GPUs and TPUs are imported when they are chosen, and not before: they need private
names of JAX.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from sparsek.kernels import cudnn, devices

# These take scores [batch, heads, n]; the fastest comes first.
PALLAS = ("mosaic_gpu", "mosaic_mma", "mosaic_tpu")
GPU_KERNELS = ("mosaic_gpu", "mosaic_mma")
# These take queries of the last tokens alone. "mosaic_mma" can, too, but a fault of its gradients
# was mended without a card: see tests/kernels/ampere/attention_test.py.
LAST_QUERIES = ("mosaic_gpu",)
Query = jax.Array | jax.ShapeDtypeStruct


class Choice(NamedTuple):
  """The implementation that runs, and why each faster one does not.

  Attributes:
    implementation: "cudnn", one of PALLAS, "xla" or "reference".
    refusals: of each faster implementation that was considered, why it cannot run here; empty where
      the implementation was asked for by name.
  """

  implementation: str
  refusals: dict[str, str]


def refusal(
  implementation: str, query: Query, segment_ids: Query | None, window: int
) -> str | None:
  """Returns why an implementation cannot run on `query` here, or None; only shapes and dtypes of
  the arrays count.
  """
  if implementation == "cudnn":
    return cudnn.refusal(query, segment_ids, window)
  if implementation == "mosaic_gpu":
    return devices.hopper_refusal(query)
  if implementation == "mosaic_mma":
    return devices.mma_refusal(query)
  return devices.tpu_refusal(query) if implementation == "mosaic_tpu" else None


def choose_implementation(
  implementation: str | None, query: Query, segment_ids: Query | None, window: int
) -> Choice:
  """Returns the implementation of SPARSEK attention to run.

  Where the window holds the whole row no token ever leaves it, so scores do not matter, and cuDNN
  can run.

  Raises:
    NotImplementedError: if the one asked for cannot run here.
  """
  whole = ("cudnn",) if window >= query.shape[1] else ()
  return _choose(implementation, (*whole, *PALLAS), query, segment_ids, window)


def choose_window_implementation(
  implementation: str | None, query: Query, segment_ids: Query | None, window: int | None = None
) -> Choice:
  """Returns the implementation of a sliding window, or of full attention (window=None), to run.

  Raises:
    NotImplementedError: if the one asked for cannot run here.
  """
  window = query.shape[1] if window is None else window
  return _choose(implementation, ("cudnn", *PALLAS), query, segment_ids, window)


def _choose(implementation, fastest_first, query, segment_ids, window) -> Choice:
  if implementation is not None:
    reason = refusal(implementation, query, segment_ids, window)
    if reason:
      raise NotImplementedError(
        f"implementation={implementation!r} cannot run here: {reason}; use 'xla', "
        "which runs on every device"
      )
    return Choice(implementation, {})
  refusals: dict[str, str] = {}
  for name in fastest_first:
    reason = refusal(name, query, segment_ids, window)
    if not reason:
      return Choice(name, refusals)
    refusals[name] = reason
  return Choice("xla", refusals)


def padding(implementation: str, length: int) -> int:
  """Returns how many tokens an implementation adds to rows of that length.

  It would copy the rows for that; who makes a row for it may add them at no cost.
  """
  if implementation not in GPU_KERNELS:
    return 0
  from sparsek.kernels.hopper import attention as hopper

  return -length % hopper.chunk_size(length)


def pallas_attention(implementation: str) -> Callable[..., jax.Array]:
  """Imports the attention of one of PALLAS."""
  if implementation == "mosaic_gpu":
    from sparsek.kernels.hopper import attention as hopper

    return hopper.attention
  if implementation == "mosaic_mma":
    from sparsek.kernels.ampere import attention as ampere

    return ampere.attention
  from sparsek.kernels.tpu import attention as tpu

  return tpu.attention
