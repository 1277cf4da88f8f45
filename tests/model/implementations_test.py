import types

import jax
import pytest

from sparsek.config import ATTENTION_KINDS, TransformerConfig
from sparsek.kernels import cudnn, devices
from sparsek.model.implementations import attention_choices, describe_choice

CONFIG = TransformerConfig(
  num_layers=4, embed_dim=128, num_heads=4, num_kv_heads=2, head_dim=32, k=16, window=16
)


def config(attention, **fields):
  return TransformerConfig(**vars(CONFIG) | {"attention": attention} | fields)


def on_gpu(monkeypatch, hopper, dnn=None):
  seen = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA A100")
  monkeypatch.setattr(jax, "devices", lambda *_: [seen])
  monkeypatch.setattr(devices, "hopper_refusal", lambda query: hopper)
  monkeypatch.setattr(devices, "mma_refusal", lambda query: "needs newer JAX")
  refusal = lambda query, segment_ids, window: "packed" if segment_ids is not None else dnn
  monkeypatch.setattr(cudnn, "refusal", refusal)


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_a_cpu_has_one_sentence_without_reasons(kind):
  assert describe_choice(config(kind), 64) == [
    "attention: xla on cpu, for which there are no kernels"
  ]


def test_an_accelerator_has_reasons(monkeypatch):
  on_gpu(monkeypatch, "needs compute capability 9.0")
  refused = (
    "mosaic_gpu cannot run here: needs compute capability 9.0; "
    "mosaic_mma cannot run here: needs newer JAX"
  )
  assert describe_choice(config("sparsek"), 64) == [f"attention: xla on NVIDIA A100; {refused}"]
  mixed = config("sparsek,sliding_window:w8,full,sparsek:k8")
  assert describe_choice(mixed, 64, packed=False) == [
    f"attention of sparsek, sparsek:k8: xla on NVIDIA A100; {refused}",
    "attention of sliding_window:w8, full: cudnn on NVIDIA A100",
  ]
  assert describe_choice(config("full"), 64) == [
    f"attention: xla on NVIDIA A100; cudnn cannot run here: packed; {refused}"
  ]
  heads = config("sparsek:h1:k0:w9,sparsek:k8:h0:k9")
  assert describe_choice(heads, 64, packed=False) == [
    "attention of heads 0 of sparsek:h1:k0:w9, heads 1 of sparsek:k8:h0:k9, heads 0 of "
    f"sparsek:k8:h0:k9: xla on NVIDIA A100; {refused}",
    "attention of heads 1 of sparsek:h1:k0:w9: cudnn on NVIDIA A100",
  ]
  on_gpu(monkeypatch, None)
  assert describe_choice(config("sparsek"), 64) == ["attention: mosaic_gpu on NVIDIA A100"]


def test_one_asked_for_has_no_reasons(monkeypatch):
  on_gpu(monkeypatch, "needs compute capability 9.0")
  asked = config("sparsek", implementation="xla")
  assert describe_choice(asked, 64) == ["attention: xla on NVIDIA A100, as asked for"]
  with pytest.raises(NotImplementedError, match="needs compute capability 9.0"):
    describe_choice(config("sparsek", implementation="mosaic_gpu"), 64)


def test_choices_see_the_shapes_of_the_layers(monkeypatch):
  shapes = []
  on_gpu(monkeypatch, None)
  monkeypatch.setattr(devices, "hopper_refusal", lambda query: shapes.append(query.shape) or "no")
  choices = attention_choices(config("sparsek,lsh,sparsek:w128"), 64, batch=3, packed=False)
  assert shapes == [(3, 64, 4, 32), (6, 64, 2, 32)]
  assert {term: choice.implementation for term, choice in choices.items()} == {
    "sparsek": "xla",
    "lsh": "xla",
    "sparsek:w128": "cudnn",  # the window holds the whole row
  }
