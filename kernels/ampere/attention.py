"""SPARSEK attention on GPUs since Ampere by warp-level matrix instructions (mma) and cp.async, with
Pallas Mosaic kernels: those of forward.py, query_gradients.py and key_gradients.py in the place of
the ones for Hopper, in the same computation (hopper/attention.py). The kernels of single threads
that list and gather tokens are the same.
"""

import functools

from sparsek.kernels.ampere import forward, key_gradients, query_gradients
from sparsek.kernels.ampere.warp_products import BLOCK
from sparsek.kernels.hopper import attention as hopper
from sparsek.kernels.hopper.common import Tiling

KERNELS = {
  dim: hopper.Kernels(
    forward.forward,
    query_gradients.query_gradients,
    key_gradients.key_gradients,
    BLOCK,
    Tiling(
      forward_keys=BLOCK,
      forward_stages=1,
      query_keys=BLOCK,
      query_stages=1,
      hold_queries=True,
      late_products=False,
      key_queries=BLOCK,
      key_stages=1,
      early=False,
    ),
  )
  for dim in (64, 128)
}

attention = functools.partial(hopper.attention, kernels=KERNELS)
