"""The kernels for GPUs since Ampere compiled by the real compiler for each compute capability,
without such a GPU; `make test-compile` runs this where the compiler is installed.
"""

import importlib.util

import pytest

from tests.kernels.ampere.compiler import GPUS, measured

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None,
  reason="needs the CUDA compiler of JAX: make test-compile installs it",
)
# Bytes that the gradients of keys spill. In the code for 12.0, that of JAX 0.12, these are pointers
# and the gradient of the scores, which a tile reads between its products; JAX 0.11 spills 96.
MOST_SPILLED = dict.fromkeys(GPUS, 64) | {"12.0": 104}
PORTABLE = {
  "sparsek_walk",
  "sparsek_write_lists",
  "sparsek_gather_rows",
  "sparsek_sum_rows",
  "sparsek_rms_norm_gradients",
  "sparsek_small_batch_matmul",
  "sparsek_attend",
  "sparsek_evict",
}


@pytest.mark.parametrize("capability", GPUS)
def test_compiles(capability):
  """Attention, its selection and all gradients; too much shared memory is an error."""
  cases = ("heads of 128", "heads of 128, value", "heads of 64, key_value")
  figures = measured(capability, *(f"--case={name}" for name in cases))
  assert set(figures["other_kernels"]) >= PORTABLE
  assert set(figures["cases"]) == set(cases)
  for name, kernels in figures["cases"].items():
    assert len(kernels) == 3 + 1  # forward, queries, keys of the lists and of the window
    for kernel in kernels:
      print(f"{capability} {name}: {kernel}")
      assert kernel["shared_bytes"] <= GPUS[capability].shared_kib * 1024
      assert kernel["spilled_bytes"] <= MOST_SPILLED[capability]
