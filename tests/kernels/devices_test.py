import types

import jax
import jax.numpy as jnp
import pytest

from sparsek.kernels import cudnn, devices
from sparsek.kernels.hopper import attention as hopper_attention
from sparsek.kernels.tpu import attention as tpu_attention

QUERY = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16)


def device(monkeypatch, platform, kind, capability=None):
  """Lets JAX see one device."""
  seen = types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
  monkeypatch.setattr(jax, "devices", lambda *_: [seen])
  monkeypatch.setattr(jax, "default_backend", lambda: platform)


@pytest.mark.parametrize(
  "platform, kind, capability, supported, words",
  [
    ("cpu", "cpu", None, True, "needs an NVIDIA Hopper GPU.*'cpu'"),
    ("gpu", "AMD MI300", None, True, "needs an NVIDIA Hopper GPU"),
    ("gpu", "NVIDIA A100", "8.0", True, "compute capability 9.0.*NVIDIA A100 has 8.0"),
    ("gpu", "NVIDIA H100", "9.0", False, "needs JAX 0.11 or newer"),
    ("gpu", "NVIDIA H100", "9.0", True, None),
  ],
)
def test_hopper_kernels_run_on_hopper_gpus(
  platform, kind, capability, supported, words, monkeypatch
):
  device(monkeypatch, platform, kind, capability)
  monkeypatch.setattr(devices, "SUPPORTED", supported)
  reason = devices.hopper_refusal(QUERY)
  assert devices.can_run() == (words is None)
  if words is None:
    assert reason is None
  else:
    pytest.raises(RuntimeError, refuse, reason).match(words)


def refuse(reason):
  raise RuntimeError(reason)


def test_a_module_that_cannot_be_imported_is_a_reason(monkeypatch):
  device(monkeypatch, "gpu", "NVIDIA H100", "9.0")
  monkeypatch.setattr(devices, "SUPPORTED", True)
  monkeypatch.setattr(devices, "import_refusal", lambda module: f"{module} is broken")
  assert devices.hopper_refusal(QUERY) == "hopper.attention is broken"
  with pytest.warns(UserWarning, match="hopper.thread_ops is broken; XLA computes instead"):
    assert not devices.can_run()
  device(monkeypatch, "tpu", "TPU v5 lite")
  assert devices.tpu_refusal(QUERY) == "tpu.attention is broken"


@pytest.mark.parametrize("error", [ImportError, AttributeError])
def test_import_refusal_says_which_module_and_version(error, monkeypatch):
  def broken(name):
    raise error(f"{name} wants a name that is gone")

  monkeypatch.setattr(devices.importlib, "import_module", broken)
  assert devices.import_refusal.__wrapped__("hopper.attention") == (
    f"kernels/hopper/attention.py cannot be imported with JAX {jax.__version__}: "
    "sparsek.kernels.hopper.attention wants a name that is gone"
  )


def test_limits_are_those_of_the_kernels():
  assert devices.HOPPER_MAX_HEAD_DIM == max(hopper_attention.HOPPER)
  tpu_attention.tiling(4096, 1, devices.TPU_MAX_HEAD_DIM, 64)


@pytest.mark.parametrize(
  "platform, kind, capability",
  [("gpu", "NVIDIA H100 80GB HBM3", "9.0"), ("tpu", "TPU v6 lite", "unknown")],
)
def test_kernels_are_chosen_for_devices_that_are_not_attached(
  platform, kind, capability, monkeypatch
):
  monkeypatch.setattr(devices, "SUPPORTED", True)
  monkeypatch.setattr(devices, "import_refusal", lambda module: None)
  described = types.SimpleNamespace(
    platform=platform, device_kind=kind, compute_capability=capability
  )

  def refusals():
    return [
      devices.hopper_refusal(QUERY) is None,
      devices.can_run(),
      devices.tpu_refusal(QUERY) is None,
      jax.sharding.get_abstract_mesh().abstract_device,
    ]

  before = refusals()
  with devices.compiling_for(None):
    assert refusals() == before
  with devices.compiling_for(described):
    *chosen, abstract = refusals()
    assert chosen == [platform == "gpu", platform == "gpu", platform == "tpu"]
    assert (abstract.platform, abstract.device_kind) == (platform, kind)
    assert devices.device_here() is devices.first_device() is described
    assert "attached devices only" in cudnn.refusal(QUERY, None, 64)
  assert refusals() == before and devices.target() is None
