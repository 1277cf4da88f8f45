"""Tests of when generation uses the Hopper kernels; cache_test.py compares values."""

import subprocess
import sys

from sparsek.generation import inference
from sparsek.kernels.hopper import small_batch_matmul

PRIVATE = ("jax.experimental.mosaic", "jax.experimental.pallas", "jaxlib.mlir.dialects")


def modules_after(program: str) -> set[str]:
  program = f"import sys, {program}; print(*sys.modules)"
  result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  return set(result.stdout.split())


def test_the_import_of_generation_needs_no_private_names_of_jax():
  added = modules_after("sparsek, sparsek.generation.session") - modules_after("jax, flax, optax")
  assert "sparsek.generation.session" in added
  assert [name for name in added if name.startswith((*PRIVATE, "sparsek.kernels.hopper."))] == []


def test_the_rows_of_a_scorer_fit_their_kernel():
  assert inference.SCORER_ROWS % small_batch_matmul.COLUMNS == 0
