"""The kernels for GPUs since Ampere: the shared behaviours on such a GPU; elsewhere the kernels
interpreted, and what they refuse.
"""

import types

import jax
import jax.numpy as jnp
import pytest

import sparsek
from sparsek.attention import api
from sparsek.kernels import devices
from sparsek.kernels.ampere import attention as ampere_attention
from sparsek.kernels.hopper import decode_attention, fused_decode_layer, small_batch_matmul
from tests.kernels.ampere.compiler import GPUS
from tests.kernels.attention_base import ARGUMENTS
from tests.kernels.gpu_attention_base import GpuAttentionTest
from tests.kernels.hopper import interpreted


@pytest.mark.gpu
class TestMosaicMma(GpuAttentionTest):
  implementation = "mosaic_mma"
  specs = tuple(name for name in GpuAttentionTest.specs if name != "head_dim_256")  # refused

  def test_queries_of_the_last_tokens(self, monkeypatch):
    """Tests the kernels, though `sparsek.sparsek_attention` gives them the queries before, too."""
    monkeypatch.setattr(api, "LAST_QUERIES", (self.implementation,))
    super().test_queries_of_the_last_tokens()


@interpreted.slow
@pytest.mark.parametrize("name", [name for name in interpreted.CASES if "wide" not in name])
def test_interpreted_kernels_match_the_truth(name):
  errors = interpreted.errors_of(name, "ampere")
  assert set(errors) == {"out", *ARGUMENTS} and max(errors.values()) < 1e-2, errors


@pytest.mark.parametrize(
  "dtype, head_dim, words",
  [
    ("float32", 64, "float32"),
    ("bfloat16", 136, "head_dim 136; at most 128"),
    ("bfloat16", 64, "needs an NVIDIA GPU"),
  ],
)
def test_says_why_it_cannot_run(dtype, head_dim, words):
  if "NVIDIA" in words and jax.default_backend() == "gpu":
    pytest.skip("there is a GPU")
  x = jnp.zeros((1, 8, 1, head_dim), dtype)
  with pytest.raises(NotImplementedError, match=f"'mosaic_mma' cannot run here: .*{words}"):
    sparsek.sparsek_attention(
      x, x, x, jnp.zeros((1, 8, 1)), k=2, window=2, implementation="mosaic_mma"
    )


@pytest.mark.parametrize(
  "kind, capability, words",
  [
    ("Tesla T4", "7.5", "needs an NVIDIA GPU"),
    ("NVIDIA Tesla T4", "7.5", "capability 8.0 or newer; NVIDIA Tesla T4 has 7.5"),
    ("NVIDIA A100-SXM4-40GB", "8.0", None),
    ("NVIDIA GeForce RTX 4090", "8.9", None),
    ("NVIDIA H200", "9.0", None),
    ("NVIDIA B200", "10.0", None),
    ("AMD MI300", "gfx942", "needs an NVIDIA GPU"),
  ],
)
def test_runs_on_gpus_since_ampere(kind, capability, words, monkeypatch):
  seen = types.SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
  monkeypatch.setattr(jax, "devices", lambda *_: [seen])
  monkeypatch.setattr(devices, "SUPPORTED", True)
  monkeypatch.setattr(devices, "import_refusal", lambda module: None)
  refusal = devices.mma_refusal(jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16))
  assert refusal is None if words is None else words in refusal
  assert devices.can_run_portable() == (capability[0] in "189" and capability != "7.5")


def test_single_tokens_have_kernels_that_need_nothing_of_hopper(monkeypatch):
  seen = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")
  monkeypatch.setattr(jax, "devices", lambda *_: [seen])
  monkeypatch.setattr(devices, "SUPPORTED", True)
  monkeypatch.setattr(devices, "import_refusal", lambda module: None)
  x, matrix = (jax.ShapeDtypeStruct((n, 1024), jnp.bfloat16) for n in (2, 512))
  key = jax.ShapeDtypeStruct((2, 4, 1024, 64), jnp.bfloat16)
  assert decode_attention.supports(key, 8) and small_batch_matmul.supports(2, matrix, x.dtype)
  assert not fused_decode_layer.supports(x, matrix)


@pytest.mark.parametrize("capability, kib", [("8.0", 163), ("8.6", 99), ("9.0", 227), ("12.0", 99)])
def test_kernels_of_single_tokens_need_no_more_shared_memory_than_there_is(
  capability, kib, monkeypatch
):
  seen = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA", compute_capability=capability)
  monkeypatch.setattr(jax, "devices", lambda *_: [seen])
  monkeypatch.setattr(devices, "SUPPORTED", True)
  monkeypatch.setattr(devices, "import_refusal", lambda module: None)
  assert devices.shared_bytes() == kib * 1024 == GPUS[capability].shared_kib * 1024
  matrix = lambda width: jax.ShapeDtypeStruct((512, width), jnp.bfloat16)
  assert small_batch_matmul.supports(8, matrix(4096), jnp.bfloat16)
  assert small_batch_matmul.supports(8, matrix(6144), jnp.bfloat16) == (kib > 105)
  key = jax.ShapeDtypeStruct((512, 4, 4096, 64), jnp.bfloat16)
  assert decode_attention.supports(key, 16)
  assert decode_attention.supports(key, 32) == (kib > 99)


def test_limits_are_those_of_the_kernels():
  assert devices.AMPERE_MAX_HEAD_DIM == max(ampere_attention.KERNELS)
