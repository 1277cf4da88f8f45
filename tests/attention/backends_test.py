"""The choice of an implementation, and imports of backends."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import sparsek
from sparsek.attention.backends import Choice, choose_implementation, choose_window_implementation
from sparsek.kernels import cudnn, devices

QUERY = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)
IDS = jax.ShapeDtypeStruct((2, 128), jnp.int32)


@pytest.fixture
def refusals(monkeypatch):
  """Sets why each backend cannot run: None where it can."""

  def refuse(mosaic_gpu=None, mosaic_tpu=None, cudnn_=None, mosaic_mma="no Ampere"):
    monkeypatch.setattr(devices, "hopper_refusal", lambda query: mosaic_gpu)
    monkeypatch.setattr(devices, "mma_refusal", lambda query: mosaic_mma)
    monkeypatch.setattr(devices, "tpu_refusal", lambda query: mosaic_tpu)
    monkeypatch.setattr(cudnn, "refusal", lambda query, segment_ids, window: cudnn_)

  return refuse


def test_the_fastest_is_chosen_and_reasons_are_kept(refusals):
  refusals("no Hopper", "no TPU", "no cuDNN")
  assert choose_implementation(None, QUERY, IDS, 64) == Choice(
    "xla", {"mosaic_gpu": "no Hopper", "mosaic_mma": "no Ampere", "mosaic_tpu": "no TPU"}
  )
  everywhere = {
    "cudnn": "no cuDNN",
    "mosaic_gpu": "no Hopper",
    "mosaic_mma": "no Ampere",
    "mosaic_tpu": "no TPU",
  }
  assert choose_implementation(None, QUERY, IDS, 128) == Choice("xla", everywhere)
  assert choose_window_implementation(None, QUERY, IDS, 64) == Choice("xla", everywhere)
  refusals("no Hopper", None, "no cuDNN")
  assert choose_implementation(None, QUERY, IDS, 64) == Choice(
    "mosaic_tpu", {"mosaic_gpu": "no Hopper", "mosaic_mma": "no Ampere"}
  )
  refusals("no Hopper", "no TPU", "no cuDNN", None)
  for choice in (
    choose_implementation(None, QUERY, IDS, 64),
    choose_window_implementation(None, QUERY, IDS, 64),
  ):
    assert choice.implementation == "mosaic_mma"
    assert choice.refusals["mosaic_gpu"] == "no Hopper"
  refusals(None, "no TPU", "no cuDNN")
  assert choose_window_implementation(None, QUERY, IDS) == Choice(
    "mosaic_gpu", {"cudnn": "no cuDNN"}
  )
  refusals(None, "no TPU", None)
  assert choose_implementation(None, QUERY, None, 64).implementation == "mosaic_gpu"
  assert choose_implementation(None, QUERY, None, 128) == Choice("cudnn", {})
  assert choose_window_implementation(None, QUERY, None, 64) == Choice("cudnn", {})


def test_the_one_asked_for_runs_or_raises(refusals):
  refusals("no Hopper", None, "no cuDNN")
  for name in ("reference", "xla", "mosaic_tpu"):
    assert choose_implementation(name, QUERY, IDS, 64) == Choice(name, {})
  for choose, name, reason in (
    (choose_implementation, "mosaic_gpu", "no Hopper"),
    (choose_window_implementation, "mosaic_gpu", "no Hopper"),
    (choose_window_implementation, "cudnn", "no cuDNN"),
  ):
    with pytest.raises(NotImplementedError, match=f"'{name}' cannot run here: {reason}; use 'xla'"):
      choose(name, QUERY, IDS, 64)


BROKEN_MOSAIC = """
import sys

class Gone:
  def find_spec(self, name, path=None, target=None):
    if name.startswith(("jax.experimental.mosaic", "jax._src.pallas.mosaic")):
      raise ImportError(f"{name} has moved")

sys.meta_path.insert(0, Gone())
import jax, jax.numpy as jnp, sparsek
from sparsek.attention.backends import choose_implementation
from sparsek.kernels import devices

x = jnp.ones((1, 8, 2, 64), jnp.bfloat16)
attend = lambda **options: sparsek.sparsek_attention(
  x, x, x, jnp.ones((1, 8, 2)), k=2, window=2, **options
)
assert jnp.all(attend() == 1)
devices._hopper_device_refusal = lambda: None  # as on a Hopper GPU
devices.mma_refusal = lambda query: devices.import_refusal("ampere.attention")
choice = choose_implementation(None, x, None, 2)
assert choice.implementation == "xla"
reason = choice.refusals["mosaic_gpu"]
start = f"kernels/hopper/attention.py cannot be imported with JAX {jax.__version__}: "
assert reason.startswith(start), reason
assert choice.refusals["mosaic_mma"].startswith("kernels/ampere/attention.py cannot be imported")
assert jnp.all(attend() == 1)
try:
  attend(implementation="mosaic_gpu")
except NotImplementedError as error:
  assert reason in str(error)
  print("refused")
"""


@pytest.mark.slow
def test_a_jax_without_private_names_leaves_attention_usable():
  ended = subprocess.run(
    [sys.executable, "-c", BROKEN_MOSAIC], capture_output=True, text=True, timeout=300
  )
  assert ended.stdout == "refused\n", ended.stderr


IMPORTS = """
import sys
import jax, flax

def added(names):
  before = set(sys.modules)
  for name in names:
    __import__(name)
  return set(sys.modules) - before

ours = added(["sparsek"])
import optax
commands = [f"experiments.{name}" for name in ("pretrain", "generate", "evaluate", "benchmark")]
for name in ours | added(["sparsek.training.loop", *commands]):
  private = ("jax.experimental.mosaic", "jax.experimental.pallas", "jaxlib.mlir", "jax._src.pallas")
  if name.startswith(private):
    print("private:", name)
for name in ours:
  if name.split(".")[0] in ("chex", "grain", "optax", "orbax", "tensorstore", "tokenizers"):
    print("heavy:", name)
"""


@pytest.mark.slow
def test_importing_is_light_and_needs_no_private_name():
  ended = subprocess.run(
    [sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=300
  )
  assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr


def test_public_names():
  assert set(sparsek.__all__) <= set(dir(sparsek))
  assert all(getattr(sparsek, name) is not None for name in sparsek.__all__)
  with pytest.raises(AttributeError, match="module 'sparsek' has no attribute 'nothing'"):
    sparsek.nothing  # noqa: B018
