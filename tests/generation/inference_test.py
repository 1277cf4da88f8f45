"""Tests of when generation uses the Hopper kernels; cache_test.py compares values."""

import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from sparsek.generation import inference
from sparsek.kernels.hopper import small_batch_matmul

KERNELS = ("small_batch_matmul", "fused_decode_layer", "decode_attention")


def test_the_import_of_generation_reaches_no_decoding_kernels():
  program = "import sys, sparsek, sparsek.generation.session; print(*sys.modules)"
  result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  modules = set(result.stdout.split())
  assert "sparsek.generation.session" in modules, result.stderr
  kernels = {f"sparsek.kernels.hopper.{name}" for name in KERNELS}
  assert not modules & {*kernels, "sparsek.generation.cached_kernels"}


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
def test_kernels_that_cannot_be_imported_are_not_used(monkeypatch):
  hopper = SimpleNamespace(platform="gpu", compute_capability="9.0")
  monkeypatch.setattr(jax, "devices", lambda: [hopper])
  assert inference.can_run()
  monkeypatch.setitem(sys.modules, "sparsek.kernels.hopper.thread_ops", None)
  assert not inference.can_run()


def test_other_devices_run_no_kernels(monkeypatch):
  for platform, capability in (("gpu", "8.0"), ("tpu", "9.0"), ("cpu", "")):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda device=device: [device])
    assert not inference.can_run()


def test_the_rows_of_a_scorer_fit_their_kernel():
  assert inference.SCORER_ROWS % small_batch_matmul.COLUMNS == 0
